//! The page states and the service, run step by step beside a simulated kernel and a guest that
//! knows what each of its pages must hold.
//!
//! One thread plays everybody, so an interleaving is a list of operations and a failure can be
//! replayed. What happens while a worker sleeps on storage happens inside the source's `read`.
//! The guest and the kernel under it are simulated in `sim`; `host` shows them to the service.
//!
//! Each cure was taken out once, and this test failed every time: the late copies' punch, the
//! second look before a copy, the wake after EEXIST, setting aside after EAGAIN, believing a fault
//! more than the state "present", the sticky bit.

mod host;
mod sim;

use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use proptest::prelude::*;

use self::host::{SimKernel, SimSource, number_pages};
use self::sim::{Content, Op, PAGES, REGION, Sim, Truth, Waiter, at, in_source};
use crate::bulk::SOURCE_ATTEMPTS;
use crate::error::{PagerError, PagerFailure};
use crate::failure::FailureSignal;
use crate::machine::{DirtyPages, Held, Machine, Need, Reason};
use crate::page_set::{PAGE_SIZE, PageRun, PageSet, bytes_of_pages};
use crate::service::Service;
use crate::source::{SourceKind, runs_of};
use crate::stats::Counters;
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

/// Steps in which everything must come to rest once nothing new is begun.
const REST_STEPS: usize = 2000;

/// One simulation, shared between the kernel, the source and the test.
#[derive(Clone)]
struct World {
    sim: Arc<Mutex<Sim>>,
    service: Arc<OnceLock<Weak<Service>>>,
}

impl World {
    fn sim(&self) -> std::sync::MutexGuard<'_, Sim> {
        self.sim.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn service(&self) -> Arc<Service> {
        self.service.get().and_then(Weak::upgrade).unwrap()
    }

    /// What can happen at any moment, also while a worker sleeps on storage.
    fn happen(&self, op: Op) {
        match op {
            Op::Touch { page, write } => {
                let mut sim = self.sim();
                sim.writes += 1;
                let write = write.then_some(sim.writes);
                // A guest does not write to pages that it is handing in, nor when it stands still.
                if write.is_none() || !(sim.paused || sim.in_discard(page)) {
                    sim.touch(Waiter { page, write });
                }
            }
            Op::Discard { first_page, pages } => {
                if let Some(run) = PageRun::new(first_page, pages).clipped_to(REGION) {
                    self.sim().begin_discard(run);
                }
            }
            Op::Discarder { which } => self.sim().run_discarder(which),
            Op::Short => self.sim().short = true,
            Op::Ragged {
                before_bytes,
                after_bytes,
            } => self.sim().ragged = (before_bytes, after_bytes),
            Op::Hasty { page } => self.sim().hasty = Some(page),
            Op::Cached { all } => self.sim().cached = all,
            Op::FailReads { reads } => self.sim().fail_reads(reads),
            Op::ReadAhead { first_page, pages } => {
                self.install_ahead(PageRun::new(first_page, pages));
            }
            Op::Kill => self.sim().kill(),
            Op::Pause => self.sim().paused = true,
            Op::Resume => self.sim().paused = false,
            Op::Reader => {
                let service = self.service();
                let mut state = service.lock();
                service.drain(&mut state);
                service.fill_around(&mut state);
            }
            Op::Retry => {
                let service = self.service();
                service.retry(&mut service.lock());
            }
            Op::Prefetch { first_page, pages } => {
                self.service()
                    .lock()
                    .prefetch
                    .push_back(PageRun::new(first_page, pages));
            }
            Op::Worker | Op::Prefetcher | Op::Capture => {}
        }
    }

    /// What `Service::install_ahead` does with one piece.
    fn install_ahead(&self, run: PageRun) {
        let service = self.service();
        for (part, kind) in runs_of(&*service.source, run, PAGES) {
            let content = (kind == SourceKind::Data).then(|| {
                let mut content = vec![0; bytes_of_pages(part.pages)];
                number_pages(part.first_page, &mut content);
                content
            });
            service.install_inside(part, content.as_deref());
        }
    }

    /// One operation; `meanwhile` happens when storage is waited for.
    fn step(&self, op: Op, meanwhile: &[Op]) {
        self.sim().meanwhile = meanwhile.iter().copied().collect();
        let service = self.service();
        match op {
            Op::Worker => {
                let next = service.lock().machine.dequeue();
                if let Some(page) = next {
                    let need = service.lock().machine.need(page);
                    if need == Need::Source {
                        service.serve(page, &mut Vec::new());
                    } else {
                        service.decide(&mut service.lock(), page);
                    }
                }
            }
            Op::Prefetcher => _ = service.prefetch_some(&mut Vec::new()),
            Op::Capture => self.capture(),
            other => self.happen(other),
        }
    }

