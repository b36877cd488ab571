//! Processes in the guest: envd's `process.Process` service.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use connectrpc::client::{CallOptions, ClientConfig, ServerStream};
use envd_api::proto::process as pb;
use envd_api::{CGROUP_HEADER, CGROUP_SYSTEM, KEEPALIVE_HEADER};
use http::Uri;
use hyper::body::Incoming;
use pb::__buffa::view::{ConnectResponseView, StartResponseView};
use pb::process_event::Event;
use pb::process_event::data_event::Output as Data;
use pb::process_input::Input;
use pb::process_selector::Selector as SelectorField;

use crate::transport::Transport;
use crate::{Envd, GuestError};

/// Most output that [`Envd::run`] collects, both streams together, bytes. Longer output belongs
/// into a file, or into [`Envd::start`] piece by piece.
pub const RUN_OUTPUT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How many signs of life a process stream may miss before its guest counts as gone. One can be
/// late because a guest is faulted in or its host is busy; three in a row are not.
const KEEPALIVES_MISSED_MAX: u32 = 3;

/// Size of a terminal, characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PtySize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A process to be.
#[derive(Debug, Clone, Default)]
pub struct Command {
    cmd: String,
    args: Vec<String>,
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
    stdin: bool,
    pty: Option<PtySize>,
    tag: Option<String>,
    user: Option<String>,
    system: bool,
}

impl Command {
    /// Runs `cmd`, found on the guest's PATH.
    #[must_use]
    pub fn new(cmd: impl Into<String>) -> Self {
        Self {
            cmd: cmd.into(),
            ..Self::default()
        }
    }

    /// Runs a line in the guest's `/bin/sh`.
    #[must_use]
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("/bin/sh").arg("-c").arg(line)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Sets an environment variable on top of the guest's own.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.envs.insert(name.into(), value.into());
        self
    }

    /// Starts in this directory; otherwise in the user's home.
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<String>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    /// Keeps standard input open for [`Envd::send_input`]; otherwise it is `/dev/null`.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Runs it on a terminal.
    #[must_use]
    pub fn pty(mut self, size: PtySize) -> Self {
        self.pty = Some(size);
        self
    }

    /// Gives it a name to be found by.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tag = Some(tag.into());
        self
    }

    /// Runs it as this user of the guest; otherwise as root.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Starts it outside the user's cgroup: [`Envd::freeze`] does not stop it.
    #[must_use]
    pub fn outside_freezer(mut self) -> Self {
        self.system = true;
        self
    }

    fn request(&self) -> pb::StartRequest {
        pb::StartRequest {
            process: pb::ProcessConfig {
                cmd: self.cmd.clone(),
                args: self.args.clone(),
                envs: self.envs.clone().into_iter().collect(),
                cwd: self.cwd.clone(),
                ..Default::default()
            }
            .into(),
            pty: self.pty.map(pty).into(),
            tag: self.tag.clone(),
            stdin: Some(self.stdin),
            ..Default::default()
        }
    }

    fn options(&self, timeout: Option<Duration>, keepalive: Duration) -> CallOptions {
        let mut options = stream_options(keepalive);
        if let Some(timeout) = timeout {
            options = options.with_timeout(timeout);
        }
        if self.system {
            options = options.with_header(CGROUP_HEADER, CGROUP_SYSTEM);
        }
        if let Some(user) = &self.user {
            options = options.with_header(
                "authorization",
                format!("Basic {}", BASE64.encode(format!("{user}:"))),
            );
        }
        options
    }
}

/// Whole seconds go over the wire, at least one.
fn stream_options(keepalive: Duration) -> CallOptions {
    let seconds = keepalive.as_secs().max(1);
    CallOptions::default().with_header(KEEPALIVE_HEADER, seconds.to_string())
}

