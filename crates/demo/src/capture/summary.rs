//! The figures that count, a line each: ours, what the machine itself can do, what the peer does, and
//! the target.

use serde::Serialize;

use super::fragmented::Fragmented;
use super::pauses::{After, PauseLimit, PauseSeries};
use super::peers::Peers;
use super::scan_time::{ScanRow, ScanTimes, TARGET_SIZE};
use super::warm::Warm;
use crate::arms::{ArmReport, RECLAIM_DRAIN, SCAN_REFS};
use crate::ratio;
use crate::targets::Target;

/// A scan of 1 GiB.
const SCAN_MS_MAX: f64 = 5.0;
/// What a hostile guest's scan may take more than an honest one's.
const HOSTILE_MS_MAX: f64 = 10.0;
/// No size's time for a GiB is more than this many times the smallest one's. (Fixed costs make small
/// guests dearer for a GiB, caches large ones.)
const SPREAD_MAX: f64 = 2.0;
/// Linear: from the smallest guest to the largest the time grows at most so many times as fast as the
/// memory. (A fixed cost makes that less than 1; guests of different sizes are not equally tidy.)
const LINEAR_MAX: f64 = 1.25;
/// Stored memory, uncompressed, without reclaim and drain, to what the guest counts as not free.
const STORED_TO_NONFREE_MAX: f64 = 0.60;
/// What the scan alone leaves of a fragmented guest, to the same.
const FRAGMENTED_MAX: f64 = 0.95;
/// Request to paused.
const PAUSE_MS_MAX: f64 = 400.0;
/// The freeze window.
const FREEZE_MS_MAX: f64 = 200.0;
/// The next command with the page cache kept, to the same with the page cache dropped.
const WARM_TO_COLD_MAX: f64 = 0.5;

/// A figure.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// What it is, with its unit.
    pub what: &'static str,
    /// Ours.
    pub ours: Option<f64>,
    /// What the machine itself takes for as many bytes.
    pub limit: Option<f64>,
    /// Whose the next is.
    pub peer_name: &'static str,
    /// The peer's.
    pub peer: Option<f64>,
    /// Ours to the peer's.
    pub ratio: Option<f64>,
    /// The target; a figure that could not be had does not meet it.
    pub target: Option<Target>,
}

impl Line {
    fn new(what: &'static str, ours: Option<f64>, peer: (&'static str, Option<f64>)) -> Self {
        let (peer_name, peer) = peer;
        let ratio = ours
            .zip(peer)
            .and_then(|(ours, peer)| (peer > 0.0).then(|| ours / peer));
        Self {
            what,
            ours,
            limit: None,
            peer_name,
            peer,
            ratio,
            target: None,
        }
    }

    fn limit(self, limit: Option<f64>) -> Self {
        Self { limit, ..self }
    }

    /// The target is about our figure.
    fn at_most(self, at_most: f64) -> Self {
        let target = Some(Target::new(self.what, at_most, self.ours));
        Self { target, ..self }
    }

    /// The target is about our figure's ratio to the peer's.
    fn ratio_at_most(self, at_most: f64) -> Self {
        let target = Some(Target::new(self.what, at_most, self.ratio));
        Self { target, ..self }
    }
}

/// What the lines are made of.
#[derive(Debug)]
pub struct Measured<'a> {
    /// The scan's times.
    pub scan: &'a ScanTimes,
    /// The demo's arms.
    pub arms: &'a [ArmReport],
    /// The fragmented guests.
    pub fragmented: &'a Fragmented,
    /// The pauses.
    pub pauses: &'a [PauseSeries],
    /// What the machine takes for a pause's bytes.
    pub pause_limit: PauseLimit,
    /// The next commands.
    pub warm: &'a Warm,
    /// The same guest stored in other ways.
    pub peers: &'a Peers,
}

