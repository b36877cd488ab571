//! The bench's picture: a panel of bars for each question, our own bar in another colour, the target
//! as a dashed line.

use svg::Document;
use svg::node::element::Group;

use super::fragmented::Fragmented;
use super::pauses::PauseSeries;
use super::peers::Peers;
use super::scan_time::ScanTimes;
use super::summary::Measured;
use super::warm::Warm;
use crate::arms::{ArmReport, SCAN_REFS};
use crate::picture::{FULL, Heading, INK, LEANEST, QUIET, STORED, label, line, rectangle, sheet};
use crate::{MIB, mib, ratio};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 250.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 64.0;
const TITLE: f64 = 46.0;
const ROW: f64 = 24.0;
const BAR: f64 = 16.0;

/// A question and its answers.
#[derive(Debug, Clone, PartialEq)]
struct Panel {
    title: &'static str,
    bars: Vec<Bar>,
    /// Where the target is, if there is one.
    target: Option<f64>,
}

#[derive(Debug, Clone, PartialEq)]
struct Bar {
    name: String,
    value: f64,
    ours: bool,
}

impl Panel {
    fn height(&self) -> f64 {
        TITLE + ROW * f64::from(u32::try_from(self.bars.len()).unwrap_or(u32::MAX))
    }

    fn scale(&self) -> f64 {
        let most = self.bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
        let most = self.target.unwrap_or(0.0).max(most);
        if most > 0.0 {
            (WIDTH - LEFT - RIGHT) / most
        } else {
            0.0
        }
    }

    fn draw(&self, top: f64) -> Group {
        let scale = self.scale();
        let first = top + TITLE - 14.0;
        let mut group =
            Group::new().add(label(self.title, 24.0, top + 20.0, 14, INK).set("font-weight", 600));
        let mut y = first;
        for bar in &self.bars {
            let (colour, width) = (if bar.ours { LEANEST } else { STORED }, bar.value * scale);
            let middle = y + BAR / 2.0 + 4.0;
            group = group
                .add(label(&bar.name, LEFT - 10.0, middle, 12, INK).set("text-anchor", "end"))
                .add(rectangle(LEFT, y, width.max(1.0), BAR, colour).set("rx", 2))
                .add(label(
                    &value_text(bar.value),
                    LEFT + width + 8.0,
                    middle,
                    12,
                    QUIET,
                ));
            y += ROW;
        }
        match self.target {
            None => group,
            Some(target) => {
                let x = LEFT + target * scale;
                let target = line(x, first - 6.0, x, y - 2.0, FULL);
                group.add(target.set("stroke-width", 2).set("stroke-dasharray", "5 4"))
            }
        }
    }
}

fn value_text(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

/// Draws what was measured.
#[must_use]
pub fn draw(measured: &Measured<'_>) -> Document {
    let panels = [
        scan(measured.scan),
        stored(measured.arms),
        fragmented(measured.fragmented),
        pauses(measured.pauses),
        warm(measured.warm),
        peers(measured.peers),
    ];
    let height = TOP + panels.iter().map(Panel::height).sum::<f64>() + 20.0;
    let heading = Heading {
        title: "Exact capture, beside its targets and its peers",
        text: "Exact capture",
        below: "green: torpor's scan and references; dashed: the target",
    };
    let mut picture = sheet(WIDTH, height, &heading);
    let mut top = TOP;
    for panel in &panels {
        picture = picture.add(panel.draw(top));
        top += panel.height();
    }
    picture
}

fn bar(name: impl Into<String>, value: f64, ours: bool) -> Bar {
    Bar {
        name: name.into(),
        value,
        ours,
    }
}

fn scan(scan: &ScanTimes) -> Panel {
    let rows = scan.booted.iter();
    let bars = rows.map(|row| {
        bar(
            format!("{} MiB, {}", row.memory_bytes / MIB, row.state),
            row.ms_per_gib,
            true,
        )
    });
    Panel {
        title: "Scan of the stopped guest: ms for a GiB of its memory",
        bars: bars.collect(),
        target: Some(5.0),
    }
}

fn stored(arms: &[ArmReport]) -> Panel {
    let bars = arms.iter().filter_map(|arm| {
        let ratio = ratio(arm.memory_stored_bytes, arm.guest_nonfree_bytes?)?;
        Some(bar(arm.name, ratio, arm.name == SCAN_REFS.name))
    });
    Panel {
        title: "Stored memory, uncompressed / what the guest counts as not free",
        bars: bars.collect(),
        target: Some(0.60),
    }
}

fn fragmented(fragmented: &Fragmented) -> Panel {
    let mut bars = vec![bar("scan, at once", fragmented.scan.ratio, true)];
    let reporting = fragmented.reporting.iter();
    bars.extend(reporting.map(|held| {
        bar(
            format!("reporting, {:.0} s", held.after_ms / 1e3),
            held.ratio,
            false,
        )
    }));
    Panel {
        title: "Fragmented guest: memory left / what the guest counts as not free",
        bars,
        target: Some(0.95),
    }
}

fn pauses(series: &[PauseSeries]) -> Panel {
    let bars = series.iter().map(|series| {
        let name = format!("{}, {}", series.arm, series.after.name());
        bar(
            name,
            series.returned.median_ms,
            series.arm == SCAN_REFS.name,
        )
    });
    Panel {
        title: "Request to paused, median, ms",
        bars: bars.collect(),
        target: Some(400.0),
    }
}

fn warm(warm: &Warm) -> Panel {
    Panel {
        title: "The resumed guest's next python3, median, ms",
        bars: vec![
            bar("page cache kept", warm.kept.first.median_ms, true),
            bar("page cache dropped", warm.dropped.first.median_ms, false),
        ],
        target: Some(warm.dropped.first.median_ms * 0.5),
    }
}

fn peers(peers: &Peers) -> Panel {
    let ways = peers.ways.iter();
    Panel {
        title: "The same guest on the disk, MiB",
        bars: ways
            .map(|way| bar(way.name, mib(way.bytes), way.name == SCAN_REFS.name))
            .collect(),
        target: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_and_the_target_end_within_the_picture() {
        let panel = |value, target| Panel {
            title: "x",
            bars: vec![bar("y", value, true)],
            target,
        };
        let room = WIDTH - LEFT - RIGHT;
        assert!((panel(10.0, Some(400.0)).scale() * 400.0 - room).abs() < 1e-6);
        assert!((panel(800.0, Some(400.0)).scale() * 800.0 - room).abs() < 1e-6);
        assert!(panel(0.0, None).scale().abs() < 1e-9);
    }
}
