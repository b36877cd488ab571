//! A VMM as a child: how it is started, watched and ended.
//!
//! Each VMM has one thread of ours, its **warden**. It spawns the process, then reads what it
//! says until it ends, and reaps it:
//!
//! ```text
//!            fork+exec          stderr ──▶ last lines kept     ┐
//!  warden ──────────────▶ VMM   console ─▶ bounded log file    ├─ poll ─▶ exit ─▶ reap, publish
//!                               pidfd  ──▶ it ended            ┘
//! ```
//!
//! The warden lives as long as the VMM does, and it must: the parent-death signal fires when the
//! *thread* that spawned the child ends, not when the process does.
//!
//! Invariants:
//! * The VMM inherits the descriptors that it is given and none else, an empty environment, and
//!   the working directory that it is given. It leads its own session: a ctrl-C in our terminal is ours.
//! * Nobody but the warden waits for the exit, so that the status is never stolen.
//! * The warden needs no async runtime: log and exit status are kept up while ours is busy.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::{oneshot, watch};

use crate::confinement::{
    BindMount, Confinement, enter_network_namespace, enter_pid_namespace, mount_files,
};
use crate::console::ConsoleLog;
use crate::error::{InjectError, Result, VmmError};
use crate::inject::{open_pidfd, set_parent_death_signal};
use crate::vmm::VmmExit;

/// How much of a VMM's standard error is kept: its last lines explain an exit, and a VMM that
/// warns without end must not fill our memory.
const STDERR_TAIL_BYTES: usize = 4 << 10;
/// How long a killed VMM may take to be gone. Tearing down the memory of a large guest takes
/// a second; beyond this the kernel is stuck.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long whoever drops a VMM that is locked up waits for its end.
const DROP_WAIT: Duration = Duration::from_secs(2);
/// How often it looks.
const REAPED_LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// One read of the console or of standard error.
const READ_BYTES: usize = 4 << 10;
/// How often one source is read before the others have their turn: a guest that prints without
/// end must not hide what the VMM says. Together more than a socket's buffer (208 KiB) holds, so
/// that what is left of an ended VMM is read whole.
const READS_PER_TURN: usize = 64;
/// The warden reads and polls: it needs no deep stack.
const WARDEN_STACK_BYTES: usize = 128 << 10;

/// What is started.
#[derive(Debug)]
pub(crate) struct Spawn {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Its working directory.
    pub(crate) dir: PathBuf,
    /// What the VMM inherits, by the number that it has there.
    pub(crate) fds: Vec<(i32, OwnedFd)>,
    /// Where its standard output goes, if anywhere.
    pub(crate) stdout: Option<OwnedFd>,
    /// Our end of the guest's serial console, and where it is kept.
    pub(crate) console: Option<(UnixStream, ConsoleLog)>,
    /// What it is locked up in, if it is.
    pub(crate) confinement: Option<Confinement>,
    /// Whether it has a network namespace of its own, in which there is nothing.
    pub(crate) own_network: bool,
}

/// A VMM that was started. Dropping it kills it; the warden reaps it. For one that is locked up the drop
/// waits a moment: who removes the VMM's files next would take with them the record of a jail that is
/// still there.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<VmmExit>>,
    locked_up: bool,
}

