//! `make bench-pager`: the pager beside the physical limits, in one run, as ratios.
//!
//! Every round measures every arm once, one after the other; a figure is the median of the
//! rounds. Touching threads stand on one processor, whoever serves them on another. Options, as
//! environment variables: `PAGER_BENCH_ROUNDS` (5), `PAGER_BENCH_MIB` (128), `PAGER_BENCH_OUT`
//! (a directory for `pager.json` and `pager.svg`), `PAGER_BENCH_ONLY` (some of `limits single all
//! churn`).
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::multiple_unsafe_ops_per_block,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a measuring program: it prints, it stops at the first surprise, its numbers are small"
)]

mod arms;
mod memory;
mod report;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use torpor_pager::{FileSource, WriteTracking};

use arms::{Latency, MinimalLoop, ReadSource, Rng, Touched};
use memory::{Kind, Memory, PAGE};
use report::Report;

/// Single faults in a round.
const SINGLE_FAULTS: usize = 1500;
/// How long a round's churn of discards lasts.
const CHURN: Duration = Duration::from_millis(1000);
/// Threads that discard at once.
const CHURN_THREADS: usize = 3;

fn number(name: &str, default: usize) -> usize {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().unwrap())
}

type Step = fn(&mut Bench);

struct Bench {
    file: File,
    pages: usize,
    cached: Memory,
    samples: BTreeMap<String, Vec<f64>>,
}

fn main() {
    let pages = number("PAGER_BENCH_MIB", 128) << 8;
    let rounds = number("PAGER_BENCH_ROUNDS", 5);
    let file = memory_file(pages);
    let cached = Memory::of_file(&file, pages, true);
    let mut bench = Bench {
        file,
        pages,
        cached,
        samples: BTreeMap::new(),
    };
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        bench.round();
    }
    let out = std::env::var("PAGER_BENCH_OUT").ok();
    let report = Report::of(&bench.samples, pages, rounds);
    report.print();
    if let Some(dir) = out {
        report.write(std::path::Path::new(&dir));
    }
}

/// A raw memory file, every page of it stamped with its number, in the page cache.
fn memory_file(pages: usize) -> File {
    let mut file = tempfile::tempfile().unwrap();
    let mut chunk = vec![0x5a_u8; 256 * PAGE];
    for first in (0..pages).step_by(256) {
        for (bytes, page) in chunk.chunks_mut(PAGE).zip(first..) {
            bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
        }
        file.write_all(&chunk).unwrap();
    }
    file.sync_all().unwrap();
    file
}

impl Bench {
    fn sample(&mut self, name: &str, value: f64) {
        self.samples.entry(name.to_owned()).or_default().push(value);
    }

    fn touched(&mut self, name: &str, touched: Touched) {
        self.sample(&format!("{name} pages/s"), touched.rate);
        self.latency(name, touched.latency);
    }

    fn latency(&mut self, name: &str, latency: Latency) {
        self.sample(&format!("{name} p50 us"), latency.p50_us);
        self.sample(&format!("{name} p99 us"), latency.p99_us);
        self.sample(&format!("{name} max us"), latency.max_us);
        self.sample(&format!("{name} faults"), latency.faults as f64);
    }

    fn round(&mut self) {
        let wanted = std::env::var("PAGER_BENCH_ONLY").unwrap_or_default();
        let steps: [(&str, Step); 4] = [
            ("limits", Self::limits),
            ("single", Self::single),
            ("all", Self::all),
            ("churn", Self::churn),
        ];
        for (name, step) in steps {
            if wanted.is_empty() || wanted.contains(name) {
                step(self);
            }
        }
    }

    fn limits(&mut self) {
        for (kind, name) in [(Kind::Anonymous, "anon"), (Kind::SharedMemfd, "memfd")] {
            for (chunk, size) in [(4 << 10, "4K"), (64 << 10, "64K"), (2 << 20, "2M")] {
                let rate = arms::raw_copy(kind, self.pages, chunk);
                self.sample(&format!("raw copy {name} {size} pages/s"), rate);
            }
        }
        let order = sequential(self.pages);
        let memory = Memory::new(Kind::Anonymous, self.pages);
        let touched = arms::touch_all(&memory, &order, 1, false);
        self.sample("kernel anonymous fault pages/s", touched.rate);
        let mapped = Memory::of_file(&self.file, self.pages, false);
        let touched = arms::touch_all(&mapped, &order, 1, true);
        self.sample("mmap of the cached file pages/s", touched.rate);
    }

