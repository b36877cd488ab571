//! The arms: the same workload, paused in several ways, resumed, and verified.
//!
//! An arm has two halves. [`prepare`] resumes the template and does the workload; [`Prepared::pause`]
//! pauses, resumes the new build and looks at everything. Only the second half is measured, so that
//! the first may run beside other arms' first halves.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::BuildId;
use torpor_guest::ReclaimCaps;
use torpor_sandbox::Sandbox;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::report::PauseReport;
use torpor_sandbox::pause::{PauseRequest, Paused, pause};
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};
use torpor_workload::{Check, Ready};

use crate::guest_work::{self, Verification};
use crate::templates::{Kind, Templates};
use crate::watch::Watch;

/// The drain's ceiling in the arms that drain.
pub const DRAIN_CEILING_MS: u64 = 5000;

/// The reclaim's caps. The flag's defaults are meant for a processor; an emulated one is ten to
/// twenty times slower, and a cap that runs out would measure the emulation. They end early when
/// the work is done.
const RECLAIM_CAPS: ReclaimCaps = ReclaimCaps {
    sync_ms: 2000,
    drop_caches_ms: 4000,
    compact_memory_ms: 4000,
    fstrim_ms: 2000,
};

/// One way to pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arm {
    /// Its name in reports.
    pub name: &'static str,
    /// The template that it starts from.
    pub template: Kind,
    /// Whether the guest is asked to give up what it does not need.
    pub reclaim: bool,
    /// The drain's ceiling; 0 for none.
    pub drain_ceiling_ms: u64,
    /// Whether the stopped guest's free pages are left out.
    pub scan: bool,
    /// Whether copies of the base image are stored as references.
    pub references: bool,
}

/// Memory as it stands.
pub const PLAIN: Arm = Arm {
    name: "plain",
    template: Kind::Silent,
    reclaim: false,
    drain_ceiling_ms: 0,
    scan: false,
    references: false,
};
/// Page cache dropped, free pages kept.
pub const RECLAIM: Arm = Arm {
    name: "reclaim",
    reclaim: true,
    ..PLAIN
};
/// Free pages given back, page cache kept.
pub const DRAIN: Arm = Arm {
    name: "drain",
    template: Kind::Reporting,
    drain_ceiling_ms: DRAIN_CEILING_MS,
    ..PLAIN
};
/// Both: what can be had while the guest runs.
pub const RECLAIM_DRAIN: Arm = Arm {
    name: "reclaim+drain",
    reclaim: true,
    ..DRAIN
};
/// Free pages found after the stop, page cache kept; the guest is asked nothing.
pub const SCAN: Arm = Arm {
    name: "scan",
    scan: true,
    ..PLAIN
};
/// And what stands in the base image is not stored again: what torpor does by itself.
pub const SCAN_REFS: Arm = Arm {
    name: "scan+refs",
    template: Kind::SilentRefs,
    references: true,
    ..SCAN
};
/// And the page cache is dropped before.
pub const RECLAIM_SCAN_REFS: Arm = Arm {
    name: "reclaim+scan+refs",
    reclaim: true,
    ..SCAN_REFS
};
/// All of them, in the order of the tables.
pub const ALL: [Arm; 7] = [
    PLAIN,
    RECLAIM,
    DRAIN,
    RECLAIM_DRAIN,
    SCAN,
    SCAN_REFS,
    RECLAIM_SCAN_REFS,
];

impl Arm {
    /// What a pause of this arm is told.
    #[must_use]
    pub fn flags(&self) -> PauseFlags {
        PauseFlags {
            drain_ceiling_ms: self.drain_ceiling_ms,
            reclaim: self.reclaim,
            reclaim_caps: RECLAIM_CAPS,
            free_page_scan: self.scan,
            disk_references: self.references,
        }
    }
}

/// An arm's figures.
#[derive(Debug, Clone, Serialize)]
pub struct ArmReport {
    /// Its name.
    pub name: &'static str,
    /// The guest's memory.
    pub ram_bytes: u64,
    /// Memory that the guest itself counted as not free, right before its vCPUs stopped.
    pub guest_nonfree_bytes: Option<u64>,
    /// Distinct uncompressed bytes of memory that the whole index reaches, through all layers.
    pub memory_stored_bytes: u64,
    /// Uncompressed bytes of memory in this build's own layer.
    pub memory_layer_bytes: u64,
    /// The same in its data file.
    pub memory_compressed_bytes: u64,
    /// As `memory_stored_bytes`, of the disk.
    pub disk_stored_bytes: u64,
    /// Size of the device state.
    pub vmstate_bytes: u64,
    /// Time of each step of the pause.
    pub steps_ms: BTreeMap<&'static str, f64>,
    /// How long the user's processes stood still before the vCPUs did.
    pub user_frozen_ms: f64,
    /// From the vCPUs' stop until memory was captured.
    pub freeze_ms: f64,
    /// From the vCPUs' stop until the build was durable.
    pub durable_ms: f64,
    /// From the request to resume until the agent's first answer.
    pub resume_ms: f64,
    /// Page faults until then.
    pub pages_faulted: u64,
    /// Pages prefetched until then.
    pub pages_prefetched: u64,
    /// Whether the resumed guest was found as it should be.
    pub verified: bool,
    /// What was found.
    pub verification: Verification,
    /// What the workload did.
    pub workload: Ready,
    /// The build.
    pub build: BuildId,
    /// The pause as the library reports it.
    pub pause: PauseReport,
    /// The resume as the library reports it.
    pub resume: ResumeReport,
}

