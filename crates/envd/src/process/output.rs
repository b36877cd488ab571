//! Reads a process's pipes and terminal, and hands on what comes.
//!
//! After a process has ended, what it printed is in the pipe to the last byte, but the pipe may
//! stay open: a daemon that it left behind holds it. So the end does not wait for end of file: what
//! is there is read, then the end is told, and a pipe that is still open is drained into nothing
//! for as long as somebody holds it, so that the daemon is not killed by SIGPIPE.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::pty::Winsize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

use super::fanout::{Fanout, Piece};

/// Most bytes in a piece of output.
pub(crate) const PIECE_BYTES: usize = 32 * 1024;

/// Most that is read after a process has ended, bytes: what a pipe holds at most
/// (/proc/sys/fs/pipe-max-size by default). More is a left-over process that prints without pause.
const REST_BYTES_MAX: usize = 1024 * 1024;

/// Our side of a terminal.
#[derive(Debug, Clone)]
pub(crate) struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// Takes the master side, which must not block.
    pub(crate) fn new(master: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned, open, and neither replaced nor closed while registered.
        let registered = unsafe { AsyncFd::register(master) };
        Ok(Self(Arc::new(registered?)))
    }

    /// Writes everything, waiting for the process to read.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .0
                .async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Gives it another size; the process gets SIGWINCH.
    pub(crate) fn resize(&self, size: &Winsize) -> io::Result<()> {
        // SAFETY: TIOCSWINSZ reads one winsize; the descriptor is open as long as `self`.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &raw const *size) };
        if set < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// Something to read from.
pub(crate) enum Reader {
    Stdout(pipe::Receiver),
    Stderr(pipe::Receiver),
    Pty(Terminal),
}

impl Reader {
    fn piece(&self, bytes: Bytes) -> Piece {
        match self {
            Self::Stdout(_) => Piece::Stdout(bytes),
            Self::Stderr(_) => Piece::Stderr(bytes),
            Self::Pty(_) => Piece::Pty(bytes),
        }
    }

    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Stdout(pipe) | Self::Stderr(pipe) => pipe.readable().await,
            Self::Pty(terminal) => terminal
                .0
                .readable()
                .await
                .map(|mut ready| ready.retain_ready()),
        }
    }

    /// What is there now, asked of the kernel itself and not of the event loop's memory.
    fn read_now(&self, buf: &mut [u8]) -> Option<usize> {
        let fd = match self {
            Self::Stdout(pipe) | Self::Stderr(pipe) => pipe.as_fd(),
            Self::Pty(terminal) => terminal.0.as_fd(),
        };
        match nix::unistd::read(fd, buf) {
            Ok(len) => Some(len),
            Err(Errno::EAGAIN) => None,
            Err(_broken) => Some(0),
        }
    }

    /// What is there as far as the event loop knows: `None` if nothing is, 0 at the end.
    fn try_read(&self, buf: &mut [u8]) -> Option<usize> {
        let read = match self {
            Self::Stdout(pipe) | Self::Stderr(pipe) => pipe.try_read(buf),
            Self::Pty(terminal) => terminal.0.try_io(Interest::READABLE, |fd| {
                // A terminal that nobody holds any more says EIO.
                match nix::unistd::read(fd.as_fd(), buf) {
                    Err(Errno::EIO) => Ok(0),
                    read => Ok(read?),
                }
            }),
        };
        match read {
            Ok(len) => Some(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(_broken) => Some(0),
        }
    }
}

/// Publishes what `reader` yields until its end, or until `ended` and nothing is left to read.
pub(crate) async fn pump(reader: Reader, fanout: Arc<Fanout>, ended: CancellationToken) {
    let mut buf = vec![0; PIECE_BYTES];
    while !ended.is_cancelled() {
        tokio::select! {
            readable = reader.readable() => if readable.is_err() { return },
            () = ended.cancelled() => break,
        }
        match reader.try_read(&mut buf) {
            Some(0) => return,
            Some(len) => publish(&reader, &fanout, &buf[..len]).await,
            None => {}
        }
    }
    let mut rest = 0;
    while rest < REST_BYTES_MAX {
        match reader.read_now(&mut buf) {
            Some(0) => return,
            Some(len) => {
                rest += len;
                publish(&reader, &fanout, &buf[..len]).await;
            }
            None => break,
        }
    }
    tokio::spawn(drain(reader));
}

async fn publish(reader: &Reader, fanout: &Fanout, bytes: &[u8]) {
    fanout
        .publish(&reader.piece(Bytes::copy_from_slice(bytes)))
        .await;
}

/// Reads into nothing until the end.
async fn drain(reader: Reader) {
    let mut buf = [0; 4096];
    while reader.readable().await.is_ok() && reader.try_read(&mut buf) != Some(0) {}
}
