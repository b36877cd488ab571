//! QMP: JSON commands over an inherited socketpair, by the `qapi` crate.
//!
//! What this adds to the crate:
//! * **A deadline on every command.** QEMU's main loop can wait for a guest page that nobody
//!   serves, and then answers nothing.
//! * **A gate.** One command at a time. A command that was given up is still owed an answer,
//!   and `qapi` would take that answer for the next one's (or panic over it). So each command
//!   runs in a task of its own that keeps the gate until its answer is there, whether its caller
//!   still waits or not; and there is never more than one such task.
//! * **Descriptors.** QEMU keeps descriptors that came with any byte on the socket until a
//!   command takes them. A space between two commands means nothing in JSON: we send one, with
//!   the descriptor as ancillary data, right before `getfd`.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use qapi::ExecuteError;
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{QmpCommand, getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::WriteHalf;
use tokio::net::UnixStream;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, timeout_at};

use crate::error::{Result, VmmError};

/// How long an ordinary command may take. QEMU answers within a millisecond; what takes longer
/// is a loaded host, and this is far beyond what one excuses.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// How long QEMU may take from its start to its first word: 40 ms on an idle host, seconds on
/// one that reads the binary from a cold disk.
const GREETING_DEADLINE: Duration = Duration::from_secs(30);

type Service = QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>;

/// A QMP connection that has been negotiated.
pub(super) struct Qmp {
    service: Service,
    /// The same socket, for the bytes that carry descriptors.
    socket: OwnedFd,
    gate: Arc<Mutex<()>>,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl Qmp {
    /// Waits for QEMU's greeting and leaves negotiation mode.
    pub(super) async fn open(socket: StdUnixStream) -> Result<Self> {
        const WHAT: &str = "its greeting";
        let broken = |source| VmmError::Broken {
            command: WHAT,
            source,
        };
        socket.set_nonblocking(true).map_err(broken)?;
        let descriptors = socket.try_clone().map_err(broken)?.into();
        let stream = UnixStream::from_std(socket).map_err(broken)?;
        let negotiate = async { QmpStreamTokio::open(stream).await?.negotiate().await };
        let stream = tokio::time::timeout(GREETING_DEADLINE, negotiate)
            .await
            .map_err(|_| VmmError::Timeout {
                command: WHAT,
                deadline_ms: GREETING_DEADLINE.as_millis(),
            })?
            .map_err(broken)?;
        // The reader ends with the socket, or when the service is dropped.
        let (service, _reader) = stream.spawn_tokio();
        Ok(Self {
            service,
            socket: descriptors,
            gate: Arc::default(),
        })
    }

    /// Runs a command.
    pub(super) async fn execute<C>(&self, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + 'static,
        C::Ok: Send + 'static,
    {
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let gate = self.pass_gate(C::NAME, deadline).await?;
        self.run(command, gate, deadline).await
    }

    /// Gives QEMU a descriptor under a name, for a command that takes it by that name.
    pub(super) async fn send_descriptor(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let gate = self.pass_gate("getfd", deadline).await?;
        send_with_space(self.socket.as_fd(), fd).map_err(|source| VmmError::Broken {
            command: "getfd",
            source,
        })?;
        self.run(
            getfd {
                fdname: name.to_owned(),
            },
            gate,
            deadline,
        )
        .await?;
        Ok(())
    }

    async fn pass_gate(
        &self,
        command: &'static str,
        deadline: Instant,
    ) -> Result<OwnedMutexGuard<()>> {
        timeout_at(deadline, Arc::clone(&self.gate).lock_owned())
            .await
            .map_err(|_| timed_out(command))
    }

    async fn run<C>(
        &self,
        command: C,
        gate: OwnedMutexGuard<()>,
        deadline: Instant,
    ) -> Result<C::Ok>
    where
        C: QmpCommand + 'static,
        C::Ok: Send + 'static,
    {
        let answer = self.service.execute(command);
        let task = tokio::spawn(async move {
            let answer = answer.await;
            drop(gate);
            answer
        });
        match timeout_at(deadline, task).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(ExecuteError::Qapi(refusal)))) => Err(VmmError::Refused {
                command: C::NAME,
                reason: refusal.desc,
            }),
            Ok(Ok(Err(ExecuteError::Io(source)))) => Err(VmmError::Broken {
                command: C::NAME,
                source,
            }),
            // The task is neither aborted nor meant to panic; the runtime may be shutting down.
            Ok(Err(join)) => Err(VmmError::Broken {
                command: C::NAME,
                source: io::Error::other(join),
            }),
            Err(_) => Err(timed_out(C::NAME)),
        }
    }
}

fn timed_out(command: &'static str) -> VmmError {
    VmmError::Timeout {
        command,
        deadline_ms: COMMAND_DEADLINE.as_millis(),
    }
}

/// One space, and a descriptor with it. The socket's buffer is empty whenever we are here (the
/// gate is ours), so that a non-blocking send cannot fail for want of room.
fn send_with_space(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(b" ")],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    if sent == 1 {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}
