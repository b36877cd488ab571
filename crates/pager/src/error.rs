//! What can go wrong, in the words of who has to act on it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// An operation of the pager's owner that could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The kernel refused a step of setting userfaultfd up.
    #[error("userfaultfd: cannot {step}: {source}; {next_step}")]
    Setup {
        /// What was attempted.
        step: &'static str,
        /// What the operator can do about it.
        next_step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The host kernel lacks something that this way of tracking writes needs.
    #[error(
        "this host's userfaultfd lacks {missing}, needed for {tracking:?} write tracking; {next_step}"
    )]
    Unsupported {
        /// The tracking that was asked for.
        tracking: crate::WriteTracking,
        /// The feature's kernel name.
        missing: &'static str,
        /// What the operator can do about it.
        next_step: &'static str,
    },
    /// A region that the pager cannot serve.
    #[error(
        "region at {host_addr:#x}, {len_bytes} bytes, guest offset {guest_offset_bytes}: {why}"
    )]
    Region {
        /// The region's address in the VMM.
        host_addr: u64,
        /// Its length.
        len_bytes: u64,
        /// Its place in the guest's memory.
        guest_offset_bytes: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The configuration contradicts itself.
    #[error("pager configuration: {0}")]
    Config(&'static str),
    /// A pagemap, memfd or thread operation failed.
    #[error("cannot {step}: {source}")]
    Host {
        /// What was attempted.
        step: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The pager did not come to rest in time.
    #[error(
        "the pager did not settle within {waited:?}: {faults} page faults unanswered, \
         {discarding_pages} pages still being discarded; the guest can go on, pause it again"
    )]
    SettleTimeout {
        /// How long it was given.
        waited: Duration,
        /// Page faults that are still being served.
        faults: usize,
        /// Pages whose discard the kernel has announced and not finished.
        discarding_pages: u64,
    },
    /// The pager has given up on this guest.
    #[error("the pager has given up on this guest: {0}")]
    Failed(#[source] PagerFailure),
    /// The guest's process has gone.
    #[error("the VMM's process has gone")]
    VmmGone,
    /// Writes are not tracked, so there is no dirty set.
    #[error("this pager was started without write tracking and knows no dirty pages")]
    NotTracked,
    /// A thread did not end; it is stuck in the page source.
    #[error("{threads} pager threads did not end within {waited:?}: the page source hangs")]
    ShutdownTimeout {
        /// Threads that are still running.
        threads: usize,
        /// How long they were given.
        waited: Duration,
    },
}

/// Why the pager had to give up: a guest page cannot be delivered. Its owner kills the VMM.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerFailure {
    /// The source could not deliver a page that the guest waits for.
    #[error("guest page {page} could not be read in {attempts} attempts: {source}")]
    Source {
        /// The guest page.
        page: u64,
        /// Attempts that were made.
        attempts: u32,
        /// The last attempt's error.
        source: Arc<io::Error>,
    },
    /// The kernel refused an operation that must not fail.
    #[error("the kernel refused to {operation} at guest page {page}: {source}")]
    Kernel {
        /// What was attempted.
        operation: &'static str,
        /// The guest page.
        page: u64,
        /// The kernel's answer.
        source: Arc<io::Error>,
    },
    /// The userfaultfd could not be read any more.
    #[error("userfaultfd events could not be read: {source}")]
    Events {
        /// The kernel's answer.
        source: Arc<io::Error>,
    },
    /// The VMM faulted outside its registered regions.
    #[error("page fault at {host_addr:#x}, which lies in no region that the pager serves")]
    UnknownAddress {
        /// The faulting address in the VMM.
        host_addr: u64,
    },
    /// The VMM has forked, or moved or unmapped its guest's memory.
    #[error(
        "the VMM's userfaultfd told of event {event:#x}, which the pager cannot follow; it must be \
         negotiated with UFFD_FEATURE_EVENT_REMOVE alone"
    )]
    UnaskedEvent {
        /// The event's number in `linux/userfaultfd.h`.
        event: u8,
    },
    /// More threads wait for pages than any VMM has.
    #[error("more than {limit} page faults wait at once; the VMM has too many threads")]
    TooManyFaults {
        /// The limit.
        limit: usize,
    },
    /// A pager thread panicked: a bug in the pager or in the page source.
    #[error("the pager's {thread} thread panicked")]
    Panicked {
        /// Which one.
        thread: &'static str,
    },
}
