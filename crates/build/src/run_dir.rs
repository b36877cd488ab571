//! What a running sandbox keeps on the host, and what is cleared away after those that died.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::durable::{self, DIR_MODE};
use crate::error::{Error, IoContext, Result};
use crate::ids::Name;
use crate::staging::StagingDir;
use crate::storage::{Storage, list_dir};

/// The file whose lock says that the sandbox's owner lives.
const OWNER_FILE: &str = "owner";

/// A running sandbox's directory, owned by this process; removed with all in it when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Holds the lock.
    _owner: File,
}

impl RunDir {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "run directory not removed");
        }
    }
}

/// What [`Storage::sweep`] removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Left-over builds and imports, and builds whose deletion was cut short.
    pub staging: Vec<String>,
    /// Sandboxes whose owner is gone.
    pub sandboxes: Vec<Name>,
}

impl Storage {
    /// Makes the directory of a sandbox that this process runs from now on.
    ///
    /// # Errors
    /// [`Error::SandboxBusy`] while another process runs it. What a dead one left is removed.
    pub fn run_dir(&self, sandbox: &Name) -> Result<RunDir> {
        let _lock = self.lock()?;
        let path = self.run_path(sandbox);
        match adopt(&path)? {
            Adopted::NotThere => {}
            Adopted::Busy => {
                return Err(Error::SandboxBusy {
                    sandbox: sandbox.clone(),
                });
            }
            Adopted::Ours(left_over) => drop(left_over),
        }
        DirBuilder::new()
            .mode(DIR_MODE)
            .create(&path)
            .context("create", &path)?;
        let owner_path = path.join(OWNER_FILE);
        let owner = durable::create_file(&owner_path)?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive).context("lock", &owner_path)?;
        Ok(RunDir {
            path,
            _owner: owner,
        })
    }

    /// Where a sandbox's directory is, whether it runs or not.
    #[must_use]
    pub fn run_path(&self, sandbox: &Name) -> PathBuf {
        self.dir("run").join(sandbox.as_str())
    }

    /// The sandboxes that run.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn running_sandboxes(&self) -> Result<Vec<Name>> {
        let mut running = Vec::new();
        for sandbox in self.sandboxes()? {
            let owner = self.run_path(&sandbox).join(OWNER_FILE);
            let Ok(file) = File::open(&owner) else {
                continue;
            };
            // A shared lock tells as much, and does not look like an owner to others who ask.
            if flock(&file, FlockOperation::NonBlockingLockShared)
                == Err(rustix::io::Errno::WOULDBLOCK)
            {
                running.push(sandbox);
            }
        }
        Ok(running)
    }

    fn sandboxes(&self) -> Result<Vec<Name>> {
        let names = list_dir(&self.dir("run"))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Removes what processes that are gone have left: unfinished builds and imports, unfinished
    /// deletions, and the directories of sandboxes.
    ///
    /// # Errors
    /// When something cannot be looked at or removed; the rest is left for the next time.
    pub fn sweep(&self) -> Result<SweepReport> {
        let _lock = self.lock()?;
        let mut report = SweepReport::default();
        let staging = self.dir("staging");
        for name in list_dir(&staging)? {
            let left_over = match StagingDir::adopt(&staging.join(&name)) {
                Ok(Some(left_over)) => left_over,
                Ok(None) => continue,
                // Its owner has just removed it.
                Err(e) if e.is_not_found() => continue,
                Err(e) => return Err(e),
            };
            drop(left_over);
            report.staging.push(name);
        }
        for sandbox in self.sandboxes()? {
            if let Adopted::Ours(left_over) = adopt(&self.run_path(&sandbox))? {
                drop(left_over);
                report.sandboxes.push(sandbox);
            }
        }
        Ok(report)
    }
}

enum Adopted {
    NotThere,
    Busy,
    /// Dropping it removes the directory.
    Ours(RunDir),
}

/// Under the storage's lock, so that a directory without an owner file is not just being made.
fn adopt(path: &Path) -> Result<Adopted> {
    let owner_path = path.join(OWNER_FILE);
    let owner = match File::open(&owner_path) {
        Ok(owner) => owner,
        Err(e) if e.kind() == ErrorKind::NotFound => match File::open(path) {
            Ok(dir) => {
                return Ok(Adopted::Ours(RunDir {
                    path: path.to_owned(),
                    _owner: dir,
                }));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Adopted::NotThere),
            Err(e) => return Err(Error::io("open", path, e)),
        },
        Err(e) => return Err(Error::io("open", &owner_path, e)),
    };
    match flock(&owner, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Adopted::Ours(RunDir {
            path: path.to_owned(),
            _owner: owner,
        })),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Adopted::Busy),
        Err(e) => Err(Error::io("lock", &owner_path, e.into())),
    }
}
