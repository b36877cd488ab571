//! One Firecracker process, its directory and the lines to it.
//!
//! A machine has a directory of its own, which is made empty by the caller, who also removes it, with
//! all that is in it. It is Firecracker's working directory, or holds the jail that it sees. Everything
//! that a device state names lies there, by links or mounts where it belongs elsewhere.
//!
//! In a jail that directory belongs to the jail's user, and what lies there may be the work of a guest
//! that has broken out. So no link is followed in it once a guest has run, and sockets are held from
//! before that.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, fchown, lchown, symlink};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use crate::confinement::Confinement;
use crate::console::ConsoleLog;
use crate::error::{Result, VmmError};
use crate::firecracker::api::{Api, ApiError};
use crate::firecracker::binary::{Deadlines, FirecrackerBinary};
use crate::firecracker::channel::{self, Carrier};
use crate::firecracker::config::{self, names};
use crate::firecracker::jail::{Furnishing, Jail};
use crate::firecracker::network::{Network, Programs};
use crate::host::check_room;
use crate::machine::{BootSource, MachineConfig, VmmIdentity};
use crate::process::{Process, Spawn};
use crate::version::Version;
use crate::vmm::VmmExit;

/// How often a Firecracker that has just been started is tried.
const API_LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// The next step with one that lives and opens no API, …
const MAKE_ROOM: &str = "if the host is overloaded, end or pause other sandboxes";
/// … and with one whose jailer may be what hangs.
const TRY_WITHOUT_JAIL: &str =
    "if the host is overloaded, end or pause other sandboxes; --no-jailer leaves the jailer out";

/// A machine's own directory: the one that its Firecracker works in, or sees alone. Its sockets are
/// reached by the descriptor: a socket's path may have 107 bytes only, and a storage may lie deeper.
#[derive(Debug)]
pub(super) struct MachineDir {
    path: PathBuf,
    fd: OwnedFd,
    /// The jail's user and group.
    owner: Option<(u32, u32)>,
}

impl MachineDir {
    fn open(path: &Path, jail: Option<&Jail>) -> Result<Self> {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path);
        match opened {
            Ok(dir) => Ok(Self {
                path: path.to_owned(),
                fd: dir.into(),
                owner: jail.map(|jail| (jail.uid, jail.gid)),
            }),
            Err(source) => Err(file_error("machine's directory", path, source)),
        }
    }

    fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The short path of a socket in it that we make, for this process.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// A socket in it that Firecracker has made, held so that its name can stand for nothing else later.
    pub(super) fn hold_socket(&self, name: &'static str) -> Result<HeldSocket> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = openat(&self.fd, name, flags, Mode::empty()).and_then(|fd| {
            let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
            match kind {
                FileType::Socket => Ok(HeldSocket(Arc::new(fd))),
                _ => Err(Errno::NOTSOCK),
            }
        });
        held.map_err(|e| file_error("Firecracker's socket", &self.join(name), e.into()))
    }

    /// Gives a socket that we made in it to the jail's user, if there is one.
    pub(super) fn hand_over(&self, name: &'static str) -> Result<()> {
        let Some((uid, gid)) = self.owner else {
            return Ok(());
        };
        let path = self.socket(name);
        lchown(&path, Some(uid), Some(gid)).map_err(|e| file_error("socket", &path, e))
    }

    /// Makes a file for Firecracker to read.
    pub(super) async fn write(&self, role: &'static str, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.join(name);
        let mut options = tokio::fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let written = async {
            let mut file = options.open(&path).await?;
            file.write_all(bytes).await?;
            file.flush().await?;
            match self.owner {
                Some((uid, gid)) => fchown(file.into_std().await, Some(uid), Some(gid)),
                None => Ok(()),
            }
        };
        written.await.map_err(|e| file_error(role, &path, e))
    }

    /// Reads a file that Firecracker has made, and removes it. `None`: it is longer than that.
    pub(super) async fn take(
        &self,
        role: &'static str,
        name: &str,
        len_max: u64,
    ) -> Result<Option<Vec<u8>>> {
        let path = self.join(name);
        let mut options = tokio::fs::OpenOptions::new();
        // Whoever has broken out of the guest may have put anything there.
        options
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let taken = async {
            let file = options.open(&path).await?;
            if !file.metadata().await?.is_file() {
                return Err(io::Error::other("it is no file"));
            }
            let mut bytes = Vec::new();
            file.take(len_max + 1).read_to_end(&mut bytes).await?;
            // One that is left over must never be taken for a newer one.
            tokio::fs::remove_file(&path).await?;
            Ok((bytes.len() as u64 <= len_max).then_some(bytes))
        };
        taken.await.map_err(|e| file_error(role, &path, e))
    }

    pub(super) async fn remove(&self, role: &'static str, name: &str) -> Result<()> {
        let path = self.join(name);
        let removed = tokio::fs::remove_file(&path).await;
        removed.map_err(|e| file_error(role, &path, e))
    }
}

