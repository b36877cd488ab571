//! One QEMU process and the lines to it: QMP, the agent's channel, the guest's memory.

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qapi::qmp::{
    MigrationCapability, MigrationCapabilityStatus, QmpCommand, RunState, migrate_set_capabilities,
    query_status,
};
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::net::UnixStream;

use crate::console::ConsoleLog;
use crate::error::{Result, VmmError};
use crate::host::check_room;
use crate::machine::{BootSource, MachineConfig, VmmIdentity};
use crate::memory::{GuestMemory, create_memfd, locate};
use crate::process::{Process, Spawn};
use crate::qemu::binary::QemuBinary;
use crate::qemu::command_line::{Start, arguments, inherited};
use crate::qemu::qmp::Qmp;
use crate::vmm::VmmExit;

/// How long we wait for the reason when the connection breaks: a QEMU that ends closes it some
/// milliseconds before it is reaped.
const REASON_PATIENCE: Duration = Duration::from_secs(10);

/// The guest's page size.
const PAGE_BYTES: u64 = 4096;

/// A QEMU that has greeted us. Its vCPUs do not run yet.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) identity: VmmIdentity,
    pub(super) process: Process,
    pub(super) memory_bytes: u64,
    memfd: OwnedFd,
    qmp: Qmp,
    agent: Mutex<Option<UnixStream>>,
    /// Whether QEMU inherited `/dev/userfaultfd`.
    has_userfaultfd_device: bool,
}

impl Instance {
    pub(super) async fn start(
        binary: &QemuBinary,
        machine: &MachineConfig,
        start: Start<'_>,
        console_log: &Path,
    ) -> Result<Self> {
        machine.check()?;
        check_files(machine, start)?;
        check_room(machine.memory_bytes)?;
        let args = arguments(binary.version, machine, start)?;
        let console_log = ConsoleLog::create(console_log)?;
        let memfd = create_memfd(machine.memory_bytes)?;
        let (qmp, qmp_theirs) = socketpair()?;
        let (agent, agent_theirs) = socketpair()?;
        let (console, console_theirs) = socketpair()?;
        let mut fds = vec![
            (
                inherited::MEMORY,
                host("duplicate a descriptor", memfd.try_clone())?,
            ),
            (inherited::QMP, qmp_theirs.into()),
            (inherited::AGENT, agent_theirs.into()),
            (inherited::CONSOLE, console_theirs.into()),
        ];
        // For users who may not call userfaultfd(2). Its absence is no error here: root can.
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd");
        let has_userfaultfd_device = device.is_ok();
        fds.extend(
            device
                .ok()
                .map(|device| (inherited::USERFAULTFD_DEVICE, device.into())),
        );

        if let Start::Kernel(BootSource {
            initramfs: Some(initramfs),
            ..
        }) = start
        {
            fds.push((inherited::INITRAMFS, padded_copy(initramfs)?));
        }

        let process = Process::spawn(Spawn {
            program: binary.path.clone(),
            args,
            dir: PathBuf::from("/"),
            fds,
            stdout: None,
            console: Some((console, console_log)),
            confinement: None,
            own_network: false,
        })
        .await?;
        let qmp = match Qmp::open(qmp).await {
            Ok(qmp) => qmp,
            Err(error) => return Err(why_not_started(&process, error).await),
        };
        let agent = host("use a socket", agent.set_nonblocking(true))
            .and_then(|()| host("use a socket", UnixStream::from_std(agent)))?;
        let instance = Self {
            identity: binary.identity(machine.accel),
            process,
            memory_bytes: machine.memory_bytes,
            memfd,
            qmp,
            agent: Mutex::new(Some(agent)),
            has_userfaultfd_device,
        };
        instance.leave_memory_out_of_states().await?;
        Ok(instance)
    }

    /// Device state without memory: that stays in the memfd, where we read it.
    async fn leave_memory_out_of_states(&self) -> Result<()> {
        let capability = MigrationCapabilityStatus {
            capability: MigrationCapability::x_ignore_shared,
            state: true,
        };
        self.execute(migrate_set_capabilities {
            capabilities: vec![capability],
        })
        .await?;
        Ok(())
    }

    /// Runs a QMP command. A QEMU that died meanwhile is reported as such, with what it said.
    pub(super) async fn execute<C>(&self, command: C) -> Result<C::Ok>
    where
        C: QmpCommand + 'static,
        C::Ok: Send + 'static,
    {
        self.explain(C::NAME, self.qmp.execute(command)).await
    }

