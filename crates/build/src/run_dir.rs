//! What a running sandbox keeps on the host, and what is cleared away after those that died.

use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::durable::{self, DIR_MODE};
use crate::error::{Error, IoContext, Result};
use crate::ids::Name;
use crate::staging::{StagingDir, remove_all};
use crate::storage::{Storage, StorageLock, list_dir};

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
        if let Err(error) = remove_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "run directory not removed");
        }
    }
}

/// What [`Storage::sweep`] removed.
#[derive(Debug, Default)]
pub struct SweepReport {
    /// Left-over builds and imports, and builds whose deletion was cut short.
    pub staging: Vec<String>,
    /// Sandboxes whose owner is gone.
    pub sandboxes: Vec<Name>,
    /// What could not be looked at or removed; it stays, and is tried again the next time.
    pub failures: Vec<Error>,
}

impl SweepReport {
    /// One left-over that cannot be removed must not stand in the way of everything else.
    fn failed(&mut self, error: Error) {
        tracing::warn!(%error, "a left-over stays; remove it by hand if it stays for good");
        self.failures.push(error);
    }
}

impl Storage {
    /// Makes the directory of a sandbox that this process runs from now on.
    ///
    /// # Errors
    /// [`Error::SandboxBusy`] while another process runs it. What a dead one left is set aside, for
    /// [`Storage::sweep`].
    pub fn run_dir(&self, sandbox: &Name) -> Result<RunDir> {
        let lock = self.lock()?;
        let path = self.run_path(sandbox);
        match adopt(&path)? {
            Adopted::NotThere => {}
            Adopted::Busy => {
                return Err(Error::SandboxBusy {
                    sandbox: sandbox.clone(),
                });
            }
            Adopted::Ours(left_over) => {
                if let Some(aside) = left_over.set_aside(self, &lock)? {
                    aside.keep();
                }
            }
        }
        DirBuilder::new()
            .mode(DIR_MODE)
            .create(&path)
            .context("create", &path)?;
        let owner_path = path.join(OWNER_FILE);
        let owner = durable::create_file(&owner_path)?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive).context("lock", &owner_path)?;
        drop(lock);
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
        // Asking takes the owner's lock for a moment, which must not be when an owner takes it.
        let _lock = self.lock()?;
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
    /// deletions, and the directories of sandboxes. They are found and set aside under the
    /// storage's lock, and removed, which may take long, without it.
    ///
    /// `end` is shown each directory before, to end what its owner has left running. What it cannot
    /// end stays, and is shown to it again the next time.
    ///
    /// # Errors
    /// When the storage cannot be locked or listed. What goes wrong with a single left-over is in
    /// the report.
    pub fn sweep(&self, end: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<SweepReport> {
        let mut report = SweepReport::default();
        let lock = self.lock()?;
        let left_over = self.set_left_overs_aside(&lock, &mut report)?;
        drop(lock);
        for dir in left_over {
            let ended = end(dir.path()).context("end what runs in", dir.path());
            let removed = match ended {
                Ok(()) => dir.remove(),
                Err(error) => {
                    dir.keep();
                    Err(error)
                }
            };
            if let Err(error) = removed {
                report.failed(error);
            }
        }
        Ok(report)
    }

    fn set_left_overs_aside(
        &self,
        lock: &StorageLock,
        report: &mut SweepReport,
    ) -> Result<Vec<StagingDir>> {
        let mut left_over = Vec::new();
        let staging = self.dir("staging");
        for name in list_dir(&staging)? {
            let aside = match StagingDir::adopt(&staging.join(&name)) {
                Ok(Some(adopted)) => adopted.set_aside(self, lock),
                Ok(None) => continue,
                // Its owner has just removed it.
                Err(e) if e.is_not_found() => continue,
                Err(e) => Err(e),
            };
            match aside {
                Ok(aside) => {
                    report.staging.extend(aside.is_some().then_some(name));
                    left_over.extend(aside);
                }
                Err(e) => report.failed(e),
            }
        }
        for sandbox in self.sandboxes()? {
            let aside = match adopt(&self.run_path(&sandbox)) {
                Ok(Adopted::Ours(adopted)) => adopted.set_aside(self, lock),
                Ok(Adopted::NotThere | Adopted::Busy) => continue,
                Err(e) => Err(e),
            };
            match aside {
                Ok(aside) => {
                    report.sandboxes.extend(aside.is_some().then_some(sandbox));
                    left_over.extend(aside);
                }
                Err(e) => report.failed(e),
            }
        }
        Ok(left_over)
    }
}

enum Adopted {
    NotThere,
    Busy,
    Ours(StagingDir),
}

/// Under the storage's lock, so that a directory without an owner file is not just being made.
///
/// What is adopted is locked itself from here on, as everything in `staging/` is: the owner's file
/// goes before the directory does when that is removed.
fn adopt(path: &Path) -> Result<Adopted> {
    let owner_path = path.join(OWNER_FILE);
    let owner = match File::open(&owner_path) {
        Ok(owner) => Some(owner),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(Error::io("open", &owner_path, e)),
    };
    if let Some(owner) = &owner {
        match flock(owner, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Adopted::Busy),
            Err(e) => return Err(Error::io("lock", &owner_path, e.into())),
        }
    }
    match StagingDir::adopt(path) {
        Ok(Some(adopted)) => Ok(Adopted::Ours(adopted)),
        Ok(None) => Ok(Adopted::Busy),
        Err(e) if e.is_not_found() => Ok(Adopted::NotThere),
        Err(e) => Err(e),
    }
}
