//! The device state, out of QEMU and into it: a migration of everything but the memory, through
//! a pipe.
//!
//! ```text
//! save: pipe ─ getfd ─▶ QEMU   migrate fd:           QEMU ─▶ pipe ─▶ Vec, up to the limit
//! load: pipe ─ getfd ─▶ QEMU   migrate-incoming fd:  Vec ─▶ pipe ─▶ QEMU
//! ```
//!
//! Either side is done when the pipe has ended *and* `query-migrate` says so. It is asked, not
//! listened for: an event can be missed, the whole takes 5 ms, and asking costs nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use qapi::qmp::{
    MigrationInfo, MigrationStatus, RunState, migrate, migrate_cancel, migrate_incoming,
    query_migrate,
};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::{Instant, sleep, timeout_at};

use crate::error::{Result, VmmError};
use crate::qemu::instance::{Instance, host};

/// How every device state begins: `QEMU_VM_FILE_MAGIC` (migration/savevm.h), big-endian. A QEMU
/// that is given less than its header waits for the rest for ever.
const STATE_MAGIC: [u8; 4] = *b"QEVM";
/// The largest device state. A microvm's has 70 KB, a q35's 0.7 MB; what is larger is not one,
/// or is memory that slipped in.
const STATE_BYTES_MAX: usize = 64 << 20;
/// How long saving or loading may take: 5 ms on an idle host.
const STATE_DEADLINE: Duration = Duration::from_secs(30);
/// How often a migration is asked whether it is done.
const STATUS_INTERVAL: Duration = Duration::from_millis(1);
/// The descriptor's name in QEMU.
const DESCRIPTOR_NAME: &str = "vmstate";
/// The same as a migration's address.
const DESCRIPTOR_URI: &str = "fd:vmstate";
/// What a state is read in: a few times 64 KiB, the size of a pipe.
const FIRST_BUFFER_BYTES: usize = 256 << 10;

const SAVE: &str = "save";
const LOAD: &str = "load";

/// Takes the device state of a stopped machine.
pub(super) async fn save(qemu: &Instance) -> Result<Vec<u8>> {
    let state = qemu.run_state().await?;
    if state != RunState::paused {
        return Err(VmmError::WrongState {
            what: "save the device state",
            state: spell(state),
        });
    }
    let (ours, theirs) = pipe()?;
    let ours = host("use a pipe", Receiver::from_owned_fd(ours))?;
    qemu.send_descriptor(DESCRIPTOR_NAME, theirs.as_fd())
        .await?;
    // QEMU must be the only writer: the pipe ends when it closes it.
    drop(theirs);
    let deadline = Instant::now() + STATE_DEADLINE;
    let to_pipe = migrate {
        uri: Some(DESCRIPTOR_URI.to_owned()),
        channels: None,
        detach: None,
        resume: None,
    };
    qemu.execute(to_pipe).await?;
    let state = match read_to_end(ours, deadline).await {
        Ok(state) => state,
        Err(error) => {
            give_up(qemu).await;
            return Err(error);
        }
    };
    if let Err(error) = wait_until_done(qemu, SAVE, deadline).await {
        give_up(qemu).await;
        return Err(error);
    }
    Ok(state)
}

/// Gives a machine that waits for one its device state. The machine stays stopped.
pub(super) async fn load(qemu: &Instance, state: &[u8]) -> Result<()> {
    if !state.starts_with(&STATE_MAGIC) {
        let reason = format!("these {} bytes are none", state.len());
        return Err(VmmError::State { what: LOAD, reason });
    }
    let (theirs, ours) = pipe()?;
    let mut ours = host("use a pipe", Sender::from_owned_fd(ours))?;
    qemu.send_descriptor(DESCRIPTOR_NAME, theirs.as_fd())
        .await?;
    drop(theirs);
    let deadline = Instant::now() + STATE_DEADLINE;
    let from_pipe = migrate_incoming {
        uri: Some(DESCRIPTOR_URI.to_owned()),
        channels: None,
        exit_on_error: None,
    };
    qemu.execute(from_pipe).await?;
    let written = timeout_at(deadline, ours.write_all(state)).await;
    drop(ours);
    // A QEMU that refuses the state closes the pipe: its reason is worth more than ours.
    match written {
        Ok(written) => {
            wait_until_done(qemu, LOAD, deadline).await?;
            host("write the device state", written)
        }
        Err(_) => Err(timed_out("migrate-incoming")),
    }
}

async fn read_to_end(pipe: Receiver, deadline: Instant) -> Result<Vec<u8>> {
    let mut state = Vec::with_capacity(FIRST_BUFFER_BYTES);
    let mut limited = pipe.take(STATE_BYTES_MAX as u64 + 1);
    let read = timeout_at(deadline, limited.read_to_end(&mut state))
        .await
        .map_err(|_| timed_out("migrate"))?;
    host("read the device state", read)?;
    if state.len() > STATE_BYTES_MAX {
        return Err(VmmError::StateTooLarge {
            limit_bytes: STATE_BYTES_MAX,
        });
    }
    Ok(state)
}

async fn wait_until_done(qemu: &Instance, what: &'static str, deadline: Instant) -> Result<()> {
    loop {
        let info = qemu.execute(query_migrate {}).await?;
        match info.status {
            Some(MigrationStatus::completed) => return Ok(()),
            Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                return Err(VmmError::State {
                    what,
                    reason: reason(&info),
                });
            }
            _ => {}
        }
        if Instant::now() >= deadline {
            return Err(timed_out("query-migrate"));
        }
        sleep(STATUS_INTERVAL).await;
    }
}

/// Ends a migration that is of no use any more, so that the vCPUs can be resumed. Best effort:
/// if QEMU does not follow, the resume will say so.
async fn give_up(qemu: &Instance) {
    if let Err(error) = qemu.execute(migrate_cancel {}).await {
        tracing::warn!("cannot cancel a migration: {error}");
        return;
    }
    // Until it has ended in one way or another.
    let ended = wait_until_done(qemu, SAVE, Instant::now() + STATE_DEADLINE).await;
    tracing::debug!(?ended, "migration given up");
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    host(
        "make a pipe",
        pipe_with(PipeFlags::CLOEXEC).map_err(Into::into),
    )
}

fn reason(info: &MigrationInfo) -> String {
    info.error_desc
        .clone()
        .unwrap_or_else(|| "it gave no reason".to_owned())
}

fn spell(state: RunState) -> String {
    qapi::Enum::name(&state).to_owned()
}

fn timed_out(command: &'static str) -> VmmError {
    VmmError::Timeout {
        command,
        deadline_ms: STATE_DEADLINE.as_millis(),
    }
}
