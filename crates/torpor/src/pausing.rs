//! Pauses for the command line: flags read and overridden, failures turned into what a command that
//! is about to end can say.

use torpor_build::{BuildId, Name};
use torpor_sandbox::Sandbox;
use torpor_sandbox::flags::{FlagSubject, PauseFlags};
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::{Checkpointed, PauseFailure, PauseRequest, Paused, checkpoint, pause};

use crate::cli::RunArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;

/// What a pause of this sandbox does: the flags as they are now, then the switches.
pub(crate) async fn flags(
    host: &Host,
    sandbox: &Sandbox,
    template: Option<&Name>,
    run: &RunArgs,
) -> PauseFlags {
    let template = template.or(sandbox.spec().template.as_ref());
    let subject = FlagSubject {
        sandbox: Some(sandbox.name().to_string()),
        template: template.map(ToString::to_string),
    };
    overridden(host.flags().for_pause(&subject).await, run)
}

fn overridden(mut flags: PauseFlags, run: &RunArgs) -> PauseFlags {
    flags.reclaim |= run.reclaim;
    flags.free_page_scan &= !run.no_scan;
    flags.disk_references &= !run.no_refs;
    if let Some(ceiling_ms) = run.fph_timeout_ms {
        flags.drain_ceiling_ms = ceiling_ms;
    }
    flags
}

/// Pauses. A sandbox that runs on afterwards is ended: the command that owns it is about to end.
pub(crate) async fn into_build(
    context: &Context,
    host: &Host,
    sandbox: Sandbox,
    build: BuildId,
    template: Option<Name>,
    flags: PauseFlags,
) -> Result<Paused, CliError> {
    let request = PauseRequest {
        build,
        template,
        flags,
        progress: context.output.progress(),
    };
    match Box::pin(pause(sandbox, host, request)).await {
        Ok(paused) => Ok(paused),
        Err(failure) => Err(ended(failure).await),
    }
}

/// Stores a sandbox as a build and lets it go on. One that could not be stored is ended, as by
/// [`into_build`].
pub(crate) async fn in_place(
    context: &Context,
    host: &Host,
    sandbox: Sandbox,
    build: BuildId,
    flags: PauseFlags,
) -> Result<Checkpointed, CliError> {
    let request = PauseRequest {
        build,
        template: None,
        flags,
        progress: context.output.progress(),
    };
    match Box::pin(checkpoint(sandbox, host, request)).await {
        Ok(checkpointed) => Ok(checkpointed),
        Err(failure) => Err(ended(failure).await),
    }
}

/// Ends what is left of a sandbox whose pause failed, and says what a command that is about to end can
/// say.
async fn ended(failure: PauseFailure) -> CliError {
    match failure {
        PauseFailure::StillRunning {
            sandbox,
            step,
            source,
            ..
        } => {
            sandbox.end().await;
            let source = Box::new(source);
            CliError::NotPaused { step, source }
        }
        lost @ PauseFailure::Lost { .. } => CliError::PauseLost(lost.to_string()),
    }
}

/// Refuses an id that is taken before anything is started for it.
pub(crate) async fn must_be_free(host: &Host, id: BuildId) -> Result<(), CliError> {
    let storage = host.storage().clone();
    blocking(move || match storage.resolve(&id.to_string()) {
        Err(torpor_build::Error::UnknownBuild { .. }) => Ok(()),
        Ok(id) => Err(torpor_build::Error::BuildExists { id }.into()),
        Err(error) => Err(error.into()),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Tracking, VmmArgs};

    #[test]
    fn switches_override_flags_and_their_absence_does_not() {
        let mut run = RunArgs {
            reclaim: false,
            fph_timeout_ms: None,
            no_scan: false,
            no_refs: false,
            flags: None,
            vmm: VmmArgs::default(),
            guest_patience: None,
            metrics: None,
            write_tracking: Tracking::Auto,
        };
        let by_flags = PauseFlags {
            drain_ceiling_ms: 700,
            reclaim: true,
            ..PauseFlags::default()
        };
        assert_eq!(overridden(by_flags, &run), by_flags);
        run.fph_timeout_ms = Some(0);
        assert_eq!(overridden(by_flags, &run).drain_ceiling_ms, 0);
        (run.no_scan, run.no_refs) = (true, true);
        let without = overridden(by_flags, &run);
        assert!(!without.free_page_scan && !without.disk_references);
        run.reclaim = true;
        assert!(overridden(PauseFlags::default(), &run).reclaim);
    }
}