    /// What `Pager::settle` and `Pager::dirty` do, while the other threads go on.
    fn capture(&self) {
        if !self.sim().paused {
            return;
        }
        let service = self.service();
        for step in 0..REST_STEPS {
            let (faults, removed) = match service.settle_once() {
                Ok(moving) => moving,
                // Nothing is captured then.
                Err(PagerError::VmmGone) => return assert!(self.sim().gone),
                Err(error) => return self.expect_failure(&error),
            };
            let discarding = {
                let sim = self.sim();
                let late = |page: &u64| removed.contains(*page) && sim.pages[at(*page)].is_some();
                !sim.shared && (0..PAGES).any(|page| late(&page))
            };
            if faults == 0 && !discarding {
                return self.check();
            }
            for op in [Op::Discarder { which: step }, Op::Retry, Op::Worker] {
                self.step(op, &[]);
            }
        }
        panic!("a stopped guest does not come to rest: {:?}", self.sim());
    }

    /// The pager gives up only on a source that has failed as often as it is asked.
    fn expect_failure(&self, error: &PagerError) {
        let PagerError::Failed(PagerFailure::Source { attempts, .. }) = error else {
            panic!("{error}");
        };
        assert!(self.sim().failing_reads_most >= *attempts, "{error}");
    }

    /// Whether the guest goes on. One whose page could not be read waits for it until it is killed.
    fn is_served(&self) -> bool {
        let Some(failure) = self.service().failure.get() else {
            return !self.sim().gone;
        };
        self.expect_failure(&PagerError::Failed(failure));
        false
    }

    fn come_to_rest(&self) {
        for step in 0..REST_STEPS {
            let (discards, waiters) = {
                let sim = self.sim();
                (sim.discards.len(), sim.unread.len() + sim.asleep.len())
            };
            let busy = self.service().lock().machine.waiting().0;
            if discards + waiters + busy == 0 || !self.is_served() {
                return;
            }
            self.happen(Op::Discarder { which: step });
            for op in [Op::Reader, Op::Retry, Op::Worker] {
                self.step(op, &[]);
            }
        }
        let sim = self.sim();
        assert!(
            sim.unread.is_empty() && sim.asleep.is_empty(),
            "a thread waits for ever: {sim:?}"
        );
        assert!(sim.discards.is_empty(), "a discard never ends: {sim:?}");
    }

    fn check(&self) {
        let service = self.service();
        let mut sim = self.sim();
        if sim.gone {
            // Who captures finds no process, whether or not a copy has told the pager.
            return;
        }
        let mut state = service.lock();
        let mut stored_now = Vec::new();
        let none = || PageSet::with_capacity_pages(PAGES);
        let mut held = Held {
            scanned: none(),
            there: none(),
            zero: none(),
        };
        // Zero pages are left open to writes then, and the kernel may make one of any page of zeros.
        let open = sim.tracking == WriteTracking::Sync && !sim.shared;
        // What becomes of a page in the middle of its discard is nobody's business.
        let settled = |(page, _): &(u64, &Truth)| !sim.in_discard(*page);
        for (page, truth) in (0..PAGES).zip(&sim.truth).filter(settled) {
            match sim.pages[at(page)] {
                Some(found) => {
                    assert_eq!(found.content, truth.content, "page {page}");
                    held.there.insert(page);
                    if !found.protected && sim.tracking == WriteTracking::Async {
                        held.scanned.insert(page);
                    }
                    if open && found.content == Content::Zero {
                        held.zero.insert(page);
                    }
                }
                None => assert!(!truth.written, "page {page}: a write was lost"),
            }
            let comes_as = match state.machine.need(page) {
                Need::Nothing => sim.pages[at(page)].map(|found| found.content),
                Need::Zero => Some(Content::Zero),
                Need::Source => Some(in_source(page)),
            };
            // Need::Nothing on an absent page: a fault says otherwise, and the sticky bit decides.
            if let Some(content) = comes_as {
                assert_eq!(content, truth.content, "page {page}");
            }
        }
        let dirty = DirtyPages::resolve(state.machine.known(), &held);
        state.machine.looked(&held.zero);
        for (page, truth) in (0..PAGES).zip(&sim.truth).filter(settled) {
            let named = dirty.written.contains(page);
            let stored = match (named, dirty.removed.contains(page)) {
                (true, _) => sim.pages[at(page)].map(|found| found.content),
                (_, true) => Some(Content::Zero),
                _ => Some(sim.stored[at(page)]),
            };
            assert_eq!(stored, Some(truth.content), "stored of page {page}");
            stored_now.push((page, truth.content));
            // Of zeros where they were zeros before it is not known whether they were written, and of
            // no consequence.
            let zeros = open && truth.content == Content::Zero;
            assert!(named == truth.written || zeros, "written? page {page}");
            assert!(
                dirty.removed.contains(page) == truth.removed || zeros,
                "removed? page {page}"
            );
            assert!(
                !(named && dirty.removed.contains(page)),
                "both? page {page}"
            );
        }
        // A checkpoint: what is not written from here on is as this build has it.
        for (page, content) in stored_now {
            sim.stored[at(page)] = content;
        }
    }
}

