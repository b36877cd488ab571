//! Runs a command in the guest while watching its VMM: a guest that dies is told apart from a
//! command that fails.

use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use torpor_guest::{Command, Exit, GuestError, ProcessEvent};
use torpor_sandbox::Sandbox;

use crate::error::CliError;

/// After the channel to a guest has failed: how long its VMM is given to turn out dead. It has
/// broken *because* the VMM ended, or it never will.
const VMM_EXIT_MAX: Duration = Duration::from_secs(1);
/// How often `--ready-cmd` is tried.
const READY_INTERVAL: Duration = Duration::from_millis(500);
/// How long `--ready-cmd` may take to succeed, all tries together. A service that is still not up
/// after five minutes never will be.
const READY_MAX: Duration = Duration::from_secs(300);
/// How much of the last try's output the error shows.
const READY_SHOWN_BYTES: usize = 1000;

/// Where a command's standard output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stdout {
    /// To torpor's standard output.
    Through,
    /// To torpor's standard error: standard output is for the result, or for nobody.
    ToStderr,
}

/// Does something with a guest; ends with [`CliError::Lost`] when the VMM ends first.
pub(crate) async fn while_alive<T, E: Into<CliError>>(
    sandbox: &Sandbox,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, CliError> {
    let lost = |exit| CliError::Lost {
        exit: Box::new(exit),
        // A VMM that was killed because of a page died of the page.
        why: sandbox.pager_failure().map(|failure| failure.to_string()),
        parent: sandbox.parent_id(),
    };
    let error = tokio::select! {
        biased;
        done = work => match done {
            Ok(done) => return Ok(done),
            Err(error) => error.into(),
        },
        exit = sandbox.vmm().wait_exit() => return Err(lost(exit)),
    };
    if !matches!(error, CliError::Guest(_)) {
        return Err(error);
    }
    match tokio::time::timeout(VMM_EXIT_MAX, sandbox.vmm().wait_exit()).await {
        Ok(exit) => Err(lost(exit)),
        Err(_still_there) => Err(error),
    }
}

/// Runs a shell command in the guest to its end, its output shown as it comes.
pub(crate) async fn stream(
    sandbox: &Sandbox,
    line: &str,
    stdout: Stdout,
) -> Result<Exit, CliError> {
    let run = Box::pin(async {
        let mut process = sandbox.envd().start(&Command::shell(line), None).await?;
        while let Some(event) = process.next().await? {
            match event {
                ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes) => match stdout {
                    Stdout::Through => show(tokio::io::stdout(), &bytes).await?,
                    Stdout::ToStderr => show(tokio::io::stderr(), &bytes).await?,
                },
                ProcessEvent::Stderr(bytes) => show(tokio::io::stderr(), &bytes).await?,
                ProcessEvent::End(exit) => return Ok(exit),
            }
        }
        Err(CliError::Panicked(
            "a process ended without an end".to_owned(),
        ))
    });
    while_alive(sandbox, run).await
}

/// Like [`stream`], for a command that must succeed.
pub(crate) async fn must_succeed(
    sandbox: &Sandbox,
    option: &'static str,
    line: &str,
    stdout: Stdout,
) -> Result<(), CliError> {
    let exit = stream(sandbox, line, stdout).await?;
    if exit.success() {
        Ok(())
    } else {
        let status = status(&exit);
        Err(CliError::Command { option, status })
    }
}

/// Repeats a shell command until it succeeds.
pub(crate) async fn until_ready(sandbox: &Sandbox, line: &str) -> Result<(), CliError> {
    let began = Instant::now();
    let mut last = "it never ended".to_owned();
    while let Some(left) = READY_MAX.checked_sub(began.elapsed()) {
        let command = Command::shell(line);
        let tried = while_alive(sandbox, Box::pin(sandbox.envd().run(&command, left))).await;
        match tried {
            Ok(output) if output.exit.success() => return Ok(()),
            Ok(output) => {
                let said = [output.stdout, output.stderr].concat();
                last = format!("{} {}", status(&output.exit), tail(&said))
                    .trim_end()
                    .to_owned();
            }
            // Its own time limit, which is ours. A guest that does not answer is another matter.
            Err(CliError::Guest(error)) if is_time_limit(&error) => break,
            Err(error) => return Err(error),
        }
        tokio::time::sleep(READY_INTERVAL).await;
    }
    let waited_s = READY_MAX.as_secs();
    Err(CliError::NotReady { waited_s, last })
}

/// Whether envd killed the command because its time was up.
fn is_time_limit(error: &GuestError) -> bool {
    error.code().is_some() && error.is_timeout()
}

/// How a process ended, in words.
pub(crate) fn status(exit: &Exit) -> String {
    match &exit.error {
        Some(error) if !error.is_empty() && *error != exit.status => {
            format!("{} ({error})", exit.status)
        }
        _ => exit.status.clone(),
    }
}

fn tail(said: &[u8]) -> String {
    let from = said.len().saturating_sub(READY_SHOWN_BYTES);
    String::from_utf8_lossy(&said[from..]).trim().to_owned()
}

/// Writes without blocking the runtime: whoever reads our output may be slow, and an interrupt must
/// still be heard.
pub(crate) async fn show(mut to: impl AsyncWrite + Unpin, bytes: &[u8]) -> Result<(), CliError> {
    let write = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    write
        .await
        .map_err(CliError::system("show the guest's output"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_long_output_is_kept() {
        let said = [b"x".repeat(5000), b"the end\n".to_vec()].concat();
        let kept = tail(&said);
        assert!(kept.len() <= READY_SHOWN_BYTES);
        assert!(kept.ends_with("the end"));
    }
}
