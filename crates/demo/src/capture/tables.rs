//! Everything that was measured, for a person: the summary first, then a table for each part.

use torpor_build::PAGE_SIZE;
use torpor_sandbox::pause::report::PauseStep;

use super::fragmented::Fragmented;
use super::pauses::PauseSeries;
use super::peers::Peers;
use super::scan_time::{LazyRow, ScanRow, ScanTimes};
use super::summary::Line;
use super::warm::{Warm, WarmSeries};
use crate::report::table;
use crate::{MIB, mib};

/// The steps of a pause, in their order.
const STEPS: [PauseStep; 13] = [
    PauseStep::Claim,
    PauseStep::FreezeUser,
    PauseStep::Reclaim,
    PauseStep::Drain,
    PauseStep::CountFree,
    PauseStep::Stop,
    PauseStep::SaveState,
    PauseStep::Settle,
    PauseStep::Scan,
    PauseStep::CaptureMemory,
    PauseStep::WriteMemory,
    PauseStep::WriteDisk,
    PauseStep::Commit,
];

/// A line for each figure that counts.
#[must_use]
pub fn summary(lines: &[Line]) -> String {
    let rows = lines.iter().map(|line| {
        let (target, met) = line.target.as_ref().map_or_else(
            || (String::new(), ""),
            |target| {
                let met = if target.met { "met" } else { "MISSED" };
                (format!("≤ {}", figure(Some(target.at_most))), met)
            },
        );
        vec![
            line.what.to_owned(),
            figure(line.ours),
            figure(line.limit),
            figure(line.peer),
            line.peer_name.to_owned(),
            figure(line.ratio),
            target,
            met.to_owned(),
        ]
    });
    let heading = ["", "ours", "limit", "peer", "", "ours/peer", "target", ""];
    table(&heading, rows)
}

/// Guests by size and state.
#[must_use]
pub fn scan(scan: &ScanTimes) -> String {
    let heading = [
        "scan, ms",
        "state",
        "first",
        "min",
        "median",
        "p95",
        "per GiB",
        "CPU",
        "CPU per GiB",
        "same reads",
        "whole array",
        "read, MiB",
        "in reads",
    ];
    let rows = scan.booted.iter().map(|row| {
        vec![
            size(row.memory_bytes),
            row.state.to_owned(),
            figure(Some(row.first_ms)),
            figure(Some(row.scan.min_ms)),
            figure(Some(row.scan.median_ms)),
            figure(Some(row.scan.p95_ms)),
            figure(Some(row.ms_per_gib)),
            figure(Some(row.cpu_ms)),
            figure(Some(row.cpu_ms_per_gib)),
            figure(Some(row.same_reads_ms)),
            figure(Some(row.whole_array_ms)),
            format!("{:.2}", mib(row.bytes_read)),
            row.reads.to_string(),
        ]
    });
    [table(&heading, rows), lazy(&scan.lazy), found(&scan.booted)].join("\n\n")
}

fn lazy(row: &LazyRow) -> String {
    let least = row.present.iter().copied().fold(f64::INFINITY, f64::min);
    let most = row.present.iter().copied().fold(0.0, f64::max);
    let times = |name: &str, times: torpor_sandbox::run_times::RunTimes| {
        vec![
            name.to_owned(),
            figure(Some(times.min_ms)),
            figure(Some(times.median_ms)),
            figure(Some(times.p95_ms)),
        ]
    };
    let rows = [
        times("scan, first after the resume", row.scan),
        times("settle before it", row.settle),
        times("stopped and asked again, settle included", row.again),
        times("page array scattered over many layers", row.scattered),
    ];
    let heading = format!(
        "{} lazily resumed, {:.1} to {:.1} % present, ms",
        size(row.memory_bytes),
        least * 100.0,
        most * 100.0
    );
    table(&[&heading, "min", "median", "p95"], rows.into_iter())
}

fn found(rows: &[ScanRow]) -> String {
    let heading = [
        "free pages",
        "state",
        "MemFree",
        "found",
        "difference",
        "per-CPU now",
        "per-CPU at most",
        "counter's slack",
        "within",
    ];
    let rows = rows.iter().map(|row| {
        let found = &row.found;
        let sign = if found.free_pages < found.mem_free_pages {
            "-"
        } else {
            ""
        };
        vec![
            size(row.memory_bytes),
            row.state.to_owned(),
            found.mem_free_pages.to_string(),
            found.free_pages.to_string(),
            format!("{sign}{}", found.free_pages.abs_diff(found.mem_free_pages)),
            found.per_cpu.count.to_string(),
            found.per_cpu.high.to_string(),
            found.per_cpu.counter_slack.to_string(),
            if found.within { "yes" } else { "NO" }.to_owned(),
        ]
    });
    table(&heading, rows)
}

/// What is left of a fragmented guest.
#[must_use]
pub fn fragmented(fragmented: &Fragmented) -> String {
    let scan = std::iter::once(("scan", &fragmented.scan));
    let reporting = fragmented.reporting.iter().map(|held| ("reporting", held));
    let rows = scan.chain(reporting).map(|(name, held)| {
        vec![
            name.to_owned(),
            format!("{:.2}", held.after_ms / 1e3),
            format!("{:.1}", mib(held.nonfree_bytes)),
            format!("{:.1}", mib(held.left_bytes)),
            figure(Some(held.ratio)),
        ]
    });
    let heading = format!(
        "{} files of {} KiB, every other one deleted (not zero: {:.1} MiB)",
        fragmented.files,
        fragmented.file_bytes >> 10,
        mib(fragmented.nonzero_bytes)
    );
    table(
        &[&heading, "after, s", "not free, MiB", "left, MiB", "ratio"],
        rows,
    )
}