fn world(shared: bool, tracking: WriteTracking) -> (World, Arc<Service>) {
    let world = World {
        sim: Arc::new(Mutex::new(Sim::new(shared, tracking))),
        service: Arc::new(OnceLock::new()),
    };
    let parts = (
        Machine::new(PAGES, PAGE_SIZE as u64),
        Counters::new().unwrap(),
        FailureSignal::new().unwrap(),
    );
    let kernel = Box::new(SimKernel(world.clone()));
    let source = Arc::new(SimSource(world.clone()));
    let mut service = Service::new(kernel, source, tracking, 8, parts);
    service.source_pause = Duration::ZERO;
    let service = Arc::new(service);
    world.service.set(Arc::downgrade(&service)).unwrap();
    (world, service)
}

fn op() -> impl Strategy<Value = Op> {
    let run = || (0..PAGES, prop_oneof![3 => 1_u64..4, 1 => 1_u64..PAGES]);
    prop_oneof![
        6 => (0..PAGES, any::<bool>()).prop_map(|(page, write)| Op::Touch { page, write }),
        3 => run().prop_map(|(first_page, pages)| Op::Discard { first_page, pages }),
        5 => (0_usize..8).prop_map(|which| Op::Discarder { which }),
        5 => Just(Op::Reader),
        4 => Just(Op::Worker),
        1 => Just(Op::Retry),
        1 => run().prop_map(|(first_page, pages)| Op::Prefetch { first_page, pages }),
        2 => Just(Op::Prefetcher),
        1 => Just(Op::Short),
        1 => (0..PAGE_SIZE as u64, 0..PAGE_SIZE as u64)
            .prop_map(|(before_bytes, after_bytes)| Op::Ragged { before_bytes, after_bytes }),
        2 => (0..PAGES).prop_map(|page| Op::Hasty { page }),
        1 => any::<bool>().prop_map(|all| Op::Cached { all }),
        1 => (1..SOURCE_ATTEMPTS).prop_map(|reads| Op::FailReads { reads }),
        1 => (0..PAGES - 8, 1_u64..8).prop_map(|(first_page, pages)| Op::ReadAhead { first_page, pages }),
        1 => Just(Op::Pause),
        2 => Just(Op::Capture),
        1 => Just(Op::Resume),
    ]
}

fn plan() -> impl Strategy<Value = Vec<(Op, Vec<Op>)>> {
    let meanwhile = prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(op(), 1..6)];
    prop::collection::vec((op(), meanwhile), 1..60)
}

/// A plan in which the source fails for good, or the VMM is killed, perhaps while a worker sleeps on
/// storage.
fn plan_with_an_end() -> impl Strategy<Value = Vec<(Op, Vec<Op>)>> {
    let end = prop_oneof![
        Just(Op::Kill),
        (SOURCE_ATTEMPTS..2 * SOURCE_ATTEMPTS).prop_map(|reads| Op::FailReads { reads }),
    ];
    (plan(), end, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(mut plan, end, at, meanwhile)| {
            let at = at.index(plan.len());
            if meanwhile {
                plan[at].1.insert(0, end);
            } else {
                plan.insert(at, (end, Vec::new()));
            }
            plan
        },
    )
}

/// Runs a plan to its end. Returns whether the guest is still served.
fn run(plan: Vec<(Op, Vec<Op>)>, shared: bool, sync: bool) -> bool {
    let tracking = if sync {
        WriteTracking::Sync
    } else {
        WriteTracking::Async
    };
    let (world, _service) = world(shared, tracking);
    for (op, meanwhile) in plan {
        world.step(op, &meanwhile);
    }
    // The last pause finds the guest as it was left.
    world.step(Op::Pause, &[]);
    world.step(Op::Capture, &[]);
    world.come_to_rest();
    world.check();
    world.is_served()
}

