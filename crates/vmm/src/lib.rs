//! What torpor asks of a virtual machine monitor (VMM), and the answers of two.
//!
//! [`Vmm`] is the question: stop and resume the vCPUs, hand over the device state, say where the
//! guest's memory lies, get free memory back, and end. [`qemu`] answers it with an unmodified
//! QEMU from the distribution, [`firecracker`] with an unmodified Firecracker.
//!
//! ```text
//!              boot(kernel, disks)                     prepare_resume(disks)
//!                     │                                         │
//!                     │                                     IncomingVm ── userfaultfd(), memory()
//!                     ▼                                         │ load(vmstate)
//!                 dyn Vmm (running)                         dyn Vmm (stopped)
//! ```
//!
//! Invariants:
//! * Guest memory is a memfd that this process made (QEMU), or the VMM's own (Firecracker). Whoever
//!   reads it reads the memfd or /proc/PID/mem, and only what is there: reading a hole through a mapping
//!   fills it, or waits for whoever serves it.
//! * A VMM never outlives what owns it: it is killed when its [`Vmm`] is dropped, and by the
//!   kernel when this process ends, however it ends. (A jailed one is bound to us in its first
//!   milliseconds; see `firecracker::jail`.)
//! * The console log is bounded. QEMU has no file besides it, Firecracker a directory that is the
//!   caller's to remove.
//! * Every wait has a deadline. A guest under userfaultfd that nobody serves hangs its VMM as
//!   well, and the caller must learn of it.
//!
//! What it does not do: it knows no builds, no page faults and nothing of what runs in the guest.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("torpor runs on x86-64 Linux only: injection and the guest kernel depend on it");

mod changes;
mod confinement;
mod console;
mod error;
pub mod firecracker;
mod hold;
mod host;
mod inject;
mod machine;
mod memory;
mod page_cache;
mod process;
pub mod qemu;
mod reader;
mod version;
mod vmm;

pub use changes::{ChangeTracker, Changes};
pub use error::{IdentityMismatch, InjectError, Result, VmmError};
pub use hold::HeldVmm;
pub use host::{KvmSupport, host_tsc_khz, memory_available};
pub use machine::{Accel, BootSource, MachineConfig, VmmIdentity};
pub use memory::{GuestMemory, MemoryMapping, RamSegment};
pub use process::wait_until_reaped;
pub use reader::GuestReader;
pub use version::Version;
pub use vmm::{DiscardedBytes, DrainOutcome, DrainReport, Vmm, VmmExit};
