//! Many threads that fault, write and discard at once, each knowing what its pages must hold.
//!
//! Each owner thread has a part of the memory to itself and checks every read against its own
//! record. Visitors read everywhere, so that faults of several threads meet in a page; what they see
//! is in motion, and says no more than whose page it is. The storage is slow, hangs, and fails now and then.
//! In between the memory is settled and its dirty set compared with the records.
//!
//! Fails if the faults of a batch of events are served before its discards are applied, or if "discarded"
//! outlives the page's being there: tried.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{Content, DEADLINE, Guest, Memory, Rng, TestSource, seed, until};
use torpor_pager::{PAGE_SIZE, PageRun, Pager, WriteTracking};

const OWNERS: u64 = 4;
/// 4 MiB.
const PAGES_EACH: u64 = 1024;
const PAGES: u64 = OWNERS * PAGES_EACH;
const STEPS: u64 = 3000;
/// How long the storage hangs, and works, in turns.
const STORAGE_MOMENT: Duration = Duration::from_millis(4);

#[derive(Clone, Copy, Debug)]
struct Known {
    content: Content,
    written: bool,
    removed: bool,
}

struct Owner<'a> {
    guest: &'a Guest,
    pager: &'a Pager,
    first_page: u64,
    pages: Vec<Known>,
    rng: Rng,
}

impl Owner<'_> {
    fn step(&mut self, step: u64) {
        let index = self.rng.below(PAGES_EACH);
        let page = self.first_page + index;
        match self.rng.below(10) {
            0..=4 => {
                let expected = self.pages[index as usize].content;
                assert_eq!(
                    self.guest.read(page),
                    expected,
                    "page {page} at step {step}"
                );
            }
            5..=7 => {
                self.guest.write(page, step + 1);
                let content = Content::Generation(step + 1);
                self.pages[index as usize] = Known {
                    content,
                    written: true,
                    removed: false,
                };
            }
            _ if self.rng.below(64) == 0 => self.discard(0, PAGES_EACH),
            _ => {
                // Long ones rarely: else nothing would stay.
                let most = [8, 8, 8, 64, 64, 64, 64, PAGES_EACH][self.rng.below(8) as usize];
                let pages = 1 + self.rng.below(most);
                self.discard(index, pages);
            }
        }
    }

    fn discard(&mut self, index: u64, pages: u64) {
        let pages = pages.min(PAGES_EACH - index);
        // Every other one ends inside its last page.
        let short = self.rng.below(2) * self.rng.below(PAGE_SIZE as u64);
        let len_bytes = pages as usize * PAGE_SIZE - short as usize;
        self.guest
            .discard_bytes(self.pager, self.first_page + index, len_bytes);
        for known in &mut self.pages[index as usize..(index + pages) as usize] {
            *known = Known {
                content: Content::Zero,
                written: false,
                removed: true,
            };
        }
    }
}

fn owners<'a>(
    guest: &'a Guest,
    pager: &'a Pager,
    source: &TestSource,
    seed: u64,
) -> Vec<Owner<'a>> {
    let start = |page: u64| Known {
        content: if source.zero_pages.contains(&page) {
            Content::Zero
        } else {
            Content::Generation(0)
        },
        written: false,
        removed: false,
    };
    (0..OWNERS)
        .map(|number| {
            let first_page = number * PAGES_EACH;
            let pages = (first_page..first_page + PAGES_EACH).map(start).collect();
            Owner {
                guest,
                pager,
                first_page,
                pages,
                rng: Rng(seed + number),
            }
        })
        .collect()
}

/// One bout: owners and visitors run, then come to rest.
fn bout(guest: &Guest, source: &TestSource, owners: &mut [Owner<'_>], seed: u64) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Storage that hangs for a moment, again and again.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for open in [false, true] {
                    source.open_gate(open);
                    std::thread::sleep(STORAGE_MOMENT);
                }
            }
        });
        for visitor in 0..2 {
            let over = &over;
            scope.spawn(move || {
                let mut rng = Rng(seed ^ (visitor + 77));
                while !over.load(Ordering::Relaxed) {
                    // A page that is being written is torn, but never another page's.
                    let page = rng.below(PAGES);
                    let number = guest.touch(page);
                    assert!(number == 0 || number == page, "page {page} is {number}");
                }
            });
        }
        let working: Vec<_> = owners
            .iter_mut()
            .map(|owner| scope.spawn(move || (0..STEPS).for_each(|step| owner.step(step))))
            .collect();
        let ended: Vec<_> = working
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::Relaxed);
        assert!(
            ended.iter().all(Result::is_ok),
            "an owner found a page wrong"
        );
    });
}

fn check_dirty(pager: &Pager, owners: &[Owner<'_>]) {
    pager.settle(DEADLINE).unwrap();
    let dirty = pager.dirty().unwrap();
    for (known, page) in owners.iter().flat_map(|owner| &owner.pages).zip(0..) {
        assert_eq!(
            dirty.written.contains(page),
            known.written,
            "written? page {page} {known:?}"
        );
        assert_eq!(
            dirty.removed.contains(page),
            known.removed,
            "removed? page {page} {known:?}"
        );
    }
}

fn stress(memory: Memory, tracking: WriteTracking, workers: usize) {
    let seed = seed();
    eprintln!("{memory:?}, {tracking:?} tracking, {workers} workers, seed {seed}");
    let guest = Guest::new(memory, PAGES);
    let mut plan = TestSource::new(PAGES);
    plan.zero_pages = (0..PAGES).filter(|page| page / 40 % 3 == 0).collect();
    plan.delay = Duration::from_micros(50);
    plan.read_one_of = 3;
    let source = Arc::new(plan);
    let pager = guest.pager(&source, tracking, |config| {
        config.workers = workers;
        config.prefetch = (0..PAGES)
            .step_by(100)
            .map(|page| PageRun::new(page, 60))
            .collect();
    });
    let mut owners = owners(&guest, &pager, &source, seed);
    for round in 0..2 {
        // One fewer than end a guest, on whichever reads come next.
        source.fail_reads.store(3, Ordering::SeqCst);
        bout(&guest, &source, &mut owners, seed + round);
        check_dirty(&pager, &owners);
    }
    for owner in &owners {
        for (known, page) in owner.pages.iter().zip(owner.first_page..) {
            assert_eq!(guest.read(page), known.content, "page {page}");
        }
    }
    until("no fault waits", || pager.stats().faults_waiting == 0);
    let stats = pager.stats();
    eprintln!("{stats:?}");
    assert!(pager.failure().get().is_none());
    assert!(stats.removes > 0 && stats.faults > 0 && stats.pages_prefetched > 0);
    assert!(stats.source_retries > 0);
}

#[test]
fn anonymous_memory_with_asynchronous_tracking_holds_what_it_must() {
    stress(Memory::Anonymous, WriteTracking::Async, 1);
}

#[test]
fn anonymous_memory_with_synchronous_tracking_holds_what_it_must() {
    stress(Memory::Anonymous, WriteTracking::Sync, 3);
}

#[test]
fn a_shared_memfd_with_asynchronous_tracking_holds_what_it_must() {
    stress(Memory::SharedMemfd, WriteTracking::Async, 3);
}

#[test]
fn a_private_mapping_of_a_memfd_with_asynchronous_tracking_holds_what_it_must() {
    stress(Memory::PrivateMemfd, WriteTracking::Async, 2);
}

#[test]
fn a_shared_memfd_with_synchronous_tracking_holds_what_it_must() {
    stress(Memory::SharedMemfd, WriteTracking::Sync, 1);
}
