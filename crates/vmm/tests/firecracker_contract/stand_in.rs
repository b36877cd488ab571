//! A stand-in for a Firecracker: an API that answers as the real one does, in this process, and a
//! process of its own that has the guest's memory, hands page faults over, and can die.
//!
//! The process is this test program again (see [`run_process`]). It works in the machine's directory,
//! as the real one does, and is told what to do by a socket there; it ends when that is closed.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tempfile::TempDir;
use torpor_vmm::firecracker::{Deadlines, FirecrackerBinary, kernel_command_line};
use torpor_vmm::{Accel, BootSource, MachineConfig, Version};

use crate::firecracker_peer::{Answer, Peer, refusal};

pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
/// Where a Firecracker puts the kernel's command line (`CMDLINE_START`).
const COMMAND_LINE_ADDR: usize = 0x2_0000;
/// How long the process may take to come up, and for what it is told.
const PROCESS_DEADLINE: Duration = Duration::from_secs(60);
/// A request is answered at once or never here; the host may be slow.
const DEADLINE: Duration = Duration::from_secs(3);
/// A limit that says *never*.
pub(crate) const NEVER: Duration = Duration::from_secs(60);
/// Longer than a try for the guest's agent takes, after which it is tried again.
const AGENT_PATIENCE: Duration = Duration::from_secs(15);
/// In the machine's directory.
const CONTROL: &str = "control.sock";
const COMMAND_LINE: &str = "command-line";
const PROCESS_ENV: &str = "TORPOR_STAND_IN";
pub(crate) const LAST_WORDS: &str = "out of cheese";

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Refused with these words.
    Refuse(&'static str),
    /// Refused with something that is not Firecracker's JSON.
    RefuseOddly,
    /// Carried out; 200 with content instead of 204, or the other way round.
    OtherSuccess,
    CloseAtOnce,
    CloseInTheMiddle,
    Garbage,
    /// A success with content that is none.
    NoJson,
    Endless,
    Dripping,
    /// Never answered, and not carried out.
    Lost,
    /// Never answered, and carried out.
    Unanswered,
    /// The process dies.
    Die,
    /// No fault at all: answered late, but in time.
    Late,
}

impl Fault {
    pub(crate) const ALL: [Self; 13] = [
        Self::Refuse("No such thing, says the \"stand-in\"."),
        Self::RefuseOddly,
        Self::OtherSuccess,
        Self::CloseAtOnce,
        Self::CloseInTheMiddle,
        Self::Garbage,
        Self::NoJson,
        Self::Endless,
        Self::Dripping,
        Self::Lost,
        Self::Unanswered,
        Self::Die,
        Self::Late,
    ];

    /// What an error that it caused says, beside the request's name.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Refuse(words) => words,
            Self::RefuseOddly => "(502): <html>",
            Self::OtherSuccess => "instead of 20",
            Self::CloseAtOnce | Self::CloseInTheMiddle | Self::Garbage => "broke",
            Self::NoJson => "cannot be understood",
            Self::Endless => "longer than 1048576 bytes",
            Self::Dripping | Self::Lost | Self::Unanswered => "did not answer",
            Self::Die => LAST_WORDS,
            Self::Late => "",
        }
    }
}

/// How page faults are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandOver {
    Well,
    /// The load is answered without it.
    Not,
    Garbage,
    WithoutDescriptor,
    CloseAtOnce,
}

/// What the real one has of a machine, and what it was asked that it should not have been.
#[derive(Debug)]
pub(crate) struct State {
    dir: PathBuf,
    release: &'static str,
    listener: UnixListener,
    control: Option<BufReader<UnixStream>>,
    pub(crate) pid: u32,
    pub(crate) host_addr: u64,
    pub(crate) state: &'static str,
    vsock: Option<UnixListener>,
    asked: usize,
    /// By number of the request.
    faults: BTreeMap<usize, Fault>,
    /// Faults that came to pass.
    pub(crate) met: Vec<Fault>,
    pub(crate) hand_over: HandOver,
    saved: u32,
    /// What the host has asked the balloon for last: 1 once a run is done.
    host_cmd: u32,
    /// Runs of hinting that the guest has carried out.
    pub(crate) runs: u32,
    /// The guest will be told that its connections are over.
    pub(crate) reset_waits: bool,
    /// It was told to stop, and did not say that it has.
    stop_in_doubt: bool,
    /// It serves no device: from any request to stop on, carried out or refused, to any to go on.
    pub(crate) devices_stand: bool,
    pub(crate) wrongs: Vec<String>,
}