    pub(super) async fn send_descriptor(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        self.explain("getfd", self.qmp.send_descriptor(name, fd))
            .await
    }

    async fn explain<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        if let Some(exit) = self.process.exited() {
            return Err(VmmError::Died {
                what,
                exit: exit.into(),
            });
        }
        match work.await {
            Err(broken @ VmmError::Broken { .. }) => {
                match self.process.wait_exit_for(REASON_PATIENCE).await {
                    Some(exit) => Err(VmmError::Died {
                        what,
                        exit: exit.into(),
                    }),
                    None => Err(broken),
                }
            }
            result => result,
        }
    }

    pub(super) async fn run_state(&self) -> Result<RunState> {
        Ok(self.execute(query_status {}).await?.status)
    }

    pub(super) fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    pub(super) fn memory(&self) -> Result<GuestMemory> {
        if let Some(exit) = self.process.exited() {
            return Err(VmmError::Died {
                what: "find the guest's memory",
                exit: exit.into(),
            });
        }
        let memfd = host("duplicate a descriptor", self.memfd.try_clone())?;
        locate(memfd, self.process.pid(), self.memory_bytes)
    }

    pub(super) fn take_agent_channel(&self) -> Option<UnixStream> {
        self.agent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// What an injected call needs to know.
    pub(super) fn for_injection(&self) -> (u32, Arc<OwnedFd>, Option<i32>) {
        let device = self
            .has_userfaultfd_device
            .then_some(inherited::USERFAULTFD_DEVICE);
        (self.process.pid(), Arc::clone(self.process.pidfd()), device)
    }

    pub(super) async fn wait_exit(&self) -> VmmExit {
        self.process.wait_exit().await
    }
}

/// Looks at every file before QEMU does: its own messages do not say which role a file has.
fn check_files(machine: &MachineConfig, start: Start<'_>) -> Result<()> {
    let check = |role, path: &Path, write: bool| {
        let opened = OpenOptions::new().read(true).write(write).open(path);
        let file = opened.and_then(|file| {
            if file.metadata()?.is_file() {
                Ok(())
            } else {
                Err(io::ErrorKind::IsADirectory.into())
            }
        });
        file.map_err(|source| VmmError::File {
            role,
            path: path.to_owned(),
            source,
        })
    };
    check("base image", &machine.base_image, false)?;
    check("writable disk", &machine.writable_disk, true)?;
    if let Start::Kernel(boot) = start {
        check("kernel", &boot.kernel, false)?;
        if let Some(initramfs) = &boot.initramfs {
            check("initramfs", initramfs, false)?;
        }
    }
    Ok(())
}

/// Copies an initramfs into a memfd whose length is a multiple of a page.
///
/// QEMU puts the initramfs at the very end of guest memory, and the firmware puts the ACPI tables
/// (1 to 2 KiB) there as well: an end in the middle of the last page overwrites them, and the
/// guest finds no device. Which sizes do depends on the tables' size, thus on QEMU's version
/// (seen with 10.0, not with 7.2). An end at the page's start leaves the last page to the tables. Linux skips
/// zeroes after an archive.
fn padded_copy(initramfs: &Path) -> Result<OwnedFd> {
    let failed = |source| VmmError::File {
        role: "initramfs",
        path: initramfs.to_owned(),
        source,
    };
    let copy = || {
        let mut target = File::from(memfd_create("torpor-initramfs", MemfdFlags::CLOEXEC)?);
        let copied = io::copy(&mut File::open(initramfs)?, &mut target)?;
        target.set_len(copied.next_multiple_of(PAGE_BYTES))?;
        Ok(target.into())
    };
    copy().map_err(failed)
}

fn socketpair() -> Result<(StdUnixStream, StdUnixStream)> {
    host("make a socket pair", StdUnixStream::pair())
}

pub(super) fn host<T>(what: &'static str, result: io::Result<T>) -> Result<T> {
    result.map_err(|source| VmmError::Host { what, source })
}

/// Why a QEMU that has just been started cannot be talked to.
async fn why_not_started(process: &Process, error: VmmError) -> VmmError {
    // One that says nothing in time lives.
    if matches!(error, VmmError::Timeout { .. }) {
        return error;
    }
    match process.wait_exit_for(REASON_PATIENCE).await {
        Some(exit) => VmmError::Start { exit: exit.into() },
        None => error,
    }
}
