//! A machine that runs, or could.

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use qapi::qmp::{RunState, cont, stop};
use tokio::net::UnixStream;

use crate::error::{Result, VmmError};
use crate::machine::{BootSource, MachineConfig, VmmIdentity};
use crate::memory::{GuestMemory, RamSegment};
use crate::qemu::binary::QemuBinary;
use crate::qemu::command_line::Start;
use crate::qemu::instance::Instance;
use crate::qemu::ram::ram_layout;
use crate::qemu::{drain, state};
use crate::vmm::{DiscardedBytes, DrainReport, Vmm, VmmExit};

/// A QEMU with a guest in it.
#[derive(Debug)]
pub(super) struct QemuVm {
    qemu: Instance,
}

/// Boots a machine. It runs when this returns; whether its guest comes up is for the caller to
/// see, by the agent's channel. The console goes to `console_log`, which is bounded and starts
/// empty.
///
/// # Errors
/// The machine is impossible, a file is missing, the host has no room, or QEMU ends at once (its
/// last words are in the error).
pub async fn boot(
    binary: &QemuBinary,
    machine: &MachineConfig,
    boot: &BootSource,
    console_log: &Path,
) -> Result<Box<dyn Vmm>> {
    let qemu = Instance::start(binary, machine, Start::Kernel(boot), console_log).await?;
    let vm = QemuVm::new(qemu);
    vm.resume_vcpus().await?;
    Ok(Box::new(vm))
}

impl QemuVm {
    pub(super) fn new(qemu: Instance) -> Self {
        Self { qemu }
    }
}

#[async_trait]
impl Vmm for QemuVm {
    fn identity(&self) -> &VmmIdentity {
        &self.qemu.identity
    }

    fn pid(&self) -> u32 {
        self.qemu.process.pid()
    }

    fn is_alive(&self) -> bool {
        self.qemu.process.exited().is_none()
    }

    fn memory(&self) -> Result<GuestMemory> {
        self.qemu.memory()
    }

    fn ram(&self) -> Vec<RamSegment> {
        ram_layout(self.qemu.memory_bytes)
    }

    fn take_agent_channel(&self) -> Option<UnixStream> {
        self.qemu.take_agent_channel()
    }

    async fn stop_vcpus(&self) -> Result<()> {
        self.qemu.execute(stop {}).await?;
        Ok(())
    }

    async fn resume_vcpus(&self) -> Result<()> {
        self.qemu.execute(cont {}).await?;
        // QEMU answers before it knows: a machine whose disk could not be taken back stays put.
        match self.qemu.run_state().await? {
            RunState::running => Ok(()),
            other => Err(VmmError::WrongState {
                what: "resume the vCPUs",
                state: qapi::Enum::name(&other).to_owned(),
            }),
        }
    }

    async fn save_state(&self) -> Result<Vec<u8>> {
        state::save(&self.qemu).await
    }

    async fn drain(&self, ceiling: Duration, discarded: Option<DiscardedBytes<'_>>) -> DrainReport {
        drain::drain(&self.qemu, ceiling, discarded).await
    }

    async fn wait_exit(&self) -> VmmExit {
        self.qemu.wait_exit().await
    }

    async fn kill(&self) -> Result<VmmExit> {
        self.qemu.process.kill().await
    }
}
