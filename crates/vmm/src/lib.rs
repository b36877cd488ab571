//! What torpor asks of a virtual machine monitor (VMM), and QEMU's answer.
//!
//! [`Vmm`] is the question: stop and resume the vCPUs, hand over the device state, say where the
//! guest's memory lies, get free memory back, and end. [`qemu`] answers it with an unmodified
//! QEMU from the distribution.
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
//! * Guest memory is a memfd that this process made. Whoever reads it reads the memfd, never a
//!   mapping: reading a hole through a mapping fills it.
//! * A VMM never outlives what owns it: it is killed when its [`Vmm`] is dropped, and by the
//!   kernel when this process ends, however it ends.
//! * There is no socket file, no pid file, no file of the VMM at all but the console log, whose
//!   size is bounded.
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
pub use host::{KvmSupport, host_tsc_khz};
pub use machine::{Accel, BootSource, MachineConfig, VmmIdentity};
pub use memory::{GuestMemory, MemoryMapping, RamSegment};
pub use reader::GuestReader;
pub use vmm::{DiscardedBytes, DrainOutcome, DrainReport, Vmm, VmmExit};
