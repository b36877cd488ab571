//! The pager against the real kernel, with guest memory mapped in this process.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{Content, DEADLINE, Guest, Memory, TestSource, until};
use torpor_pager::{PageRun, PageSet, Pager, PagerConfig, PagerError, Uffd, WriteTracking};

const MEMORIES: [Memory; 3] = [Memory::Anonymous, Memory::SharedMemfd, Memory::PrivateMemfd];
const TRACKINGS: [WriteTracking; 3] = [
    WriteTracking::Async,
    WriteTracking::Sync,
    WriteTracking::Off,
];

fn source(pages: u64) -> Arc<TestSource> {
    Arc::new(TestSource::new(pages))
}

/// Every kind of memory with every way of tracking writes.
fn everywhere(mut test: impl FnMut(Memory, WriteTracking)) {
    for memory in MEMORIES {
        for tracking in TRACKINGS {
            eprintln!("on {memory:?} with {tracking:?} tracking");
            test(memory, tracking);
        }
    }
}

fn set(pages: u64, runs: &[(u64, u64)]) -> PageSet {
    let mut set = PageSet::with_capacity_pages(pages);
    for (first_page, pages) in runs {
        set.insert_run(PageRun::new(*first_page, *pages));
    }
    set
}

#[test]
fn every_page_reads_as_the_source_has_it() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 300);
        let mut plan = TestSource::new(290);
        plan.zero_pages = (20..50).chain([60]).collect();
        let pager = guest.pager(&Arc::new(plan), tracking, |_| {});
        for page in 0..300 {
            let zero = (20..50).contains(&page) || page == 60 || page >= 290;
            let expected = if zero {
                Content::Zero
            } else {
                Content::Generation(0)
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
        // The last page's neighbours come after its reader has been woken.
        let all = || pager.stats().pages_copied + pager.stats().pages_zeroed == 300;
        until("every page was installed once", all);
        until("no fault waits", || pager.stats().faults_waiting == 0);
        assert!(
            pager.stats().faults < 60,
            "neighbours come along: {:?}",
            pager.stats()
        );
    });
}

#[test]
fn a_source_of_blocks_is_read_once_for_a_block() {
    let guest = Guest::new(Memory::SharedMemfd, 64);
    let mut plan = TestSource::new(64);
    plan.block_pages = 16;
    let source = Arc::new(plan);
    let pager = guest.pager(&source, WriteTracking::Async, |_| {});
    // A page of the first block, and then the next page each time that its window, which grows, is
    // there: nobody faults on what is on its way.
    for (page, there) in [(0, 16), (16, 48), (48, 64)] {
        assert_eq!(guest.read(page), Content::Generation(0));
        until("its window is there", || {
            pager.stats().pages_copied == there
        });
    }
    assert_eq!(pager.stats().faults, 3);
    for page in 0..64 {
        assert_eq!(guest.read(page), Content::Generation(0));
    }
    assert_eq!(source.reads.load(Ordering::SeqCst), 4);
    assert_eq!(source.pages_read.load(Ordering::SeqCst), 64);
}

#[test]
fn a_discarded_page_reads_as_zero_whether_it_was_there_or_not() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 128);
        let pager = guest.pager(&source(128), tracking, |_| {});
        assert_eq!(guest.read(3), Content::Generation(0));
        guest.write(4, 7);
        guest.discard(&pager, 2, 60);
        for page in 0..128 {
            let gone = (2..62).contains(&page);
            let expected = if gone {
                Content::Zero
            } else {
                Content::Generation(0)
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
        guest.write(5, 9);
        assert_eq!(guest.read(5), Content::Generation(9));
        let stats = pager.stats();
        assert_eq!((stats.removes, stats.pages_removed), (1, 60));
    });
}

