//! What a pause did, step by step: kept in the build's manifest, printed by the command line, drawn
//! by the demo.

use serde::{Deserialize, Serialize};
use torpor_build::LayerSummary;
use torpor_guest::ReclaimReport;
use torpor_vmm::DrainReport;

use crate::scan::ScanReport;

/// The steps of a pause, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseStep {
    /// The new build's id is claimed.
    Claim,
    /// The user's processes stand still; the guest's kernel and envd go on.
    FreezeUser,
    /// The guest gives up what it does not need.
    Reclaim,
    /// The guest's free pages come back to the host.
    Drain,
    /// The guest is asked how much of its memory is not free.
    CountFree,
    /// The vCPUs stop.
    Stop,
    /// Device state is saved.
    SaveState,
    /// The pager has seen every event of before the stop, and what saving the state did.
    Settle,
    /// The guest's free pages are found.
    Scan,
    /// What the build needs of the memory is copied.
    CaptureMemory,
    /// Memory is compared, compressed and written.
    WriteMemory,
    /// The writable disk is compared, compressed and written.
    WriteDisk,
    /// The vCPUs run again and the user's processes thaw: a checkpoint only.
    GoOn,
    /// Everything is made durable, and the build appears.
    Commit,
}

impl PauseStep {
    /// The step's name as it stands in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::FreezeUser => "freeze_user",
            Self::Reclaim => "reclaim",
            Self::Drain => "drain",
            Self::CountFree => "count_free",
            Self::Stop => "stop",
            Self::SaveState => "save_state",
            Self::Settle => "settle",
            Self::Scan => "scan",
            Self::CaptureMemory => "capture_memory",
            Self::WriteMemory => "write_memory",
            Self::WriteDisk => "write_disk",
            Self::GoOn => "go_on",
            Self::Commit => "commit",
        }
    }

    /// What it does, for a person who watches.
    #[must_use]
    pub fn doing(self) -> &'static str {
        match self {
            Self::Claim => "claim the build's id",
            Self::FreezeUser => "freeze the user's processes",
            Self::Reclaim => "reclaim in the guest",
            Self::Drain => "drain free pages",
            Self::CountFree => "count the guest's free memory",
            Self::Stop => "stop the vCPUs",
            Self::SaveState => "save device state",
            Self::Settle => "settle the pager",
            Self::Scan => "scan for free pages",
            Self::CaptureMemory => "capture memory",
            Self::WriteMemory => "write memory",
            Self::WriteDisk => "write disk",
            Self::GoOn => "let the sandbox go on",
            Self::Commit => "commit",
        }
    }
}

impl std::fmt::Display for PauseStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One step's time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Which step.
    pub step: PauseStep,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Why a best-effort step did not do its work, if it did not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub skipped: Option<String>,
}

/// What a pause did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PauseReport {
    /// The guest's memory.
    pub ram_bytes: u64,
    /// Memory that the guest itself counted as not free (`ram_bytes` minus its MemFree), read right
    /// before the vCPUs stopped; absent when envd did not answer.
    pub guest_nonfree_bytes: Option<u64>,
    /// Every step that was taken, in order.
    pub steps: Vec<StepTime>,
    /// What each reclaim step did.
    pub reclaim: Option<ReclaimReport>,
    /// How the drain ended.
    pub drain: Option<DrainReport>,
    /// REMOVE events that the pager read during the drain; absent where nobody serves the guest's
    /// page faults (a booted guest), or nothing was drained.
    #[serde(default)]
    pub drain_removes: Option<u64>,
    /// What the scan found; absent where it was turned off.
    #[serde(default)]
    pub scan: Option<ScanReport>,
    /// From the freeze of the user's processes to the vCPUs' stop: how long the sandbox no longer
    /// answered while its kernel still worked.
    pub user_frozen_ms: f64,
    /// From the vCPUs' stop until memory and device state were captured: the guest could go on.
    pub freeze_ms: f64,
    /// From the vCPUs' stop until the build was durable. In a manifest: until its commit began,
    /// since a manifest is written before it is durable.
    pub durable_ms: f64,
    /// From the request until the build was durable. In a manifest as `durable_ms`.
    pub total_ms: f64,
    /// What became of the memory's pages.
    pub memory: LayerSummary,
    /// What became of the disk's blocks.
    pub disk: LayerSummary,
    /// Size of the device state.
    pub vmstate_bytes: u64,
}

impl PauseReport {
    /// The time of one step, if it was taken.
    #[must_use]
    pub fn step_ms(&self, step: PauseStep) -> Option<f64> {
        self.steps
            .iter()
            .find(|time| time.step == step)
            .map(|time| time.ms)
    }
}