fn pty(size: PtySize) -> pb::PTY {
    pb::PTY {
        size: pb::pty::Size {
            cols: u32::from(size.cols),
            rows: u32::from(size.rows),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

/// Which process a call is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By its id in the guest.
    Pid(u32),
    /// By the tag it was started with.
    Tag(String),
}

impl From<u32> for Selector {
    fn from(pid: u32) -> Self {
        Self::Pid(pid)
    }
}

impl From<&Selector> for pb::ProcessSelector {
    fn from(selector: &Selector) -> Self {
        let selector = match selector {
            Selector::Pid(pid) => SelectorField::Pid(*pid),
            Selector::Tag(tag) => SelectorField::Tag(tag.clone()),
        };
        Self {
            selector: Some(selector),
            ..Default::default()
        }
    }
}

/// What [`Envd::send_signal`] can send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, to the process group.
    Term,
    /// SIGKILL, to everything that the process started and that stayed in its session.
    Kill,
}

/// A process that envd knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Its id in the guest.
    pub pid: u32,
    /// Its tag.
    pub tag: Option<String>,
    /// What it runs.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    /// Whether it ended by itself.
    pub exited: bool,
    /// In words: `exit status 1`, `signal: killed`.
    pub status: String,
    /// What else envd has to say.
    pub error: Option<String>,
}

impl Exit {
    /// Whether it ended by itself, with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.exited && self.code == 0
    }
}

/// What a process stream yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// Bytes of its terminal.
    Pty(Vec<u8>),
    /// It ended: the last event.
    End(Exit),
}

/// All that a process printed, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

#[derive(Debug)]
enum Stream {
    Start(ServerStream<Incoming, StartResponseView<'static>>),
    Connect(ServerStream<Incoming, ConnectResponseView<'static>>),
}

impl Stream {
    fn method(&self) -> &'static str {
        match self {
            Self::Start(_) => "Start",
            Self::Connect(_) => "Connect",
        }
    }

    async fn event(&mut self) -> Result<Option<Event>, GuestError> {
        let method = self.method();
        let failed = |error| GuestError::process(method, error);
        let event = match self {
            Self::Start(stream) => {
                let Some(message) = stream.message().await.map_err(failed)? else {
                    return Ok(None);
                };
                Option::<pb::ProcessEvent>::from(message.to_owned_message().event)
            }
            Self::Connect(stream) => {
                let Some(message) = stream.message().await.map_err(failed)? else {
                    return Ok(None);
                };
                Option::<pb::ProcessEvent>::from(message.to_owned_message().event)
            }
        };
        event
            .and_then(|event| event.event)
            .map(Some)
            .ok_or(GuestError::Answer {
                what: "a process stream",
                reason: "an event without content".into(),
            })
    }
}

/// A process in the guest, seen from the moment of the call on. Dropping it stops watching; the
/// process goes on. Whoever holds one must read it: envd waits for a slow reader a while, then ends
/// the stream with `resource_exhausted`.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    stream: Stream,
    ended: bool,
    /// Longest silence: [`KEEPALIVES_MISSED_MAX`] of what the guest was asked for.
    silence_max: Duration,
}

impl Process {
    async fn begin(mut stream: Stream, keepalive: Duration) -> Result<Self, GuestError> {
        match stream.event().await? {
            Some(Event::Start(start)) if start.pid != 0 => Ok(Self {
                pid: start.pid,
                stream,
                ended: false,
                silence_max: keepalive.max(Duration::from_secs(1)) * KEEPALIVES_MISSED_MAX,
            }),
            other => Err(GuestError::Answer {
                what: "a process stream",
                reason: format!("it begins with {other:?}, not with a start event"),
            }),
        }
    }

