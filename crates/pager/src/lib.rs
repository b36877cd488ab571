//! The pager: gives a resumed guest its memory page by page, through userfaultfd.
//!
//! A VMM is started with empty memory; whenever it touches a page that is not there, the kernel
//! tells us, and we put the page there: from a [`PageSource`] (a build), or zero when the guest
//! has given the page back since the resume. The pager also knows, at the next pause, which pages
//! the guest wrote and which it gave back, and which ones the next resume should bring in ahead.
//!
//! - `machine`: the page states and waiting faults, pure
//! - `service`: the one lock, and why; how events are taken in
//! - `fault`: what becomes of one fault
//! - `bulk`: many pages at once: neighbours, prefetch
//! - `ahead`: what is read before there is a memory
//! - `working_set`: which pages the next resume should bring in, pure
//! - `around`: how much is filled around a fault, pure
//! - `file_source`: a raw memory file as a source
//! - `huge_source`: any source, in 2 MiB pages
//! - `threads`: reader, worker, prefetcher
//! - `pager`: what the owner calls
//! - [`handshake`], [`server`], `peer`: a page-fault handler of its own, for any VMM that speaks
//!   Firecracker's handshake
//! - `fuzz`: what comes from outside, as bytes, for the fuzz targets
//! - `region`, `tracking`: a piece of guest memory; how its writes are found out
//! - `kernel`, `uffd`, `uffd_abi`, `pagemap`: the kernel's side; unsafe code is in the last two, in
//!   `file_source` and in `peer`
//!
//! Beyond that handshake it knows neither VMMs nor builds. It does not create the VMM's
//! userfaultfd, kill a VMM that it cannot serve (it says so, see [`FailureSignal`]; only the
//! server does), or read or write a build. It never makes up content: a page that cannot be read is
//! a failure.

mod ahead;
mod around;
mod bulk;
mod error;
mod failure;
mod fault;
mod file_source;
#[cfg(any(test, feature = "fuzz"))]
#[cfg(not(feature = "shuttle"))]
pub mod fuzz;
pub mod handshake;
mod huge_source;
#[cfg(test)]
#[cfg(feature = "shuttle")]
mod interleavings;
mod kernel;
mod machine;
#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod model;
mod page_set;
mod pagemap;
mod pager;
mod peer;
#[cfg(test)]
#[cfg(not(feature = "shuttle"))]
mod races;
mod region;
pub mod server;
mod service;
mod source;
mod stats;
mod sync;
mod threads;
mod tracking;
mod uffd;
mod uffd_abi;
mod working_set;

pub use ahead::ReadAhead;
pub use bulk::{FILL_PAGES_MAX, READ_PAGES_MAX};
pub use error::{PagerError, PagerFailure};
pub use failure::FailureSignal;
pub use file_source::FileSource;
pub use kernel::Backing;
pub use machine::DirtyPages;
pub use page_set::{PAGE_SIZE, PageRun, PageSet};
pub use pager::{Pager, PagerConfig};
pub use peer::Peer;
pub use region::Region;
pub use source::{Content, Mapped, PageSource, SourceKind, SourceRun};
pub use stats::{Latencies, PagerStats};
pub use tracking::WriteTracking;
pub use uffd::Uffd;
pub use working_set::{WORKING_SET_PAGES_MAX, WORKING_SET_RUNS_MAX};
