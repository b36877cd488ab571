//! The guest's first answer: the moment from which a booted or resumed sandbox can be used.

use std::path::Path;
use std::time::Duration;

use torpor_guest::{Channel, Envd, GuestError};
use torpor_vmm::Vmm;

use crate::error::StartError;
use crate::sandbox::console_tail;

/// Connects to the agent and lets it make the guest usable (clock, random numbers, thaw), for at
/// most `patience`. A VMM that ends meanwhile ends the wait.
///
/// # Errors
/// [`StartError::NoAnswer`] or [`StartError::Ended`], both with the console's last lines.
pub(crate) async fn first_answer(
    vmm: &dyn Vmm,
    run_dir: &Path,
    patience: Duration,
) -> Result<Envd, StartError> {
    let Some(stream) = vmm.take_agent_channel() else {
        return Err(StartError::ChannelTaken);
    };
    let answer = async {
        let channel = Channel::connect(stream, patience).await?;
        let envd = Envd::new(channel);
        envd.init().await?;
        Ok(envd)
    };
    tokio::select! {
        answered = answer => answered.map_err(|source: GuestError| StartError::NoAnswer {
            waited_s: patience.as_secs(),
            source,
            console: console_tail(run_dir),
        }),
        exit = vmm.wait_exit() => Err(StartError::Ended {
            exit: Box::new(exit),
            console: console_tail(run_dir),
        }),
    }
}
