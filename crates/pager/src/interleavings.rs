//! The pager's threads under shuttle: thousands of interleavings of reader, workers and prefetcher
//! with guest threads that fault and discard, on a simulated kernel that waits as the real one
//! does. `cargo test -p torpor-pager --features shuttle interleavings`
//!
//! What is asserted: no thread waits for ever (shuttle calls that a deadlock), a page that was
//! discarded reads as zero, a page that was not reads as the source's, and threads end when they
//! are told to, faults in flight or not.
//!
//! Proven by taking out, one at a time: notifying the worker of a fault, nudging the reader when
//! a worker puts a fault aside, returning from polling on a nudge, the second look before a copy,
//! and waking the workers for a stop; each time a test here failed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;

use crate::failure::FailureSignal;
use crate::kernel::{Event, Kernel, Waited};
use crate::machine::{FaultKind, Machine};
use crate::page_set::{PAGE_SIZE, PageRun};
use crate::service::Service;
use crate::source::{Content, PageSource, SourceKind, SourceRun};
use crate::stats::Counters;
use crate::threads;
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

const PAGES: u64 = 6;
const REGION: PageRun = PageRun::new(0, PAGES);
/// Longer waits are not for trying again.
const AGAIN_MAX: Duration = Duration::from_millis(10);
const INTERLEAVINGS: usize = 20_000;

/// Page N of the source holds N + 1; 0 is zero.
fn in_source(page: u64) -> u64 {
    page + 1
}

#[derive(Default)]
struct Memory {
    pages: [Option<u64>; 6],
    /// Counts the wakes of each page.
    wakes: [u64; 6],
    faults: Vec<u64>,
    /// Discards whose event has not been read, by number.
    announced: Vec<(u64, PageRun)>,
    read: Vec<u64>,
    discards: u64,
    /// Discards from their announcement until their thread runs on.
    changing: u32,
    nudged: bool,
    closed: bool,
}

/// Anonymous memory of a process, and its userfaultfd.
#[derive(Default)]
struct Sim {
    memory: Mutex<Memory>,
    /// Something for the reader.
    event: Condvar,
    /// Something for the guest's threads.
    woken: Condvar,
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl Sim {
    /// A guest thread reads a page. `None`: the memory has gone.
    fn touch(&self, page: u64) -> Option<u64> {
        let mut memory = self.memory.lock().unwrap();
        loop {
            if memory.closed {
                return None;
            }
            if let Some(content) = memory.pages[at(page)] {
                return Some(content);
            }
            memory.faults.push(page);
            self.event.notify_all();
            let before = memory.wakes[at(page)];
            memory = self
                .woken
                .wait_while(memory, |memory| {
                    memory.wakes[at(page)] == before && !memory.closed
                })
                .unwrap();
        }
    }

    fn discard(&self, run: PageRun) {
        let mut memory = self.memory.lock().unwrap();
        memory.discards += 1;
        let number = memory.discards;
        memory.changing += 1;
        memory.announced.push((number, run));
        self.event.notify_all();
        memory = self
            .woken
            .wait_while(memory, |memory| {
                !memory.read.contains(&number) && !memory.closed
            })
            .unwrap();
        memory.changing -= 1;
        drop(memory);
        thread::yield_now();
        let mut memory = self.memory.lock().unwrap();
        for page in run.first_page..run.end_page() {
            memory.pages[at(page)] = None;
        }
    }

    fn install(&self, run: PageRun, content: impl Fn(u64) -> u64) -> Filled {
        let mut memory = self.memory.lock().unwrap();
        if memory.changing > 0 {
            return Filled::Again;
        }
        let absent = (run.first_page..run.end_page())
            .take_while(|page| memory.pages[at(*page)].is_none())
            .count() as u64;
        if absent == 0 {
            return Filled::Exists;
        }
        for page in run.first_page..run.first_page + absent {
            memory.pages[at(page)] = Some(content(page));
            memory.wakes[at(page)] += 1;
        }
        self.woken.notify_all();
        Filled::Bytes(absent * PAGE_SIZE as u64)
    }

    fn close(&self) {
        self.memory.lock().unwrap().closed = true;
        self.woken.notify_all();
    }
}

struct SimKernel(Arc<Sim>);

impl Kernel for SimKernel {
    fn wait(&self, timeout: Option<Duration>) -> io::Result<Waited> {
        let idle = |memory: &mut Memory| memory.faults.is_empty() && memory.announced.is_empty();
        let mut memory = self.0.memory.lock().unwrap();
        // The watchdog's period must not be what saves a fault.
        if timeout.is_none_or(|timeout| timeout > AGAIN_MAX) {
            memory = self
                .0
                .event
                .wait_while(memory, |memory| idle(memory) && !memory.nudged)
                .unwrap();
        }
        if std::mem::take(&mut memory.nudged) {
            return Ok(Waited::Nudged);
        }
        let waited = if idle(&mut memory) {
            Waited::TimedOut
        } else {
            Waited::Events
        };
        drop(memory);
        thread::yield_now();
        Ok(waited)
    }

