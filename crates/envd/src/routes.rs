//! envd's HTTP: a handful of plain routes, and everything else to the Process service.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use connectrpc::{ConnectRpcBody, ConnectRpcService, Limits};
use envd_api::proto::process::ProcessServer;
use envd_api::rest::{
    BODY_BYTES_MAX, ErrorBody, FREEZE_PATH, FreezeResponse, HEALTH_PATH, INIT_PATH, InitRequest,
    InitResponse, METRICS_PATH, UNFREEZE_PATH,
};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use serde::Serialize;

use crate::cgroup::{CgroupError, Cgroups};
use crate::machine::{Machine, MachineError};
use crate::metrics::Meter;
use crate::process::Processes;

/// Largest message that the Process service takes, bytes: a command line and its environment, or a
/// piece of input.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

pub(crate) type Body = Either<Full<Bytes>, ConnectRpcBody>;

/// What envd answers.
pub(crate) struct Routes {
    cgroups: Arc<Cgroups>,
    machine: Machine,
    meter: Meter,
    process: TowerToHyperService<ConnectRpcService<ProcessServer<Processes>>>,
}

/// A plain route's error: status and reason.
struct Refusal(StatusCode, String);

impl From<CgroupError> for Refusal {
    fn from(error: CgroupError) -> Self {
        let status = match &error {
            CgroupError::Absent => StatusCode::NOT_IMPLEMENTED,
            CgroupError::Frozen => StatusCode::CONFLICT,
            CgroupError::Slow => StatusCode::GATEWAY_TIMEOUT,
            CgroupError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

impl From<MachineError> for Refusal {
    fn from(error: MachineError) -> Self {
        let (status, cause) = match &error {
            MachineError::Entropy(_) | MachineError::Time(_) => (StatusCode::BAD_REQUEST, None),
            MachineError::Clock(cause) | MachineError::Random(cause) => {
                (StatusCode::INTERNAL_SERVER_ERROR, Some(cause))
            }
        };
        let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        Self(status, format!("{error}{cause}"))
    }
}

impl Routes {
    pub(crate) fn new(cgroups: Arc<Cgroups>, machine: Machine, processes: Arc<Processes>) -> Self {
        let limits = Limits::default()
            .with_max_message_size(MESSAGE_BYTES_MAX)
            .with_max_request_body_size(MESSAGE_BYTES_MAX);
        let service =
            ConnectRpcService::new(ProcessServer::from_arc(processes)).with_limits(limits);
        Self {
            cgroups,
            machine,
            meter: Meter::default(),
            process: TowerToHyperService::new(service),
        }
    }

    pub(crate) async fn serve(&self, request: Request<Incoming>) -> Response<Body> {
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let answer = match (method, path.as_str()) {
            (Method::GET | Method::HEAD, HEALTH_PATH) => Ok(empty()),
            (Method::GET, METRICS_PATH) => self.metrics(),
            (Method::POST, INIT_PATH) => self.init(request).await,
            (Method::POST, FREEZE_PATH) => self.freeze(true).await,
            (Method::POST, UNFREEZE_PATH) => self.freeze(false).await,
            (_, HEALTH_PATH | METRICS_PATH | INIT_PATH | FREEZE_PATH | UNFREEZE_PATH) => {
                Err(Refusal(
                    StatusCode::METHOD_NOT_ALLOWED,
                    format!("not this method on {path}"),
                ))
            }
            _ => {
                let Ok(response) = self.process.call(request).await;
                return response.map(Either::Right);
            }
        };
        answer.unwrap_or_else(|Refusal(status, message)| {
            json(
                status,
                &ErrorBody {
                    code: status.as_u16(),
                    message,
                },
            )
        })
    }

    /// In this order: clock, random numbers, user processes, answer. What fails ends it there: a
    /// guest with its neighbour's random numbers must not go on.
    async fn init(&self, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let bad = |reason: String| Refusal(StatusCode::BAD_REQUEST, reason);
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| bad(format!("the request's body: {error}")))?
            .to_bytes();
        let request: InitRequest = serde_json::from_slice(&body)
            .map_err(|error| bad(format!("the request's body: {error}")))?;
        let response = self.machine.init(&request)?;
        let thawed = match self.cgroups.thaw().await {
            Ok(()) => true,
            Err(CgroupError::Absent) => false,
            Err(error) => return Err(error.into()),
        };
        Ok(json(StatusCode::OK, &InitResponse { thawed, ..response }))
    }

    fn metrics(&self) -> Result<Response<Body>, Refusal> {
        let metrics = self.meter.read().map_err(|error| {
            Refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("the kernel's figures: {error}"),
            )
        })?;
        Ok(json(StatusCode::OK, &metrics))
    }

    async fn freeze(&self, frozen: bool) -> Result<Response<Body>, Refusal> {
        let began = Instant::now();
        if frozen {
            self.cgroups.freeze().await?;
        } else {
            self.cgroups.thaw().await?;
        }
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(json(StatusCode::OK, &FreezeResponse { frozen, ms }))
    }
}

fn empty() -> Response<Body> {
    let mut response = Response::new(Either::Left(Full::default()));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Body> {
    // Plain structs of numbers and strings: they always serialise.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = Response::new(Either::Left(Full::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
