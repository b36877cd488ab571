//! `process.Process`, as E2B's SDKs know it.
//!
//! A process belongs to envd, not to the call that started it: a stream may break (or its host be
//! gone, or the guest be paused and resumed elsewhere), the process goes on, and `Connect` finds it.
//! What a call decides is the time: `Connect-Timeout-Ms` on `Start` kills the process when it runs
//! out, whether or not somebody still watches; on `Connect` it ends only that stream.
//!
//! - [`spawn`]: from a request to a process.
//! - [`output`] reads it, [`fanout`] gives it to who watches, [`stream`] makes events of it.
//! - [`table`]: the processes that we know.
//!
//! A kill reaches the process's whole session; SIGTERM its group.

mod fanout;
mod output;
mod spawn;
mod stream;
mod table;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest,
    ServiceResult, ServiceStream,
};
use envd_api::proto::process as pb;
use envd_api::{CGROUP_HEADER, CGROUP_SYSTEM, KEEPALIVE_HEADER};
use futures::{StreamExt, TryStreamExt};
use http::header::AUTHORIZATION;
use nix::pty::Winsize;
use nix::sys::signal::Signal;
use pb::process_input::Input as Bytes;
use pb::process_selector::Selector;
use pb::stream_input_request::Event as StreamInput;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::cgroup::{CgroupError, Cgroups, Place};
use crate::reaper::{Ending, Reaper};
use crate::user::User;
use fanout::Fanout;
use output::{Reader, pump};
use spawn::{Ends, Io, Spec};
use stream::{Watch, events};
use table::{Entry, Input, Key, Table};

/// How often a quiet stream gives a sign of life, unless the client asks for another pace.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// The paces that a client may ask for, seconds.
const KEEPALIVE_SECONDS: std::ops::RangeInclusive<u64> = 1..=3600;

/// How long input waits for a process that does not read it, if the call sets no time of its own.
const INPUT_DEADLINE: Duration = Duration::from_secs(60);

/// The service.
#[derive(Debug)]
pub(crate) struct Processes {
    cgroups: Arc<Cgroups>,
    reaper: Arc<Reaper>,
    table: Arc<Table>,
}

impl Processes {
    pub(crate) fn new(cgroups: Arc<Cgroups>, reaper: Arc<Reaper>) -> Self {
        Self {
            cgroups,
            reaper,
            table: Arc::default(),
        }
    }

    /// Starts what is asked for and the tasks that look after it.
    async fn launch(
        &self,
        ctx: &RequestContext,
        request: pb::StartRequest,
    ) -> Result<Watch, ConnectError> {
        let deadline = ctx.deadline().map(Instant::from_std);
        let keepalive = keepalive(ctx);
        let place = place(ctx)?;
        let spec = spec(user(ctx)?, &request)?;
        if !self.table.has_room() {
            return Err(ConnectError::resource_exhausted(
                "too many processes run already",
            ));
        }
        let (started, ends) = {
            let (entering, cgroup) = self.cgroups.enter(place).await.map_err(cgroup_error)?;
            let spawned = spawn::spawn(&self.reaper, &spec, cgroup);
            drop(entering);
            spawned.map_err(|error| {
                ConnectError::invalid_argument(format!("cannot start {:?}: {error}", spec.cmd))
            })?
        };
        let pid = started.child.id();
        let (input, readers) = match ends {
            Ends::Pipes {
                stdin,
                stdout,
                stderr,
            } => (
                Input::Pipe(stdin.into()),
                vec![Reader::Stdout(stdout), Reader::Stderr(stderr)],
            ),
            Ends::Pty(terminal) => (Input::Pty(terminal.clone()), vec![Reader::Pty(terminal)]),
        };
        let fanout = Fanout::new(fanout::LIMITS);
        let entry = Arc::new(Entry {
            pid,
            tag: request.tag,
            config: Option::from(request.process).unwrap_or_default(),
            fanout: Arc::clone(&fanout),
            input,
        });
        self.table.insert(Arc::clone(&entry));
        // Before the first byte is read: who starts a process sees all of it.
        let subscription = fanout.subscribe();
        let life = Life {
            entry,
            readers,
            ending: started.ending,
            deadline,
        };
        tokio::spawn(life.live(Arc::clone(&self.table), Arc::clone(&self.reaper)));
        let subscription = subscription.ok_or_else(too_many_watch)?;
        Ok(Watch {
            pid,
            subscription,
            deadline,
            keepalive,
        })
    }