    fn nudge(&self) {
        self.0.memory.lock().unwrap().nudged = true;
        self.0.event.notify_all();
    }

    /// Faults before discards, whichever came first, as the kernel does.
    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool> {
        let mut memory = self.0.memory.lock().unwrap();
        for page in std::mem::take(&mut memory.faults) {
            let kind = FaultKind::Read;
            sink(Event::Fault { page, kind });
        }
        for (number, run) in std::mem::take(&mut memory.announced) {
            memory.read.push(number);
            let size = PAGE_SIZE as u64;
            sink(Event::Remove {
                start_byte: run.first_page * size,
                end_byte: run.end_page() * size,
            });
        }
        self.0.woken.notify_all();
        Ok(false)
    }

    fn copy(&self, first_page: u64, content: Content<'_>, _protect: bool) -> io::Result<Filled> {
        let Content::Bytes(data) = content else {
            unreachable!("nothing is mapped here");
        };
        for (bytes, page) in data.chunks(PAGE_SIZE).zip(first_page..) {
            assert_eq!(bytes[..8], in_source(page).to_le_bytes());
        }
        let run = PageRun::new(first_page, (data.len() / PAGE_SIZE) as u64);
        Ok(self.0.install(run, in_source))
    }

    fn map(&self, _page: u64, _written: bool) -> io::Result<Filled> {
        unreachable!("anonymous memory has no file");
    }

    fn zero(&self, run: PageRun, _protect: bool, _own: bool) -> io::Result<Filled> {
        Ok(self.0.install(run, |_| 0))
    }

    fn zeros_take_memory(&self) -> bool {
        false
    }

    fn unprotect(&self, _page: u64) -> io::Result<Filled> {
        unreachable!("writes are not tracked here");
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        self.0.memory.lock().unwrap().wakes[at(page)] += 1;
        self.0.woken.notify_all();
        Ok(())
    }

    fn drop_late_copies(&self, _run: PageRun) -> io::Result<()> {
        Ok(())
    }