/// All lines.
#[must_use]
pub fn lines(measured: &Measured<'_>) -> Vec<Line> {
    let mut lines = scan_lines(measured.scan);
    lines.extend(stored_lines(measured));
    lines.extend(pause_lines(measured.pauses, measured.pause_limit));
    lines.extend(warm_lines(measured.warm));
    lines.extend(peer_lines(measured.peers));
    lines
}

fn scan_lines(scan: &ScanTimes) -> Vec<Line> {
    let of = |state: &str| {
        let rows = scan.booted.iter();
        rows.clone()
            .find(|row| row.state == state && row.memory_bytes == TARGET_SIZE)
    };
    let none = ("", None);
    let timed = |what, row: Option<&ScanRow>| {
        Line::new(what, row.map(|row| row.scan.median_ms), none)
            .limit(row.map(|row| row.whole_array_ms))
            .at_most(SCAN_MS_MAX)
    };
    vec![
        timed("scan 1 GiB, booted, ms", of("booted")),
        timed("scan 1 GiB, fragmented, ms", of("fragmented")),
        Line::new(
            "scan 1 GiB, lazily resumed, ms",
            Some(scan.lazy.scan.median_ms),
            none,
        )
        .limit(of("fragmented").map(|row| row.whole_array_ms))
        .at_most(SCAN_MS_MAX),
        Line::new(
            "its page array scattered by it: ms more",
            Some(scan.lazy.scattered.median_ms - scan.lazy.scan.median_ms),
            none,
        )
        .at_most(HOSTILE_MS_MAX),
        Line::new(
            "linear: growth of the time / of the memory",
            growth(&scan.booted, "booted"),
            none,
        )
        .at_most(LINEAR_MAX),
        Line::new(
            "the same, fragmented",
            growth(&scan.booted, "fragmented"),
            none,
        )
        .at_most(LINEAR_MAX),
        Line::new(
            "dearest / cheapest GiB",
            spread(&scan.booted, "booted"),
            none,
        )
        .at_most(SPREAD_MAX),
        Line::new(
            "the same, fragmented",
            spread(&scan.booted, "fragmented"),
            none,
        )
        .at_most(SPREAD_MAX),
    ]
}

/// How many times as fast as the memory the time grows from the smallest guest to the largest: by
/// processor time, since what else the machine does is not linear.
fn growth(rows: &[ScanRow], state: &str) -> Option<f64> {
    let of_state = || rows.iter().filter(|row| row.state == state);
    let smallest = of_state().min_by_key(|row| row.memory_bytes)?;
    let largest = of_state().max_by_key(|row| row.memory_bytes)?;
    let memory = ratio(largest.memory_bytes, smallest.memory_bytes)?;
    let grown = memory > 1.0 && smallest.cpu_ms > 0.0;
    grown.then(|| largest.cpu_ms / smallest.cpu_ms / memory)
}

/// The dearest GiB to the cheapest one, over the sizes, by processor time.
fn spread(rows: &[ScanRow], state: &str) -> Option<f64> {
    let times = rows
        .iter()
        .filter(|row| row.state == state)
        .map(|row| row.cpu_ms_per_gib);
    let max = times.clone().fold(f64::NAN, f64::max);
    let min = times.fold(f64::NAN, f64::min);
    (min > 0.0).then(|| max / min)
}

fn stored_lines(measured: &Measured<'_>) -> Vec<Line> {
    let of = |name: &str| {
        let arm = measured.arms.iter().find(|arm| arm.name == name)?;
        ratio(arm.memory_stored_bytes, arm.guest_nonfree_bytes?)
    };
    let fragmented = measured.fragmented;
    let reporting = fragmented.reporting.last().map(|held| held.ratio);
    vec![
        Line::new(
            "stored / not free",
            of(SCAN_REFS.name),
            (RECLAIM_DRAIN.name, of(RECLAIM_DRAIN.name)),
        )
        .at_most(STORED_TO_NONFREE_MAX),
        Line::new(
            "fragmented, at once: left / not free",
            Some(fragmented.scan.ratio),
            ("reporting, 8 s", reporting),
        )
        .at_most(FRAGMENTED_MAX),
    ]
}

