//! A fragmented guest: small files in memory, every other one deleted. The free memory lies in pieces
//! of 64 KiB then, which is what a guest that has lived for a while looks like.
//!
//! The scan has its answer at once. Page reporting works in rounds of 2 s, each of which reports a
//! part of a long free list; what it leaves after [`REPORTING_WAIT`] is what the host still holds.
//! Both guests are booted, not resumed: all that the host holds is in their memory file.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use torpor_guest::Envd;
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;

use super::stopped::MemoryFile;
use crate::templates::{Kind, boot_guest};
use crate::watch::Watch;
use crate::{GUEST_MEMORY_BYTES, elapsed_ms, guest_work, ratio};

/// How many files.
pub const FILES: u64 = 3000;
/// Bytes of each.
pub const FILE_BYTES: u64 = 64 << 10;
/// How long reporting is given.
pub const REPORTING_WAIT: Duration = Duration::from_secs(8);
/// Longest wait for the files: a thousand a second, emulated, on an idle machine.
const FILES_MAX: Duration = Duration::from_secs(240);
/// Longest wait for the pager, which these guests do not have.
pub(super) const SETTLE_MAX: Duration = Duration::from_secs(10);

/// What the host holds of a guest at a moment, beside what the guest needs.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Held {
    /// Since the files were deleted.
    pub after_ms: f64,
    /// RAM − MemFree.
    pub nonfree_bytes: u64,
    /// Memory that would have to be stored; for reporting, what the host holds.
    pub left_bytes: u64,
    /// That to `nonfree_bytes`.
    pub ratio: f64,
}

impl Held {
    fn new(since: Instant, nonfree_bytes: u64, left_bytes: u64) -> Result<Self> {
        Ok(Self {
            after_ms: elapsed_ms(since),
            nonfree_bytes,
            left_bytes,
            ratio: ratio(left_bytes, nonfree_bytes).context("the guest has no memory in use")?,
        })
    }
}

/// Both guests.
#[derive(Debug, Clone, Serialize)]
pub struct Fragmented {
    /// Files written; every other one was deleted.
    pub files: u64,
    /// Bytes of each.
    pub file_bytes: u64,
    /// Not zero in the scanned guest, free or not.
    pub nonzero_bytes: u64,
    /// Neither free, zero nor removed, at once.
    pub scan: Held,
    /// What the host holds of the guest that reports its free pages: at once, and later.
    pub reporting: Vec<Held>,
}

/// Measures both.
///
/// # Errors
/// A guest does not boot, or cannot be scanned.
pub async fn run(host: &Host, watch: &Watch) -> Result<Fragmented> {
    let (scan, nonzero_bytes) = scanned(host, watch).await?;
    let _stage = watch.stage("fragmented guest: page reporting");
    let sandbox = boot_guest(host, Kind::Reporting, GUEST_MEMORY_BYTES, watch).await?;
    let memory = MemoryFile::of(sandbox.vmm())?;
    fragment(sandbox.envd(), FILES).await?;
    let since = Instant::now();
    let mut reporting = Vec::new();
    for wait in [Duration::ZERO, REPORTING_WAIT] {
        tokio::time::sleep(wait.saturating_sub(since.elapsed())).await;
        let nonfree = nonfree_bytes(&sandbox).await?;
        reporting.push(Held::new(since, nonfree, memory.held_bytes()?)?);
    }
    sandbox.end().await;
    Ok(Fragmented {
        files: FILES,
        file_bytes: FILE_BYTES,
        nonzero_bytes,
        scan,
        reporting,
    })
}

async fn scanned(host: &Host, watch: &Watch) -> Result<(Held, u64)> {
    let _stage = watch.stage("fragmented guest: scan");
    let sandbox = boot_guest(host, Kind::Silent, GUEST_MEMORY_BYTES, watch).await?;
    fragment(sandbox.envd(), FILES).await?;
    let since = Instant::now();
    let nonfree = nonfree_bytes(&sandbox).await?;
    sandbox.vmm().stop_vcpus().await?;
    let (report, free) = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await?;
    if let Some(why) = report.why_not() {
        bail!("the fragmented guest is not scanned: {why}");
    }
    let (left, nonzero) = MemoryFile::of(sandbox.vmm())?.left_pages(&free)?;
    let page = torpor_build::PAGE_SIZE as u64;
    let held = Held::new(since, nonfree, left * page)?;
    sandbox.end().await;
    Ok((held, nonzero * page))
}

/// Writes so many files into memory and deletes every other one.
///
/// # Errors
/// The guest has no room for them.
pub(super) async fn fragment(envd: &Envd, files: u64) -> Result<()> {
    let program = format!(
        "import os\n\
         block = os.urandom({FILE_BYTES} - 8)\n\
         os.makedirs('/dev/shm/files', exist_ok=True)\n\
         for i in range({files}):\n    \
             with open(f'/dev/shm/files/{{i}}', 'wb') as file:\n        \
                 file.write(i.to_bytes(8, 'little') + block)\n\
         for i in range(0, {files}, 2):\n    \
             os.unlink(f'/dev/shm/files/{{i}}')\n"
    );
    let line = format!("python3 - <<'END'\n{program}END\n");
    let done = guest_work::shell_within(envd, &line, FILES_MAX).await;
    done.map(drop).context("the guest cannot be fragmented")
}

/// RAM − MemFree, by the guest itself.
pub(super) async fn nonfree_bytes(sandbox: &Sandbox) -> Result<u64> {
    let free = sandbox.envd().metrics().await?.mem_free;
    Ok(sandbox.spec().memory_bytes.saturating_sub(free))
}
