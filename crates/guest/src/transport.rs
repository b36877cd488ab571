//! HTTP/1.1 over the channel: one stream per request, no pool. A stream costs half a millisecond,
//! and a call that owns its stream is cancelled by dropping it.

use bytes::Bytes;
use connectrpc::ConnectError;
use connectrpc::client::{BoxFuture, ClientBody, ClientTransport};
use envd_api::ENVD_PORT;
use http::header::HOST;
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;

use crate::{Channel, GuestError};

/// Sends one request to envd on a stream of its own; the body of the answer keeps it open.
pub(crate) async fn send<B>(
    channel: &Channel,
    what: &'static str,
    mut request: Request<B>,
) -> Result<Response<Incoming>, GuestError>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let stream = channel.open(ENVD_PORT).await?;
    let failed = |source| GuestError::Http { what, source };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, what, "a connection to envd ended early");
        }
    });
    // HTTP/1.1 wants the path alone in its first line, and a host.
    if let Some(path) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = Uri::from(path);
    }
    request
        .headers_mut()
        .insert(HOST, HeaderValue::from_static("envd"));
    sender.send_request(request).await.map_err(failed)
}

/// The same as connectrpc's clients want it.
#[derive(Debug, Clone)]
pub(crate) struct Transport {
    pub(crate) channel: Channel,
}

impl ClientTransport for Transport {
    type ResponseBody = Incoming;
    type Error = ConnectError;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Incoming>, ConnectError>> {
        let channel = self.channel.clone();
        Box::pin(async move {
            send(&channel, "a process call", request)
                .await
                .map_err(|error| ConnectError::unavailable(error.to_string()).with_source(error))
        })
    }
}
