//! `resume-build --in-place`: one VM, stored again and again while it goes on.

use std::collections::BTreeMap;

use serde::Serialize;
use torpor_build::BuildId;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::Checkpointed;
use torpor_sandbox::pause::report::PauseReport;
use torpor_sandbox::resume::ResumeReport;
use torpor_sandbox::run_times::RunTimes;

use crate::cli::ResumeBuildArgs;
use crate::context::Context;
use crate::error::CliError;
use crate::output::{mib, ms, table};
use crate::resume_build::{Task, resume_once};
use crate::times::Times;
use crate::{pausing, report};

/// One build of the VM.
#[derive(Debug, Serialize)]
struct Checkpoint {
    build: BuildId,
    /// What was done before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    task_ms: Option<f64>,
    pause: PauseReport,
}

#[derive(Debug, Serialize)]
struct Checkpoints {
    from_build: BuildId,
    resume: ResumeReport,
    /// Each is the parent of the next.
    checkpoints: Vec<Checkpoint>,
    times: BTreeMap<String, RunTimes>,
    #[serde(skip)]
    text: String,
}

/// Resumes a build, stores it as often as there are iterations, and ends it.
pub(crate) async fn run(
    context: &Context,
    host: &Host,
    from: BuildId,
    mut task: Task<'_>,
    args: &ResumeBuildArgs,
) -> Result<(), CliError> {
    let mut times = Times::default();
    let (mut sandbox, resume) = resume_once(context, host, from, args).await?;
    times.add_resume(&resume);
    let mut checkpoints = Vec::new();
    for number in 1..=args.iterations {
        let task_ms = task.timed(context, &sandbox).await?;
        let id = match args.to_build {
            Some(to) if number == args.iterations => to,
            _ => context.new_build_id(),
        };
        let flags = pausing::flags(host, &sandbox, None, &args.run).await;
        let stored = pausing::in_place(context, host, sandbox, id, flags).await?;
        let Checkpointed {
            build,
            report,
            not_thawed,
            ..
        } = stored;
        sandbox = stored.sandbox;
        // It stays, whatever becomes of the next: the next is made on top of it.
        context.announce(&id);
        context.output.note(&format!("stored as build {id}"));
        if let Some(error) = not_thawed {
            sandbox.end().await;
            return Err(CliError::NotThawed {
                build: id,
                source: Box::new(error),
            });
        }
        if let Some(task_ms) = task_ms {
            times.add("task", task_ms);
        }
        times.add_pause(&report);
        checkpoints.push(Checkpoint {
            build: build.id(),
            task_ms,
            pause: report,
        });
    }
    sandbox.end().await;
    let result = Checkpoints {
        from_build: from,
        resume,
        text: text(from, &checkpoints, &times),
        checkpoints,
        times: times.summary(),
    };
    let printed = context.output.result(&result, |result| result.text.clone());
    printed.map_err(CliError::system("print the result"))
}

fn text(from: BuildId, checkpoints: &[Checkpoint], times: &Times) -> String {
    let rows: Vec<_> = checkpoints
        .iter()
        .map(|checkpoint| {
            let report = &checkpoint.pause;
            vec![
                checkpoint.build.to_string(),
                mib(report.memory.raw_bytes),
                ms(report.freeze_ms),
                ms(report.durable_ms),
            ]
        })
        .collect();
    let table = table(&["build", "memory stored", "stood still", "durable"], &rows);
    let last = checkpoints.last();
    let last = last.map_or_else(String::new, |last| report::pause_text(&last.pause));
    format!(
        "{}\n\nbuild {from}, stored while it went on\n\n{table}\n\n{last}",
        times.text()
    )
}
