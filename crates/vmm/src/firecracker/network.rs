//! A guest's network: what QEMU's user-mode network is, for a VMM that only knows tap devices.
//!
//! ```text
//! guest ─ Firecracker ─ tap "card" ─ bridge ─ tap "uplink" ─ slirp4netns ─▶ sockets of the host
//!         └────────── one network namespace for each machine ─────────┘
//! ```
//!
//! Connections out, none in. Guests find the addresses that they have on QEMU (10.0.2.15, gateway
//! 10.0.2.2, name server 10.0.2.3), and every machine its devices under the same names: a device state
//! names its tap, so that any number of machines can be resumed from one without telling each of
//! another. Unlike QEMU's, it does not lead to the host's loopback.
//!
//! Nothing of it has a name on the host or outlives a process: the namespace ends with Firecracker,
//! slirp4netns with the thread of ours that started it. Root is needed.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::timeout;

use crate::error::{Result, VmmError};
use crate::process::{Process, Spawn};

/// The tap that a device state names.
pub(super) const CARD: &str = "card";
/// slirp4netns makes it.
const UPLINK: &str = "uplink";
const BRIDGE: &str = "bridge";
/// Where network tools are.
const SEARCHED: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// How long slirp4netns may take to be ready, and the kernel to make three devices: milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// The number that the namespace has in a program that works in it, …
const NAMESPACE_FD: i32 = 3;
/// … as a path, …
const NAMESPACE_PATH: &str = "/proc/self/fd/3";
/// … and that of the pipe by which slirp4netns says that it is ready.
const READY_FD: i32 = 4;

/// The network of one machine; gone when dropped.
#[derive(Debug)]
pub(super) struct Network {
    _slirp: Process,
}

impl Network {
    /// Makes it around a Firecracker that was started in a namespace of its own. `owner` is who may
    /// open the tap.
    pub(super) async fn around(
        process: &Process,
        programs: Programs,
        owner: Option<u32>,
        dir: &Path,
    ) -> Result<Self> {
        let failed = |source| VmmError::Host {
            what: "look into Firecracker's network namespace",
            source,
        };
        let namespace = namespace_of(process).map_err(failed)?;
        let for_slirp = namespace.try_clone().map_err(failed)?;
        let slirp = start_slirp(programs.slirp, for_slirp, dir).await?;
        let made = tokio::task::spawn_blocking(move || {
            make_devices(&programs.nsenter, &programs.ip, namespace, owner)
        });
        let made = match timeout(DEADLINE, made).await {
            Ok(Ok(made)) => made,
            Ok(Err(panicked)) => Err(io::Error::other(panicked)),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        made.map_err(|source| VmmError::Host {
            what: "make the guest's network devices",
            source,
        })?;
        Ok(Self { _slirp: slirp })
    }
}

/// The programs that make it.
#[derive(Debug)]
pub(super) struct Programs {
    slirp: PathBuf,
    nsenter: PathBuf,
    ip: PathBuf,
}

impl Programs {
    /// Before anything is started.
    ///
    /// # Errors
    /// What is missing, with the next step.
    pub(super) fn find() -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(VmmError::InvalidMachine {
                what: "a network on Firecracker is made by root: run torpor as root, or leave the \
                       network out"
                    .to_owned(),
            });
        }
        let find = |name: &str, package: &str| {
            let mut places = SEARCHED.iter().map(|dir| Path::new(dir).join(name));
            places
                .find(|path| path.is_file())
                .ok_or_else(|| VmmError::InvalidMachine {
                    what: format!(
                        "a network on Firecracker needs {name}; install it: apt-get install {package}"
                    ),
                })
        };
        Ok(Self {
            slirp: find("slirp4netns", "slirp4netns")?,
            nsenter: find("nsenter", "util-linux")?,
            ip: find("ip", "iproute2")?,
        })
    }
}

/// The network namespace of a process, which must not be ours.
fn namespace_of(process: &Process) -> io::Result<OwnedFd> {
    let namespace = File::open(format!("/proc/{}/ns/net", process.pid()))?;
    // Its number means it for as long as it lives, and it lived after the file was open.
    let mut ended = [PollFd::new(process.pidfd(), PollFlags::IN)];
    if poll(&mut ended, Some(&Timespec::default()))? > 0 {
        return Err(io::Error::other("it has ended"));
    }
    let ours = std::fs::metadata("/proc/self/ns/net")?;
    if namespace.metadata()?.ino() == ours.ino() {
        return Err(io::Error::other("it is the host's"));
    }
    Ok(namespace.into())
}

async fn start_slirp(program: PathBuf, namespace: OwnedFd, dir: &Path) -> Result<Process> {
    let failed = |source| VmmError::Host {
        what: "make a pipe for slirp4netns",
        source,
    };
    let (ready, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    rustix::io::ioctl_fionbio(&ready, true).map_err(|e| failed(e.into()))?;
    let mut ready = Receiver::from_owned_fd(ready).map_err(failed)?;
    let ready_fd = format!("--ready-fd={READY_FD}");
    let args = [
        // The guest's packets are taken apart by it: it gets to see and do as little as can be.
        "--enable-sandbox",
        "--enable-seccomp",
        "--disable-host-loopback",
        "--netns-type=path",
        &ready_fd,
        NAMESPACE_PATH,
        UPLINK,
    ];
    let slirp = Process::spawn(Spawn {
        program,
        args: args.map(Into::into).to_vec(),
        dir: dir.to_owned(),
        fds: vec![(NAMESPACE_FD, namespace), (READY_FD, theirs)],
        stdout: None,
        console: None,
        confinement: None,
        own_network: false,
    })
    .await?;
    let said = timeout(DEADLINE, ready.read_u8()).await;
    if matches!(said, Ok(Ok(_))) {
        return Ok(slirp);
    }
    // It closes the pipe when it ends; one that hangs is killed for it.
    let exit = slirp.kill().await?;
    Err(VmmError::NetworkHelper {
        exit: Box::new(exit),
    })
}

/// Makes the guest's tap and joins it with the uplink.
fn make_devices(
    nsenter: &Path,
    ip: &Path,
    namespace: OwnedFd,
    owner: Option<u32>,
) -> io::Result<()> {
    let mut command = Command::new(nsenter);
    command
        .arg(format!("--net={NAMESPACE_PATH}"))
        .arg(ip)
        .args(["-batch", "-"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mapping = FdMapping {
        parent_fd: namespace,
        child_fd: NAMESPACE_FD,
    };
    command
        .fd_mappings(vec![mapping])
        .map_err(io::Error::other)?;
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(devices(owner).as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("ip {}: {said}", output.status)))
}

/// What `ip -batch` is told.
fn devices(owner: Option<u32>) -> String {
    let user = owner.map_or_else(String::new, |uid| format!(" user {uid}"));
    format!(
        "tuntap add dev {CARD} mode tap{user}\n\
         link add {BRIDGE} type bridge\n\
         link set {UPLINK} master {BRIDGE}\n\
         link set {CARD} master {BRIDGE}\n\
         link set {UPLINK} up\n\
         link set {CARD} up\n\
         link set {BRIDGE} up\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_jails_user_may_open_the_card() {
        assert!(devices(Some(1234)).starts_with("tuntap add dev card mode tap user 1234\n"));
        assert!(devices(None).starts_with("tuntap add dev card mode tap\n"));
    }
}
