//! What is compared: the physical limits, the minimal loop, and the pager, all on the same work.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::mm::Advice;
use rustix::thread::CpuSet;
use torpor_pager::{
    Backing, FileSource, PageRun, PageSource, Pager, PagerConfig, PagerStats, SourceRun, Uffd,
    WriteTracking,
};

use crate::memory::{Memory, PAGE, RawUffd};

const EVENT_PAGEFAULT: u8 = 0x12;

/// The processor of the touching threads, and that of whoever serves them: on a machine with two,
/// where the scheduler puts them decides more than what they do.
pub(crate) const TOUCHERS_CPU: usize = 0;
pub(crate) const SERVERS_CPU: usize = 1;

pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // A machine with one processor, or a container with others: unpinned is measured then.
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        eprintln!("not pinned: {error}");
    }
}

/// A thread that reads one event, copies one page, and does no more than that.
pub(crate) struct MinimalLoop {
    stop: Arc<(AtomicBool, std::os::fd::OwnedFd)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MinimalLoop {
    pub(crate) fn start(memory: &Memory, source: &Memory) -> Self {
        Self::serve(RawUffd::new(memory, false), memory, source)
    }

    /// The same, with writes tracked by the kernel.
    pub(crate) fn start_tracked(memory: &Memory, source: &Memory) -> Self {
        Self::serve(RawUffd::new(memory, true), memory, source)
    }

    fn serve(uffd: RawUffd, memory: &Memory, source: &Memory) -> Self {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let stopped = rustix::event::eventfd(0, flags).unwrap();
        let stop = Arc::new((AtomicBool::new(false), stopped));
        let (to, from) = (memory.addr, source.addr);
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                pin(SERVERS_CPU);
                while !stop.0.load(Ordering::Relaxed) {
                    let mut fds = [
                        PollFd::new(&uffd, PollFlags::IN),
                        PollFd::new(&stop.1, PollFlags::IN),
                    ];
                    if rustix::event::poll(&mut fds, None).is_err() {
                        continue;
                    }
                    if let Some((EVENT_PAGEFAULT, addr)) = uffd.read_one() {
                        serve_minimally(&uffd, addr & !(PAGE - 1), to, from, &stop.0);
                    }
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

/// Events are read while the kernel puts the copy off: a discard's thread sleeps until then.
fn serve_minimally(uffd: &RawUffd, addr: usize, to: usize, from: usize, stop: &AtomicBool) {
    let mut waiting = vec![addr];
    while let Some(addr) = waiting.pop() {
        match uffd.copy(addr, from + (addr - to), PAGE) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                waiting.push(addr);
                if let Some((EVENT_PAGEFAULT, other)) = uffd.read_one() {
                    waiting.insert(0, other & !(PAGE - 1));
                }
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
            Err(_) => uffd.wake(addr),
        }
    }
}

impl Drop for MinimalLoop {
    fn drop(&mut self) {
        self.stop.0.store(true, Ordering::Relaxed);
        rustix::io::write(&self.stop.1, &1_u64.to_ne_bytes()).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Our pager on a memory.
pub(crate) fn pager(
    memory: &Memory,
    source: Arc<dyn PageSource>,
    tracking: WriteTracking,
    prefetch: Vec<PageRun>,
) -> Pager {
    // Its threads inherit the processor.
    pin(SERVERS_CPU);
    let uffd = Uffd::create().unwrap();
    uffd.negotiate(tracking).unwrap();
    uffd.register(&memory.region(), tracking).unwrap();
    let backing = match &memory.memfd {
        None => Backing::Anonymous,
        Some(memfd) => Backing::SharedMemfd(memfd.try_clone().unwrap()),
    };
    let mut config = PagerConfig::new(uffd, vec![memory.region()], source, backing);
    config.tracking = tracking;
    config.pagemap_pid = i32::try_from(std::process::id()).ok();
    config.prefetch = prefetch;
    let pager = Pager::start(config).unwrap();
    pin(TOUCHERS_CPU);
    pager
}

/// The file source without its shortcut: each fault goes through a worker.
pub(crate) struct ReadSource(pub(crate) FileSource);

impl PageSource for ReadSource {
    fn run_at(&self, page: u64) -> SourceRun {
        self.0.run_at(page)
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.read(first_page, buf)
    }
}

pub(crate) fn file_source(file: &File) -> Arc<FileSource> {
    Arc::new(FileSource::new(file.try_clone().unwrap()).unwrap())
}

/// Raw UFFDIO_COPY, no fault, from a buffer in the cache. Pages a second.
pub(crate) fn raw_copy(memory: &Memory, chunk: usize) -> f64 {
    pin(SERVERS_CPU);
    let pages = memory.pages;
    let uffd = RawUffd::new(memory, false);
    let buf = vec![7_u8; chunk];
    let started = Instant::now();
    for offset in (0..pages * PAGE).step_by(chunk) {
        uffd.copy(memory.addr + offset, buf.as_ptr().addr(), chunk)
            .unwrap();
    }
    let rate = per_second(pages, started.elapsed());
    pin(TOUCHERS_CPU);
    rate
}

/// Every page of a memory touched once, in this order, by so many threads, each a part of it.
/// Checks what each page holds.
pub(crate) fn touch_all(memory: &Memory, order: &[u32], threads: usize, check: bool) -> Touched {
    let started = Instant::now();
    let mut latencies: Vec<Duration> = std::thread::scope(|scope| {
        let working: Vec<_> = order
            .chunks(order.len().div_ceil(threads))
            .map(|part| {
                scope.spawn(move || {
                    pin(TOUCHERS_CPU);
                    let mut slow = Vec::new();
                    for page in part {
                        let page = *page as usize;
                        let before = Instant::now();
                        let word = memory.read(page);
                        let took = before.elapsed();
                        assert!(!check || word == page as u64, "page {page} holds {word}");
                        if took > FAULT_MIN {
                            slow.push(took);
                        }
                    }
                    slow
                })
            })
            .collect();
        working
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let rate = per_second(order.len(), started.elapsed());
    Touched {
        rate,
        latency: Latency::of(&mut latencies),
    }
}

/// A touch that takes longer than this was a fault.
pub(crate) const FAULT_MIN: Duration = Duration::from_micros(3);

/// Time between two single faults: whatever was begun for the first is over.
const SINGLE_GAP: Duration = Duration::from_micros(150);

/// Faults one at a time, far apart in memory and in time.
pub(crate) fn touch_single(memory: &Memory, order: &[u32], check: bool) -> Latency {
    let mut latencies: Vec<_> = order
        .iter()
        .map(|page| {
            let page = *page as usize;
            let before = Instant::now();
            let word = memory.read(page);
            let took = before.elapsed();
            assert!(!check || word == page as u64, "page {page} holds {word}");
            while before.elapsed() < took + SINGLE_GAP {
                std::hint::spin_loop();
            }
            took
        })
        .collect();
    Latency::of(&mut latencies)
}

/// Pages of a walk, and from the start of one to that of the next: what is filled ahead of one does not
/// reach the other.
const WALK_PAGES: usize = 64;
const WALK_STEP_PAGES: usize = 256;

/// Many short walks through memory: how long the first page of each took.
pub(crate) fn touch_first_of_walks(memory: &Memory, check: bool) -> Latency {
    let mut latencies: Vec<_> = (0..memory.pages / WALK_STEP_PAGES)
        .map(|walk| {
            let first = walk * WALK_STEP_PAGES;
            let before = Instant::now();
            let word = memory.read(first);
            let took = before.elapsed();
            assert!(!check || word == first as u64, "page {first} holds {word}");
            (first..first + WALK_PAGES).for_each(|page| _ = memory.read(page));
            let walked = Instant::now();
            while walked.elapsed() < SINGLE_GAP {
                std::hint::spin_loop();
            }
            took
        })
        .collect();
    Latency::of(&mut latencies)
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Touched {
    pub(crate) rate: f64,
    pub(crate) latency: Latency,
}

#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct Latency {
    pub(crate) faults: usize,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
}

impl Latency {
    pub(crate) fn of(latencies: &mut [Duration]) -> Self {
        latencies.sort_unstable();
        let at = |share: f64| {
            let index = (latencies.len() as f64 * share) as usize;
            let found = latencies.get(index.min(latencies.len().saturating_sub(1)));
            found.map_or(0.0, |time| time.as_secs_f64() * 1e6)
        };
        Self {
            faults: latencies.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            max_us: at(1.0),
        }
    }
}

pub(crate) fn per_second(pages: usize, took: Duration) -> f64 {
    pages as f64 / took.as_secs_f64()
}

/// Threads that discard 4 KiB to 4 MiB and touch what they discarded, for so long. Returns touched
/// pages a second.
pub(crate) fn churn(memory: &Memory, threads: usize, time: Duration, check: bool) -> Touched {
    let started = Instant::now();
    let part = memory.pages / threads;
    let results: Vec<(usize, Vec<Duration>)> = std::thread::scope(|scope| {
        let working: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    pin(TOUCHERS_CPU);
                    let mut rng = Rng(thread as u64 + 1);
                    let (mut touched, mut slow) = (0, Vec::new());
                    while started.elapsed() < time {
                        let most = [1, 4, 16, 64, 256, 1024][rng.below(6)];
                        let pages = (1 + rng.below(most)).min(part);
                        let first = thread * part + rng.below(part - pages + 1);
                        if let Some(memfd) = &memory.memfd {
                            punch(memfd, first, pages);
                        }
                        memory.advise(first, pages, Advice::LinuxDontNeed);
                        // A guest uses again an eighth of what it frees.
                        for _ in 0..pages.div_ceil(8) {
                            let page = first + rng.below(pages);
                            let before = Instant::now();
                            let word = memory.read(page);
                            let took = before.elapsed();
                            assert!(!check || word == 0 || word == WRITTEN, "{word}");
                            if took > FAULT_MIN {
                                slow.push(took);
                            }
                            memory.write(page, WRITTEN);
                            touched += 1;
                        }
                    }
                    (touched, slow)
                })
            })
            .collect();
        working
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let touched = results.iter().map(|(touched, _)| touched).sum();
    let mut slow: Vec<_> = results.into_iter().flat_map(|(_, slow)| slow).collect();
    Touched {
        rate: per_second(touched, started.elapsed()),
        latency: Latency::of(&mut slow),
    }
}

/// What the churning threads leave in a page.
const WRITTEN: u64 = u64::MAX;

fn punch(memfd: &std::os::fd::OwnedFd, first: usize, pages: usize) {
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    let (offset, len) = ((first * PAGE) as u64, (pages * PAGE) as u64);
    rustix::fs::fallocate(memfd, mode, offset, len).unwrap();
}

/// A small generator, the same in every arm.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// How a pager fared, for the report.
pub(crate) fn checked(pager: &Pager) -> PagerStats {
    assert!(pager.failure().get().is_none(), "the pager gave up");
    pager.stats()
}
