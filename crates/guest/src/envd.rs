//! envd's plain HTTP routes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use envd_api::rest::{
    BODY_BYTES_MAX, ErrorBody, FREEZE_PATH, FreezeResponse, HEALTH_PATH, INIT_PATH, InitRequest,
    InitResponse, METRICS_PATH, Metrics, UNFREEZE_PATH,
};
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use serde::de::DeserializeOwned;

use crate::channel::random;
use crate::{Channel, GuestError, transport};

/// How long a call may take unless [`Envd::with_deadline`] says otherwise. envd answers in
/// milliseconds; a guest that is faulted in page by page from a slow store needs longer.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// How often a quiet process stream asks the guest for a sign of life unless
/// [`Envd::with_keepalive`] says otherwise. Three of them missed end the stream: half a minute, three
/// times what any other call waits.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Fresh random bytes per [`Envd::init`]: twice what the kernel's generator holds.
const ENTROPY_BYTES: usize = 64;

/// envd's client. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Envd {
    pub(crate) channel: Channel,
    pub(crate) deadline: Duration,
    pub(crate) keepalive: Duration,
}

impl Envd {
    /// A client on `channel`, with [`CALL_DEADLINE`] for each call.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self {
            channel,
            deadline: CALL_DEADLINE,
            keepalive: KEEPALIVE_INTERVAL,
        }
    }

    /// The same client with another deadline for each call that is not a process stream.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            deadline,
            ..self.clone()
        }
    }

    /// The same client whose process streams ask for a sign of life this often, in whole seconds.
    #[must_use]
    pub fn with_keepalive(&self, keepalive: Duration) -> Self {
        Self {
            keepalive,
            ..self.clone()
        }
    }

    /// The channel below.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Asks whether envd answers.
    ///
    /// # Errors
    /// It does not.
    pub async fn health(&self) -> Result<(), GuestError> {
        self.call("/health", Method::GET, HEALTH_PATH, Bytes::new())
            .await
            .map(|_body| ())
    }

    /// Makes a booted or resumed guest usable: sets its clock to the host's, gives its kernel
    /// fresh random bytes, and lets the user's processes run.
    ///
    /// # Errors
    /// One of these failed; the user's processes are then not thawed.
    pub async fn init(&self) -> Result<InitResponse, GuestError> {
        let mut entropy = vec![0; ENTROPY_BYTES];
        random(&mut entropy)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let unix_time_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.init_with(&InitRequest {
            unix_time_ns,
            entropy,
        })
        .await
    }

    /// [`Self::init`] with a request of the caller's own.
    ///
    /// # Errors
    /// As [`Self::init`].
    pub async fn init_with(&self, request: &InitRequest) -> Result<InitResponse, GuestError> {
        let what = "/init";
        let body = serde_json::to_vec(request).map_err(|error| GuestError::Answer {
            what,
            reason: error.to_string(),
        })?;
        self.json(what, Method::POST, INIT_PATH, Bytes::from(body))
            .await
    }

    /// The guest's figures.
    ///
    /// # Errors
    /// envd does not answer.
    pub async fn metrics(&self) -> Result<Metrics, GuestError> {
        self.json("/metrics", Method::GET, METRICS_PATH, Bytes::new())
            .await
    }

    /// Stops the user's processes; returns when the kernel says that all of them stand still.
    ///
    /// # Errors
    /// They do not stop in time (then they run on), or the guest has no freezer.
    pub async fn freeze(&self) -> Result<FreezeResponse, GuestError> {
        self.json("/freeze", Method::POST, FREEZE_PATH, Bytes::new())
            .await
    }

    /// Lets the user's processes go on. Not an error if they run.
    ///
    /// # Errors
    /// The guest has no freezer, or envd does not answer.
    pub async fn unfreeze(&self) -> Result<FreezeResponse, GuestError> {
        self.json("/unfreeze", Method::POST, UNFREEZE_PATH, Bytes::new())
            .await
    }

    async fn json<T: DeserializeOwned>(
        &self,
        what: &'static str,
        method: Method,
        path: &'static str,
        body: Bytes,
    ) -> Result<T, GuestError> {
        let body = self.call(what, method, path, body).await?;
        serde_json::from_slice(&body).map_err(|error| GuestError::Answer {
            what,
            reason: error.to_string(),
        })
    }

    async fn call(
        &self,
        what: &'static str,
        method: Method,
        path: &'static str,
        body: Bytes,
    ) -> Result<Bytes, GuestError> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = http::Uri::from_static(path);
        let exchange = async {
            let response = transport::send(&self.channel, what, request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| GuestError::Answer {
                    what,
                    reason: error.to_string(),
                })?
                .to_bytes();
            if status.is_success() {
                return Ok(body);
            }
            let message = serde_json::from_slice::<ErrorBody>(&body)
                .map(|error| error.message)
                .unwrap_or_else(|_not_ours| String::from_utf8_lossy(&body).into_owned());
            Err(GuestError::Refused {
                what,
                status: status.as_u16(),
                message,
            })
        };
        tokio::time::timeout(self.deadline, exchange)
            .await
            .unwrap_or(Err(GuestError::Timeout {
                what,
                waited: self.deadline,
            }))
    }
}
