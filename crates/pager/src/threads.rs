//! The pager's threads: each a loop that waits, and one call of the service.
//!
//! An idle pager has two threads, both asleep without a timeout. The prefetcher exists only while
//! there is something to prefetch.

use std::io;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ahead::ReadAhead;
use crate::bulk::FILL_PAGES_MAX;
use crate::error::PagerFailure;
use crate::kernel::Waited;
use crate::service::{AGAIN_PAUSE, Service, State};
use crate::sync::yield_now;

/// How often the reader looks for overdue faults while any fault waits.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// How long the reader polls for the next event before it sleeps, while they come thick. About
/// the time that a guest thread needs from being woken to its next fault, with some room.
const POLL_MAX: Duration = Duration::from_micros(50);

/// How long what the kernel puts off is tried again without a pause, others going first each time:
/// a discarding thread is mostly through within that, and every waiting fault waits for it.
const YIELD_MAX: Duration = Duration::from_micros(300);

/// The longest pause before what the kernel puts off is tried again.
const AGAIN_PAUSE_MAX: Duration = Duration::from_millis(5);

/// A thread's stack: the reader holds one batch of events, 2 KiB; a source may decode on it.
pub(crate) const STACK_BYTES: usize = 256 * 1024;

/// Starts a thread whose panic becomes a failure of the pager.
pub(crate) fn spawn(
    service: &Arc<Service>,
    name: &'static str,
    body: impl FnOnce(&Service) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let service = Arc::clone(service);
    std::thread::Builder::new()
        .name(format!("pager-{name}"))
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _alarm = PanicAlarm {
                service: &service,
                thread: name,
            };
            body(&service);
        })
}

struct PanicAlarm<'a> {
    service: &'a Service,
    thread: &'static str,
}

impl Drop for PanicAlarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.service.failure.raise(PagerFailure::Panicked {
                thread: self.thread,
            });
            self.service.rest.notify_all();
        }
    }
}

/// Waits for events, takes them in and serves what is at hand. Never waits for a worker or for
/// storage.
pub(crate) fn reader(service: &Service) {
    let mut pace = Pace::default();
    let mut watched = Instant::now();
    loop {
        let turn = {
            let mut state = service.lock();
            if state.stopping {
                return;
            }
            turn(service, &mut state)
        };
        let waited = match turn {
            Turn::Busy { mut filled_pages } => {
                // Faults of some threads must not hide that another's waits.
                if watched.elapsed() >= WATCH_PERIOD {
                    watched = Instant::now();
                    service.watch(&mut service.lock());
                }
                // Where many threads fault, one piece for each batch of their faults would leave
                // the windows behind for good.
                while filled_pages < FILL_PAGES_MAX {
                    service.give_way();
                    match service.fill_around(&mut service.lock()) {
                        0 => break,
                        pages => filled_pages += pages,
                    }
                }
                service.give_way();
                continue;
            }
            Turn::Quiet { timeout } => pace.wait(service, timeout),
            // The discarding thread has to run once: it may stand on this processor.
            Turn::Again => {
                yield_now();
                pace.wait_again(service)
            }
        };
        if let Err(error) = waited {
            return give_up(service, error);
        }
    }
}

/// What the reader does next.
enum Turn {
    /// There is more to fill than this.
    Busy { filled_pages: u64 },
    /// The kernel put something off: to be tried again soon.
    Again,
    /// Nothing to do until an event comes, or this time has passed.
    Quiet { timeout: Option<Duration> },
}

/// Events and faults, then one piece of what nobody waits for.
fn turn(service: &Service, state: &mut State) -> Turn {
    if state.machine.has_aside() {
        service.retry(state);
    } else {
        service.drain(state);
    }
    let filled_pages = service.fill_around(state);
    if !state.backlog.is_empty() {
        return Turn::Busy { filled_pages };
    }
    service.watch(state);
    if state.machine.has_aside() && !state.vmm_gone {
        return Turn::Again;
    }
    let timeout = if state.machine.waiting().0 > 0 {
        Some(WATCH_PERIOD)
    } else {
        None
    };
    Turn::Quiet { timeout }
}

/// Decides between sleeping and polling. While faults come thick, waking up costs more than the
/// fault: then the reader polls for a moment before it sleeps.
#[derive(Debug, Default)]
struct Pace {
    /// The last wait ended soon, with an event.
    thick: bool,
    /// Since when the kernel has been putting something off.
    again_since: Option<Instant>,
}

impl Pace {
    fn wait_again(&mut self, service: &Service) -> io::Result<()> {
        let since = self.again_since.get_or_insert_with(Instant::now);
        let waited = since.elapsed();
        if waited < YIELD_MAX {
            return Ok(());
        }
        // A thread that has been stopped in the middle of its discard may take for ever.
        let pause = (waited / 4).clamp(AGAIN_PAUSE, AGAIN_PAUSE_MAX);
        service.kernel.wait(Some(pause)).map(drop)
    }

    fn wait(&mut self, service: &Service, timeout: Option<Duration>) -> io::Result<()> {
        self.again_since = None;
        let started = Instant::now();
        if self.thick {
            while started.elapsed() < POLL_MAX {
                if service.kernel.wait(Some(Duration::ZERO))? != Waited::TimedOut {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let waited = service.kernel.wait(timeout)?;
        self.thick = waited == Waited::Events && started.elapsed() < POLL_MAX;
        Ok(())
    }
}

fn give_up(service: &Service, error: io::Error) {
    service.failure.raise(PagerFailure::Events {
        source: Arc::new(error),
    });
    service.rest.notify_all();
}

/// Serves faults that need storage.
pub(crate) fn worker(service: &Service) {
    let mut buf = Vec::new();
    while let Some(page) = next_fault(service) {
        service.serve(page, &mut buf);
    }
}

/// Waits for a fault whose content must be fetched. `None`: the pager stops.
fn next_fault(service: &Service) -> Option<u64> {
    let mut state = service.lock();
    loop {
        if state.stopping {
            return None;
        }
        if let Some(page) = state.machine.dequeue() {
            if state.machine.need(page) == crate::machine::Need::Source {
                return Some(page);
            }
            // A neighbour's worker brought it in meanwhile, or it was discarded.
            service.decide(&mut state, page);
            service.nudge_if_left(&state);
            continue;
        }
        state = service
            .work
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
}

/// Brings in what has been read ahead, then what is queued for prefetching, and ends.
pub(crate) fn prefetcher(service: &Service, ahead: Option<&ReadAhead>) {
    if let Some(ahead) = ahead {
        service.install_ahead(ahead);
    }
    let mut buf = Vec::new();
    while service.prefetch_some(&mut buf) {}
}
