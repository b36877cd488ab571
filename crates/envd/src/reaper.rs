//! The one place that starts processes and waits for them.
//!
//! Pid 1 inherits every orphan and must wait for it, with `waitpid(-1)`: which would steal the exit
//! statuses of processes that somebody here waits for. So nobody else waits. [`Reaper::run`] wakes
//! on SIGCHLD, collects everything that has ended, and hands each status to whoever started that
//! process; statuses without an owner were orphans.
//!
//! 1. [`Reaper::start`] holds the lock while it forks and until the owner is on the list: a process
//!    that ends at once still finds its owner, and the standard library's own wait (for a child
//!    that could not exec) is not robbed.
//! 2. SIGCHLD merges: one wake-up collects until nothing is left.
//! 3. [`Reaper::signal`] holds the lock too, and only signals processes that are not yet
//!    collected: their ids cannot have been given to somebody else.
//!
//! Outside pid 1 (tests) only processes of the list are waited for.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(Signal),
}

/// Starts and waits; see the module.
#[derive(Debug)]
pub(crate) struct Reaper {
    owners: Mutex<HashMap<i32, oneshot::Sender<Ending>>>,
    everything: bool,
}

/// A process that was started: its pipes, and the promise of its ending.
#[derive(Debug)]
pub(crate) struct Started {
    /// For its id and pipes; never waited for.
    pub(crate) child: Child,
    /// Yields once.
    pub(crate) ending: oneshot::Receiver<Ending>,
}

impl Reaper {
    /// A reaper of everything if we are pid 1, of our own processes otherwise.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            owners: Mutex::default(),
            everything: std::process::id() == 1,
        })
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Ending>>> {
        // A panic under this lock leaves the map whole: every use is one call.
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forks and execs; blocks for as long as the kernel needs for that.
    pub(crate) fn start(&self, command: &mut Command) -> io::Result<Started> {
        let mut owners = self.owners();
        let child = command.spawn()?;
        let (owner, ending) = oneshot::channel();
        owners.insert(pid_of(child.id()), owner);
        Ok(Started { child, ending })
    }

    /// Sends `signal` to the process group that `leader` leads, if `leader` has not ended.
    pub(crate) fn signal(&self, leader: u32, signal: Signal) -> bool {
        let owners = self.owners();
        let leader = pid_of(leader);
        owners.contains_key(&leader) && killpg(Pid::from_raw(leader), signal).is_ok()
    }

    /// SIGKILLs everything in the session that `leader` leads, if `leader` has not ended: its own
    /// group, and the groups that shells and `timeout` made for their children.
    pub(crate) fn kill_session(&self, leader: u32) {
        let owners = self.owners();
        let leader = pid_of(leader);
        if !owners.contains_key(&leader) {
            return;
        }
        // The leader goes first, so that it does not live to see its children die and report that
        // instead. While it is not collected (we hold the lock) its id is still the session's own.
        killpg(Pid::from_raw(leader), Signal::SIGKILL).ok();
        // It may have moved to another group.
        kill(Pid::from_raw(leader), Signal::SIGKILL).ok();
        for _ in 0..SESSION_ROUNDS_MAX {
            let members = session_members(leader);
            if members.is_empty() {
                break;
            }
            for member in members {
                // It may have ended meanwhile.
                kill(Pid::from_raw(member), Signal::SIGKILL).ok();
            }
        }
    }

    /// Collects until the runtime ends.
    pub(crate) async fn run(&self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.collect();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn collect(&self) {
        let mut owners = self.owners();
        if self.everything {
            while let Some((pid, ending)) = wait(Pid::from_raw(-1)) {
                deliver(&mut owners, pid, ending);
            }
            return;
        }
        let ours: Vec<i32> = owners.keys().copied().collect();
        for pid in ours {
            if let Some((pid, ending)) = wait(Pid::from_raw(pid)) {
                deliver(&mut owners, pid, ending);
            }
        }
    }
}

/// How often a session is looked through: its members can fork while we kill them, but not for
/// long, since each round kills all that it sees.
const SESSION_ROUNDS_MAX: usize = 8;

fn deliver(owners: &mut HashMap<i32, oneshot::Sender<Ending>>, pid: i32, ending: Ending) {
    if let Some(owner) = owners.remove(&pid) {
        // The owner may have lost interest.
        owner.send(ending).ok();
    }
}

fn wait(which: Pid) -> Option<(i32, Ending)> {
    loop {
        match waitpid(which, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => return Some((pid.as_raw(), Ending::Exited(code))),
            Ok(WaitStatus::Signaled(pid, signal, _core)) => {
                return Some((pid.as_raw(), Ending::Killed(signal)));
            }
            // Stops and continuations are not asked for.
            Ok(_) => return None,
            Err(Errno::EINTR) => {}
            Err(_none_left) => return None,
        }
    }
}

fn pid_of(id: u32) -> i32 {
    // The kernel's ids are positive i32s.
    i32::try_from(id).unwrap_or(i32::MAX)
}

/// Living processes of a session, without its leader.
fn session_members(leader: i32) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != leader && *pid != 1)
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            session_of(&stat) == Some(leader)
        })
        .collect()
}

/// Session of a living process, from its `/proc/PID/stat`.
fn session_of(stat: &str) -> Option<i32> {
    // The name, in parentheses, may itself hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    let (_parent, _group, session) = (fields.next()?, fields.next()?, fields.next()?);
    if matches!(state, "Z" | "X") {
        return None;
    }
    session.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_found_behind_any_process_name() {
        assert_eq!(session_of("7 (a) b (c)) S 1 7 42 0 -1"), Some(42));
        assert_eq!(session_of("7 (gone) Z 1 7 42 0 -1"), None);
        assert_eq!(session_of("nonsense"), None);
    }
}
