//! From a request to a process: user, directory, environment, terminal or pipes, cgroup.
//!
//! Every process leads a session (and so a group) of its own: that is what a kill reaches.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};
use nix::unistd::{Gid, Uid};
use tokio::net::unix::pipe;

use super::output::Terminal;
use crate::reaper::{Reaper, Started};
use crate::user::User;

/// PATH of every process, unless it is given another.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is to be started.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) cmd: String,
    pub(crate) args: Vec<String>,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) cwd: PathBuf,
    pub(crate) user: User,
    pub(crate) io: Io,
}

/// How it talks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Io {
    /// Pipes for its output; for its input too, or `/dev/null`.
    Pipes { stdin: bool },
    /// A terminal.
    Pty(Winsize),
}

/// Our ends of what it talks through.
#[derive(Debug)]
pub(crate) enum Ends {
    Pipes {
        stdin: Option<pipe::Sender>,
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
    },
    Pty(Terminal),
}

/// Starts it. `cgroup` is an open `cgroup.procs`.
pub(crate) fn spawn(
    reaper: &Reaper,
    spec: &Spec,
    cgroup: Option<File>,
) -> io::Result<(Started, Ends)> {
    let mut command = Command::new(&spec.cmd);
    command.args(&spec.args).current_dir(&spec.cwd).env_clear();
    command.envs(environment(&spec.user)).envs(&spec.envs);
    let master = match spec.io {
        Io::Pipes { stdin } => {
            let stdin = if stdin { Stdio::piped() } else { Stdio::null() };
            command
                .stdin(stdin)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            None
        }
        Io::Pty(size) => {
            let (master, slave) = terminal(&size)?;
            command
                .stdin(slave.try_clone()?)
                .stdout(slave.try_clone()?)
                .stderr(slave);
            Some(master)
        }
    };
    enter(&mut command, &spec.user, cgroup, master.is_some());
    let mut started = reaper.start(&mut command)?;
    // Our copies of the terminal's other side go with the command: only the process keeps it open.
    drop(command);
    let ends = match master {
        Some(master) => Ends::Pty(Terminal::new(master)?),
        None => pipes(&mut started)?,
    };
    Ok((started, ends))
}

fn pipes(started: &mut Started) -> io::Result<Ends> {
    let child = &mut started.child;
    let missing = || io::Error::other("a pipe that was asked for is not there");
    Ok(Ends::Pipes {
        stdin: child
            .stdin
            .take()
            .map(|stdin| pipe::Sender::from_owned_fd(OwnedFd::from(stdin)))
            .transpose()?,
        stdout: pipe::Receiver::from_owned_fd(child.stdout.take().ok_or_else(missing)?.into())?,
        stderr: pipe::Receiver::from_owned_fd(child.stderr.take().ok_or_else(missing)?.into())?,
    })
}

fn environment(user: &User) -> [(&'static str, String); 5] {
    [
        ("PATH", PATH.to_owned()),
        ("HOME", user.home.to_string_lossy().into_owned()),
        ("USER", user.name.clone()),
        ("LOGNAME", user.name.clone()),
        ("SHELL", user.shell.clone()),
    ]
}

/// A terminal's two sides: ours, not blocking, and the process's.
fn terminal(size: &Winsize) -> io::Result<(OwnedFd, OwnedFd)> {
    let pty = openpty(Some(size), None)?;
    // openpty leaves both open across exec. Nothing forks meanwhile: one thread starts processes.
    for side in [&pty.master, &pty.slave] {
        fcntl(side, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fcntl(
        &pty.master,
        FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
    )?;
    Ok((pty.master, pty.slave))
}

/// What happens in the new process before it execs, in an order that matters: cgroup and groups
/// need root, the user comes last.
fn enter(command: &mut Command, user: &User, cgroup: Option<File>, terminal: bool) {
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // Who is not root (a developer) can start his own processes, and nobody else's.
    let switch = Uid::effective().is_root() || Uid::effective() != uid;
    let entered = move || {
        if let Some(mut procs) = cgroup.as_ref() {
            procs.write_all(b"0")?;
        }
        nix::unistd::setsid()?;
        if terminal {
            // SAFETY: standard input is the terminal, and this session has none yet.
            let taken = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) };
            if taken < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        if switch {
            nix::unistd::setgroups(&groups)?;
            nix::unistd::setgid(gid)?;
            nix::unistd::setuid(uid)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls on what was made before
    // the fork; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(entered) };
}
