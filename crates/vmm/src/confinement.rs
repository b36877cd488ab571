//! What surrounds a VMM that is locked up: process-id, mount and network namespaces of its own, and a
//! cgroup.
//!
//! The files that it is given are bind mounts in that mount namespace, over empty files in its
//! directory. Not hard links: those work within one file system only, and a base image and a sandbox
//! are rarely on the same. Not copies: ten sandboxes share a base image's pages in the host's cache.
//! Mounts of the host's namespace would have to be taken away by somebody, and whoever removed the
//! directory before that would find files of others in it. These end with the process, whatever ends it.
//!
//! The process-id namespace is made by the thread that starts the process, which must start no thread
//! afterwards. The process keeps its parent and the number by which we know it; in its own eyes it is
//! number 1, and what it might have started ends with it.

use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// How often what was killed is looked at.
const KILL_LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct Confinement {
    pub(crate) mounts: Vec<BindMount>,
    /// Both ends of what it writes its standard error to, ours first. It can open it by name, too.
    pub(crate) stderr: (OwnedFd, OwnedFd),
    pub(crate) cgroup: Cgroup,
}

/// A file that is given to it.
#[derive(Debug)]
pub(crate) struct BindMount {
    pub(crate) source: CString,
    /// An empty file in its directory.
    pub(crate) target: CString,
    pub(crate) read_only: bool,
}

/// A cgroup that holds one process, gone when this is dropped. The process must be reaped before.
#[derive(Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one that nobody else has.
    pub(crate) fn create(path: PathBuf) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

/// Kills what is in a cgroup that has lost its owner, and removes it. One that is gone is no error.
pub(crate) fn end_cgroup(path: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        let removed = fs::remove_dir(path);
        match removed.as_ref().map_err(io::Error::kind) {
            Err(ErrorKind::NotFound) => return Ok(()),
            Err(ErrorKind::ResourceBusy) if Instant::now() < deadline => kill_all_in(path)?,
            _ => return removed,
        }
        // What was killed takes a while to end.
        thread::sleep(KILL_LOOK_INTERVAL);
    }
}

fn kill_all_in(cgroup: &Path) -> io::Result<()> {
    let processes = || fs::read_to_string(cgroup.join("cgroup.procs"));
    for pid in processes()?.lines().filter_map(|line| line.parse().ok()) {
        let Some(pid) = Pid::from_raw(pid) else {
            continue;
        };
        // By a descriptor, and only if it still is in there: the number may be another's by now.
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            continue;
        };
        let number = pid.as_raw_nonzero().to_string();
        if processes()?.lines().any(|line| line == number) {
            match pidfd_send_signal(process, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!("the cgroup {} stays behind: {error}", self.0.display());
        }
    }
}

/// What this thread starts from here on is number 1 of a process-id namespace, which one process can
/// be.
pub(crate) fn enter_pid_namespace() -> io::Result<()> {
    // SAFETY: only what this thread starts later is concerned; descriptors and memory stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(io::Error::from)
}

/// Puts the calling process into a network namespace of its own. For use between fork and exec: makes a
/// system call only.
pub(crate) fn enter_network_namespace() -> io::Result<()> {
    // SAFETY: the calling process has one thread, just forked; descriptors and memory are not concerned.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
}

/// Mounts the files, in a mount namespace of the calling process alone. For use between fork and exec:
/// makes system calls only.
pub(crate) fn mount_files(mounts: &[BindMount]) -> io::Result<()> {
    // SAFETY: the calling process has one thread, just forked; it shares no descriptors or memory that
    // this takes away.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let nothing_back = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change(c"/", nothing_back)?;
    for mount in mounts {
        mount_bind(mount.source.as_c_str(), mount.target.as_c_str())?;
        if mount.read_only {
            let flags = MountFlags::BIND | MountFlags::RDONLY;
            mount_remount(mount.target.as_c_str(), flags, c"")?;
        }
    }
    Ok(())
}
