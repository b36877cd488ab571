//! What `torpor-demo`, `torpor-bench` and `torpor-bench-capture` share: programs that show torpor at work on a real
//! Linux guest, one to look at, two to measure.
//!
//! And what `torpor-bench-capture` has for itself, in [`capture`].
//!
//! ```text
//! bench_space  a storage of their own, emptied at each start
//! templates    boot, bring the workload in, snapshot: once with page reporting, once without
//! guest_work   the driver of `torpor-workload` in the guest: start it, ask it to check itself
//! arms         the four kinds of pause, each on the same workload, each resumed and verified
//! clones       one build resumed twice: both must be whole, and go different ways
//! report       the figures, as JSON and as a table;  picture: the bar chart
//! baseline     (bench) the same guest through QEMU's own `migrate`, restored eagerly
//! series       (bench) many resumes: warm, cold, eager, without prefetch
//! crowd        (bench) many clones of one guest alive at once: the memory that they take
//! limits       (bench) what the machine itself can do: copying memory, writing a file
//! program      how the programs begin and end
//! watch        progress for a person, with and without a terminal
//! ```
//!
//! Everything is measured on what the library crates report, and everything that is called verified
//! was asked of the guest after its resume. Nothing here is part of the library: errors are
//! `anyhow`'s, as in any program's main file.

pub mod arms;
pub mod baseline;
pub mod bench_space;
pub mod capture;
pub mod clones;
pub mod crowd;
pub mod guest_work;
pub mod limits;
pub mod picture;
pub mod program;
pub mod report;
pub mod series;
pub mod targets;
pub mod templates;
pub mod watch;

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Memory of the demo's guest.
pub const GUEST_MEMORY_BYTES: u64 = 512 * MIB;
/// Size of its writable disk. The file is sparse, and so is what a build stores of it.
pub const GUEST_DISK_BYTES: u64 = 1024 * MIB;

/// MiB, for a person.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A ratio of two sizes; none to nothing.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
pub fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Milliseconds since `since`, to the microsecond.
#[must_use]
pub fn elapsed_ms(since: std::time::Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
