//! What pid 1 does before it is an agent: from the kernel's first instruction in user space to a
//! root file system with everything mounted.
//!
//! ```text
//! initramfs (in memory)                           guest's root
//!   /init         envd                              /                  overlay(base, layer/upper)
//!   /modules/NN-name.ko   load order by name        /run/torpor/base   base image, read-only
//!                                                   /run/torpor/layer  writable layer's own mount
//! ```
//!
//! [`enter`] goes through it once, step by step, and leaves the calling process inside the new root;
//! the initramfs is emptied on the way, since it is memory that every snapshot would store. The disks
//! are told apart by their virtio serial ([`disks`]), never by their order.
//!
//! Why the layer has a mount of its own: overlayfs refuses `fstrim`, so the last reclaim step names
//! [`LAYER_DIR`]. It is mounted without `discard`: trimming happens once before a pause, not at every
//! deletion.
//!
//! Invariants:
//! - Single-threaded: it runs before any runtime, because signals, mounts and the current directory
//!   belong to the whole process.
//! - It never hangs: the one thing that is waited for, the disks, has a deadline.
//! - A step that fails is named, and [`give_up`] switches the machine off: a guest that half booted
//!   would look like one that is slow.
//!
//! It does not reap, serve or start anything: that is the agent's business afterwards.

mod disks;
mod memory;
mod modules;
mod mounts;
mod network;

use std::io::{self, Write};
use std::path::Path;

use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};

/// Where the writable layer's own file system is seen: what `fstrim` must name.
pub(crate) const LAYER_DIR: &str = "/run/torpor/layer";
/// Cgroup of the user's processes: the one that is frozen before a pause.
pub(crate) const USER_CGROUP_DIR: &str = "/sys/fs/cgroup/user";
/// Cgroup of torpor's own processes in the guest, such as the reclaim steps: never frozen.
pub(crate) const SYSTEM_CGROUP_DIR: &str = "/sys/fs/cgroup/system";

/// The guest's name when its root file system does not give one.
const HOSTNAME_DEFAULT: &str = "torpor";
/// The kernel's own limit (`__NEW_UTS_LEN`, bytes).
const HOSTNAME_LEN_MAX: usize = 64;

/// Why the guest could not be brought up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// A system call of a step failed.
    #[error("{step}: {source}")]
    Step {
        /// What was being done, and to what.
        step: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A disk did not appear.
    #[error(
        "no virtio disk with serial \"{serial}\" after {waited_ms} ms (disks seen: {seen}); \
         give the VMM's drive that serial"
    )]
    DiskMissing {
        /// The serial that was looked for.
        serial: &'static str,
        /// How long.
        waited_ms: u128,
        /// Disks that are there, with their serials.
        seen: String,
    },
}

/// Attaches the name of a step to what went wrong in it.
trait InStep<T> {
    fn in_step(self, step: impl FnOnce() -> String) -> Result<T, InitError>;
}

impl<T, E: Into<io::Error>> InStep<T> for Result<T, E> {
    fn in_step(self, step: impl FnOnce() -> String) -> Result<T, InitError> {
        self.map_err(|error| InitError::Step {
            step: step(),
            source: error.into(),
        })
    }
}

/// Brings the guest up: modules, disks, root, the usual file systems, cgroups, name, network.
///
/// To be called once, by pid 1, inside the initramfs, before any thread is started.
///
/// # Errors
/// The first step that failed; the machine is then half up and to be switched off ([`give_up`]).
pub(crate) fn enter() -> Result<(), InitError> {
    become_session_leader()?;
    mounts::kernel_file_systems()?;
    modules::load_all(Path::new("/modules"))?;
    let disks = disks::wait(Path::new("/sys/block"))?;
    mounts::new_root(&disks)?;
    mounts::switch_root()?;
    mounts::user_file_systems()?;
    memory::bound_per_cpu_lists();
    set_hostname()?;
    network::configure(Path::new("/sys/class/net"))
}

/// Says on the console what failed and switches the machine off. Never returns, never hangs.
pub(crate) fn give_up(error: &InitError) -> ! {
    let message = format!("envd: the guest cannot start: {error}\nenvd: switching off\n");
    // The console is all there is; when it fails too, switching off is still right.
    drop(io::stderr().write_all(message.as_bytes()));
    nix::unistd::sync();
    // Each returns only if it failed. By a reset first, which ends every VMM (QEMU runs with
    // -no-reboot): Firecracker's machine has no way to switch off, and a kernel that is told to
    // would halt without a word to anyone.
    for way in [RebootMode::RB_AUTOBOOT, RebootMode::RB_POWER_OFF] {
        let Err(errno) = reboot(way);
        drop(writeln!(io::stderr(), "envd: {way:?} failed: {errno}"));
    }
    // Pid 1 ending is the kernel's panic: the last way to be noticed.
    std::process::abort()
}

/// A session of its own, and no surprise from the keyboard: ctrl-alt-del would reset the machine.
/// Nothing else is needed, since the kernel keeps from pid 1 every signal that it does not handle.
fn become_session_leader() -> Result<(), InitError> {
    // EPERM: it leads its process group already, which is as good.
    match nix::unistd::setsid() {
        Ok(_) | Err(nix::errno::Errno::EPERM) => {}
        Err(error) => return Err(error).in_step(|| "start a session".to_owned()),
    }
    set_cad_enabled(false).in_step(|| "disable ctrl-alt-del".to_owned())
}

/// The root file system's own name for itself, as far as it is usable.
fn set_hostname() -> Result<(), InitError> {
    let text = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = text
        .split_whitespace()
        .next()
        .filter(|name| name.len() <= HOSTNAME_LEN_MAX);
    nix::unistd::sethostname(name.unwrap_or(HOSTNAME_DEFAULT))
        .in_step(|| "set the hostname".to_owned())
}
