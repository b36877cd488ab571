//! The first bytes of every stream: which guest port it is for, and whether that is to be had.
//!
//! ```text
//! host → guest   'T'  version=1  port u16 (big-endian)
//! guest → host   status u8 (0 = connected)  length u16 (big-endian)  message
//! ```
//! After an answer of 0 (whose message is empty) the stream is the connection. Any other status
//! ends it; the message says why.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const MAGIC: u8 = b'T';
const VERSION: u8 = 1;
const CONNECTED: u8 = 0;
const REFUSED: u8 = 1;

/// Longest refusal, bytes: one sentence.
const MESSAGE_BYTES_MAX: usize = 512;

/// Why a stream did not become a connection.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The guest said no.
    #[error("guest port {port}: {message}")]
    Refused {
        /// The port asked for.
        port: u16,
        /// The guest's reason.
        message: String,
    },
    /// The stream broke before the answer.
    #[error("guest port {port}: the channel broke before the guest answered")]
    Io {
        /// The port asked for.
        port: u16,
        /// What broke.
        #[source]
        source: io::Error,
    },
}

/// Host side: asks for `port` and waits for the answer.
///
/// # Errors
/// [`PortError`]. The caller sets the deadline.
pub async fn request<S>(stream: &mut S, port: u16) -> Result<(), PortError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answer = async {
        let [high, low] = port.to_be_bytes();
        stream.write_all(&[MAGIC, VERSION, high, low]).await?;
        stream.flush().await?;
        let status = stream.read_u8().await?;
        let len = usize::from(stream.read_u16().await?).min(MESSAGE_BYTES_MAX);
        let mut message = vec![0; len];
        stream.read_exact(&mut message).await?;
        Ok((status, String::from_utf8_lossy(&message).into_owned()))
    };
    match answer.await {
        Ok((CONNECTED, _)) => Ok(()),
        Ok((_, message)) => Err(PortError::Refused { port, message }),
        Err(source) => Err(PortError::Io { port, source }),
    }
}

/// Guest side: reads which port the stream is for.
///
/// # Errors
/// The stream broke, or does not begin as this version's streams do.
pub async fn accept<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<u16> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let [magic, version, high, low] = header;
    if magic != MAGIC || version != VERSION {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a port header of version 1",
        ));
    }
    Ok(u16::from_be_bytes([high, low]))
}

/// Guest side: answers, `Ok` or the reason for a refusal.
///
/// # Errors
/// The stream broke.
pub async fn answer<S>(stream: &mut S, outcome: Result<(), &str>) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let (status, message) = match outcome {
        Ok(()) => (CONNECTED, ""),
        Err(reason) => (REFUSED, reason),
    };
    let message = &message.as_bytes()[..message.len().min(MESSAGE_BYTES_MAX)];
    let len = u16::try_from(message.len()).unwrap_or_default();
    let mut wire = vec![status];
    wire.extend_from_slice(&len.to_be_bytes());
    wire.extend_from_slice(message);
    stream.write_all(&wire).await?;
    stream.flush().await
}
