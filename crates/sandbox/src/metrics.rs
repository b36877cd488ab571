//! What this host's sandboxes do, as metrics: named and described here, nowhere else.
//!
//! Names follow Prometheus: a unit at the end, `_total` for what only grows. Figures are taken where
//! they are measured anyway; whoever wants them installs a recorder (`metrics::Recorder`), calls
//! [`describe`], and gives [`SECONDS_BUCKETS`] to the histograms. Without a recorder all of this costs
//! a few nanoseconds and does nothing.
//!
//! What a sandbox's pager did is counted when the sandbox ends.

use ::metrics::{Unit, counter, describe_counter, describe_histogram, histogram};
use torpor_build::LayerSummary;
use torpor_pager::PagerStats;
use torpor_vmm::{DrainOutcome, DrainReport};

use crate::error::StartError;
use crate::pause::PauseFailure;
use crate::pause::report::{PauseReport, PauseStep};
use crate::resume::ResumeReport;

/// Upper bounds of the histograms' buckets, in seconds: a settled pager takes less than the first, a
/// drain of a large guest may take more than the last.
pub const SECONDS_BUCKETS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];

const BOOTS: &str = "torpor_boots_total";
const RESUMES: &str = "torpor_resumes_total";
const RESUME: &str = "torpor_resume_seconds";
const RESUME_PHASE: &str = "torpor_resume_phase_seconds";
const PAUSES: &str = "torpor_pauses_total";
const PAUSE: &str = "torpor_pause_seconds";
const PAUSE_STEP: &str = "torpor_pause_step_seconds";
const PAUSE_FROZEN: &str = "torpor_pause_frozen_seconds";
const PAUSE_USER_FROZEN: &str = "torpor_pause_user_frozen_seconds";
const STORED: &str = "torpor_stored_bytes_total";
const STORED_COMPRESSED: &str = "torpor_stored_compressed_bytes_total";
const DRAINS: &str = "torpor_drains_total";
const DRAIN: &str = "torpor_drain_seconds";
const DRAIN_RELEASED: &str = "torpor_drain_released_bytes_total";
const DRAIN_DISCARDED: &str = "torpor_drain_discarded_bytes_total";
const DRAIN_REMOVES: &str = "torpor_drain_remove_events_total";
const PAGER_FAULTS: &str = "torpor_pager_faults_total";
const PAGER_COPIED: &str = "torpor_pager_copied_pages_total";
const PAGER_ZEROED: &str = "torpor_pager_zeroed_pages_total";
const PAGER_PREFETCHED: &str = "torpor_pager_prefetched_pages_total";
const PAGER_REMOVES: &str = "torpor_pager_remove_events_total";
const PAGER_REMOVED: &str = "torpor_pager_removed_pages_total";

/// Tells the recorder what each metric is. To be called once it is installed.
pub fn describe() {
    let count = |name, what: &'static str| describe_counter!(name, Unit::Count, what);
    let bytes = |name, what: &'static str| describe_counter!(name, Unit::Bytes, what);
    let seconds = |name, what: &'static str| describe_histogram!(name, Unit::Seconds, what);
    count(BOOTS, "Guests booted, by outcome: booted, failed");
    count(RESUMES, "Resumes, by outcome: resumed, failed");
    seconds(
        RESUME,
        "From the request to the resumed guest's first answer",
    );
    seconds(RESUME_PHASE, "The phases of a resume");
    count(
        PAUSES,
        "Pauses and checkpoints, by outcome: stored, still_running, lost",
    );
    seconds(PAUSE, "From the request for a pause to its durable build");
    seconds(PAUSE_STEP, "The steps of a pause, of failed ones as well");
    seconds(
        PAUSE_FROZEN,
        "From the vCPUs' stop until the guest could go on",
    );
    seconds(
        PAUSE_USER_FROZEN,
        "From the freeze of the user's processes to the vCPUs' stop",
    );
    bytes(STORED, "What builds store of their own, before compression");
    bytes(
        STORED_COMPRESSED,
        "What builds store of their own, compressed",
    );
    count(
        DRAINS,
        "Drains before pauses, by outcome: done, settled, timeout, skipped, unsupported, no_balloon, \
         not_armed, driver_not_active, error (of the VMM's API, or its end)",
    );
    seconds(DRAIN, "How long drains took");
    bytes(
        DRAIN_RELEASED,
        "Host memory that guests gave back during drains",
    );
    bytes(
        DRAIN_DISCARDED,
        "Guest memory that was discarded during drains, present or not, of resumed guests",
    );
    count(
        DRAIN_REMOVES,
        "REMOVE events during drains, of resumed guests",
    );
    count(
        PAGER_FAULTS,
        "Page faults answered, write-protect faults included",
    );
    count(PAGER_COPIED, "Pages installed with a build's bytes");
    count(PAGER_ZEROED, "Pages installed as zeros");
    count(PAGER_PREFETCHED, "Pages among both that were prefetched");
    count(PAGER_REMOVES, "REMOVE events");
    count(PAGER_REMOVED, "Pages that guests gave back by them");
}

