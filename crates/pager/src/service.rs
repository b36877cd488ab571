//! How events and faults are served: the machine, the kernel and the source put together.
//!
//! One lock, around the page states **and** around every kernel call that reads events or
//! installs pages. The two belong together: a discard is under way from the moment its event has
//! been read, so between "what must this page hold?" and the copy no event may be read. The lock
//! is never held while the source is read, and nothing that it covers waits for the VMM: copies
//! need only the address space's lock, which a thread that sleeps in a discard has let go.
//!
//! ```text
//!   reader ──read events──▶ machine ──zero, copy what is at hand, wake──▶ kernel   (at once)
//!     │                        │ queue
//!     │ then, piece by piece   ▼
//!     │ the windows around   worker ──read source──▶ look again ──copy──▶ kernel
//!     ▼
//!   prefetcher ──read source──▶ look again ──copy what is still absent──▶ kernel
//!     ▲
//!     └─ pieces that were read before there was a memory (`ahead`)
//! ```
//!
//! Any of them may read events (it holds the lock); the reader is the one that waits for them.
//! A fault whose content is at hand is served by the reader itself: handing it to another thread
//! costs more than the copy. Windows around faults are filled 64 KiB at a time, and events are
//! read in between, so that a fault waits for one piece at most.
//!
//! A copy never carries on after EAGAIN: the fault is set aside, and the reader tries again after
//! a moment, events first.
//!
//! **Late copies on shared memory.** A VMM punches the hole of a discard first, without telling;
//! only then comes the event. A page installed in between stays in the memory's file. It is
//! punched again when the event has been read, and should the VMM be faster than that, the guest
//! cannot get at the page: shared memory is registered for faults on pages that are in the file
//! and not mapped as well, and such a fault on a discarded page punches it first.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::around::Around;
use crate::bulk::{Backlog, Scratch, Sizes, piece_pages};
use crate::error::{PagerError, PagerFailure};
use crate::failure::FailureSignal;
use crate::kernel::{Event, Kernel};
use crate::machine::{FaultKind, Machine, Need, Reason};
use crate::page_set::{PageRun, PageSet};
use crate::source::{Content, PageSource, SourceKind};
use crate::stats::Counters;
use crate::sync::{AtomicUsize, Condvar, Mutex, MutexGuard, yield_now};
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

/// Reads of events before faults are served even if more events are queued: 64 reads of 64. An
/// unread discard makes copies say EAGAIN, so stopping early is safe; never stopping would let a
/// guest that discards in a loop starve its own faults.
const READS_PER_DRAIN: u32 = 64;

/// How long to wait before trying again what the kernel put off. A discarding thread needs to be
/// scheduled once in between: tens of microseconds.
pub(crate) const AGAIN_PAUSE: Duration = Duration::from_micros(50);

/// Times that bulk work lets others go first before it takes the lock all the same.
const YIELDS_MAX: u32 = 100;

/// A waiting fault older than this is named in the log.
const FAULT_AGE_MAX: Duration = Duration::from_secs(1);

/// What the lock covers.
pub(crate) struct State {
    pub(crate) machine: Machine,
    pub(crate) counters: Counters,
    pub(crate) prefetch: VecDeque<PageRun>,
    pub(crate) prefetcher_runs: bool,
    /// What was read ahead is to be installed.
    pub(crate) ahead_wanted: bool,
    pub(crate) vmm_gone: bool,
    pub(crate) stopping: bool,
    /// Threads that wait for the pager to come to rest.
    pub(crate) settlers: u32,
    /// Windows around faults that are still to be filled.
    pub(crate) backlog: Backlog,
    around: Around,
    events: Vec<Event>,
    /// For content at hand.
    pub(crate) scratch: Scratch,
}

/// What all threads of one pager share.
pub(crate) struct Service {
    pub(crate) kernel: Box<dyn Kernel>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) tracking: WriteTracking,
    pub(crate) failure: FailureSignal,
    pub(crate) sizes: Sizes,
    state: Mutex<State>,
    /// There is work for a worker, or the pager stops.
    pub(crate) work: Condvar,
    /// No fault waits any more, or the pager stops or fails.
    pub(crate) rest: Condvar,
    /// The pager stops.
    pub(crate) stop: Condvar,
    /// Threads that wait for the lock on behalf of a fault.
    urgent: AtomicUsize,
}

