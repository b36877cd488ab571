//! How events and faults are served: the machine, the kernel and the source put together.
//!
//! One lock, around the page states **and** around every kernel call that reads events or
//! installs pages. The two belong together: a discard is under way from the moment its event has
//! been read, so between "what must this page hold?" and the copy no event may be read. The lock
//! is never held while the source is read, and nothing that it covers waits for the VMM: copies
//! need only the address space's lock, which a thread that sleeps in a discard has let go.
//!
//! ```text
//!   reader ──read events──▶ machine ──zero, wake, unprotect──▶ kernel      (at once)
//!                              │ queue
//!   worker ◀──fault────────────┘ ──read source──▶ look again ──copy──▶ kernel
//!   prefetcher ──read source──▶ look again ──copy what is still absent──▶ kernel
//! ```
//!
//! Any of them may read events (it holds the lock); the reader is the one that waits for them.
//! A copy never carries on after EAGAIN: the fault is set aside, and a worker tries again after a
//! moment, events first.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::bulk::slice;
use crate::error::PagerFailure;
use crate::failure::FailureSignal;
use crate::kernel::{Event, Kernel};
use crate::machine::{FaultKind, Machine, Need, Reason};
use crate::page_set::PageRun;
use crate::source::{PageSource, SourceKind};
use crate::stats::Counters;
use crate::uffd::{Filled, WriteTracking};

/// Reads of events before faults are served even if more events are queued: 64 reads of 64. An
/// unread discard makes copies say EAGAIN, so stopping early is safe; never stopping would let a
/// guest that discards in a loop starve its own faults.
const READS_PER_DRAIN: u32 = 64;

/// How long a worker waits before it tries again what the kernel put off. A discarding thread
/// needs to be scheduled once in between: tens of microseconds.
pub(crate) const AGAIN_PAUSE: Duration = Duration::from_micros(200);

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
    pub(crate) vmm_gone: bool,
    pub(crate) stopping: bool,
    events: Vec<Event>,
}

/// What all threads of one pager share.
pub(crate) struct Service {
    pub(crate) kernel: Box<dyn Kernel>,
    pub(crate) source: Arc<dyn PageSource>,
    pub(crate) tracking: WriteTracking,
    pub(crate) fault_around_pages: u64,
    pub(crate) failure: FailureSignal,
    /// Wakes the reader out of its wait: to stop, or to watch a fault that another thread took in.
    pub(crate) nudge: OwnedFd,
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
        parts: (Machine, Counters, FailureSignal, OwnedFd),
    ) -> Self {
        let (machine, counters, failure, nudge) = parts;
        let state = State {
            machine,
            counters,
            prefetch: VecDeque::new(),
            prefetcher_runs: false,
            vmm_gone: false,
            stopping: false,
            events: Vec::new(),
        };
        Self {
            kernel,
            source,
            tracking,
            fault_around_pages,
            failure,
            nudge,
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
            std::thread::yield_now();
        }
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps, but not past a stop. Returns whether the pager goes on.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let guard = self.lock();
        let waited = self
            .stop
            .wait_timeout_while(guard, time, |state| !state.stopping);
        let (guard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !guard.stopping
    }

    pub(crate) fn nudge_reader(&self) {
        if let Err(error) = rustix::io::write(&self.nudge, &1_u64.to_ne_bytes()) {
            tracing::debug!(%error, "the reader was nudged already");
        }
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
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    self.fail(PagerFailure::Events {
                        source: Arc::new(error),
                    });
                    break;
                }
            }
            let now = Instant::now();
            for event in events.drain(..) {
                self.take_in(state, event, now);
            }
        }
        state.events = events;
        for page in state.machine.take_fresh() {
            self.decide(state, page);
        }
    }

    fn take_in(&self, state: &mut State, event: Event, now: Instant) {
        match event {
            Event::Fault {
                page,
                write,
                protected,
            } => {
                let kind = match (protected, write) {
                    (true, _) => FaultKind::Protected,
                    (false, true) => FaultKind::Write,
                    (false, false) => FaultKind::Read,
                };
                if state.machine.fault(page, kind, now).is_err() {
                    let limit = crate::machine::FAULTS_MAX;
                    self.fail(PagerFailure::TooManyFaults { limit });
                }
            }
            Event::Remove {
                start_byte,
                end_byte,
            } => {
                let run = state.machine.remove(start_byte, end_byte);
                state.counters.stats.removes += 1;
                state.counters.stats.pages_removed += run.pages;
                if run.pages > 0
                    && let Err(error) = self.kernel.drop_late_copies(run)
                {
                    self.fail_kernel("drop late copies", run.first_page, error);
                }
            }
            Event::Stray { host_addr } => self.fail(PagerFailure::UnknownAddress { host_addr }),
        }
    }

    // One fault

    /// Serves a waiting fault that needs no storage; queues it for a worker otherwise.
    pub(crate) fn decide(&self, state: &mut State, page: u64) {
        let Some(kind) = state.machine.kind(page) else {
            return;
        };
        let need = state.machine.need(page);
        if kind == FaultKind::Protected {
            self.allow_write(state, page, need);
            return;
        }
        match need {
            Need::Nothing => self.wake_and_finish(state, page),
            Need::Zero => self.install_zero(state, page, kind),
            Need::Source => match self.source.run_at(page).kind {
                SourceKind::Zero => self.install_zero(state, page, kind),
                SourceKind::Data => {
                    state.machine.enqueue(page);
                    self.work.notify_one();
                }
            },
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
            Ok(Filled::Again) => self.put_off(state, page),
            Ok(Filled::Gone) => self.vmm_gone(state),
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("let a write through", page, error);
            }
        }
    }

    fn install_zero(&self, state: &mut State, page: u64, kind: FaultKind) {
        let filled = self.kernel.zero(PageRun::new(page, 1), self.protects(kind));
        if self.fault_filled(state, page, kind, filled, SourceKind::Zero) {
            let window = self.window(page);
            self.fill_zeros(state, window, Reason::Neighbour);
        }
    }

    /// Whether a page installed for this fault is write-protected. Where each write is a fault, a
    /// page that is about to be written need not be protected first.
    fn protects(&self, kind: FaultKind) -> bool {
        !(self.tracking == WriteTracking::Sync && kind == FaultKind::Write)
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
        self.work.notify_one();
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
        if state.machine.waiting().0 == 0 {
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
        let span = self.data_span(page);
        let at_once = if self.source.block_pages() > 1 {
            span
        } else {
            PageRun::new(page, 1)
        };
        if let Err(failure) = self.read(at_once, buf) {
            self.lock().machine.lose(page);
            if let Some(failure) = failure {
                self.fail(failure);
            }
            return;
        }
        {
            let mut state = self.lock();
            // The page may have been discarded, or brought in, while its content was fetched.
            match (state.machine.need(page), state.machine.kind(page)) {
                (Need::Source, Some(kind)) => {
                    let filled =
                        self.kernel
                            .copy(page, slice(at_once, page, 1, buf), self.protects(kind));
                    if !self.fault_filled(&mut state, page, kind, filled, SourceKind::Data) {
                        return;
                    }
                }
                _ => self.decide(&mut state, page),
            }
        }
        if at_once != span {
            let Some(rest) = self.absent_part(span) else {
                return;
            };
            if self.read(rest, buf).is_ok() {
                self.fill(rest, buf, Reason::Neighbour);
            }
        } else if span.pages > 1 {
            self.fill(span, buf, Reason::Neighbour);
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
