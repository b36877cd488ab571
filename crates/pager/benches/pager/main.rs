//! `make bench-pager`: the pager beside the physical limits, in one run, as ratios.
//!
//! Every round measures every arm once, one after the other; a figure is the median of the
//! rounds. Touching threads stand on one processor, whoever serves them on another. Options, as
//! environment variables: `PAGER_BENCH_ROUNDS` (5), `PAGER_BENCH_MIB` (128), `PAGER_BENCH_OUT`
//! (a directory for `pager.json` and `pager.svg`), `PAGER_BENCH_ONLY` (some of `limits single all
//! build huge replay clones churn`).
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
mod build;
mod memory;
mod replay;
mod report;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use torpor_pager::{FileSource, WriteTracking};

use arms::{Latency, MinimalLoop, ReadSource, Rng, Touched};
use build::Build;
use memory::{Kind, Memory, PAGE};
use report::Report;

/// Single faults in a round, at most.
const SINGLE_FAULTS: usize = 1500;
/// What is filled around a random fault: single faults are each in another such window, or they
/// would find their pages there.
const WINDOW_PAGES: usize = 16;
/// How long a round's churn of discards lasts.
const CHURN: Duration = Duration::from_millis(1000);
/// Threads that discard at once.
const CHURN_THREADS: usize = 3;

fn number(name: &str, default: usize) -> usize {
    let value = std::env::var(name).ok();
    value.map_or(default, |value| value.parse().unwrap())
}

/// Clones of one guest.
const CLONES: usize = 20;

type Step = fn(&mut Bench);

struct Bench {
    file: File,
    pages: usize,
    cached: Memory,
    build: Build,
    samples: BTreeMap<String, Vec<f64>>,
}

