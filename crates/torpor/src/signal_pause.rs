//! `--signal-pause`: the sandbox runs until torpor gets a signal.

use tokio::signal::unix::Signal;
use torpor_sandbox::Sandbox;

use crate::context::Context;
use crate::error::CliError;
use crate::guest_command::while_alive;
use crate::signal::PauseSignal;

/// Listens from the command's start on, so that a signal which comes early is not the end of
/// torpor: it counts as soon as the sandbox runs.
#[derive(Debug)]
pub(crate) struct PauseTrigger {
    signal: PauseSignal,
    listener: Signal,
}

impl PauseTrigger {
    pub(crate) fn listen(signal: PauseSignal) -> Result<Self, CliError> {
        let listener = signal
            .listen()
            .map_err(CliError::system("listen for signals"))?;
        Ok(Self { signal, listener })
    }

    /// Waits for the signal, or for the sandbox's end.
    pub(crate) async fn wait(
        &mut self,
        context: &Context,
        sandbox: &Sandbox,
    ) -> Result<(), CliError> {
        let (name, pid) = (self.signal.name(), std::process::id());
        context.output.note(&format!(
            "sandbox {} runs; `kill -{name} {pid}` pauses it",
            sandbox.name()
        ));
        while_alive(sandbox, async {
            self.listener.recv().await;
            Ok::<_, CliError>(())
        })
        .await
    }
}
