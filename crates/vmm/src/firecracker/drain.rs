//! Drain on Firecracker: the host asks for the guest's free pages, and waits until it has them.
//!
//! ```text
//! start (acknowledge_on_stop) ─▶ {n, …} ─ poll ─▶ {1, …}  done
//!        │                          │
//!        └─ refused: told apart     └─ ceiling, error ─▶ stop ─▶ the pause goes on
//! ```
//!
//! *Done* is `host_cmd == 1` after a start that was answered, and nothing else: `guest_cmd` equals
//! the run's id as soon as the guest **begins**, and may be left over from the run before.
//! A start while the vCPUs stand still is answered and lost, so a drain belongs before the stop.
//!
//! Settling: Firecracker discards hinted pages in the thread that also answers its API, and ignores
//! hints once it was stopped. So when `stop` (or a status that says *done*) has been answered, no
//! discard of the run is under way, and under userfaultfd each of them has been read by whoever
//! serves the guest.
//!
//! What was given back is measured by the memory that the guest holds, before and after, and by the
//! caller's count of discarded pages where it has one; never by Firecracker's own counter, which
//! counts pages that were absent already.
//!
//! Works the same for booted and resumed machines: what the balloon can do is asked of the VMM, unless
//! its version is known not to hint.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout_at};

use crate::firecracker::api::{Api, ApiError};
use crate::firecracker::balloon::{
    HOST_CMD_DONE, HOST_CMD_STOP, HintingRefusal, HintingStatus, knows_free_pages,
};
use crate::version::Version;
use crate::vmm::{DiscardedBytes, DrainOutcome, DrainReport};

/// The first wait between two looks: a small guest is through in some milliseconds.
const POLL_FIRST: Duration = Duration::from_millis(5);
/// The longest wait between two looks: at most that much of a pause is wasted.
const POLL_MAX: Duration = Duration::from_millis(50);
/// How long stopping a run may take. It is answered at once unless Firecracker hangs in a discard.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Tells how much memory the guest holds on the host, in bytes. May block: a large guest's page map is
/// read for it.
pub type HeldBytes = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Asks it where blocking is no harm.
async fn ask(held: &HeldBytes) -> u64 {
    let held = Arc::clone(held);
    spawn_blocking(move || held())
        .await
        .unwrap_or_else(|error| {
            tracing::warn!("cannot tell how much memory the guest holds: {error}");
            0
        })
}

/// Drains for at most `ceiling`, and the two seconds that stopping an unfinished run may take; both
/// without the looks at what the guest holds, before and after, which a large guest's page map makes
/// long. Never fatal. After a future that is dropped half way a run goes on until the next start or stop.
pub async fn drain_balloon(
    api: &Api,
    version: Version,
    ceiling: Duration,
    held: HeldBytes,
    discarded: Option<DiscardedBytes<'_>>,
) -> DrainReport {
    let held_before = ask(&held).await;
    let discarded_before = discarded.map(|count| count());
    let started = Instant::now();
    let outcome = if ceiling.is_zero() {
        DrainOutcome::Skipped
    } else if !knows_free_pages(version) {
        DrainOutcome::Unsupported
    } else {
        run(api, started + ceiling).await
    };
    let took = started.elapsed();
    let held_bytes = ask(&held).await;
    // A guest that holds nothing is gone, and has given nothing back.
    let fallen = match held_bytes {
        0 => 0,
        held_bytes => held_before.saturating_sub(held_bytes),
    };
    let discarded_bytes = discarded
        .map(|count| count())
        .zip(discarded_before)
        .map(|(now, before)| now.saturating_sub(before));
    DrainReport {
        outcome,
        ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        released_bytes: fallen,
        held_bytes,
        discarded_bytes,
    }
}

async fn run(api: &Api, deadline: Instant) -> DrainOutcome {
    let started = start(api, deadline).await;
    let outcome = match started {
        Ok(()) => wait_until_done(api, deadline).await,
        // It may have begun all the same.
        Err(error) => Err(error),
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => match why_refused(&error) {
            // Nothing was started, nothing is to be stopped.
            Some(outcome) => return outcome,
            None if Instant::now() >= deadline && matches!(error, ApiError::Timeout { .. }) => {
                DrainOutcome::CeilingReached
            }
            None => DrainOutcome::Failed(error.to_string()),
        },
    };
    if outcome != DrainOutcome::Done
        && let Err(error) = api
            .patch("/balloon/hinting/stop", None, STOP_DEADLINE)
            .await
    {
        tracing::warn!("hinting may still be going on: {error}");
    }
    outcome
}

/// What is left until a deadline: a request gets that, never more.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

async fn start(api: &Api, deadline: Instant) -> Result<(), ApiError> {
    let body = json!({ "acknowledge_on_stop": true });
    api.patch("/balloon/hinting/start", Some(&body), left(deadline))
        .await
}

async fn wait_until_done(api: &Api, deadline: Instant) -> Result<DrainOutcome, ApiError> {
    let mut pause = Pauses::default();
    loop {
        let status: HintingStatus = api.get("/balloon/hinting/status", left(deadline)).await?;
        match verdict(status) {
            Verdict::Done => return Ok(DrainOutcome::Done),
            Verdict::Stopped => {
                let what = "the run was stopped by somebody else";
                return Ok(DrainOutcome::Failed(what.to_owned()));
            }
            Verdict::UnderWay => {}
        }
        if timeout_at(deadline, sleep(pause.next())).await.is_err() {
            return Ok(DrainOutcome::CeilingReached);
        }
    }
}

/// What a status after an answered start means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    UnderWay,
    Done,
    Stopped,
}

fn verdict(status: HintingStatus) -> Verdict {
    match status.host_cmd {
        HOST_CMD_DONE => Verdict::Done,
        HOST_CMD_STOP => Verdict::Stopped,
        _ => Verdict::UnderWay,
    }
}

/// The outcome of a refusal that means nothing was started; `None` for everything else.
fn why_refused(error: &ApiError) -> Option<DrainOutcome> {
    Some(match HintingRefusal::of(error)? {
        HintingRefusal::NotStarted | HintingRefusal::DriverNotActive => DrainOutcome::GuestSilent,
        HintingRefusal::NoBalloon => DrainOutcome::NoBalloon,
        HintingRefusal::NotArmed => DrainOutcome::NotArmed,
        HintingRefusal::Unknown => DrainOutcome::Unsupported,
    })
}

/// The waits between looks: twice as long each time, up to the longest.
#[derive(Debug, Default)]
struct Pauses(Option<Duration>);

impl Pauses {
    fn next(&mut self) -> Duration {
        let next = self.0.map_or(POLL_FIRST, |last| (last * 2).min(POLL_MAX));
        self.0 = Some(next);
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_back_off_from_5_to_50_ms() {
        let mut pauses = Pauses::default();
        let ms: Vec<u128> = (0..6).map(|_| pauses.next().as_millis()).collect();
        assert_eq!(ms, [5, 10, 20, 40, 50, 50]);
    }

    #[test]
    fn only_the_hosts_own_command_says_done() {
        let of = |host_cmd| verdict(HintingStatus { host_cmd });
        assert_eq!(of(1), Verdict::Done);
        assert_eq!(of(0), Verdict::Stopped);
        assert_eq!(of(2), Verdict::UnderWay);
        assert_eq!(of(u32::MAX), Verdict::UnderWay);
    }
}
