//! What every operation on this host needs: storage, VMM, flags, and how written pages are tracked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use torpor_build::Storage;
use torpor_pager::WriteTracking;
use torpor_vmm::qemu::QemuBinary;

use crate::error::StartError;
use crate::flags::Flags;

/// Longest wait for a booting guest's agent unless told otherwise: emulated boots take 5 to 10 s on
/// an idle machine, and machines are not always idle.
const BOOT_MAX: Duration = Duration::from_secs(120);

/// Where things are and what is forced, as the command line gives it.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// The storage's directory.
    pub storage: PathBuf,
    /// The QEMU to use instead of the one from PATH.
    pub qemu: Option<PathBuf>,
    /// The flag file.
    pub flags: Option<PathBuf>,
    /// How written pages are tracked, instead of the best that the host has.
    pub tracking: Option<WriteTracking>,
}

/// This host.
#[derive(Debug, Clone)]
pub struct Host {
    storage: Storage,
    qemu: QemuBinary,
    flags: Flags,
    tracking: Option<WriteTracking>,
    agent: Option<PathBuf>,
    boot_max: Duration,
}

impl Host {
    /// Opens the storage, finds the VMM and reads the flags. What dead processes left behind in
    /// the storage is removed on the way.
    ///
    /// # Errors
    /// [`StartError`] names what is missing and the next step.
    pub async fn open(options: HostOptions) -> Result<Self, StartError> {
        let storage = Storage::open(&options.storage)?;
        storage.sweep()?;
        Ok(Self {
            storage,
            qemu: QemuBinary::find(options.qemu.as_deref())?,
            flags: Flags::open(options.flags.as_deref()).await?,
            tracking: options.tracking,
            agent: None,
            boot_max: BOOT_MAX,
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

    pub(crate) fn boot_max(&self) -> Duration {
        self.boot_max
    }

    /// Where builds are.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The VMM.
    #[must_use]
    pub fn qemu(&self) -> &QemuBinary {
        &self.qemu
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
