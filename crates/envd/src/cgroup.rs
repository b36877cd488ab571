//! The two cgroups: the user's processes, which can be frozen, and our own errands, which cannot.
//!
//! The lock decides between starting a process and freezing: whoever starts one holds it until the
//! process is in its cgroup. Otherwise a process could be born into a frozen cgroup, stop before
//! it has exec'ed, and hold up whoever waits for that.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use envd_api::{SYSTEM_CGROUP, USER_CGROUP};
use tokio::sync::{Mutex, MutexGuard};

/// How long the kernel may take to stop all processes. One that waits for a disk stops when the
/// disk has answered.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);

/// How often the kernel is asked whether they stand still. It takes a millisecond as a rule.
const FREEZE_POLL: Duration = Duration::from_millis(1);

/// Which cgroup a process starts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    User,
    System,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("this machine has no cgroup v2 for the user's processes: they cannot be frozen")]
    Absent,
    #[error("the user's processes are frozen: POST /unfreeze first")]
    Frozen,
    #[error(
        "the user's processes did not stop within {} ms (one waits for its disk?); they run on",
        FREEZE_DEADLINE.as_millis()
    )]
    Slow,
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Cgroups {
    dirs: Option<Dirs>,
    changing: Mutex<()>,
}

#[derive(Debug)]
struct Dirs {
    user: PathBuf,
    system: PathBuf,
}

impl Cgroups {
    /// The guest's, which init has made; none if the kernel has no cgroups.
    pub(crate) fn of_guest() -> Self {
        Self::at(PathBuf::from(USER_CGROUP), PathBuf::from(SYSTEM_CGROUP))
    }

    /// `user` and `system` below a directory that somebody else made.
    pub(crate) fn below(dir: &Path) -> Self {
        Self::at(dir.join("user"), dir.join("system"))
    }

    /// A machine without.
    pub(crate) fn none() -> Self {
        Self {
            dirs: None,
            changing: Mutex::default(),
        }
    }

    fn at(user: PathBuf, system: PathBuf) -> Self {
        let usable = user.join("cgroup.freeze").exists() && system.join("cgroup.procs").exists();
        Self {
            dirs: usable.then_some(Dirs { user, system }),
            changing: Mutex::default(),
        }
    }

    /// Permission to start a process in `place`, to be kept until it has exec'ed, and the file that
    /// it must write "0" to before (none on a machine without cgroups).
    pub(crate) async fn enter(
        &self,
        place: Place,
    ) -> Result<(MutexGuard<'_, ()>, Option<File>), CgroupError> {
        let guard = self.changing.lock().await;
        let Some(dirs) = &self.dirs else {
            return Ok((guard, None));
        };
        let dir = match place {
            Place::System => &dirs.system,
            Place::User if asked_to_freeze(&dirs.user)? => return Err(CgroupError::Frozen),
            Place::User => &dirs.user,
        };
        let path = dir.join("cgroup.procs");
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok((guard, Some(file))),
            Err(source) => Err(CgroupError::Io { path, source }),
        }
    }

    /// Stops the user's processes; returns when the kernel says that all of them stand still. If
    /// they do not, they run on.
    pub(crate) async fn freeze(&self) -> Result<(), CgroupError> {
        let _guard = self.changing.lock().await;
        let dir = self.user()?;
        write(dir, true)?;
        let began = Instant::now();
        while !frozen(dir)? {
            if began.elapsed() > FREEZE_DEADLINE {
                write(dir, false)?;
                return Err(CgroupError::Slow);
            }
            tokio::time::sleep(FREEZE_POLL).await;
        }
        Ok(())
    }

    /// Lets the user's processes go on.
    pub(crate) async fn thaw(&self) -> Result<(), CgroupError> {
        let _guard = self.changing.lock().await;
        write(self.user()?, false)
    }

    fn user(&self) -> Result<&Path, CgroupError> {
        self.dirs
            .as_ref()
            .map(|dirs| dirs.user.as_path())
            .ok_or(CgroupError::Absent)
    }
}

fn write(dir: &Path, freeze: bool) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.freeze");
    std::fs::write(&path, if freeze { "1" } else { "0" })
        .map_err(|source| CgroupError::Io { path, source })
}

fn asked_to_freeze(dir: &Path) -> Result<bool, CgroupError> {
    let path = dir.join("cgroup.freeze");
    match std::fs::read_to_string(&path) {
        Ok(state) => Ok(state.trim() == "1"),
        Err(source) => Err(CgroupError::Io { path, source }),
    }
}

fn frozen(dir: &Path) -> Result<bool, CgroupError> {
    let path = dir.join("cgroup.events");
    match std::fs::read_to_string(&path) {
        Ok(events) => Ok(events.lines().any(|line| line == "frozen 1")),
        Err(source) => Err(CgroupError::Io { path, source }),
    }
}
