//! The next command of a resumed guest: its page cache kept (scan and references make that cheap), or
//! dropped before the pause, as whoever wants a small build without them must.
//!
//! Two builds of the same template: the guest has run the command twice, then it is paused; the two
//! pauses differ in the reclaim alone. Both builds are resumed in turns, after one resume each that
//! is not counted, so that the host's page cache is equally warm for both. The command is run twice
//! in each resumed guest: the second time nothing is cold, and only the guest's own work is left,
//! which is the limit of any resume. The build with the page cache is also resumed eagerly: then no
//! page is faulted in and no file is read, and what its first command takes beyond the second is the
//! VMM's own (an emulator translates the guest's code anew in each process).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::BuildId;
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::run_times::RunTimes;

use super::pauses::pause_as;
use crate::arms::{Arm, RECLAIM_SCAN_REFS, SCAN_REFS};
use crate::templates::Templates;
use crate::watch::Watch;
use crate::{elapsed_ms, guest_work};

/// The command.
pub const COMMAND: &str = "python3 -c 'import json, re, subprocess'";
/// Longest wait for it: a few seconds, emulated, with a cold disk.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// The arms: page cache kept, dropped.
const ARMS: [Arm; 2] = [SCAN_REFS, RECLAIM_SCAN_REFS];

/// One build, resumed several times.
#[derive(Debug, Clone, Serialize)]
pub struct WarmSeries {
    /// The arm that made it.
    pub arm: &'static str,
    /// From the request to resume to the first answer.
    pub resume: RunTimes,
    /// The first command.
    pub first: RunTimes,
    /// The same again, in the same guest.
    pub second: RunTimes,
    /// Page faults that the pager served for the first command.
    pub faults: Vec<u64>,
    /// Each first command, in milliseconds.
    pub first_ms: Vec<f64>,
}

/// A build of an arm, and how it is resumed.
#[derive(Debug, Clone, Copy)]
struct Kind {
    arm: usize,
    eager: bool,
}

/// In turns: kept, dropped, kept and eager.
const KINDS: [Kind; 3] = [
    Kind {
        arm: 0,
        eager: false,
    },
    Kind {
        arm: 1,
        eager: false,
    },
    Kind {
        arm: 0,
        eager: true,
    },
];

/// Kept, and dropped.
#[derive(Debug, Clone, Serialize)]
pub struct Warm {
    /// The command.
    pub command: &'static str,
    /// Page cache kept.
    pub kept: WarmSeries,
    /// Page cache dropped.
    pub dropped: WarmSeries,
    /// Page cache kept, all memory filled before the guest starts.
    pub eager: WarmSeries,
}

/// Measures both.
///
/// # Errors
/// A guest does not resume, or has no Python.
pub async fn run(
    host: &Host,
    templates: &Templates,
    iterations: u32,
    watch: &Watch,
) -> Result<Warm> {
    let _stage = watch.stage(format!("{iterations} warm and cold resumes"));
    let mut builds = Vec::new();
    for arm in ARMS {
        builds.push(prepare(host, templates, arm, watch).await?);
    }
    let mut runs = KINDS.map(|_| Vec::new());
    for iteration in 0..=iterations {
        for (kind, runs) in KINDS.iter().zip(&mut runs) {
            let run = resume_and_run(host, &builds[kind.arm], kind.eager).await?;
            if iteration > 0 {
                runs.push(run);
            }
        }
    }
    let [kept, dropped, eager] = runs;
    let [kept_arm, dropped_arm] = ARMS;
    Ok(Warm {
        command: COMMAND,
        kept: WarmSeries::of(kept_arm.name, &kept)?,
        dropped: WarmSeries::of(dropped_arm.name, &dropped)?,
        eager: WarmSeries::of(kept_arm.name, &eager)?,
    })
}

async fn prepare(host: &Host, templates: &Templates, arm: Arm, watch: &Watch) -> Result<BuildId> {
    let template = templates.of(arm.template);
    let (sandbox, _) = Box::pin(resume(host, template, &ResumeOptions::default())).await?;
    for _ in 0..2 {
        command_ms(&sandbox).await?;
    }
    let (paused, _) = pause_as(sandbox, host, arm, watch).await?;
    Ok(paused.build.id())
}

struct Run {
    resume_ms: f64,
    first_ms: f64,
    second_ms: f64,
    faults: u64,
}

async fn resume_and_run(host: &Host, build: &BuildId, eager: bool) -> Result<Run> {
    let options = ResumeOptions {
        eager,
        ..ResumeOptions::default()
    };
    let (sandbox, report) = Box::pin(resume(host, build, &options)).await?;
    let faulted = || sandbox.pager_stats().map_or(0, |stats| stats.faults);
    let before = faulted();
    let first_ms = command_ms(&sandbox).await?;
    let faults = faulted() - before;
    let second_ms = command_ms(&sandbox).await?;
    sandbox.end().await;
    Ok(Run {
        resume_ms: report.total_ms,
        first_ms,
        second_ms,
        faults,
    })
}

async fn command_ms(sandbox: &Sandbox) -> Result<f64> {
    let since = Instant::now();
    guest_work::shell_within(sandbox.envd(), COMMAND, COMMAND_MAX).await?;
    Ok(elapsed_ms(since))
}

impl WarmSeries {
    fn of(arm: &'static str, runs: &[Run]) -> Result<Self> {
        let of = |time: fn(&Run) -> f64| runs.iter().map(time).collect::<Vec<f64>>();
        let times = |time| RunTimes::of(&of(time)).context("no iterations");
        Ok(Self {
            arm,
            resume: times(|run| run.resume_ms)?,
            first: times(|run| run.first_ms)?,
            second: times(|run| run.second_ms)?,
            faults: runs.iter().map(|run| run.faults).collect(),
            first_ms: of(|run| run.first_ms),
        })
    }
}