    fn running(&self, process: Option<pb::ProcessSelector>) -> Result<Arc<Entry>, ConnectError> {
        let key = key(process)?;
        self.table.find(&key).ok_or_else(|| not_found(&key))
    }

    async fn input(
        &self,
        process: Option<pb::ProcessSelector>,
        input: Option<pb::ProcessInput>,
        deadline: Option<Instant>,
    ) -> Result<(), ConnectError> {
        let entry = self.running(process)?;
        let Some(Bytes::Stdin(bytes) | Bytes::Pty(bytes)) = input.and_then(|input| input.input)
        else {
            return Err(ConnectError::invalid_argument("no input given"));
        };
        let deadline = deadline.unwrap_or_else(|| Instant::now() + INPUT_DEADLINE);
        let written = timeout_at(deadline, async {
            match &entry.input {
                Input::Pty(terminal) => {
                    terminal.write_all(&bytes).await.map_err(ConnectError::from)
                }
                Input::Pipe(stdin) => match stdin.lock().await.as_mut() {
                    Some(pipe) => pipe.write_all(&bytes).await.map_err(|error| {
                        ConnectError::failed_precondition(format!(
                            "the process has closed its standard input: {error}"
                        ))
                    }),
                    None => Err(ConnectError::failed_precondition(
                        "the process has no standard input (any more)",
                    )),
                },
            }
        });
        written.await.unwrap_or_else(|_elapsed| {
            Err(ConnectError::deadline_exceeded(
                "the process does not read its input",
            ))
        })
    }
}

/// A process that runs, and what is to be done until it has ended.
struct Life {
    entry: Arc<Entry>,
    readers: Vec<Reader>,
    ending: oneshot::Receiver<Ending>,
    deadline: Option<Instant>,
}

impl Life {
    async fn live(mut self, table: Arc<Table>, reaper: Arc<Reaper>) {
        let ended = CancellationToken::new();
        let fanout = &self.entry.fanout;
        let pumps: Vec<_> = self
            .readers
            .drain(..)
            .map(|reader| tokio::spawn(pump(reader, Arc::clone(fanout), ended.clone())))
            .collect();
        let ending = self.ending_or_deadline(&reaper).await;
        ended.cancel();
        for pump in pumps {
            // A pump that panicked has nothing more to give.
            pump.await.ok();
        }
        self.entry.fanout.end(ending);
        if let Input::Pipe(stdin) = &self.entry.input {
            stdin.lock().await.take();
        }
        table.end(&self.entry);
    }

    async fn ending_or_deadline(&mut self, reaper: &Reaper) -> Ending {
        let lost = |_| Ending::Killed(Signal::SIGKILL);
        let Some(deadline) = self.deadline else {
            return (&mut self.ending).await.unwrap_or_else(lost);
        };
        tokio::select! {
            ending = &mut self.ending => return ending.unwrap_or_else(lost),
            () = sleep_until(deadline) => {}
        }
        reaper.kill_session(self.entry.pid);
        (&mut self.ending).await.unwrap_or_else(lost)
    }
}

