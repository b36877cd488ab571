//! The pager's last word: it cannot deliver a page, so the guest must not go on.
//!
//! Raised once, never taken back. Whoever owns the VMM waits for it, by a blocking call or by
//! watching the descriptor in an event loop, and kills the VMM.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::error::PagerFailure;

/// A handle on the failure signal. Clones see the same failure.
#[derive(Clone, Debug)]
pub struct FailureSignal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    failure: OnceLock<PagerFailure>,
    event: OwnedFd,
}

impl FailureSignal {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = rustix::event::eventfd(0, flags)?;
        Ok(Self {
            inner: Arc::new(Inner {
                failure: OnceLock::new(),
                event,
            }),
        })
    }

    /// The first failure stands.
    pub(crate) fn raise(&self, failure: PagerFailure) {
        let text = failure.to_string();
        if self.inner.failure.set(failure).is_ok() {
            tracing::error!(failure = text, "the pager gives up on this guest");
            if let Err(error) = rustix::io::write(&self.inner.event, &1_u64.to_ne_bytes()) {
                tracing::error!(%error, "the failure signal could not be written");
            }
        }
    }

    /// The failure, once there is one.
    #[must_use]
    pub fn get(&self) -> Option<PagerFailure> {
        self.inner.failure.get().cloned()
    }

    /// Waits for a failure, at most this long.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<PagerFailure> {
        let deadline = std::time::Instant::now() + timeout;
        while self.get().is_none() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(&self.inner.event, PollFlags::IN)];
            let timeout = Timespec::try_from(left).ok();
            if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref())
                && error != rustix::io::Errno::INTR
            {
                tracing::error!(%error, "the failure signal could not be waited for");
                break;
            }
        }
        self.get()
    }
}

/// Readable (and staying so) once there is a failure; for an event loop. Never read from it.
impl AsFd for FailureSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.event.as_fd()
    }
}
