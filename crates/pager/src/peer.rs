//! The process at the other end of a Unix socket: which one it is, when it has ended, and its end.
//!
//! A number tells a process only while it lives: by the time that it is looked up, the number may
//! be another's, who would then be killed. So the process is asked for by the socket itself
//! (`SO_PEERPIDFD`, Linux 6.5). Older kernels know it by its number alone: there it is believed
//! if the connection stands after the look-up, and otherwise the peer is not served.
//!
//! The process is the one that connected. Whoever else got the socket from it is not known.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

/// How long a process that was killed may take to go.
const KILL_MAX: Duration = Duration::from_secs(5);

/// A process at the other end of a socket.
#[derive(Debug)]
pub struct Peer {
    /// Its id, in our namespace.
    pub pid: i32,
    /// `None`: it had ended before it was asked for.
    pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Whoever connected to this socket.
    ///
    /// # Errors
    /// It is not known, or cannot be told for certain; or no descriptor is left.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials: libc::ucred = option(stream, libc::SO_PEERCRED)?;
        let Some(pid) = Pid::from_raw(credentials.pid).filter(|_| credentials.pid > 0) else {
            return Err(io::Error::other(
                "its process is in no process namespace that the pager can see",
            ));
        };
        let pidfd = match of_socket(stream) {
            Err(Errno::NOPROTOOPT) => of_number(stream, pid)?,
            pidfd => pidfd?,
        };
        Ok(Self {
            pid: credentials.pid,
            pidfd,
        })
    }

    /// Readable once the process has ended; `None` if it had ended by the time it was looked at.
    #[must_use]
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.pidfd.as_ref()
    }

    /// Ends the process: a VMM that nobody serves hangs for ever.
    ///
    /// # Errors
    /// The host refuses: it is another user's.
    pub fn kill(&self) -> io::Result<()> {
        let Some(pidfd) = &self.pidfd else {
            return Ok(());
        };
        match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the process and waits, for a few seconds at most, until its memory has gone.
    pub(crate) fn kill_and_wait(&self) {
        if let Err(error) = self.kill() {
            tracing::error!(pid = self.pid, %error, "a VMM that hangs cannot be killed");
            return;
        }
        let Some(pidfd) = &self.pidfd else { return };
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        let timeout = Timespec::try_from(KILL_MAX).ok();
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(0) => tracing::warn!(pid = self.pid, "a VMM that was killed is still there"),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(pid = self.pid, %error, "a VMM's end was not waited for");
            }
        }
    }
}

