//! Request to paused, several times, by the scan and by the classical reclaim and drain.
//!
//! A round resumes the arm's template, does the demo's workload and pauses (*after work*: everything
//! that the workload wrote is new); then it resumes that build, lets the workload check itself, and
//! pauses again (*again*: little is new). The arms take turns, so that whatever else the machine does
//! hits both.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::{BuildId, LayerSummary, PAGE_SIZE};
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::{PauseRequest, Paused, pause};
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::run_times::RunTimes;

use crate::arms::{Arm, RECLAIM_DRAIN, SCAN_REFS, prepare};
use crate::limits;
use crate::templates::Templates;
use crate::watch::Watch;
use crate::{elapsed_ms, guest_work};

/// The arms that take turns: ours, and the peer.
pub const ARMS: [Arm; 2] = [SCAN_REFS, RECLAIM_DRAIN];

/// What a round's pause comes after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum After {
    /// The whole workload.
    Work,
    /// A resume and a look.
    Resume,
}

impl After {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Work, Self::Resume];

    /// For a person.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Work => "after work",
            Self::Resume => "again",
        }
    }
}

/// One pause.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// From the request until [`pause`] returned: the build durable, the VMM gone.
    pub returned_ms: f64,
    /// From the request until the build was durable.
    pub total_ms: f64,
    /// The freeze window.
    pub freeze_ms: f64,
    /// Each step.
    pub steps_ms: BTreeMap<&'static str, f64>,
    /// What became of the memory's pages.
    pub memory: LayerSummary,
}

impl Sample {
    fn new(paused: &Paused, returned_ms: f64) -> Self {
        let report = &paused.report;
        Self {
            returned_ms,
            total_ms: report.total_ms,
            freeze_ms: report.freeze_ms,
            steps_ms: report
                .steps
                .iter()
                .map(|step| (step.step.name(), step.ms))
                .collect(),
            memory: report.memory,
        }
    }
}

/// All pauses of one arm after the same.
#[derive(Debug, Clone, Serialize)]
pub struct PauseSeries {
    /// The arm.
    pub arm: &'static str,
    /// What they come after.
    pub after: After,
    /// From the request until it returned.
    pub returned: RunTimes,
    /// The freeze window.
    pub freeze: RunTimes,
    /// The median of each step, in milliseconds.
    pub steps_ms: BTreeMap<&'static str, f64>,
    /// Each pause.
    pub samples: Vec<Sample>,
}

/// What this machine takes for the bytes of a pause, without a thought about them.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PauseLimit {
    /// Memory that a pause copies while the guest stands still (all-zero pages aside).
    pub copied_bytes: u64,
    /// Copying as much.
    pub memcpy_ms: f64,
    /// Memory data that it writes, compressed.
    pub written_bytes: u64,
    /// Writing as much to one file, and syncing it.
    pub write_sync_ms: f64,
}

impl PauseLimit {
    /// For the last of our pauses after the workload.
    ///
    /// # Errors
    /// There was none, or the file cannot be written.
    pub fn measure(series: &[PauseSeries], dir: &Path) -> Result<Self> {
        let ours = series
            .iter()
            .find(|series| series.arm == SCAN_REFS.name && series.after == After::Work);
        let sample = ours.and_then(|series| series.samples.last());
        let memory = sample.context("no pause was measured")?.memory;
        let copied_pages = memory.stored_pages
            + memory.duplicate_pages
            + memory.base_image_pages
            + memory.same_as_parent_pages;
        let copied_bytes = copied_pages * PAGE_SIZE as u64;
        let written_bytes = memory.data_file_bytes;
        Ok(Self {
            copied_bytes,
            memcpy_ms: limits::measure(copied_bytes, dir)?.memcpy_ms,
            written_bytes,
            write_sync_ms: limits::measure(written_bytes, dir)?.write_sync_ms,
        })
    }
}

