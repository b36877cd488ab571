//! What the demo's workload and its driver on the host say to each other: one JSON line each.
//!
//! The program `torpor-workload` runs **in the guest** (a static binary, no library of the guest's
//! is needed). It does what a sandboxed agent leaves behind: a warm page cache, memory that was
//! used and freed, and some state that it still needs. Then it waits for commands on its standard
//! input and answers each with one line on its standard output.
//!
//! It deliberately knows nothing of torpor: it is a user's process like any other.

use serde::{Deserialize, Serialize};

/// How much the workload does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadSize {
    /// MiB of files that it reads into the page cache.
    pub cache_mib: u64,
    /// MiB that it allocates, fills with random bytes and frees.
    pub freed_mib: u64,
    /// MiB of random bytes that it keeps, with their checksum.
    pub kept_mib: u64,
}

/// The demo's workload on a 512 MiB guest.
pub const DEMO_SIZE: WorkloadSize = WorkloadSize {
    cache_mib: 100,
    freed_mib: 256,
    kept_mib: 32,
};

/// The command that asks for a [`Check`], as a line on standard input.
pub const CHECK_COMMAND: &str = "check";

/// The first line that the workload prints: everything is in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Bytes of files that were read into the page cache.
    pub cache_bytes: u64,
    /// Bytes that were filled and freed.
    pub freed_bytes: u64,
    /// Bytes that are kept.
    pub kept_bytes: u64,
    /// Time that all of it took, in milliseconds of the guest's clock.
    pub elapsed_ms: u64,
}

/// What the workload finds when it looks at its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The kept memory has its checksum.
    pub memory_intact: bool,
    /// The file on disk has its checksum.
    pub disk_file_intact: bool,
    /// The file in /dev/shm has its checksum.
    pub shm_file_intact: bool,
    /// The other process's counter.
    pub counter: u64,
    /// The guest's CLOCK_REALTIME, in milliseconds since the epoch.
    pub realtime_ms: u64,
    /// Sixteen bytes of the kernel's random generator, in hex: two clones must not agree.
    pub random: String,
}

/// The command that makes the churn take memory at once and keep it, as a line on standard input; it
/// answers with [`Churned`]. From then on each [`CHECK_COMMAND`] verifies that memory.
pub const KEEP_COMMAND: &str = "keep";

/// What churning has done and found so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Churned {
    /// Pieces of memory that were verified.
    pub pieces: u64,
    /// Files that were verified.
    pub files: u64,
    /// Processes that ran.
    pub forks: u64,
    /// Bytes that were taken by [`KEEP_COMMAND`] and verified for this answer.
    pub kept_bytes: u64,
    /// What was not as it should be.
    pub damaged: u64,
}

/// The guest's pages are being looked at, over and over, until a line comes on standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watching {
    /// Page frame numbers that the kernel tells of.
    pub pages: u64,
}

/// What the guest's kernel itself said of its pages in all the looks. A page in neither list was in
/// use in each of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreePages {
    /// Free in every look: runs of page frame numbers, sorted, the first and how many.
    pub free: Vec<(u64, u64)>,
    /// Free in some looks and not in others: runs, likewise.
    pub changed: Vec<(u64, u64)>,
    /// How often it looked.
    pub looks: u64,
    /// `MemFree` of `/proc/meminfo` after the first look, in KiB.
    pub mem_free_kib: u64,
}
