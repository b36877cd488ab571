//! A machine before its state: everything is there, nothing has been touched.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use qapi::qmp::RunState;

use crate::error::{Result, VmmError};
use crate::inject::userfaultfd_of;
use crate::machine::{MachineConfig, VmmIdentity};
use crate::memory::GuestMemory;
use crate::qemu::binary::QemuBinary;
use crate::qemu::command_line::Start;
use crate::qemu::instance::{Instance, host};
use crate::qemu::state;
use crate::qemu::vm::QemuVm;
use crate::vmm::{Vmm, VmmExit};

/// A QEMU that waits for a device state, its guest's memory all hole. Dropping it kills it.
///
/// The caller puts the memory under userfaultfd and starts to serve it, or fills the memfd, and
/// then calls [`IncomingVm::load`]: loading touches guest memory (the devices' queues).
#[derive(Debug)]
pub struct IncomingVm {
    qemu: Instance,
}

/// Starts a machine that will load a state. `machine` must be the one that made the state, but
/// for its paths, and the caller must see to that: QEMU notices another memory size, but loads
/// the state of a machine without network into one with it and says nothing. Compare
/// [`QemuBinary::identity`] with the recorded one, too.
///
/// # Errors
/// As [`boot`](crate::qemu::boot).
pub async fn prepare_resume(
    binary: &QemuBinary,
    machine: &MachineConfig,
    console_log: &Path,
) -> Result<IncomingVm> {
    let qemu = Instance::start(binary, machine, Start::Incoming, console_log).await?;
    Ok(IncomingVm { qemu })
}

impl IncomingVm {
    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.qemu.process.pid()
    }

    /// Who this is.
    #[must_use]
    pub fn identity(&self) -> &VmmIdentity {
        &self.qemu.identity
    }

    /// Where the guest's memory is.
    ///
    /// # Errors
    /// QEMU is gone, or its mappings cannot be read.
    pub fn memory(&self) -> Result<GuestMemory> {
        self.qemu.memory()
    }

    /// A new userfaultfd of QEMU's address space, non-blocking, without any handshake yet. QEMU
    /// keeps a copy: should our process die, its guest waits instead of reading zeroes.
    ///
    /// # Errors
    /// ptrace or userfaultfd is forbidden here: then fill the memory eagerly. After
    /// [`InjectError::Deadline`](crate::InjectError::Deadline) QEMU cannot be relied on any
    /// more: drop it.
    pub async fn userfaultfd(&self) -> Result<OwnedFd> {
        let (pid, pidfd, device) = self.qemu.for_injection();
        // ptrace belongs to a thread and blocks it: not one of the runtime's.
        let injected =
            tokio::task::spawn_blocking(move || userfaultfd_of(pid, pidfd.as_fd(), device));
        let injected = host(
            "run a thread",
            injected.await.map_err(std::io::Error::other),
        )?;
        Ok(injected?)
    }

    /// Waits until QEMU has ended, and says how.
    pub async fn wait_exit(&self) -> VmmExit {
        self.qemu.wait_exit().await
    }

    /// Loads a device state. The machine is whole then, and still stopped. The guest's memory
    /// must be served or filled meanwhile: by another thread.
    ///
    /// # Errors
    /// QEMU refuses the state or dies over it; it is killed then.
    pub async fn load(self, vmstate: &[u8]) -> Result<Box<dyn Vmm>> {
        state::load(&self.qemu, vmstate).await?;
        let run_state = self.qemu.run_state().await?;
        if run_state != RunState::paused {
            let state = qapi::Enum::name(&run_state).to_owned();
            return Err(VmmError::WrongState {
                what: "resume from this state",
                state,
            });
        }
        Ok(Box::new(QemuVm::new(self.qemu)))
    }
}
