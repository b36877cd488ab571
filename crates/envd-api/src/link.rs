//! The link: sessions over a byte pipe that outlives both its ends.
//!
//! A virtio-serial port is a pipe with a memory. When a guest is snapshotted, a packet may be half
//! written; when it is resumed, another host process holds the other end and half a packet of a
//! conversation that is over still sits in the guest's buffers. So:
//!
//! - Bytes travel in packets ([`packet`]) between zero bytes (COBS): whoever comes in late waits for
//!   the next zero byte and is in step.
//! - Every packet bears the id of its session, chosen at random by the host at each connect. What
//!   bears another id is thrown away, by both sides.
//! - The guest never speaks first (its writes have nowhere to go while no host is there). The host
//!   says `Hello` with its id, again and again until the guest says `Ready` with the same id.
//! - A `Hello` with a new id ends the session before it ([`Acceptor`]).
//!
//! A [`Session`] is an ordered, reliable, flow-controlled byte stream, made for [`crate::mux`].
//! The link does not detect a silent peer (deadlines are the callers' business), does not encrypt,
//! and does not repair bytes: below it is memory, not a wire.
//!
//! Limits: a packet is at most [`packet::PACKET_BYTES_MAX`], each queue [`QUEUE_PACKETS`] deep. A
//! side that does not read stops the other side's writes, nothing grows.

pub mod packet;
mod session;

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use packet::{Decoder, Kind, LINK_VERSION};
pub use session::{Acceptor, Session};

/// Depth of each queue between the port, the link and a session. Four packets of 16 KiB keep both
/// sides busy; more is only latency.
pub const QUEUE_PACKETS: usize = 4;

/// How long the host waits for `Ready` before it says `Hello` once more. A guest that runs answers
/// in a few milliseconds; one that still boots gets a few hundred bytes to read when it is up.
pub const HELLO_INTERVAL: Duration = Duration::from_millis(250);

/// Size of one read from the port, bytes: the most that a virtio-serial read hands out.
pub const READ_BYTES: usize = 32 * 1024;

/// What comes out of the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEvent {
    /// Bytes, at most a few [`READ_BYTES`].
    Bytes(Bytes),
    /// The peer's end is closed; it may come back.
    PeerGone,
}

/// The two directions of a port, as bounded queues. Who fills them (tasks over a socket, threads
/// over a character device) is not the link's business. When `incoming` ends the port is gone for
/// good.
#[derive(Debug)]
pub struct RawPort {
    /// Bytes from the peer.
    pub incoming: mpsc::Receiver<PortEvent>,
    /// Bytes for the peer, each item a few whole packets.
    pub outgoing: mpsc::Sender<Bytes>,
}

impl RawPort {
    /// Serves a connected stream: its end of file is the end of the port. Two tasks carry the
    /// bytes; both end when the link lets go of the port, and drop the stream without shutting it
    /// down.
    pub fn over<S>(stream: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (incoming_tx, incoming) = mpsc::channel(QUEUE_PACKETS);
        let (outgoing, outgoing_rx) = mpsc::channel(QUEUE_PACKETS);
        let (reader, writer) = tokio::io::split(stream);
        tokio::spawn(read_port(reader, incoming_tx));
        tokio::spawn(write_port(writer, outgoing_rx));
        Self { incoming, outgoing }
    }
}

async fn read_port(mut reader: impl AsyncRead + Unpin, incoming: mpsc::Sender<PortEvent>) {
    let mut buf = vec![0; READ_BYTES];
    loop {
        let read = tokio::select! {
            read = reader.read(&mut buf) => read,
            () = incoming.closed() => return,
        };
        match read {
            Ok(0) => return,
            Ok(len) => {
                let bytes = Bytes::copy_from_slice(&buf[..len]);
                if incoming.send(PortEvent::Bytes(bytes)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "the agent's channel cannot be read any more");
                return;
            }
        }
    }
}

async fn write_port(mut writer: impl AsyncWrite + Unpin, mut outgoing: mpsc::Receiver<Bytes>) {
    // No shutdown at the end: the socket is the VMM's port, and the next session may want it.
    while let Some(bytes) = outgoing.recv().await {
        if let Err(error) = writer.write_all(&bytes).await {
            tracing::debug!(%error, "the agent's channel cannot be written any more");
            return;
        }
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The port ended: the VMM is gone.
    #[error("the agent's channel was closed before the guest answered (has the VM ended?)")]
    Closed,
    /// Nobody answered in time.
    #[error(
        "the guest did not answer on the agent's channel within {} ms: it still boots, or its agent does not run (see the guest's console)",
        .waited.as_millis()
    )]
    Silent {
        /// How long we waited.
        waited: Duration,
    },
    /// The guest's envd speaks another link.
    #[error(
        "the guest's agent speaks link version {guest}, this host speaks {LINK_VERSION}: rebuild the template with this torpor"
    )]
    Version {
        /// The guest's version.
        guest: u8,
    },
}

/// Host side: opens session `id` on `port` and waits for the guest at most `patience`.
///
/// `id` must be fresh for each call (random). Dropping the future lets go of the port.
///
/// # Errors
/// [`LinkError`]: closed, silent or of another version.
pub async fn connect(mut port: RawPort, id: u64, patience: Duration) -> Result<Session, LinkError> {
    let started = Instant::now();
    let deadline = started + patience;
    let silent = || LinkError::Silent {
        waited: started.elapsed(),
    };
    let mut decoder = Decoder::new();
    let hello = packet::encode_fresh(Kind::Hello, id, &[LINK_VERSION]);
    loop {
        tokio::time::timeout_at(deadline, port.outgoing.send(hello.clone()))
            .await
            .map_err(|_elapsed| silent())?
            .map_err(|_closed| LinkError::Closed)?;
        let again = deadline.min(Instant::now() + HELLO_INTERVAL);
        loop {
            let event = match tokio::time::timeout_at(again, port.incoming.recv()).await {
                Ok(Some(event)) => event,
                Ok(None) => return Err(LinkError::Closed),
                Err(_elapsed) if Instant::now() >= deadline => return Err(silent()),
                Err(_elapsed) => break,
            };
            let PortEvent::Bytes(bytes) = event else {
                continue;
            };
            let packets = decoder.feed(&bytes);
            let ready = packets
                .iter()
                .position(|p| p.kind == Kind::Ready && p.session == id);
            if let Some(at) = ready {
                let version = packets[at].payload.first().copied().unwrap_or_default();
                if version != LINK_VERSION {
                    return Err(LinkError::Version { guest: version });
                }
                return Ok(session::established(port, decoder, id, packets, at));
            }
        }
    }
}
