//! Many streams over one session: yamux, driven by one task per side.
//!
//! The host opens streams ([`Mux`]), the guest accepts them ([`serve`]). Each stream has its own
//! flow control, so that one that is not read holds nobody else up. Both sides stay within
//! twice [`STREAMS_MAX`] streams and 256 KiB of unread bytes for each: that bounds what a peer
//! can make us hold.
//!
//! When the session ends, every stream reads end of file or fails; nothing is retried here.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};
use yamux::{Config, Connection, Mode};

use crate::link::Session;

/// Most streams that the host holds open at once. A sandbox's processes, probes and a few dozen
/// connections to its ports fit.
pub const STREAMS_MAX: usize = 128;

/// Most streams that a side tolerates. Twice what the host opens, because either side forgets a
/// closed stream a little later than the other, and yamux ends the session over one too many.
const STREAMS_TOLERATED: usize = 2 * STREAMS_MAX;

/// Receive window of each stream, bytes: yamux's own least. No more is needed, the round trip is
/// half a millisecond.
const WINDOW_BYTES: usize = yamux::DEFAULT_CREDIT as usize;

/// Openings that may wait for the driver: it takes them at once.
const OPENINGS: usize = 8;

fn config() -> Config {
    let mut config = Config::default();
    // Order matters: yamux asserts window ≥ streams × 256 KiB at each step.
    config.set_max_num_streams(STREAMS_TOLERATED);
    config.set_max_connection_receive_window(Some(STREAMS_TOLERATED * WINDOW_BYTES));
    config
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MuxError {
    /// The session is over.
    #[error("the channel to the guest is closed")]
    Closed,
    /// Too many streams at once.
    #[error(
        "{STREAMS_MAX} streams to the guest are already open: close some (each running process stream and each forwarded connection takes one)"
    )]
    TooManyStreams,
}

/// A stream to or from the guest. Dropping it resets it; `shutdown` ends our direction only.
#[derive(Debug)]
pub struct MuxStream {
    inner: Compat<yamux::Stream>,
    _place: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for MuxStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

type Opened = Result<yamux::Stream, MuxError>;

/// The host's end: opens streams. Cheap to clone; the session ends with the last clone.
#[derive(Debug, Clone)]
pub struct Mux {
    openings: mpsc::Sender<oneshot::Sender<Opened>>,
    places: Arc<Semaphore>,
    closed: watch::Receiver<bool>,
}

impl Mux {
    /// Takes a session; a task drives it until the session or the last [`Mux`] and stream is gone.
    #[must_use]
    pub fn client(session: Session) -> Self {
        let (openings, requests) = mpsc::channel(OPENINGS);
        let (closed_tx, closed) = watch::channel(false);
        let places = Arc::new(Semaphore::new(STREAMS_MAX));
        let idle = Arc::clone(&places);
        tokio::spawn(async move {
            drive_client(session, requests, idle).await;
            closed_tx.send_replace(true);
        });
        Self {
            openings,
            places,
            closed,
        }
    }

    /// Opens a stream. The peer learns of it with its first bytes.
    ///
    /// # Errors
    /// [`MuxError`]. Cancel safe.
    pub async fn open(&self) -> Result<MuxStream, MuxError> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_full| MuxError::TooManyStreams)?;
        let (answer, opened) = oneshot::channel();
        self.openings
            .send(answer)
            .await
            .map_err(|_closed| MuxError::Closed)?;
        let stream = opened.await.map_err(|_closed| MuxError::Closed)??;
        Ok(MuxStream {
            inner: stream.compat(),
            _place: Some(place),
        })
    }

    /// Whether the session is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until the session is over. Cancel safe.
    pub async fn closed(&self) {
        let mut closed = self.closed.clone();
        // An error means that the driver's task is gone: closed as well.
        closed.wait_for(|closed| *closed).await.ok();
    }
}

async fn drive_client(
    session: Session,
    mut requests: mpsc::Receiver<oneshot::Sender<Opened>>,
    places: Arc<Semaphore>,
) {
    let mut connection = Connection::new(session, config(), Mode::Client);
    let mut waiting: Option<oneshot::Sender<Opened>> = None;
    let mut asked_for = true;
    // All streams given back: every place is free again.
    let mut idle = Box::pin(async move {
        let all = u32::try_from(STREAMS_MAX).unwrap_or(u32::MAX);
        places.acquire_many_owned(all).await.ok()
    });
    std::future::poll_fn(|cx| {
        loop {
            if waiting.is_none() && asked_for {
                match requests.poll_recv(cx) {
                    Poll::Ready(Some(request)) => waiting = Some(request),
                    Poll::Ready(None) => asked_for = false,
                    Poll::Pending => {}
                }
            }
            if let Some(answer) = waiting.take() {
                match connection.poll_new_outbound(cx) {
                    Poll::Ready(opened) => {
                        let opened = opened.map_err(|error| {
                            tracing::debug!(%error, "no stream to the guest");
                            MuxError::Closed
                        });
                        // The asker may have given up: then the stream goes with the answer.
                        answer.send(opened).ok();
                        continue;
                    }
                    Poll::Pending => waiting = Some(answer),
                }
            }
            break;
        }
        match connection.poll_next_inbound(cx) {
            // The guest opens no streams: refuse by dropping.
            Poll::Ready(Some(Ok(unasked))) => {
                drop(unasked);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::debug!(%error, "the channel to the guest ended");
                Poll::Ready(())
            }
            Poll::Ready(None) => Poll::Ready(()),
            Poll::Pending if !asked_for => idle.poll_unpin(cx).map(|_all_places| ()),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
}

/// The guest's end: hands each stream that the host opens to `accept` (which must not block, and
/// spawns what it needs) until the session is over.
pub async fn serve(session: Session, mut accept: impl FnMut(MuxStream)) {
    let mut connection = Connection::new(session, config(), Mode::Server);
    loop {
        match std::future::poll_fn(|cx| connection.poll_next_inbound(cx)).await {
            Some(Ok(stream)) => accept(MuxStream {
                inner: stream.compat(),
                _place: None,
            }),
            Some(Err(error)) => {
                tracing::debug!(%error, "the host's session ended");
                return;
            }
            None => return,
        }
    }
}
