//! Everything that can go wrong, with the name of the thing and the next step.

use std::io;
use std::path::PathBuf;

use crate::firecracker::ApiError;
use crate::vmm::VmmExit;

/// This crate's result.
pub type Result<T> = std::result::Result<T, VmmError>;

/// What a VMM, or the way to one, failed at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// A VMM that another process owns could not be stopped for a look.
    #[error(
        "cannot look into the VMM with process id {pid}: {source}{}",
        may_not(source)
    )]
    Hold {
        /// The VMM.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// No QEMU.
    #[error("no {binary} found ({searched}); install it: apt-get install qemu-system-x86")]
    BinaryMissing {
        /// What was looked for.
        binary: String,
        /// Where.
        searched: String,
    },
    /// No Firecracker.
    #[error("no firecracker found ({searched}); {next_step}")]
    FirecrackerMissing {
        /// Where it was looked for.
        searched: String,
        /// What to do.
        next_step: &'static str,
    },
    /// A VMM that does not say which one it is, or is too old.
    #[error("{} does not answer --version as its VMM does: {detail}", path.display())]
    BinaryUnusable {
        /// The program.
        path: PathBuf,
        /// What it said instead.
        detail: String,
    },
    /// A machine that cannot be.
    #[error("invalid machine: {what}")]
    InvalidMachine {
        /// Which value, and what it may be.
        what: String,
    },
    /// A file that the machine needs is not there.
    #[error("cannot use the {role} {}: {source}", path.display())]
    File {
        /// What it is to the machine.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host has no room for the guest's memory.
    #[error(
        "no room for the guest's memory: it may grow to {needed_bytes} bytes, this host has \
         {available_bytes} available; pause or end other sandboxes, or give this one less memory"
    )]
    NoRoom {
        /// The guest's memory.
        needed_bytes: u64,
        /// What the kernel believes it can still hand out.
        available_bytes: u64,
    },
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The VMM ended before it was ready.
    #[error("the VMM did not start: it {exit}")]
    Start {
        /// How it ended, with what it said.
        exit: Box<VmmExit>,
    },
    /// Nobody listens where Firecracker's API is to be, though it lives (or its jailer does).
    #[error("Firecracker did not open its API within {deadline_ms} ms ({source}); {next_step}")]
    NotUp {
        /// How long we waited.
        deadline_ms: u128,
        /// Why there is no connection.
        source: std::io::Error,
        /// What to do.
        next_step: &'static str,
    },
    /// The guest's network could not be had.
    #[error("slirp4netns did not make the guest's network: it {exit}")]
    NetworkHelper {
        /// How it ended, with what it said.
        exit: Box<VmmExit>,
    },
    /// The VMM ended while it was needed.
    #[error("the VMM died while torpor wanted to {what}: it {exit}")]
    Died {
        /// What was tried.
        what: &'static str,
        /// How it ended, with what it said.
        exit: Box<VmmExit>,
    },
    /// No answer in time.
    #[error(
        "QEMU did not answer {command} within {deadline_ms} ms; if its guest's page faults are \
         still served the host is overloaded, else only ending the sandbox helps"
    )]
    Timeout {
        /// The QMP command.
        command: &'static str,
        /// How long we waited.
        deadline_ms: u128,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The QMP command.
        command: &'static str,
        /// QEMU's own words.
        reason: String,
    },
    /// The connection to QEMU broke, but QEMU lives.
    #[error("the connection to QEMU broke during {command}: {source}")]
    Broken {
        /// The QMP command.
        command: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A state was asked of a machine that runs, or similar.
    #[error("cannot {what} while the machine is {state}")]
    WrongState {
        /// What was tried.
        what: &'static str,
        /// QEMU's run state.
        state: String,
    },
    /// A device state that is out of all proportion.
    #[error("the device state is larger than the limit of {limit_bytes} bytes")]
    StateTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// Saving or loading a device state failed.
    #[error("the VMM could not {what} the device state: {reason}")]
    State {
        /// `save` or `load`.
        what: &'static str,
        /// The VMM's own words.
        reason: String,
    },
    /// The guest's memory is not where it must be in the VMM's address space.
    #[error("guest memory is not mapped as expected in process {pid}: {detail}")]
    Mapping {
        /// The VMM.
        pid: u32,
        /// What is wrong.
        detail: String,
    },
    /// Firecracker's API refused, broke or hangs.
    #[error(transparent)]
    Api {
        /// Why.
        #[from]
        source: ApiError,
    },
    /// A resuming Firecracker did not hand its page faults over.
    #[error("Firecracker did not hand over its page faults: {detail}")]
    Handshake {
        /// What came instead.
        detail: String,
    },
    /// No userfaultfd could be made in the VMM.
    #[error("cannot get a userfaultfd of the VMM: {source}")]
    Userfaultfd {
        /// Why not.
        #[from]
        source: InjectError,
    },
}

/// Why a system call could not be made in another process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InjectError {
    /// A ptrace request failed.
    #[error(
        "ptrace {request} of process {pid} failed: {source}; see /proc/sys/kernel/yama/ptrace_scope"
    )]
    Ptrace {
        /// The request.
        request: &'static str,
        /// The process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// The process did not stop in time.
    #[error("process {pid} did not stop within {deadline_ms} ms")]
    Deadline {
        /// The process.
        pid: u32,
        /// How long we waited.
        deadline_ms: u128,
    },
    /// The process ended.
    #[error("process {pid} ended meanwhile")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// There is no `syscall` instruction to borrow.
    #[error("no syscall instruction found in the vdso of process {pid}")]
    NoSyscallInstruction {
        /// The process.
        pid: u32,
    },
    /// The process could not be looked at.
    #[error("cannot read {path}: {source}")]
    Look {
        /// The file in /proc.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The call was made, and failed.
    #[error("{call} failed in process {pid}: {source}{hint}")]
    Call {
        /// The system call.
        call: &'static str,
        /// The process.
        pid: u32,
        /// Its errno.
        source: io::Error,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// The descriptor could not be taken over.
    #[error("cannot take descriptor {fd} of process {pid}: {source}")]
    Take {
        /// The descriptor there.
        fd: i32,
        /// The process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

/// A device state that this VMM must not load.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this build was made by {recorded_by}: {what} there is {recorded}, here {here}; install the \
     recorded one, or build the template again with this one"
)]
pub struct IdentityMismatch {
    /// What differs.
    pub what: &'static str,
    /// Its value here.
    pub here: String,
    /// Its value in the build.
    pub recorded: String,
    /// The whole recorded identity.
    pub recorded_by: String,
}

/// Who may, where that is what is wrong.
fn may_not(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; only root may, or its user where /proc/sys/kernel/yama/ptrace_scope is 0"
        }
        _ => "",
    }
}
