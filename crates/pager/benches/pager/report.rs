//! The figures as text, JSON and a picture.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: String,
    pages: usize,
    rounds: usize,
    bars: Vec<Bar>,
    /// Median, and the spread from the least to the most.
    figures: BTreeMap<String, [f64; 3]>,
}

/// A ratio and what it is to reach.
#[derive(Debug, Serialize)]
struct Bar {
    what: String,
    ratio: f64,
    at_least: Option<f64>,
    at_most: Option<f64>,
    reached: bool,
}

/// Name, figure, figure that it is divided by, least, most.
type Wanted = (
    &'static str,
    &'static str,
    &'static str,
    Option<f64>,
    Option<f64>,
);

#[rustfmt::skip]
const BARS: [Wanted; 27] = [
    ("single random fault, p50: pager / minimal loop", "single pager p50 us", "single minimal p50 us", None, Some(1.25)),
    ("single random fault, p99: pager / minimal loop", "single pager p99 us", "single minimal p99 us", None, Some(2.0)),
    ("first page of a walk, p50: / single random fault", "first page of a walk p50 us", "single pager p50 us", None, Some(1.25)),
    ("sequential, 1 thread: pager / minimal loop", "sequential 1 pager pages/s", "sequential 1 minimal pages/s", Some(8.0), None),
    ("sequential, 2 threads: pager / minimal loop", "sequential 2 pager pages/s", "sequential 2 minimal pages/s", Some(8.0), None),
    // The minimal loop at 4 threads reaches a fifth of the raw copy: eight times that cannot be had.
    ("sequential, 4 threads: pager / minimal loop", "sequential 4 pager pages/s", "sequential 4 minimal pages/s", None, None),
    ("sequential, 2 threads: pager / raw copy at 64 KiB", "sequential 2 pager pages/s", "raw copy anon 64K pages/s", Some(0.7), None),
    ("sequential, 4 threads: pager / raw copy at 64 KiB", "sequential 4 pager pages/s", "raw copy anon 64K pages/s", Some(0.7), None),
    ("sequential, 1 thread: pager / raw copy at 64 KiB", "sequential 1 pager pages/s", "raw copy anon 64K pages/s", Some(0.7), None),
    ("sequential, memfd tracked: pager / raw copy at 64 KiB", "sequential 1 pager memfd tracked pages/s", "raw copy memfd 64K pages/s", Some(0.7), None),
    ("random, 1 thread: pager / minimal loop", "random 1 pager pages/s", "random 1 minimal pages/s", Some(3.0), None),
    ("random, 2 threads: pager / minimal loop", "random 2 pager pages/s", "random 2 minimal pages/s", Some(3.0), None),
    ("random, 4 threads: pager / minimal loop", "random 4 pager pages/s", "random 4 minimal pages/s", Some(3.0), None),
    ("churn of discards: pager / minimal loop", "churn pager pages/s", "churn minimal pages/s", Some(1.0), None),
    ("churn of discards, memfd tracked: pager / minimal loop", "churn pager memfd tracked pages/s", "churn minimal memfd pages/s", Some(1.0), None),
    ("churn of discards, memfd: both with writes tracked", "churn pager memfd tracked pages/s", "churn minimal memfd tracked pages/s", Some(1.0), None),
    ("compressed build, sequential: by the reader / by a worker", "sequential 1 build pages/s", "sequential 1 build by worker pages/s", None, None),
    ("compressed build, random: by the reader / by a worker", "random 1 build pages/s", "random 1 build by worker pages/s", None, None),
    ("compressed build, single fault, p50: reader / worker", "single build p50 us", "single build by worker p50 us", None, None),
    ("compressed build, single fault, p50: build / raw file", "single build p50 us", "single pager p50 us", None, None),
    ("compressed build, sequential: build / raw file", "sequential 1 build pages/s", "sequential 1 pager pages/s", None, None),
    ("huge pages, sequential: pager / raw copy of 2 MiB", "sequential 1 pager huge pages/s", "raw copy huge 2M pages/s", None, None),
    ("replayed resume: pager / minimal loop", "replay pager pages/s", "replay minimal pages/s", None, None),
    ("replayed resume, working set recorded: pager / minimal", "replay pager recorded pages/s", "replay minimal pages/s", None, None),
    // Without a guest's thinking between its touches the faults run into the prefetching.
    ("replayed resume: waits, working set recorded / not", "replay pager recorded faults", "replay pager faults", None, None),
    ("20 clones / 1, memory: each served by a pager", "clones served, 20: MiB", "clones served, 1: MiB", None, None),
    ("20 clones / 1, memory: private mappings of one file", "clones of a mapped file, 20: MiB", "clones of a mapped file, 1: MiB", None, Some(3.0)),
];

