//! envd: the agent inside the guest. `/init` of its initramfs, pid 1 until the machine goes.
//!
//! ```text
//! kernel ─▶ init::enter      mounts, modules, switch root (before any thread exists)
//!        ─▶ port, vsock      virtio-serial port or vsock as two queues
//!        ─▶ server           host's session → streams → envd's own HTTP, or a TCP port of the guest
//!             routes           /health /init /metrics /freeze /unfreeze
//!             process          process.Process: start, watch, feed, kill
//!           reaper           the only caller of waitpid: hands statuses to their owners
//! ```
//!
//! Invariants:
//! - It never speaks first: the host opens sessions, sessions open streams.
//! - Only [`reaper`] starts and waits for processes.
//! - One thread runs everything but the two that block on the port: a sandbox that sleeps costs
//!   three sleeping threads.
//! - It needs no user land: static, no name service, no shell of its own.
//!
//! On a developer's host, `envd --serve-fd N [--cgroups DIR]` serves the same over an inherited
//! socket. It then changes neither clock nor random numbers, which are not its own.

mod cgroup;
mod console;
mod init;
mod machine;
mod metrics;
mod port;
mod process;
mod reaper;
mod routes;
mod server;
mod user;
mod vsock;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use cgroup::Cgroups;
use console::say;
use machine::Machine;
use port::Source;
use reaper::Reaper;

/// How this envd was started.
enum Mode {
    /// As pid 1 of a guest.
    Guest,
    /// On a developer's host.
    Host { fd: i32, cgroups: Option<PathBuf> },
}

const USAGE: &str = "envd is torpor's agent: it runs as pid 1 of a guest.\nFor tests: envd --serve-fd N [--cgroups DIR]";

fn mode(mut args: impl Iterator<Item = String>) -> Option<Mode> {
    // The kernel hands pid 1 whatever words of its command line it does not know.
    let fd = match args.next().as_deref() {
        Some("--serve-fd") => args.next()?.parse().ok()?,
        _ if std::process::id() == 1 => return Some(Mode::Guest),
        _ => return None,
    };
    let cgroups = match args.next().as_deref() {
        Some("--cgroups") => Some(PathBuf::from(args.next()?)),
        Some(_) => return None,
        None => None,
    };
    Some(Mode::Host { fd, cgroups })
}

fn main() -> ExitCode {
    let Some(mode) = mode(std::env::args().skip(1)) else {
        say(USAGE);
        return ExitCode::from(2);
    };
    let (source, cgroups, machine) = match mode {
        Mode::Guest => {
            if let Err(error) = init::enter() {
                init::give_up(&error);
            }
            (Source::Agent, Cgroups::of_guest(), Machine::ours())
        }
        Mode::Host { fd, cgroups } => {
            let cgroups = cgroups.map_or_else(Cgroups::none, |dir| Cgroups::below(&dir));
            (Source::Inherited(fd), cgroups, Machine::borrowed())
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let served = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let reaper = Arc::new(Reaper::new()?);
            server::run(source, cgroups, machine, reaper).await
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("envd: {error}"));
            ExitCode::FAILURE
        }
    }
}