/// The pauses: a column for each series.
#[must_use]
pub fn pauses(series: &[PauseSeries]) -> String {
    let names: Vec<String> = series
        .iter()
        .map(|series| format!("{}, {}", series.arm, series.after.name()))
        .collect();
    let mut heading = vec!["pause, ms (medians)"];
    heading.extend(names.iter().map(String::as_str));
    let row = |name: &str, of: &dyn Fn(&PauseSeries) -> Option<f64>| {
        let figures = series.iter().map(|series| figure(of(series)));
        std::iter::once(name.to_owned()).chain(figures).collect()
    };
    let mut rows = vec![
        row("request to paused", &|series| {
            Some(series.returned.median_ms)
        }),
        row("  shortest", &|series| Some(series.returned.min_ms)),
        row("  p95", &|series| Some(series.returned.p95_ms)),
        row("freeze window", &|series| Some(series.freeze.median_ms)),
        row("  p95", &|series| Some(series.freeze.p95_ms)),
    ];
    for step in STEPS {
        rows.push(row(step.name(), &|series| {
            series.steps_ms.get(step.name()).copied()
        }));
    }
    rows.push(row("stored by the build, MiB", &|series| {
        series
            .samples
            .last()
            .map(|sample| mib(sample.memory.raw_bytes))
    }));
    rows.push(row("its data file, MiB", &|series| {
        series
            .samples
            .last()
            .map(|sample| mib(sample.memory.data_file_bytes))
    }));
    table(&heading, rows.into_iter())
}

/// The next command.
#[must_use]
pub fn warm(warm: &Warm) -> String {
    let row = |name: &str, series: &WarmSeries| {
        let mut faulted = series.faults.clone();
        faulted.sort_unstable();
        let middle = faulted.get(faulted.len() / 2).copied().unwrap_or(0);
        vec![
            format!("page cache {name} ({})", series.arm),
            figure(Some(series.resume.median_ms)),
            figure(Some(series.first.min_ms)),
            figure(Some(series.first.median_ms)),
            figure(Some(series.first.p95_ms)),
            figure(Some(series.second.median_ms)),
            middle.to_string(),
        ]
    };
    let rows = [
        row("kept", &warm.kept),
        row("dropped", &warm.dropped),
        row("kept, resumed eagerly", &warm.eager),
    ];
    let heading = format!("{}, ms", warm.command);
    let columns = [
        &heading,
        "resume",
        "first, min",
        "first, median",
        "first, p95",
        "again",
        "page faults",
    ];
    table(&columns, rows.into_iter())
}

/// The same guest, stored in several ways.
#[must_use]
pub fn peers(peers: &Peers) -> String {
    let ours = peers.ways.first().map_or(0, |way| way.bytes);
    let rows = peers.ways.iter().map(|way| {
        vec![
            way.name.to_owned(),
            format!("{:.1}", mib(way.bytes)),
            crate::ratio(ours, way.bytes).map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            format!("{:.3}", way.before_stop_ms / 1e3),
            format!("{:.3}", way.stop_to_durable_ms / 1e3),
            format!("{:.3}", way.total_ms() / 1e3),
        ]
    });
    let limits = [
        ("as many bytes", peers.limit),
        ("full memory", peers.limit_full),
    ];
    let limits = limits.into_iter().map(|(name, limit)| {
        vec![
            format!("limit, {name}: copy; write, sync"),
            format!("{:.1}", mib(limit.bytes)),
            String::new(),
            format!("{:.3}", limit.memcpy_ms / 1e3),
            format!("{:.3}", limit.write_sync_ms / 1e3),
            format!("{:.3}", (limit.memcpy_ms + limit.write_sync_ms) / 1e3),
        ]
    });
    let heading = format!(
        "one guest ({:.1} MiB not free, {:.1} of them on per-CPU lists)",
        mib(peers.nonfree_bytes),
        mib(peers.per_cpu.count * PAGE_SIZE as u64)
    );
    let columns = [
        &heading,
        "on disk, MiB",
        "ours/this",
        "before the stop, s",
        "stop to durable, s",
        "all, s",
    ];
    table(&columns, rows.chain(limits))
}

fn size(bytes: u64) -> String {
    format!("{} MiB", bytes / MIB)
}

/// Three figures that count, whatever the size.
fn figure(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::Target;

    #[test]
    fn a_missed_target_stands_in_the_table_with_its_figure() {
        let line = |ours| Line {
            what: "scan",
            ours,
            limit: None,
            peer_name: "",
            peer: None,
            ratio: None,
            target: Some(Target::new("scan", 5.0, ours)),
        };
        let text = summary(&[line(Some(7.25)), line(Some(5.0)), line(None)]);
        let rows: Vec<&str> = text.lines().skip(1).collect();
        assert!(
            rows[0].contains("7.25") && rows[0].ends_with("MISSED"),
            "{text}"
        );
        assert!(
            rows[1].contains("5.00") && rows[1].ends_with("met"),
            "{text}"
        );
        assert!(
            rows[2].contains('-') && rows[2].ends_with("MISSED"),
            "{text}"
        );
    }

    #[test]
    fn figures_keep_their_weight() {
        let shown = [0.123, 9.87, 98.76, 987.6].map(|value| figure(Some(value)));
        assert_eq!(shown, ["0.12", "9.87", "98.8", "988"]);
        assert_eq!(figure(None), "-");
    }
}
