//! A session's byte stream, and both sides' routing of packets to it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use super::packet::{self, Decoder, Kind, LINK_VERSION, PAYLOAD_BYTES_MAX, Packet};
use super::{PortEvent, QUEUE_PACKETS, RawPort};

/// An ordered byte stream to the peer, for as long as the session lasts.
///
/// Reading gives end of file when the session is over (another began, or the port is gone); writing
/// then fails with `BrokenPipe` or goes nowhere. Bytes are sent when a packet is full or flushed.
#[derive(Debug)]
pub struct Session {
    id: u64,
    incoming: mpsc::Receiver<Bytes>,
    unread: Bytes,
    unsent: Vec<u8>,
    outgoing: PollSender<Bytes>,
}

impl Session {
    fn new(id: u64, outgoing: mpsc::Sender<Bytes>) -> (Self, mpsc::Sender<Bytes>) {
        let (data, incoming) = mpsc::channel(QUEUE_PACKETS);
        let session = Self {
            id,
            incoming,
            unread: Bytes::new(),
            unsent: Vec::with_capacity(PAYLOAD_BYTES_MAX),
            outgoing: PollSender::new(outgoing),
        };
        (session, data)
    }

    /// The id that the host chose.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unsent.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the agent's channel is closed");
        ready!(self.outgoing.poll_reserve(cx)).map_err(gone)?;
        let packet = packet::encode(Kind::Data, self.id, &self.unsent);
        self.unsent.clear();
        Poll::Ready(self.outgoing.send_item(packet).map_err(gone))
    }
}

impl AsyncRead for Session {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        while self.unread.is_empty() {
            match ready!(self.incoming.poll_recv(cx)) {
                Some(bytes) => self.unread = bytes,
                None => return Poll::Ready(Ok(0)),
            }
        }
        let len = buf.len().min(self.unread.len());
        self.unread.copy_to_slice(&mut buf[..len]);
        Poll::Ready(Ok(len))
    }
}

impl AsyncWrite for Session {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.unsent.len() == PAYLOAD_BYTES_MAX {
            ready!(self.poll_send(cx))?;
        }
        let len = buf.len().min(PAYLOAD_BYTES_MAX - self.unsent.len());
        self.unsent.extend_from_slice(&buf[..len]);
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx)
    }
}

/// Host side, after `Ready`: routes the session's packets to it until one of them is gone.
/// `packets[..=ready]` are already dealt with.
pub(super) fn established(
    port: RawPort,
    mut decoder: Decoder,
    id: u64,
    packets: Vec<Packet>,
    ready: usize,
) -> Session {
    let (session, data) = Session::new(id, port.outgoing);
    let mut incoming = port.incoming;
    tokio::spawn(async move {
        let mut packets: Vec<Packet> = packets.into_iter().skip(ready + 1).collect();
        loop {
            for packet in packets.drain(..) {
                let ours = packet.kind == Kind::Data && packet.session == id;
                if ours && data.send(packet.payload).await.is_err() {
                    return;
                }
            }
            let event = tokio::select! {
                event = incoming.recv() => event,
                () = data.closed() => return,
            };
            match event {
                Some(PortEvent::Bytes(bytes)) => packets = decoder.feed(&bytes),
                Some(PortEvent::PeerGone) | None => return,
            }
        }
    });
    session
}

/// Guest side: waits for hosts, one after the other.
#[derive(Debug)]
pub struct Acceptor {
    port: RawPort,
    decoder: Decoder,
    /// Decoded, not yet routed; in reverse, so that the next one is popped.
    backlog: Vec<Packet>,
    current: Option<(u64, mpsc::Sender<Bytes>)>,
}

impl Acceptor {
    /// Listens on `port`.
    #[must_use]
    pub fn new(port: RawPort) -> Self {
        Self {
            port,
            decoder: Decoder::new(),
            backlog: Vec::new(),
            current: None,
        }
    }

    /// Routes packets to the current session until a host opens another: then the current one is
    /// over and the new one is returned. `None` when the port is gone.
    ///
    /// Must be polled all the time (it is what feeds the current session) and is not cancel safe:
    /// a packet on its way into the session would be lost.
    pub async fn next(&mut self) -> Option<Session> {
        loop {
            while let Some(packet) = self.backlog.pop() {
                match packet.kind {
                    Kind::Hello => {
                        if let Some(session) = self.hello(packet.session).await? {
                            return Some(session);
                        }
                    }
                    Kind::Data => self.route(packet).await,
                    Kind::Ready => {}
                }
            }
            match self.port.incoming.recv().await? {
                PortEvent::Bytes(bytes) => {
                    self.backlog = self.decoder.feed(&bytes);
                    self.backlog.reverse();
                }
                PortEvent::PeerGone => {
                    self.current = None;
                    self.decoder.reset();
                }
            }
        }
    }

    /// Answers a `Hello`. A session only if the id is new; `None` outside when the port is gone.
    async fn hello(&mut self, id: u64) -> Option<Option<Session>> {
        let fresh = self
            .current
            .as_ref()
            .is_none_or(|(current, _)| *current != id);
        let session = if fresh {
            let (session, data) = Session::new(id, self.port.outgoing.clone());
            self.current = Some((id, data));
            Some(session)
        } else {
            None
        };
        let ready = packet::encode_fresh(Kind::Ready, id, &[LINK_VERSION]);
        self.port.outgoing.send(ready).await.ok()?;
        Some(session)
    }

    async fn route(&mut self, packet: Packet) {
        let Some((id, data)) = &self.current else {
            return;
        };
        if *id == packet.session && data.send(packet.payload).await.is_err() {
            // The mux let go of the session (its peer broke the protocol): nobody reads it.
            self.current = None;
        }
    }
}