    /// The process's id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The next event; `None` after [`ProcessEvent::End`]. Keepalives are swallowed; they are how a
    /// process that has nothing to say is told apart from a guest that does not answer any more.
    ///
    /// # Errors
    /// The timeout came (`deadline_exceeded`), the reader was too slow, the channel broke, or the
    /// guest gave no sign of life ([`GuestError::Silent`]).
    pub async fn next(&mut self) -> Result<Option<ProcessEvent>, GuestError> {
        while !self.ended {
            let waited = self.silence_max;
            let event = tokio::time::timeout(waited, self.stream.event())
                .await
                .unwrap_or(Err(GuestError::Silent {
                    pid: self.pid,
                    waited,
                }))?;
            match event {
                Some(Event::Data(data)) => match data.output {
                    Some(Data::Stdout(bytes)) => return Ok(Some(ProcessEvent::Stdout(bytes))),
                    Some(Data::Stderr(bytes)) => return Ok(Some(ProcessEvent::Stderr(bytes))),
                    Some(Data::Pty(bytes)) => return Ok(Some(ProcessEvent::Pty(bytes))),
                    None => {}
                },
                Some(Event::End(end)) => {
                    self.ended = true;
                    return Ok(Some(ProcessEvent::End(Exit {
                        code: end.exit_code,
                        exited: end.exited,
                        status: end.status,
                        error: end.error,
                    })));
                }
                Some(Event::Start(_) | Event::Keepalive(_)) => {}
                None => {
                    return Err(GuestError::Answer {
                        what: "a process stream",
                        reason: "it ended without an end event".into(),
                    });
                }
            }
        }
        Ok(None)
    }

    /// Reads to the end, keeping at most [`RUN_OUTPUT_BYTES_MAX`].
    ///
    /// # Errors
    /// As [`Self::next`], and [`GuestError::OutputTooLong`].
    pub async fn output(mut self) -> Result<Output, GuestError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = self.next().await? {
            let (kept, bytes) = match event {
                ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes) => (&mut stdout, bytes),
                ProcessEvent::Stderr(bytes) => (&mut stderr, bytes),
                ProcessEvent::End(exit) => {
                    return Ok(Output {
                        stdout,
                        stderr,
                        exit,
                    });
                }
            };
            kept.extend_from_slice(&bytes);
            if stdout.len() + stderr.len() > RUN_OUTPUT_BYTES_MAX {
                return Err(GuestError::OutputTooLong {
                    limit_bytes: RUN_OUTPUT_BYTES_MAX,
                });
            }
        }
        Err(GuestError::Answer {
            what: "a process stream",
            reason: "no end event".into(),
        })
    }
}

type Client = pb::ProcessClient<Transport>;

impl Envd {
    fn processes(&self) -> Client {
        let transport = Transport {
            channel: self.channel.clone(),
        };
        Client::new(
            transport,
            ClientConfig::new(Uri::from_static("http://envd")),
        )
    }

    fn unary(&self) -> CallOptions {
        CallOptions::default().with_timeout(self.deadline)
    }

    /// Starts a process. With a `timeout`, envd kills it (and all that stayed in its session) when
    /// it runs out, whether somebody still watches or not; without one it may run for ever.
    ///
    /// # Errors
    /// envd refused: no such command or directory (`invalid_argument`), no such user
    /// (`unauthenticated`), the user's processes are frozen (`failed_precondition`).
    pub async fn start(
        &self,
        command: &Command,
        timeout: Option<Duration>,
    ) -> Result<Process, GuestError> {
        let begin = async {
            let stream = self
                .processes()
                .start_with_options(command.request(), command.options(timeout, self.keepalive))
                .await
                .map_err(|error| GuestError::process("Start", error))?;
            Process::begin(Stream::Start(stream), self.keepalive).await
        };
        self.bounded("Start", begin).await
    }

    /// Watches a process that runs or has just ended: all its output from now on, and its end.
    ///
    /// # Errors
    /// `not_found`: envd does not know it (any more).
    pub async fn connect(&self, process: &Selector) -> Result<Process, GuestError> {
        let request = pb::ConnectRequest {
            process: pb::ProcessSelector::from(process).into(),
            ..Default::default()
        };
        let begin = async {
            let stream = self
                .processes()
                .connect_with_options(request, stream_options(self.keepalive))
                .await
                .map_err(|error| GuestError::process("Connect", error))?;
            Process::begin(Stream::Connect(stream), self.keepalive).await
        };
        self.bounded("Connect", begin).await
    }

    /// Runs a command to its end; `timeout` as in [`Self::start`].
    ///
    /// # Errors
    /// As [`Self::start`] and [`Process::output`]. A command that fails is no error: see
    /// [`Output::exit`].
    pub async fn run(&self, command: &Command, timeout: Duration) -> Result<Output, GuestError> {
        self.start(command, Some(timeout)).await?.output().await
    }

