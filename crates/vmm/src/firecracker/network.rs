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
//! The devices have no addresses and say nothing by themselves: what reaches the guest is for the guest.
//!
//! Nothing of it has a name on the host or outlives a process: the namespace ends with Firecracker,
//! slirp4netns with the thread of ours that started it. Root is needed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;
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
/// The number that the pipe with the devices has in `ip`, …
const SCRIPT_FD: i32 = 4;
/// … as a path.
const SCRIPT_PATH: &str = "/proc/self/fd/4";
/// What taps are made by.
const TUN: &str = "/dev/net/tun";
/// Is there where the host's kernel speaks IPv6.
const IPV6_ADDRESSES: &str = "/proc/self/net/if_inet6";

/// The network of one machine; gone when dropped.
#[derive(Debug)]
pub(super) struct Network {
    /// Tells when slirp4netns ends by itself.
    watch: JoinHandle<()>,
    _slirp: Process,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// Why a guest of Firecracker can have no network on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a network on Firecracker needs {missing}: {next_step}")]
pub struct NoNetwork {
    /// What is not there.
    pub missing: String,
    /// What to do.
    pub next_step: String,
}

/// Looks whether a guest of Firecracker can have a network on this host.
///
/// # Errors
/// What is missing first.
pub fn check_network() -> std::result::Result<(), NoNetwork> {
    Programs::find().map(drop)
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
        let slirp = start_slirp(programs.slirp.clone(), for_slirp, dir).await?;
        make_devices(&programs, namespace, owner, dir, DEADLINE).await?;
        let (ended, machine) = (slirp.ended(), dir.to_owned());
        let watch = tokio::spawn(async move {
            let exit = ended.await;
            tracing::warn!(
                machine = %machine.display(),
                "the guest is cut off from its network: slirp4netns {exit}"
            );
        });
        Ok(Self {
            watch,
            _slirp: slirp,
        })
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
    pub(super) fn find() -> std::result::Result<Self, NoNetwork> {
        let missing = |missing: &str, next_step: &str| NoNetwork {
            missing: missing.to_owned(),
            next_step: next_step.to_owned(),
        };
        if !rustix::process::geteuid().is_root() {
            let next_step = "run torpor as root, or the guest on QEMU, which needs no root for \
                             its network (--vmm qemu), or leave the network out";
            return Err(missing("root", next_step));
        }
        if !Path::new(TUN).exists() {
            return Err(missing(
                TUN,
                "modprobe tun; in a container allow the device",
            ));
        }
        let find = |name: &str, package: &str| {
            let mut places = SEARCHED.iter().map(|dir| Path::new(dir).join(name));
            let found = places.find(|path| path.is_file());
            found.ok_or_else(|| missing(name, &format!("apt-get install {package}")))
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

/// Makes the guest's tap and joins it with the uplink. What is not done in time is killed.
async fn make_devices(
    programs: &Programs,
    namespace: OwnedFd,
    owner: Option<u32>,
    dir: &Path,
    deadline: Duration,
) -> Result<()> {
    let failed = |source| VmmError::Host {
        what: "make the guest's network devices",
        source,
    };
    let (script, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    // A few hundred bytes: the pipe holds them all, and ends after them.
    let text = devices(owner, Path::new(IPV6_ADDRESSES).exists());
    File::from(writer)
        .write_all(text.as_bytes())
        .map_err(failed)?;
    let args: [OsString; 4] = [
        format!("--net={NAMESPACE_PATH}").into(),
        programs.ip.clone().into(),
        "-batch".into(),
        SCRIPT_PATH.into(),
    ];
    let ip = Process::spawn(Spawn {
        program: programs.nsenter.clone(),
        args: args.to_vec(),
        dir: dir.to_owned(),
        fds: vec![(NAMESPACE_FD, namespace), (SCRIPT_FD, script)],
        stdout: None,
        console: None,
        confinement: None,
        own_network: false,
    })
    .await?;
    match ip.wait_exit_for(deadline).await {
        Some(exit) if exit.code == Some(0) => Ok(()),
        Some(exit) => Err(failed(io::Error::other(format!("ip {exit}")))),
        None => {
            ip.kill().await?;
            Err(failed(io::ErrorKind::TimedOut.into()))
        }
    }
}

/// What `ip -batch` is told.
fn devices(owner: Option<u32>, has_ipv6: bool) -> String {
    let user = owner.map_or_else(String::new, |uid| format!(" user {uid}"));
    // Without addresses, and without a bridge that joins groups, they are silent.
    let silent = [CARD, UPLINK, BRIDGE]
        .iter()
        .filter(|_| has_ipv6)
        .fold(String::new(), |lines, device| {
            lines + &format!("link set dev {device} addrgenmode none\n")
        });
    format!(
        "tuntap add dev {CARD} mode tap{user}\n\
         link add {BRIDGE} type bridge mcast_snooping 0\n\
         {silent}\
         link set {UPLINK} master {BRIDGE}\n\
         link set {CARD} master {BRIDGE}\n\
         link set {UPLINK} up\n\
         link set {CARD} up\n\
         link set {BRIDGE} up\n"
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use rustix::process::{Pid, test_kill_process};

    use super::*;

    /// What a network is made with here, or why there is none.
    fn programs() -> Option<Programs> {
        Programs::find()
            .map_err(|no_network| println!("not run: {no_network}"))
            .ok()
    }

    /// A process that a network can be made around.
    async fn idle(dir: &Path) -> Process {
        let idle = Process::spawn(Spawn {
            program: "/bin/sleep".into(),
            args: vec!["600".into()],
            dir: dir.to_owned(),
            fds: Vec::new(),
            stdout: None,
            console: None,
            confinement: None,
            own_network: true,
        });
        idle.await.unwrap()
    }

    /// What `ip` says in its namespace.
    fn ip(programs: &Programs, process: &Process, words: &[&str]) -> String {
        let said = Command::new(&programs.nsenter)
            .arg(format!("--net=/proc/{}/ns/net", process.pid()))
            .arg(&programs.ip)
            .args(words)
            .output()
            .unwrap();
        assert!(said.status.success(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    }

    fn is_there(pid: u32) -> bool {
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        test_kill_process(pid).is_ok()
    }

    #[test]
    fn only_the_jails_user_may_open_the_card() {
        assert!(devices(Some(1234), true).starts_with("tuntap add dev card mode tap user 1234\n"));
        assert!(devices(None, true).starts_with("tuntap add dev card mode tap\n"));
    }

    #[test]
    fn a_kernel_without_ipv6_is_not_asked_about_its_addresses() {
        assert!(!devices(None, false).contains("addrgenmode"));
        assert_eq!(devices(None, true).matches("addrgenmode none").count(), 3);
    }

    #[tokio::test]
    async fn a_card_is_up_and_nothing_beside_it_has_an_address_or_says_anything() {
        let Some(programs) = programs() else { return };
        let dir = tempfile::tempdir().unwrap();
        let process = idle(dir.path()).await;
        let again = Programs::find().unwrap();
        let network = Network::around(&process, again, None, dir.path()).await;
        let network = network.unwrap();
        let links = ip(&programs, &process, &["-o", "link", "show", "up"]);
        for device in [CARD, UPLINK, BRIDGE] {
            assert!(links.contains(&format!(" {device}: ")), "{links}");
        }
        let addresses = ip(&programs, &process, &["-o", "addr"]);
        assert_eq!(addresses, "");
        // What the bridge, or an address that is tried, would send comes within a second.
        tokio::time::sleep(Duration::from_secs(2)).await;
        for device in [UPLINK, BRIDGE] {
            let counted = ip(&programs, &process, &["-s", "-j", "link", "show", device]);
            let counted: serde_json::Value = serde_json::from_str(&counted).unwrap();
            assert_eq!(counted[0]["stats64"]["tx"]["packets"], 0, "{counted}");
        }
        let slirp = network._slirp.ended();
        drop(network);
        assert_eq!(slirp.await.signal, Some(9));
    }

    #[tokio::test]
    async fn a_slirp4netns_that_dies_is_noticed() {
        let Some(programs) = programs() else { return };
        let dir = tempfile::tempdir().unwrap();
        let process = idle(dir.path()).await;
        let network = Network::around(&process, programs, None, dir.path()).await;
        let mut network = network.unwrap();
        assert!(!network.watch.is_finished());
        network._slirp.kill().await.unwrap();
        (&mut network.watch).await.unwrap();
    }

    #[tokio::test]
    async fn devices_that_cannot_be_made_are_an_error_with_ips_own_words() {
        let Some(programs) = programs() else { return };
        let dir = tempfile::tempdir().unwrap();
        let process = idle(dir.path()).await;
        // Without an uplink.
        let namespace = namespace_of(&process).unwrap();
        let error = make_devices(&programs, namespace, None, dir.path(), DEADLINE).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(UPLINK), "{error}");
    }

    #[tokio::test]
    async fn an_ip_that_hangs_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let (nsenter, pid_file) = (dir.path().join("nsenter"), dir.path().join("pid"));
        // Written by another process: what this one has open for writing, a child of another test may
        // have for a while, and nobody can run that.
        let text = dir.path().join("nsenter.sh");
        fs::write(&text, "#!/bin/sh\necho $$ >pid\nexec /bin/sleep 600\n").unwrap();
        let install = std::process::Command::new("install")
            .args([&text, &nsenter])
            .status();
        assert!(install.unwrap().success());
        let hangs = Programs {
            slirp: PathBuf::new(),
            nsenter,
            ip: PathBuf::new(),
        };
        let namespace = File::open("/proc/self/ns/net").unwrap().into();
        // In which it must have begun.
        let patience = Duration::from_secs(10);
        let error = make_devices(&hangs, namespace, None, dir.path(), patience).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains("timed out"), "{error}");
        let pid = fs::read_to_string(pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        assert!(!is_there(pid));
    }
}