    /// Faults one at a time, far apart.
    fn single(&mut self) {
        let order = &random(self.pages)[..SINGLE_FAULTS];
        let memory = Memory::new(Kind::Anonymous, self.pages);
        let minimal = MinimalLoop::start(&memory, &self.cached);
        self.latency("single minimal", arms::touch_single(&memory, order, true));
        drop((minimal, memory));

        let memory = Memory::new(Kind::Anonymous, self.pages);
        let source = arms::file_source(&self.file);
        let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
        self.latency("single pager", arms::touch_single(&memory, order, true));
        arms::checked(&pager);
    }

    /// Every page once: sequential and random, 1, 2 and 4 threads.
    fn all(&mut self) {
        for (order, how) in [
            (sequential(self.pages), "sequential"),
            (random(self.pages), "random"),
        ] {
            for threads in [1, 2, 4] {
                let memory = Memory::new(Kind::Anonymous, self.pages);
                let minimal = MinimalLoop::start(&memory, &self.cached);
                let touched = arms::touch_all(&memory, &order, threads, true);
                self.touched(&format!("{how} {threads} minimal"), touched);
                drop((minimal, memory));
                let touched = self.pager_touches(Kind::Anonymous, &order, threads, false);
                self.touched(&format!("{how} {threads} pager"), touched);
            }
            let touched = self.pager_touches(Kind::SharedMemfd, &order, 1, false);
            self.touched(&format!("{how} 1 pager memfd tracked"), touched);
            let touched = self.pager_touches(Kind::Anonymous, &order, 1, true);
            self.touched(&format!("{how} 1 pager by worker"), touched);
        }
    }

    fn pager_touches(&self, kind: Kind, order: &[u32], threads: usize, by_worker: bool) -> Touched {
        let memory = Memory::new(kind, self.pages);
        let tracking = match kind {
            Kind::Anonymous => WriteTracking::Off,
            Kind::SharedMemfd => WriteTracking::best_of_host().unwrap(),
        };
        let file = self.file.try_clone().unwrap();
        let pager = if by_worker {
            let source = Arc::new(ReadSource(FileSource::new(file).unwrap()));
            arms::pager(&memory, source, tracking, Vec::new())
        } else {
            arms::pager(&memory, arms::file_source(&file), tracking, Vec::new())
        };
        let touched = arms::touch_all(&memory, order, threads, true);
        arms::checked(&pager);
        touched
    }

    /// A guest that frees and faults all the time.
    fn churn(&mut self) {
        for (kind, name) in [
            (Kind::Anonymous, "minimal"),
            (Kind::SharedMemfd, "minimal memfd"),
        ] {
            let memory = Memory::new(kind, self.pages);
            let minimal = MinimalLoop::start(&memory, &self.cached);
            let touched = arms::churn(&memory, CHURN_THREADS, CHURN, false);
            self.touched(&format!("churn {name}"), touched);
            drop((minimal, memory));
        }
        for (kind, name) in [
            (Kind::Anonymous, "pager"),
            (Kind::SharedMemfd, "pager memfd tracked"),
        ] {
            let memory = Memory::new(kind, self.pages);
            let tracking = match kind {
                Kind::Anonymous => WriteTracking::Off,
                Kind::SharedMemfd => WriteTracking::best_of_host().unwrap(),
            };
            let source = arms::file_source(&self.file);
            let pager = arms::pager(&memory, source, tracking, Vec::new());
            let touched = arms::churn(&memory, CHURN_THREADS, CHURN, true);
            self.touched(&format!("churn {name}"), touched);
            arms::checked(&pager);
        }
    }
}

fn sequential(pages: usize) -> Vec<u32> {
    (0..pages as u32).collect()
}

fn random(pages: usize) -> Vec<u32> {
    let mut order = sequential(pages);
    let mut rng = Rng(42);
    for index in (1..order.len()).rev() {
        order.swap(index, rng.below(index + 1));
    }
    order
}
