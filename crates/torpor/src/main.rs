//! The program `torpor`: parses the command line, runs one subcommand, and ends.
//!
//! One file per subcommand; what several need is in the small modules beside them. The work itself
//! is done by the crates below; here is what speaks to a person.
//!
//! Invariants:
//! - Whatever way a command ends (done, failed, interrupted), its future is gone, the threads that
//!   it gave blocking work to are waited for, and builds that it made on the way are deleted before
//!   the process ends.
//! - Results go to standard output; everything else goes to standard error.

mod cli;
mod cold;
mod context;
mod create_build;
mod delete_build;
mod doctor;
mod error;
mod fph_bench;
mod guest_command;
mod images;
mod in_place;
mod inspect_build;
mod inspect_memory;
mod interrupt;
mod list_builds;
mod memory_map;
mod metrics_file;
mod output;
mod page_map;
mod pager;
mod pausing;
mod report;
mod resume_build;
mod shell;
mod signal;
mod signal_pause;
mod times;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use tokio::runtime::Runtime;
use torpor_vmm::wait_until_reaped;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::error::CliError;
use crate::interrupt::Awaited;
use crate::metrics_file::MetricsFile;
use crate::output::Output;

/// Longest wait, after the command has ended, for threads that still write or read a file for it.
/// They stop by themselves; only storage that hangs takes long, and what they leave then is swept by
/// the next command.
const BLOCKING_WORK_MAX: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.verbose);
    let output = Output::new(cli.json);
    match execute(cli, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.note(&format!("torpor: {}", error.with_causes()));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs the command to whatever end, and cleans up after it.
fn execute(cli: Cli, output: Output) -> Result<(), CliError> {
    let context = Context::new(output, cli.storage)?;
    let metrics = cli.command.metrics().map(MetricsFile::begin).transpose()?;
    let runtime = Runtime::new().map_err(CliError::system("start threads"))?;
    let pause_signal = match &cli.command {
        Command::ResumeBuild(args) => args.signal_pause,
        _ => None,
    };
    let awaited = Awaited::default();
    let interrupt = interrupt::listen(pause_signal, output, awaited.clone())
        .map_err(CliError::system("listen for signals"))?;
    let done = runtime.block_on(async {
        tokio::select! {
            // Whatever is under way is dropped here: its VMM is killed, what it staged is removed.
            done = dispatch(&context, cli.command) => done,
            Ok(signal) = interrupt => Err(CliError::Interrupted { signal, kept: Vec::new() }),
        }
    });
    awaited
        .set("files of the storage that are still being read or written, and memory being freed");
    runtime.shutdown_timeout(BLOCKING_WORK_MAX);
    wait_until_reaped();
    awaited.set("the deletion of builds that were not finished");
    let kept = context.clean_up();
    let written = metrics.map_or(Ok(()), |metrics| metrics.write());
    match (done, written) {
        (Ok(()), written) => written,
        (Err(failed), written) => {
            if let Err(error) = written {
                output.note(&format!("torpor: {error}"));
            }
            Err(match failed {
                CliError::Interrupted { signal, .. } => CliError::Interrupted { signal, kept },
                failed => failed,
            })
        }
    }
}

async fn dispatch(context: &Context, command: Command) -> Result<(), CliError> {
    match command {
        Command::Doctor(args) => doctor::run(context, args).await,
        Command::CreateBuild(args) => Box::pin(create_build::run(context, args)).await,
        Command::ResumeBuild(args) => Box::pin(resume_build::run(context, args)).await,
        Command::InspectBuild(args) => inspect_build::run(context, args).await,
        Command::InspectMemory(args) => inspect_memory::run(context, args).await,
        Command::ListBuilds => list_builds::run(context).await,
        Command::DeleteBuild(args) => delete_build::run(context, args).await,
        Command::ListImages => images::list(context).await,
        Command::DeleteImage(args) => images::delete(context, args).await,
        Command::Pager(args) => pager::run(context, args).await,
    }
}

/// Warnings by default; `-v` and `-vv` say more of torpor, `RUST_LOG` overrides both.
fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => {
            "warn,torpor=info,torpor_build=info,torpor_guest=info,torpor_pager=info,torpor_sandbox=info,torpor_vmm=info"
        }
        _ => "debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