#[test]
fn a_discard_of_a_part_of_a_page_takes_what_the_kernel_takes() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 64);
        let pager = guest.pager(&source(64), tracking, |_| {});
        (0..64).for_each(|page| assert_eq!(guest.read(page), Content::Generation(0)));
        // madvise rounds a length up to whole pages, so all of page 11 goes.
        guest.punch(10, 2);
        guest.madvise(10, 5000);
        pager.settle(DEADLINE).unwrap();
        assert_eq!(pager.stats().pages_removed, 2);
        assert_eq!(guest.read(9), Content::Generation(0));
        assert_eq!(
            (guest.read(10), guest.read(11)),
            (Content::Zero, Content::Zero)
        );
        assert_eq!(guest.read(12), Content::Generation(0));
    });
}

/// Fails if zero pages come open to writes where the kernel tracks them, or if "discarded" outlives the
/// page's being there: tried.
#[test]
fn the_dirty_set_is_exact() {
    for memory in MEMORIES {
        for tracking in [WriteTracking::Async, WriteTracking::Sync] {
            eprintln!("on {memory:?} with {tracking:?} tracking");
            let guest = Guest::new(memory, 512);
            let mut plan = TestSource::new(512);
            plan.zero_pages = (200..300).collect();
            let pager = guest.pager(&Arc::new(plan), tracking, |config| {
                config.prefetch = vec![PageRun::new(400, 50), PageRun::new(250, 40)];
            });
            until("prefetched", || pager.prefetch_done());
            (0..40).for_each(|page| _ = guest.read(page));
            // Written: read before, never touched before, zero in the source, prefetched.
            [5, 100, 210, 255, 410]
                .into_iter()
                .for_each(|page| guest.write(page, 1));
            // Written and then removed; removed and then read; removed and then written.
            guest.write(20, 1);
            guest.discard(&pager, 18, 10);
            (18..22).for_each(|page| assert_eq!(guest.read(page), Content::Zero));
            guest.write(25, 2);
            // Removed and never there; removed twice.
            guest.discard(&pager, 300, 50);
            guest.discard(&pager, 310, 4);
            pager.settle(DEADLINE).unwrap();
            for _ in 0..2 {
                let dirty = pager.dirty().unwrap();
                let written = [(5, 1), (25, 1), (100, 1), (210, 1), (255, 1), (410, 1)];
                assert_eq!(dirty.written, set(512, &written));
                assert_eq!(dirty.removed, set(512, &[(18, 7), (26, 2), (300, 50)]));
            }
            // The guest goes on after a pause that failed.
            guest.write(19, 3);
            guest.discard(&pager, 5, 1);
            pager.settle(DEADLINE).unwrap();
            let dirty = pager.dirty().unwrap();
            assert!(dirty.written.contains(19) && !dirty.removed.contains(19));
            assert!(dirty.removed.contains(5) && !dirty.written.contains(5));
        }
    }
}

/// Since Linux 6.12 pages of zeros become the kernel's zero page when a huge page that holds them is
/// split, whoever wrote those zeros.
#[test]
fn a_page_that_the_guest_zeroed_is_written_even_if_the_kernel_makes_it_the_zero_page() {
    const HUGE: u64 = 512;
    for tracking in [WriteTracking::Async, WriteTracking::Sync] {
        for zero_in_the_source in [false, true] {
            let guest = Guest::new(Memory::Anonymous, 2 * HUGE);
            let first = (guest.addr.next_multiple_of(HUGE * 4096) - guest.addr) / 4096;
            let mut plan = TestSource::new(2 * HUGE);
            if zero_in_the_source {
                plan.zero_pages = (first..first + HUGE).collect();
            }
            let pager = guest.pager(&Arc::new(plan), tracking, |_| {});
            for page in first..first + HUGE {
                guest.touch(page);
                guest.write(page, 1);
            }
            // A checkpoint, that stores what was written.
            let written = set(2 * HUGE, &[(first, HUGE)]);
            assert_eq!(pager.dirty().unwrap().written, written);
            let zeroed = (first..first + HUGE).step_by(2);
            zeroed.for_each(|page| guest.write_zeros(page));
            if !(guest.make_huge(first) && guest.split_huge(first)) {
                println!("not run: the kernel makes no huge page of this, or does not split it");
            }
            let dirty = pager.dirty().unwrap();
            assert_eq!(dirty.written, written, "{tracking:?} {zero_in_the_source}");
            assert!(dirty.removed.is_empty());
        }
    }
}