/// An arm whose workload is done.
#[derive(Debug)]
pub struct Prepared {
    arm: Arm,
    sandbox: Sandbox,
    ready: Ready,
}

/// Resumes the arm's template and does the workload.
///
/// # Errors
/// The resume or the workload fails.
pub async fn prepare(
    host: &Host,
    templates: &Templates,
    arm: Arm,
    watch: &Watch,
) -> Result<Prepared> {
    let _stage = watch.stage(format!(
        "{}: resume the template, do the workload",
        arm.name
    ));
    let template = templates.of(arm.template);
    let (sandbox, _resumed) = Box::pin(resume(host, template, &ResumeOptions::default()))
        .await
        .with_context(|| format!("arm {}", arm.name))?;
    let ready = guest_work::work(sandbox.envd())
        .await
        .with_context(|| format!("arm {}", arm.name))?;
    Ok(Prepared {
        arm,
        sandbox,
        ready,
    })
}

impl Prepared {
    /// The running sandbox, for those who pause it themselves.
    #[must_use]
    pub fn into_sandbox(self) -> Sandbox {
        self.sandbox
    }

    /// Pauses, resumes the new build, and verifies it. Also returns what the workload had found
    /// right before the pause.
    ///
    /// # Errors
    /// The pause or the resume fails. What is not verified is no error, but in the report.
    pub async fn pause(self, host: &Host, watch: &Watch) -> Result<(ArmReport, Check)> {
        let name = self.arm.name;
        let (paused, before) = {
            let _stage = watch.stage(format!("{name}: pause"));
            let before = guest_work::check(self.sandbox.envd()).await?;
            let request = PauseRequest {
                build: BuildId::random(),
                template: None,
                flags: self.arm.flags(),
                progress: watch.progress(name),
            };
            let paused = Box::pin(pause(self.sandbox, host, request)).await;
            (paused.with_context(|| format!("arm {name}"))?, before)
        };
        let _stage = watch.stage(format!("{name}: resume and verify"));
        let (sandbox, resumed) =
            Box::pin(resume(host, &paused.build.id(), &ResumeOptions::default()))
                .await
                .with_context(|| format!("arm {name}"))?;
        let verification = guest_work::verify(sandbox.envd(), &before).await;
        let verification = verification.with_context(|| format!("arm {name}, after its resume"))?;
        sandbox.end().await;
        let report = arm_report(self.arm, self.ready, &paused, resumed, verification)?;
        Ok((report, before))
    }
}

fn arm_report(
    arm: Arm,
    workload: Ready,
    paused: &Paused,
    resume: ResumeReport,
    verification: Verification,
) -> Result<ArmReport> {
    let (report, stats) = (&paused.report, paused.build.stats()?);
    let stored = |image: &Option<torpor_build::ImageStats>| {
        image
            .as_ref()
            .map_or(0, |image| image.reachable_stored_bytes)
    };
    Ok(ArmReport {
        name: arm.name,
        ram_bytes: report.ram_bytes,
        guest_nonfree_bytes: report.guest_nonfree_bytes,
        memory_stored_bytes: stored(&stats.memory),
        memory_layer_bytes: report.memory.raw_bytes,
        memory_compressed_bytes: report.memory.data_file_bytes,
        disk_stored_bytes: stored(&stats.disk),
        vmstate_bytes: report.vmstate_bytes,
        steps_ms: report
            .steps
            .iter()
            .map(|step| (step.step.name(), step.ms))
            .collect(),
        user_frozen_ms: report.user_frozen_ms,
        freeze_ms: report.freeze_ms,
        durable_ms: report.durable_ms,
        resume_ms: resume.total_ms,
        pages_faulted: resume.pages_faulted,
        pages_prefetched: resume.pages_prefetched,
        verified: verification.verified,
        verification,
        workload,
        build: paused.build.id(),
        pause: report.clone(),
        resume,
    })
}
