//! `--fph-bench`: what the drain before a pause brings, for one workload on one build.
//!
//! The same build is resumed twice, runs the same command, and is paused: once without the drain,
//! once with it. Everything else is equal. Both builds are deleted at the end.

use serde::Serialize;
use torpor_build::BuildId;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::report::PauseReport;

use crate::cli::ResumeBuildArgs;
use crate::context::Context;
use crate::error::CliError;
use crate::guest_command::{Stdout, must_succeed};
use crate::output::mib;
use crate::resume_build::resume_once;
use crate::{pausing, report};

/// The drain's ceiling unless the command line names one.
const DEFAULT_CEILING_MS: u64 = 5000;

#[derive(Debug, Serialize)]
struct Compared {
    from_build: BuildId,
    drain_ceiling_ms: u64,
    without_drain: PauseReport,
    with_drain: PauseReport,
    /// Distinct uncompressed bytes of memory that each build reaches through all its layers: what
    /// the drain takes out of the parent's pages counts as well.
    stored_bytes_without_drain: u64,
    stored_bytes_with_drain: u64,
    /// The one with the drain, for each byte of the one without; absent when there was none.
    stored_ratio: Option<f64>,
    /// The same of the bytes that each build's own layer takes, compressed.
    compressed_ratio: Option<f64>,
}

pub(crate) async fn run(
    context: &Context,
    host: &Host,
    from: BuildId,
    line: &str,
    args: &ResumeBuildArgs,
) -> Result<(), CliError> {
    let ceiling_ms = args.run.fph_timeout_ms.unwrap_or(DEFAULT_CEILING_MS);
    let (without, stored_without) = Box::pin(arm(context, host, from, line, args, 0)).await?;
    let (with, stored_with) = Box::pin(arm(context, host, from, line, args, ceiling_ms)).await?;
    let compared = Compared {
        from_build: from,
        drain_ceiling_ms: ceiling_ms,
        stored_bytes_without_drain: stored_without,
        stored_bytes_with_drain: stored_with,
        stored_ratio: ratio(stored_with, stored_without),
        compressed_ratio: ratio(
            with.memory.compressed_bytes,
            without.memory.compressed_bytes,
        ),
        without_drain: without,
        with_drain: with,
    };
    let printed = context.output.result(&compared, text);
    printed.map_err(CliError::system("print the result"))
}

async fn arm(
    context: &Context,
    host: &Host,
    from: BuildId,
    line: &str,
    args: &ResumeBuildArgs,
    drain_ceiling_ms: u64,
) -> Result<(PauseReport, u64), CliError> {
    let (sandbox, _resume) = resume_once(context, host, from, args).await?;
    must_succeed(&sandbox, "--cmd", line, Stdout::ToStderr).await?;
    let mut flags = pausing::flags(host, &sandbox, None, &args.run).await;
    flags.drain_ceiling_ms = drain_ceiling_ms;
    // What the drain gives back they would leave out without it.
    (flags.free_page_scan, flags.disk_references) = (false, false);
    let build = context.new_build_id();
    let paused = pausing::into_build(context, host, sandbox, build, None, flags).await?;
    let stats = paused.build.stats()?;
    let stored_bytes = stats
        .memory
        .map_or(0, |memory| memory.reachable_stored_bytes);
    context.discard(paused.build).await?;
    Ok((paused.report, stored_bytes))
}

#[expect(clippy::cast_precision_loss, reason = "shown with two decimals")]
fn ratio(with: u64, without: u64) -> Option<f64> {
    (without > 0).then(|| with as f64 / without as f64)
}

fn text(compared: &Compared) -> String {
    let with = format!("drain ≤ {} ms", compared.drain_ceiling_ms);
    let table = report::side_by_side(
        ["no drain", &with],
        [&compared.without_drain, &compared.with_drain],
    );
    let show = |ratio: Option<f64>| ratio.map_or_else(|| "n/a".to_owned(), |r| format!("{r:.2}"));
    format!(
        "{table}\n\nmemory stored, all layers: {} with the drain, {} without: {} ({} of the own layer, compressed)",
        mib(compared.stored_bytes_with_drain),
        mib(compared.stored_bytes_without_drain),
        show(compared.stored_ratio),
        show(compared.compressed_ratio)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::a_report;

    #[test]
    fn the_ratio_is_of_what_was_stored() {
        let compared = Compared {
            from_build: BuildId::random(),
            drain_ceiling_ms: 5000,
            stored_bytes_without_drain: 8 << 20,
            stored_bytes_with_drain: 2 << 20,
            stored_ratio: ratio(2 << 20, 8 << 20),
            compressed_ratio: ratio(0, 0),
            without_drain: a_report(8 << 20),
            with_drain: a_report(2 << 20),
        };
        let text = text(&compared);
        assert!(
            text.contains("0.25 (n/a of the own layer, compressed)"),
            "{text}"
        );
    }
}
