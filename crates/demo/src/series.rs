//! Many resumes of one build to the first answer: warm, cold, eager, without prefetch.

use std::fs::File;

use anyhow::{Context as _, Result};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use torpor_build::{Build, BuildId};
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};
use torpor_sandbox::run_times::RunTimes;

use crate::watch::Watch;

/// How the build is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// As by default, the build's files in the host's page cache.
    Warm,
    /// The host's page cache of the build and its ancestors dropped before each resume. (Not of the
    /// base image and of QEMU itself: other sandboxes keep those warm.)
    Cold,
    /// Without prefetching the recorded working set.
    NoPrefetch,
    /// All memory filled before the guest starts.
    Eager,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Warm, Self::Cold, Self::NoPrefetch, Self::Eager];

    /// For a person.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
            Self::NoPrefetch => "no prefetch",
            Self::Eager => "eager",
        }
    }
}

/// A series.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    /// How.
    pub mode: Mode,
    /// From the request to the first answer.
    pub times: RunTimes,
    /// Each resume.
    pub resumes: Vec<ResumeReport>,
}

/// Resumes `build` `iterations` times, one after the other.
///
/// # Errors
/// A resume fails.
pub async fn run(
    host: &Host,
    build: &BuildId,
    mode: Mode,
    iterations: u32,
    watch: &Watch,
) -> Result<Series> {
    let _stage = watch.stage(format!("{iterations} resumes, {}", mode.name()));
    let options = ResumeOptions {
        no_prefetch: mode == Mode::NoPrefetch,
        eager: mode == Mode::Eager,
        ..ResumeOptions::default()
    };
    let mut resumes = Vec::new();
    for _ in 0..iterations {
        if mode == Mode::Cold {
            drop_cached(host, build)?;
        }
        let (sandbox, report) = Box::pin(resume(host, build, &options)).await?;
        sandbox.end().await;
        resumes.push(report);
    }
    let times_ms: Vec<f64> = resumes.iter().map(|report| report.total_ms).collect();
    let times = RunTimes::of(&times_ms).context("no iterations")?;
    Ok(Series {
        mode,
        times,
        resumes,
    })
}

/// Drops a build's and its ancestors' files from the host's page cache. They were synced when they
/// were committed, so that the kernel can.
fn drop_cached(host: &Host, build: &BuildId) -> Result<()> {
    let mut next = Some(*build);
    while let Some(id) = next {
        let build: Build = host.storage().open_build(&id)?;
        for entry in std::fs::read_dir(build.path())? {
            fadvise(&File::open(entry?.path())?, 0, None, Advice::DontNeed)?;
        }
        next = build.manifest().info.parent;
    }
    Ok(())
}