impl Report {
    pub(crate) fn of(samples: &BTreeMap<String, Vec<f64>>, pages: usize, rounds: usize) -> Self {
        let figures: BTreeMap<_, _> = samples
            .iter()
            .map(|(name, values)| (name.clone(), median(values)))
            .collect();
        let mut bars: Vec<_> = BARS
            .iter()
            .filter_map(|wanted| bar(samples, wanted))
            .collect();
        for name in ["churn pager max us", "churn pager memfd tracked max us"] {
            if let Some([_, _, most]) = figures.get(name) {
                bars.push(Bar {
                    what: format!("{name}: the slowest fault, in seconds"),
                    ratio: most / 1e6,
                    at_least: None,
                    at_most: Some(1.0),
                    reached: *most <= 1e6,
                });
            }
        }
        Self {
            machine: machine(),
            pages,
            rounds,
            bars,
            figures,
        }
    }

    pub(crate) fn print(&self) {
        println!(
            "\n{}; {} pages, {} rounds",
            self.machine, self.pages, self.rounds
        );
        println!(
            "\n{:60} {:>12} {:>12} {:>12}",
            "figure", "median", "least", "most"
        );
        for (name, [middle, least, most]) in &self.figures {
            println!("{name:60} {middle:12.1} {least:12.1} {most:12.1}");
        }
        println!(
            "\n{:60} {:>8}  bar",
            "ratio (median of the rounds' own)", ""
        );
        for bar in &self.bars {
            let wanted = match (bar.at_least, bar.at_most) {
                (Some(least), _) => format!(">= {least}"),
                (_, Some(most)) => format!("<= {most}"),
                _ => String::new(),
            };
            let said = match (wanted.is_empty(), bar.reached) {
                (true, _) => "",
                (_, true) => "reached",
                (_, false) => "MISSED",
            };
            println!("{:60} {:8.2}  {wanted:8} {said}", bar.what, bar.ratio);
        }
    }

    pub(crate) fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        let json = serde_json::to_vec_pretty(self).unwrap();
        std::fs::write(dir.join("pager.json"), json).unwrap();
        svg::save(dir.join("pager.svg"), &self.picture()).unwrap();
        println!("\nwritten: {}", dir.join("pager.{json,svg}").display());
    }

    /// Each bar's ratio, as a share of what it is to reach, on a logarithmic scale.
    fn picture(&self) -> svg::Document {
        use svg::node::element::{Line, Rectangle, Text};
        let (left, width, row) = (430.0, 330.0, 26.0);
        let height = 90.0 + row * self.bars.len() as f64;
        let text = |text: &str, x: f64, y: f64| {
            Text::new(text)
                .set("x", x)
                .set("y", y)
                .set("font-size", 13)
                .set("fill", "#1f2933")
        };
        let mut picture = svg::Document::new()
            .set("viewBox", (0, 0, 860, height))
            .set("font-family", "system-ui, 'DejaVu Sans', sans-serif")
            .add(
                Rectangle::new()
                    .set("width", 860)
                    .set("height", height)
                    .set("fill", "#ffffff"),
            )
            .add(text("The pager beside its limits", 24.0, 30.0).set("font-weight", 600))
            .add(text(
                "bar: how far from what is to be reached (line), logarithmic",
                24.0,
                50.0,
            ));
        for (index, bar) in self.bars.iter().enumerate() {
            let y = 70.0 + row * index as f64;
            let better = match (bar.at_least, bar.at_most) {
                (Some(least), _) => bar.ratio / least,
                (_, Some(most)) => most / bar.ratio.max(1e-9),
                _ => 1.0,
            };
            let x = left + width * (0.5 + better.log2().clamp(-4.0, 4.0) / 8.0);
            let middle = left + width * 0.5;
            let colour = if bar.reached { "#159a6c" } else { "#b3261e" };
            picture = picture
                .add(text(&bar.what, 24.0, y + 15.0))
                .add(
                    Rectangle::new()
                        .set("x", middle.min(x))
                        .set("y", y)
                        .set("width", (x - middle).abs().max(1.0))
                        .set("height", row - 8.0)
                        .set("fill", colour),
                )
                .add(text(&format!("{:.2}", bar.ratio), 800.0, y + 15.0));
        }
        let middle = left + width * 0.5;
        picture.add(
            Line::new()
                .set("x1", middle)
                .set("x2", middle)
                .set("y1", 64)
                .set("y2", height - 16.0)
                .set("stroke", "#1f2933"),
        )
    }
}

/// The median of the ratios that each round gives by itself: what disturbs a round disturbs both.
fn bar(samples: &BTreeMap<String, Vec<f64>>, wanted: &Wanted) -> Option<Bar> {
    let (what, over, under, at_least, at_most) = *wanted;
    let ratios: Vec<f64> = samples
        .get(over)?
        .iter()
        .zip(samples.get(under)?)
        .map(|(over, under)| over / under)
        .collect();
    let [ratio, ..] = median(&ratios);
    let reached =
        at_least.is_none_or(|least| ratio >= least) && at_most.is_none_or(|most| ratio <= most);
    Some(Bar {
        what: what.to_owned(),
        ratio,
        at_least,
        at_most,
        reached,
    })
}

fn median(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [
        sorted[sorted.len() / 2],
        sorted[0],
        sorted[sorted.len() - 1],
    ]
}

fn machine() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "Linux {}, {cpus} processors, load {}",
        kernel.trim(),
        load.split(' ').next().unwrap_or_default()
    )
}