    /// The processes that run.
    ///
    /// # Errors
    /// envd does not answer.
    pub async fn list(&self) -> Result<Vec<ProcessInfo>, GuestError> {
        let answer = self
            .processes()
            .list_with_options(pb::ListRequest::default(), self.unary())
            .await
            .map_err(|error| GuestError::process("List", error))?;
        let info = |info: pb::ProcessInfo| {
            let config = Option::<pb::ProcessConfig>::from(info.config).unwrap_or_default();
            ProcessInfo {
                pid: info.pid,
                tag: info.tag,
                cmd: config.cmd,
                args: config.args,
            }
        };
        Ok(answer
            .into_owned()
            .processes
            .into_iter()
            .map(info)
            .collect())
    }

    /// Writes to a process's standard input (or its terminal).
    ///
    /// # Errors
    /// `not_found`; `failed_precondition` if it has no standard input; `deadline_exceeded` if it
    /// does not read.
    pub async fn send_input(&self, process: &Selector, bytes: &[u8]) -> Result<(), GuestError> {
        self.input(process, Input::Stdin(bytes.to_vec())).await
    }

    /// Writes to a process's terminal.
    ///
    /// # Errors
    /// As [`Self::send_input`].
    pub async fn send_pty(&self, process: &Selector, bytes: &[u8]) -> Result<(), GuestError> {
        self.input(process, Input::Pty(bytes.to_vec())).await
    }

    async fn input(&self, process: &Selector, input: Input) -> Result<(), GuestError> {
        let request = pb::SendInputRequest {
            process: pb::ProcessSelector::from(process).into(),
            input: pb::ProcessInput {
                input: Some(input),
                ..Default::default()
            }
            .into(),
            ..Default::default()
        };
        self.processes()
            .send_input_with_options(request, self.unary())
            .await
            .map(|_empty| ())
            .map_err(|error| GuestError::process("SendInput", error))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn send_signal(&self, process: &Selector, signal: Signal) -> Result<(), GuestError> {
        let signal = match signal {
            Signal::Term => pb::Signal::SIGNAL_SIGTERM,
            Signal::Kill => pb::Signal::SIGNAL_SIGKILL,
        };
        let request = pb::SendSignalRequest {
            process: pb::ProcessSelector::from(process).into(),
            signal: signal.into(),
            ..Default::default()
        };
        self.processes()
            .send_signal_with_options(request, self.unary())
            .await
            .map(|_empty| ())
            .map_err(|error| GuestError::process("SendSignal", error))
    }

    /// Closes a process's standard input. Not an error if it is closed.
    ///
    /// # Errors
    /// `not_found`.
    pub async fn close_stdin(&self, process: &Selector) -> Result<(), GuestError> {
        let request = pb::CloseStdinRequest {
            process: pb::ProcessSelector::from(process).into(),
            ..Default::default()
        };
        self.processes()
            .close_stdin_with_options(request, self.unary())
            .await
            .map(|_empty| ())
            .map_err(|error| GuestError::process("CloseStdin", error))
    }

    /// Gives a process's terminal another size.
    ///
    /// # Errors
    /// `not_found`; `failed_precondition` if it has no terminal.
    pub async fn update(&self, process: &Selector, size: PtySize) -> Result<(), GuestError> {
        let request = pb::UpdateRequest {
            process: pb::ProcessSelector::from(process).into(),
            pty: pty(size).into(),
            ..Default::default()
        };
        self.processes()
            .update_with_options(request, self.unary())
            .await
            .map(|_empty| ())
            .map_err(|error| GuestError::process("Update", error))
    }

    /// A process stream has no deadline of its own, its beginning has.
    async fn bounded(
        &self,
        what: &'static str,
        begin: impl Future<Output = Result<Process, GuestError>>,
    ) -> Result<Process, GuestError> {
        tokio::time::timeout(self.deadline, begin)
            .await
            .unwrap_or(Err(GuestError::Timeout {
                what,
                waited: self.deadline,
            }))
    }
}