fn pause_lines(pauses: &[PauseSeries], limit: PauseLimit) -> Vec<Line> {
    let of = |arm: &str, after| {
        let mut series = pauses.iter();
        series.find(|series| series.arm == arm && series.after == after)
    };
    let paused = |what, after| {
        let ms = |arm| of(arm, after).map(|series| series.returned.median_ms);
        Line::new(
            what,
            ms(SCAN_REFS.name),
            (RECLAIM_DRAIN.name, ms(RECLAIM_DRAIN.name)),
        )
    };
    let freeze = |arm| of(arm, After::Work).map(|series| series.freeze.median_ms);
    vec![
        paused("request to paused, after work, ms", After::Work)
            .limit(Some(limit.memcpy_ms + limit.write_sync_ms))
            .at_most(PAUSE_MS_MAX),
        paused("request to paused, again, ms", After::Resume).at_most(PAUSE_MS_MAX),
        Line::new(
            "freeze window, ms",
            freeze(SCAN_REFS.name),
            (RECLAIM_DRAIN.name, freeze(RECLAIM_DRAIN.name)),
        )
        .limit(Some(limit.memcpy_ms))
        .at_most(FREEZE_MS_MAX),
    ]
}

/// The next command, and what of it is the resume's doing: with all memory filled in before and no file
/// to read, the guest's own work is left (emulated, mostly the translation of its code).
fn warm_lines(warm: &Warm) -> [Line; 2] {
    let [kept, dropped, filled] =
        [&warm.kept, &warm.dropped, &warm.eager].map(|series| series.first.median_ms);
    [
        Line::new(
            "next command, ms (ratio)",
            Some(kept),
            ("cache dropped", Some(dropped)),
        )
        .limit(Some(filled))
        .ratio_at_most(WARM_TO_COLD_MAX),
        Line::new(
            "beyond that of a guest filled before, ms",
            Some(kept - filled),
            ("cache dropped", Some(dropped - filled)),
        ),
    ]
}

fn peer_lines(peers: &Peers) -> Vec<Line> {
    let Some((ours, others)) = peers.ways.split_first() else {
        return Vec::new();
    };
    let line = |what, of: fn(&super::peers::Stored) -> f64, limit| {
        let best = others.iter().map(|way| (way.name, of(way)));
        let best = best.min_by(|a, b| a.1.total_cmp(&b.1));
        let best = best.map_or(("", None), |(name, value)| (name, Some(value)));
        Line::new(what, Some(of(ours)), best).limit(limit)
    };
    vec![
        line(
            "same guest, on disk, MiB (best peer)",
            |way| crate::mib(way.bytes),
            None,
        ),
        line(
            "same guest, request to durable, ms (best peer)",
            super::peers::Stored::total_ms,
            Some(peers.limit.memcpy_ms + peers.limit.write_sync_ms),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_that_cannot_be_had_misses_its_target() {
        let line = Line::new("x", Some(1.0), ("peer", None)).ratio_at_most(0.5);
        assert!(line.ratio.is_none());
        assert!(line.target.is_some_and(|target| !target.met));
        let line = Line::new("x", Some(1.0), ("peer", Some(0.0))).ratio_at_most(0.5);
        assert!(line.ratio.is_none());
    }

    #[test]
    fn ours_is_compared_with_the_peers_and_the_target_with_ours() {
        let line = Line::new("x", Some(1.0), ("peer", Some(4.0))).at_most(0.5);
        assert_eq!(line.ratio, Some(0.25));
        assert!(line.target.is_some_and(|target| !target.met));
        let line = Line::new("x", Some(1.0), ("peer", Some(4.0))).ratio_at_most(0.25);
        assert!(line.target.is_some_and(|target| target.met));
    }
}
