//! The channel: one session with the guest, any number of streams to its ports.

use std::time::Duration;

use envd_api::link::{self, RawPort};
use envd_api::mux::{Mux, MuxStream};
use envd_api::port;
use tokio::net::UnixStream;

use crate::GuestError;

/// A connection to a guest port: bytes both ways. Dropping it resets it.
pub type PortStream = MuxStream;

/// How long a stream may take to open. The guest dials its own loopback: milliseconds.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// The session with a guest's envd. Cheap to clone; the session ends, and with it every stream,
/// when the last clone and stream is dropped or another session begins.
#[derive(Debug, Clone)]
pub struct Channel {
    mux: Mux,
}

impl Channel {
    /// Begins a session on the VMM's end of the agent port and waits for envd, at most `patience`:
    /// milliseconds for a resumed guest, the whole boot for a new one.
    ///
    /// Any earlier session on this port is over for the guest, its streams are reset; the guest's
    /// processes go on.
    ///
    /// # Errors
    /// [`GuestError::Link`]: closed, silent, other version.
    pub async fn connect(stream: UnixStream, patience: Duration) -> Result<Self, GuestError> {
        let mut id = [0; 8];
        random(&mut id)?;
        let session =
            link::connect(RawPort::over(stream), u64::from_le_bytes(id), patience).await?;
        Ok(Self {
            mux: Mux::client(session),
        })
    }

    /// Connects to a port of the guest: [`envd_api::ENVD_PORT`] is envd itself, any other a TCP
    /// connection to 127.0.0.1 in the guest.
    ///
    /// # Errors
    /// Refused by the guest, too many streams, closed, or silent for [`OPEN_DEADLINE`].
    pub async fn open(&self, guest_port: u16) -> Result<PortStream, GuestError> {
        let open = async {
            let mut stream = self.mux.open().await?;
            port::request(&mut stream, guest_port).await?;
            Ok(stream)
        };
        tokio::time::timeout(OPEN_DEADLINE, open)
            .await
            .unwrap_or(Err(GuestError::Timeout {
                what: "the opening of a port",
                waited: OPEN_DEADLINE,
            }))
    }

    /// Whether the session is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.mux.is_closed()
    }

    /// Waits until the session is over. Cancel safe.
    pub async fn closed(&self) {
        self.mux.closed().await;
    }
}

/// Fills `buf` with random bytes of the host's kernel.
pub(crate) fn random(buf: &mut [u8]) -> Result<(), GuestError> {
    let mut filled = 0;
    while filled < buf.len() {
        filled +=
            rustix::rand::getrandom(&mut buf[filled..], rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| GuestError::Random(errno.into()))?;
    }
    Ok(())
}