/// A socket, whatever becomes of its name.
#[derive(Debug, Clone)]
pub(super) struct HeldSocket(Arc<OwnedFd>);

impl HeldSocket {
    /// For this process, as long as this is kept.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// Makes `target` known under `name` in a directory.
fn link(role: &'static str, target: &Path, dir: &Path, name: &str) -> Result<()> {
    // Looked at first: Firecracker's own messages do not say which role a file has.
    let linked = std::fs::canonicalize(target).and_then(|target| {
        let path = dir.join(name);
        if target == path {
            return Ok(());
        }
        symlink(target, path)
    });
    linked.map_err(|source| file_error(role, target, source))
}

/// The files that a machine is given, by role and name in its directory.
fn files<'a>(
    machine: &'a MachineConfig,
    boot: Option<&'a BootSource>,
) -> Vec<(&'static str, &'a Path, &'static str)> {
    let mut files: Vec<(_, &Path, _)> = vec![
        ("base image", &machine.base_image, names::BASE_IMAGE),
        (
            "writable disk",
            &machine.writable_disk,
            names::WRITABLE_DISK,
        ),
    ];
    if let Some(boot) = boot {
        files.push(("kernel", &boot.kernel, names::KERNEL));
        let initramfs = boot.initramfs.as_deref();
        files.extend(initramfs.map(|path| ("initramfs", path, names::INITRAMFS)));
    }
    files
}

/// What is started, and where.
struct Start {
    program: PathBuf,
    args: Vec<OsString>,
    confinement: Option<Confinement>,
    dir: MachineDir,
}

impl Start {
    fn prepare(
        binary: &FirecrackerBinary,
        files: &[(&'static str, &Path, &'static str)],
        dir: &Path,
    ) -> Result<Self> {
        let Some(jail) = &binary.jail else {
            for (role, path, name) in files {
                link(role, path, dir, name)?;
            }
            return Ok(Self {
                program: binary.path.clone(),
                args: config::arguments(config::STANDARD_ERROR),
                confinement: None,
                dir: MachineDir::open(dir, None)?,
            });
        };
        let mut furnishing = Furnishing::begin(jail, binary, dir)?;
        for (role, path, name) in files {
            furnishing.give(role, path, name)?;
        }
        let dir_within = MachineDir::open(furnishing.root(), Some(jail))?;
        let (args, confinement) = furnishing.finish(dir)?;
        Ok(Self {
            program: jail.jailer.clone(),
            args,
            confinement: Some(confinement),
            dir: dir_within,
        })
    }
}

pub(super) fn file_error(role: &'static str, path: &Path, source: io::Error) -> VmmError {
    VmmError::File {
        role,
        path: path.to_owned(),
        source,
    }
}

/// A Firecracker whose API answers. It has no machine yet.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) identity: VmmIdentity,
    pub(super) version: Version,
    pub(super) deadlines: Deadlines,
    pub(super) process: Process,
    pub(super) memory_bytes: u64,
    pub(super) dir: MachineDir,
    pub(super) api: Api,
    /// What `api` connects to.
    pub(super) api_socket: Option<HeldSocket>,
    agent: Mutex<Option<UnixStream>>,
    carrier: Mutex<Option<Carrier>>,
    _network: Option<Network>,
}

/// `GET /`.
#[derive(Debug, Deserialize)]
struct InstanceInfo {
    state: String,
}

impl Instance {
    pub(super) async fn start(
        binary: &FirecrackerBinary,
        machine: &MachineConfig,
        boot: Option<&BootSource>,
        dir: &Path,
        console_log: &Path,
    ) -> Result<Self> {
        machine.check()?;
        config::check(machine)?;
        check_room(machine.memory_bytes)?;
        let network_programs = machine.network.then(Programs::find).transpose();
        let network_programs = network_programs.map_err(|no_network| VmmError::InvalidMachine {
            what: no_network.to_string(),
        })?;
        let start = Start::prepare(binary, &files(machine, boot), dir)?;
        let console_log = ConsoleLog::create(console_log)?;
        let (console, stdout) = StdUnixStream::pair().map_err(|source| VmmError::Host {
            what: "make a socket pair",
            source,
        })?;
        let process = Process::spawn(Spawn {
            program: start.program,
            args: start.args,
            dir: start.dir.path.clone(),
            fds: Vec::new(),
            stdout: Some(stdout.into()),
            console: Some((console, console_log)),
            confinement: start.confinement,
            own_network: binary.jail.is_some() || machine.network,
        })
        .await?;
        let owner = binary.jail.as_ref().map(|jail| jail.uid);
        let network = match network_programs {
            Some(programs) => Some(Network::around(&process, programs, owner, dir).await?),
            None => None,
        };
        let api = Api::at(&start.dir.socket(names::API_SOCKET));
        let mut instance = Self {
            identity: binary.identity(),
            version: binary.version,
            deadlines: binary.deadlines,
            process,
            memory_bytes: machine.memory_bytes,
            dir: start.dir,
            api,
            api_socket: None,
            agent: Mutex::new(None),
            carrier: Mutex::new(None),
            _network: network,
        };
        instance.wait_for_api(binary.jail.is_some()).await?;
        let socket = instance.dir.hold_socket(names::API_SOCKET)?;
        instance.api = Api::at(&socket.path());
        instance.api_socket = Some(socket);
        if binary.jail.is_some() {
            instance.process.die_with_us()?;
        }
        Ok(instance)
    }

