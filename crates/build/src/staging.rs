//! A build in the making.
//!
//! It is written in a directory of its own below `staging/`, where nobody looks for builds, and
//! appears in `builds/` by one rename. Until then a failure, a drop or a crash leaves nothing that
//! anyone can see; the directory is removed at once, or by [`Storage::sweep`] after a crash.
//!
//! # Commit, step by step
//!
//! 1. each file synced (its digest was computed while it was written)
//! 2. `manifest.json` written under a temporary name, synced, renamed; the directory synced
//! 3. under the storage's lock: parent, base image and kernel still there, the id still free;
//!    the directory renamed into `builds/`
//! 4. `builds/` synced: from here on the build is durable
//!
//! If step 4 fails, the rename is taken back: the caller must not believe in a build that a power
//! cut could take away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::build::{Build, VMSTATE_BYTES_MAX, VMSTATE_FILE};
use crate::durable::{self, DIR_MODE};
use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Digest};
use crate::manifest::{
    BuildInfo, FileRecord, MANIFEST_FILE, MANIFEST_VERSION, Manifest, now_unix_ms,
};
use crate::page::ImageKind;
use crate::reader::ImageReader;
use crate::storage::{Storage, StorageLock};
use crate::writer::LayerWriter;

/// A directory below `staging/`, owned by this process until dropped or moved elsewhere.
#[derive(Debug)]
pub(crate) struct StagingDir {
    path: PathBuf,
    /// Holds the lock that says that the owner lives. `None` once moved elsewhere.
    dir: Option<File>,
}

impl StagingDir {
    /// Makes an empty directory; `None` if a living owner has one of this name. What a dead one
    /// left is removed, after the storage's lock has been given up: that may take long.
    pub(crate) fn create(storage: &Storage, lock: StorageLock, name: &str) -> Result<Option<Self>> {
        let path = storage.dir("staging").join(name);
        let make = || DirBuilder::new().mode(DIR_MODE).create(&path);
        let mut left_over = None;
        match make() {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                let Some(adopted) = Self::adopt(&path)? else {
                    return Ok(None);
                };
                left_over = adopted.set_aside(storage, &lock)?;
                make().context("create", &path)?;
            }
            Err(e) => return Err(Error::io("create", &path, e)),
        }
        let created = Self::adopt(&path)?;
        drop(lock);
        drop(left_over);
        Ok(created)
    }

    /// Takes ownership of a directory; `None` if its owner lives.
    pub(crate) fn adopt(path: &Path) -> Result<Option<Self>> {
        // Whatever somebody put there: a pipe is not waited for, a link not followed.
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed())
            .open(path)
            .context("open", path)?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self::locked(path.to_owned(), dir))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Error::io("lock", path, e.into())),
        }
    }

    /// A directory on which `dir` holds the lock alone.
    pub(crate) fn locked(path: PathBuf, dir: File) -> Self {
        Self {
            path,
            dir: Some(dir),
        }
    }

    /// Moves it where no name is in its way, so that it can be removed at leisure once the
    /// storage's lock has been given up: its own lock goes with it. `None` if its owner has just
    /// removed it.
    pub(crate) fn set_aside(
        mut self,
        storage: &Storage,
        _lock: &StorageLock,
    ) -> Result<Option<Self>> {
        let aside = storage
            .dir("staging")
            .join(format!("left-{}", BuildId::random()));
        match durable::rename_to_new(&self.path, &aside) {
            Ok(()) => {
                self.path = aside;
                Ok(Some(self))
            }
            Err(e) => {
                // Nothing is removed by its old name, which may be another's by then.
                self.dir = None;
                if e.is_not_found() { Ok(None) } else { Err(e) }
            }
        }
    }

    /// Removes it with all in it.
    pub(crate) fn remove(mut self) -> Result<()> {
        let owned = self.dir.take();
        let removed = remove_all(&self.path);
        drop(owned);
        removed
    }

    /// Leaves it there, to whoever sweeps.
    pub(crate) fn keep(mut self) {
        self.dir = None;
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves it to a name that must be free, and syncs that name's directory. Taken back if that
    /// fails.
    ///
    /// Gives the open directory, with the lock, which is a shared one from here on. After a failure
    /// it is dropped by the caller, once that has given up the storage's lock.
    pub(crate) fn publish(&mut self, to: &Path, parent: &Path, steps: &str) -> Result<File> {
        if let Some(dir) = &self.dir {
            // Before anyone can see it: whoever opens a build takes a shared lock at once.
            flock(dir, FlockOperation::NonBlockingLockShared).context("lock", &self.path)?;
        }
        durable::fail_point(&format!("{steps}-rename"), "before", to)?;
        durable::rename_to_new(&self.path, to)?;
        let durable = durable::fail_point(&format!("{steps}-rename"), "after", to).and_then(|()| {
            durable::step(&format!("{steps}-sync"), parent, || {
                durable::sync_dir(parent)
            })
        });
        if let Err(error) = durable {
            if durable::rename_to_new(to, &self.path).is_err() {
                // It stays visible and whole; only its durability is unknown, as the error says.
                self.dir = None;
                tracing::warn!(path = %to.display(), "cannot be taken back after a failed sync");
            }
            return Err(error);
        }
        let missing = || Error::io("lock", to, ErrorKind::NotFound.into());
        self.dir.take().ok_or_else(missing)
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if self.dir.is_some()
            && let Err(error) = remove_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "left-over not removed");
        }
    }
}

