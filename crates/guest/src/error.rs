//! What can go wrong between host and guest.

use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use envd_api::link::LinkError;
use envd_api::mux::MuxError;
use envd_api::port::PortError;

/// A call to the guest that failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No session with the guest.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// No stream to the guest.
    #[error(transparent)]
    Mux(#[from] MuxError),
    /// A stream that did not become a connection.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The guest did not answer in time.
    #[error("the guest did not answer {what} within {} ms", .waited.as_millis())]
    Timeout {
        /// The call.
        what: &'static str,
        /// Its deadline.
        waited: Duration,
    },
    /// A process stream without a sign of life.
    #[error(
        "nothing was heard of the guest for {} s while its process {pid} ran: it does not answer any more",
        .waited.as_secs()
    )]
    Silent {
        /// The process's id in the guest.
        pid: u32,
        /// How long.
        waited: Duration,
    },
    /// HTTP broke.
    #[error("{what}: the connection to envd broke")]
    Http {
        /// The call.
        what: &'static str,
        /// What broke.
        #[source]
        source: hyper::Error,
    },
    /// envd answered with an error.
    #[error("envd refused {what} ({status}): {message}")]
    Refused {
        /// The call.
        what: &'static str,
        /// HTTP status.
        status: u16,
        /// envd's reason.
        message: String,
    },
    /// envd's answer is not what it should be.
    #[error("envd's answer to {what} does not make sense: {reason}")]
    Answer {
        /// The call.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A Process call failed.
    #[error("process.Process/{method}: {source}")]
    Process {
        /// The method.
        method: &'static str,
        /// envd's error, or the transport's.
        #[source]
        source: Box<ConnectError>,
    },
    /// A process printed more than we keep.
    #[error(
        "the command printed more than {limit_bytes} bytes: redirect its output to a file in the guest"
    )]
    OutputTooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// The host's random source failed.
    #[error("cannot read random bytes from the host's kernel")]
    Random(#[source] std::io::Error),
}

impl GuestError {
    /// Wraps a Process error.
    pub(crate) fn process(method: &'static str, source: ConnectError) -> Self {
        Self::Process {
            method,
            source: Box::new(source),
        }
    }

    /// The Connect code, where envd gave one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Process { source, .. } => Some(source.code),
            _ => None,
        }
    }

    /// Whether the reason is that time ran out (the guest did not answer, or a command was killed
    /// because its timeout came). A guest that went silent below a process is no such case.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. } | Self::Link(LinkError::Silent { .. })
        ) || self.code() == Some(ErrorCode::DeadlineExceeded)
    }
}
