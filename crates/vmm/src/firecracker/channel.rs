//! The agent's channel: a socket pair whose other end is carried to the guest's vsock.
//!
//! Firecracker's vsock is a unix socket on which one says `CONNECT port` and is answered `OK …`,
//! or cut off while nobody listens in the guest. So a task of ours connects until the guest's agent
//! is there, then carries bytes both ways. Whoever holds our end sees one channel that is there from
//! the start, as on QEMU.
//!
//! A connection does not survive a snapshot, not even in the machine that goes on: Firecracker tells
//! the guest so when it saves its state, by an event (TRANSPORT_RESET) on which the guest's kernel ends
//! every connection that it has by then, without a word to the host. The event has a queue of its own,
//! and the guest may take in new connections from the other queue first, which end with the others.
//! Firecracker holds new ones back until the event was acknowledged only from 1.16 on. Before, this is
//! what tells: the agent serves one host at a time, so it greets the next one (with one zero byte) only
//! when the one before has ended. Ours is therefore not closed over a snapshot, but held, silent, until
//! the next one was greeted on: the event alone can have ended it. So the carrier lets go before a state
//! is taken, connects when the vCPUs run again, and believes a connection only when it was greeted. (A try
//! that a state meets is closed, and the next greeting proves less; whoever pauses a guest talks to its
//! agent first, on a connection that was greeted.) What is to
//! be said waits in the socket pair meanwhile. When the guest's side ends by itself, it is connected to
//! again as well: bytes that were under way are lost then, and who misses an answer must open the
//! channel anew.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::firecracker::config::AGENT_VSOCK_PORT;

/// How often the guest is tried: its agent comes up once, and a resumed guest's is there at once.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
/// How long a guest may take to answer one try. One whose vCPUs stand still answers nothing.
const TRY_DEADLINE: Duration = Duration::from_secs(5);
/// How long the agent may take to greet at first. One that does not has lost the connection, …
const GREETING_PATIENCE_FIRST: Duration = Duration::from_secs(1);
/// … or is slow: it gets twice as long each time, up to this.
const GREETING_PATIENCE_MAX: Duration = Duration::from_secs(16);
/// How long the carrier may take to let go: it waits for nothing, but for its turn on a busy host.
const LET_GO_DEADLINE: Duration = Duration::from_secs(1);
/// What it says: an empty packet to those who read packets.
const GREETING: u8 = 0;
/// `OK 4294967295\n` is the longest answer.
const ANSWER_BYTES_MAX: usize = 32;

/// What carries the channel's bytes; ends when this is dropped.
#[derive(Debug)]
pub(super) struct Carrier {
    task: JoinHandle<()>,
    reachable: watch::Sender<bool>,
    /// Whether it has, or tries for, a connection.
    busy: watch::Receiver<bool>,
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Carrier {
    /// The guest can be connected to.
    pub(super) fn reach(&self) {
        self.reachable.send_replace(true);
    }

    /// It cannot any more. When what this returns is over, nothing is carried, and no connection tried
    /// for: even if [`Carrier::reach`] follows at once.
    pub(super) fn let_go(&self) -> impl Future<Output = ()> + Send + 'static {
        self.reachable.send_replace(false);
        let mut busy = self.busy.clone();
        async move {
            let idle = timeout(LET_GO_DEADLINE, busy.wait_for(|busy| !busy));
            // A carrier that has ended has let go as well.
            if idle.await.is_err() {
                tracing::warn!(
                    "the agent's channel was not let go in time: it may hang for a while"
                );
            }
        }
    }
}

/// Makes the channel: our end of it, and what carries the other. It closes when Firecracker has ended.
pub(super) fn open(
    vsock: PathBuf,
    reachable: bool,
    ended: impl Future<Output = ()> + Send + 'static,
) -> io::Result<(UnixStream, Carrier)> {
    let (ours, theirs) = UnixStream::pair()?;
    let (reachable, watched) = watch::channel(reachable);
    let (says_busy, busy) = watch::channel(false);
    let task = tokio::spawn(carry(theirs, vsock, watched, says_busy, ended));
    let carrier = Carrier {
        task,
        reachable,
        busy,
    };
    Ok((ours, carrier))
}

/// Until our end is closed, or the carrier dropped.
async fn carry(
    mut theirs: UnixStream,
    vsock: PathBuf,
    mut reachable: watch::Receiver<bool>,
    busy: watch::Sender<bool>,
    ended: impl Future<Output = ()>,
) {
    let (mut from_us, mut to_us) = theirs.split();
    tokio::pin!(ended);
    // The connection of before the last state.
    let mut held = None;
    loop {
        busy.send_replace(false);
        // Later its end shows by the connection, after all that it said.
        let go_on = tokio::select! {
            reachable = reachable.wait_for(|reachable| *reachable) => reachable.is_ok(),
            () = &mut ended => false,
        };
        if !go_on {
            return;
        }
        busy.send_replace(true);
        let connected = tokio::select! {
            // Looked at before the first try: whoever said it in between has seen us idle.
            biased;
            _ = reachable.wait_for(|reachable| !*reachable) => continue,
            connected = connect(&vsock, &mut held) => connected,
        };
        let Some(mut guest) = connected else {
            return;
        };
        let (mut from_guest, mut to_guest) = guest.split();
        tokio::select! {
            ended = copy(&mut from_us, &mut to_guest) => if ended.is_ok() {
                return;
            },
            ended = copy(&mut from_guest, &mut to_us) => {
                tracing::debug!(?ended, "the guest's end of the agent's channel is closed");
            }
            _ = reachable.wait_for(|reachable| !*reachable) => held = Some(guest),
        }
    }
}

