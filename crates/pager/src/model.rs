//! The page states and the service, run step by step beside a simulated kernel and a guest that
//! knows what each of its pages must hold.
//!
//! One thread plays everybody, so an interleaving is a list of operations and a failure can be
//! replayed. What happens while a worker sleeps on storage happens inside the source's `read`.
//! The kernel is simulated as it behaves (facts at its methods): faults are read before discards
//! that came earlier; operations are put off from a discard's announcement until its thread runs
//! again; anonymous memory loses its pages only then, a shared memfd before the announcement.
//!
//! Each cure was taken out once, and this test failed every time: the late copies' punch, the
//! second look before a copy, the wake after EEXIST, setting aside after EAGAIN, believing a fault
//! more than the state "present", the sticky bit.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use proptest::prelude::*;

use crate::failure::FailureSignal;
use crate::kernel::{Event, Kernel, Waited};
use crate::machine::{DirtyPages, FaultKind, Machine, Need, Reason};
use crate::page_set::{PAGE_SIZE, PageRun, PageSet};
use crate::service::Service;
use crate::source::{Content as Bytes, PageSource, SourceKind, SourceRun};
use crate::stats::Counters;
use crate::uffd::{Filled, WriteTracking};

const PAGES: u64 = 48;
const REGION: PageRun = PageRun::new(0, PAGES);

/// Steps in which everything must come to rest once nothing new is begun.
const REST_STEPS: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Source,
    Zero,
    Written(u64),
}

/// Pages 24 to 31 are zero in the source.
fn in_source(page: u64) -> Content {
    if (24..32).contains(&page) {
        Content::Zero
    } else {
        Content::Source
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Touch {
        page: u64,
        write: bool,
    },
    Discard {
        first_page: u64,
        pages: u64,
    },
    /// Lets one discarding thread run on.
    Discarder {
        which: usize,
    },
    Reader,
    Worker,
    Retry,
    Prefetch {
        first_page: u64,
        pages: u64,
    },
    Prefetcher,
    /// The kernel does less than asked for, next time.
    Short,
    /// The next discarding thread is faster than the reader: it is through, and its guest writes
    /// to this page, between the reader's read of the event and all that follows.
    Hasty {
        page: u64,
    },
    /// What the source's cache can answer changes.
    Cached {
        all: bool,
    },
    /// The vCPUs are stopped: nothing is written any more, while discards go on, and the VMM still
    /// reads.
    Pause,
    /// The stopped guest is brought to rest, and what a build would store of it is looked at.
    Capture,
    /// The pause has failed, or is over.
    Resume,
}

/// A discarding thread, by what it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Discarder {
    /// Memfd: the hole is punched; will announce it.
    Punched,
    /// Announced; asleep until the event has been read.
    Announced,
    /// Its event has been read; will run on.
    Released,
    /// Runs again, so nothing is put off any more; will drop the pages.
    Running,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    page: u64,
    write: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    content: Content,
    /// Outlives the mapping, as the kernel's marker does.
    protected: bool,
    /// Shared memory only: it may be in the file without being mapped.
    mapped: bool,
}

/// What the guest knows of a page.
#[derive(Clone, Copy, Debug)]
struct Truth {
    content: Content,
    written: bool,
    removed: bool,
}

#[derive(Debug)]
struct Sim {
    shared: bool,
    tracking: WriteTracking,
    pages: Vec<Option<Page>>,
    truth: Vec<Truth>,
    discards: Vec<(PageRun, Discarder)>,
    /// Threads asleep in a fault, those whose fault has not been read first.
    unread: VecDeque<Waiter>,
    asleep: Vec<Waiter>,
    meanwhile: VecDeque<Op>,
    short: bool,
    hasty: Option<u64>,
    cached: bool,
    paused: bool,
    writes: u64,
    source_reads: u64,
    source_asked: u64,
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl Sim {
    /// A guest thread touches a page: does it, or falls asleep.
    fn touch(&mut self, waiter: Waiter) {
        let Waiter { page, write } = waiter;
        let Some(there) = self.pages[at(page)].filter(|there| there.mapped) else {
            self.unread.push_back(waiter);
            return;
        };
        let Some(number) = write else {
            if !self.in_discard(page) {
                assert_eq!(
                    there.content,
                    self.truth[at(page)].content,
                    "page {page} read wrong"
                );
            }
            return;
        };
        if there.protected && self.tracking == WriteTracking::Sync {
            self.unread.push_back(waiter);
            return;
        }
        let content = Content::Written(number);
        self.pages[at(page)] = Some(Page {
            content,
            protected: false,
            mapped: true,
        });
        self.truth[at(page)] = Truth {
            content,
            written: true,
            removed: false,
        };
    }

    fn in_discard(&self, page: u64) -> bool {
        self.discards
            .iter()
            .any(|(run, _)| (run.first_page..run.end_page()).contains(&page))
    }

    fn changing(&self) -> bool {
        let changing = [Discarder::Announced, Discarder::Released];
        self.discards
            .iter()
            .any(|(_, stage)| changing.contains(stage))
    }

    fn drop_pages(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            self.pages[at(page)] = None;
        }
    }