impl Service {
    pub(crate) fn new(
        kernel: Box<dyn Kernel>,
        source: Arc<dyn PageSource>,
        tracking: WriteTracking,
        fault_around_pages: u64,
        parts: (Machine, Counters, FailureSignal),
    ) -> Self {
        let (machine, counters, failure) = parts;
        let state = State {
            machine,
            counters,
            prefetch: VecDeque::new(),
            prefetcher_runs: false,
            ahead_wanted: true,
            vmm_gone: false,
            stopping: false,
            settlers: 0,
            backlog: Backlog::default(),
            around: Around::new(fault_around_pages),
            events: Vec::new(),
            scratch: Scratch::default(),
        };
        Self {
            sizes: Sizes::of_pages(kernel.page_bytes()),
            kernel,
            source,
            tracking,
            failure,
            state: Mutex::new(state),
            work: Condvar::new(),
            rest: Condvar::new(),
            stop: Condvar::new(),
            urgent: AtomicUsize::new(0),
        }
    }

    /// The lock, for whoever serves a fault.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.urgent.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// The lock, for work that nobody waits for: the mutex is not fair, so a loop of such work
    /// would otherwise keep a fault out for as long as it runs.
    pub(crate) fn lock_when_calm(&self) -> MutexGuard<'_, State> {
        for _ in 0..YIELDS_MAX {
            if self.urgent.load(Ordering::Relaxed) == 0 {
                break;
            }
            yield_now();
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets others have the lock who serve a fault.
    pub(crate) fn give_way(&self) {
        if self.urgent.load(Ordering::Relaxed) > 0 {
            yield_now();
        }
    }

    /// Sleeps, but not past a stop. Returns whether the pager goes on.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        if cfg!(feature = "shuttle") {
            // Its waits know no time.
            yield_now();
            return !self.lock().stopping;
        }
        let guard = self.lock();
        let waited = self
            .stop
            .wait_timeout_while(guard, time, |state| !state.stopping);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !guard.stopping
    }

    /// Tells all threads to end.
    pub(crate) fn tell_to_stop(&self) {
        self.lock().stopping = true;
        self.work.notify_all();
        self.stop.notify_all();
        self.rest.notify_all();
        self.kernel.nudge();
    }

    /// Gives up on the guest. Threads go on: they still read discards, so that the VMM's own
    /// threads can be killed cleanly, and serve what they can.
    pub(crate) fn fail(&self, failure: PagerFailure) {
        self.failure.raise(failure);
        self.rest.notify_all();
    }

    pub(crate) fn fail_kernel(&self, operation: &'static str, page: u64, source: std::io::Error) {
        self.fail(PagerFailure::Kernel {
            operation,
            page,
            source: Arc::new(source),
        });
    }

    // Events

    /// Takes in every queued event, discards first, and then serves or queues the new faults.
    pub(crate) fn drain(&self, state: &mut State) {
        let mut events = std::mem::take(&mut state.events);
        for _ in 0..READS_PER_DRAIN {
            match self.kernel.read_events(&mut |event| events.push(event)) {
                Ok(more) => {
                    let now = Instant::now();
                    for event in events.drain(..) {
                        self.take_in(state, event, now);
                    }
                    if !more {
                        break;
                    }
                }
                Err(error) => {
                    self.fail(PagerFailure::Events {
                        source: Arc::new(error),
                    });
                    break;
                }
            }
        }
        state.events = events;
        for page in state.machine.take_fresh() {
            self.decide(state, page);
        }
    }

    fn take_in(&self, state: &mut State, event: Event, now: Instant) {
        match event {
            Event::Fault { page, kind } => {
                // How the bench's recorded resume was made; costs one look at a flag.
                tracing::trace!(target: "torpor_pager::faults", page, ?kind);
                if state.machine.fault(page, kind, now).is_err() {
                    let limit = crate::machine::FAULTS_MAX;
                    self.fail(PagerFailure::TooManyFaults { limit });
                }
            }
            Event::Remove {
                start_byte,
                end_byte,
            } => {
                let (run, some_there) = state.machine.remove(start_byte, end_byte);
                // What the guest gives back is not to be filled for it.
                state.backlog.drop_overlapping(run);
                state.counters.stats.removes += 1;
                state.counters.stats.pages_removed += run.pages;
                // A copy that came late was ours: without one there is nothing to look for.
                if some_there && let Err(error) = self.kernel.drop_late_copies(run) {
                    self.fail_kernel("drop late copies", run.first_page, error);
                }
            }
            Event::Stray { host_addr } => self.fail(PagerFailure::UnknownAddress { host_addr }),
        }
    }

    /// One look on the way to rest: reads all events, drops what is left to prefetch. Returns how many
    /// faults wait, and the pages that the kernel must not have.
    pub(crate) fn settle_once(&self) -> Result<(usize, PageSet), PagerError> {
        let mut state = self.lock();
        state.prefetch = VecDeque::new();
        state.ahead_wanted = false;
        self.drain_for_others(&mut state);
        if let Some(failure) = self.failure.get() {
            return Err(PagerError::Failed(failure));
        }
        if state.vmm_gone {
            return Err(PagerError::VmmGone);
        }
        Ok((
            state.machine.waiting().0,
            state.machine.removed_and_absent(),
        ))
    }

    // One fault

    /// Serves a waiting fault that needs no storage; queues it for a worker otherwise.
    pub(crate) fn decide(&self, state: &mut State, page: u64) {
        let Some(kind) = state.machine.kind(page) else {
            return;
        };
        let need = state.machine.need(page);
        match (kind, need) {
            (FaultKind::Protected, _) => self.allow_write(state, page, need),
            (FaultKind::Unmapped, Need::Zero) => self.replace_late_copy(state, page),
            (FaultKind::Unmapped, _) => self.map(state, page, need),
            (_, Need::Nothing) => self.wake_and_finish(state, page),
            (_, Need::Zero) => self.install_zero(state, page, kind),
            (_, Need::Source) => match self.source.run_at(page).kind {
                SourceKind::Zero => self.install_zero(state, page, kind),
                SourceKind::Data => self.install_data(state, page, kind),
            },
        }
    }

    /// Copies the page if it is at hand; a worker has to read it otherwise.
    ///
    /// A page inside a window that is being filled is asked for by a thread that has caught up
    /// with the filling. It gets the next piece at once: with a single page it would be back
    /// before the piece is there.
    fn install_data(&self, state: &mut State, page: u64, kind: FaultKind) {
        let claimed = state.backlog.claim(page);
        let run = match claimed {
            Some(rest) if self.protects(kind) => self.data_from(state, page, rest),
            _ => PageRun::new(page, 1),
        };
        let buf = state.scratch.first(self.sizes.bytes(run.pages));
        let filled = self.source.at_hand(run, buf).map(|content| {
            let protect = self.protects(kind);
            self.kernel.copy(page, content, protect)
        });
        let window = claimed.unwrap_or_else(|| state.around.window(page, self.region(page), false));
        match filled {
            None | Some(Ok(Filled::Missing)) => {
                state.machine.enqueue(page, window);
                self.work.notify_one();
            }
            Some(filled) => {
                let done_pages = match &filled {
                    Ok(Filled::Bytes(bytes)) => bytes / self.sizes.page_bytes,
                    _ => 1,
                };
                if !self.fault_filled(state, page, kind, filled, SourceKind::Data) {
                    return;
                }
                let more = PageRun::new(page + 1, done_pages.saturating_sub(1));
                self.count(state, more, SourceKind::Data, Reason::Neighbour);
                match claimed {
                    None => state.backlog.push(window),
                    Some(rest) => {
                        let pages = rest.pages.saturating_sub(done_pages);
                        state
                            .backlog
                            .push_next(PageRun::new(rest.end_page() - pages, pages));
                    }
                }
            }
        }
    }

    /// The absent data pages from `page` on, at most one piece.
    fn data_from(&self, state: &State, page: u64, window: PageRun) -> PageRun {
        let data_pages = self.source.run_at(page).pages;
        let most = window.pages.min(data_pages).min(piece_pages(window));
        let absent = (page..page + most)
            .take_while(|page| state.machine.need(*page) == Need::Source)
            .count() as u64;
        PageRun::new(page, absent.max(1))
    }

    /// A discarded page is in the memory's file: a copy that came late. See the module.
    fn replace_late_copy(&self, state: &mut State, page: u64) {
        if let Err(error) = self.kernel.drop_late_copies(PageRun::new(page, 1)) {
            state.machine.lose(page);
            return self.fail_kernel("drop a late copy", page, error);
        }
        self.install_zero(state, page, FaultKind::Read);
    }

    /// The page is in the memory's file, and not mapped: the kernel has unmapped it, or the VMM
    /// wrote it past its mapping.
    fn map(&self, state: &mut State, page: u64, need: Need) {
        let written = need != Need::Nothing || state.machine.is_written(page);
        match self.kernel.map(page, written) {
            Ok(Filled::Bytes(_)) => {
                state.machine.found(page, Reason::Fault);
                if written {
                    state.machine.written(page);
                }
                self.finish(state, page);
            }
            Ok(Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Missing) => {
                // Punched meanwhile: the thread faults again, on a missing page.
                state.machine.missing(page);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Again) => self.put_off(state, page),
            Ok(Filled::Gone) => self.vmm_gone(state),
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("map the page", page, error);
            }
        }
    }

    /// A write to a protected page.
    fn allow_write(&self, state: &mut State, page: u64, need: Need) {
        if need == Need::Zero {
            // Discarded since: the thread must fault again, on the missing page.
            self.wake_and_finish(state, page);
            return;
        }
        match self.kernel.unprotect(page) {
            Ok(Filled::Bytes(_) | Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                state.machine.written(page);
                state.counters.stats.write_faults += 1;
                self.finish(state, page);
            }
            Ok(Filled::Missing) => {
                state.machine.missing(page);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Again) => self.put_off(state, page),
            Ok(Filled::Gone) => self.vmm_gone(state),
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("let a write through", page, error);
            }
        }
    }

    fn install_zero(&self, state: &mut State, page: u64, kind: FaultKind) {
        // Zeros are not pressed on a guest that gives memory back, nor where they take memory.
        let removed = state.machine.need(page) == Need::Zero;
        let shy = removed || self.kernel.zeros_take_memory();
        // What a guest takes back it writes to: a shared zero page would be broken up at once.
        let own = removed || kind == FaultKind::Write;
        let run = PageRun::new(page, 1);
        let open = !own && self.zeros_count_as_written();
        let filled = self.kernel.zero(run, self.protects(kind) && !open, own);
        let installed = matches!(filled, Ok(Filled::Bytes(_)));
        if self.fault_filled(state, page, kind, filled, SourceKind::Zero) {
            if open && installed {
                state.machine.written(page);
            }
            match state.backlog.claim(page) {
                Some(rest) => state.backlog.push_next(rest),
                None => {
                    let window = state.around.window(page, self.region(page), shy);
                    let zeros = self.zeros_around(state, page, window);
                    state.backlog.push(zeros);
                }
            }
        }
    }

    /// The part of a window around a page that needs no content: zeros cost next to nothing, and
    /// who asks for one has not asked for what lies behind them.
    fn zeros_around(&self, state: &State, page: u64, window: PageRun) -> PageRun {
        let free = |page: &u64| {
            state.machine.need(*page) != Need::Source
                || self.source.run_at(*page).kind == SourceKind::Zero
        };
        let before = (window.first_page..page).rev().take_while(free).count() as u64;
        let after = (page..window.end_page()).take_while(free).count() as u64;
        PageRun::new(page - before, before + after)
    }

    /// The region that holds a page.
    pub(crate) fn region(&self, page: u64) -> PageRun {
        let region = self.kernel.region_around(page);
        region.unwrap_or(PageRun::new(page, 1))
    }

    /// Whether a page installed for this fault is write-protected. Where each write is a fault, a
    /// page that is about to be written need not be protected first.
    fn protects(&self, kind: FaultKind) -> bool {
        !(self.tracking == WriteTracking::Sync && kind == FaultKind::Write)
    }

    /// Whether zero pages are left open to writes, and held for written. Where each write to a protected
    /// page is a round trip to us, a guest that takes fresh memory into use would pay one for every page
    /// of it. Those that still are the kernel's zero page in the end are told from the others then, and
    /// on kernels that cannot tell whoever captures reads zeros.
    pub(crate) fn zeros_count_as_written(&self) -> bool {
        self.tracking == WriteTracking::Sync && !self.kernel.zeros_take_memory()
    }

    /// The faulting page's own installation has ended so. Returns whether the page is there.
    fn fault_filled(
        &self,
        state: &mut State,
        page: u64,
        kind: FaultKind,
        filled: std::io::Result<Filled>,
        content: SourceKind,
    ) -> bool {
        match filled {
            Ok(Filled::Bytes(_)) => {
                self.count(state, PageRun::new(page, 1), content, Reason::Fault);
                if !self.protects(kind) {
                    state.machine.written(page);
                }
                self.finish(state, page);
                true
            }
            Ok(Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                self.wake_and_finish(state, page);
                true
            }
            Ok(Filled::Again) => {
                self.put_off(state, page);
                false
            }
            Ok(Filled::Gone) => {
                self.vmm_gone(state);
                false
            }
            Ok(Filled::Missing) => {
                let error = std::io::Error::from_raw_os_error(libc::EFAULT);
                state.machine.lose(page);
                self.fail_kernel("install the page", page, error);
                false
            }
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("install the page", page, error);
                false
            }
        }
    }

    fn put_off(&self, state: &mut State, page: u64) {
        state.counters.stats.eagain += 1;
        state.machine.set_aside(page);
    }

    pub(crate) fn vmm_gone(&self, state: &mut State) {
        if !state.vmm_gone {
            tracing::debug!("the VMM's address space has gone");
        }
        state.vmm_gone = true;
        self.rest.notify_all();
        self.work.notify_all();
    }

    fn wake_and_finish(&self, state: &mut State, page: u64) {
        if let Err(error) = self.kernel.wake(page) {
            self.fail_kernel("wake a thread", page, error);
        }
        self.finish(state, page);
    }

    fn finish(&self, state: &mut State, page: u64) {
        if let Some(since) = state.machine.finish(page) {
            state.counters.fault_answered(since.elapsed());
        }
        if state.settlers > 0 && state.machine.waiting().0 == 0 {
            self.rest.notify_all();
        }
    }

    pub(crate) fn count(
        &self,
        state: &mut State,
        run: PageRun,
        content: SourceKind,
        reason: Reason,
    ) {
        for page in run.first_page..run.end_page() {
            state.machine.installed(page, reason);
        }
        state.counters.last_install = Some(Instant::now());
        let stats = &mut state.counters.stats;
        match content {
            SourceKind::Zero => stats.pages_zeroed += run.pages,
            SourceKind::Data => stats.pages_copied += run.pages,
        }
        match reason {
            Reason::Fault => {}
            Reason::Neighbour => stats.pages_around += run.pages,
            Reason::Prefetch => stats.pages_prefetched += run.pages,
        }
    }

    /// Serves a fault whose content must be fetched: the page first, then its neighbours.
    pub(crate) fn serve(&self, page: u64, buf: &mut Vec<u8>) {
        let window = self.lock().machine.window(page);
        let span = self.data_span(page, window);
        let at_once = self.own_block(page, span);
        if let Err(failure) = self.read(at_once, buf) {
            self.lock().machine.lose(page);
            if let Some(failure) = failure {
                self.fail(failure);
            }
            return;
        }
        let there = self.install_read(page, self.sizes.slice(at_once, page, 1, buf));
        // The reader may sleep, all discards read: it is to try again what one of them has put off.
        if self.lock().machine.has_aside() {
            self.kernel.nudge();
        }
        if !there {
            return;
        }
        if at_once.pages > 1 {
            self.fill(at_once, buf, Reason::Neighbour);
        }
        // A kindness: that it cannot be read is for the fault to say that needs it.
        if at_once != span
            && let Some(rest) = self.absent_part(span)
            && self.read(rest, buf).is_ok()
        {
            self.fill(rest, buf, Reason::Neighbour);
        }
    }

    /// What is read along with a page because it costs no more: the pages of its frame, if any.
    fn own_block(&self, page: u64, span: PageRun) -> PageRun {
        let block_pages = self.source.block_pages().max(1);
        PageRun::new(page - page % block_pages, block_pages)
            .clipped_to(span)
            .unwrap_or(PageRun::new(page, 1))
    }

    /// Installs a faulting page whose content has been read. Returns whether it is there.
    fn install_read(&self, page: u64, content: &[u8]) -> bool {
        let mut state = self.lock();
        // It may have been discarded, or brought in, while its content was fetched.
        match (state.machine.need(page), state.machine.kind(page)) {
            (Need::Source, Some(kind)) => {
                let content = Content::Bytes(content);
                let filled = self.kernel.copy(page, content, self.protects(kind));
                self.fault_filled(&mut state, page, kind, filled, SourceKind::Data)
            }
            _ => {
                self.decide(&mut state, page);
                true
            }
        }
    }

    /// Tries again what the kernel put off.
    pub(crate) fn retry(&self, state: &mut State) {
        self.drain(state);
        for page in state.machine.take_aside() {
            self.decide(state, page);
        }
    }

    /// Names faults that wait too long.
    pub(crate) fn watch(&self, state: &mut State) {
        for overdue in state.machine.overdue(Instant::now(), FAULT_AGE_MAX) {
            state.counters.stats.slow_faults += 1;
            tracing::warn!(
                page = overdue.page,
                age_ms = overdue.age.as_millis(),
                stage = overdue.stage,
                "a page fault has waited for over a second"
            );
        }
    }
}
