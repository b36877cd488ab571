//! The pause: from a running sandbox to a durable build, in typed phases.
//!
//! ```text
//! Running ─freeze user─reclaim─▶ Reclaimed ─drain─▶ Drained ─stop─▶ Stopped ─save state─▶ Saved
//!    ▲                                                                │                    │ settle
//!    │            every failure from here on resumes the vCPUs, ──────┤                    ▼
//!    └──────────── thaws, and keeps the sandbox as it was             │                 Settled
//!                                                                     ▼                    │ scan
//!                 Committed ◀─commit─ Written ◀─write─ Captured ◀──capture── Scanned ◀─────┘
//! ```
//!
//! Each step consumes its phase and returns the next, so no boolean remembers where we are.
//!
//! The happy path: the user's processes freeze, reclaim and drain make the guest lean, the vCPUs
//! stop, the device state is taken (a VMM may write to guest memory for it), the pager settles (only
//! now is the dirty set read), the scan finds the pages that nobody needs, the memory is copied, and
//! from the copy the build is written and committed. Only then does the VMM go.
//!
//! A [`checkpoint`] is the same up to the written build; then the guest goes on in its VMM, beside the
//! commit, and the build becomes its parent: the next one stores what has changed since. What the pager
//! knows counts from the resume still; of a VMM's private memory the host's kernel tells what changed
//! since the checkpoint (`ChangeTracker`). Either way more pages are *looked at* than have changed: that
//! they are the parent's is found by comparing.
//!
//! Failing, first way: freeze, reclaim, drain and scan are best effort. They have their own ceilings,
//! say in the report why they did not do their work, and never fail a pause.
//!
//! Failing, second way: from the stop on, a failure rolls back: the vCPUs run, the guest's clock is
//! set, its user's processes thaw. The outcome is [`PauseFailure`]: the sandbox runs as before, or,
//! when the VMM is dead or cannot be made to run, it is lost and the last build is intact. There is no fourth outcome. The build's id is claimed before anything
//! is done to the guest, so that a taken id costs it nothing.
//!
//! Dropping the future of [`pause`] kills the sandbox and removes what was staged; only a commit
//! that has begun is carried through in the background, and its build is whole.

mod course;
mod phases;
pub mod report;

use torpor_build::{Build, BuildId, Name};

use crate::error::StepError;
use crate::flags::PauseFlags;
use crate::host::Host;
use crate::metrics::{self, Kind};
use crate::progress::Progress;
use crate::sandbox::Sandbox;
use report::{PauseReport, PauseStep};

/// What a pause is to make, and how.
#[derive(Debug)]
pub struct PauseRequest {
    /// The id of the build that it makes.
    pub build: BuildId,
    /// The template that will name the build, if any.
    pub template: Option<Name>,
    /// What to do before the stop.
    pub flags: PauseFlags,
    /// Who watches.
    pub progress: Progress,
}

/// The sandbox is paused: its VMM is gone, its build is durable.
#[derive(Debug)]
pub struct Paused {
    /// The new build.
    pub build: Build,
    /// What the pause did; the build's manifest holds it too.
    pub report: PauseReport,
}

/// A pause that did not make a build.
#[derive(Debug, thiserror::Error)]
pub enum PauseFailure {
    /// The sandbox runs on as if nobody had asked.
    #[error("the pause failed at `{step}` and the sandbox runs on: {source}{}", not_thawed_text(not_thawed.as_ref()))]
    StillRunning {
        /// The sandbox, running.
        sandbox: Box<Sandbox>,
        /// Where it failed.
        step: PauseStep,
        /// Why.
        source: StepError,
        /// Why its user's processes may still be frozen, if the guest did not say otherwise.
        not_thawed: Option<StepError>,
    },
    /// The sandbox is gone; what it did since its last build is lost.
    #[error("the sandbox is lost: the pause failed at `{step}`: {source}{}; {}", and_rollback(rollback.as_ref()), last_build_text(*last_build))]
    Lost {
        /// Where it failed.
        step: PauseStep,
        /// Why.
        source: StepError,
        /// Why it could not be made to run on, where that was tried.
        rollback: Option<StepError>,
        /// The build that it was resumed from, which is intact.
        last_build: Option<BuildId>,
    },
}

fn not_thawed_text(error: Option<&StepError>) -> String {
    error.map_or_else(String::new, |error| {
        format!("; its user's processes may still be frozen: {error}")
    })
}

fn and_rollback(rollback: Option<&StepError>) -> String {
    rollback.map_or_else(String::new, |error| {
        format!("; then it could not be resumed: {error}")
    })
}

fn last_build_text(last_build: Option<BuildId>) -> String {
    last_build.map_or_else(
        || "it had no build yet".to_owned(),
        |id| format!("its last build {id} is intact, resume that"),
    )
}

/// The sandbox goes on, and its build is durable.
#[derive(Debug)]
pub struct Checkpointed {
    /// The sandbox, running. Its parent is the new build.
    pub sandbox: Sandbox,
    /// The new build.
    pub build: Build,
    /// What the checkpoint did; its freeze window ends when the vCPUs run again.
    pub report: PauseReport,
    /// Why its user's processes may still be frozen, if the guest did not say otherwise.
    pub not_thawed: Option<StepError>,
}

/// Pauses a sandbox into a new build.
///
/// # Errors
/// [`PauseFailure`]: still running, or lost.
pub async fn pause(
    sandbox: Sandbox,
    host: &Host,
    request: PauseRequest,
) -> Result<Paused, PauseFailure> {
    let paused = async {
        let written = write(sandbox, host, request).await?;
        Ok(written.commit().await?.end().await)
    };
    let paused = paused.await;
    metrics::paused(
        Kind::Pause,
        paused.as_ref().map(|paused: &Paused| &paused.report),
    );
    paused
}

/// Stores a sandbox as a new build and lets it go on.
///
/// # Errors
/// [`PauseFailure`]: still running, without a new build; or lost. A sandbox that cannot go on after its
/// build was written is lost, and that build is its last.
pub async fn checkpoint(
    sandbox: Sandbox,
    host: &Host,
    request: PauseRequest,
) -> Result<Checkpointed, PauseFailure> {
    let stored = async {
        let written = write(sandbox, host, request).await?;
        written.go_on().await.commit().await
    };
    let stored = stored.await;
    let report = stored.as_ref().map(|stored: &Checkpointed| &stored.report);
    metrics::paused(Kind::Checkpoint, report);
    stored
}

/// What a pause and a checkpoint have in common: to the build that is written and not durable.
async fn write(
    sandbox: Sandbox,
    host: &Host,
    request: PauseRequest,
) -> Result<phases::Written, PauseFailure> {
    let running = phases::begin(sandbox, host, request).await?;
    let reclaimed = running.reclaim().await;
    let drained = reclaimed.drain().await;
    let stopped = drained.stop().await?;
    let settled = stopped.save_state().await?.settle().await?;
    let captured = settled.scan().await.capture().await?;
    captured.write().await
}
