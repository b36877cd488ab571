//! The [`Vmm`](crate::Vmm) of production: an unmodified Firecracker, 1.10 or later, on a host with
//! KVM.
//!
//! | module | what |
//! |---|---|
//! | `binary` | which Firecracker there is, what its version knows |
//! | `api` | requests with deadlines |
//! | `balloon` | what is installed, what refusals mean |
//! | `drain` | getting the guest's free pages back |

mod api;
mod balloon;
mod binary;
mod drain;

pub use api::{Api, ApiError};
pub use balloon::{InstalledBalloon, install_balloon};
pub use binary::{FirecrackerBinary, Version};
pub use drain::{HeldBytes, drain_balloon};
