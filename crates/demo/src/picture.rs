//! The demo's picture: what each arm stores, against what the guest needs and what it was given.

use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text};

use crate::arms::ArmReport;
use crate::{mib, ratio};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 172.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 96.0;
const ROW: f64 = 64.0;
const BAR: f64 = 30.0;
const BOTTOM: f64 = 74.0;
/// About the width of a value's character, at its size of 13 and bold.
const CHARACTER: f64 = 7.4;
/// Distance of the grid's lines.
const GRID_MIB: f64 = 128.0;

pub(crate) const INK: &str = "#1f2933";
pub(crate) const QUIET: &str = "#6b7785";
pub(crate) const FAINT: &str = "#e4e7eb";
pub(crate) const STORED: &str = "#3b82c4";
pub(crate) const LEANEST: &str = "#159a6c";
const NEEDED: &str = "#e07a1f";
pub(crate) const FULL: &str = "#b3261e";

/// Draws the arms.
#[must_use]
pub fn draw(arms: &[ArmReport]) -> Document {
    let ram_mib = arms
        .iter()
        .map(|arm| mib(arm.ram_bytes))
        .fold(1.0, f64::max);
    let scale = Scale { ram_mib };
    let rows = TOP + ROW * f64::from(u32::try_from(arms.len()).unwrap_or(u32::MAX));
    let height = rows + BOTTOM;
    let heading = Heading {
        title: "Memory that a paused guest's build stores, by way of pausing",
        text: "What a paused guest stores",
        below: "uncompressed memory in MiB, through all layers; the same workload, seven ways to pause",
    };
    let mut picture = sheet(WIDTH, height, &heading).add(grid(scale, rows));
    let leanest = arms.iter().map(|arm| arm.memory_stored_bytes).min();
    let mut top = TOP;
    for arm in arms {
        let colour = if leanest == Some(arm.memory_stored_bytes) {
            LEANEST
        } else {
            STORED
        };
        picture = picture.add(row(arm, scale, top, colour));
        top += ROW;
    }
    picture.add(full_ram(scale, rows)).add(legend(rows + 52.0))
}

#[derive(Debug, Clone, Copy)]
struct Scale {
    ram_mib: f64,
}

impl Scale {
    fn x(self, mib: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * mib / self.ram_mib
    }
}

fn row(arm: &ArmReport, scale: Scale, top: f64, colour: &str) -> Group {
    let stored = mib(arm.memory_stored_bytes);
    let bar_top = top + (ROW - BAR) / 2.0;
    let middle = bar_top + BAR / 2.0;
    let end = scale.x(stored);
    let mut row = Group::new()
        .add(label(arm.name, LEFT - 14.0, middle + 5.0, 15, INK).set("text-anchor", "end"))
        .add(rectangle(LEFT, bar_top, (end - LEFT).max(1.0), BAR, colour).set("rx", 3));
    let mut value = format!("{stored:.0}");
    if let Some(nonfree) = arm.guest_nonfree_bytes {
        let x = scale.x(mib(nonfree));
        let marker = line(x, bar_top - 6.0, x, bar_top + BAR + 6.0, NEEDED).set("stroke-width", 3);
        row = row.add(marker);
        if let Some(ratio) = ratio(arm.memory_stored_bytes, nonfree) {
            value = format!(
                "{stored:.0} MiB = {ratio:.2} × not free ({:.0})",
                mib(nonfree)
            );
        }
    }
    let marker = arm
        .guest_nonfree_bytes
        .map_or(end, |bytes| scale.x(mib(bytes)));
    let (x, fill) = place_value(&value, end, marker);
    row.add(label(&value, x, middle + 5.0, 13, fill).set("font-weight", 600))
}

/// Where a bar's value does not touch its marker: in the bar before it, in the bar behind it, or
/// behind both.
fn place_value(value: &str, end: f64, marker: f64) -> (f64, &'static str) {
    let width = CHARACTER * f64::from(u32::try_from(value.chars().count()).unwrap_or(u32::MAX));
    let (before, behind) = (LEFT + 12.0, marker + 12.0);
    if before + width < end.min(marker) {
        (before, "#ffffff")
    } else if marker < end && behind + width < end {
        (behind, "#ffffff")
    } else {
        (end.max(marker) + 12.0, INK)
    }
}

