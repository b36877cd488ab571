//! A committed build, opened.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Digest};
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest};
use crate::page::{ImageKind, to_usize};
use crate::reader::ImageReader;
use crate::storage::Storage;

pub(crate) const VMSTATE_FILE: &str = "vmstate";
/// Longest device state, in bytes: QEMU's is well below 1 MiB, Firecracker reads 1 MiB at most by
/// default. Far above both, and far below what would hurt the host.
pub const VMSTATE_BYTES_MAX: u64 = 64 << 20;

/// An immutable build. Cheap to clone; it is *in use*, and cannot be deleted, as long as a clone
/// or a reader of it lives (a shared `flock` on its directory, which also ends with the process).
#[derive(Debug, Clone)]
pub struct Build {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    storage: Storage,
    path: PathBuf,
    manifest: Manifest,
    /// Holds the shared lock.
    _dir: File,
}

impl Build {
    pub(crate) fn open(storage: &Storage, id: &BuildId) -> Result<Self> {
        let path = storage.build_path(id);
        let unknown = || Error::UnknownBuild { id: *id };
        let dir = match File::open(&path) {
            Ok(dir) => dir,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(unknown()),
            Err(e) => return Err(Error::io("open", &path, e)),
        };
        match flock(&dir, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            // Only someone who deletes it holds the lock alone.
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(unknown()),
            Err(e) => return Err(Error::io("lock", &path, e.into())),
        }
        // It may have been deleted between opening and locking.
        let opened = dir.metadata().context("look at", &path)?;
        match fs::metadata(&path) {
            Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => {}
            _ => return Err(unknown()),
        }
        Self::with_lock(storage, id, path, dir)
    }

    fn with_lock(storage: &Storage, id: &BuildId, path: PathBuf, dir: File) -> Result<Self> {
        let manifest_path = path.join(MANIFEST_FILE);
        let bytes = read_bounded(&manifest_path, MANIFEST_BYTES_MAX)?;
        let manifest = Manifest::decode(&bytes).map_err(|e| e.in_file(&manifest_path))?;
        if manifest.id != *id {
            let what = format!("this is the manifest of build {}", manifest.id);
            return Err(Error::damaged(&manifest_path, 0, what));
        }
        Ok(Self::from_parts(storage.clone(), path, manifest, dir))
    }

    /// A build that has just been committed; `dir` holds a shared lock.
    pub(crate) fn from_parts(
        storage: Storage,
        path: PathBuf,
        manifest: Manifest,
        dir: File,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                storage,
                path,
                manifest,
                _dir: dir,
            }),
        }
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> BuildId {
        self.inner.manifest.id
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The storage that it is in.
    #[must_use]
    pub fn storage(&self) -> &Storage {
        &self.inner.storage
    }

    /// Opens the memory image.
    ///
    /// # Errors
    /// [`Error::Missing`] if it was stored without; what reading and verifying the index gives.
    pub fn memory(&self) -> Result<ImageReader> {
        self.image(ImageKind::Memory)
    }

    /// Opens the disk image.
    ///
    /// # Errors
    /// As [`Build::memory`].
    pub fn disk(&self) -> Result<ImageReader> {
        self.image(ImageKind::Disk)
    }

    /// Opens one of the images.
    ///
    /// # Errors
    /// As [`Build::memory`].
    pub fn image(&self, kind: ImageKind) -> Result<ImageReader> {
        ImageReader::open(self, kind)
    }

    /// Whether it has this image.
    #[must_use]
    pub fn has_image(&self, kind: ImageKind) -> bool {
        self.manifest().files.contains_key(kind.index_file())
    }

    /// The device state, verified.
    ///
    /// # Errors
    /// [`Error::Missing`] if it was stored without; [`Error::Damaged`] if its digest does not
    /// match.
    pub fn read_vmstate(&self) -> Result<Vec<u8>> {
        let bytes = self.read_file(VMSTATE_FILE, VMSTATE_BYTES_MAX)?;
        let expected = self
            .manifest()
            .files
            .get(VMSTATE_FILE)
            .map(|file| file.digest);
        if expected == Some(Digest::of(&bytes)) {
            Ok(bytes)
        } else {
            let what = "its digest is not the manifest's";
            Err(Error::damaged(&self.file_path(VMSTATE_FILE), 0, what))
        }
    }

    pub(crate) fn file_path(&self, name: &str) -> PathBuf {
        self.inner.path.join(name)
    }

    /// Reads a file of the manifest's length. Its digest is not checked.
    pub(crate) fn read_file(&self, name: &str, bytes_max: u64) -> Result<Vec<u8>> {
        let missing = || Error::Missing {
            id: self.id(),
            file: name.to_owned(),
        };
        let record = self.manifest().files.get(name).ok_or_else(missing)?;
        let path = self.file_path(name);
        let bytes = read_bounded(&path, bytes_max)?;
        if bytes.len() as u64 == record.bytes {
            Ok(bytes)
        } else {
            let what = format!("{} bytes, the manifest says {}", bytes.len(), record.bytes);
            Err(Error::damaged(
                &path,
                record.bytes.min(bytes.len() as u64),
                what,
            ))
        }
    }
}

/// Reads a whole file, if it is not longer than `bytes_max`.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let file = File::open(path).context("open", path)?;
    let found = file.metadata().context("look at", path)?.len();
    let too_long = |found| Error::damaged(path, bytes_max, format!("{found} bytes are too many"));
    if found > bytes_max {
        return Err(too_long(found));
    }
    let mut bytes = Vec::with_capacity(to_usize(found));
    // One byte more than allowed, to notice a file that grows while it is read.
    let read = file
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .context("read", path)? as u64;
    if read > bytes_max {
        Err(too_long(read))
    } else {
        Ok(bytes)
    }
}
