//! The scan alone: how long it takes for guests of several sizes, freshly booted and fragmented, and
//! for a lazily resumed one that has touched little; and whether what it finds is what the guest
//! itself counts.
//!
//! A booted guest is scanned many times while it stands still, on one thread, by the library's own
//! code over its memory file; beside it, the same reads without any thought. (The first scan of a
//! guest finds its page array in no cache: reported by itself.) A lazily resumed guest's page array
//! is in its parent build as far as it was not touched: there it is the first scan that counts, so
//! the figure is the pause's own step, of one resume each. The same guest once more, its page array
//! spread over as many layers as it likes, shows what a hostile one costs.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use torpor_anatomy::{GuestKernel, NoteLocation};
use torpor_build::{BuildId, PAGE_SIZE, PageRun};
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::report::PauseStep;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::run_times::RunTimes;

use super::fragmented::{FILE_BYTES, SETTLE_MAX, fragment, nonfree_bytes};
use super::pauses::{delete, pause_as};
use super::scattered::scatter;
use super::stopped::MemoryFile;
use super::zoneinfo::PerCpuLists;
use crate::arms::SCAN_REFS;
use crate::templates::{Kind, boot_guest};
use crate::watch::Watch;
use crate::{MIB, elapsed_ms, guest_work, ratio};

/// Sizes of the guests.
pub const SIZES: [u64; 4] = [256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB];
/// The size that the target names, which is also lazily resumed.
pub const TARGET_SIZE: u64 = 1024 * MIB;
/// How much of its memory a lazily resumed guest is to have touched (percent).
const TOUCHED_PERCENT: u64 = 5;
/// Scans of a stopped guest: a few milliseconds each.
const SCANS: usize = 101;
/// Size of an entry of the page array, for what reading all of it would take (bytes): x86-64's
/// `struct page` in any usual kernel.
const ENTRY_BYTES: u64 = 64;
/// The whole array is read in pieces of this size, as the scan reads it.
const PIECE_BYTES: usize = 128 << 10;
/// Between the last look into the guest and its stop: its shell has gone by then.
const QUIET: Duration = Duration::from_millis(300);

/// One guest in one state.
#[derive(Debug, Clone, Serialize)]
pub struct ScanRow {
    /// Its memory.
    pub memory_bytes: u64,
    /// What was done with it.
    pub state: &'static str,
    /// The first scan.
    pub first_ms: f64,
    /// All scans.
    pub scan: RunTimes,
    /// Their median for a GiB.
    pub ms_per_gib: f64,
    /// The median of the thread's processor time: what a scan costs whoever else uses the machine.
    pub cpu_ms: f64,
    /// That for a GiB.
    pub cpu_ms_per_gib: f64,
    /// Bytes that a scan reads, and in how many reads.
    pub bytes_read: u64,
    /// See there.
    pub reads: usize,
    /// The same reads, nothing else: median.
    pub same_reads_ms: f64,
    /// As many bytes as the whole page array has, one after the other: median.
    pub whole_array_ms: f64,
    /// What was found.
    pub found: Found,
}

/// Free memory as the scan finds it and as the guest counts it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Found {
    /// By the guest's MemFree, right before the stop.
    pub mem_free_pages: u64,
    /// On the free lists, by the scan.
    pub free_pages: u64,
    /// The guest's per-CPU lists, a moment before.
    pub per_cpu: PerCpuLists,
    /// The difference is within what the per-CPU lists can hold.
    pub within: bool,
}

impl Found {
    /// Compares.
    #[must_use]
    pub fn new(mem_free_pages: u64, free_pages: u64, per_cpu: PerCpuLists) -> Self {
        Self {
            mem_free_pages,
            free_pages,
            per_cpu,
            within: mem_free_pages.abs_diff(free_pages) <= per_cpu.bound_pages(),
        }
    }
}