fn grid(scale: Scale, bottom: f64) -> Group {
    let mut grid = Group::new();
    let mut at_mib = 0.0;
    while at_mib <= scale.ram_mib {
        let x = scale.x(at_mib);
        grid = grid.add(line(x, TOP, x, bottom, FAINT)).add(
            label(&format!("{at_mib:.0}"), x, bottom + 18.0, 12, QUIET)
                .set("text-anchor", "middle"),
        );
        at_mib += GRID_MIB;
    }
    grid
}

fn full_ram(scale: Scale, bottom: f64) -> Group {
    let x = scale.x(scale.ram_mib);
    let text = format!("full RAM {:.0}", scale.ram_mib);
    Group::new()
        .add(
            line(x, TOP - 6.0, x, bottom, FULL)
                .set("stroke-width", 2)
                .set("stroke-dasharray", "6 4"),
        )
        .add(label(&text, x, TOP - 12.0, 13, FULL).set("text-anchor", "middle"))
}

fn legend(y: f64) -> Group {
    Group::new()
        .add(rectangle(LEFT, y - 10.0, 14.0, 12.0, STORED).set("rx", 2))
        .add(rectangle(LEFT + 17.0, y - 10.0, 14.0, 12.0, LEANEST).set("rx", 2))
        .add(label(
            "stored (green: the leanest)",
            LEFT + 38.0,
            y,
            13,
            QUIET,
        ))
        .add(line(LEFT + 262.0, y - 13.0, LEFT + 262.0, y + 3.0, NEEDED).set("stroke-width", 3))
        .add(label(
            "what the guest itself counts as not free",
            LEFT + 272.0,
            y,
            13,
            QUIET,
        ))
}

/// What stands above a picture.
pub(crate) struct Heading {
    /// For those who cannot see it.
    pub(crate) title: &'static str,
    /// In large letters.
    pub(crate) text: &'static str,
    /// In small ones.
    pub(crate) below: &'static str,
}

/// An empty picture under its heading.
pub(crate) fn sheet(width: f64, height: f64, heading: &Heading) -> Document {
    Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("height", height)
        .set(
            "font-family",
            "system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif",
        )
        .set("role", "img")
        .add(svg::node::element::Title::new(heading.title))
        .add(rectangle(0.0, 0.0, width, height, "#ffffff"))
        .add(label(heading.text, 24.0, 36.0, 20, INK).set("font-weight", 600))
        .add(label(heading.below, 24.0, 58.0, 13, QUIET))
}

pub(crate) fn rectangle(x: f64, y: f64, width: f64, height: f64, fill: &str) -> Rectangle {
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", width)
        .set("height", height)
        .set("fill", fill)
}

pub(crate) fn line(x1: f64, y1: f64, x2: f64, y2: f64, stroke: &str) -> Line {
    Line::new()
        .set("x1", x1)
        .set("y1", y1)
        .set("x2", x2)
        .set("y2", y2)
        .set("stroke", stroke)
}

pub(crate) fn label(text: &str, x: f64, y: f64, size: u32, fill: &str) -> Text {
    Text::new(text)
        .set("x", x)
        .set("y", y)
        .set("font-size", size)
        .set("fill", fill)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &str = "446 MiB = 3.75 × not free (119)";

    #[test]
    fn a_value_never_stands_on_its_marker_and_never_half_outside_its_bar() {
        for (end, marker) in [
            (685.0, 470.0),
            (672.0, 290.0),
            (434.0, 449.0),
            (268.0, 290.0),
        ] {
            let (x, fill) = place_value(VALUE, end, marker);
            let till = x + CHARACTER * 31.0;
            assert!(till < marker || x > marker, "{end} {marker}");
            assert_eq!(till < end, fill == "#ffffff", "{end} {marker}");
            assert!(till < WIDTH, "{end} {marker}");
        }
    }
}
