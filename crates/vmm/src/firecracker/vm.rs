//! A machine that runs, or could.
//!
//! Taking the device state *writes to guest memory*: Firecracker tells the guest that its vsock
//! connections are over, in the vsock's event queue. So memory, and the set of written pages, must be
//! taken after the state, or a resumed guest waits on a connection that is none.
//!
//! Nothing else writes to it while the vCPUs stand still, whatever comes in by the network card's tap, a
//! socket or a timer: from a `Paused` that was asked for by the API until the `Resumed`, the thread that
//! works for all devices takes requests only (`request_is_pause`, src/firecracker/src/
//! api_server_adapter.rs in 1.10 to 1.16: "device emulation is implicitly paused"). A machine that was
//! loaded and never ran is called paused, too, without that: so whoever takes a state stops the vCPUs
//! first, even if they seem to stand still. What came in meanwhile waits in the tap and the sockets.
//!
//! From 1.16 on, Firecracker delivers nothing to a guest's vsock after a `Resumed` until the guest has
//! acknowledged such an event, whether there was one or not (`pending_event_ack`, devices/virtio/
//! vsock/device.rs: `kick` shuts the gate at every resume; taken back in 1.17's development). So a
//! machine whose vCPUs run is not told to resume (but for one whose stop is in doubt: it serves no device
//! until it is, and is stopped once more for the state), and one that was stopped without its state being
//! taken has it taken, for the event alone, before it goes on: else no byte would reach its agent again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::net::UnixStream;

use crate::error::{Result, VmmError};
use crate::firecracker::api::ApiError;
use crate::firecracker::balloon::{InstalledBalloon, install_balloon};
use crate::firecracker::binary::FirecrackerBinary;
use crate::firecracker::config::{self, names, ram_layout};
use crate::firecracker::drain::drain_balloon;
use crate::firecracker::instance::Instance;
use crate::firecracker::memory::locate;
use crate::machine::{BootSource, MachineConfig, VmmIdentity};
use crate::memory::{GuestMemory, MemoryMapping, RamSegment};
use crate::version::Version;
use crate::vmm::{DiscardedBytes, DrainOutcome, DrainReport, Vmm, VmmExit};

/// The largest device state. A small guest's has 20 to 40 KB.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// What the file is called in errors.
const STATE_ROLE: &str = "device state";
/// What Firecracker is told to write the guest's memory to: its directory, which no one can write
/// to as a file.
const NOWHERE: &str = ".";
/// Firecracker's words when it cannot (`MemoryBackingFile`): the device state is complete by then.
const NOWHERE_REFUSED: &str = "memory backing file";
/// The first version that delivers nothing to the guest's vsock until a reset was acknowledged.
const RESET_GATE_SINCE: Version = Version::new(1, 16, 0);
/// The state that `GET /` names once the vCPUs run.
const RUNNING: &str = "Running";

/// A Firecracker with a guest in it.
#[derive(Debug)]
pub(super) struct FirecrackerVm {
    pub(super) instance: Instance,
    /// Where it has its guest's memory.
    mappings: Vec<MemoryMapping>,
    /// Whether an event that ends its connections waits for the guest.
    reset_waits: AtomicBool,
    /// Whether the vCPUs were told to stand still since they were last known to run.
    stands_still: AtomicBool,
    /// Whether Firecracker was told to stop them, and did not say that it has. It serves no device from
    /// then on until it is told to let them go on, whatever became of the stop.
    stop_in_doubt: AtomicBool,
}