/// A lazily resumed guest.
#[derive(Debug, Clone, Serialize)]
pub struct LazyRow {
    /// Its memory.
    pub memory_bytes: u64,
    /// How much of it was present right before the pause, of each resume (a share).
    pub present: Vec<f64>,
    /// The scan of each first pause: nothing of the page array in any cache of ours.
    pub scan: RunTimes,
    /// Waiting for the pager and asking the kernel what was written, before it.
    pub settle: RunTimes,
    /// The same guest stopped and asked again and again, settle and permission included.
    pub again: RunTimes,
    /// The scan of the same guest with its page array scattered over many layers.
    pub scattered: RunTimes,
    /// Why no page of that one is taken as free.
    pub scattered_why_not: Option<String>,
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub struct ScanTimes {
    /// By size, booted and then fragmented.
    pub booted: Vec<ScanRow>,
    /// The lazily resumed guest.
    pub lazy: LazyRow,
}

/// Measures everything.
///
/// # Errors
/// A guest does not boot, or cannot be scanned.
pub async fn run(host: &Host, iterations: u32, watch: &Watch) -> Result<ScanTimes> {
    let mut booted = Vec::new();
    let mut resumable = None;
    let mut array = None;
    for memory_bytes in SIZES {
        let _stage = watch.stage(format!("scan a guest of {} MiB", memory_bytes / MIB));
        let sandbox = boot_guest(host, Kind::Silent, memory_bytes, watch).await?;
        let (row, _) = scan_guest(&sandbox, host, "booted").await?;
        booted.push(row);
        sandbox.vmm().resume_vcpus().await?;
        // tmpfs takes half of the memory at most.
        let files = memory_bytes * 2 / 5 / FILE_BYTES;
        fragment(sandbox.envd(), files).await?;
        let (row, found) = scan_guest(&sandbox, host, "fragmented").await?;
        booted.push(row);
        sandbox.vmm().resume_vcpus().await?;
        if memory_bytes == TARGET_SIZE {
            guest_work::shell(sandbox.envd(), "rm -r /dev/shm/files").await?;
            let (paused, _) = pause_as(sandbox, host, SCAN_REFS, watch).await?;
            (resumable, array) = (Some(paused.build.id()), Some(found));
        } else {
            sandbox.end().await;
        }
    }
    let (build, array) = resumable
        .zip(array)
        .context("no guest of the target's size")?;
    let lazy = scan_lazy(host, &build, array, iterations, watch).await?;
    Ok(ScanTimes { booted, lazy })
}

/// Scans a running guest, which stands still afterwards. Also says where its page array is, as far as
/// it was read.
async fn scan_guest(
    sandbox: &Sandbox,
    host: &Host,
    state: &'static str,
) -> Result<(ScanRow, PageRun)> {
    let envd = sandbox.envd();
    let note = guest_work::shell(envd, "cat /sys/kernel/vmcoreinfo").await?;
    let note: NoteLocation = note.parse()?;
    let zoneinfo = guest_work::shell(envd, "cat /proc/zoneinfo").await?;
    tokio::time::sleep(QUIET).await;
    let memory_bytes = sandbox.spec().memory_bytes;
    let nonfree = nonfree_bytes(sandbox).await?;
    sandbox.vmm().stop_vcpus().await?;

    let memory = MemoryFile::of(sandbox.vmm())?;
    let (times, free_pages) = tokio::task::block_in_place(|| time_scans(&memory, note))?;
    // The same as a pause would find: otherwise something else was measured.
    let (report, _) = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await?;
    if let Some(why) = report.why_not() {
        bail!("the guest is not scanned: {why}");
    }
    ensure!(
        report.free_pages == free_pages,
        "a pause would find {} free pages, and the bench finds {free_pages}",
        report.free_pages
    );
    let page = PAGE_SIZE as u64;
    let mem_free_pages = (memory_bytes - nonfree) / page;
    let scan = RunTimes::of(&times.scans_ms).context("no scans")?;
    let row = ScanRow {
        memory_bytes,
        state,
        first_ms: times.first_ms,
        scan,
        ms_per_gib: per_gib(scan.median_ms, memory_bytes),
        cpu_ms: times.cpu_ms,
        cpu_ms_per_gib: per_gib(times.cpu_ms, memory_bytes),
        bytes_read: times.bytes_read,
        reads: times.reads,
        same_reads_ms: times.same_reads_ms,
        whole_array_ms: times.whole_array_ms,
        found: Found::new(mem_free_pages, free_pages, PerCpuLists::parse(&zoneinfo)),
    };
    Ok((row, times.array))
}

struct Times {
    first_ms: f64,
    scans_ms: Vec<f64>,
    cpu_ms: f64,
    bytes_read: u64,
    reads: usize,
    same_reads_ms: f64,
    whole_array_ms: f64,
    array: PageRun,
}

fn time_scans(memory: &MemoryFile, note: NoteLocation) -> Result<(Times, u64)> {
    let mut free_pages = 0;
    let mut scan = || -> Result<(f64, f64)> {
        let (since, cpu_before_ms) = (Instant::now(), thread_cpu_ms());
        let kernel = GuestKernel::find(memory, note)?;
        let free = kernel.free_pages(memory)?;
        let ms = elapsed_ms(since);
        free_pages = black_box(&free).buddy_pages;
        Ok((ms, thread_cpu_ms() - cpu_before_ms))
    };
    let (first_ms, _) = scan()?;
    let reads = memory.recorded();
    let (mut scans_ms, mut cpu_ms) = (Vec::with_capacity(SCANS), Vec::with_capacity(SCANS));
    for _ in 0..SCANS {
        let (ms, of_cpu_ms) = scan()?;
        scans_ms.push(ms);
        cpu_ms.push(of_cpu_ms);
        memory.recorded();
    }
    let array = whole_array(memory, &reads)?;
    let array_bytes: u64 = array.iter().map(|(_, len)| *len as u64).sum();
    let times = Times {
        first_ms,
        scans_ms,
        cpu_ms: RunTimes::of(&cpu_ms).context("no scans")?.median_ms,
        bytes_read: reads.iter().map(|(_, len)| *len as u64).sum(),
        reads: reads.len(),
        same_reads_ms: time_reads(memory, &reads)?,
        whole_array_ms: time_reads(memory, &array)?,
        array: PageRun {
            first_page: array
                .first()
                .map_or(0, |(start, _)| start / PAGE_SIZE as u64),
            pages: array_bytes / PAGE_SIZE as u64,
        },
    };
    Ok((times, free_pages))
}

/// Processor time that this thread has had.
#[expect(
    clippy::cast_precision_loss,
    reason = "a thread runs for less than 2^52 ns"
)]
fn thread_cpu_ms() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// As many bytes as the page array has, from its lowest place on.
fn whole_array(memory: &MemoryFile, reads: &[(u64, usize)]) -> Result<Vec<(u64, usize)>> {
    let array_bytes = memory.len_bytes() / PAGE_SIZE as u64 * ENTRY_BYTES;
    let longest = reads.iter().map(|(_, len)| *len).max().unwrap_or(0);
    // The array is what is read in the largest pieces; the note and the tables are a few pages.
    let first = reads.iter().filter(|(_, len)| *len == longest);
    let first = first.map(|(offset, _)| *offset).min().unwrap_or(0);
    let last = memory.len_bytes().saturating_sub(array_bytes);
    let start = first.min(last);
    (0..array_bytes.div_ceil(PIECE_BYTES as u64))
        .map(|piece| {
            let at = piece * PIECE_BYTES as u64;
            let len = usize::try_from(array_bytes - at)?.min(PIECE_BYTES);
            Ok((start + at, len))
        })
        .collect()
}

