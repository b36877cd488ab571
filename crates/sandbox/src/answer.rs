//! The guest's first answer: the moment from which a booted or resumed sandbox can be used.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use torpor_guest::{Channel, Envd, GuestError, InitResponse};
use torpor_vmm::Vmm;

use crate::error::StartError;
use crate::host::Patience;
use crate::sandbox::console_tail;

/// From the end of the channel to the end of the VMM: what tearing its memory down takes.
const EXIT_SEEN_MAX: Duration = Duration::from_secs(10);

/// Connects to the agent and lets it make the guest usable (clock, random numbers, thaw), for at
/// most `patience`. A VMM that ends meanwhile ends the wait.
///
/// # Errors
/// [`StartError::NoAnswer`] or [`StartError::Ended`], both with the console's last lines.
pub(crate) async fn first_answer(
    vmm: &dyn Vmm,
    run_dir: &Path,
    patience: Patience,
) -> Result<(Envd, InitResponse), StartError> {
    let Some(stream) = vmm.take_agent_channel() else {
        return Err(StartError::ChannelTaken);
    };
    let began = Instant::now();
    let answer = async {
        let channel = Channel::connect(stream, patience.first).await?;
        let envd = Envd::new(channel).with_deadline(patience.each);
        let answer = envd.init().await?;
        Ok((envd, answer))
    };
    let ended = |exit| StartError::Ended {
        exit: Box::new(exit),
        console: console_tail(run_dir),
    };
    let source: GuestError = tokio::select! {
        answered = answer => match answered {
            Ok(answer) => return Ok(answer),
            Err(source) => source,
        },
        exit = vmm.wait_exit() => return Err(ended(exit)),
    };
    let waited_s = began.elapsed().as_secs();
    // A VMM that ends closes the channel a moment before its exit can be seen.
    if !source.is_timeout()
        && let Ok(exit) = timeout(EXIT_SEEN_MAX, vmm.wait_exit()).await
    {
        return Err(ended(exit));
    }
    Err(StartError::NoAnswer {
        waited_s,
        source,
        console: console_tail(run_dir),
    })
}
