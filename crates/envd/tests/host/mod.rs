//! Starts envd and plays the host.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    reason = "test support: what fails here fails the test"
)]

use std::ffi::OsString;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::process::{Child, Command as HostCommand};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use tokio::net::UnixStream;
use torpor_guest::{Channel, Command, Envd};

/// Longer than anything here takes, on any machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// envd, with our end of its port.
pub(crate) struct Agent {
    pub(crate) child: Child,
    port: OwnedFd,
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::with(None)
    }

    pub(crate) fn with(cgroups: Option<&Path>) -> Self {
        let mut args = Vec::new();
        if let Some(dir) = cgroups {
            args.extend(["--cgroups".into(), dir.as_os_str().to_owned()]);
        }
        Self::spawn(HostCommand::new(env!("CARGO_BIN_EXE_envd")), &args)
    }

    /// As pid 1 of a pid namespace of its own. Needs root, or unprivileged user namespaces.
    pub(crate) fn as_pid_1() -> Self {
        let mut command = HostCommand::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
        if !nix::unistd::Uid::effective().is_root() {
            command.arg("--map-root-user");
        }
        command.arg(env!("CARGO_BIN_EXE_envd"));
        Self::spawn(command, &[])
    }

    fn spawn(mut command: HostCommand, args: &[OsString]) -> Self {
        /// What an agent is to inherit, another test's would inherit as well.
        static SPAWNING: Mutex<()> = Mutex::new(());
        let (ours, theirs) = StdStream::pair().unwrap();
        let spawning = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        command
            .arg("--serve-fd")
            .arg(theirs.as_raw_fd().to_string())
            .args(args);
        let child = command.spawn().unwrap();
        drop(theirs);
        drop(spawning);
        Self {
            child,
            port: ours.into(),
        }
    }

    /// Our end of the port. Every caller has the same one: as with a VMM, whose socket stays while
    /// hosts come and go.
    pub(crate) fn port(&self) -> UnixStream {
        let stream = StdStream::from(self.port.try_clone().unwrap());
        stream.set_nonblocking(true).unwrap();
        UnixStream::from_std(stream).unwrap()
    }

    pub(crate) async fn channel(&self) -> Channel {
        Channel::connect(self.port(), LONG).await.unwrap()
    }

    pub(crate) async fn envd(&self) -> Envd {
        Envd::new(self.channel().await).with_deadline(LONG)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let left = children(self.child.id());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // Outside a guest nothing ends with its agent.
        for member in left.into_iter().flat_map(session_members) {
            send(
                Pid::from_raw(i32::try_from(member).unwrap()),
                Signal::SIGKILL,
            )
            .ok();
        }
    }
}

pub(crate) fn sh(line: &str) -> Command {
    Command::shell(line)
}

pub(crate) async fn output(envd: &Envd, command: &Command) -> String {
    let output = envd.run(command, LONG).await.unwrap();
    assert!(output.exit.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

pub(crate) fn kill(pid: u32) {
    send(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

/// Living processes of a session.
pub(crate) fn session_members(leader: u32) -> Vec<u32> {
    living(|_parent, session| session == leader)
}

fn children(of: u32) -> Vec<u32> {
    living(|parent, _session| parent == of)
}

fn living(wanted: impl Fn(u32, u32) -> bool) -> Vec<u32> {
    let is_wanted = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        Some(state != "Z" && wanted(parent, session))
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(|pid| is_wanted(pid).unwrap_or(false))
        .collect()
}

pub(crate) async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < LONG, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) async fn eventually_ok<T, E: std::fmt::Display, F>(mut call: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, E>>,
{
    let began = Instant::now();
    loop {
        match call().await {
            Ok(value) => return value,
            Err(error) => assert!(began.elapsed() < LONG, "in vain: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
