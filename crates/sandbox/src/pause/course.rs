//! What every phase of a pause carries, and how a pause is rolled back: the only place where a sandbox
//! is brought back.

use std::time::{Duration, Instant};

use torpor_guest::ReclaimReport;
use torpor_vmm::DrainReport;

use super::report::{PauseStep, StepTime};
use super::{PauseFailure, PauseRequest};
use crate::error::StepError;
use crate::host::Host;
use crate::metrics;
use crate::sandbox::Sandbox;
use crate::scan::{Permission, ScanReport};

/// The longest that what no flag bounds may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ceilings {
    /// For the user's processes to freeze. The freezer waits for system calls under way; a guest that
    /// needs longer is paused with those processes not frozen yet, which is right, only less lean.
    pub(super) freeze_user: Duration,
    /// What a reclaim may take beyond the sum of its steps' caps: starting its shell, and the kernel
    /// write that is under way when a cap ends.
    pub(super) reclaim_overhead: Duration,
    /// For the guest's own count of its free memory.
    pub(super) count_free: Duration,
    /// For the pager to have seen everything of before the stop. It takes a millisecond; storage that
    /// hangs under a fault is what makes it long.
    pub(super) settle: Duration,
    /// For the scan. It takes a few milliseconds while the guest stands still; a parent's storage that
    /// hangs is what makes it long.
    pub(super) scan: Duration,
    /// For the thaw, when the sandbox goes on after a checkpoint or a pause that failed.
    pub(super) thaw: Duration,
}

impl Ceilings {
    pub(super) fn on(host: &Host) -> Self {
        Self {
            freeze_user: host.ceiling(Duration::from_secs(1)),
            reclaim_overhead: host.ceiling(Duration::from_millis(1500)),
            count_free: host.ceiling(Duration::from_millis(500)),
            settle: host.ceiling(Duration::from_secs(10)),
            scan: host.ceiling(Duration::from_millis(500)),
            thaw: host.ceiling(Duration::from_secs(5)),
        }
    }
}

/// What is known so far, and the sandbox that it is about.
pub(super) struct Course {
    pub(super) sandbox: Sandbox,
    pub(super) request: PauseRequest,
    pub(super) ceilings: Ceilings,
    pub(super) started: Instant,
    pub(super) steps: Vec<StepTime>,
    pub(super) frozen_at: Option<Instant>,
    pub(super) user_frozen: Duration,
    /// The agent has answered since the pause began.
    pub(super) agent_answers: bool,
    pub(super) reclaim: Option<ReclaimReport>,
    pub(super) drain: Option<DrainReport>,
    pub(super) drain_removes: Option<u64>,
    /// Whether the stopped guest may be scanned; `None` where nobody wants it to be.
    pub(super) scan_permission: Option<Permission>,
    pub(super) scan: Option<ScanReport>,
    pub(super) guest_nonfree_bytes: Option<u64>,
}

impl Course {
    /// Nothing is known yet.
    pub(super) fn new(
        sandbox: Sandbox,
        request: PauseRequest,
        ceilings: Ceilings,
        started: Instant,
    ) -> Self {
        Self {
            sandbox,
            request,
            ceilings,
            started,
            steps: Vec::new(),
            frozen_at: None,
            user_frozen: Duration::ZERO,
            agent_answers: false,
            reclaim: None,
            drain: None,
            drain_removes: None,
            scan_permission: None,
            scan: None,
            guest_nonfree_bytes: None,
        }
    }

    /// Notes a step that began at `since`.
    pub(super) fn note(&mut self, step: PauseStep, since: Instant, skipped: Option<String>) {
        if let Some(why) = &skipped {
            tracing::info!(%step, %why, "not done");
        }
        let ms = ms(since.elapsed());
        metrics::paused_step(step, ms);
        self.steps.push(StepTime { step, ms, skipped });
    }

    /// The sandbox goes on as before: vCPUs, then the user's processes.
    pub(super) async fn roll_back(self, step: PauseStep, source: StepError) -> PauseFailure {
        let last_build = self.sandbox.parent_id();
        // A VMM that was killed because of a page died of the page, whatever step noticed it.
        let source = match self.sandbox.pager_failure() {
            Some(failure) => torpor_pager::PagerError::Failed(failure).into(),
            None => source,
        };
        tracing::warn!(%step, error = %source, "the pause is rolled back");
        let sandbox = self.sandbox;
        if let Err(rollback) = sandbox.resume_vcpus().await {
            return PauseFailure::Lost {
                step,
                source,
                rollback: Some(rollback),
                last_build,
            };
        }
        let not_thawed = sandbox.thaw(self.ceilings.thaw).await.err();
        // A guest that does not answer because its VMM died meanwhile is lost all the same.
        if not_thawed.is_some() && !sandbox.vmm().is_alive() {
            return PauseFailure::Lost {
                step,
                source,
                rollback: not_thawed,
                last_build,
            };
        }
        PauseFailure::StillRunning {
            sandbox: Box::new(sandbox),
            step,
            source,
            not_thawed,
        }
    }
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