impl Process {
    /// Starts the VMM under a warden of its own.
    pub(crate) async fn spawn(spawn: Spawn) -> Result<Self> {
        let path = spawn.program.clone();
        let locked_up = spawn.confinement.is_some();
        let failed = |source| VmmError::File {
            role: "VMM binary",
            path,
            source,
        };
        let (exit_sender, exit) = watch::channel(None);
        let (started_sender, started) = oneshot::channel();
        let at_work = AtWork::begin();
        let warden = thread::Builder::new()
            .name("torpor-warden".into())
            .stack_size(WARDEN_STACK_BYTES)
            .spawn(move || {
                let _at_work = at_work;
                warden(spawn, started_sender, &exit_sender);
            });
        if let Err(source) = warden {
            return Err(VmmError::Host {
                what: "start a thread for the VMM",
                source,
            });
        }
        // A fork and an exec: bounded by the kernel, not by anything that could hang.
        let started = started
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        let (pid, pidfd) = started.map_err(failed)?;
        Ok(Self {
            pid,
            pidfd,
            exit,
            locked_up,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Has the kernel kill it when its warden ends: for one that forgot it by changing its user.
    pub(crate) fn die_with_us(&self) -> std::result::Result<(), InjectError> {
        set_parent_death_signal(self.pid, self.pidfd.as_fd())
    }

    pub(crate) fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }

    pub(crate) fn exited(&self) -> Option<VmmExit> {
        self.exit.borrow().clone()
    }

    /// Waits until it has ended; needs this no longer.
    pub(crate) fn ended(&self) -> impl Future<Output = VmmExit> + Send + 'static {
        let mut exit = self.exit.clone();
        async move {
            let gone = exit.wait_for(Option::is_some).await;
            // The sender is dropped without a value only if the warden itself died.
            gone.ok()
                .and_then(|exit| exit.clone())
                .unwrap_or_else(|| VmmExit {
                    code: None,
                    signal: None,
                    stderr_tail: "its warden thread died".into(),
                })
        }
    }

    pub(crate) async fn wait_exit(&self) -> VmmExit {
        self.ended().await
    }

    /// The exit, if it comes within `patience`.
    pub(crate) async fn wait_exit_for(&self, patience: Duration) -> Option<VmmExit> {
        tokio::time::timeout(patience, self.wait_exit()).await.ok()
    }

    pub(crate) async fn kill(&self) -> Result<VmmExit> {
        self.send_kill();
        self.wait_exit_for(KILL_DEADLINE)
            .await
            .ok_or(VmmError::Timeout {
                command: "SIGKILL",
                deadline_ms: KILL_DEADLINE.as_millis(),
            })
    }

    /// Blocks until the warden has reaped it and taken away what surrounded it, within [`DROP_WAIT`].
    fn wait_until_reaped(&self) {
        let until = Instant::now() + DROP_WAIT;
        while self.exited().is_none() && Instant::now() < until {
            thread::sleep(REAPED_LOOK_INTERVAL);
        }
    }

    fn send_kill(&self) {
        // By pidfd: it can only hit this very process. ESRCH: it is gone, which is what we want.
        let sent = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
        if let Err(e) = sent
            && e != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.pid, "cannot kill the VMM: {e}");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.send_kill();
        if self.locked_up {
            self.wait_until_reaped();
        }
    }
}

/// How many wardens are at work, and where it is told that one has ended.
static WARDENS: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// A warden at work.
struct AtWork;

impl AtWork {
    fn begin() -> Self {
        *WARDENS.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        *WARDENS.0.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        WARDENS.1.notify_all();
    }
}

/// Waits, for ten seconds at most, until every VMM of this process has ended and what surrounded it is
/// taken away. For a process that ends, once it has let go of them all: wardens end with it.
pub fn wait_until_reaped() {
    let at_work = WARDENS.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = WARDENS
        .1
        .wait_timeout_while(at_work, KILL_DEADLINE, |at_work| *at_work > 0);
    let (at_work, _) = waited.unwrap_or_else(PoisonError::into_inner);
    if *at_work > 0 {
        tracing::warn!("{at_work} VMMs were killed and have not ended");
    }
}

type Started = io::Result<(u32, Arc<OwnedFd>)>;

