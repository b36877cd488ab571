//! Guest memory of 2 MiB pages, against the real kernel: served, discarded and tracked in whole
//! huge pages.
//!
//! Needs huge pages of the host: `sysctl vm.nr_hugepages=64`. Where there are none, each test says
//! so in a line and ends.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::{Content, DEADLINE, Guest, Memory, Rng, TestSource, seed, stamp, until};
use torpor_pager::{
    Backing, FileSource, PageRun, PageSet, PageSource, Pager, PagerConfig, PagerError, Uffd,
    WriteTracking,
};

/// Base pages of a huge one.
const HUGE: u64 = 512;

const TRACKINGS: [WriteTracking; 3] = [
    WriteTracking::Async,
    WriteTracking::Sync,
    WriteTracking::Off,
];

/// The kinds of memory, all of which the pager treats alike; the kernel does not.
const MEMORIES: [Memory; 2] = [Memory::Anonymous, Memory::PrivateMemfd];

/// Each kind of memory with each way to track writes.
fn kinds() -> impl Iterator<Item = (Memory, WriteTracking)> {
    let with = |memory| TRACKINGS.map(|tracking| (memory, tracking));
    MEMORIES.into_iter().flat_map(with)
}

/// Memory of so many huge pages; says so if the host has none.
fn guest(memory: Memory, huge_pages: u64) -> Option<Guest> {
    let guest = Guest::of_huge_pages(memory, huge_pages * HUGE);
    if guest.is_none() {
        eprintln!("not run: this host has not enough huge pages (sysctl vm.nr_hugepages=64)");
    }
    guest
}

fn source(pages: u64) -> TestSource {
    TestSource::new(pages)
}

fn expected(zero: bool) -> Content {
    if zero {
        Content::Zero
    } else {
        Content::Generation(0)
    }
}

#[test]
fn every_page_of_a_huge_page_is_what_the_source_has() {
    for (memory, tracking) in kinds() {
        let Some(guest) = guest(memory, 6) else {
            continue;
        };
        let mut plan = source(5 * HUGE + 100);
        // One huge page wholly zero, one in parts, the last beyond the source's end in part.
        plan.zero_pages = (HUGE..2 * HUGE).chain(1030..1100).chain([1200]).collect();
        let zero = plan.zero_pages.clone();
        let source = Arc::new(plan);
        let pager = guest.pager(&source, tracking, |config| {
            config.prefetch = vec![PageRun::new(4 * HUGE + 7, 2)];
        });
        // In an order that is none, one touch in each huge page first.
        for page in [1100, 700, 3, 2000, 2900, 2300]
            .into_iter()
            .chain(0..guest.pages)
        {
            let is_zero = zero.contains(&page) || page >= 5 * HUGE + 100;
            assert_eq!(guest.read(page), expected(is_zero), "page {page}");
        }
        let stats = pager.stats();
        assert_eq!(stats.pages_zeroed, HUGE);
        assert_eq!(stats.pages_copied, 5 * HUGE);
        assert!(
            stats.faults <= 6,
            "a fault for each huge page at most: {stats:?}"
        );
        assert!(pager.failure().get().is_none());
    }
}

#[test]
fn what_was_written_and_what_was_given_back_is_told_in_whole_huge_pages() {
    for (memory, tracking) in kinds().filter(|(_, tracking)| *tracking != WriteTracking::Off) {
        let Some(guest) = guest(memory, 8) else {
            continue;
        };
        let pager = guest.pager(&Arc::new(source(guest.pages)), tracking, |_| {});
        let set = |huge_pages: &[u64]| {
            let mut set = PageSet::with_capacity_pages(guest.pages);
            huge_pages
                .iter()
                .for_each(|page| set.insert_run(PageRun::new(page * HUGE, HUGE)));
            set
        };
        // Read; written after a read; written at once; discarded in each of these states, and when
        // it was never there; discarded, then read; discarded, then written.
        for page in [0, 1, 3, 5] {
            assert_eq!(guest.read(page * HUGE + 9), Content::Generation(0));
        }
        for page in [1, 2, 4] {
            guest.write(page * HUGE + 10, 7);
        }
        for page in [3, 4, 5, 6] {
            guest.discard(&pager, page * HUGE, HUGE);
        }
        assert_eq!(guest.read(5 * HUGE), Content::Zero);
        guest.write(6 * HUGE + 511, 8);
        for _ in 0..2 {
            pager.settle(DEADLINE).unwrap();
            let dirty = pager.dirty().unwrap();
            assert_eq!(dirty.written, set(&[1, 2, 6]), "{memory:?}, {tracking:?}");
            assert_eq!(dirty.removed, set(&[3, 4, 5]), "{memory:?}, {tracking:?}");
        }
        assert_eq!(guest.read(HUGE + 10), Content::Generation(7));
        assert_eq!(guest.read(HUGE + 11), Content::Generation(0));
        assert_eq!(guest.read(4 * HUGE + 10), Content::Zero);
        assert_eq!(guest.read(6 * HUGE + 510), Content::Zero);
        assert_eq!(guest.read(6 * HUGE + 511), Content::Generation(8));
        assert_eq!(pager.stats().pages_removed, 4 * HUGE);
    }
}

