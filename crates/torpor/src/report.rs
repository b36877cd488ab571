//! A pause report for a person.

use torpor_build::{LayerSummary, PAGE_SIZE};
use torpor_sandbox::pause::report::PauseReport;

use crate::output::{mib, ms, table};

/// Steps, sizes, and what the guest counted itself.
pub(crate) fn pause_text(report: &PauseReport) -> String {
    let steps = table(&["pause", "time", ""], &step_rows(report));
    let sizes = table(&["stored", "as is", "compressed"], &size_rows(report));
    let pages = table(&["memory", "pages", ""], &page_rows(report));
    let drain = drain_line(report).map_or_else(String::new, |line| line + "\n");
    format!(
        "{steps}\n\n{pages}\n\n{sizes}\n\n{drain}{}",
        guest_line(report)
    )
}

/// How the drain ended and what it brought.
fn drain_line(report: &PauseReport) -> Option<String> {
    let drain = report.drain.as_ref()?;
    let mut line = format!(
        "the drain: {} after {} ms, {} given back",
        drain.outcome,
        drain.ms,
        mib(drain.released_bytes)
    );
    if let (Some(removes), Some(bytes)) = (report.drain_removes, drain.discarded_bytes) {
        line += &format!(" ({removes} REMOVE events, {} of pages)", mib(bytes));
    }
    Some(line)
}

fn guest_line(report: &PauseReport) -> String {
    let ram = mib(report.ram_bytes);
    let nonfree = report.guest_nonfree_bytes.map(mib);
    match nonfree {
        Some(nonfree) => format!("the guest has {ram} of memory, {nonfree} of it not free"),
        None => format!("the guest has {ram} of memory"),
    }
}

fn step_rows(report: &PauseReport) -> Vec<Vec<String>> {
    let mut rows: Vec<_> = report
        .steps
        .iter()
        .map(|time| {
            let skipped = time.skipped.as_ref();
            let remark = skipped.map(|why| format!("not done: {why}"));
            vec![
                time.step.to_string(),
                ms(time.ms),
                remark.unwrap_or_default(),
            ]
        })
        .collect();
    for (name, time_ms) in windows(report) {
        rows.push(vec![name.to_owned(), ms(time_ms), String::new()]);
    }
    rows
}

/// The four spans that matter to whoever uses the sandbox.
pub(crate) fn windows(report: &PauseReport) -> [(&'static str, f64); 4] {
    [
        ("user frozen", report.user_frozen_ms),
        ("freeze window", report.freeze_ms),
        ("stop to durable", report.durable_ms),
        ("total", report.total_ms),
    ]
}

/// What became of each page of memory; together they are all of it.
fn page_rows(report: &PauseReport) -> Vec<Vec<String>> {
    let memory = &report.memory;
    let pages = &memory.pages;
    let row = |name: &str, pages: u64| {
        let bytes = pages.saturating_mul(PAGE_SIZE as u64);
        vec![name.to_owned(), pages.to_string(), mib(bytes)]
    };
    let own = memory.stored_pages + memory.duplicate_pages;
    vec![
        row("stored", memory.stored_pages),
        row("duplicates of these", memory.duplicate_pages),
        row("in the base image", pages.base_image),
        row("as the parent has it", pages.layer.saturating_sub(own)),
        row("free", pages.free),
        row("removed", pages.removed),
        row("zero", pages.zero),
    ]
}

fn size_rows(report: &PauseReport) -> Vec<Vec<String>> {
    let image = |name: &str, summary: &LayerSummary| {
        vec![
            name.to_owned(),
            mib(summary.raw_bytes),
            mib(summary.compressed_bytes),
        ]
    };
    vec![
        image("memory", &report.memory),
        image("disk", &report.disk),
        vec![
            "vmstate".to_owned(),
            mib(report.vmstate_bytes),
            mib(report.vmstate_bytes),
        ],
    ]
}

/// Two pauses side by side, one line each figure.
pub(crate) fn side_by_side(names: [&str; 2], reports: [&PauseReport; 2]) -> String {
    let [left, right] = reports;
    let mut rows = Vec::new();
    for time in &right.steps {
        let of = |report: &PauseReport| report.step_ms(time.step).map_or_else(String::new, ms);
        rows.push(vec![time.step.to_string(), of(left), of(right)]);
    }
    for (left, right) in windows(left).into_iter().zip(windows(right)) {
        rows.push(vec![left.0.to_owned(), ms(left.1), ms(right.1)]);
    }
    let mut sizes = |name: &str, of: &dyn Fn(&PauseReport) -> Option<u64>| {
        let show = |report| of(report).map_or_else(|| "unknown".to_owned(), mib);
        rows.push(vec![name.to_owned(), show(left), show(right)]);
    };
    sizes("guest memory not free", &|report| {
        report.guest_nonfree_bytes
    });
    sizes("given back by the guest", &|report| {
        Some(report.memory.pages.removed * PAGE_SIZE as u64)
    });
    sizes("drained", &|report| {
        Some(
            report
                .drain
                .as_ref()
                .map_or(0, |drain| drain.released_bytes),
        )
    });
    sizes("memory stored", &|report| Some(report.memory.raw_bytes));
    sizes("memory compressed", &|report| {
        Some(report.memory.compressed_bytes)
    });
    sizes("disk stored", &|report| Some(report.disk.raw_bytes));
    sizes("vmstate", &|report| Some(report.vmstate_bytes));
    table(&["", names[0], names[1]], &rows)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use torpor_sandbox::pause::report::{PauseStep, StepTime};

    pub(crate) fn a_report(memory_raw_bytes: u64) -> PauseReport {
        PauseReport {
            ram_bytes: 512 << 20,
            guest_nonfree_bytes: None,
            steps: vec![StepTime {
                step: PauseStep::Reclaim,
                ms: 12.0,
                skipped: Some("off".to_owned()),
            }],
            reclaim: None,
            drain: None,
            drain_removes: None,
            scan: None,
            user_frozen_ms: 1.0,
            freeze_ms: 2.0,
            durable_ms: 3.0,
            total_ms: 4.0,
            memory: LayerSummary {
                raw_bytes: memory_raw_bytes,
                ..LayerSummary::default()
            },
            disk: LayerSummary::default(),
            vmstate_bytes: 0,
        }
    }

    #[test]
    fn a_step_that_was_not_done_says_why() {
        let text = pause_text(&a_report(3 << 20));
        assert!(text.contains("not done: off"), "{text}");
        assert!(text.contains("3.0 MiB"), "{text}");
    }

    #[test]
    fn two_pauses_stand_side_by_side() {
        let text = side_by_side(
            ["without", "with"],
            [&a_report(8 << 20), &a_report(2 << 20)],
        );
        let line = text.lines().find(|line| line.contains("memory stored"));
        let line = line.unwrap();
        assert!(
            line.contains("8.0 MiB") && line.contains("2.0 MiB"),
            "{text}"
        );
    }
}
