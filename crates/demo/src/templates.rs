//! The templates that the arms start from: a booted guest with the workload's program in it.

use anyhow::{Context as _, Result};
use torpor_build::BuildId;
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::DEFAULT_KERNEL;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::{PauseRequest, pause};

use crate::arms::DRAIN_CEILING_MS;
use crate::watch::Watch;
use crate::{GUEST_DISK_BYTES, GUEST_MEMORY_BYTES, guest_work};

/// The flag file of a run: which templates report their free pages.
pub const FLAGS: &str = r#"{
  "templates": {
    "reporting": { "free-page-reporting": true },
    "silent": { "free-page-reporting": false },
    "silent-refs": { "free-page-reporting": false }
  }
}
"#;

/// Whether a template's balloon reports free pages by itself, and how the template was stored: what
/// an arm does not touch it has from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It does.
    Reporting,
    /// It does not: what the guest frees stays with it.
    Silent,
    /// It does not, and the template was scanned and refers to its base image, as by default.
    SilentRefs,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Reporting => "reporting",
            Self::Silent => "silent",
            Self::SilentRefs => "silent-refs",
        }
    }

    fn flags(self) -> PauseFlags {
        let exact = self == Self::SilentRefs;
        PauseFlags {
            // What booting freed goes back to the host as it would in the arms; without reporting
            // there is nothing to wait for.
            drain_ceiling_ms: match self {
                Self::Reporting => DRAIN_CEILING_MS,
                Self::Silent | Self::SilentRefs => 0,
            },
            free_page_scan: exact,
            disk_references: exact,
            ..PauseFlags::default()
        }
    }
}

/// The templates.
#[derive(Debug, Clone, Copy)]
pub struct Templates {
    reporting: BuildId,
    silent: BuildId,
    silent_refs: BuildId,
}

impl Templates {
    /// Builds them at once: nothing is measured meanwhile.
    ///
    /// # Errors
    /// A guest does not boot, or its pause fails.
    pub async fn build(host: &Host, watch: &Watch) -> Result<Self> {
        let (silent, reporting, silent_refs) = tokio::try_join!(
            Box::pin(build(host, Kind::Silent, watch)),
            Box::pin(build(host, Kind::Reporting, watch)),
            Box::pin(build(host, Kind::SilentRefs, watch)),
        )?;
        Ok(Self {
            reporting,
            silent,
            silent_refs,
        })
    }

    /// One of them.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &BuildId {
        match kind {
            Kind::Reporting => &self.reporting,
            Kind::Silent => &self.silent,
            Kind::SilentRefs => &self.silent_refs,
        }
    }
}

/// Boots a guest as the template of that kind has it, with so much memory, and waits for envd.
///
/// # Errors
/// It does not boot.
pub async fn boot_guest(
    host: &Host,
    kind: Kind,
    memory_bytes: u64,
    watch: &Watch,
) -> Result<Sandbox> {
    let request = BootRequest {
        memory_bytes,
        disk_bytes: GUEST_DISK_BYTES,
        vcpus: 1,
        network: false,
        kernel: DEFAULT_KERNEL.to_owned(),
        kernel_args: String::new(),
        rootfs: None,
        template: Some(kind.name().parse()?),
        progress: watch.progress(kind.name()),
    };
    Ok(Box::pin(boot(host, request)).await?)
}

/// Boots a guest, brings the workload in, and snapshots it.
async fn build(host: &Host, kind: Kind, watch: &Watch) -> Result<BuildId> {
    let _stage = watch.stage(format!("template {}: boot and snapshot", kind.name()));
    let sandbox = boot_guest(host, kind, GUEST_MEMORY_BYTES, watch).await?;
    guest_work::install(sandbox.envd())
        .await
        .context("the workload's program does not get into the guest")?;
    let request = PauseRequest {
        build: BuildId::random(),
        template: Some(kind.name().parse()?),
        flags: kind.flags(),
        progress: watch.progress(kind.name()),
    };
    Ok(Box::pin(pause(sandbox, host, request)).await?.build.id())
}