    fn region_around(&self, page: u64) -> Option<PageRun> {
        (page < PAGES).then_some(REGION)
    }
}

/// Odd pages are at hand; even ones must be read, which takes a moment.
struct SimSource;

impl PageSource for SimSource {
    fn run_at(&self, page: u64) -> SourceRun {
        SourceRun {
            pages: PAGES.saturating_sub(page).max(1),
            kind: SourceKind::Data,
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        thread::yield_now();
        for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
            bytes[..8].copy_from_slice(&in_source(page).to_le_bytes());
        }
        thread::yield_now();
        Ok(())
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        if (run.first_page..run.end_page()).any(|page| page % 2 == 0) {
            return None;
        }
        for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(run.first_page..) {
            bytes[..8].copy_from_slice(&in_source(page).to_le_bytes());
        }
        Some(Content::Bytes(buf))
    }
}

/// A pager with a reader, two workers, and a prefetcher if there is something to prefetch.
fn start(prefetch: Option<PageRun>) -> (Arc<Sim>, Arc<Service>, Vec<thread::JoinHandle<()>>) {
    let sim = Arc::new(Sim::default());
    let parts = (
        Machine::new(PAGES, PAGE_SIZE as u64),
        Counters::new().unwrap(),
        FailureSignal::new().unwrap(),
    );
    let kernel = Box::new(SimKernel(Arc::clone(&sim)));
    let service = Service::new(kernel, Arc::new(SimSource), WriteTracking::Off, 4, parts);
    let service = Arc::new(service);
    let mut bodies: Vec<fn(&Service)> = vec![threads::reader, threads::worker, threads::worker];
    if let Some(run) = prefetch {
        let mut state = service.lock();
        state.prefetch.push_back(run);
        state.prefetcher_runs = true;
        bodies.push(|service| threads::prefetcher(service, None));
    }
    let spawn = |body: fn(&Service)| {
        let service = Arc::clone(&service);
        thread::spawn(move || body(&service))
    };
    let threads = bodies.into_iter().map(spawn).collect();
    (sim, service, threads)
}

#[test]
fn every_thread_gets_its_page_and_a_discarded_one_is_zero() {
    shuttle::check_random(
        || {
            let (sim, service, threads) = start(Some(PageRun::new(0, PAGES)));
            let guest = |pages: std::ops::Range<u64>| {
                let sim = Arc::clone(&sim);
                thread::spawn(move || {
                    let first_page = pages.start;
                    let run = PageRun::new(first_page, pages.end - first_page);
                    assert_eq!(sim.touch(first_page), Some(in_source(first_page)));
                    sim.discard(run);
                    for page in pages {
                        assert_eq!(sim.touch(page), Some(0), "page {page}");
                    }
                })
            };
            let guests = [guest(0..3), guest(3..5)];
            // Reads everywhere: the source's or zero, but it must get something.
            for page in 0..PAGES {
                let content = sim.touch(page);
                assert!(content == Some(0) || content == Some(in_source(page)));
            }
            for guest in guests {
                guest.join().unwrap();
            }
            assert!(service.failure.get().is_none());
            service.tell_to_stop();
            for thread in threads {
                thread.join().unwrap();
            }
        },
        INTERLEAVINGS,
    );
}

/// Nobody faults any more when the discard is over: whoever was put off by it must be tried again.
#[test]
fn a_fault_that_the_last_discard_puts_off_is_served_when_it_is_over() {
    for prefetch in [None, Some(PageRun::new(0, PAGES))] {
        shuttle::check_random(
            move || {
                let (sim, service, threads) = start(prefetch);
                let toucher = {
                    let sim = Arc::clone(&sim);
                    thread::spawn(move || {
                        assert_eq!(sim.touch(0), Some(in_source(0)));
                        assert_eq!(sim.touch(1), Some(in_source(1)));
                    })
                };
                let discarder = {
                    let sim = Arc::clone(&sim);
                    thread::spawn(move || sim.discard(PageRun::new(4, 2)))
                };
                toucher.join().unwrap();
                discarder.join().unwrap();
                service.tell_to_stop();
                for thread in threads {
                    thread.join().unwrap();
                }
            },
            INTERLEAVINGS,
        );
    }
}

#[test]
fn threads_end_while_faults_and_discards_are_in_flight() {
    shuttle::check_random(
        || {
            let (sim, service, threads) = start(None);
            let guests: Vec<_> = (0..3)
                .map(|number| {
                    let sim = Arc::clone(&sim);
                    thread::spawn(move || {
                        let pages = number * 2..number * 2 + 2;
                        for page in pages.clone() {
                            sim.touch(page);
                        }
                        sim.discard(PageRun::new(pages.start, 2));
                        sim.touch(pages.start);
                    })
                })
                .collect();
            thread::yield_now();
            service.tell_to_stop();
            for thread in threads {
                thread.join().unwrap();
            }
            // The descriptor goes, and the kernel lets everybody go.
            sim.close();
            for guest in guests {
                guest.join().unwrap();
            }
        },
        INTERLEAVINGS,
    );
}
