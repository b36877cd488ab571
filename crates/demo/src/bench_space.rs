//! Where a run lives: one directory with a storage that is emptied at its start, and the results.
//!
//! Only one run at a time: the directory is locked, because a second run would empty the storage
//! under the first one's guests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock, statvfs};
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::vmm::{VmmKind, VmmOptions};

use crate::templates::FLAGS;

/// Free disk that a run needs: the base image, two templates, four builds of up to the guest's
/// whole memory, and running disks; measured at 1.2 GiB.
const FREE_DISK_BYTES_MIN: u64 = 2 << 30;

/// A locked directory.
#[derive(Debug)]
pub struct BenchSpace {
    dir: PathBuf,
    _lock: File,
}

impl BenchSpace {
    /// Locks `dir`, empties its storage, and looks whether there is room.
    ///
    /// # Errors
    /// Another run is using it, or there is no room.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let lock = File::create(dir.join("lock"))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "another run uses {}; wait for it, or give --out another directory",
                dir.display()
            );
        }
        empty_storage(&dir.join("storage"))?;
        let room = statvfs(&dir)?;
        let free_bytes = room.f_bavail * room.f_frsize;
        if free_bytes < FREE_DISK_BYTES_MIN {
            bail!(
                "{} has {} MiB free and a run needs {}; make room, or give --out another directory",
                dir.display(),
                free_bytes >> 20,
                FREE_DISK_BYTES_MIN >> 20
            );
        }
        Ok(Self { dir, _lock: lock })
    }

    /// A file of results.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Opens the host on this storage, with the flags that make the two kinds of template. On QEMU
    /// unless another VMM is asked for: figures are of one VMM on every host, and what they are
    /// compared with are QEMU's own ways.
    ///
    /// # Errors
    /// What is missing and what to do about it.
    pub async fn host(&self, vmm: VmmOptions) -> Result<Host> {
        let flags = self.file("flags.json");
        fs::write(&flags, FLAGS).with_context(|| format!("cannot write {}", flags.display()))?;
        let options = HostOptions {
            storage: self.file("storage"),
            flags: Some(flags),
            vmm: VmmOptions {
                kind: vmm.kind.or(Some(VmmKind::Qemu)),
                ..vmm
            },
            ..HostOptions::default()
        };
        Ok(Host::open(options).await?)
    }
}

/// Removes what the last run stored: a directory that is no storage is left alone.
fn empty_storage(storage: &Path) -> Result<()> {
    if !storage.exists() {
        return Ok(());
    }
    if !storage.join("builds").is_dir() {
        bail!(
            "{} is no storage of torpor's: remove it, or give --out another directory",
            storage.display()
        );
    }
    fs::remove_dir_all(storage).with_context(|| format!("cannot empty {}", storage.display()))
}
