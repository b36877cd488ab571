//! What both test programs need.

use rustix::process::{Pid, Signal, kill_process};

/// Sends a signal to a child of ours. Not by `kill(1)`: a minimal Debian has none.
pub(crate) fn signal(pid: u32, signal: Signal) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
}