/// The kernel takes whole huge pages only, and so must the page states.
#[test]
fn a_discard_that_ends_inside_a_huge_page_leaves_that_page() {
    for (memory, tracking) in kinds() {
        let Some(guest) = guest(memory, 4) else {
            continue;
        };
        let pager = guest.pager(&Arc::new(source(guest.pages)), tracking, |_| {});
        guest.write(HUGE, 5);
        guest.madvise(0, ((HUGE + 100) * 4096) as usize);
        support::event_applied(&pager);
        pager.settle(DEADLINE).unwrap();
        assert_eq!(guest.read(0), Content::Zero);
        assert_eq!(guest.read(HUGE), Content::Generation(5));
        assert_eq!(guest.read(HUGE + 1), Content::Generation(0));
        assert_eq!(pager.stats().pages_removed, HUGE);
    }
}

#[test]
fn a_page_that_is_discarded_while_it_is_fetched_is_zero() {
    let Some(guest) = guest(Memory::Anonymous, 2) else {
        return;
    };
    let source = Arc::new(source(guest.pages));
    let pager = guest.pager(&source, WriteTracking::Async, |_| {});
    source.open_gate(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| guest.read(5));
        until("the source is asked", || {
            source.reads.load(Ordering::SeqCst) > 0
        });
        guest.discard(&pager, 0, HUGE);
        source.open_gate(true);
        assert_eq!(reading.join().unwrap(), Content::Zero);
    });
}

#[test]
fn a_raw_file_in_the_page_cache_needs_no_worker() {
    let Some(guest) = guest(Memory::Anonymous, 3) else {
        return;
    };
    let file = File::from(support::guest_memfd(guest.pages));
    for page in 0..guest.pages {
        // A hole in the last huge page: it is put together by a worker.
        if page < guest.pages - 10 {
            let words = stamp(page, 0);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all_at(&bytes, page * 4096).unwrap();
        }
    }
    let source = Counted(FileSource::new(file).unwrap(), AtomicU64::new(0));
    let source = Arc::new(source);
    let uffd = Uffd::create().unwrap();
    uffd.negotiate(WriteTracking::Off).unwrap();
    uffd.register(&guest.region(), WriteTracking::Off).unwrap();
    let shared: Arc<dyn PageSource> = source.clone();
    let config = PagerConfig::new(uffd, vec![guest.region()], shared, guest.backing());
    let _pager = Pager::start(config).unwrap();
    for page in 0..guest.pages {
        let zero = page >= guest.pages - 10;
        assert_eq!(guest.read(page), expected(zero), "page {page}");
    }
    // 502 pages of data are two reads.
    assert_eq!(source.1.load(Ordering::SeqCst), 2);
}

struct Counted(FileSource, AtomicU64);

impl PageSource for Counted {
    fn run_at(&self, page: u64) -> torpor_pager::SourceRun {
        self.0.run_at(page)
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.read(first_page, buf)
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<torpor_pager::Content<'a>> {
        self.0.at_hand(run, buf)
    }
}

/// Threads that each own some huge pages, and read, write and discard them at once.
#[test]
fn many_threads_find_their_huge_pages_as_they_must_be() {
    const EACH: u64 = 4;
    for (memory, tracking) in kinds() {
        let Some(guest) = guest(memory, 4 * EACH) else {
            continue;
        };
        let seed = seed();
        eprintln!("{memory:?}, {tracking:?} tracking, seed {seed}");
        let mut plan = source(guest.pages);
        plan.zero_pages = (HUGE..2 * HUGE).chain(3000..3100).collect();
        plan.delay = Duration::from_micros(50);
        let zero = plan.zero_pages.clone();
        let pager = guest.pager(&Arc::new(plan), tracking, |config| config.workers = 2);
        std::thread::scope(|scope| {
            for owner in 0..4 {
                let (guest, pager, zero) = (&guest, &pager, &zero);
                scope.spawn(move || {
                    let first = owner * EACH * HUGE;
                    let start = |page| expected(zero.contains(&page));
                    let mut known: Vec<_> = (first..first + EACH * HUGE).map(start).collect();
                    let mut rng = Rng(seed + owner);
                    for step in 1..400 {
                        let index = rng.below(EACH * HUGE);
                        match rng.below(8) {
                            0..=3 => assert_eq!(
                                guest.read(first + index),
                                known[index as usize],
                                "page {} at step {step}",
                                first + index
                            ),
                            4..=6 => {
                                guest.write(first + index, step);
                                known[index as usize] = Content::Generation(step);
                            }
                            _ => {
                                let at = index / HUGE;
                                let huge_pages = 1 + rng.below(EACH - at);
                                guest.discard(pager, first + at * HUGE, huge_pages * HUGE);
                                let gone = at * HUGE..(at + huge_pages) * HUGE;
                                known[gone.start as usize..gone.end as usize].fill(Content::Zero);
                            }
                        }
                    }
                });
            }
        });
        until("no fault waits", || pager.stats().faults_waiting == 0);
        assert!(pager.failure().get().is_none());
    }
}

#[test]
fn what_cannot_be_served_of_huge_pages_is_refused() {
    let refused = |regions: Vec<torpor_pager::Region>, backing| {
        let uffd = Uffd::create().unwrap();
        let config = PagerConfig::new(uffd, regions, Arc::new(source(HUGE)), backing);
        match Pager::start(config) {
            Err(PagerError::Config(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    let region = |number: u64, page_size| torpor_pager::Region {
        host_addr: (1 << 40) + number * (2 << 20),
        len_bytes: 2 << 20,
        guest_offset_bytes: number * (2 << 20),
        page_size,
    };
    let mixed = vec![region(0, 4096), region(1, 2 << 20)];
    assert!(refused(mixed, Backing::Anonymous).contains("together"));
    let memfd = Backing::SharedMemfd(support::guest_memfd(HUGE));
    assert!(refused(vec![region(0, 2 << 20)], memfd).contains("shared memory file"));
}
