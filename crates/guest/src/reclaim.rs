//! Reclaim: the guest gives up what it does not need before it is paused.
//!
//! One shell in the guest (`reclaim.sh`), started outside the user's cgroup so that it works while
//! the user's processes are frozen, runs four steps in this order: `sync` (dirty pages cannot be
//! dropped), `drop_caches`, `compact_memory` (tidy free memory goes back to the host in large
//! pieces), `fstrim` of the writable layer's own mount. Each step has its own cap; the whole has a
//! budget, at whose end envd kills the shell. A kernel write that is under way then finishes by
//! itself: it holds up the guest's shell, not us.
//!
//! Nothing here is fatal. Whatever happens is in the report; a guest that lies in it harms only
//! the report.

use std::time::{Duration, Instant};

use envd_api::LAYER_MOUNT;
use serde::{Deserialize, Serialize};

use crate::{Command, Envd, GuestError, ProcessEvent};

/// Most that we read of the shell's output, bytes: the script prints less than a tenth.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;

const SCRIPT: &str = include_str!("reclaim.sh");

/// Marks the script's lines.
const MARK: &str = "torpor-reclaim";

/// The longest that each step may take, milliseconds; 0 skips it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimCaps {
    /// Write dirty pages back.
    pub sync_ms: u32,
    /// Drop the page cache, dentries and inodes.
    pub drop_caches_ms: u32,
    /// Compact memory.
    pub compact_memory_ms: u32,
    /// Discard the writable layer's free blocks.
    pub fstrim_ms: u32,
}

impl Default for ReclaimCaps {
    /// The flag `guest-pause-reclaim`'s default.
    fn default() -> Self {
        Self {
            sync_ms: 500,
            drop_caches_ms: 200,
            compact_memory_ms: 1000,
            fstrim_ms: 500,
        }
    }
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It ran.
    Done,
    /// Its cap, or the budget, ran out while it ran.
    Timeout,
    /// It ran and failed; see the message.
    Failed,
    /// Its cap is 0.
    Skipped,
    /// The guest's kernel, drive or user land cannot do it.
    Unsupported,
    /// The budget ran out before, or the shell died.
    NotReached,
}

/// One step of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepReport {
    /// `sync`, `drop_caches`, `compact_memory` or `fstrim`.
    pub step: String,
    /// What became of it.
    pub outcome: StepOutcome,
    /// How long it took by the guest's clock, in ticks of 10 ms.
    pub ms: u64,
    /// How much the guest's MemFree grew meanwhile, bytes (it can shrink).
    pub freed_bytes: i64,
    /// The step's own last words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What reclaim did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimReport {
    /// The four steps, in order.
    pub steps: Vec<StepReport>,
    /// How long it took as the host saw it, milliseconds.
    pub total_ms: u64,
    /// Whether the budget ran out.
    pub budget_exhausted: bool,
    /// What went wrong with the shell as a whole, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

const STEPS: [&str; 4] = ["sync", "drop_caches", "compact_memory", "fstrim"];

/// Runs the steps. Never fails and never takes (much) longer than `budget`; see the report.
pub async fn reclaim(envd: &Envd, caps: ReclaimCaps, budget: Duration) -> ReclaimReport {
    let began = Instant::now();
    let mut printed = Vec::new();
    let outcome = tokio::time::timeout(budget, run(envd, caps, budget, &mut printed)).await;
    let (budget_exhausted, error) = match outcome {
        Ok(Ok(())) => (false, None),
        Ok(Err(error)) if error.is_timeout() => (true, None),
        Ok(Err(error)) => (false, Some(error.to_string())),
        Err(_elapsed) => (true, None),
    };
    ReclaimReport {
        steps: parse(&String::from_utf8_lossy(&printed)),
        total_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        budget_exhausted,
        error,
    }
}