impl pb::Process for Processes {
    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, pb::ListRequest>,
    ) -> ServiceResult<impl Encodable<pb::ListResponse> + Send + use<'a>> {
        let info = |entry: Arc<Entry>| pb::ProcessInfo {
            config: entry.config.clone().into(),
            pid: entry.pid,
            tag: entry.tag.clone(),
            ..Default::default()
        };
        let processes = self.table.running().into_iter().map(info).collect();
        Response::ok(pb::ListResponse {
            processes,
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<pb::ConnectResponse> + Send + use<>>> {
        let key = key(request.to_owned_message().process.into())?;
        let entry = self.table.find_any(&key).ok_or_else(|| not_found(&key))?;
        let watch = Watch {
            pid: entry.pid,
            subscription: entry.fanout.subscribe().ok_or_else(too_many_watch)?,
            deadline: ctx.deadline().map(Instant::from_std),
            keepalive: keepalive(&ctx),
        };
        let response = |event: pb::ProcessEvent| pb::ConnectResponse {
            event: event.into(),
            ..Default::default()
        };
        Ok(Response::stream(events(watch).map_ok(response)))
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<pb::StartResponse> + Send + use<>>> {
        let watch = self.launch(&ctx, request.to_owned_message()).await?;
        let response = |event: pb::ProcessEvent| pb::StartResponse {
            event: event.into(),
            ..Default::default()
        };
        Ok(Response::stream(events(watch).map_ok(response)))
    }

    async fn update<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::UpdateRequest>,
    ) -> ServiceResult<impl Encodable<pb::UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let entry = self.running(request.process.into())?;
        let Input::Pty(terminal) = &entry.input else {
            return Err(ConnectError::failed_precondition(
                "the process has no terminal",
            ));
        };
        if let Some(pty) = Option::<pb::PTY>::from(request.pty) {
            terminal.resize(&winsize(pty)?)?;
        }
        Response::ok(pb::UpdateResponse::default())
    }

    async fn stream_input<'a>(
        &'a self,
        ctx: RequestContext,
        mut requests: InboundStream<pb::StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<pb::StreamInputResponse> + Send + use<'a>> {
        let mut process = None;
        let deadline = ctx.deadline().map(Instant::from_std);
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(StreamInput::Start(start)) => process = Option::from(start.process),
                Some(StreamInput::Data(data)) => {
                    self.input(process.clone(), data.input.into(), deadline)
                        .await?;
                }
                Some(StreamInput::Keepalive(_)) | None => {}
            }
        }
        Response::ok(pb::StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, pb::SendInputRequest>,
    ) -> ServiceResult<impl Encodable<pb::SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let deadline = ctx.deadline().map(Instant::from_std);
        self.input(request.process.into(), request.input.into(), deadline)
            .await?;
        Response::ok(pb::SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<pb::SendSignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let entry = self.running(request.process.into())?;
        match request.signal.as_known() {
            Some(pb::Signal::SIGNAL_SIGKILL) => self.reaper.kill_session(entry.pid),
            Some(pb::Signal::SIGNAL_SIGTERM) => {
                self.reaper.signal(entry.pid, Signal::SIGTERM);
            }
            _ => {
                return Err(ConnectError::invalid_argument(
                    "only SIGTERM and SIGKILL are sent",
                ));
            }
        }
        Response::ok(pb::SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, pb::CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<pb::CloseStdinResponse> + Send + use<'a>> {
        let entry = self.running(request.to_owned_message().process.into())?;
        match &entry.input {
            Input::Pipe(stdin) => match timeout(INPUT_DEADLINE, stdin.lock()).await {
                Ok(mut stdin) => drop(stdin.take()),
                Err(_elapsed) => {
                    return Err(ConnectError::deadline_exceeded(
                        "input is still being written",
                    ));
                }
            },
            Input::Pty(_) => {
                return Err(ConnectError::failed_precondition(
                    "a terminal is not closed: send it an end of transmission (0x04)",
                ));
            }
        }
        Response::ok(pb::CloseStdinResponse::default())
    }
}

fn key(process: Option<pb::ProcessSelector>) -> Result<Key, ConnectError> {
    match process.and_then(|process| process.selector) {
        Some(Selector::Pid(pid)) => Ok(Key::Pid(pid)),
        Some(Selector::Tag(tag)) => Ok(Key::Tag(tag)),
        None => Err(ConnectError::invalid_argument(
            "no process named: give its pid or its tag",
        )),
    }
}

fn not_found(key: &Key) -> ConnectError {
    let name = match key {
        Key::Pid(pid) => format!("pid {pid}"),
        Key::Tag(tag) => format!("tag {tag:?}"),
    };
    ConnectError::not_found(format!(
        "no process with {name}: it has ended, or was never started"
    ))
}