/// The median time of these reads, one after the other.
fn time_reads(memory: &MemoryFile, reads: &[(u64, usize)]) -> Result<f64> {
    let longest = reads.iter().map(|(_, len)| *len).max().unwrap_or(0);
    let mut buffer = vec![0; longest];
    let mut times_ms = Vec::with_capacity(SCANS);
    for _ in 0..SCANS {
        let since = Instant::now();
        for (offset, len) in reads {
            memory.read_at(*offset, &mut buffer[..*len])?;
        }
        black_box(&buffer);
        times_ms.push(elapsed_ms(since));
    }
    Ok(RunTimes::of(&times_ms).context("no reads")?.median_ms)
}

async fn scan_lazy(
    host: &Host,
    build: &BuildId,
    array: PageRun,
    iterations: u32,
    watch: &Watch,
) -> Result<LazyRow> {
    let _stage = watch.stage("scan a lazily resumed guest");
    let mut present = Vec::new();
    let (mut scans_ms, mut settles_ms) = (Vec::new(), Vec::new());
    for _ in 0..iterations {
        let scan = scan_once(host, build, &mut present, watch).await?;
        let why_not = &scan.why_not;
        ensure!(why_not.is_none(), "the guest is not scanned: {why_not:?}");
        scans_ms.push(scan.scan_ms);
        settles_ms.push(scan.settle_ms);
    }
    let original = host.storage().open_build(build)?;
    let scattered = tokio::task::block_in_place(|| scatter(&original, array))?.id();
    let (mut scattered_ms, mut scattered_why_not) = (Vec::new(), None);
    for _ in 0..iterations {
        let scan = scan_once(host, &scattered, &mut present, watch).await?;
        scattered_ms.push(scan.scan_ms);
        scattered_why_not = scan.why_not;
    }
    let sandbox = resumed_a_little(host, build, &mut present).await?;
    sandbox.vmm().stop_vcpus().await?;
    let mut again_ms = Vec::new();
    for _ in 0..SCANS {
        let since = Instant::now();
        black_box(sandbox.find_free_pages(host.storage(), SETTLE_MAX).await?);
        again_ms.push(elapsed_ms(since));
    }
    let memory_bytes = sandbox.spec().memory_bytes;
    sandbox.end().await;
    Ok(LazyRow {
        memory_bytes,
        present,
        scan: RunTimes::of(&scans_ms).context("no iterations")?,
        settle: RunTimes::of(&settles_ms).context("no iterations")?,
        again: RunTimes::of(&again_ms).context("no scans")?,
        scattered: RunTimes::of(&scattered_ms).context("no iterations")?,
        scattered_why_not,
    })
}

