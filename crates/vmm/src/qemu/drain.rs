//! Drain on QEMU: wait until free page reporting has settled.
//!
//! Stock QEMU cannot ask a guest for its free pages. The guest reports them by itself, in rounds:
//! Linux starts one 2 s after pages were freed (`PAGE_REPORTING_DELAY`, mm/page_reporting.c) and
//! the next 2 s after that, as long as there is something left; each round reports up to a
//! sixteenth of a long free list. The host sees a round only by what it releases: the memfd's
//! allocated blocks fall. In a lazily resumed guest that is not enough, since pages that were never
//! brought in are given back as well and change no block, and pages that are brought in hide a fall:
//! there the pager's count of discarded pages is watched, which only grows.
//!
//! So *settled* means: over a time in which a round must have come ([`QUIET`]), less came back
//! than is worth waiting for ([`WORTH_BYTES`]). A guest is never wholly silent, and the tail of
//! a fragmented one's rounds goes on for ever in ever smaller bits.
//!
//! Measured (256 MiB guest under TCG that had freed 96 MiB, busy host, QEMU 7.2 and 10.0): settled
//! after 4.6 to 8.7 s, 81 to 90 MB came back while it watched.
//!
//! Consequence: a drain whose ceiling is below [`QUIET`] can release memory but never say
//! `Settled`.

use std::time::Duration;

use qapi::qmp::{qom_get, x_query_virtio_status};
use tokio::time::{Instant, sleep_until};

use crate::memory::allocated_bytes;
use crate::qemu::command_line::BALLOON_PATH;
use crate::qemu::instance::Instance;
use crate::vmm::{DiscardedBytes, DrainOutcome, DrainReport};

/// One period of the guest's reporting (2 s), and half a second for a slow guest to get through
/// its round.
const QUIET: Duration = Duration::from_millis(2_500);
/// What a round must release to be waited for: with less than this per 2 s, waiting costs more
/// than storing the pages would.
const WORTH_BYTES: u64 = 1 << 20;
/// How often the blocks are looked at; one look costs a system call.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Drains for at most `ceiling`.
pub(super) async fn drain(
    qemu: &Instance,
    ceiling: Duration,
    discarded: Option<DiscardedBytes<'_>>,
) -> DrainReport {
    let started = Instant::now();
    let discarded_before = discarded.map(|count| count());
    let mut watch = SettleWatch::default();
    let outcome = if ceiling.is_zero() {
        DrainOutcome::Skipped
    } else {
        let deadline = started + ceiling;
        match tokio::time::timeout_at(deadline, reporting(qemu)).await {
            Ok(Reporting::Off) => DrainOutcome::Unsupported,
            Ok(Reporting::GuestSilent) => DrainOutcome::GuestSilent,
            Ok(Reporting::On) => wait_until_settled(qemu, deadline, discarded, &mut watch).await,
            Err(_) => DrainOutcome::CeilingReached,
        }
    };
    DrainReport {
        outcome,
        ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        released_bytes: watch.released_bytes,
        held_bytes: allocated_bytes(qemu.memfd()).unwrap_or(0),
        discarded_bytes: (discarded.map(|count| count()))
            .zip(discarded_before)
            .map(|(now, before)| now.saturating_sub(before)),
    }
}

async fn wait_until_settled(
    qemu: &Instance,
    deadline: Instant,
    discarded: Option<DiscardedBytes<'_>>,
    watch: &mut SettleWatch,
) -> DrainOutcome {
    let started = Instant::now();
    let mut next_look = started;
    loop {
        if let Some(exit) = qemu.process.exited() {
            return DrainOutcome::Failed(format!("the VMM {exit}"));
        }
        let held_bytes = match allocated_bytes(qemu.memfd()) {
            Ok(bytes) => bytes,
            Err(e) => return DrainOutcome::Failed(format!("cannot look at guest memory: {e}")),
        };
        // A look that comes late counts as one at the ceiling.
        let now = Instant::now().min(deadline);
        let seen = match discarded {
            Some(discarded) => Seen::DiscardedBytes(discarded()),
            None => Seen::HeldBytes(held_bytes),
        };
        if watch.look(now.duration_since(started), seen) {
            return DrainOutcome::Settled;
        }
        if now >= deadline {
            return DrainOutcome::CeilingReached;
        }
        next_look = (next_look + LOOK_INTERVAL).max(now);
        sleep_until(next_look.min(deadline)).await;
    }
}

/// What the balloon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reporting {
    On,
    Off,
    GuestSilent,
}

