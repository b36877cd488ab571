//! What every operation on this host needs: storage, VMM, flags, and how written pages are tracked.

use std::path::PathBuf;

use torpor_build::Storage;
use torpor_pager::WriteTracking;
use torpor_vmm::qemu::QemuBinary;

use crate::error::StartError;
use crate::flags::Flags;

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
        })
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
