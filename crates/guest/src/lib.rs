//! The host's side of a guest: the channel into it, and envd's client.
//!
//! ```no_run
//! # async fn example(stream: tokio::net::UnixStream) -> Result<(), torpor_guest::GuestError> {
//! use std::time::Duration;
//! use torpor_guest::{Channel, Command, Envd};
//!
//! let channel = Channel::connect(stream, Duration::from_secs(30)).await?;
//! let envd = Envd::new(channel);
//! envd.init().await?;
//! let output = envd.run(&Command::shell("uname -r"), Duration::from_secs(10)).await?;
//! assert!(output.exit.success());
//! # Ok(())
//! # }
//! ```
//!
//! Everything here has a deadline: a guest may stop answering at any moment, and the caller decides
//! what that means. Nothing is retried. What a guest sends is bounded in size and never trusted.
//!
//! This crate knows neither the VMM nor builds; it is given a connected socket.

mod channel;
mod envd;
mod error;
mod process;
pub mod reclaim;
mod transport;

pub use channel::{Channel, OPEN_DEADLINE, PortStream};
pub use envd::{CALL_DEADLINE, Envd, KEEPALIVE_INTERVAL};
pub use envd_api::rest::{FreezeResponse, InitRequest, InitResponse, Metrics};
pub use error::GuestError;
pub use process::{
    Command, Exit, Output, Process, ProcessEvent, ProcessInfo, PtySize, RUN_OUTPUT_BYTES_MAX,
    Selector, Signal,
};
pub use reclaim::{ReclaimCaps, ReclaimReport, reclaim};
