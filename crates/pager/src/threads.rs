//! The pager's threads: each a loop that waits, and one call of the service.
//!
//! An idle pager has two threads, both asleep without a timeout. The prefetcher exists only while
//! there is something to prefetch.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::PagerFailure;
use crate::service::{AGAIN_PAUSE, Service, State};

/// How often the reader looks for overdue faults while any fault waits.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// A thread's stack: the reader holds one batch of events, 2 KiB; a source may need more.
const STACK_BYTES: usize = 256 * 1024;

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

/// Waits for events and takes them in. Never waits for a worker or for storage.
pub(crate) fn reader(service: &Service, uffd: &OwnedFd) {
    let mut faults_wait = false;
    loop {
        let timeout = if faults_wait {
            Timespec::try_from(WATCH_PERIOD).ok()
        } else {
            None
        };
        let mut fds = [
            PollFd::new(uffd, PollFlags::IN),
            PollFd::new(&service.nudge, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return give_up(service, error.into()),
        }
        let [uffd_says, nudge_says] = fds.map(|fd| fd.revents());
        if uffd_says.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return give_up(
                service,
                io::Error::other("the descriptor is no longer usable"),
            );
        }
        if nudge_says.contains(PollFlags::IN) {
            let mut count = [0; 8];
            if let Err(error) = rustix::io::read(&service.nudge, &mut count) {
                tracing::debug!(%error, "the nudge was taken already");
            }
        }
        let mut state = service.lock();
        if state.stopping {
            return;
        }
        service.drain(&mut state);
        service.watch(&mut state);
        faults_wait = state.machine.waiting().0 > 0;
    }
}

fn give_up(service: &Service, error: io::Error) {
    service.failure.raise(PagerFailure::Events {
        source: Arc::new(error),
    });
    service.rest.notify_all();
}

/// Serves faults that need storage, and tries again what the kernel put off.
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
            continue;
        }
        state = wait_for_work(service, state);
    }
}

fn wait_for_work<'a>(
    service: &'a Service,
    state: std::sync::MutexGuard<'a, State>,
) -> std::sync::MutexGuard<'a, State> {
    if !state.machine.has_aside() || state.vmm_gone {
        return service
            .work
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
    let waited = service.work.wait_timeout(state, AGAIN_PAUSE);
    let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
    service.retry(&mut state);
    state
}

/// Brings in what is queued for prefetching, then ends.
pub(crate) fn prefetcher(service: &Service) {
    let mut buf = Vec::new();
    while service.prefetch_some(&mut buf) {}
}