/// Boots a machine in `dir`, an empty directory that is its alone. It runs when this returns;
/// whether its guest comes up is for the caller to see, by the agent's channel. The console goes to
/// `console_log`, which is bounded and starts empty. Says what balloon was installed.
///
/// # Errors
/// The machine is impossible, a file is missing, the host has no room, Firecracker refuses
/// something or ends at once (its last words are in the error).
pub async fn boot(
    binary: &FirecrackerBinary,
    machine: &MachineConfig,
    boot: &BootSource,
    dir: &Path,
    console_log: &Path,
) -> Result<(Box<dyn Vmm>, InstalledBalloon)> {
    let requests = config::requests(machine, boot)?;
    let instance = Instance::start(binary, machine, Some(boot), dir, console_log).await?;
    for (path, body) in &requests {
        instance.put(path, body).await?;
    }
    let balloon = install_balloon(
        &instance.api,
        binary.version,
        machine.free_page_reporting,
        instance.deadlines.request,
    );
    let balloon = instance.explain("install the balloon", balloon).await?;
    let vsock = instance.hold_vsock()?;
    instance
        .put("/actions", &json!({ "action_type": "InstanceStart" }))
        .await?;
    instance.open_agent_channel(vsock, true)?;
    let command_line = config::kernel_command_line(boot)?;
    let mappings = locate(
        instance.process.pid(),
        &ram_layout(binary.version, instance.memory_bytes),
        config::unbroken(&command_line),
    )?;
    let vm = FirecrackerVm {
        instance,
        mappings,
        reset_waits: AtomicBool::new(false),
        stands_still: AtomicBool::new(false),
        stop_in_doubt: AtomicBool::new(false),
    };
    Ok((Box::new(vm), balloon))
}

impl FirecrackerVm {
    /// A machine whose state was loaded: the state holds the event.
    pub(super) fn loaded(instance: Instance, mappings: Vec<MemoryMapping>) -> Self {
        Self {
            instance,
            mappings,
            reset_waits: AtomicBool::new(true),
            stands_still: AtomicBool::new(true),
            stop_in_doubt: AtomicBool::new(false),
        }
    }

    /// Takes the device state without the memory. Firecracker writes the state first, then opens
    /// the memory's file, which it cannot: so the guest stands still for the state alone, and
    /// nothing of its memory is copied twice. The guest's connections are over then.
    async fn save_to_file(&self) -> Result<()> {
        self.instance.let_agent_go().await;
        let body = json!({
            "snapshot_type": "Full",
            "snapshot_path": names::STATE,
            "mem_file_path": NOWHERE,
        });
        let api = &self.instance.api;
        let save = api.put("/snapshot/create", &body, self.instance.deadlines.request);
        let saved = self.instance.explain("save the device state", save).await;
        let reason = match saved {
            Err(VmmError::Api {
                source: ApiError::Refused { fault_message, .. },
            }) if fault_message.contains(NOWHERE_REFUSED) => {
                self.reset_waits.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Err(VmmError::Api {
                source: ApiError::Refused { fault_message, .. },
            }) => fault_message,
            Err(error) => return Err(error),
            Ok(()) => "it wrote the guest's memory into a directory".to_owned(),
        };
        Err(VmmError::State {
            what: "save",
            reason,
        })
    }

    /// Has the vCPUs run. After a stop that is in doubt Firecracker goes on even if it refuses, or answers
    /// too late: it takes late answers of its vCPUs to the stop for those to this, and will be one answer
    /// behind for good.
    async fn let_run(&self, stop_in_doubt: bool) -> Result<()> {
        let refused = match self.instance.set_running(true).await {
            Err(VmmError::Api {
                source: source @ (ApiError::Refused { .. } | ApiError::Timeout { .. }),
            }) if stop_in_doubt => source,
            done => return done,
        };
        // It answers one request after the other: when it answers this, it has taken in the one before.
        self.instance.state().await?;
        tracing::warn!(
            "the vCPUs did not stop in time, and go on ({refused}); this machine may never be paused again: \
             take out what you need and end it"
        );
        Ok(())
    }

    /// Takes a state for the event that comes with it. Where it cannot be taken the guest goes on all
    /// the same: only its agent is out of reach, and the next state gives it back.
    async fn end_connections(&self) -> Result<()> {
        match self.save_to_file().await {
            Ok(()) => {
                // What stays behind is never read: the next state is written over it.
                let removed = self.instance.dir.remove(STATE_ROLE, names::STATE).await;
                if let Err(error) = removed {
                    tracing::warn!("a device state that nobody needs stays behind: {error}");
                }
                Ok(())
            }
            Err(error @ VmmError::Died { .. }) => Err(error),
            Err(error) => {
                tracing::warn!(
                    "the guest's agent may be out of reach until the next pause: {error}"
                );
                Ok(())
            }
        }
    }
}

/// Memory that the guest holds on the host: what is resident of its mappings.
fn held_bytes(memory: &GuestMemory) -> u64 {
    memory.held_bytes().unwrap_or_else(|error| {
        tracing::debug!("cannot look at the guest's memory: {error}");
        0
    })
}

#[async_trait]
impl Vmm for FirecrackerVm {
    fn identity(&self) -> &VmmIdentity {
        &self.instance.identity
    }