impl State {
    pub(crate) fn saved_bytes(&self) -> Vec<u8> {
        format!("state {}", self.saved).into_bytes()
    }

    /// How many requests there were.
    pub(crate) fn asked(&self) -> usize {
        self.asked
    }

    /// Breaks the `ahead`th request from now on, and none else.
    pub(crate) fn break_next(&mut self, ahead: usize, fault: Fault) {
        self.nothing_breaks();
        self.faults.insert(self.asked + ahead, fault);
    }

    pub(crate) fn nothing_breaks(&mut self) {
        self.faults.clear();
        self.met.clear();
    }

    fn answer(&mut self, request: &str, body: &Value) -> Answer {
        if self.asked == 0 {
            self.wait_for_process();
        }
        let fault = self.faults.get(&self.asked).copied();
        self.asked += 1;
        self.met.extend(fault);
        if request == "PATCH /vm" {
            self.note_switch(body, fault);
        }
        match fault {
            None => self.carry_out(request, body),
            Some(Fault::Late) => {
                let answer = self.carry_out(request, body);
                Answer::After(Duration::from_millis(30), Box::new(answer))
            }
            Some(Fault::OtherSuccess) => match self.carry_out(request, body) {
                Answer::Empty(_) => Answer::Json(200, json!({})),
                _ => Answer::Empty(204),
            },
            Some(Fault::Unanswered) => {
                self.carry_out(request, body);
                Answer::Never
            }
            Some(Fault::Refuse(words)) => refusal(words),
            Some(Fault::RefuseOddly) => {
                Answer::Raw("HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\n<html>".to_owned())
            }
            Some(Fault::CloseAtOnce) => Answer::CloseAtOnce,
            Some(Fault::CloseInTheMiddle) => Answer::CloseInTheMiddle,
            Some(Fault::Garbage) => Answer::Raw("\0\u{1}SSH-2.0-OpenSSH\r\n\r\n".to_owned()),
            Some(Fault::NoJson) => {
                Answer::Raw("HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n{\"s".to_owned())
            }
            Some(Fault::Endless) => Answer::Endless,
            Some(Fault::Dripping) => Answer::Dripping,
            Some(Fault::Lost) => Answer::Never,
            Some(Fault::Die) => {
                self.tell("die");
                Answer::CloseAtOnce
            }
        }
    }

    /// As the real one.
    fn carry_out(&mut self, request: &str, body: &Value) -> Answer {
        let created = self.state != "Not started";
        match request {
            "GET /version" => Answer::Json(
                200,
                json!({ "firecracker_version": self.release, "from_the_future": {} }),
            ),
            "GET /" => Answer::Json(
                200,
                json!({ "id": "anonymous", "state": self.state, "vmm_version": self.release,
                    "app_name": "Firecracker", "from_the_future": [1] }),
            ),
            "PATCH /vm" => self.switch(body),
            "PATCH /balloon/hinting/start" => {
                // While it stands still this is answered, and lost.
                if self.state == "Running" {
                    (self.host_cmd, self.runs) = (1, self.runs + 1);
                }
                Answer::Empty(204)
            }
            "PATCH /balloon/hinting/stop" => {
                self.host_cmd = 0;
                Answer::Empty(204)
            }
            "GET /balloon/hinting/status" => Answer::Json(
                200,
                json!({ "host_cmd": self.host_cmd, "guest_cmd": 0, "from_the_future": 1 }),
            ),
            "PUT /snapshot/create" => self.save(body),
            "PUT /snapshot/load" if !created => self.load(body),
            _ if created => {
                refusal("The requested operation is not supported after starting the microVM.")
            }
            "PUT /vsock" => {
                self.open_vsock();
                Answer::Empty(204)
            }
            "PUT /actions" => {
                self.state = "Running";
                Answer::Empty(204)
            }
            _ => Answer::Empty(204),
        }
    }