/// A guest was booted, or was not.
pub(crate) fn booted<T>(outcome: &Result<T, StartError>) {
    let outcome = if outcome.is_ok() { "booted" } else { "failed" };
    counter!(BOOTS, "outcome" => outcome).increment(1);
}

/// A build was resumed, or was not.
pub(crate) fn resumed<T>(outcome: &Result<(T, ResumeReport), StartError>) {
    let Ok((_, report)) = outcome else {
        counter!(RESUMES, "outcome" => "failed").increment(1);
        return;
    };
    counter!(RESUMES, "outcome" => "resumed").increment(1);
    histogram!(RESUME).record(seconds(report.total_ms));
    let phases = [
        ("open", report.open_ms),
        ("vmm", report.vmm_ms),
        ("memory", report.memory_ms),
        ("disk", report.disk_ms),
        ("load", report.load_ms),
        ("answer", report.answer_ms),
    ];
    for (phase, ms) in phases {
        histogram!(RESUME_PHASE, "phase" => phase).record(seconds(ms));
    }
}

/// What a pause is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// The VMM ends.
    Pause,
    /// It goes on.
    Checkpoint,
}

/// A pause made a build, or did not.
pub(crate) fn paused(kind: Kind, outcome: Result<&PauseReport, &PauseFailure>) {
    let kind = match kind {
        Kind::Pause => "pause",
        Kind::Checkpoint => "checkpoint",
    };
    let name = match outcome {
        Ok(_) => "stored",
        Err(PauseFailure::StillRunning { .. }) => "still_running",
        Err(PauseFailure::Lost { .. }) => "lost",
    };
    counter!(PAUSES, "kind" => kind, "outcome" => name).increment(1);
    let Ok(report) = outcome else { return };
    histogram!(PAUSE, "kind" => kind).record(seconds(report.total_ms));
    histogram!(PAUSE_FROZEN, "kind" => kind).record(seconds(report.freeze_ms));
    histogram!(PAUSE_USER_FROZEN, "kind" => kind).record(seconds(report.user_frozen_ms));
    stored("memory", &report.memory);
    stored("disk", &report.disk);
}

fn stored(image: &'static str, summary: &LayerSummary) {
    counter!(STORED, "image" => image).increment(summary.raw_bytes);
    counter!(STORED_COMPRESSED, "image" => image).increment(summary.compressed_bytes);
}

/// A step of a pause is over.
pub(crate) fn paused_step(step: PauseStep, ms: f64) {
    histogram!(PAUSE_STEP, "step" => step.name()).record(seconds(ms));
}

/// A drain is over; `removes` is what the pager counted meanwhile, where there is one.
pub(crate) fn drained(report: &DrainReport, removes: Option<u64>) {
    let outcome = label(&report.outcome);
    counter!(DRAINS, "outcome" => outcome).increment(1);
    // 2^53 milliseconds are 285 thousand years.
    let took = std::time::Duration::from_millis(report.ms).as_secs_f64();
    histogram!(DRAIN, "outcome" => outcome).record(took);
    counter!(DRAIN_RELEASED).increment(report.released_bytes);
    counter!(DRAIN_DISCARDED).increment(report.discarded_bytes.unwrap_or(0));
    counter!(DRAIN_REMOVES).increment(removes.unwrap_or(0));
}

fn label(outcome: &DrainOutcome) -> &'static str {
    match outcome {
        DrainOutcome::Settled => "settled",
        DrainOutcome::Done => "done",
        DrainOutcome::CeilingReached => "timeout",
        DrainOutcome::Skipped => "skipped",
        DrainOutcome::Unsupported => "unsupported",
        DrainOutcome::NoBalloon => "no_balloon",
        DrainOutcome::NotArmed => "not_armed",
        DrainOutcome::GuestSilent => "driver_not_active",
        DrainOutcome::Failed(_) => "error",
    }
}

