//! What pagers cost: a thousand idle ones, and one whose guest frees and faults all the time. One
//! test after the other, in a process of their own, since they look at all of its threads and
//! memory.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit};
use support::{Content, Guest, Memory, Rng, TestSource, until};
use torpor_pager::WriteTracking;

const PAGERS: u64 = 1000;
/// 512 MiB each.
const GUEST_PAGES: u64 = 131_072;
const RESIDENT_MAX: u64 = 4 << 20;
const THREADS_MAX: u64 = 2;

fn status(path: &str, field: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

fn resident_bytes() -> u64 {
    status("/proc/self/status", "VmRSS:") * 1024
}

/// How often the pagers' threads have run, and how many there are.
fn pager_threads() -> (u64, u64) {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.map(|task| task.unwrap().path());
    let ours = names.filter(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("pager-"))
    });
    let switches = ours.map(|task| {
        let path = task.join("status");
        let path = path.to_str().unwrap();
        status(path, "voluntary_ctxt_switches:") + status(path, "nonvoluntary_ctxt_switches:")
    });
    let (sum, count) = switches.fold((0, 0), |(sum, count), one| (sum + one, count + 1));
    (sum, count)
}

fn a_thousand_idle_pagers_cost_no_processor_and_little_memory() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(Resource::Nofile, raised).unwrap();
    let source = Arc::new(TestSource::new(GUEST_PAGES));
    let before = resident_bytes();
    let guests: Vec<_> = (0..PAGERS)
        .map(|_| {
            let guest = Guest::new(Memory::Anonymous, GUEST_PAGES);
            let pager = guest.pager(&source, WriteTracking::Off, |_| {});
            // Each has had something to do.
            assert_eq!(guest.read(100_000), Content::Generation(0));
            (guest, pager)
        })
        .collect();
    until("a second in which none of their threads runs", || {
        let then = pager_threads();
        std::thread::sleep(Duration::from_secs(1));
        then == pager_threads()
    });
    let (_, threads) = pager_threads();
    let each = (resident_bytes() - before) / PAGERS;
    eprintln!("{each} bytes and {threads} / {PAGERS} threads for each idle pager");
    assert!(each <= RESIDENT_MAX, "{each} bytes each");
    assert!(threads <= THREADS_MAX * PAGERS, "{threads} threads");
    for (_, pager) in &guests {
        assert!(pager.failure().get().is_none());
    }
    // All at once: each pager waits for its own threads.
    std::thread::scope(|scope| {
        for (guest, pager) in guests {
            scope.spawn(move || {
                drop(pager);
                drop(guest);
            });
        }
    });
}

fn a_guest_that_faults_and_discards_in_a_loop_does_not_grow_its_pager() {
    const PAGES: u64 = 4096;
    const STEPS: u64 = 20_000;
    let guest = Guest::new(Memory::Anonymous, PAGES);
    let mut plan = TestSource::new(PAGES);
    plan.read_one_of = 5;
    let pager = guest.pager(&Arc::new(plan), WriteTracking::Off, |_| {});
    let churn = |seed: u64| {
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let guest = &guest;
                scope.spawn(move || {
                    let mut rng = Rng(seed + thread);
                    for _ in 0..STEPS {
                        let page = rng.below(PAGES - 64);
                        guest.touch(page);
                        guest.madvise(page, 4096 * (1 + rng.below(64) as usize));
                    }
                });
            }
        });
        guest.madvise(0, PAGES as usize * 4096);
    };
    churn(1);
    let before = resident_bytes();
    churn(2);
    let grown = resident_bytes().saturating_sub(before);
    eprintln!("{grown} bytes more, {:?}", pager.stats());
    assert!(
        grown < 4 << 20,
        "{grown} bytes more after {STEPS} discards of each thread"
    );
    assert!(pager.failure().get().is_none());
}

#[test]
fn pagers_are_cheap() {
    a_thousand_idle_pagers_cost_no_processor_and_little_memory();
    a_guest_that_faults_and_discards_in_a_loop_does_not_grow_its_pager();
}