struct LazyScan {
    scan_ms: f64,
    settle_ms: f64,
    why_not: Option<String>,
}

/// Resumes, touches a little, and pauses.
async fn scan_once(
    host: &Host,
    build: &BuildId,
    present: &mut Vec<f64>,
    watch: &Watch,
) -> Result<LazyScan> {
    let sandbox = resumed_a_little(host, build, present).await?;
    let (paused, _) = pause_as(sandbox, host, SCAN_REFS, watch).await?;
    let step = |step| paused.report.step_ms(step).context("a step is missing");
    let scan = LazyScan {
        scan_ms: step(PauseStep::Scan)?,
        settle_ms: step(PauseStep::Settle)?,
        why_not: (paused.report.scan.as_ref())
            .and_then(|scan| scan.why_not())
            .map(str::to_owned),
    };
    delete(host, paused)?;
    Ok(scan)
}

/// Resumes, and lets the guest touch memory until it has about its share.
async fn resumed_a_little(host: &Host, build: &BuildId, present: &mut Vec<f64>) -> Result<Sandbox> {
    let (sandbox, _) = Box::pin(resume(host, build, &ResumeOptions::default())).await?;
    let memory = MemoryFile::of(sandbox.vmm())?;
    let wanted = memory.len_bytes() * TOUCHED_PERCENT / 100;
    let more = wanted.saturating_sub(memory.held_bytes()?);
    if more > 0 {
        // Random bytes: zeros need no page of the host's until they are written.
        let line = format!("head -c {more} /dev/urandom > /dev/shm/touched");
        guest_work::shell(sandbox.envd(), &line).await?;
    }
    let share = ratio(memory.held_bytes()?, memory.len_bytes());
    present.push(share.context("a guest without memory")?);
    Ok(sandbox)
}

/// A time for this much memory, for a GiB.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52")]
pub fn per_gib(ms: f64, memory_bytes: u64) -> f64 {
    ms * (1 << 30) as f64 / memory_bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_scaled_to_a_gib() {
        assert!((per_gib(2.0, 256 * MIB) - 8.0).abs() < 1e-9);
        assert!((per_gib(8.0, 2048 * MIB) - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_difference_beyond_the_per_cpu_lists_is_not_within() {
        let lists = PerCpuLists {
            count: 10,
            high: 60,
            counter_slack: 4,
        };
        assert!(Found::new(1000, 1064, lists).within);
        assert!(Found::new(1064, 1000, lists).within);
        assert!(!Found::new(1000, 1065, lists).within);
    }
}
