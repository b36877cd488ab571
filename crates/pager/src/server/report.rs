//! What a server tells of what it has done: VMM by VMM, refusal by refusal, and together.
//!
//! Bounded: the last of each are told one by one, all of them are counted.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use crate::page_set::PAGE_SIZE_U64;
use crate::stats::{Latencies, PagerStats};

/// VMMs whose figures a report tells one by one, the last ones; all are in its sums.
const REPORTED_MAX: usize = 1024;

/// Refusals that a report tells one by one, the last ones; all are counted.
const REFUSALS_MAX: usize = 256;

/// The figures of one VMM, or of all of them together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Page faults answered.
    pub faults: u64,
    /// Pages installed with content.
    pub pages_copied: u64,
    /// Pages installed as zeros.
    pub pages_zeroed: u64,
    /// Pages that were brought in ahead.
    pub pages_prefetched: u64,
    /// Discards.
    pub removes: u64,
    /// Pages that they covered.
    pub pages_removed: u64,
    /// Times that the kernel put an operation off because of a discard under way.
    pub eagain: u64,
    /// Half of the faults were answered within this time.
    pub p50_us: u64,
    /// 99 of 100 were.
    pub p99_us: u64,
    /// All were.
    pub max_us: u64,
    /// Bytes installed, over the time from the handshake to the last of them (of each VMM, added
    /// up): what one VMM got.
    pub bytes_per_s: u64,
}

/// How one VMM was served.
#[derive(Clone, Debug, Serialize)]
pub struct VmmReport {
    /// Its process.
    pub pid: i32,
    /// Why it had to be given up, if it had.
    pub error: Option<String>,
    /// What was done for it.
    #[serde(flatten)]
    pub figures: Figures,
}

/// A connection that was not served.
#[derive(Clone, Debug, Serialize)]
pub struct Refusal {
    /// Its process; `None` where that could not be told.
    pub pid: Option<i32>,
    /// Why, and whether its process was killed.
    pub error: String,
}

/// What a server has done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ServerReport {
    /// All VMMs together.
    #[serde(flatten)]
    pub figures: Figures,
    /// VMMs that were served and have gone.
    pub vmms_served: u64,
    /// Those of them that had to be given up.
    pub vmms_failed: u64,
    /// Connections that were not served: refused, or killed because their VMM waited already.
    pub refused: u64,
    /// The last of the VMMs that were served.
    pub vmms: VecDeque<VmmReport>,
    /// The last of the connections that were not.
    pub refusals: VecDeque<Refusal>,
}

/// The report as it grows, and what its sums are made of.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) report: ServerReport,
    latencies: Latencies,
    busy: Duration,
}

impl Tally {
    /// A VMM that was served has gone.
    pub(super) fn add(&mut self, report: VmmReport, latencies: &Latencies, busy: Duration) {
        self.latencies.add(latencies);
        self.busy += busy;
        self.report.vmms_served += 1;
        self.report.vmms_failed += u64::from(report.error.is_some());
        let (all, one) = (&mut self.report.figures, &report.figures);
        all.faults += one.faults;
        all.pages_copied += one.pages_copied;
        all.pages_zeroed += one.pages_zeroed;
        all.pages_prefetched += one.pages_prefetched;
        all.removes += one.removes;
        all.pages_removed += one.pages_removed;
        all.eagain += one.eagain;
        all.set_times(&self.latencies, self.busy);
        push_bounded(&mut self.report.vmms, report, REPORTED_MAX);
    }

    /// A connection was not served.
    pub(super) fn refuse(&mut self, pid: Option<i32>, error: String) {
        tracing::warn!(pid, error, "a VMM was refused");
        self.report.refused += 1;
        push_bounded(
            &mut self.report.refusals,
            Refusal { pid, error },
            REFUSALS_MAX,
        );
    }
}

/// The first goes when there are too many.
fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, items_max: usize) {
    if queue.len() >= items_max {
        queue.pop_front();
    }
    queue.push_back(item);
}

impl Figures {
    pub(super) fn of(stats: &PagerStats, latencies: &Latencies, busy: Duration) -> Self {
        let mut figures = Self {
            faults: stats.faults,
            pages_copied: stats.pages_copied,
            pages_zeroed: stats.pages_zeroed,
            pages_prefetched: stats.pages_prefetched,
            removes: stats.removes,
            pages_removed: stats.pages_removed,
            eagain: stats.eagain,
            ..Self::default()
        };
        figures.set_times(latencies, busy);
        figures
    }

    fn set_times(&mut self, latencies: &Latencies, busy: Duration) {
        (self.p50_us, self.p99_us, self.max_us) = latencies.quantiles();
        let bytes = u128::from(self.pages_copied + self.pages_zeroed) * u128::from(PAGE_SIZE_U64);
        let per_s = bytes * 1_000_000 / busy.as_micros().max(1);
        self.bytes_per_s = u64::try_from(per_s).unwrap_or(u64::MAX);
    }
}
