//! The [`Vmm`](crate::Vmm) of production: an unmodified Firecracker, 1.10 or later, on a host with
//! KVM.
//!
//! | module | what |
//! |---|---|
//! | `binary` | which Firecracker there is, what its version knows |
//! | `config` | machine → requests, pure; the device layout |
//! | `api` | requests with deadlines |
//! | `instance` | process + directory + API |
//! | `jail` | a Firecracker that is locked up |
//! | `channel` | the agent's channel, by vsock |
//! | `balloon` | what is installed, what refusals mean |
//! | `drain` | getting the guest's free pages back |
//! | `handshake` | how a resuming one hands its page faults over |
//! | `network` | a guest's network, where it has one |
//! | `memory` | where a booted one has its guest's memory |
//! | `vm`, `incoming` | the two kinds of machine |
//!
//! Guest memory is private to Firecracker: it is read by /proc/PID/mem, and only where
//! /proc/PID/pagemap calls a page present, because reading an absent page of a resumed guest fails, or
//! waits for whoever serves its page faults.

mod api;
mod balloon;
mod binary;
mod channel;
mod config;
mod drain;
mod handshake;
mod incoming;
mod instance;
mod jail;
mod memory;
mod network;
mod vm;

pub use api::{Api, ApiError};
pub use balloon::{InstalledBalloon, install_balloon};
pub use binary::{Deadlines, FirecrackerBinary};
pub use config::{AGENT_VSOCK_PORT, kernel_command_line};
pub use drain::{HeldBytes, drain_balloon};
pub use handshake::Handshake;
pub use incoming::{IncomingFirecracker, prepare_resume};
pub use jail::{Jail, end_left_over};
pub use network::{NoNetwork, check_network};
pub use vm::boot;
