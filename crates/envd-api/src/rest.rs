//! JSON bodies of envd's plain HTTP routes.
//!
//! | route | body | answer |
//! |---|---|---|
//! | `GET /health` | | 204 |
//! | `POST /init` | [`InitRequest`] | 200 [`InitResponse`] |
//! | `GET /metrics` | | 200 [`Metrics`] |
//! | `POST /freeze`, `POST /unfreeze` | | 200 [`FreezeResponse`] |
//!
//! Anything that fails is answered with a status of 400 or more and an [`ErrorBody`].

use serde::{Deserialize, Serialize};

/// Path of the liveness probe.
pub const HEALTH_PATH: &str = "/health";
/// Path of the call that makes a booted or resumed guest usable.
pub const INIT_PATH: &str = "/init";
/// Path of the guest's figures.
pub const METRICS_PATH: &str = "/metrics";
/// Path that stops the user's processes.
pub const FREEZE_PATH: &str = "/freeze";
/// Path that lets the user's processes go on.
pub const UNFREEZE_PATH: &str = "/unfreeze";

/// Most entropy that one [`InitRequest`] may carry, bytes. The kernel's pool holds 32; a page is
/// more than anyone can use.
pub const ENTROPY_BYTES_MAX: usize = 4096;

/// Largest body of a plain route, in either direction, bytes: an [`InitRequest`] with all its
/// entropy spelled out as JSON numbers is a quarter of this.
pub const BODY_BYTES_MAX: usize = 64 * 1024;

/// What the host tells a guest that has just booted or resumed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRequest {
    /// The host's wall clock now, nanoseconds since 1970.
    pub unix_time_ns: u64,
    /// Fresh random bytes for the guest's kernel, at most [`ENTROPY_BYTES_MAX`]. Two guests
    /// resumed from one build must get different ones.
    pub entropy: Vec<u8>,
}

/// A guest that is ready: its clock is right, its random numbers are its own, its user's processes
/// run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InitResponse {
    /// Version of envd.
    pub envd_version: String,
    /// `uname -r` of the guest.
    pub kernel_release: String,
    /// The kernel's id of this boot: stays the same over pauses.
    pub boot_id: String,
    /// `/sys/kernel/vmcoreinfo`: physical address and size of the kernel's own description of its
    /// memory layout, in hex. Absent where the kernel has none.
    pub vmcoreinfo: Option<String>,
    /// How far the wall clock was set forward (or, negative, back), milliseconds.
    pub clock_step_ms: i64,
    /// Whether envd owns its machine and so set clock and random numbers. False only where envd
    /// runs on a developer's host, whose clock is not ours to set.
    pub machine_set: bool,
    /// Whether there was a user cgroup to thaw.
    pub thawed: bool,
}

/// The guest's figures. Bytes unless named otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// The guest's wall clock, seconds since 1970.
    pub ts: u64,
    /// Processors that are online.
    pub cpu_count: u32,
    /// Share of all processors that was busy since the previous call, 0 to 100. 0 at the first.
    pub cpu_used_pct: f32,
    /// MemTotal.
    pub mem_total: u64,
    /// MemFree.
    pub mem_free: u64,
    /// MemAvailable.
    pub mem_available: u64,
    /// Cached.
    pub mem_cached: u64,
    /// MemTotal − MemAvailable.
    pub mem_used: u64,
    /// Size of the root file system.
    pub disk_total: u64,
    /// Bytes in use on it.
    pub disk_used: u64,
    /// The kernel's id of this boot, as [`InitResponse::boot_id`].
    pub boot_id: String,
}

/// Answer of `/freeze` and `/unfreeze`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeResponse {
    /// What the kernel says of the user's cgroup now.
    pub frozen: bool,
    /// How long it took, milliseconds.
    pub ms: u64,
}

/// Body of every answer that is an error.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// HTTP status, repeated.
    pub code: u16,
    /// What failed and what to do.
    pub message: String,
}