async fn run(
    envd: &Envd,
    caps: ReclaimCaps,
    budget: Duration,
    printed: &mut Vec<u8>,
) -> Result<(), GuestError> {
    let caps_ms = [
        caps.sync_ms,
        caps.drop_caches_ms,
        caps.compact_memory_ms,
        caps.fstrim_ms,
    ];
    let shell = Command::shell(SCRIPT).arg(MARK).outside_freezer().cwd("/");
    let command = caps_ms
        .iter()
        .fold(shell, |command, ms| command.arg(ms.to_string()));
    let mut process = envd.start(&command.arg(LAYER_MOUNT), Some(budget)).await?;
    while let Some(event) = process.next().await? {
        match event {
            ProcessEvent::Stdout(bytes) | ProcessEvent::Pty(bytes) => {
                let room = OUTPUT_BYTES_MAX - printed.len();
                printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            ProcessEvent::Stderr(bytes) => {
                tracing::debug!(stderr = %String::from_utf8_lossy(&bytes), "reclaim");
            }
            ProcessEvent::End(_) => {}
        }
    }
    Ok(())
}

/// Turns the script's lines into the report: pure, and true for any bytes.
fn parse(printed: &str) -> Vec<StepReport> {
    STEPS.iter().map(|step| parse_step(step, printed)).collect()
}

fn parse_step(step: &str, printed: &str) -> StepReport {
    let mut report = StepReport {
        step: step.to_owned(),
        outcome: StepOutcome::NotReached,
        ms: 0,
        freed_bytes: 0,
        message: None,
    };
    for line in printed.lines() {
        let mut words = line.splitn(7, ' ');
        if words.next() != Some(MARK) || words.next() != Some(step) {
            continue;
        }
        report.outcome = match words.next() {
            // Begun and never heard of again: the budget ran out in it.
            Some("begin" | "timeout") => StepOutcome::Timeout,
            Some("done") => StepOutcome::Done,
            Some("failed") => StepOutcome::Failed,
            Some("skipped") => StepOutcome::Skipped,
            Some("unsupported") => StepOutcome::Unsupported,
            _ => continue,
        };
        let mut number = || {
            words
                .next()
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0)
        };
        report.ms = number();
        let (before_kib, after_kib) = (number(), number());
        report.freed_bytes = bytes(after_kib).saturating_sub(bytes(before_kib));
        report.message = words
            .next()
            .filter(|words| !words.is_empty())
            .map(str::to_owned);
    }
    report
}

fn bytes(kib: u64) -> i64 {
    i64::try_from(kib).unwrap_or(i64::MAX).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_tells_what_became_of_each_step() {
        let steps = parse(
            "torpor-reclaim sync begin\n\
             torpor-reclaim sync done 30 1000 1000 \n\
             noise\n\
             torpor-reclaim drop_caches begin\n\
             torpor-reclaim drop_caches done 40 1000 3000 \n\
             torpor-reclaim compact_memory begin\n",
        );
        let outcomes: Vec<_> = steps.iter().map(|step| step.outcome).collect();
        use StepOutcome::{Done, NotReached, Timeout};
        assert_eq!(outcomes, [Done, Done, Timeout, NotReached]);
        assert_eq!((steps[1].ms, steps[1].freed_bytes), (40, 2000 * 1024));
    }

    #[test]
    fn a_guest_that_lies_in_its_report_breaks_nothing() {
        let steps = parse(
            "torpor-reclaim sync done 99999999999999999999999 -1 18446744073709551615 x y z\n\
             torpor-reclaim\n\
             torpor-reclaim fstrim\n\
             torpor-reclaim fstrim unsupported 1 0 0 fstrim: /x: the discard operation is not supported\n",
        );
        assert_eq!(steps[0].outcome, StepOutcome::Done);
        assert_eq!(steps[0].freed_bytes, i64::MAX);
        assert_eq!(steps[3].outcome, StepOutcome::Unsupported);
        assert!(
            steps[3]
                .message
                .as_deref()
                .is_some_and(|words| words.contains("discard"))
        );
    }
}
