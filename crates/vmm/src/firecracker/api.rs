//! Firecracker's API: HTTP/1.1 over a unix socket, each request with a deadline.
//!
//! Every request has a connection of its own. Firecracker serves one request after the other in
//! any case, and a connection whose answer came too late can simply be dropped: nothing of it can
//! be taken for the answer to the next request.
//!
//! What Firecracker says is bounded in size and looked at for what is known; fields that are not
//! known are ignored, because newer versions have more of them. What it refuses comes with its own
//! words ([`ApiError::Refused`]), and those words are the only way to tell refusals apart.
//!
//! Not retried: whoever asks knows whether asking twice is right.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest answer that is read, in bytes. The largest of them is the machine's whole
/// configuration, a few KiB.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// How much of a refusal that is not Firecracker's JSON is shown.
const RAW_SHOWN_CHARS: usize = 200;

/// Why a request has no answer that is of use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiError {
    /// Nobody takes connections on the socket.
    #[error("cannot connect to Firecracker's API for {request}: {source}")]
    Connect {
        /// Method and path.
        request: String,
        /// Why not.
        source: io::Error,
    },
    /// The connection ended, or what came was no HTTP.
    #[error("the connection to Firecracker's API broke during {request}: {source}")]
    Broken {
        /// Method and path.
        request: String,
        /// Why.
        source: hyper::Error,
    },
    /// No answer in time. It may still be carried out.
    #[error(
        "Firecracker did not answer {request} within {deadline_ms} ms; if its guest's page faults \
         are still served the host is overloaded, else only ending the sandbox helps"
    )]
    Timeout {
        /// Method and path.
        request: String,
        /// How long we waited.
        deadline_ms: u128,
    },
    /// Firecracker refused.
    #[error("Firecracker refused {request} ({status}): {fault_message}")]
    Refused {
        /// Method and path.
        request: String,
        /// The HTTP status.
        status: u16,
        /// Firecracker's own words.
        fault_message: String,
    },
    /// An answer of unreasonable length.
    #[error("Firecracker's answer to {request} is longer than {limit_bytes} bytes")]
    TooLong {
        /// Method and path.
        request: String,
        /// The limit.
        limit_bytes: usize,
    },
    /// An answer that is not what this request has.
    #[error("Firecracker's answer to {request} cannot be understood: {detail}")]
    Malformed {
        /// Method and path.
        request: String,
        /// What is wrong with it.
        detail: String,
    },
}

impl ApiError {
    /// Firecracker's own words, if it was it that said no.
    #[must_use]
    pub fn fault_message(&self) -> Option<&str> {
        match self {
            Self::Refused { fault_message, .. } => Some(fault_message),
            _ => None,
        }
    }
}

/// The words of a refusal (`{"fault_message": …}`).
#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// A socket that Firecracker's API listens on.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// The API behind this socket. Nothing is connected yet. The path is subject to the 107 bytes
    /// that a socket's path may have.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Asks for something (200, with content).
    ///
    /// # Errors
    /// As [`ApiError`] lists; 204 instead of content is malformed.
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        deadline: Duration,
    ) -> Result<T, ApiError> {
        let request = format!("GET {path}");
        let (status, body) = self.send(Method::GET, path, None, deadline).await?;
        if status != StatusCode::OK {
            return Err(malformed(
                request,
                format!("status {status} instead of 200"),
            ));
        }
        serde_json::from_slice(&body).map_err(|error| malformed(request, error.to_string()))
    }

    /// Sets something (204, without content).
    ///
    /// # Errors
    /// As [`ApiError`] lists; another success than 204 is malformed.
    pub async fn put(&self, path: &str, body: &Value, deadline: Duration) -> Result<(), ApiError> {
        self.change(Method::PUT, path, Some(body), deadline).await
    }

    /// Changes something (204, without content).
    ///
    /// # Errors
    /// As [`Api::put`].
    pub async fn patch(
        &self,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<(), ApiError> {
        self.change(Method::PATCH, path, body, deadline).await
    }

    async fn change(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<(), ApiError> {
        let request = format!("{method} {path}");
        let (status, _) = self.send(method, path, body, deadline).await?;
        if status == StatusCode::NO_CONTENT {
            Ok(())
        } else {
            Err(malformed(
                request,
                format!("status {status} instead of 204"),
            ))
        }
    }

    /// One request on a connection of its own, all of it within `deadline`. Any success is
    /// returned, everything else is a refusal.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<(StatusCode, Bytes), ApiError> {
        let name = format!("{method} {path}");
        let text = body.map(ToString::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(text)))
            .map_err(|error| malformed(name.clone(), error.to_string()))?;
        let exchanged = timeout(deadline, self.exchange(&name, request)).await;
        let (status, body) = exchanged.map_err(|_| ApiError::Timeout {
            request: name.clone(),
            deadline_ms: deadline.as_millis(),
        })??;
        if status.is_success() {
            return Ok((status, body));
        }
        Err(ApiError::Refused {
            request: name,
            status: status.as_u16(),
            fault_message: fault_message(&body),
        })
    }

    async fn exchange(
        &self,
        name: &str,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), ApiError> {
        let broken = |source| ApiError::Broken {
            request: name.to_owned(),
            source,
        };
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ApiError::Connect {
            request: name.to_owned(),
            source,
        })?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
            let body =
                body.collect()
                    .await
                    .map_err(|error| match error.downcast::<hyper::Error>() {
                        Ok(source) => broken(*source),
                        Err(error) if error.is::<LengthLimitError>() => ApiError::TooLong {
                            request: name.to_owned(),
                            limit_bytes: ANSWER_BYTES_MAX,
                        },
                        Err(error) => malformed(name.to_owned(), error.to_string()),
                    })?;
            Ok((status, body.to_bytes()))
        };
        drive(connection, exchange).await
    }
}

/// Runs the connection beside what happens on it: in this task, so that dropping the request drops
/// both.
async fn drive<T>(
    connection: impl Future<Output = Result<(), hyper::Error>>,
    exchange: impl Future<Output = T>,
) -> T {
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        // Its error, if it has one, is the exchange's as well.
        _ended = connection => exchange.await,
    }
}

fn malformed(request: String, detail: String) -> ApiError {
    ApiError::Malformed { request, detail }
}

fn fault_message(body: &[u8]) -> String {
    match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => String::from_utf8_lossy(body)
            .chars()
            .take(RAW_SHOWN_CHARS)
            .collect(),
    }
}
