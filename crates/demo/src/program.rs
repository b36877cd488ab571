//! What the three programs have in common: logging, ctrl-C, and how they end.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use torpor_vmm::wait_until_reaped;

/// As the shell says it of a program that SIGINT has ended.
const INTERRUPTED: u8 = 130;

/// Runs a program to its end, or until ctrl-C. `run` answers whether everything was as it should be;
/// `look_for` says what shows where it was not.
pub async fn run_to_end<A: Parser>(
    run: impl AsyncFnOnce(A) -> Result<bool>,
    look_for: &str,
) -> ExitCode {
    log_to_stderr();
    let done = tokio::select! {
        done = Box::pin(run(A::parse())) => Some(done),
        // Dropping the run kills its guests and removes what was staged.
        _ = tokio::signal::ctrl_c() => None,
    };
    wait_until_reaped();
    let Some(done) = done else {
        return ExitCode::from(INTERRUPTED);
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => fail(&format!(
            "not everything is as it should be: look for {look_for} above"
        )),
        Err(error) => fail(&format!("{error:#}")),
    }
}

fn fail(why: &str) -> ExitCode {
    drop(writeln!(io::stderr(), "error: {why}"));
    ExitCode::FAILURE
}

/// Sends the libraries' warnings (or what RUST_LOG asks for) to standard error.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| "warn".into()))
        .with_writer(io::stderr)
        .init();
}