    /// What a request to stop or to go on brings about whatever it is answered.
    fn note_switch(&mut self, body: &Value, fault: Option<Fault>) {
        let arrives = !matches!(
            fault,
            Some(Fault::Lost | Fault::CloseAtOnce | Fault::Garbage)
        );
        let stops = body["state"] == "Paused";
        if stops {
            self.stop_in_doubt = fault.is_some_and(|fault| fault != Fault::Late);
        }
        if arrives {
            self.devices_stand = stops;
        }
    }

    fn switch(&mut self, body: &Value) -> Answer {
        let next = match (self.state, body["state"].as_str()) {
            (_, Some("Paused")) => "Paused",
            (from, Some("Resumed")) => {
                let in_doubt = std::mem::take(&mut self.stop_in_doubt);
                if from == "Running" && !in_doubt {
                    self.wrongs
                        .push("a machine that runs was told to run".to_owned());
                }
                "Running"
            }
            (_, other) => {
                self.wrongs.push(format!("asked for the state {other:?}"));
                return refusal("No such state.");
            }
        };
        let gated = ["1.14", "1.15"]
            .iter()
            .all(|old| !self.release.starts_with(old));
        if next == "Running" && gated && !self.reset_waits && self.met.is_empty() {
            self.wrongs
                .push("it runs, and nothing will reach its agent again".to_owned());
        }
        self.reset_waits = self.reset_waits && next != "Running";
        self.state = next;
        Answer::Empty(204)
    }

    fn save(&mut self, body: &Value) -> Answer {
        if self.state != "Paused" {
            self.wrongs
                .push(format!("a state was asked for while it is {}", self.state));
            return refusal("Create snapshot error: the microVM is not paused");
        }
        self.saved += 1;
        self.reset_waits = true;
        let path = self.dir.join(body["snapshot_path"].as_str().unwrap());
        fs::write(path, self.saved_bytes()).unwrap();
        let memory = self.dir.join(body["mem_file_path"].as_str().unwrap());
        match File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(memory)
        {
            Ok(_) => {
                self.wrongs
                    .push("the guest's memory was written to a file".to_owned());
                Answer::Empty(204)
            }
            Err(error) => refusal(&format!(
                "Create snapshot error: Cannot perform open on the memory backing file: {error}"
            )),
        }
    }

    fn load(&mut self, body: &Value) -> Answer {
        let path = self.dir.join(body["snapshot_path"].as_str().unwrap());
        let state = fs::read(path).unwrap();
        if state != self.saved_bytes() {
            self.wrongs.push(format!("loaded {state:?}"));
        }
        let regions = json!([{
            "base_host_virt_addr": self.host_addr, "size": MEMORY_BYTES, "offset": 0,
            "page_size": 4096, "page_size_kib": 4096,
        }]);
        match self.hand_over {
            HandOver::Well => self.tell(&format!("hand over {regions}")),
            HandOver::Garbage => self.tell("hand over [{}]"),
            HandOver::WithoutDescriptor => self.tell(&format!("send {regions}")),
            HandOver::CloseAtOnce => self.tell("connect"),
            HandOver::Not => return Answer::Empty(204),
        }
        self.open_vsock();
        self.state = "Paused";
        self.reset_waits = true;
        match self.hand_over {
            HandOver::Well => Answer::Empty(204),
            // Nobody serves its page faults: it waits for them.
            _ => Answer::Never,
        }
    }

    fn open_vsock(&mut self) {
        let vsock = UnixListener::bind(self.dir.join("vsock.sock")).unwrap();
        vsock.set_nonblocking(true).unwrap();
        self.vsock = Some(vsock);
    }