/// Asks QEMU itself, for booted and resumed machines alike. Where QEMU cannot say what the guest
/// has taken up (the question is an unstable one), waiting is the right thing to do.
async fn reporting(qemu: &Instance) -> Reporting {
    let property = qom_get {
        path: BALLOON_PATH.to_owned(),
        property: "free-page-reporting".to_owned(),
    };
    match qemu.execute(property).await {
        Ok(value) if value.as_bool() == Some(true) => {}
        Ok(_) => return Reporting::Off,
        Err(error) => {
            tracing::debug!("cannot ask the balloon: {error}");
            return Reporting::Off;
        }
    }
    match qemu
        .execute(x_query_virtio_status {
            path: BALLOON_PATH.to_owned(),
        })
        .await
    {
        Ok(status) => {
            let taken_up = status.guest_features.dev_features.unwrap_or_default();
            let reports = taken_up
                .iter()
                .any(|name| name.contains("BALLOON_F_REPORTING"));
            if reports {
                Reporting::On
            } else {
                Reporting::GuestSilent
            }
        }
        Err(error) => {
            tracing::debug!("cannot ask what the guest's balloon does: {error}");
            Reporting::On
        }
    }
}

/// What a look shows.
#[derive(Debug, Clone, Copy)]
enum Seen {
    /// What the guest holds: falls by what is released, grows by what is taken.
    HeldBytes(u64),
    /// All that was ever discarded: only grows.
    DiscardedBytes(u64),
}

impl Seen {
    /// What was released since an earlier look of the same kind.
    fn released_since(self, previous: Self) -> u64 {
        match (previous, self) {
            (Self::HeldBytes(before), Self::HeldBytes(now)) => before.saturating_sub(now),
            (Self::DiscardedBytes(before), Self::DiscardedBytes(now)) => now.saturating_sub(before),
            _ => 0,
        }
    }
}

/// Decides when the memory has stopped falling. Values in, decision out: no clock, no I/O.
#[derive(Debug, Default)]
struct SettleWatch {
    released_bytes: u64,
    previous: Option<Seen>,
    /// When the present quiet time began, and what had been released by then.
    quiet_since: Duration,
    released_before_quiet: u64,
}

impl SettleWatch {
    /// Takes one look; true if the guest has settled. What it takes between two looks is no
    /// release, and does not undo one.
    fn look(&mut self, now: Duration, seen: Seen) -> bool {
        let previous = self.previous.replace(seen);
        let fallen = previous.map_or(0, |previous| seen.released_since(previous));
        self.released_bytes += fallen;
        if previous.is_none() || self.released_bytes - self.released_before_quiet >= WORTH_BYTES {
            self.quiet_since = now;
            self.released_before_quiet = self.released_bytes;
        }
        now.saturating_sub(self.quiet_since) >= QUIET
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Looks every 50 ms at `held`, and says when it settled.
    fn settles_at(until_ms: u64, held: impl Fn(u64) -> u64) -> (Option<u64>, u64) {
        let mut watch = SettleWatch::default();
        let at = (0..until_ms)
            .step_by(50)
            .find(|now| watch.look(ms(*now), Seen::HeldBytes(held(*now))));
        (at, watch.released_bytes)
    }

    #[test]
    fn a_guest_that_gives_nothing_has_settled_after_one_quiet_time() {
        assert_eq!(settles_at(10_000, |_| 300 * MIB), (Some(2_500), 0));
    }

    #[test]
    fn each_round_that_is_worth_it_is_waited_for() {
        // Rounds at 1.9, 3.9 and 5.9 s release 100, 20 and 2 MiB.
        let held = |now: u64| match now {
            0..1_900 => 300 * MIB,
            1_900..3_900 => 200 * MIB,
            3_900..5_900 => 180 * MIB,
            _ => 178 * MIB,
        };
        assert_eq!(settles_at(20_000, held), (Some(5_900 + 2_500), 122 * MIB));
    }

    #[test]
    fn discards_count_where_no_block_falls() {
        let mut watch = SettleWatch::default();
        // 40 MiB that were never brought in are given back at 2 s.
        let discarded = |now: u64| if now < 2_000 { 0 } else { 40 * MIB };
        let at = (0..20_000)
            .step_by(50)
            .find(|now| watch.look(ms(*now), Seen::DiscardedBytes(discarded(*now))));
        assert_eq!((at, watch.released_bytes), (Some(4_500), 40 * MIB));
    }

    #[test]
    fn crumbs_are_not_waited_for() {
        // 64 KiB a second, for ever.
        let held = |now: u64| 300 * MIB - now / 1_000 * (64 << 10);
        assert_eq!(settles_at(60_000, held).0, Some(2_500));
    }

    #[test]
    fn crumbs_that_add_up_to_a_round_are() {
        // 64 KiB every 100 ms is more than 1 MiB in each quiet time.
        let held = |now: u64| 300 * MIB - (now / 100) * (64 << 10);
        assert_eq!(settles_at(20_000, held).0, None);
    }

    #[test]
    fn a_guest_that_takes_memory_does_not_hide_what_it_gave() {
        // 10 MiB fall at 1 s, and 30 MiB are taken at 1.5 s.
        let held = |now: u64| match now {
            0..1_000 => 100 * MIB,
            1_000..1_500 => 90 * MIB,
            _ => 120 * MIB,
        };
        assert_eq!(settles_at(20_000, held), (Some(3_500), 10 * MIB));
    }
}
