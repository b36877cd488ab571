//! Where builds are kept, and what may happen to them at the same time.
//!
//! ```text
//! <root>/lock                 held for the moment in which names change
//!        builds/<id>/         committed builds; a shared flock on the directory = in use
//!        staging/<what>-…/    what is being written or deleted; an flock on it = its owner lives
//!        images/<digest>      base images, 0400; a shared flock = in use
//!        block-indexes/<digest>  the index of that image's blocks, 0400; can be made again
//!        kernels/<digest>/    vmlinux, config-<digest of the configuration>
//!        templates/<name>     the id of the build that the name means now
//!        working-sets/<id>.json  what a resume of the build touched first; a hint
//!        run/<sandbox>/       what a running sandbox needs; an flock on its `owner` = it lives
//! ```
//!
//! Invariants:
//! - Whatever stands in `builds/`, `images/`, `block-indexes/` and `kernels/` is whole: it was
//!   written in `staging/`, synced, and renamed into place.
//! - Names appear, change and vanish only under the storage's lock, which is held for a rename and
//!   a sync and never while data is written. So "does the parent still exist?" and the rename that
//!   relies on the answer are one step.
//! - Ownership is an `flock`: it ends with its process, however that ends. Nothing here trusts a
//!   process id.
//!
//! What it does not do: expire builds, remove base images that nothing refers to by itself
//! ([`Storage::delete_image`] does when asked), or remove kernels.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::base_image::BLOCK_INDEXES_DIR;
use crate::build::{Build, read_bounded};
use crate::durable::{self, DIR_MODE, FILE_MODE};
use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Name};
use crate::manifest::{MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest, parent_if_legible};
use crate::staging::{StagedBuild, StagingDir};

/// Longest wait for the storage's lock: its holders do a rename and a sync, which even a busy disk
/// ends within a second or two.
pub const STORAGE_LOCK_WAIT_MS: u64 = 30_000;
const LOCK_RETRY_MS: u64 = 2;

/// Longest file in `templates/`: an id and a newline, with room to spare.
const TEMPLATE_BYTES_MAX: u64 = 128;

const DIRS: [&str; 8] = [
    "builds",
    "images",
    BLOCK_INDEXES_DIR,
    "kernels",
    "templates",
    "run",
    "staging",
    "working-sets",
];

/// A storage folder. Cheap to clone; any number of processes may use one at once.
#[derive(Debug, Clone)]
pub struct Storage {
    root: Arc<Path>,
}

/// What [`Storage::list_builds`] found under one id.
#[derive(Debug)]
pub struct ListedBuild {
    /// The build.
    pub id: BuildId,
    /// Its manifest, or why it cannot be read.
    pub manifest: Result<Manifest>,
}

impl Storage {
    /// Opens a storage folder, and makes it and its parts where they are missing.
    ///
    /// # Errors
    /// When a directory can be neither found nor made.
    pub fn open(root: &Path) -> Result<Self> {
        create_dir(root)?;
        let root = root.canonicalize().context("find", root)?;
        let mut created = false;
        for dir in DIRS {
            let path = root.join(dir);
            created |= create_one_dir(&path)?;
            // Made by hand, or with another mask: memory images hold secrets all the same.
            let private = fs::Permissions::from_mode(DIR_MODE);
            fs::set_permissions(&path, private).context("make private", &path)?;
        }
        if created {
            // A build is no more durable than the directory that it is renamed into.
            durable::step("open-dir-sync", &root, || durable::sync_dir(&root))?;
        }
        Ok(Self { root: root.into() })
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn builds_dir(&self) -> PathBuf {
        self.dir("builds")
    }

    pub(crate) fn build_path(&self, id: &BuildId) -> PathBuf {
        self.builds_dir().join(id.to_string())
    }

    /// Starts a new build, to be written and committed by this process.
    ///
    /// # Errors
    /// [`Error::BuildExists`], or [`Error::BuildBusy`] while another one writes this id.
    pub fn begin_build(&self, id: BuildId) -> Result<StagedBuild> {
        let lock = self.lock()?;
        if self.build_path(&id).exists() {
            return Err(Error::BuildExists { id });
        }
        let dir = StagingDir::create(self, lock, &format!("build-{id}"))?
            .ok_or(Error::BuildBusy { id })?;
        Ok(StagedBuild::new(self.clone(), id, dir))
    }

    /// Opens a build.
    ///
    /// # Errors
    /// [`Error::UnknownBuild`]; what reading and verifying its manifest gives.
    pub fn open_build(&self, id: &BuildId) -> Result<Build> {
        Build::open(self, id)
    }

    /// All builds, oldest first; those that cannot be read come last, with their error.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list_builds(&self) -> Result<Vec<ListedBuild>> {
        let mut builds: Vec<_> = self
            .build_ids()?
            .into_iter()
            .map(|id| ListedBuild {
                id,
                manifest: self.read_manifest(&id),
            })
            // Deleted meanwhile; a build that has lost its manifest is still listed.
            .filter(|b| b.manifest.is_ok() || self.build_path(&b.id).exists())
            .collect();
        let created = |b: &ListedBuild| b.manifest.as_ref().map_or(u64::MAX, |m| m.created_unix_ms);
        builds.sort_by_key(|b| (created(b), b.id));
        Ok(builds)
    }

