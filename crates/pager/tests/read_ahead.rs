//! What was read before there was a memory, against the real kernel.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use support::{Content, DEADLINE, Guest, Memory, TestSource, until};
use torpor_pager::{PageRun, ReadAhead, WriteTracking};

#[test]
fn what_was_read_ahead_is_there_without_a_fault_and_is_not_read_again() {
    for memory in [Memory::Anonymous, Memory::SharedMemfd] {
        let guest = Guest::new(memory, 512);
        let mut source = TestSource::new(500);
        source.zero_pages = (120..130).collect();
        let source = Arc::new(source);
        // Some of it zero, some beyond the source's end, some beyond the guest's.
        let runs = vec![PageRun::new(400, 1000), PageRun::new(100, 50)];
        let ahead = ReadAhead::start(source.clone(), runs).unwrap();
        let pager = guest.pager(&source, WriteTracking::Async, |config| {
            config.read_ahead = Some(ahead);
        });
        until("installed", || pager.prefetch_done());
        let reads = source.reads.load(Ordering::SeqCst);
        for page in (100..150).chain(400..512) {
            let zero = (120..130).contains(&page) || page >= 500;
            let expected = if zero {
                Content::Zero
            } else {
                Content::Generation(0)
            };
            assert_eq!(guest.read(page), expected, "page {page}");
        }
        assert_eq!(source.reads.load(Ordering::SeqCst), reads);
        assert_eq!(pager.stats().faults, 0);
        assert_eq!(pager.stats().pages_prefetched, 162);
        guest.write(405, 1);
        pager.settle(DEADLINE).unwrap();
        let dirty = pager.dirty().unwrap();
        assert_eq!(
            dirty.written.runs().collect::<Vec<_>>(),
            [PageRun::new(405, 1)]
        );
    }
}

/// The reading hangs while the guest takes pages, discards some of them and comes to rest.
#[test]
fn what_comes_late_neither_undoes_a_discard_nor_a_write_nor_outlives_a_settling() {
    for memory in [Memory::Anonymous, Memory::SharedMemfd] {
        let guest = Guest::new(memory, 512);
        let slow = Arc::new(TestSource::new(512));
        slow.open_gate(false);
        let runs = vec![PageRun::new(0, 256), PageRun::new(256, 256)];
        let ahead = ReadAhead::start(slow.clone(), runs).unwrap();
        let pager = guest.pager(
            &Arc::new(TestSource::new(512)),
            WriteTracking::Async,
            |config| {
                config.read_ahead = Some(ahead);
                config.fault_around_pages = 1;
            },
        );
        guest.write(3, 7);
        assert_eq!(guest.read(10), Content::Generation(0));
        guest.discard(&pager, 10, 20);
        slow.open_gate(true);
        until("installed", || pager.prefetch_done());
        assert_eq!(guest.read(3), Content::Generation(7));
        (10..30).for_each(|page| assert_eq!(guest.read(page), Content::Zero, "page {page}"));
        assert_eq!(guest.read(31), Content::Generation(0));
        drop(pager);

        let guest = Guest::new(memory, 512);
        slow.open_gate(false);
        let ahead = ReadAhead::start(slow.clone(), vec![PageRun::new(0, 512)]).unwrap();
        let pager = guest.pager(
            &Arc::new(TestSource::new(512)),
            WriteTracking::Async,
            |config| {
                config.read_ahead = Some(ahead);
            },
        );
        pager.settle(DEADLINE).unwrap();
        slow.open_gate(true);
        until("dropped", || pager.prefetch_done());
        assert_eq!(pager.stats().pages_prefetched, 0);
    }
}

#[test]
fn a_source_that_hangs_holds_up_neither_a_settling_nor_what_is_prefetched_after_it() {
    let guest = Guest::new(Memory::Anonymous, 512);
    let hanging = Arc::new(TestSource::new(512));
    hanging.open_gate(false);
    let ahead = ReadAhead::start(hanging.clone(), vec![PageRun::new(0, 512)]).unwrap();
    let source = Arc::new(TestSource::new(512));
    let pager = guest.pager(&source, WriteTracking::Async, |config| {
        config.read_ahead = Some(ahead);
    });
    pager.settle(DEADLINE).unwrap();
    until("given up", || pager.prefetch_done());
    pager.prefetch(&[PageRun::new(100, 8)]).unwrap();
    until("prefetched", || pager.prefetch_done());
    assert_eq!(pager.stats().pages_prefetched, 8);
    // The thread that reads is one of the pager's, and a pager that has stopped has none.
    let opener = std::thread::spawn(move || hanging.open_gate(true));
    pager.shutdown().unwrap();
    opener.join().unwrap();
}
