//! What every operation on this host needs: storage, VMM, flags, and how written pages are tracked.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use torpor_build::{BuildId, Storage};
use torpor_guest::CALL_DEADLINE;
use torpor_pager::WriteTracking;
use torpor_vmm::VmmIdentity;

use crate::error::StartError;
use crate::flags::Flags;
use crate::resume::background;
use crate::sandbox::end_left_over;
use crate::vmm::{VmmBinary, VmmChoice, VmmKind, VmmOptions};

/// Longest wait for a booting guest's agent unless told otherwise: emulated boots take 5 to 10 s on
/// an idle machine, and machines are not always idle.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// Longest wait for a resumed guest's agent. It takes a tenth of a second; a busy machine and a
/// cold disk make it longer.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How much longer than usual a pause's ceilings may be on a slow host.
const STRETCH_MAX: f64 = 8.0;

/// Longest wait for what dead processes have left running.
const END_MAX: Duration = Duration::from_secs(10);

/// Where things are and what is forced, as the command line gives it.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// The storage's directory.
    pub storage: PathBuf,
    /// Which VMM, and where it is.
    pub vmm: VmmOptions,
    /// The flag file.
    pub flags: Option<PathBuf>,
    /// How written pages are tracked, instead of the best that the host has.
    pub tracking: Option<WriteTracking>,
    /// How long a guest may take for each of its answers, the first one included, instead of what is
    /// usual; for hosts on which everything is slow. Beyond half a minute the ceilings of a pause that
    /// no flag sets grow in proportion, up to eightfold.
    pub patience: Option<Duration>,
}

/// This host.
#[derive(Debug, Clone)]
pub struct Host {
    storage: Storage,
    vmm_options: VmmOptions,
    vmm: VmmChoice,
    flags: Flags,
    tracking: Option<WriteTracking>,
    agent: Option<PathBuf>,
    boot_max: Duration,
    patience: Patience,
}

/// How long a resumed guest may take for its answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For the first.
    pub(crate) first: Duration,
    /// For each after it.
    pub(crate) each: Duration,
}

impl Host {
    /// Opens the storage, finds the VMM and reads the flags. What dead processes left behind in
    /// the storage is removed on the way.
    ///
    /// # Errors
    /// [`StartError`] names what is missing and the next step.
    pub async fn open(options: HostOptions) -> Result<Self, StartError> {
        let storage = Storage::open(&options.storage)?;
        background({
            let storage = storage.clone();
            move || {
                let deadline = Instant::now() + END_MAX;
                storage.sweep(&mut |dir| end_left_over(dir, deadline))?;
                Ok(())
            }
        })
        .await?;
        Ok(Self {
            storage,
            vmm: options.vmm.choose(&options.storage)?,
            vmm_options: options.vmm,
            flags: Flags::open(options.flags.as_deref()).await?,
            tracking: options.tracking,
            agent: None,
            boot_max: options.patience.unwrap_or_default().max(BOOT_MAX),
            patience: Patience {
                first: options.patience.unwrap_or(ANSWER_MAX),
                each: options.patience.unwrap_or(CALL_DEADLINE),
            },
        })
    }

    /// Boots guests with another agent than the one that was built with torpor.
    #[must_use]
    pub fn with_agent(mut self, envd: PathBuf) -> Self {
        self.agent = Some(envd);
        self
    }

    /// Waits this long for a booting guest's first answer.
    #[must_use]
    pub fn with_boot_max(mut self, boot_max: Duration) -> Self {
        self.boot_max = boot_max;
        self
    }

    pub(crate) fn agent(&self) -> Option<&Path> {
        self.agent.as_deref()
    }

    /// For a guest that boots.
    pub(crate) fn boot_patience(&self) -> Patience {
        Patience {
            first: self.boot_max,
            ..self.patience
        }
    }

    /// For a guest that is resumed.
    pub(crate) fn patience(&self) -> Patience {
        self.patience
    }

    /// A ceiling of a pause, longer than usual by as much as a guest's first answer may be. Not without
    /// end: a guest stands still during the scan, and its parent's storage may hang.
    pub(crate) fn ceiling(&self, usual: Duration) -> Duration {
        let by = self.patience.first.as_secs_f64() / ANSWER_MAX.as_secs_f64();
        usual.mul_f64(by.clamp(1.0, STRETCH_MAX))
    }

    /// Where builds are.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The VMM that boots guests here.
    #[must_use]
    pub fn vmm(&self) -> &VmmBinary {
        &self.vmm.binary
    }

    /// The VMM that made a build. Blocks for some milliseconds where that is not the one that boots
    /// guests here.
    ///
    /// # Errors
    /// Another one was asked for, or it cannot run here.
    pub(crate) fn vmm_of(
        &self,
        build: &BuildId,
        recorded: &VmmIdentity,
    ) -> Result<VmmBinary, StartError> {
        let kind: VmmKind = (recorded.name.parse()).map_err(|_| StartError::UnknownVmm {
            build: *build,
            recorded: recorded.to_string(),
        })?;
        if kind == self.vmm.binary.kind() {
            return Ok(self.vmm.binary.clone());
        }
        if let Some(asked) = self.vmm_options.kind {
            return Err(StartError::OtherVmm {
                build: *build,
                recorded: recorded.to_string(),
                kind,
                asked,
            });
        }
        let found = self.vmm_options.find(kind, self.storage.root());
        found.map_err(|source| StartError::VmmMissing {
            build: *build,
            recorded: recorded.to_string(),
            source: Box::new(source),
        })
    }

    /// The flags.
    #[must_use]
    pub fn flags(&self) -> &Flags {
        &self.flags
    }

    /// How written pages of a lazily resumed guest are tracked.
    ///
    /// # Errors
    /// When the host has no userfaultfd to ask.
    pub(crate) fn tracking(&self) -> Result<WriteTracking, torpor_pager::PagerError> {
        self.tracking.map_or_else(WriteTracking::best_of_host, Ok)
    }
}