/// Pauses and pauses.
///
/// # Errors
/// A resume, the workload or a pause fails.
pub async fn run(
    host: &Host,
    templates: &Templates,
    iterations: u32,
    watch: &Watch,
) -> Result<Vec<PauseSeries>> {
    let mut samples: Vec<(&'static str, After, Sample)> = Vec::new();
    for _ in 0..iterations {
        for arm in ARMS {
            let prepared = Box::pin(prepare(host, templates, arm, watch)).await?;
            let _stage = watch.stage(format!("{}: pause, resume, pause", arm.name));
            let (first, ms) = pause_as(prepared.into_sandbox(), host, arm, watch).await?;
            samples.push((arm.name, After::Work, Sample::new(&first, ms)));
            let (sandbox, _) =
                Box::pin(resume(host, &first.build.id(), &ResumeOptions::default())).await?;
            guest_work::check(sandbox.envd()).await?;
            let (second, ms) = pause_as(sandbox, host, arm, watch).await?;
            samples.push((arm.name, After::Resume, Sample::new(&second, ms)));
            // Children first. The builds are not needed, and there are many.
            delete(host, second)?;
            delete(host, first)?;
        }
    }
    let mut series = Vec::new();
    for after in After::ALL {
        for arm in ARMS {
            let of_both =
                |sample: &&(&'static str, After, Sample)| (sample.0, sample.1) == (arm.name, after);
            let samples = samples
                .iter()
                .filter(of_both)
                .map(|sample| sample.2.clone());
            series.push(PauseSeries::of(arm.name, after, samples.collect())?);
        }
    }
    Ok(series)
}

impl PauseSeries {
    fn of(arm: &'static str, after: After, samples: Vec<Sample>) -> Result<Self> {
        let times = |of: fn(&Sample) -> f64| {
            let times_ms: Vec<f64> = samples.iter().map(of).collect();
            RunTimes::of(&times_ms).context("no iterations")
        };
        Ok(Self {
            arm,
            after,
            returned: times(|sample| sample.returned_ms)?,
            freeze: times(|sample| sample.freeze_ms)?,
            steps_ms: median_steps(&samples),
            samples,
        })
    }
}

fn median_steps(samples: &[Sample]) -> BTreeMap<&'static str, f64> {
    let mut by_step: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for (step, ms) in samples.iter().flat_map(|sample| &sample.steps_ms) {
        by_step.entry(step).or_default().push(*ms);
    }
    let medians = by_step.into_iter().filter_map(|(step, times_ms)| {
        RunTimes::of(&times_ms).map(|times| (step, times.median_ms))
    });
    medians.collect()
}

/// Pauses a sandbox as an arm does, and says how long it took until it returned.
///
/// # Errors
/// The pause fails.
pub async fn pause_as(
    sandbox: Sandbox,
    host: &Host,
    arm: Arm,
    watch: &Watch,
) -> Result<(Paused, f64)> {
    let request = PauseRequest {
        build: BuildId::random(),
        template: None,
        flags: arm.flags(),
        progress: watch.progress(arm.name),
    };
    let since = Instant::now();
    let paused = Box::pin(pause(sandbox, host, request)).await;
    let ms = elapsed_ms(since);
    Ok((
        paused.with_context(|| format!("pause as {}", arm.name))?,
        ms,
    ))
}

/// Deletes what a pause made; as long as the build is open it cannot be.
///
/// # Errors
/// Something else has it open, or stands on it.
pub fn delete(host: &Host, paused: Paused) -> Result<()> {
    let id = paused.build.id();
    drop(paused);
    Ok(host.storage().delete_build(&id)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_one_pause_did_not_take_has_the_median_of_the_others() {
        let sample = |steps: &[(&'static str, f64)]| Sample {
            returned_ms: 1.0,
            total_ms: 1.0,
            freeze_ms: 1.0,
            steps_ms: steps.iter().copied().collect(),
            memory: LayerSummary::default(),
        };
        let samples = [
            sample(&[("stop", 1.0), ("scan", 2.0)]),
            sample(&[("stop", 3.0)]),
        ];
        let steps = median_steps(&samples);
        assert_eq!(
            steps.into_iter().collect::<Vec<_>>(),
            [("scan", 2.0), ("stop", 2.0)]
        );
    }
}