/// A resumed sandbox's pager ends.
pub(crate) fn pager_ended(stats: &PagerStats) {
    counter!(PAGER_FAULTS).increment(stats.faults);
    counter!(PAGER_COPIED).increment(stats.pages_copied);
    counter!(PAGER_ZEROED).increment(stats.pages_zeroed);
    counter!(PAGER_PREFETCHED).increment(stats.pages_prefetched);
    counter!(PAGER_REMOVES).increment(stats.removes);
    counter!(PAGER_REMOVED).increment(stats.pages_removed);
}

fn seconds(ms: f64) -> f64 {
    ms / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use metrics_exporter_prometheus::PrometheusBuilder;

    /// What Prometheus reads after `work`.
    fn exported(work: impl FnOnce()) -> String {
        let builder = PrometheusBuilder::new().set_buckets(&SECONDS_BUCKETS);
        let recorder = builder.unwrap().build_recorder();
        ::metrics::with_local_recorder(&recorder, || {
            describe();
            work();
        });
        recorder.handle().render()
    }

    fn assert_has(text: &str, line: &str) {
        assert!(text.lines().any(|one| one == line), "no {line} in:\n{text}");
    }

    #[test]
    fn every_outcome_of_a_drain_is_counted_by_itself_with_what_it_gave_back() {
        let outcomes = [
            (DrainOutcome::Done, "done"),
            (DrainOutcome::Settled, "settled"),
            (DrainOutcome::CeilingReached, "timeout"),
            (DrainOutcome::Skipped, "skipped"),
            (DrainOutcome::Unsupported, "unsupported"),
            (DrainOutcome::NoBalloon, "no_balloon"),
            (DrainOutcome::NotArmed, "not_armed"),
            (DrainOutcome::GuestSilent, "driver_not_active"),
            (DrainOutcome::Failed("no answer".to_owned()), "error"),
        ];
        let text = exported(|| {
            for (times, (outcome, _)) in (1..).zip(&outcomes) {
                let report = DrainReport {
                    outcome: outcome.clone(),
                    ms: 40,
                    released_bytes: 4096,
                    held_bytes: 1 << 20,
                    discarded_bytes: Some(8192),
                };
                (0..times).for_each(|_| drained(&report, Some(2)));
            }
        });
        for (times, (_, label)) in (1..).zip(&outcomes) {
            let line = format!("torpor_drains_total{{outcome=\"{label}\"}} {times}");
            assert_has(&text, &line);
            let line = format!("torpor_drain_seconds_count{{outcome=\"{label}\"}} {times}");
            assert_has(&text, &line);
        }
        let all: u64 = (1..=9).sum();
        assert_has(
            &text,
            &format!("torpor_drain_released_bytes_total {}", all * 4096),
        );
        assert_has(
            &text,
            &format!("torpor_drain_discarded_bytes_total {}", all * 8192),
        );
        assert_has(
            &text,
            &format!("torpor_drain_remove_events_total {}", all * 2),
        );
        assert_has(
            &text,
            "torpor_drain_seconds_bucket{outcome=\"done\",le=\"0.05\"} 1",
        );
        assert_has(
            &text,
            "torpor_drain_seconds_bucket{outcome=\"done\",le=\"0.025\"} 0",
        );
        assert!(
            text.contains("# HELP torpor_drains_total Drains before pauses"),
            "{text}"
        );
        assert!(
            text.contains("# TYPE torpor_drain_seconds histogram"),
            "{text}"
        );
    }

    #[test]
    fn what_a_pager_did_is_added_up_over_sandboxes() {
        let stats = PagerStats {
            faults: 3,
            pages_removed: 1024,
            ..PagerStats::default()
        };
        let text = exported(|| (0..2).for_each(|_| pager_ended(&stats)));
        assert_has(&text, "torpor_pager_faults_total 6");
        assert_has(&text, "torpor_pager_removed_pages_total 2048");
    }

    #[test]
    fn a_pause_that_failed_is_told_from_one_that_stored() {
        let lost = PauseFailure::Lost {
            step: PauseStep::Stop,
            source: crate::error::StepError::Panicked("a test".to_owned()),
            rollback: None,
            last_build: None,
        };
        let text = exported(|| paused(Kind::Checkpoint, Err(&lost)));
        let line = "torpor_pauses_total{kind=\"checkpoint\",outcome=\"lost\"} 1";
        assert_has(&text, line);
        assert!(!text.contains("torpor_stored_bytes_total "), "{text}");
    }
}