    pub(crate) fn wait_for_process(&mut self) {
        let stream = accept_within(&self.listener, PROCESS_DEADLINE).unwrap();
        stream.set_read_timeout(Some(PROCESS_DEADLINE)).unwrap();
        let mut control = BufReader::new(stream);
        let said = read_line(&mut control);
        let (pid, host_addr) = said.split_once(' ').unwrap();
        self.pid = pid.parse().unwrap();
        self.host_addr = host_addr.parse().unwrap();
        self.control = Some(control);
    }

    /// Tells the process to do something, until it has.
    fn tell(&mut self, what: &str) {
        let control = self.control.as_mut().unwrap();
        writeln!(control.get_mut(), "{what}").unwrap();
        read_line(control);
    }
}

fn accept_within(listener: &UnixListener, patience: Duration) -> Option<UnixStream> {
    let began = Instant::now();
    while began.elapsed() < patience {
        if let Ok((stream, _)) = listener.accept() {
            return Some(stream);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Empty at the end.
fn read_line(control: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    control.read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// A machine's directory with a stand-in that waits to be started in it.
pub(crate) struct StandIn {
    pub(crate) peer: Peer,
    state: Arc<Mutex<State>>,
    files: TempDir,
    version: Version,
}

impl StandIn {
    /// One that hints, and holds a guest's vsock back until it has acknowledged a reset.
    pub(crate) fn new() -> Self {
        Self::of("1.16.1", Version::new(1, 16, 1))
    }

    pub(crate) fn of(release: &'static str, version: Version) -> Self {
        let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["base", "layer", "kernel", "initramfs"] {
            fs::write(files.path().join(name), "").unwrap();
        }
        let listener = UnixListener::bind(dir.path().join(CONTROL)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let state = Arc::new(Mutex::new(State {
            dir: dir.path().to_owned(),
            release,
            listener,
            control: None,
            pid: 0,
            host_addr: 0,
            state: "Not started",
            vsock: None,
            asked: 0,
            faults: BTreeMap::new(),
            met: Vec::new(),
            hand_over: HandOver::Well,
            saved: 0,
            host_cmd: 0,
            runs: 0,
            reset_waits: false,
            stop_in_doubt: false,
            devices_stand: false,
            wrongs: Vec::new(),
        }));
        let answering = Arc::clone(&state);
        let stand_in = Self {
            peer: Peer::answering(dir, move |request, body| {
                answering.lock().unwrap().answer(request, body)
            }),
            state,
            files,
            version,
        };
        let line = kernel_command_line(&stand_in.boot_source()).unwrap();
        fs::write(stand_in.dir().join(COMMAND_LINE), line).unwrap();
        stand_in
    }

    pub(crate) fn with(fault: Option<(usize, Fault)>, hand_over: HandOver) -> Self {
        let stand_in = Self::new();
        let mut state = stand_in.state();
        state.faults.extend(fault);
        state.hand_over = hand_over;
        drop(state);
        stand_in
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.peer.dir()
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.files.path().join("console.log")
    }

    pub(crate) fn binary(&self) -> FirecrackerBinary {
        FirecrackerBinary {
            path: program().to_owned(),
            version: self.version,
            release: self.version.to_string(),
            jail: None,
            deadlines: Deadlines {
                request: DEADLINE,
                api_up: DEADLINE,
                handshake: DEADLINE,
                load: DEADLINE * 2,
                last_words: DEADLINE,
            },
        }
    }

    pub(crate) fn machine(&self) -> MachineConfig {
        MachineConfig {
            memory_bytes: MEMORY_BYTES,
            vcpus: 2,
            base_image: self.files.path().join("base"),
            writable_disk: self.files.path().join("layer"),
            network: false,
            free_page_reporting: true,
            accel: Accel::Kvm,
        }
    }

    pub(crate) fn boot_source(&self) -> BootSource {
        BootSource {
            kernel: self.files.path().join("kernel"),
            initramfs: Some(self.files.path().join("initramfs")),
            extra_cmdline: "torpor.test=stand-in".to_owned(),
        }
    }

    /// What was asked after the first `skipped` requests.
    pub(crate) fn asked_after(&self, skipped: usize) -> Vec<String> {
        self.peer.paths().split_off(skipped)
    }

    /// Whether somebody tries for the guest's agent, and has not given up.
    pub(crate) async fn agent_is_tried_for(&self) -> bool {
        let vsock = self.state().vsock.as_ref().unwrap().try_clone().unwrap();
        let tried = tokio::task::spawn_blocking(move || {
            loop {
                let mut stream = accept_within(&vsock, AGENT_PATIENCE)?;
                stream
                    .set_read_timeout(Some(Duration::from_secs(1)))
                    .unwrap();
                let mut question = [0; "CONNECT 1024\n".len()];
                // One that has given up has closed it.
                if stream.read_exact(&mut question).is_ok()
                    && stream
                        .read(&mut [0])
                        .is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
                {
                    return Some(question);
                }
            }
        });
        tried.await.unwrap() == Some(*b"CONNECT 1024\n")
    }

    /// Its process has ended, and no connection to it is open.
    pub(crate) async fn is_left_behind_by_nobody(&self) {
        let pid = self.state().pid;
        let gone = || fs::read_to_string(format!("/proc/{pid}/stat")).is_err();
        let began = Instant::now();
        while !(pid == 0 || gone()) || self.peer.open() > 0 {
            assert!(
                began.elapsed() < NEVER,
                "gone: {}, connections: {}",
                gone(),
                self.peer.open()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A program that becomes this one, as the stand-in's process, whatever its arguments are. Written
/// once, before anything is started, so that no child can have it open; it stays with what was built.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let us = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nexport {PROCESS_ENV}=1\nexec '{}' --exact stand_in --ignored --nocapture\n",
            us.display()
        );
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = dir.join(us.file_name().unwrap());
        // Whole for whoever runs the same tests at the same time.
        let mut file = tempfile::NamedTempFile::new_in(dir).unwrap();
        file.write_all(script.as_bytes()).unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(0o700)).unwrap();
        drop(file.persist(&path).unwrap());
        path
    })
}

/// The process: has the guest's memory, and does what it is told.
pub(crate) fn run_process() {
    if std::env::var_os(PROCESS_ENV).is_none() {
        return;
    }
    let mut memory = memmap2::MmapOptions::new()
        .len(usize::try_from(MEMORY_BYTES).unwrap())
        .no_reserve_swap()
        .map_anon()
        .unwrap();
    let line = fs::read(COMMAND_LINE).unwrap();
    memory[COMMAND_LINE_ADDR..COMMAND_LINE_ADDR + line.len()].copy_from_slice(&line);
    let mut control = BufReader::new(UnixStream::connect(CONTROL).unwrap());
    let host_addr = memory.as_ptr().addr();
    writeln!(control.get_mut(), "{} {host_addr}", std::process::id()).unwrap();
    let mut pager = None;
    loop {
        let told = read_line(&mut control);
        let connect = || UnixStream::connect("pager.sock").unwrap();
        if let Some(text) = told.strip_prefix("hand over ") {
            pager = Some(hand_over(connect(), text, 1));
        } else if let Some(text) = told.strip_prefix("send ") {
            pager = Some(hand_over(connect(), text, 0));
        } else if told == "connect" {
            drop(connect());
        } else if told == "die" {
            eprintln!("{LAST_WORDS}");
            std::process::exit(70);
        } else {
            // The test is over.
            break;
        }
        writeln!(control.get_mut()).unwrap();
    }
    drop((pager, memory));
}

fn hand_over(stream: UnixStream, text: &str, descriptors: usize) -> UnixStream {
    let file = File::open("/dev/null").unwrap();
    let fds = vec![file.as_fd(); descriptors];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if descriptors > 0 {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let bytes = [IoSlice::new(text.as_bytes())];
    sendmsg(&stream, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
    stream
}