/// Until it works: whoever waits for the agent has a deadline, and ends this task. `None`: the socket
/// is there and nobody behind it, so Firecracker has ended.
///
/// `held` is closed when the agent has greeted; or has not in time, since it may still serve that one: a
/// state that was to be taken, and was not, ends no connection.
async fn connect(vsock: &Path, held: &mut Option<UnixStream>) -> Option<UnixStream> {
    let mut patience = GREETING_PATIENCE_FIRST;
    loop {
        match timeout(TRY_DEADLINE, try_connect(vsock)).await {
            Ok(Ok(mut stream)) => match timeout(patience, be_greeted(&mut stream)).await {
                Ok(Ok(())) => {
                    *held = None;
                    return Some(stream);
                }
                Ok(Err(_)) => {}
                Err(_) => {
                    *held = None;
                    patience = longer(patience);
                }
            },
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return None,
            Ok(Err(_)) | Err(_) => {}
        }
        sleep(RETRY_INTERVAL).await;
    }
}

fn longer(patience: Duration) -> Duration {
    (patience * 2).min(GREETING_PATIENCE_MAX)
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

async fn be_greeted(stream: &mut UnixStream) -> io::Result<()> {
    match stream.read_u8().await? {
        GREETING => Ok(()),
        _ => Err(io::Error::other("something else listens in the guest")),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn the_guest_is_tried_until_its_agent_listens_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let (mut ours, carrier) = open(path.clone(), true, pending()).unwrap();
        ours.write_all(b"said early\n").await.unwrap();

        let listener = UnixListener::bind(&path).unwrap();
        for _refused in 0..2 {
            drop(accept(&listener).await);
        }
        let mut before = accept(&listener).await;
        before.write_all(b"OK 1073741824\n\0hello\n").await.unwrap();
        let mut line = String::new();
        before.read_line(&mut line).await.unwrap();
        assert_eq!(line, "said early\n");
        let mut heard = [0; 6];
        ours.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello\n");

        // A snapshot: what is said now is for the next connection.
        carrier.let_go().await;
        ours.write_all(b"said meanwhile\n").await.unwrap();
        carrier.reach();
        // One that dies without a word is not believed.
        let mut silent = accept(&listener).await;
        silent.write_all(b"OK 1073741824\n").await.unwrap();
        let mut stream = accept(&listener).await;
        stream.write_all(b"OK 1073741825\n\0").await.unwrap();
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "said meanwhile\n");
        line.clear();
        assert_eq!(before.read_line(&mut line).await.unwrap(), 0);

        drop(ours);
        line.clear();
        assert_eq!(stream.read_line(&mut line).await.unwrap(), 0);
    }

    /// The agent serves one host at a time, so that only the event can make it turn to the next.
    #[tokio::test]
    async fn a_connection_is_held_over_a_snapshot_until_the_next_one_is_greeted_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut ours, carrier) = open(path, true, pending()).unwrap();
        let mut before = accept(&listener).await;
        before.write_all(b"OK 1073741824\n\0new\n").await.unwrap();
        let mut heard = [0; 4];
        ours.read_exact(&mut heard).await.unwrap();
        for number in 0..3 {
            carrier.let_go().await;
            carrier.reach();
            let mut next = accept(&listener).await;
            next.write_all(b"OK 1073741825\n").await.unwrap();
            let mut byte = [0];
            let ended = timeout(Duration::from_millis(50), before.read(&mut byte)).await;
            assert!(ended.is_err(), "{number}: {ended:?}");
            // What the guest says before it hears of the event is for nobody.
            before.write_all(b"late\n").await.unwrap();
            next.write_all(b"\0new\n").await.unwrap();
            ours.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"new\n");
            // Closed; by a reset, since "late" was not read.
            let ended = before.read(&mut byte).await;
            assert!(matches!(ended, Ok(0) | Err(_)), "{number}: {ended:?}");
            before = next;
        }
    }

    #[tokio::test]
    async fn a_try_that_a_snapshot_meets_is_let_go_and_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (mut ours, carrier) = open(path, true, pending()).unwrap();
        for answer in ["", "OK 1073741824\n"] {
            // Not answered, or not greeted on, when the state is taken.
            let mut tried = accept(&listener).await;
            tried.write_all(answer.as_bytes()).await.unwrap();
            carrier.let_go().await;
            // However soon the guest goes on.
            carrier.reach();
            // Closed; by a reset where it had not read all.
            let read = tried.read_line(&mut String::new()).await;
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        }
        let mut stream = accept(&listener).await;
        stream.write_all(b"OK 1073741825\n\0hello\n").await.unwrap();
        let mut heard = [0; 6];
        ours.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello\n");
    }

    #[test]
    fn an_agent_that_is_slow_to_greet_gets_more_time_up_to_a_bound() {
        let mut patience = GREETING_PATIENCE_FIRST;
        let mut seconds = Vec::new();
        for _ in 0..6 {
            seconds.push(patience.as_secs());
            patience = longer(patience);
        }
        assert_eq!(seconds, [1, 2, 4, 8, 16, 16]);
    }

    #[tokio::test]
    async fn a_channel_to_a_firecracker_that_has_ended_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (mut ours, _carrier) = open(path.clone(), true, pending()).unwrap();
        assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 0);

        // One that ends while its guest stands still.
        let (mut ours, _carrier) = open(path, false, ready(())).unwrap();
        assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 0);
    }

    async fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "CONNECT 1024\n");
        stream
    }
}
