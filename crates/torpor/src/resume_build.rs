//! `torpor resume-build`: resume a build, do something with it, perhaps pause it, perhaps often.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use torpor_build::{Build, BuildId};
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::Paused;
use torpor_sandbox::pause::report::PauseReport;
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};
use torpor_sandbox::run_times::RunTimes;

use crate::cli::ResumeBuildArgs;
use crate::context::{Context, blocking, resolve};
use crate::error::CliError;
use crate::guest_command::{Stdout, must_succeed, status};
use crate::signal_pause::PauseTrigger;
use crate::times::Times;
use crate::{cold, fph_bench, in_place, pausing, report, shell};

/// What is done between resume and end, and whether the end is a pause.
pub(crate) enum Task<'a> {
    Nothing,
    Command(&'a str),
    Pause,
    CommandThenPause(&'a str),
    SignalThenPause(PauseTrigger),
    Shell { then_pause: bool },
}

impl<'a> Task<'a> {
    fn of(args: &'a ResumeBuildArgs) -> Result<Self, CliError> {
        let task = if let Some(line) = &args.cmd {
            Self::Command(line)
        } else if let Some(line) = &args.cmd_pause {
            Self::CommandThenPause(line)
        } else if let Some(signal) = args.signal_pause {
            Self::SignalThenPause(PauseTrigger::listen(signal)?)
        } else if args.shell {
            let then_pause = args.to_build.is_some();
            Self::Shell { then_pause }
        } else if args.pause {
            Self::Pause
        } else {
            Self::Nothing
        };
        Ok(task)
    }

    fn pauses(&self) -> bool {
        match self {
            Self::Nothing | Self::Command(_) => false,
            Self::Pause | Self::CommandThenPause(_) | Self::SignalThenPause(_) => true,
            Self::Shell { then_pause } => *then_pause,
        }
    }

    /// Does it; how long that took (milliseconds), where there was something to do.
    pub(crate) async fn timed(
        &mut self,
        context: &Context,
        sandbox: &Sandbox,
    ) -> Result<Option<f64>, CliError> {
        let began = Instant::now();
        self.run(context, sandbox).await?;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        Ok((!matches!(self, Self::Nothing | Self::Pause)).then_some(ms))
    }

    async fn run(&mut self, context: &Context, sandbox: &Sandbox) -> Result<(), CliError> {
        let stdout = if context.output.is_json() {
            Stdout::ToStderr
        } else {
            Stdout::Through
        };
        match self {
            Self::Nothing | Self::Pause => Ok(()),
            Self::Command(line) => must_succeed(sandbox, "--cmd", line, stdout).await,
            Self::CommandThenPause(line) => {
                must_succeed(sandbox, "--cmd-pause", line, stdout).await
            }
            Self::SignalThenPause(trigger) => trigger.wait(context, sandbox).await,
            Self::Shell { .. } => {
                let exit = shell::run(sandbox).await?;
                // How a person leaves a shell says nothing about success.
                context
                    .output
                    .note(&format!("the shell ended: {}", status(&exit)));
                Ok(())
            }
        }
    }
}

#[derive(Debug, Serialize)]
struct Iteration {
    resume: ResumeReport,
    /// What was done between resume and end.
    #[serde(skip_serializing_if = "Option::is_none")]
    task_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pause_ms: Option<f64>,
    total_ms: f64,
}

#[derive(Debug, Serialize)]
struct Resumed {
    from_build: BuildId,
    /// The build that the last pause made.
    to_build: Option<BuildId>,
    iterations: Vec<Iteration>,
    times: BTreeMap<String, RunTimes>,
    /// The last pause.
    pause: Option<PauseReport>,
    #[serde(skip)]
    text: String,
}

/// Refuses combinations that the parser cannot see: a global option may stand before the subcommand,
/// and whether there is a pause takes several options to know.
fn consistent(args: &ResumeBuildArgs, json: bool) -> Result<(), CliError> {
    let wrong = |said: &str| Err(CliError::Usage(said.to_owned()));
    if args.shell && json {
        return wrong(
            "--shell has a person's terminal for its output, so it cannot go with --json",
        );
    }
    let may_pause = args.pause || args.cmd_pause.is_some() || args.signal_pause.is_some();
    if args.to_build.is_some() && !may_pause && !args.shell {
        return wrong("--to-build needs a pause: --pause, --cmd-pause, --signal-pause or --shell");
    }
    if args.in_place && !may_pause {
        return wrong("--in-place is a way to pause: add --pause, --cmd-pause or --signal-pause");
    }
    let pauses = may_pause || args.fph_bench || (args.shell && args.to_build.is_some());
    let run = &args.run;
    let about_a_pause = run.reclaim || run.no_scan || run.no_refs || run.fph_timeout_ms.is_some();
    if !pauses && about_a_pause {
        return wrong(
            "--reclaim, --fph-timeout-ms, --no-scan and --no-refs are about a pause, and here is \
             none: add --pause, --cmd-pause, --signal-pause, --fph-bench, or --to-build for --shell",
        );
    }
    if args.fph_bench && args.run.fph_timeout_ms == Some(0) {
        return wrong(
            "--fph-bench compares with and without a drain: give --fph-timeout-ms above 0",
        );
    }
    Ok(())
}

pub(crate) async fn run(context: &Context, args: ResumeBuildArgs) -> Result<(), CliError> {
    consistent(&args, context.output.is_json())?;
    let mut task = Task::of(&args)?;
    let host = context.open_host(&args.run).await?;
    let from = resolve(&host, &args.from_build).await?;
    if let Some(to) = args.to_build {
        pausing::must_be_free(&host, to).await?;
        context.will_make(to);
    }
    if let (true, Some(line)) = (args.fph_bench, &args.cmd) {
        return Box::pin(fph_bench::run(context, &host, from, line, &args)).await;
    }
    if args.in_place {
        return Box::pin(in_place::run(context, &host, from, task, &args)).await;
    }
    let mut times = Times::default();
    let mut iterations = Vec::new();
    let mut last = None;
    for number in 1..=args.iterations {
        let is_last = number == args.iterations;
        let once = Once {
            context,
            host: &host,
            args: &args,
            from,
        };
        let (iteration, paused) = Box::pin(once.run(&mut task, is_last, &mut times)).await?;
        iterations.push(iteration);
        match paused {
            Some(paused) if is_last => last = Some(paused),
            Some(paused) => context.discard(paused.build).await?,
            None => {}
        }
    }
    let to_build = last.as_ref().map(|paused| paused.build.id());
    let resumed = Resumed {
        from_build: from,
        to_build,
        text: text(from, &iterations, &times, last.as_ref()),
        iterations,
        times: times.summary(),
        pause: last.map(|paused| paused.report),
    };
    if let Some(id) = &to_build {
        context.announce(id);
    }
    let printed = context
        .output
        .result(&resumed, |resumed| resumed.text.clone());
    printed.map_err(CliError::system("print the result"))
}

/// One iteration.
struct Once<'a> {
    context: &'a Context,
    host: &'a Host,
    args: &'a ResumeBuildArgs,
    from: BuildId,
}

