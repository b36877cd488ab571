//! How events are taken in: the machine, the kernel and the source put together, and the lock around
//! them. What becomes of one fault is in `fault`.
//!
//! One lock, around the page states **and** around every kernel call that reads events or
//! installs pages, and around the looks that make the dirty set: what is installed between two of
//! them would be taken for written. The first two belong together: a discard is under way from the
//! moment its event has been read, so between "what must this page hold?" and the copy no event may
//! be read. The lock is never held while the source is read, and nothing that it covers waits for the VMM: copies
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
use crate::bulk::{Backlog, SOURCE_PAUSE, Scratch, Sizes};
use crate::error::{PagerError, PagerFailure};
use crate::failure::FailureSignal;
use crate::kernel::{Event, Kernel};
use crate::machine::Machine;
use crate::page_set::{PageRun, PageSet};
use crate::source::PageSource;
use crate::stats::Counters;
use crate::sync::{AtomicUsize, Condvar, Mutex, MutexGuard, yield_now};
use crate::tracking::WriteTracking;

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
    pub(crate) around: Around,
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
    /// Before the second attempt at a read of the source.
    pub(crate) source_pause: Duration,
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
            source_pause: SOURCE_PAUSE,
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

    pub(crate) fn vmm_gone(&self, state: &mut State) {
        if !state.vmm_gone {
            tracing::debug!("the VMM's address space has gone");
        }
        state.vmm_gone = true;
        self.rest.notify_all();
        self.work.notify_all();
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
            Event::Unasked { event } => self.fail(PagerFailure::UnaskedEvent { event }),
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
