//! What the bench must reach.

use serde::Serialize;

use torpor_sandbox::resume::ResumeReport;
use torpor_sandbox::run_times::RunTimes;

use crate::arms::ArmReport;
use crate::ratio;
use crate::series::{Mode, Series};

/// Stored memory against what the guest counts as not free.
const STORED_TO_NONFREE_MAX: f64 = 1.10;
/// Stored memory against the plain arm's.
const STORED_TO_PLAIN_MAX: f64 = 0.40;
/// The freeze window.
const FREEZE_MS_MAX: f64 = 150.0;
/// The median resume to the first answer, warm files.
const RESUME_MS_MAX: f64 = 300.0;
/// Page faults of a resume whose working set is recorded, against those of one whose is not.
const FAULTS_TO_UNRECORDED_MAX: f64 = 0.10;
/// From the load of the device state to the first answer, against that of a guest whose memory was
/// filled before. What the filling takes does not count.
const ANSWER_TO_FILLED_MAX: f64 = 1.15;

/// One target and where we are.
#[derive(Debug, Clone, Serialize)]
pub struct Target {
    /// What is measured.
    pub what: &'static str,
    /// The most that it may be.
    pub at_most: f64,
    /// What it is; absent where it could not be measured, which is not met.
    pub measured: Option<f64>,
    /// Whether it is met.
    pub met: bool,
}

impl Target {
    /// Compares.
    #[must_use]
    pub fn new(what: &'static str, at_most: f64, measured: Option<f64>) -> Self {
        let met = measured.is_some_and(|measured| measured <= at_most);
        Self {
            what,
            at_most,
            measured,
            met,
        }
    }
}

/// All targets, for the lean arm beside the plain one.
#[must_use]
pub fn targets(lean: &ArmReport, plain: &ArmReport, warm_median_ms: f64) -> Vec<Target> {
    let stored = lean.memory_stored_bytes;
    let to_nonfree = lean
        .guest_nonfree_bytes
        .and_then(|nonfree| ratio(stored, nonfree));
    let to_plain = ratio(stored, plain.memory_stored_bytes);
    vec![
        Target::new(
            "stored memory / not free in the guest",
            STORED_TO_NONFREE_MAX,
            to_nonfree,
        ),
        Target::new(
            "stored memory / the plain arm's",
            STORED_TO_PLAIN_MAX,
            to_plain,
        ),
        Target::new("freeze window, ms", FREEZE_MS_MAX, Some(lean.freeze_ms)),
        Target::new(
            "resume to first answer, median, ms",
            RESUME_MS_MAX,
            Some(warm_median_ms),
        ),
    ]
}

/// The targets for the pager, by the series of resumes.
#[must_use]
pub fn resume_targets(series: &[Series]) -> [Target; 2] {
    let median = |mode: Mode, of: fn(&ResumeReport) -> f64| {
        let series = series.iter().find(|series| series.mode == mode)?;
        let values: Vec<f64> = series.resumes.iter().map(of).collect();
        Some(RunTimes::of(&values)?.median_ms)
    };
    let to = |over: Option<f64>, under: Option<f64>| {
        let (over, under) = (over?, under?);
        (under > 0.0).then_some(over / under)
    };
    #[expect(clippy::cast_precision_loss, reason = "far below 2^50")]
    let faults = |report: &ResumeReport| report.pages_faulted as f64;
    let answer = |report: &ResumeReport| report.load_ms + report.answer_ms;
    [
        Target::new(
            "faults, working set recorded / not",
            FAULTS_TO_UNRECORDED_MAX,
            to(median(Mode::Warm, faults), median(Mode::NoPrefetch, faults)),
        ),
        Target::new(
            "load and answer, lazy / filled before",
            ANSWER_TO_FILLED_MAX,
            to(median(Mode::Warm, answer), median(Mode::Eager, answer)),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_measured_is_not_met() {
        assert!(!Target::new("x", 1.0, None).met);
        assert!(Target::new("x", 1.0, Some(1.0)).met);
        assert!(!Target::new("x", 1.0, Some(1.001)).met);
    }
}