fn warden(spawn: Spawn, started: oneshot::Sender<Started>, exit: &watch::Sender<Option<VmmExit>>) {
    let Spawn {
        program,
        args,
        dir,
        fds,
        stdout,
        console,
        confinement,
        own_network,
    } = spawn;
    let (mut mounts, mut ours, mut theirs, mut cgroup) = (None, None, None, None);
    if let Some(confined) = confinement {
        (mounts, cgroup) = (Some(confined.mounts), Some(confined.cgroup));
        (ours, theirs) = (Some(confined.stderr.0), Some(confined.stderr.1));
    }
    let around = Surroundings {
        lock_up: mounts,
        own_network,
    };
    let mut child = match start(&program, args, &dir, fds, (stdout, theirs), around) {
        Ok(child) => child,
        Err(e) => {
            // A caller that went away needs no answer.
            drop(started.send(Err(e)));
            return;
        }
    };
    let pidfd = match open_pidfd(child.id()) {
        Ok(pidfd) => Arc::new(pidfd),
        Err(e) => {
            end(&mut child);
            drop(started.send(Err(e)));
            return;
        }
    };
    let abandoned = started.send(Ok((child.id(), Arc::clone(&pidfd)))).is_err();
    if abandoned {
        end(&mut child);
        return;
    }
    let piped = child.stderr.take().map(OwnedFd::from);
    let stderr = ours.or(piped).map(File::from);
    let stderr_tail = watch_over(&pidfd, stderr, console);
    let status = child.wait();
    // Only an empty one can be taken away.
    drop(cgroup);
    exit.send_replace(Some(describe(status, stderr_tail)));
}

/// Kills and reaps a child that nobody will ever use.
fn end(child: &mut Child) {
    if let Err(e) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!("cannot end a VMM that was started in vain: {e}");
    }
}

fn start(
    program: &Path,
    args: Vec<OsString>,
    dir: &Path,
    fds: Vec<(i32, OwnedFd)>,
    (stdout, stderr): (Option<OwnedFd>, Option<OwnedFd>),
    around: Surroundings,
) -> io::Result<Child> {
    let highest_fd = fds.iter().map(|(number, _)| *number).fold(2, i32::max);
    let mappings = fds
        .into_iter()
        .map(|(child_fd, parent_fd)| FdMapping {
            parent_fd,
            child_fd,
        })
        .collect();
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(stdout.map_or_else(Stdio::null, Stdio::from))
        .stderr(stderr.map_or_else(Stdio::piped, Stdio::from));
    command
        .fd_mappings(mappings)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    let parent = std::process::id();
    if around.lock_up.is_some() {
        enter_pid_namespace()?;
    }
    // SAFETY: the closure runs between fork and exec and only makes system calls; it takes no
    // lock and allocates nothing. It runs after the closure of `fd_mappings`, which was
    // registered before it.
    unsafe { command.pre_exec(move || before_exec(parent, highest_fd, &around)) };
    command.spawn()
}

/// The namespaces that a child makes for itself.
#[derive(Debug)]
struct Surroundings {
    lock_up: Option<Vec<BindMount>>,
    own_network: bool,
}

/// What the child does for itself, with system calls only.
fn before_exec(parent: u32, highest_fd: i32, around: &Surroundings) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    forbid_merging();
    // The parent may have died before the line above: then nobody would ever kill us. From within a
    // process-id namespace it cannot be seen; who asked for one looks after that.
    let parent_now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    if around.own_network {
        enter_network_namespace()?;
    }
    if let Some(mounts) = &around.lock_up {
        mount_files(mounts)?;
    } else if parent_now != i32::try_from(parent).ok() {
        return Err(io::ErrorKind::NotConnected.into());
    }
    // Rust marks its descriptors close-on-exec; a C library in this process may not. A child
    // that lives for days must not hold someone's lock file open.
    let first = u32::try_from(highest_fd + 1).unwrap_or(3);
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets a flag on descriptors.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    // Kernels before 5.11 do not know it: then the descriptors stay as they are.
    if answer == -1 && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL) {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Keeps the kernel from merging the VMM's memory with equal pages of others (KSM), which whoever started
/// us may have asked for (PR_SET_MEMORY_MERGE, systemd's `MemoryKSM`): it is inherited. A merged page
/// loses the marks by which written pages are known, and its next write goes unseen.
fn forbid_merging() {
    const PR_SET_MEMORY_MERGE: libc::c_int = 67;
    // SAFETY: this prctl takes numbers only. Kernels before 6.4 do not know it, and merge nothing that
    // was not offered.
    unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) };
}