fn too_many_watch() -> ConnectError {
    ConnectError::resource_exhausted("too many streams watch this process")
}

fn cgroup_error(error: CgroupError) -> ConnectError {
    match error {
        CgroupError::Frozen => ConnectError::failed_precondition(error.to_string()),
        other => ConnectError::internal(other.to_string()).with_source(other),
    }
}

fn keepalive(ctx: &RequestContext) -> Duration {
    ctx.header(KEEPALIVE_HEADER)
        .and_then(|seconds| seconds.to_str().ok()?.parse::<u64>().ok())
        .map_or(KEEPALIVE, |seconds| {
            Duration::from_secs(seconds.clamp(*KEEPALIVE_SECONDS.start(), *KEEPALIVE_SECONDS.end()))
        })
}

fn place(ctx: &RequestContext) -> Result<Place, ConnectError> {
    match ctx.header(CGROUP_HEADER).map(http::HeaderValue::as_bytes) {
        None => Ok(Place::User),
        Some(place) if place == CGROUP_SYSTEM.as_bytes() => Ok(Place::System),
        Some(_) => Err(ConnectError::invalid_argument(format!(
            "{CGROUP_HEADER}: only {CGROUP_SYSTEM:?} is a value"
        ))),
    }
}

/// `Authorization: Basic base64("name:")`, as the SDKs name a user; without it, root.
fn user(ctx: &RequestContext) -> Result<User, ConnectError> {
    let Some(header) = ctx.header(AUTHORIZATION) else {
        return Ok(User::find("root").unwrap_or_else(User::root));
    };
    let name = header
        .to_str()
        .ok()
        .and_then(|header| header.strip_prefix("Basic "))
        .and_then(|encoded| BASE64.decode(encoded.trim()).ok())
        .and_then(|decoded| String::from_utf8(decoded).ok())
        .map(|decoded| {
            decoded
                .split_once(':')
                .map_or(decoded.clone(), |(name, _)| name.to_owned())
        })
        .ok_or_else(|| ConnectError::unauthenticated("Authorization is not Basic with a user"))?;
    User::find(&name)
        .ok_or_else(|| ConnectError::unauthenticated(format!("no user {name:?} in /etc/passwd")))
}

fn spec(user: User, request: &pb::StartRequest) -> Result<Spec, ConnectError> {
    let config = Option::<pb::ProcessConfig>::from(request.process.clone()).unwrap_or_default();
    if config.cmd.is_empty() {
        return Err(ConnectError::invalid_argument("no command given"));
    }
    let cwd = match &config.cwd {
        Some(cwd) if !cwd.is_empty() => {
            let cwd = user.home.join(cwd);
            if !cwd.is_dir() {
                return Err(ConnectError::invalid_argument(format!(
                    "no directory {} in the guest",
                    cwd.display()
                )));
            }
            cwd
        }
        // A user without a home starts at the root, as after any login.
        _ if user.home.is_dir() => user.home.clone(),
        _ => PathBuf::from("/"),
    };
    let io = match Option::<pb::PTY>::from(request.pty.clone()) {
        Some(pty) => Io::Pty(winsize(pty)?),
        // The SDKs of old said nothing and expected an open input.
        None => Io::Pipes {
            stdin: request.stdin.unwrap_or(true),
        },
    };
    Ok(Spec {
        cmd: config.cmd,
        args: config.args,
        envs: config.envs.into_iter().collect(),
        cwd,
        user,
        io,
    })
}

fn winsize(pty: pb::PTY) -> Result<Winsize, ConnectError> {
    let size = Option::<pb::pty::Size>::from(pty.size).unwrap_or_default();
    let side = |chars: u32| {
        u16::try_from(chars).map_err(|_too_large| {
            ConnectError::invalid_argument(format!(
                "no terminal is {chars} characters wide or high"
            ))
        })
    };
    Ok(Winsize {
        ws_col: side(size.cols)?,
        ws_row: side(size.rows)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}
