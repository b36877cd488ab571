//! Hosts come, one after the other; each opens streams; each stream becomes envd's own HTTP or a
//! connection to a TCP port of the guest.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use envd_api::link::{Acceptor, Session};
use envd_api::mux::{self, MuxStream};
use envd_api::{ENVD_PORT, port as header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cgroup::Cgroups;
use crate::console::say;
use crate::machine::Machine;
use crate::port::{self, Source};
use crate::process::Processes;
use crate::reaper::Reaper;
use crate::routes::Routes;

/// How long a stream may take to say what it is for, and a guest's port to take a connection.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);

/// How long a request's head may take once its stream is open.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);

/// Serves until the port is gone for good.
pub(crate) async fn run(
    source: Source,
    cgroups: Cgroups,
    machine: Machine,
    reaper: Arc<Reaper>,
) -> io::Result<()> {
    let reaping = Arc::clone(&reaper);
    // Reaping must not wait for the port to appear, nor end with it.
    tokio::spawn(async move {
        if let Err(error) = reaping.run().await {
            say(&format!(
                "envd: no SIGCHLD, processes will not be seen to end: {error}"
            ));
        }
    });
    let cgroups = Arc::new(cgroups);
    let processes = Arc::new(Processes::new(Arc::clone(&cgroups), reaper));
    let routes = Arc::new(Routes::new(cgroups, machine, processes));
    let mut acceptor = Acceptor::new(port::open(source)?);
    // Cancelled when its host is followed by another: its streams end, processes stay.
    let mut session = CancellationToken::new();
    while let Some(begun) = acceptor.next().await {
        session.cancel();
        session = CancellationToken::new();
        tokio::spawn(serve_session(begun, session.clone(), Arc::clone(&routes)));
    }
    session.cancel();
    Ok(())
}

async fn serve_session(session: Session, over: CancellationToken, routes: Arc<Routes>) {
    // However this task ends, the session's streams end with it.
    let ended = over.clone().drop_guard();
    let streams = over.clone();
    let accept = move |stream| {
        let serving = serve_stream(stream, Arc::clone(&routes));
        tokio::spawn(streams.clone().run_until_cancelled_owned(serving));
    };
    over.run_until_cancelled(mux::serve(session, accept)).await;
    drop(ended);
}

async fn serve_stream(mut stream: MuxStream, routes: Arc<Routes>) {
    // A stream that breaks concerns only its host, which sees it break too: nothing is reported.
    match timeout(OPEN_DEADLINE, header::accept(&mut stream)).await {
        Ok(Ok(ENVD_PORT)) => serve_http(stream, routes).await,
        Ok(Ok(port)) => forward(stream, port).await,
        Ok(Err(_)) | Err(_) => {}
    }
}

async fn serve_http(mut stream: MuxStream, routes: Arc<Routes>) {
    if header::answer(&mut stream, Ok(())).await.is_err() {
        return;
    }
    let service = service_fn(move |request| {
        let routes = Arc::clone(&routes);
        async move { Ok::<_, std::convert::Infallible>(routes.serve(request).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), service)
        .await
        .ok();
}

async fn forward(mut stream: MuxStream, port: u16) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let connected = match timeout(OPEN_DEADLINE, TcpStream::connect(address)).await {
        Ok(connected) => connected,
        Err(_elapsed) => Err(io::Error::from(io::ErrorKind::TimedOut)),
    };
    match connected {
        Ok(mut service) => {
            if header::answer(&mut stream, Ok(())).await.is_ok() {
                tokio::io::copy_bidirectional(&mut stream, &mut service)
                    .await
                    .ok();
            }
        }
        Err(error) => {
            let reason = format!("nothing takes connections on 127.0.0.1 in the guest: {error}");
            header::answer(&mut stream, Err(&reason)).await.ok();
        }
    }
}