/// Removes a directory with all in it; one that is gone is as good as removed.
pub(crate) fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io("delete", path, e)),
        _ => Ok(()),
    }
}

/// What is known of a staged build's files.
#[derive(Debug, Default)]
pub(crate) struct StagedFiles {
    files: BTreeMap<&'static str, Option<(File, FileRecord)>>,
    /// Builds named by the indexes.
    layers: BTreeSet<BuildId>,
    images: Vec<StagedImage>,
}

/// What an image was written on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StagedImage {
    pub(crate) kind: ImageKind,
    pub(crate) parent: Option<BuildId>,
    /// The base image whose blocks its index names, if any.
    pub(crate) base_image: Option<Digest>,
}

/// The files of a staged build, shared with the writers that fill them.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedFiles(Arc<Mutex<StagedFiles>>);

impl SharedFiles {
    fn with<T>(&self, action: impl FnOnce(&mut StagedFiles) -> T) -> T {
        action(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on a commit without [`Self::finished`] is refused.
    pub(crate) fn begun(&self, name: &'static str) {
        self.with(|staged| staged.files.insert(name, None));
    }

    pub(crate) fn finished(&self, name: &'static str, file: File, record: FileRecord) {
        self.with(|staged| staged.files.insert(name, Some((file, record))));
    }

    pub(crate) fn image(&self, image: StagedImage, layers: &[BuildId]) {
        self.with(|staged| {
            staged.images.push(image);
            staged.layers.extend(layers);
        });
    }
}

/// A build that is being written. Dropped without [`commit`](Self::commit), it leaves nothing.
#[derive(Debug)]
pub struct StagedBuild {
    storage: Storage,
    id: BuildId,
    files: SharedFiles,
    dir: StagingDir,
}

impl StagedBuild {
    pub(crate) fn new(storage: Storage, id: BuildId, dir: StagingDir) -> Self {
        Self {
            storage,
            id,
            files: SharedFiles::default(),
            dir,
        }
    }

    /// The id that it will have.
    #[must_use]
    pub fn id(&self) -> BuildId {
        self.id
    }

    /// Where it is written.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Starts writing an image, standing on `parent`'s image of the same kind if there is one.
    /// Images may be written at the same time, by different threads. Pages become references to
    /// the base image only after [`LayerWriter::refer_to`].
    ///
    /// # Errors
    /// When its files cannot be made, or it is longer than an image can be.
    pub fn image_writer(
        &self,
        kind: ImageKind,
        len_pages: u64,
        parent: Option<Arc<ImageReader>>,
    ) -> Result<LayerWriter> {
        LayerWriter::create(
            self.dir.path(),
            self.id,
            kind,
            len_pages,
            parent,
            self.files.clone(),
        )
    }

    /// Writes the device state.
    ///
    /// # Errors
    /// When it is longer than [`VMSTATE_BYTES_MAX`] or cannot be written.
    pub fn write_vmstate(&self, vmstate: &[u8]) -> Result<()> {
        let (found, max) = (vmstate.len() as u64, VMSTATE_BYTES_MAX);
        if found > max {
            return Err(Error::TooLarge {
                what: "the device state in bytes",
                found,
                max,
            });
        }
        self.files.begun(VMSTATE_FILE);
        let path = self.dir.path().join(VMSTATE_FILE);
        let mut file = durable::create_file(&path)?;
        durable::step("vmstate-write", &path, || {
            file.write_all(vmstate).context("write", &path)
        })?;
        let record = FileRecord {
            bytes: found,
            digest: Digest::of(vmstate),
        };
        self.files.finished(VMSTATE_FILE, file, record);
        Ok(())
    }

    /// Makes it a build: durable and visible, or neither. The module's documentation has the
    /// steps.
    ///
    /// # Errors
    /// What a step gives; [`Error::ParentGone`] if the parent was deleted meanwhile,
    /// [`Error::ParentMismatch`], [`Error::BaseImageMismatch`] and [`Error::Unfinished`] for what
    /// does not fit together, [`Error::UnknownImage`] and [`Error::UnknownKernel`] for what is not
    /// there, or no more. The staged build is gone then.
    pub fn commit(mut self, info: BuildInfo) -> Result<Build> {
        let (open_files, manifest) = self.close(info)?;
        let staging = self.dir.path();
        for (name, file) in &open_files {
            let path = staging.join(name);
            durable::step("commit-data-sync", &path, || {
                durable::sync_file(file, &path)
            })?;
        }
        drop(open_files);
        let manifest_path = staging.join(MANIFEST_FILE);
        let bytes = manifest.encode(&manifest_path)?;
        durable::durable_write_steps(&manifest_path, &bytes, "commit-manifest")?;

        let _lock = self.storage.lock()?;
        self.check_references(&manifest.info)?;
        let path = self.storage.build_path(&self.id);
        if path.exists() {
            return Err(Error::BuildExists { id: self.id });
        }
        let dir = self
            .dir
            .publish(&path, &self.storage.builds_dir(), "commit-build")?;
        Ok(Build::from_parts(self.storage, path, manifest, dir))
    }

    /// Takes the files out of the writers' hands and checks that they fit together.
    fn close(&self, info: BuildInfo) -> Result<(Vec<(&'static str, File)>, Manifest)> {
        let id = self.id;
        let staged = self.files.with(std::mem::take);
        for image in staged.images {
            check_image(id, image, &info)?;
        }
        let (mut open_files, mut files) = (Vec::new(), BTreeMap::new());
        for (name, finished) in staged.files {
            let unfinished = || Error::Unfinished {
                id,
                file: name.to_owned(),
            };
            let (file, record) = finished.ok_or_else(unfinished)?;
            open_files.push((name, file));
            files.insert(name.to_owned(), record);
        }
        let manifest = Manifest {
            format_version: MANIFEST_VERSION,
            id,
            created_unix_ms: now_unix_ms(),
            layers: staged.layers.into_iter().collect(),
            files,
            info,
        };
        Ok((open_files, manifest))
    }

    /// Under the lock: what the build cannot do without is still there.
    fn check_references(&self, info: &BuildInfo) -> Result<()> {
        if let Some(parent) = info.parent
            && !self.storage.build_path(&parent).exists()
        {
            return Err(Error::ParentGone {
                id: self.id,
                parent,
            });
        }
        if let Some(digest) = &info.base_image {
            self.storage.image_path(digest)?;
        }
        if let Some(digest) = &info.kernel {
            self.storage.kernel_path(digest)?;
        }
        Ok(())
    }
}

/// Whether an image was written on what the manifest says.
fn check_image(id: BuildId, image: StagedImage, info: &BuildInfo) -> Result<()> {
    if image.parent != info.parent {
        return Err(Error::ParentMismatch {
            id,
            image: image.kind.as_str(),
            image_parent: image.parent,
            manifest_parent: info.parent,
        });
    }
    match image.base_image {
        Some(referred) if info.base_image != Some(referred) => Err(Error::BaseImageMismatch {
            id,
            image: image.kind.as_str(),
            referred,
            found: info.base_image,
        }),
        _ => Ok(()),
    }
}