/// Reads standard error and the console until the process has ended and both are empty; returns
/// the end of what it said.
fn watch_over(
    pidfd: &OwnedFd,
    stderr: Option<File>,
    console: Option<(UnixStream, ConsoleLog)>,
) -> String {
    let mut said: VecDeque<u8> = VecDeque::new();
    let mut stderr = stderr.filter(|pipe| set_nonblocking(pipe));
    let (console, mut log) = console.unzip();
    let mut console = console.filter(|socket| socket.set_nonblocking(true).is_ok());
    loop {
        let ended = wait_for_something(pidfd, stderr.as_ref(), console.as_ref());
        let stderr_open = take_all(&mut stderr, |bytes| keep_tail(&mut said, bytes));
        let console_open = take_all(&mut console, |bytes| {
            if let Some(log) = &mut log {
                log.append(bytes);
            }
        });
        if ended {
            break;
        }
        if !stderr_open {
            stderr = None;
        }
        if !console_open {
            console = None;
        }
    }
    String::from_utf8_lossy(said.make_contiguous()).into_owned()
}

/// Sleeps until there is something to read, or the process has ended (true).
fn wait_for_something(
    pidfd: &OwnedFd,
    stderr: Option<&File>,
    console: Option<&UnixStream>,
) -> bool {
    let mut fds = vec![PollFd::new(pidfd, PollFlags::IN)];
    fds.extend(stderr.map(|pipe| PollFd::new(pipe, PollFlags::IN)));
    fds.extend(console.map(|socket| PollFd::new(socket, PollFlags::IN)));
    loop {
        // The one wait without a deadline: it ends with the process, whose end is in the set.
        match poll(&mut fds, None) {
            Ok(_) => return !fds[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => {}
            // Cannot be with valid descriptors; the blocking wait that follows is right too.
            Err(_) => return true,
        }
    }
}

/// Reads what is there, up to a turn's worth; false once the other end is closed.
fn take_all<R: Read>(reader: &mut Option<R>, mut each: impl FnMut(&[u8])) -> bool {
    let Some(reader) = reader else { return false };
    let mut buf = [0; READ_BYTES];
    for _ in 0..READS_PER_TURN {
        match reader.read(&mut buf) {
            Ok(0) => return false,
            Ok(len) => each(&buf[..len]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}

fn set_nonblocking(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_getfl(&fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK))
        .is_ok()
}

fn keep_tail(tail: &mut VecDeque<u8>, bytes: &[u8]) {
    tail.extend(bytes);
    let excess = tail.len().saturating_sub(STDERR_TAIL_BYTES);
    tail.drain(..excess);
}

fn describe(status: io::Result<ExitStatus>, stderr_tail: String) -> VmmExit {
    match status {
        Ok(status) => VmmExit {
            code: status.code(),
            signal: status.signal(),
            stderr_tail,
        },
        Err(e) => VmmExit {
            code: None,
            signal: None,
            stderr_tail: format!("{stderr_tail}{e}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vmms_memory_is_not_merged_though_ours_is() {
        let merges = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/ksm_stat")).ok()?;
            let line = stat
                .lines()
                .find_map(|line| line.strip_prefix("ksm_merge_any: "));
            line.map(|answer| answer == "yes")
        };
        let merge = |ours: libc::c_int| {
            // SAFETY: as above.
            unsafe { libc::prctl(67, ours, 0, 0, 0) };
        };
        merge(1);
        if merges(std::process::id()) != Some(true) {
            println!("not run: this kernel does not merge, or does not say so");
            return;
        }
        let spawn = Spawn {
            program: "/bin/sleep".into(),
            args: vec!["60".into()],
            dir: "/".into(),
            fds: Vec::new(),
            stdout: None,
            console: None,
            confinement: None,
            own_network: false,
        };
        let process = Process::spawn(spawn).await.unwrap();
        merge(0);
        assert_eq!(merges(process.pid()), Some(false));
    }
}