/// Fails if a neighbour may be installed between the looks at the page table and at the memory's file
/// (tried: within the first four rounds, on shared memory).
#[test]
fn neighbours_that_come_in_while_the_dirty_set_is_made_are_not_in_it() {
    const PAGES: u64 = 256;
    everywhere(|memory, tracking| {
        if tracking == WriteTracking::Off {
            return;
        }
        let written: Vec<_> = (0..PAGES).step_by(32).map(|page| (page, 1)).collect();
        for round in 0..100 {
            let guest = Guest::new(memory, PAGES);
            let mut plan = TestSource::new(PAGES);
            plan.delay = Duration::from_micros(round * 5);
            let pager = guest.pager(&Arc::new(plan), tracking, |_| {});
            for (page, _) in &written {
                guest.write(*page, 1);
            }
            pager.settle(DEADLINE).unwrap();
            for _ in 0..4 {
                let dirty = pager.dirty().unwrap();
                assert_eq!(dirty.written, set(PAGES, &written), "round {round}");
            }
        }
    });
}

#[test]
fn without_tracking_there_is_no_dirty_set() {
    let guest = Guest::new(Memory::Anonymous, 8);
    let pager = guest.pager(&source(8), WriteTracking::Off, |_| {});
    assert!(matches!(pager.dirty(), Err(PagerError::NotTracked)));
}

/// Fails without `drop_late_copies` (tried: page 40 then reads as the source's).
#[test]
fn a_page_installed_between_the_hole_and_its_event_is_removed_all_the_same() {
    for tracking in TRACKINGS {
        let guest = Guest::new(Memory::SharedMemfd, 64);
        let pager = guest.pager(&source(64), tracking, |_| {});
        assert_eq!(guest.read(40), Content::Generation(0));
        guest.punch(40, 1);
        // The event has not come: the pager cannot know, and brings the old content back.
        assert_eq!(guest.read(40), Content::Generation(0));
        guest.madvise(40, 4096);
        support::event_applied(&pager);
        assert_eq!(guest.read(40), Content::Zero);
    }
}

/// Fails when `serve` copies without asking again what the page needs (tried: it then reads as
/// the source's).
#[test]
fn a_page_discarded_while_its_content_is_fetched_is_zero() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 64);
        let source = source(64);
        let pager = guest.pager(&source, tracking, |_| {});
        source.open_gate(false);
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| guest.read(33));
            until("the source is asked", || {
                source.reads.load(Ordering::SeqCst) == 1
            });
            guest.discard(&pager, 32, 4);
            source.open_gate(true);
            assert_eq!(toucher.join().unwrap(), Content::Zero);
        });
        assert_eq!(guest.read(34), Content::Zero);
        assert_eq!(guest.read(40), Content::Generation(0));
    });
}

/// Fails (hangs) if the reader reads storage: tried.
#[test]
fn a_discard_does_not_wait_for_a_source_that_hangs() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 64);
        let source = source(64);
        let pager = guest.pager(&source, tracking, |_| {});
        source.open_gate(false);
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| guest.read(1));
            until("the source is asked", || {
                source.reads.load(Ordering::SeqCst) == 1
            });
            // Comes back although the only worker hangs; so does a fault that needs no storage.
            guest.discard(&pager, 30, 10);
            assert_eq!(guest.read(31), Content::Zero);
            let waiting = pager.settle(Duration::from_millis(20));
            assert!(matches!(
                waiting,
                Err(PagerError::SettleTimeout { faults: 1, .. })
            ));
            source.open_gate(true);
            assert_eq!(toucher.join().unwrap(), Content::Generation(0));
        });
        pager.settle(DEADLINE).unwrap();
    });
}