fn main() {
    let pages = number("PAGER_BENCH_MIB", 128) << 8;
    let rounds = number("PAGER_BENCH_ROUNDS", 5);
    let file = memory_file(pages);
    let cached = Memory::of_file(&file, pages, true);
    let mut bench = Bench {
        build: Build::of(&file, pages),
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
    let mut chunk = vec![0; 256 * PAGE];
    for first in (0..pages).step_by(256) {
        stamp(&mut chunk, first);
        file.write_all(&chunk).unwrap();
    }
    file.sync_all().unwrap();
    file
}

/// Pages that begin with their number, and compress about as well and are decoded about as fast as
/// a guest's memory: 32 bytes like the 32 before them, or, one time in three, new ones.
fn stamp(chunk: &mut [u8], first: usize) {
    let mut rng = Rng(first as u64 + 1);
    for (bytes, page) in chunk.chunks_mut(PAGE).zip(first..) {
        let mut words = [0; 32];
        for bytes in bytes.chunks_mut(32) {
            if rng.below(3) == 0 {
                for word in words.chunks_mut(8) {
                    rng.below(2);
                    word.copy_from_slice(&rng.0.to_le_bytes());
                }
            }
            bytes.copy_from_slice(&words);
        }
        bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
    }
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
        let steps: [(&str, Step); 8] = [
            ("limits", Self::limits),
            ("single", Self::single),
            ("all", Self::all),
            ("build", Self::build),
            ("huge", Self::huge),
            ("replay", Self::replay),
            ("clones", Self::clones),
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
                let rate = arms::raw_copy(&Memory::new(kind, self.pages), chunk);
                self.sample(&format!("raw copy {name} {size} pages/s"), rate);
            }
        }
        for (pages, size) in [(1, "1 page"), (16, "64K"), (64, "256K")] {
            let rate = self.build.decoding(self.pages, pages);
            self.sample(&format!("build decoded {size} pages/s"), rate);
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
        let order = &far_apart(self.pages);
        let memory = Memory::new(Kind::Anonymous, self.pages);
        let minimal = MinimalLoop::start(&memory, &self.cached);
        self.latency("single minimal", arms::touch_single(&memory, order, true));
        drop((minimal, memory));

        let memory = Memory::new(Kind::Anonymous, self.pages);
        let source = arms::file_source(&self.file);
        let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
        self.latency("single pager", arms::touch_single(&memory, order, true));
        arms::checked(&pager);
        drop((pager, memory));

        let memory = Memory::new(Kind::Anonymous, self.pages);
        let source = arms::file_source(&self.file);
        let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
        let latency = arms::touch_first_of_walks(&memory, true);
        self.latency("first page of a walk", latency);
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

    /// A compressed build in place of the raw file: with what is in the page cache decoded by the
    /// reader, and all of it by a worker.
    fn build(&mut self) {
        for (by_worker, name) in [(false, "build"), (true, "build by worker")] {
            for (order, how) in [
                (sequential(self.pages), "sequential 1"),
                (random(self.pages), "random 1"),
            ] {
                let memory = Memory::new(Kind::Anonymous, self.pages);
                let source = Arc::new(self.build.source(by_worker));
                let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
                let touched = arms::touch_all(&memory, &order, 1, true);
                self.touched(&format!("{how} {name}"), touched);
                arms::checked(&pager);
            }
            let order = &far_apart(self.pages);
            let memory = Memory::new(Kind::Anonymous, self.pages);
            let source = Arc::new(self.build.source(by_worker));
            let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
            let latency = arms::touch_single(&memory, order, true);
            self.latency(&format!("single {name}"), latency);
            arms::checked(&pager);
        }
    }

    /// Memory of 2 MiB pages, where the host has some.
    fn huge(&mut self) {
        let Some(memory) = Memory::huge(self.pages) else {
            println!("huge pages were not measured: vm.nr_hugepages is too low");
            return;
        };
        let rate = arms::raw_copy(&memory, 2 << 20);
        self.sample("raw copy huge 2M pages/s", rate);
        drop(memory);
        for (order, how) in [
            (sequential(self.pages), "sequential 1"),
            (random(self.pages), "random 1"),
        ] {
            let memory = Memory::huge(self.pages).unwrap();
            let source = arms::file_source(&self.file);
            let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
            let touched = arms::touch_all(&memory, &order, 1, true);
            self.touched(&format!("{how} pager huge"), touched);
            arms::checked(&pager);
        }
    }

    /// A recorded real resume: faults as they come, and with the recorded working set.
    fn replay(&mut self) {
        let trace = replay::trace();
        let file = replay::memory_file(&trace);
        let cached = Memory::of_file(&file, replay::GUEST_PAGES, true);
        let memory = Memory::new(Kind::Anonymous, replay::GUEST_PAGES);
        let minimal = MinimalLoop::start(&memory, &cached);
        self.touched("replay minimal", replay::replay(&memory, &trace));
        drop((minimal, memory));
        for (prefetch, name) in [
            (Vec::new(), "replay pager"),
            (replay::working_set(&trace), "replay pager recorded"),
        ] {
            let memory = Memory::new(Kind::Anonymous, replay::GUEST_PAGES);
            let source = arms::file_source(&file);
            let pager = arms::pager(&memory, source, WriteTracking::Off, prefetch);
            let touched = replay::replay(&memory, &trace);
            self.touched(name, touched);
            arms::checked(&pager);
        }
    }

    /// What guests that each replay the resume take together, in guest memory: served by pagers,
    /// and as private mappings of one file.
    fn clones(&mut self) {
        let trace = replay::trace();
        let file = replay::memory_file(&trace);
        let mut before = replay::taken_bytes();
        let mut served = Vec::new();
        for clone in 1..=CLONES {
            let memory = Memory::new(Kind::Anonymous, replay::GUEST_PAGES);
            let source = arms::file_source(&file);
            let pager = arms::pager(&memory, source, WriteTracking::Off, Vec::new());
            replay::replay(&memory, &trace);
            served.push((pager, memory));
            self.taken("clones served", clone, before);
        }
        drop(served);
        before = replay::taken_bytes();
        let mut mapped = Vec::new();
        for clone in 1..=CLONES {
            let memory = Memory::of_private_file(&file, replay::GUEST_PAGES);
            replay::replay(&memory, &trace);
            mapped.push(memory);
            self.taken("clones of a mapped file", clone, before);
        }
    }

    fn taken(&mut self, name: &str, clones: usize, before: f64) {
        if clones == 1 || clones == CLONES {
            let taken = replay::taken_bytes() - before;
            self.sample(
                &format!("{name}, {clones}: MiB"),
                taken / f64::from(1 << 20),
            );
        }
    }

    /// A guest that frees and faults all the time.
    fn churn(&mut self) {
        type Start = fn(&Memory, &Memory) -> MinimalLoop;
        let mut arms: Vec<(Kind, &str, Start)> = vec![
            (Kind::Anonymous, "minimal", MinimalLoop::start),
            (Kind::SharedMemfd, "minimal memfd", MinimalLoop::start),
        ];
        if WriteTracking::best_of_host().unwrap() == WriteTracking::Async {
            let start = MinimalLoop::start_tracked;
            arms.push((Kind::SharedMemfd, "minimal memfd tracked", start));
        }
        for (kind, name, start) in arms {
            let memory = Memory::new(kind, self.pages);
            let minimal = start(&memory, &self.cached);
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
    shuffled(sequential(pages))
}

/// A page of each window, any of its pages, in random order.
fn far_apart(pages: usize) -> Vec<u32> {
    let mut rng = Rng(43);
    let windows = shuffled(sequential(pages / WINDOW_PAGES));
    let page_in = |window| window * WINDOW_PAGES as u32 + rng.below(WINDOW_PAGES) as u32;
    windows
        .into_iter()
        .map(page_in)
        .take(SINGLE_FAULTS)
        .collect()
}

fn shuffled(mut order: Vec<u32>) -> Vec<u32> {
    let mut rng = Rng(42);
    for index in (1..order.len()).rev() {
        order.swap(index, rng.below(index + 1));
    }
    order
}
