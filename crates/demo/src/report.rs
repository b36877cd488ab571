//! The demo's result: as JSON for programs, as tables for people.

use std::path::Path;

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::arms::ArmReport;
use crate::clones::Clones;
use crate::{mib, ratio};

/// Raised with every change of a field's meaning.
pub const REPORT_VERSION: u32 = 1;

/// What `torpor-demo` writes to `report.json`.
#[derive(Debug, Clone, Serialize)]
pub struct DemoReport {
    /// [`REPORT_VERSION`].
    pub version: u32,
    /// The VMM, its machine and its accelerator.
    pub vmm: String,
    /// The arms, in order.
    pub arms: Vec<ArmReport>,
    /// The last build, resumed twice.
    pub clones: Clones,
    /// Whether everything was verified.
    pub verified: bool,
    /// The whole run.
    pub total_ms: f64,
}

/// Writes a report as JSON.
///
/// # Errors
/// The file cannot be written.
pub fn write_json(report: &impl Serialize, path: &Path) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(report)?;
    json.push(b'\n');
    std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
}

/// A row for each arm.
#[must_use]
pub fn arms_table(arms: &[ArmReport]) -> String {
    let heading = [
        "MiB and ms",
        "guest RAM",
        "not free",
        "stored",
        "disk",
        "vmstate",
        "stored/not-free",
        "of plain",
        "user frozen",
        "freeze",
        "durable",
        "resume",
        "faulted",
        "prefetched",
        "verified",
    ];
    let plain = arms.iter().find(|arm| arm.name == crate::arms::PLAIN.name);
    let rows = arms.iter().map(|arm| {
        let nonfree = arm.guest_nonfree_bytes;
        let of_plain =
            plain.and_then(|plain| ratio(arm.memory_stored_bytes, plain.memory_stored_bytes));
        vec![
            arm.name.to_owned(),
            format!("{:.0}", mib(arm.ram_bytes)),
            nonfree.map_or_else(unknown, |bytes| format!("{:.1}", mib(bytes))),
            format!("{:.1}", mib(arm.memory_stored_bytes)),
            format!("{:.1}", mib(arm.disk_stored_bytes)),
            format!("{:.2}", mib(arm.vmstate_bytes)),
            nonfree
                .and_then(|bytes| ratio(arm.memory_stored_bytes, bytes))
                .map_or_else(unknown, |ratio| format!("{ratio:.2}")),
            of_plain.map_or_else(unknown, |ratio| format!("{:.0} %", ratio * 100.0)),
            format!("{:.0}", arm.user_frozen_ms),
            format!("{:.0}", arm.freeze_ms),
            format!("{:.0}", arm.durable_ms),
            format!("{:.0}", arm.resume_ms),
            arm.pages_faulted.to_string(),
            arm.pages_prefetched.to_string(),
            yes_no(arm.verified),
        ]
    });
    table(&heading, rows)
}

/// A row for each step of the pause, a column for each arm.
#[must_use]
pub fn steps_table(arms: &[ArmReport]) -> String {
    let mut heading = vec!["pause, ms"];
    heading.extend(arms.iter().map(|arm| arm.name));
    // In the order in which they are taken, as the fullest pause took them.
    let fullest = arms.iter().max_by_key(|arm| arm.pause.steps.len());
    let steps = fullest
        .map(|arm| arm.pause.steps.as_slice())
        .unwrap_or_default();
    let rows = steps.iter().map(|step| {
        let name = step.step.name();
        let times = arms.iter().map(|arm| {
            arm.steps_ms
                .get(name)
                .map_or_else(unknown, |ms| format!("{ms:.1}"))
        });
        std::iter::once(name.to_owned()).chain(times).collect()
    });
    table(&heading, rows)
}

/// What the two clones showed.
#[must_use]
pub fn clones_text(clones: &Clones) -> String {
    let mut text = String::from("The last build, resumed twice at once:\n");
    for clone in &clones.clones {
        let found = &clone.verification;
        text += &format!(
            "  answered after {:.0} ms ({} pages faulted, {} prefetched); counter {} -> {} -> {}; \
             memory {}, disk file {}, shm file {}; clock off by {} ms; sees {}\n",
            clone.resume.total_ms,
            clone.resume.pages_faulted,
            clone.resume.pages_prefetched,
            found.counter_before,
            found.counter_after[0],
            found.counter_after[1],
            intact(found.memory_intact),
            intact(found.disk_file_intact),
            intact(found.shm_file_intact),
            found.clock_off_ms,
            clone.files_seen.join(", "),
        );
    }
    text += &format!(
        "  random numbers differ: {}; each sees its own file only: {}",
        yes_no(clones.random_differs),
        yes_no(clones.files_differ)
    );
    text
}

/// Rows under a heading: the first column to the left, the others to the right.
pub fn table(heading: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(heading)
        .add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

fn unknown() -> String {
    "-".to_owned()
}

fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "NO" }.to_owned()
}

fn intact(intact: bool) -> &'static str {
    if intact { "intact" } else { "DAMAGED" }
}