impl Once<'_> {
    async fn run(
        &self,
        task: &mut Task<'_>,
        is_last: bool,
        times: &mut Times,
    ) -> Result<(Iteration, Option<Paused>), CliError> {
        let (context, host) = (self.context, self.host);
        let (sandbox, resume) = resume_once(context, host, self.from, self.args).await?;
        let task_ms = task.timed(context, &sandbox).await?;

        let began = Instant::now();
        let paused = if task.pauses() {
            let id = match self.args.to_build {
                Some(to) if is_last => to,
                _ => context.new_build_id(),
            };
            let flags = pausing::flags(host, &sandbox, None, &self.args.run).await;
            Some(pausing::into_build(context, host, sandbox, id, None, flags).await?)
        } else {
            sandbox.end().await;
            None
        };
        let pause_ms = paused.as_ref().map(|_| began.elapsed().as_secs_f64() * 1e3);
        let total_ms = resume.total_ms + task_ms.unwrap_or(0.0) + pause_ms.unwrap_or(0.0);
        times.add_resume(&resume);
        if let Some(task_ms) = task_ms {
            times.add("task", task_ms);
        }
        if let Some(paused) = &paused {
            times.add_pause(&paused.report);
        }
        times.add("total", total_ms);
        let iteration = Iteration {
            resume,
            task_ms,
            pause_ms,
            total_ms,
        };
        Ok((iteration, paused))
    }
}

/// Resumes as the command line asks for; cold if it says so.
pub(crate) async fn resume_once(
    context: &Context,
    host: &Host,
    from: BuildId,
    args: &ResumeBuildArgs,
) -> Result<(Sandbox, ResumeReport), CliError> {
    if args.cold {
        let storage = host.storage().clone();
        blocking(move || {
            let build: Build = storage.open_build(&from)?;
            cold::drop_host_cache(&build)
        })
        .await?;
    }
    let options = ResumeOptions {
        no_prefetch: args.no_prefetch,
        eager: args.eager,
        progress: context.output.progress(),
    };
    Ok(Box::pin(resume(host, &from, &options)).await?)
}

fn text(from: BuildId, iterations: &[Iteration], times: &Times, paused: Option<&Paused>) -> String {
    let mut text = format!("{}\n\n", times.text());
    if let Some(Iteration { resume, .. }) = iterations.last() {
        text += &match &resume.eager {
            Some(why) => format!("build {from}: memory filled before the start ({why})\n"),
            None => format!(
                "build {from}: {} page faults and {} pages prefetched until the first answer\n",
                resume.pages_faulted, resume.pages_prefetched
            ),
        };
    }
    if let Some(paused) = paused {
        let id = paused.build.id();
        text += &format!(
            "paused into build {id}\n\n{}",
            report::pause_text(&paused.report)
        );
    }
    text
}