    pub(crate) fn build_ids(&self) -> Result<Vec<BuildId>> {
        let names = list_dir(&self.builds_dir())?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn read_manifest(&self, id: &BuildId) -> Result<Manifest> {
        let path = self.build_path(id).join(MANIFEST_FILE);
        let bytes = read_bounded(&path, MANIFEST_BYTES_MAX)?;
        Manifest::decode(&bytes).map_err(|e| e.in_file(&path))
    }

    /// Deletes a build.
    ///
    /// # Errors
    /// [`Error::HasChildren`], [`Error::NamedByTemplate`], [`Error::BuildInUse`], and
    /// [`Error::MayHaveChildren`] while there are builds that do not tell their parent.
    pub fn delete_build(&self, id: &BuildId) -> Result<()> {
        let lock = self.lock()?;
        let doomed = self.take_out(&lock, id, None)?;
        drop(lock);
        doomed.remove()
    }

    /// Deletes a template and the build that it names, which no other template may name. Gives
    /// that build; `None` if it was gone already, and only the name was left.
    ///
    /// # Errors
    /// [`Error::UnknownTemplate`] and those of [`Self::delete_build`]; the
    /// name then means what it meant before.
    pub fn delete_template_and_build(&self, name: &Name) -> Result<Option<BuildId>> {
        let lock = self.lock()?;
        let id = self.read_template(name)?;
        let doomed = match self.take_out(&lock, &id, Some(name)) {
            Ok(doomed) => Some(doomed),
            Err(Error::UnknownBuild { .. }) => None,
            Err(error) => return Err(error),
        };
        // After the build: what a crash between them leaves is a name of nothing, which the same
        // call removes, and not a build that nobody knows.
        self.remove_name(&lock, name)?;
        drop(lock);
        doomed.map_or(Ok(None), |doomed| doomed.remove().map(|()| Some(id)))
    }

    /// Takes a build out of sight, into `staging/`, to be removed without the lock. No template
    /// but `except` may name it.
    fn take_out(
        &self,
        _lock: &StorageLock,
        id: &BuildId,
        except: Option<&Name>,
    ) -> Result<StagingDir> {
        let path = self.build_path(id);
        if !path.exists() {
            return Err(Error::UnknownBuild { id: *id });
        }
        let templates: Vec<Name> = self
            .list_templates()?
            .into_iter()
            .filter(|(name, _)| Some(name) != except)
            .filter_map(|(name, named)| (named.ok()? == *id).then_some(name))
            .collect();
        if !templates.is_empty() {
            return Err(Error::NamedByTemplate { id: *id, templates });
        }
        self.refuse_if_children(id)?;
        let dir = File::open(&path).context("open", &path)?;
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::BuildInUse { id: *id }),
            Err(e) => return Err(Error::io("lock", &path, e.into())),
        }
        // Out of sight in one step; a crash after it leaves something for `sweep`.
        let doomed = self
            .dir("staging")
            .join(format!("deleted-{}", BuildId::random()));
        durable::step("delete-rename", &path, || {
            durable::rename_to_new(&path, &doomed)
        })?;
        let builds = self.builds_dir();
        durable::step("delete-dir-sync", &builds, || durable::sync_dir(&builds))?;
        // A hint without its build harms nobody: not worth failing for.
        drop(fs::remove_file(self.working_set_path(id)));
        Ok(StagingDir::locked(doomed, dir))
    }

    /// Under the lock: a child that is being committed is seen or sees that its parent is gone.
    fn refuse_if_children(&self, id: &BuildId) -> Result<()> {
        let (mut children, mut unreadable) = (Vec::new(), Vec::new());
        for other in self.build_ids()?.into_iter().filter(|other| other != id) {
            match self.parent_of(&other) {
                Some(parent) if parent == Some(*id) => children.push(other),
                Some(_) => {}
                None => unreadable.push(other),
            }
        }
        if !children.is_empty() {
            return Err(Error::HasChildren { id: *id, children });
        }
        // Two builds that cannot be read must not keep each other for ever.
        if !unreadable.is_empty() && self.read_manifest(id).is_ok() {
            return Err(Error::MayHaveChildren {
                id: *id,
                unreadable,
            });
        }
        Ok(())
    }

    /// A build's parent; `None` where the manifest does not tell.
    fn parent_of(&self, id: &BuildId) -> Option<Option<BuildId>> {
        let path = self.build_path(id).join(MANIFEST_FILE);
        let bytes = read_bounded(&path, MANIFEST_BYTES_MAX).ok()?;
        match Manifest::decode(&bytes) {
            Ok(manifest) => Some(manifest.info.parent),
            Err(crate::FormatError::Newer { .. }) => parent_if_legible(&bytes),
            Err(crate::FormatError::Damaged { .. }) => None,
        }
    }

    /// Makes `name` mean this build from now on.
    ///
    /// # Errors
    /// [`Error::UnknownBuild`]; [`Error::NameIsAnId`] for a name that looks like a build's id.
    pub fn set_template(&self, name: &Name, id: &BuildId) -> Result<()> {
        if name.as_str().parse::<BuildId>().is_ok() {
            return Err(Error::NameIsAnId { name: name.clone() });
        }
        let _lock = self.lock()?;
        if !self.build_path(id).exists() {
            return Err(Error::UnknownBuild { id: *id });
        }
        durable::durable_write_steps(
            &self.template_path(name),
            format!("{id}\n").as_bytes(),
            "template",
        )
    }

    /// Makes `name` mean nothing; the build stays.
    ///
    /// # Errors
    /// [`Error::UnknownTemplate`].
    pub fn remove_template(&self, name: &Name) -> Result<()> {
        self.remove_name(&self.lock()?, name)
    }

    fn remove_name(&self, _lock: &StorageLock, name: &Name) -> Result<()> {
        let path = self.template_path(name);
        match fs::remove_file(&path) {
            Ok(()) => {
                let dir = self.dir("templates");
                durable::step("template-remove-sync", &dir, || durable::sync_dir(&dir))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                Err(Error::UnknownTemplate { name: name.clone() })
            }
            Err(e) => Err(Error::io("delete", &path, e)),
        }
    }

    /// All templates by name, each with its build or why that cannot be told.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list_templates(&self) -> Result<Vec<(Name, Result<BuildId>)>> {
        let names = list_dir(&self.dir("templates"))?;
        let names = names.iter().filter_map(|name| name.parse::<Name>().ok());
        Ok(names
            .map(|name| (name.clone(), self.read_template(&name)))
            .collect())
    }

    /// What the user means by `text`: a build's id, or a template's name.
    ///
    /// # Errors
    /// [`Error::UnknownBuild`], [`Error::UnknownTemplate`], or [`Error::Id`] for neither.
    pub fn resolve(&self, text: &str) -> Result<BuildId> {
        let id = match text.parse::<BuildId>() {
            Ok(id) => id,
            Err(_) => self.read_template(&text.parse::<Name>()?)?,
        };
        if self.build_path(&id).exists() {
            Ok(id)
        } else {
            Err(Error::UnknownBuild { id })
        }
    }

    fn template_path(&self, name: &Name) -> PathBuf {
        self.dir("templates").join(name.as_str())
    }

    fn read_template(&self, name: &Name) -> Result<BuildId> {
        let path = self.template_path(name);
        let bytes = match read_bounded(&path, TEMPLATE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(e) if e.is_not_found() => {
                return Err(Error::UnknownTemplate { name: name.clone() });
            }
            Err(e) => return Err(e),
        };
        let text = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| text.strip_suffix('\n'));
        let id = text.and_then(|text| text.parse().ok());
        id.ok_or_else(|| Error::damaged(&path, 0, "this is not the id of a build"))
    }

    /// Takes the storage's lock, for the moment in which names change.
    pub(crate) fn lock(&self) -> Result<StorageLock> {
        let path = self.dir("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&path)
            .context("open", &path)?;
        let deadline = Instant::now() + Duration::from_millis(STORAGE_LOCK_WAIT_MS);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(StorageLock { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io("lock", &path, e.into())),
            }
            if Instant::now() >= deadline {
                return Err(Error::StorageBusy {
                    path,
                    waited_ms: STORAGE_LOCK_WAIT_MS,
                });
            }
            std::thread::sleep(Duration::from_millis(LOCK_RETRY_MS));
        }
    }
}

/// Names do not change while this lives. Ends with the process as well.
#[derive(Debug)]
pub(crate) struct StorageLock {
    _file: File,
}

/// Makes a directory and those above it, where they are missing, so that they last.
fn create_dir(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = durable::parent_of(path);
    create_dir(parent)?;
    if create_one_dir(path)? {
        durable::step("open-root-sync", parent, || durable::sync_dir(parent))?;
    }
    Ok(())
}

/// Gives whether it was missing; does not sync.
fn create_one_dir(path: &Path) -> Result<bool> {
    match DirBuilder::new().mode(DIR_MODE).create(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(e) => Err(Error::io("create", path, e)),
    }
}

/// The names in a directory that are text, sorted.
pub(crate) fn list_dir(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).context("list", path)? {
        names.extend(entry.context("list", path)?.file_name().into_string().ok());
    }
    names.sort_unstable();
    Ok(names)
}
