//! What the pager has done so far.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// The longest latency that the histogram tells apart: a minute. Longer ones count as a minute in
/// the percentiles; the maximum is kept apart.
const LATENCY_US_MAX: u64 = 60_000_000;

/// Two significant digits: about 20 KiB, and a percentile is right to 1 %.
const LATENCY_DIGITS: u8 = 2;

/// A pager's figures since its start. Pages are of 4 KiB, also where the guest's are larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagerStats {
    /// Page faults answered, write-protect faults included.
    pub faults: u64,
    /// Write-protect faults among them (synchronous write tracking only).
    pub write_faults: u64,
    /// Pages installed with the source's bytes, for whatever reason.
    pub pages_copied: u64,
    /// Pages installed as zeros, for whatever reason.
    pub pages_zeroed: u64,
    /// Pages among both that were brought in as neighbours of a faulting page.
    pub pages_around: u64,
    /// Pages among both that were prefetched.
    pub pages_prefetched: u64,
    /// Discards.
    pub removes: u64,
    /// Pages that they covered.
    pub pages_removed: u64,
    /// Times that the kernel put an operation off because of a discard under way.
    pub eagain: u64,
    /// Reads of the source that failed and were repeated.
    pub source_retries: u64,
    /// Faults that waited longer than the watchdog allows.
    pub slow_faults: u64,
    /// Faults that wait now.
    pub faults_waiting: u64,
    /// Half of the faults were answered within this time, from their being read to the wake.
    pub p50_us: u64,
    /// 99 of 100 were.
    pub p99_us: u64,
    /// All were.
    pub max_us: u64,
}

impl PagerStats {
    /// In base pages, of each of which a page of the guest's memory has so many.
    pub(crate) fn in_base_pages(self, base_pages: u64) -> Self {
        Self {
            pages_copied: self.pages_copied * base_pages,
            pages_zeroed: self.pages_zeroed * base_pages,
            pages_around: self.pages_around * base_pages,
            pages_prefetched: self.pages_prefetched * base_pages,
            pages_removed: self.pages_removed * base_pages,
            ..self
        }
    }
}

/// How long faults waited, from their being read to the wake; of one guest or of several.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    us: Option<Histogram<u64>>,
    max: Duration,
}

impl Latencies {
    fn new() -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            us: Some(Histogram::new_with_max(LATENCY_US_MAX, LATENCY_DIGITS)?),
            max: Duration::ZERO,
        })
    }

    fn record(&mut self, took: Duration) {
        self.max = self.max.max(took);
        if let Some(us) = &mut self.us {
            us.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    /// Adds another guest's.
    pub fn add(&mut self, other: &Self) {
        self.max = self.max.max(other.max);
        match (&mut self.us, &other.us) {
            (Some(us), Some(others)) => {
                if let Err(error) = us.add(others) {
                    tracing::warn!(%error, "latencies that cannot be added up");
                }
            }
            (us @ None, others) => us.clone_from(others),
            (Some(_), None) => {}
        }
    }

    /// The median, the 99th percentile and the maximum, in microseconds.
    #[must_use]
    pub fn quantiles(&self) -> (u64, u64, u64) {
        let at = |share| self.us.as_ref().map_or(0, |us| us.value_at_quantile(share));
        let max_us = u64::try_from(self.max.as_micros()).unwrap_or(u64::MAX);
        (at(0.5), at(0.99), max_us)
    }
}

/// The running counters.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) stats: PagerStats,
    pub(crate) latencies: Latencies,
    /// When a page was installed last.
    pub(crate) last_install: Option<Instant>,
}

impl Counters {
    pub(crate) fn new() -> Result<Self, hdrhistogram::CreationError> {
        Ok(Self {
            stats: PagerStats::default(),
            latencies: Latencies::new()?,
            last_install: None,
        })
    }

    pub(crate) fn fault_answered(&mut self, took: Duration) {
        self.stats.faults += 1;
        self.latencies.record(took);
    }

    pub(crate) fn snapshot(&self, faults_waiting: usize) -> PagerStats {
        let (p50_us, p99_us, max_us) = self.latencies.quantiles();
        PagerStats {
            faults_waiting: faults_waiting as u64,
            p50_us,
            p99_us,
            max_us,
            ..self.stats
        }
    }
}