#[test]
fn prefetched_pages_do_not_fault_and_zeros_are_not_read() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 2048);
        let mut plan = TestSource::new(2048);
        plan.zero_pages = (1000..1500).collect();
        let source = Arc::new(plan);
        let pager = guest.pager(&source, tracking, |config| {
            config.prefetch = vec![PageRun::new(900, 700), PageRun::new(2000, 1_000_000)];
        });
        until("prefetched", || pager.prefetch_done());
        let reads = source.reads.load(Ordering::SeqCst);
        assert!(reads <= 4, "{reads} reads");
        for page in (900..1600).chain(2000..2048) {
            let zero = (1000..1500).contains(&page);
            let expected = if zero {
                Content::Zero
            } else {
                Content::Generation(0)
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
        let stats = pager.stats();
        assert_eq!((stats.faults, stats.pages_prefetched), (0, 748));
    });
}

#[test]
fn a_prefetch_leaves_alone_what_is_there_and_what_was_given_back() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 256);
        let pager = guest.pager(&source(256), tracking, |_| {});
        guest.write(70, 3);
        until("the neighbours are in", || pager.stats().pages_copied == 16);
        guest.discard(&pager, 100, 20);
        pager.prefetch(&[PageRun::new(0, 256)]).unwrap();
        until("prefetched", || pager.prefetch_done());
        let stats = pager.stats();
        for page in 0..256 {
            let expected = match page {
                70 => Content::Generation(3),
                100..120 => Content::Zero,
                _ => Content::Generation(0),
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
        assert_eq!(stats.pages_prefetched, 256 - 16 - 20);
    });
}

#[test]
fn the_working_set_of_one_resume_saves_the_next_one_its_faults() {
    let touched = [3_u64, 4, 40, 90, 91, 200, 1000];
    let guest = Guest::new(Memory::SharedMemfd, 1024);
    let pager = guest.pager(&source(1024), WriteTracking::Async, |_| {});
    touched.into_iter().for_each(|page| _ = guest.read(page));
    let _ = guest.read(500);
    guest.discard(&pager, 496, 16);
    let first = pager.working_set();
    assert!(
        !first
            .iter()
            .any(|run| (run.first_page..run.end_page()).contains(&500))
    );

    let next = Guest::new(Memory::SharedMemfd, 1024);
    let next_pager = next.pager(&source(1024), WriteTracking::Async, |config| {
        config.prefetch.clone_from(&first);
    });
    until("prefetched", || next_pager.prefetch_done());
    touched.into_iter().for_each(|page| _ = next.read(page));
    assert_eq!(next_pager.stats().faults, 0);
    assert_eq!(next_pager.working_set(), first, "it does not wear off");
}

#[test]
fn a_source_that_fails_for_a_moment_is_asked_again() {
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 64);
        let source = source(64);
        let pager = guest.pager(&source, tracking, |_| {});
        source.fail_reads.store(2, Ordering::SeqCst);
        assert_eq!(guest.read(7), Content::Generation(0));
        assert!(pager.failure().get().is_none());
        assert_eq!(pager.stats().source_retries, 2);
    });
}

#[test]
fn a_prefetch_that_fails_is_dropped_and_the_guest_goes_on() {
    let guest = Guest::new(Memory::SharedMemfd, 64);
    let source = source(64);
    source.failing.store(true, Ordering::SeqCst);
    let pager = guest.pager(&source, WriteTracking::Async, |config| {
        config.prefetch = vec![PageRun::new(0, 32), PageRun::new(40, 8)];
    });
    until("dropped", || pager.prefetch_done());
    source.failing.store(false, Ordering::SeqCst);
    assert!(pager.failure().get().is_none());
    assert_eq!(guest.read(41), Content::Generation(0));
}

#[test]
fn a_thread_that_waits_too_long_is_named() {
    let guest = Guest::new(Memory::Anonymous, 64);
    let source = source(64);
    let pager = guest.pager(&source, WriteTracking::Async, |_| {});
    source.open_gate(false);
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| guest.read(1));
        until("named", || pager.stats().slow_faults == 1);
        source.open_gate(true);
        assert_eq!(toucher.join().unwrap(), Content::Generation(0));
    });
    assert!(pager.stats().max_us >= 1_000_000);
}

