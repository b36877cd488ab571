//! The agent's channel: a socket pair whose other end is carried to the guest's vsock.
//!
//! Firecracker's vsock is a unix socket on which one says `CONNECT port` and is answered `OK …`,
//! or cut off while nobody listens in the guest. So a task of ours connects until the guest's agent
//! is there, then carries bytes both ways. Whoever holds our end sees one channel that is there from
//! the start, as on QEMU.
//!
//! A connection does not survive a snapshot, not even in the machine that goes on: Firecracker tells
//! the guest so when it saves its state. So the carrier is told to begin anew right after that, while
//! the vCPUs stand still; what is to be said waits in the socket pair meanwhile. When the guest's side
//! ends by itself, it is connected to again as well: bytes that were under way are lost then, and a
//! channel that notices must be opened anew by its owner.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::firecracker::config::AGENT_VSOCK_PORT;

/// How often the guest is tried: its agent comes up once, and a resumed guest's is there at once.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// How long one try may take. A guest whose vCPUs stand still answers nothing.
const TRY_DEADLINE: Duration = Duration::from_secs(5);
/// `OK 4294967295\n` is the longest answer.
const ANSWER_BYTES_MAX: usize = 32;

/// What carries the channel's bytes; ends when this is dropped.
#[derive(Debug)]
pub(super) struct Carrier {
    task: JoinHandle<()>,
    anew: Arc<Notify>,
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Carrier {
    /// Lets go of the guest's end, and tries for a new one.
    pub(super) fn begin_anew(&self) {
        self.anew.notify_one();
    }
}

/// Makes the channel: our end of it, and what carries the other.
pub(super) fn open(vsock: PathBuf) -> io::Result<(UnixStream, Carrier)> {
    let (ours, theirs) = UnixStream::pair()?;
    let anew = Arc::new(Notify::new());
    let told = Arc::clone(&anew);
    let task = tokio::spawn(async move { carry(theirs, &vsock, &told).await });
    Ok((ours, Carrier { task, anew }))
}

/// Until our end is closed.
async fn carry(mut theirs: UnixStream, vsock: &Path, anew: &Notify) {
    let (mut from_us, mut to_us) = theirs.split();
    loop {
        let mut guest = connect(vsock).await;
        let (mut from_guest, mut to_guest) = guest.split();
        tokio::select! {
            ended = copy(&mut from_us, &mut to_guest) => if ended.is_ok() {
                return;
            },
            ended = copy(&mut from_guest, &mut to_us) => {
                tracing::debug!(?ended, "the guest's end of the agent's channel is closed");
            }
            () = anew.notified() => {}
        }
    }
}

/// Until it works: whoever waits for the agent has a deadline, and ends this task.
async fn connect(vsock: &Path) -> UnixStream {
    loop {
        if let Ok(Ok(stream)) = timeout(TRY_DEADLINE, try_connect(vsock)).await {
            return stream;
        }
        sleep(RETRY_INTERVAL).await;
    }
}

async fn try_connect(vsock: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock).await?;
    let question = format!("CONNECT {AGENT_VSOCK_PORT}\n");
    stream.write_all(question.as_bytes()).await?;
    // Byte by byte: what follows the line is the guest's.
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        if answer.len() >= ANSWER_BYTES_MAX {
            return Err(io::Error::other("no answer to CONNECT"));
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::Error::other("refused by the guest"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn the_guest_is_tried_until_its_agent_listens_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let (mut ours, carrier) = open(path.clone()).unwrap();
        ours.write_all(b"said early\n").await.unwrap();

        let listener = UnixListener::bind(&path).unwrap();
        for refused in [true, true, false] {
            let mut stream = accept(&listener).await;
            if refused {
                continue;
            }
            stream.write_all(b"OK 1073741824\nhello\n").await.unwrap();
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            assert_eq!(line, "said early\n");
            let mut heard = [0; 6];
            ours.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"hello\n");

            // A snapshot: what is said now is for the next connection.
            carrier.begin_anew();
            line.clear();
            assert_eq!(stream.read_line(&mut line).await.unwrap(), 0);
        }
        ours.write_all(b"said meanwhile\n").await.unwrap();
        let mut stream = accept(&listener).await;
        stream.write_all(b"OK 1073741825\n").await.unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "said meanwhile\n");

        drop(ours);
        line.clear();
        assert_eq!(stream.read_line(&mut line).await.unwrap(), 0);
    }

    async fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "CONNECT 1024\n");
        stream
    }
}