    fn pid(&self) -> u32 {
        self.instance.process.pid()
    }

    fn is_alive(&self) -> bool {
        self.instance.process.exited().is_none()
    }

    fn memory(&self) -> Result<GuestMemory> {
        if let Some(exit) = self.instance.process.exited() {
            return Err(VmmError::Died {
                what: "find the guest's memory",
                exit: exit.into(),
            });
        }
        Ok(GuestMemory {
            memfd: None,
            len_bytes: self.instance.memory_bytes,
            pid: self.pid(),
            mappings: self.mappings.clone(),
        })
    }

    fn ram(&self) -> Vec<RamSegment> {
        ram_layout(self.instance.version, self.instance.memory_bytes)
    }

    fn take_agent_channel(&self) -> Option<UnixStream> {
        self.instance.take_agent_channel()
    }

    async fn stop_vcpus(&self) -> Result<()> {
        self.stands_still.store(true, Ordering::Relaxed);
        self.stop_in_doubt.store(true, Ordering::Relaxed);
        self.instance.set_running(false).await?;
        self.stop_in_doubt.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn resume_vcpus(&self) -> Result<()> {
        let gated = self.instance.version >= RESET_GATE_SINCE;
        // It may run because it was told to, without our hearing of it, or because it did not stop.
        let mut runs = self.instance.state().await? == RUNNING;
        let in_doubt = self.stop_in_doubt.load(Ordering::Relaxed);
        if runs && in_doubt && gated {
            // The event that it needs comes with a state, which it gives only while it stands still.
            if let Err(error) = self.instance.set_running(false).await {
                tracing::warn!("the vCPUs do not stop: {error}");
                runs = self.instance.state().await? == RUNNING;
            } else {
                runs = false;
            }
        }
        if !runs && gated && !self.reset_waits.load(Ordering::Relaxed) {
            self.end_connections().await?;
        }
        if !runs || in_doubt {
            // Before it is asked: an answer that is lost must not leave an event behind that is the
            // guest's already. One too many costs a state.
            self.reset_waits.store(false, Ordering::Relaxed);
            self.let_run(in_doubt).await?;
        }
        self.stop_in_doubt.store(false, Ordering::Relaxed);
        self.stands_still.store(false, Ordering::Relaxed);
        self.instance.reach_agent();
        Ok(())
    }

    async fn save_state(&self) -> Result<Vec<u8>> {
        let state = self.instance.state().await?;
        if state != "Paused" {
            return Err(VmmError::WrongState {
                what: "save the device state",
                state,
            });
        }
        self.save_to_file().await?;
        let dir = &self.instance.dir;
        let state = dir.take(STATE_ROLE, names::STATE, STATE_BYTES_MAX).await?;
        state.ok_or_else(|| VmmError::StateTooLarge {
            limit_bytes: usize::try_from(STATE_BYTES_MAX).unwrap_or(usize::MAX),
        })
    }

    async fn drain(&self, ceiling: Duration, discarded: Option<DiscardedBytes<'_>>) -> DrainReport {
        let (api, version) = (&self.instance.api, self.instance.version);
        // One that has ended holds none, which the report says.
        let memory = self.memory().ok();
        let held = Arc::new(move || memory.as_ref().map_or(0, held_bytes));
        // A start is answered then, and lost, and that the run before is done is still told.
        let stands_still = self.stands_still.load(Ordering::Relaxed);
        let ceiling = if stands_still {
            Duration::ZERO
        } else {
            ceiling
        };
        let mut report = drain_balloon(api, version, ceiling, held, discarded).await;
        if stands_still {
            report.outcome = DrainOutcome::Failed("the machine stands still".to_owned());
        }
        if let (DrainOutcome::Failed(why), Some(exit)) =
            (&mut report.outcome, self.instance.process.exited())
        {
            *why = format!("the VMM {exit}");
        }
        report
    }

    async fn wait_exit(&self) -> VmmExit {
        self.instance.process.wait_exit().await
    }

    async fn kill(&self) -> Result<VmmExit> {
        self.instance.process.kill().await
    }
}
