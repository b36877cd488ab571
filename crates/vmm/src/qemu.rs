//! The [`Vmm`](crate::Vmm) that runs anywhere: an unmodified QEMU, 7.2 or later.
//!
//! One `Instance` is one QEMU process and the lines to it. It becomes a running machine by
//! [`boot`], or, by [`prepare_resume`], an [`IncomingVm`]: a machine without a state yet, whose
//! memory is empty and can be put under userfaultfd before a single byte of it is touched.
//!
//! | module | what |
//! |---|---|
//! | `binary` | which QEMU there is |
//! | `command_line` | machine → arguments, pure; the device layout |
//! | `qmp` | commands with deadlines, descriptors |
//! | `instance` | process + QMP + memory, and what both kinds of machine ask of them |
//! | `state` | device state out and in |
//! | `ram` | where the guest sees its RAM |
//! | `drain` | when page reporting has settled |
//! | `vm`, `incoming` | the two kinds of machine |

mod binary;
mod command_line;
mod drain;
mod incoming;
mod instance;
mod qmp;
mod ram;
mod state;
mod vm;

pub use binary::QemuBinary;
pub use command_line::kernel_command_line;
pub use incoming::{IncomingVm, prepare_resume};
pub use vm::boot;