    async fn wait_for_api(&self, jailed: bool) -> Result<()> {
        let deadline = Instant::now() + self.deadlines.api_up;
        loop {
            let version = self.api.get::<Value>("/version", self.deadlines.request);
            match version.await {
                Ok(_) => return Ok(()),
                Err(ApiError::Connect { .. }) if Instant::now() < deadline => {}
                Err(error) => {
                    return Err(match (self.last_words().await, error) {
                        (Some(exit), _) => VmmError::Start { exit: exit.into() },
                        (None, ApiError::Connect { source, .. }) => VmmError::NotUp {
                            deadline_ms: self.deadlines.api_up.as_millis(),
                            source,
                            next_step: if jailed { TRY_WITHOUT_JAIL } else { MAKE_ROOM },
                        },
                        (None, error) => error.into(),
                    });
                }
            }
            if let Some(exit) = self.process.exited() {
                return Err(VmmError::Start { exit: exit.into() });
            }
            sleep(API_LOOK_INTERVAL).await;
        }
    }

    /// The socket of the guest's vsock: to be taken while no guest has run yet.
    pub(super) fn hold_vsock(&self) -> Result<HeldSocket> {
        self.dir.hold_socket(names::VSOCK)
    }

    /// Makes the channel to the guest's agent, and begins to try for it when the vCPUs run.
    pub(super) fn open_agent_channel(&self, vsock: HeldSocket, running: bool) -> Result<()> {
        let (path, ended) = (vsock.path(), self.process.ended());
        let ended = async move {
            ended.await;
            // Kept for as long as the carrier may connect to it.
            drop(vsock);
        };
        let opened = channel::open(path, running, ended);
        let (agent, carrier) = opened.map_err(|source| VmmError::Host {
            what: "make the agent's channel",
            source,
        })?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent);
        *self.carrier() = Some(carrier);
        Ok(())
    }

    /// The vCPUs run: the agent can be connected to.
    pub(super) fn reach_agent(&self) {
        if let Some(carrier) = &*self.carrier() {
            carrier.reach();
        }
    }

    /// To be called before a state is taken, which ends the guest's connections: nothing is carried any
    /// more when this returns.
    pub(super) async fn let_agent_go(&self) {
        let let_go = self.carrier().as_ref().map(Carrier::let_go);
        if let Some(let_go) = let_go {
            let_go.await;
        }
    }

    fn carrier(&self) -> MutexGuard<'_, Option<Carrier>> {
        self.carrier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take_agent_channel(&self) -> Option<UnixStream> {
        self.agent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Sets something before the start.
    pub(super) async fn put(&self, path: &'static str, body: &Value) -> Result<()> {
        self.explain(
            "set up the machine",
            self.api.put(path, body, self.deadlines.request),
        )
        .await
    }

    /// Lets the vCPUs run or stand still.
    pub(super) async fn set_running(&self, running: bool) -> Result<()> {
        let state = if running { "Resumed" } else { "Paused" };
        let body = json!({ "state": state });
        let deadline = self.deadlines.request;
        let request = self.api.patch("/vm", Some(&body), deadline);
        self.explain("stop or resume the vCPUs", request).await
    }

    /// `Running`, `Paused` or `Not started`.
    pub(super) async fn state(&self) -> Result<String> {
        let info = self.api.get::<InstanceInfo>("/", self.deadlines.request);
        Ok(self
            .explain("look at the machine's state", info)
            .await?
            .state)
    }

    /// How it ended, if it has or is just about to.
    async fn last_words(&self) -> Option<VmmExit> {
        let patience = self.deadlines.last_words;
        self.process.wait_exit_for(patience).await
    }

    /// Does `work`; a Firecracker that died meanwhile is reported as such, with what it said.
    pub(super) async fn explain<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = std::result::Result<T, ApiError>> + Send,
    ) -> Result<T> {
        let died = |exit| VmmError::Died {
            what,
            exit: Box::new(exit),
        };
        if let Some(exit) = self.process.exited() {
            return Err(died(exit));
        }
        match work.await {
            Err(error @ (ApiError::Connect { .. } | ApiError::Broken { .. })) => {
                match self.last_words().await {
                    Some(exit) => Err(died(exit)),
                    None => Err(error.into()),
                }
            }
            result => Ok(result?),
        }
    }
}
