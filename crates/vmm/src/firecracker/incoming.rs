//! A machine before its state.
//!
//! ```text
//! prepare_resume ─▶ IncomingFirecracker ─ hand_over(vmstate) ─▶ Handshake
//!                                       │                          │ serve the page faults
//!                                       └────── finish ◀───────────┘
//!                                                 │
//!                                             dyn Vmm (stopped)
//! ```
//!
//! Firecracker makes its memory and its userfaultfd in the middle of the load, and touches guest
//! memory in the rest of it. So the load runs beside the caller, who must serve what it was handed
//! before it waits for the load.

use std::path::Path;

use serde_json::json;
use tokio::task::{JoinError, JoinSet};

use crate::error::{Result, VmmError};
use crate::firecracker::api::ApiError;
use crate::firecracker::binary::FirecrackerBinary;
use crate::firecracker::config::names;
use crate::firecracker::handshake::{Handshake, HandshakeSocket};
use crate::firecracker::instance::Instance;
use crate::firecracker::vm::FirecrackerVm;
use crate::machine::{MachineConfig, VmmIdentity};
use crate::memory::MemoryMapping;
use crate::vmm::{Vmm, VmmExit};

/// A Firecracker that waits for a device state. Dropping it kills it.
#[derive(Debug)]
pub struct IncomingFirecracker {
    instance: Instance,
    socket: HandshakeSocket,
    /// The load, once it was asked for. It ends with this.
    load: JoinSet<std::result::Result<(), ApiError>>,
    mappings: Vec<MemoryMapping>,
}

/// Starts a Firecracker that will load a state, in `dir`, an empty directory that is its alone.
/// `machine` must be the one that made the state, but for its paths; compare
/// [`FirecrackerBinary::identity`] with the recorded one, too: a failed load ends the process.
///
/// # Errors
/// As [`boot`](crate::firecracker::boot).
pub async fn prepare_resume(
    binary: &FirecrackerBinary,
    machine: &MachineConfig,
    dir: &Path,
    console_log: &Path,
) -> Result<IncomingFirecracker> {
    let instance = Instance::start(binary, machine, None, dir, console_log).await?;
    let socket = HandshakeSocket::bind(&instance.dir.socket(names::PAGER_SOCKET))?;
    instance.dir.hand_over(names::PAGER_SOCKET)?;
    Ok(IncomingFirecracker {
        instance,
        socket,
        load: JoinSet::new(),
        mappings: Vec::new(),
    })
}

impl IncomingFirecracker {
    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.instance.process.pid()
    }

    /// Who this is.
    #[must_use]
    pub fn identity(&self) -> &VmmIdentity {
        &self.instance.identity
    }

    /// Begins to load a device state, until Firecracker has handed its page faults over. They must
    /// be served from then on.
    ///
    /// # Errors
    /// Firecracker refuses the state, dies over it, or hands over something else.
    pub async fn hand_over(&mut self, vmstate: &[u8]) -> Result<Handshake> {
        let dir = &self.instance.dir;
        dir.write("device state", names::STATE, vmstate).await?;
        let api = self.instance.api.clone();
        // Sockets and drives are found by name in this machine's directory: nothing to override.
        let body = json!({
            "snapshot_path": names::STATE,
            "mem_backend": { "backend_path": names::PAGER_SOCKET, "backend_type": "Uffd" },
            "resume_vm": false,
        });
        let deadlines = self.instance.deadlines;
        // The load keeps its socket: once that is closed, its number may be another machine's.
        let socket = self.instance.api_socket.clone();
        self.load.spawn(async move {
            let _socket = socket;
            api.put("/snapshot/load", &body, deadlines.load).await
        });
        let received = self.socket.receive(
            self.instance.process.pid(),
            self.instance.memory_bytes,
            deadlines.handshake,
        );
        tokio::select! {
            biased;
            handshake = received => {
                let handshake = handshake?;
                self.mappings.clone_from(&handshake.mappings);
                Ok(handshake)
            }
            loaded = self.load.join_next() => Err(self.why_not(loaded).await),
        }
    }

    async fn why_not(
        &self,
        loaded: Option<std::result::Result<std::result::Result<(), ApiError>, JoinError>>,
    ) -> VmmError {
        let outcome = match loaded {
            Some(Ok(outcome)) => outcome,
            Some(Err(join)) => return no_load(join.to_string()),
            None => return no_load("it was not asked to".to_owned()),
        };
        match self
            .instance
            .explain("load the device state", async { outcome })
            .await
        {
            Ok(()) => no_load("it asked nobody for its memory".to_owned()),
            Err(VmmError::Api {
                source: ApiError::Refused { fault_message, .. },
            }) => no_load(fault_message),
            Err(error) => error,
        }
    }

    /// Waits until Firecracker has ended, and says how.
    pub async fn wait_exit(&self) -> VmmExit {
        self.instance.process.wait_exit().await
    }

    /// Waits until the state is loaded. The machine is whole then, and still stopped; its agent's
    /// channel connects when the vCPUs run.
    ///
    /// # Errors
    /// Firecracker refuses the state or dies over it; it is killed then. Nothing was handed over.
    pub async fn finish(mut self) -> Result<Box<dyn Vmm>> {
        match self.load.join_next().await {
            Some(Ok(Ok(()))) => {}
            failed => return Err(self.why_not(failed).await),
        }
        let dir = &self.instance.dir;
        if let Err(error) = dir.remove("device state", names::STATE).await {
            tracing::debug!("the loaded device state stays behind: {error}");
        }
        self.instance
            .open_agent_channel(self.instance.hold_vsock()?, false)?;
        Ok(Box::new(FirecrackerVm::loaded(
            self.instance,
            self.mappings,
        )))
    }
}

fn no_load(reason: String) -> VmmError {
    VmmError::State {
        what: "load",
        reason,
    }
}