/// The process as the socket remembers it. `None`: it has ended, which kernels before 6.16 tell
/// by one error or another.
fn of_socket(stream: &UnixStream) -> Result<Option<OwnedFd>, Errno> {
    match option(stream, libc::SO_PEERPIDFD) {
        // SAFETY: the kernel has just made this descriptor, for us.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(Errno::SRCH | Errno::INVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The process that has this number, if the peer has it still.
fn of_number(stream: &UnixStream, pid: Pid) -> io::Result<Option<OwnedFd>> {
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
    if fds[0].revents().is_empty() {
        return Ok(Some(pidfd));
    }
    Err(io::Error::other(
        "it closed its connection before its process could be told for certain",
    ))
}

/// What the kernel answers to a question about a socket.
trait Answer: Copy {
    /// One that the kernel writes over.
    const EMPTY: Self;
}

impl Answer for libc::c_int {
    const EMPTY: Self = -1;
}

impl Answer for libc::ucred {
    const EMPTY: Self = Self {
        pid: 0,
        uid: 0,
        gid: 0,
    };
}

/// Asks a socket for an option. Not by `rustix`: it lacks one of the two, and for the other a
/// process id of zero, which stands for a peer in another namespace, is no value of its type.
fn option<T: Answer>(stream: &UnixStream, name: libc::c_int) -> Result<T, Errno> {
    let mut answer = T::EMPTY;
    let bytes = size_of::<T>();
    let mut len = libc::socklen_t::try_from(bytes).map_err(|_| Errno::INVAL)?;
    let place = (&raw mut answer).cast();
    // SAFETY: the kernel writes at most `len` bytes to `place`, which has as many; and whatever it
    // writes is an answer: both types consist of integers alone.
    let asked = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            place,
            &raw mut len,
        )
    };
    if asked != 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    }
    if usize::try_from(len) != Ok(bytes) {
        return Err(Errno::NOPROTOOPT);
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    const CONNECTS: &str = "TORPOR_TEST_PEER_CONNECTS";
    const LISTENS: &str = "TORPOR_TEST_PEER_LISTENS";
    /// How often a number that is to come again is tried for: others start processes, too.
    const ATTEMPTS: usize = 50;

    fn role(name: &str) -> [String; 3] {
        let test = format!("peer::tests::{name}");
        ["--exact".to_owned(), test, "--nocapture".to_owned()]
    }

    /// Not a test: a process that connects and ends.
    #[test]
    fn connecting_role() {
        if let Ok(path) = std::env::var(CONNECTS) {
            drop(UnixStream::connect(path).unwrap());
        }
    }

    /// Not a test: a process in a namespace of its own, which is connected to from outside.
    #[test]
    fn listening_role() {
        if let Ok(path) = std::env::var(LISTENS) {
            let listener = UnixListener::bind(path).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let error = Peer::of(&stream).unwrap_err().to_string();
            assert!(error.contains("namespace"), "{error}");
        }
    }

    /// A connection whose other process has ended.
    fn connection_of_one_who_ended(dir: &Path) -> (UnixStream, u32) {
        let path = dir.join("socket");
        drop(std::fs::remove_file(&path));
        let listener = UnixListener::bind(&path).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(role("connecting_role"))
            .env(CONNECTS, path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        assert!(child.wait().unwrap().success());
        (listener.accept().unwrap().0, child.id())
    }

    /// A process with this number, if it can be had.
    fn process_numbered(pid: u32) -> Option<Child> {
        let last = format!("{}", pid - 1);
        std::fs::write("/proc/sys/kernel/ns_last_pid", last).unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        if child.id() == pid {
            return Some(child);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        None
    }

    fn is_root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            eprintln!("not run: this test needs root");
        }
        root
    }

    #[test]
    fn whoever_has_got_the_number_of_a_peer_that_ended_is_left_alone() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let found = (0..ATTEMPTS).find_map(|_| {
            let (stream, pid) = connection_of_one_who_ended(dir.path());
            process_numbered(pid).map(|innocent| (stream, innocent))
        });
        let (stream, mut innocent) = found.unwrap();
        Peer::of(&stream).unwrap().kill_and_wait();
        assert!(innocent.try_wait().unwrap().is_none(), "it was killed");
        // Nor is it taken for the peer where the kernel knows numbers alone.
        let pid = Pid::from_child(&innocent);
        let error = of_number(&stream, pid).unwrap_err().to_string();
        assert!(error.contains("for certain"), "{error}");
        innocent.kill().unwrap();
        innocent.wait().unwrap();
    }

    #[test]
    fn a_peer_that_is_there_is_known_by_its_socket_and_by_its_number() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&stream).unwrap();
        assert_eq!(u32::try_from(peer.pid), Ok(std::process::id()));
        assert!(peer.pidfd().is_some());
        let pid = Pid::from_raw(peer.pid).unwrap();
        assert!(of_number(&stream, pid).unwrap().is_some());
    }

    #[test]
    fn a_peer_of_another_namespace_is_an_error() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mut listening = Command::new("unshare")
            .args(["--pid", "--fork"])
            .arg(std::env::current_exe().unwrap())
            .args(role("listening_role"))
            .env(LISTENS, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                break stream;
            }
            assert!(listening.try_wait().unwrap().is_none(), "it has ended");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(listening.wait().unwrap().success());
        drop(stream);
    }
}