proptest! {
    // Tens of thousands of plans: a few seconds.
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn every_page_holds_what_the_guest_knows_it_must(
        plan in plan(),
        shared in any::<bool>(),
        sync in any::<bool>(),
    ) {
        prop_assert!(run(plan, shared, sync));
    }

    /// Neither a page of made-up content, nor a panic, nor a failure without its cause.
    #[test]
    fn a_source_that_fails_and_a_vmm_that_is_killed_spoil_no_page(
        plan in plan_with_an_end(),
        shared in any::<bool>(),
        sync in any::<bool>(),
    ) {
        run(plan, shared, sync);
    }
}

#[test]
fn a_run_of_zeros_is_prefetched_without_a_read() {
    let (world, service) = world(true, WriteTracking::Async);
    world.step(
        Op::Prefetch {
            first_page: 24,
            pages: 8,
        },
        &[],
    );
    while service.prefetch_some(&mut Vec::new()) {}
    assert_eq!(service.lock().counters.snapshot(0).pages_prefetched, 8);
    assert_eq!(world.sim().source_reads, 0);
}

/// Content at hand may have to be decoded: many scattered pieces of it are not fetched in one go.
#[test]
fn events_are_read_between_scattered_pieces_of_a_window() {
    let (world, service) = world(false, WriteTracking::Async);
    world.sim().cached = true;
    let mut state = service.lock();
    for page in (1..16).step_by(2) {
        let there = world.sim().install(PageRun::new(page, 1), true, in_source);
        assert_eq!(there, Filled::Bytes(PAGE_SIZE as u64));
        state.machine.installed(page, Reason::Neighbour);
    }
    state.backlog.push(PageRun::new(0, 16));
    assert_eq!(service.fill_around(&mut state), 8);
    assert_eq!(world.sim().source_asked, 4);
    assert!(!state.backlog.is_empty(), "the rest has its turn later");
    assert_eq!(service.fill_around(&mut state), 8);
    assert!(state.backlog.is_empty());
    let absent = |page: &u64| state.machine.need(*page) != Need::Nothing;
    assert_eq!((0..16).find(absent), None);
}

/// The kernel wakes its thread: to wait for a worker, which may hang, it has no reason.
#[test]
fn a_fault_that_has_been_answered_with_its_neighbours_waits_no_more() {
    let (world, service) = world(false, WriteTracking::Async);
    world.happen(Op::Touch {
        page: 3,
        write: false,
    });
    service.drain(&mut service.lock());
    assert_eq!(service.lock().machine.waiting().0, 1, "no worker runs");
    world.step(
        Op::Prefetch {
            first_page: 0,
            pages: 8,
        },
        &[],
    );
    while service.prefetch_some(&mut Vec::new()) {}
    assert_eq!(service.lock().machine.waiting().0, 0);
    assert!(world.sim().asleep.is_empty());
    world.step(Op::Worker, &[]);
    world.check();
}

#[test]
fn a_page_that_is_discarded_while_it_cannot_be_read_is_zero_and_no_failure() {
    let (world, service) = world(false, WriteTracking::Async);
    world.happen(Op::Touch {
        page: 3,
        write: false,
    });
    service.drain(&mut service.lock());
    world.sim().fail_reads(SOURCE_ATTEMPTS);
    let discard = Op::Discard {
        first_page: 3,
        pages: 1,
    };
    world.step(Op::Worker, &[discard, Op::Reader]);
    world.come_to_rest();
    assert!(service.failure.get().is_none());
    assert_eq!(world.sim().source_reads, u64::from(SOURCE_ATTEMPTS));
    world.check();
}

/// Fails without `Backlog::drop_overlapping` (tried: page 9 is then filled with zeros).
#[test]
fn a_window_whose_pages_are_discarded_is_not_filled_any_more() {
    let (world, service) = world(false, WriteTracking::Async);
    world.sim().cached = true;
    world.happen(Op::Touch {
        page: 8,
        write: false,
    });
    service.drain(&mut service.lock());
    assert!(!service.lock().backlog.is_empty(), "a window around page 8");
    world.happen(Op::Discard {
        first_page: 9,
        pages: 4,
    });
    service.drain(&mut service.lock());
    for _ in 0..2 {
        world.happen(Op::Discarder { which: 0 });
    }
    while service.fill_around(&mut service.lock()) > 0 {}
    assert!((9..13).all(|page| world.sim().pages[at(page)].is_none()));
    world.come_to_rest();
    world.check();
}
