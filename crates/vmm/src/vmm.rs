//! The one trait: what a sandbox asks of its VMM while the guest lives.
//!
//! All methods take `&self`, so that one task can wait for the exit while another works. None
//! may be called from a thread that serves page faults: the VMM itself can wait for a page.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::error::Result;
use crate::machine::VmmIdentity;
use crate::memory::{GuestMemory, RamSegment};

/// A virtual machine that runs or stands still. Dropping it kills it.
#[async_trait]
pub trait Vmm: Send + Sync + fmt::Debug {
    /// Who this is: recorded in a build, compared before a resume.
    fn identity(&self) -> &VmmIdentity;

    /// The VMM's process id.
    fn pid(&self) -> u32;

    /// Whether the process is still there, to the best of our knowledge.
    fn is_alive(&self) -> bool;

    /// Where the guest's memory is: where the VMM has it mapped, and the memfd if it is one.
    ///
    /// # Errors
    /// The VMM is gone, or its mappings cannot be read.
    fn memory(&self) -> Result<GuestMemory>;

    /// Where the guest sees its RAM: sorted by address, disjoint, whole pages.
    fn ram(&self) -> Vec<RamSegment>;

    /// The host's end of the channel to the agent in the guest; `None` once it was taken.
    fn take_agent_channel(&self) -> Option<UnixStream>;

    /// Stops the vCPUs and waits for the disk requests that are under way, so that memory, disk
    /// and device state stand still. Stopping a stopped machine is no error.
    ///
    /// # Errors
    /// The VMM is gone or does not answer.
    async fn stop_vcpus(&self) -> Result<()>;

    /// Lets the vCPUs run (again), also after a [`Vmm::save_state`], whether that succeeded or
    /// not. Resuming a running machine is no error.
    ///
    /// # Errors
    /// The VMM is gone or does not answer.
    async fn resume_vcpus(&self) -> Result<()>;

    /// The device state of a stopped machine: everything but its memory and its disks. After it
    /// the vCPUs must be resumed before there can be another one.
    ///
    /// Not cancel safe: a future that is dropped half way leaves a migration under way, and only
    /// [`Vmm::kill`] is of use.
    ///
    /// # Errors
    /// The vCPUs run, the state is larger than its limit, or the VMM failed. The machine can be
    /// resumed unless the error says that the VMM died.
    async fn save_state(&self) -> Result<Vec<u8>>;

    /// Gets back what the guest considers free, as far as this VMM can, for at most `ceiling`.
    /// `discarded` is the caller's own count of what the guest has given back, where it has one
    /// (whoever serves the guest's page faults does). Never fatal. Cancel safe.
    async fn drain(&self, ceiling: Duration, discarded: Option<DiscardedBytes<'_>>) -> DrainReport;

    /// Waits until the VMM has ended, and says how. Cancel safe, any number may wait.
    async fn wait_exit(&self) -> VmmExit;

    /// Kills the VMM and waits until it is gone.
    ///
    /// # Errors
    /// It did not go within ten seconds, which only a kernel that hangs can cause.
    async fn kill(&self) -> Result<VmmExit>;
}

/// Tells how many bytes of its memory a guest has given back since it was resumed, whether they
/// were present or not; only grows. Must not block.
pub type DiscardedBytes<'a> = &'a (dyn Fn() -> u64 + Send + Sync);

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmExit {
    /// Exit code, if it ended by itself. QEMU ends with 0 when its guest powers off, reboots or
    /// panics.
    pub code: Option<i32>,
    /// Signal, if one killed it.
    pub signal: Option<i32>,
    /// The last lines that it wrote to its standard error.
    pub stderr_tail: String,
}

impl VmmExit {
    /// Whether the guest ended itself, rather than the VMM failing or being killed.
    #[must_use]
    pub fn guest_ended(&self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for VmmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(0), _) => write!(f, "ended with its guest")?,
            (Some(code), _) => write!(f, "ended with code {code}")?,
            (None, Some(signal)) => write!(f, "was killed by signal {signal}")?,
            (None, None) => write!(f, "ended for an unknown reason")?,
        }
        let said = self.stderr_tail.trim();
        if !said.is_empty() {
            write!(f, "; it said: {said}")?;
        }
        Ok(())
    }
}

/// What came of a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainOutcome {
    /// The memory that the guest holds has stopped falling.
    Settled,
    /// The guest has handed over every free page that it was asked for.
    Done,
    /// It was still falling, or could still fall, when the time ran out.
    CeilingReached,
    /// The ceiling was zero.
    Skipped,
    /// This VMM cannot ask for free pages, or this machine's balloon does not report them.
    Unsupported,
    /// This machine has no balloon.
    NoBalloon,
    /// This machine's balloon was installed without hinting.
    NotArmed,
    /// The balloon would report, but the guest has no driver that does (yet).
    GuestSilent,
    /// The VMM's API answered with an error that is none of these or not at all, the VMM ended, or the
    /// memory could not be looked at.
    Failed(String),
}

impl fmt::Display for DrainOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Settled => "settled",
            Self::Done => "done",
            Self::CeilingReached => "it was not done when its time was up",
            Self::Skipped => "its ceiling is zero",
            Self::Unsupported => "this VMM, or this machine's balloon, cannot give free pages back",
            Self::NoBalloon => "the machine has no balloon",
            Self::NotArmed => "the balloon was installed without hinting",
            Self::GuestSilent => "the guest has no driver for the balloon (yet)",
            Self::Failed(why) => return write!(f, "it failed: {why}"),
        })
    }
}

impl DrainOutcome {
    /// Whether every free page was given back that can be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Settled | Self::Done)
    }
}

/// What a drain did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReport {
    /// How it ended.
    pub outcome: DrainOutcome,
    /// How long it took, in milliseconds.
    pub ms: u64,
    /// What the host got back while it watched, in bytes; what the guest took at the same time
    /// is not subtracted.
    pub released_bytes: u64,
    /// Host memory that the guest held at the end, in bytes.
    pub held_bytes: u64,
    /// What the guest gave back meanwhile by the count of whoever serves its page faults, in bytes,
    /// whether it was present or not; `None` where nobody does.
    #[serde(default)]
    pub discarded_bytes: Option<u64>,
}