    fn unmap(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            if let Some(there) = &mut self.pages[at(page)] {
                there.mapped = false;
            }
        }
    }

    /// The guest's view of a discard: from here on the pages are zero.
    fn discarded(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            self.truth[at(page)] = Truth {
                content: Content::Zero,
                written: false,
                removed: true,
            };
        }
    }

    /// See [`Op::Hasty`].
    fn overtake(&mut self, run: PageRun) {
        let inside = |page: &u64| (run.first_page..run.end_page()).contains(page);
        let Some(page) = self.hasty.take_if(|page| inside(page)) else {
            return;
        };
        for _ in 0..2 {
            if let Some(which) = self.discards.iter().position(|(found, _)| *found == run) {
                self.run_discarder(which);
            }
        }
        self.writes += 1;
        let write = (!self.paused).then_some(self.writes);
        self.touch(Waiter { page, write });
    }

    fn begin_discard(&mut self, run: PageRun) {
        // A guest hands each page in once at a time.
        if (run.first_page..run.end_page()).any(|page| self.in_discard(page)) {
            return;
        }
        if self.shared {
            self.drop_pages(run);
            self.discards.push((run, Discarder::Punched));
        } else {
            self.discards.push((run, Discarder::Announced));
        }
    }

    fn run_discarder(&mut self, which: usize) {
        if self.discards.is_empty() {
            return;
        }
        let which = which % self.discards.len();
        let (run, stage) = self.discards[which];
        match stage {
            Discarder::Punched => self.discards[which].1 = Discarder::Announced,
            Discarder::Announced => {}
            Discarder::Released => self.discards[which].1 = Discarder::Running,
            Discarder::Running => {
                if self.shared {
                    self.unmap(run);
                } else {
                    self.drop_pages(run);
                    self.discarded(run);
                }
                self.discards.remove(which);
            }
        }
    }

    /// Wakes whoever waits in the run; they try again.
    fn wake_run(&mut self, run: PageRun) {
        let inside = |waiter: &Waiter| (run.first_page..run.end_page()).contains(&waiter.page);
        let mut woken: Vec<_> = self.asleep.iter().copied().filter(inside).collect();
        self.asleep.retain(|waiter| !inside(waiter));
        woken.extend(self.unread.iter().copied().filter(inside));
        self.unread.retain(|waiter| !inside(waiter));
        woken.into_iter().for_each(|waiter| self.touch(waiter));
    }

    fn put_off(&mut self) -> Filled {
        // While somebody tries in vain, the discarding threads get on.
        for which in 0..self.discards.len() {
            if self.discards[which].1 == Discarder::Released {
                self.run_discarder(which);
            }
        }
        Filled::Again
    }

    fn install(&mut self, run: PageRun, protect: bool, content: impl Fn(u64) -> Content) -> Filled {
        if self.changing() {
            return self.put_off();
        }
        let end_page = if std::mem::take(&mut self.short) {
            run.first_page + run.pages.div_ceil(2)
        } else {
            run.end_page()
        };
        let absent = (run.first_page..end_page)
            .take_while(|page| self.pages[at(*page)].is_none())
            .count();
        if absent == 0 {
            return Filled::Exists;
        }
        let done = PageRun::new(run.first_page, absent as u64);
        for page in done.first_page..done.end_page() {
            self.pages[at(page)] = Some(Page {
                content: content(page),
                protected: protect,
                mapped: true,
            });
        }
        self.wake_run(done);
        Filled::Bytes(done.pages * PAGE_SIZE as u64)
    }
}

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
            Op::Hasty { page } => self.sim().hasty = Some(page),
            Op::Cached { all } => self.sim().cached = all,
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
            let (faults, removed) = service.settle_once().unwrap();
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

    fn come_to_rest(&self) {
        for step in 0..REST_STEPS {
            let (discards, waiters) = {
                let sim = self.sim();
                (sim.discards.len(), sim.unread.len() + sim.asleep.len())
            };
            let busy = self.service().lock().machine.waiting().0;
            if discards + waiters + busy == 0 {
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
        let sim = self.sim();
        let state = service.lock();
        assert!(service.failure.get().is_none());
        let (mut there, mut scanned) = (
            PageSet::with_capacity_pages(PAGES),
            PageSet::with_capacity_pages(PAGES),
        );
        // What becomes of a page in the middle of its discard is nobody's business.
        let settled = |(page, _): &(u64, &Truth)| !sim.in_discard(*page);
        for (page, truth) in (0..PAGES).zip(&sim.truth).filter(settled) {
            match sim.pages[at(page)] {
                Some(found) => {
                    assert_eq!(found.content, truth.content, "page {page}");
                    there.insert(page);
                    if !found.protected && sim.tracking == WriteTracking::Async {
                        scanned.insert(page);
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
        let known = state.machine.known_written();
        let removed = state.machine.removed_since_resume();
        let dirty = DirtyPages::resolve(&known, removed, &scanned, &there);
        for (page, truth) in (0..PAGES).zip(&sim.truth).filter(settled) {
            let named = dirty.written.contains(page);
            let stored = match (named, dirty.removed.contains(page)) {
                (true, _) => sim.pages[at(page)].map(|found| found.content),
                (_, true) => Some(Content::Zero),
                _ => Some(in_source(page)),
            };
            assert_eq!(stored, Some(truth.content), "stored of page {page}");
            // Zeros that are left open to writes may be named as written, whether they were or not.
            let open = sim.tracking == WriteTracking::Sync && !sim.shared;
            let zero_named = open && named && truth.content == Content::Zero;
            assert!(named == truth.written || zero_named, "written? page {page}");
            assert!(
                dirty.removed.contains(page) == truth.removed || zero_named,
                "removed? page {page}"
            );
            assert!(
                !(named && dirty.removed.contains(page)),
                "both? page {page}"
            );
        }
    }
}

struct SimKernel(World);

impl Kernel for SimKernel {
    fn wait(&self, _timeout: Option<Duration>) -> io::Result<Waited> {
        unreachable!("nobody waits in this model");
    }

    fn nudge(&self) {}

    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool> {
        let mut sim = self.0.sim();
        if let Some(waiter) = sim.unread.pop_front() {
            sim.asleep.push(waiter);
            let kind = match (sim.pages[at(waiter.page)], waiter.write) {
                (Some(there), _) if !there.mapped => FaultKind::Unmapped,
                (Some(_), Some(_)) => FaultKind::Protected,
                (_, None) => FaultKind::Read,
                (None, Some(_)) => FaultKind::Write,
            };
            sink(Event::Fault {
                page: waiter.page,
                kind,
            });
            return Ok(true);
        }
        let announced = sim
            .discards
            .iter()
            .position(|(_, stage)| *stage == Discarder::Announced);
        let Some(which) = announced else {
            return Ok(false);
        };
        let (run, _) = sim.discards[which];
        sim.discards[which].1 = Discarder::Released;
        if sim.shared {
            // Whatever is written from here on is written to a page that comes after.
            sim.discarded(run);
        }
        let size = PAGE_SIZE as u64;
        sink(Event::Remove {
            start_byte: run.first_page * size,
            end_byte: run.end_page() * size,
        });
        sim.overtake(run);
        Ok(true)
    }

    fn copy(&self, first_page: u64, content: Bytes<'_>, protect: bool) -> io::Result<Filled> {
        let Bytes::Bytes(data) = content else {
            unreachable!("nothing is mapped in this model");
        };
        for (bytes, page) in data.chunks(PAGE_SIZE).zip(first_page..) {
            assert_eq!(bytes[..8], page.to_le_bytes(), "another page's bytes");
        }
        let run = PageRun::new(first_page, (data.len() / PAGE_SIZE) as u64);
        let protect = protect && self.0.sim().tracking.protects();
        Ok(self.0.sim().install(run, protect, |_| Content::Source))
    }

    fn zero(&self, run: PageRun, protect: bool, _own: bool) -> io::Result<Filled> {
        let protect = protect && self.0.sim().tracking.protects();
        Ok(self.0.sim().install(run, protect, |_| Content::Zero))
    }

    fn map(&self, page: u64, written: bool) -> io::Result<Filled> {
        let mut sim = self.0.sim();
        if sim.changing() {
            return Ok(sim.put_off());
        }
        let sync = sim.tracking == WriteTracking::Sync;
        let Some(there) = &mut sim.pages[at(page)] else {
            return Ok(Filled::Missing);
        };
        if there.mapped {
            return Ok(Filled::Exists);
        }
        there.mapped = true;
        if sync {
            there.protected = !written;
        }
        sim.wake_run(PageRun::new(page, 1));
        Ok(Filled::Bytes(PAGE_SIZE as u64))
    }

    fn unprotect(&self, page: u64) -> io::Result<Filled> {
        let mut sim = self.0.sim();
        if sim.changing() {
            return Ok(sim.put_off());
        }
        if let Some(there) = &mut sim.pages[at(page)] {
            there.protected = false;
        }
        sim.wake_run(PageRun::new(page, 1));
        Ok(Filled::Bytes(PAGE_SIZE as u64))
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        self.0.sim().wake_run(PageRun::new(page, 1));
        Ok(())
    }

    fn drop_late_copies(&self, run: PageRun) -> io::Result<()> {
        let mut sim = self.0.sim();
        if sim.shared {
            sim.drop_pages(run);
        }
        Ok(())
    }

    fn zeros_take_memory(&self) -> bool {
        self.0.sim().shared
    }

    fn region_around(&self, page: u64) -> Option<PageRun> {
        (page < PAGES).then_some(REGION)
    }
}

struct SimSource(World);

impl PageSource for SimSource {
    fn run_at(&self, page: u64) -> SourceRun {
        let kind = |page| match in_source(page) {
            Content::Source => SourceKind::Data,
            _ => SourceKind::Zero,
        };
        let mine = kind(page);
        let pages = (page..PAGES).take_while(|page| kind(*page) == mine).count() as u64;
        SourceRun {
            pages: pages.max(1),
            kind: mine,
        }
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Bytes<'a>> {
        self.0.sim().source_asked += 1;
        if !self.0.sim().cached {
            return None;
        }
        for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(run.first_page..) {
            assert_eq!(
                in_source(page),
                Content::Source,
                "zero page {page} was asked for"
            );
            bytes[..8].copy_from_slice(&page.to_le_bytes());
        }
        Some(Bytes::Bytes(buf))
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.sim().source_reads += 1;
        for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
            assert_eq!(
                in_source(page),
                Content::Source,
                "zero page {page} was read"
            );
            bytes[..8].copy_from_slice(&page.to_le_bytes());
        }
        loop {
            let next = self.0.sim().meanwhile.pop_front();
            let Some(op) = next else { return Ok(()) };
            self.0.happen(op);
        }
    }
}

fn world(shared: bool, tracking: WriteTracking) -> (World, Arc<Service>) {
    let truth = |page| Truth {
        content: in_source(page),
        written: false,
        removed: false,
    };
    let sim = Sim {
        shared,
        tracking,
        pages: vec![None; at(PAGES)],
        truth: (0..PAGES).map(truth).collect(),
        discards: Vec::new(),
        unread: VecDeque::new(),
        asleep: Vec::new(),
        meanwhile: VecDeque::new(),
        short: false,
        hasty: None,
        cached: false,
        paused: false,
        writes: 0,
        source_reads: 0,
        source_asked: 0,
    };
    let world = World {
        sim: Arc::new(Mutex::new(sim)),
        service: Arc::new(OnceLock::new()),
    };
    let parts = (
        Machine::new(PAGES, PAGE_SIZE as u64),
        Counters::new().unwrap(),
        FailureSignal::new().unwrap(),
    );
    let kernel = Box::new(SimKernel(world.clone()));
    let source = Arc::new(SimSource(world.clone()));
    let service = Arc::new(Service::new(kernel, source, tracking, 8, parts));
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
        2 => (0..PAGES).prop_map(|page| Op::Hasty { page }),
        1 => any::<bool>().prop_map(|all| Op::Cached { all }),
        1 => Just(Op::Pause),
        2 => Just(Op::Capture),
        1 => Just(Op::Resume),
    ]
}

fn plan() -> impl Strategy<Value = Vec<(Op, Vec<Op>)>> {
    let meanwhile = prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(op(), 1..6)];
    prop::collection::vec((op(), meanwhile), 1..60)
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
        let tracking = if sync { WriteTracking::Sync } else { WriteTracking::Async };
        let (world, _service) = world(shared, tracking);
        for (op, meanwhile) in plan {
            world.step(op, &meanwhile);
        }
        // The last pause finds the guest as it was left.
        world.step(Op::Pause, &[]);
        world.step(Op::Capture, &[]);
        world.come_to_rest();
        world.check();
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