#[test]
fn a_pager_stops_while_faults_are_in_flight() {
    // The only copy of the descriptor goes with the pager: the kernel then lets the threads go,
    // and they find an ordinary empty mapping.
    everywhere(|memory, tracking| {
        let guest = Guest::new(memory, 256);
        let mut plan = TestSource::new(256);
        plan.delay = Duration::from_millis(2);
        let pager = guest.pager(&Arc::new(plan), tracking, |config| {
            config.prefetch = vec![PageRun::new(0, 256)];
        });
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let guest = &guest;
                scope.spawn(move || (0..64).for_each(|page| _ = guest.read(thread * 64 + page)));
            }
            std::thread::sleep(Duration::from_millis(5));
            pager.shutdown().unwrap();
        });
    });
}

/// A device of the VMM's process writes past the guest's mapping. Fails if a page that is in the file
/// after its discard is taken for a late copy.
#[test]
fn what_a_device_writes_into_a_discarded_page_is_kept() {
    for tracking in TRACKINGS {
        let guest = Guest::new(Memory::SharedMemfd, 64);
        let pager = guest.pager(&source(64), tracking, |_| {});
        assert_eq!(guest.read(7), Content::Generation(0));
        guest.discard(&pager, 7, 1);
        let memfd = std::fs::File::from(guest.memfd.as_ref().unwrap().try_clone().unwrap());
        let words = support::stamp(7, 5).map(u64::to_le_bytes);
        memfd.write_all_at(words.as_flattened(), 7 * 4096).unwrap();
        assert_eq!(guest.read(7), Content::Generation(5), "{tracking:?}");
        pager.settle(DEADLINE).unwrap();
        if tracking != WriteTracking::Off {
            assert!(pager.dirty().unwrap().written.contains(7), "{tracking:?}");
        }
    }
}

/// Whoever handed the descriptor over shares its flags, and events are read with the page states
/// locked. The kernel does not even tell of events then: the guest must be given up, and nobody else be
/// held up. Fails (hangs) if events are read as the flags say.
#[test]
fn a_vmm_that_makes_its_descriptor_blocking_harms_itself_alone() {
    let guest = Guest::new(Memory::Anonymous, 64);
    let uffd = Uffd::create().unwrap();
    uffd.negotiate(WriteTracking::Off).unwrap();
    uffd.register(&guest.region(), WriteTracking::Off).unwrap();
    let of_the_vmm = uffd.as_fd().try_clone_to_owned().unwrap();
    let config = PagerConfig::new(uffd, vec![guest.region()], source(64), guest.backing());
    let pager = Pager::start(config).unwrap();
    assert_eq!(guest.read(1), Content::Generation(0));
    rustix::fs::fcntl_setfl(&of_the_vmm, rustix::fs::OFlags::empty()).unwrap();
    // Reads events, whatever comes of it.
    let settled = pager.settle(DEADLINE);
    assert!(
        matches!(settled, Ok(()) | Err(PagerError::Failed(_))),
        "{settled:?}"
    );
    // Its reader looks when somebody wants it to.
    pager.prefetch(&[PageRun::new(30, 1)]).unwrap();
    assert!(pager.stats().faults > 0);
    pager.shutdown().unwrap();
}

/// Fails (hangs, until the pager gives up waiting for its reader) if a nudge that ends the reader's
/// polling is taken for a time-out: tried.
#[test]
fn a_pager_stops_while_its_reader_polls_for_the_next_fault() {
    for round in 0..60 {
        let guest = Guest::new(Memory::Anonymous, 64);
        let mut plan = TestSource::new(64);
        plan.read_one_of = u64::MAX;
        let pager = guest.pager(&Arc::new(plan), WriteTracking::Off, |config| {
            config.fault_around_pages = 1;
        });
        // Faults that follow each other at once make it poll.
        for page in 0..20 {
            assert_eq!(guest.read(page), Content::Generation(0));
        }
        let stopped = pager.shutdown();
        assert!(stopped.is_ok(), "round {round}: {stopped:?}");
    }
}
