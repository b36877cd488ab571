//! The same stopped guest as others store it: bytes, and seconds until they are on the disk.
//!
//! One booted guest does the demo's workload and is stopped. While it stands still, each peer stores
//! its memory; then it goes on, and is stopped for good by a pause with scan and references. What
//! cannot be done to a guest that stands still is *reclaim and drain*: that is a second guest, booted
//! with page reporting, after the same workload.
//!
//! The peers have it easier than we: no disk, no device state, no index that can be verified, no hash,
//! one file. Ours is everything that a resume needs.

use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use torpor_build::PAGE_SIZE;
use torpor_sandbox::Sandbox;
use torpor_sandbox::host::Host;

use super::fragmented::nonfree_bytes;
use super::pauses::pause_as;
use super::stopped::MemoryFile;
use super::zoneinfo::PerCpuLists;
use crate::arms::{Arm, RECLAIM_DRAIN, SCAN_REFS};
use crate::limits::{self, Limit};
use crate::templates::{Kind, boot_guest};
use crate::watch::Watch;
use crate::{GUEST_MEMORY_BYTES, elapsed_ms, guest_work};

/// Written at once.
const WRITE_BYTES: usize = 1 << 20;
/// The peer's level: the fastest that is not a trade of ratio for speed (negative levels are).
const ZSTD_LEVEL: i32 = 1;
/// `st_blocks` counts in these (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// One way to store a guest's memory.
#[derive(Debug, Clone, Serialize)]
pub struct Stored {
    /// Its name.
    pub name: &'static str,
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Time before the guest was stopped: reclaim and drain.
    pub before_stop_ms: f64,
    /// From the stop until all was synced.
    pub stop_to_durable_ms: f64,
}

impl Stored {
    /// From the request until all was synced.
    #[must_use]
    pub fn total_ms(&self) -> f64 {
        self.before_stop_ms + self.stop_to_durable_ms
    }
}

/// All ways.
#[derive(Debug, Clone, Serialize)]
pub struct Peers {
    /// The guest's own count of what is not free, before the stop.
    pub nonfree_bytes: u64,
    /// The guest's per-CPU lists then: pages that nobody owns and that are on no free list.
    pub per_cpu: PerCpuLists,
    /// Ours first.
    pub ways: Vec<Stored>,
    /// What the machine can do with as many bytes as ours.
    pub limit: Limit,
    /// And with the whole memory.
    pub limit_full: Limit,
}

/// Measures all.
///
/// # Errors
/// A guest does not boot or does not pause, or the disk is full.
pub async fn run(host: &Host, dir: &Path, watch: &Watch) -> Result<Peers> {
    let (nonfree_bytes, per_cpu, mut ways) = {
        let _stage = watch.stage("one stopped guest, stored in several ways");
        let sandbox = worked(host, Kind::Silent, watch).await?;
        let zoneinfo = guest_work::shell(sandbox.envd(), "cat /proc/zoneinfo").await?;
        let nonfree = nonfree_bytes(&sandbox).await?;
        sandbox.vmm().stop_vcpus().await?;
        let memory = MemoryFile::of(sandbox.vmm())?;
        let mut ways = tokio::task::block_in_place(|| peers(&memory, dir))?;
        sandbox.vmm().resume_vcpus().await?;
        ways.insert(0, paused(sandbox, host, SCAN_REFS, watch).await?);
        (nonfree, PerCpuLists::parse(&zoneinfo), ways)
    };
    {
        let _stage = watch.stage("the same with reclaim and drain");
        let sandbox = worked(host, Kind::Reporting, watch).await?;
        ways.push(paused(sandbox, host, RECLAIM_DRAIN, watch).await?);
    }
    let ours = ways.first().context("no way to store a guest")?.bytes;
    Ok(Peers {
        nonfree_bytes,
        per_cpu,
        ways,
        limit: limits::measure(ours, dir)?,
        limit_full: limits::measure(GUEST_MEMORY_BYTES, dir)?,
    })
}

async fn worked(host: &Host, kind: Kind, watch: &Watch) -> Result<Sandbox> {
    let sandbox = boot_guest(host, kind, GUEST_MEMORY_BYTES, watch).await?;
    guest_work::install(sandbox.envd()).await?;
    guest_work::work(sandbox.envd()).await?;
    Ok(sandbox)
}

/// A real pause: memory, disk, device state.
async fn paused(sandbox: Sandbox, host: &Host, arm: Arm, watch: &Watch) -> Result<Stored> {
    let (paused, _) = pause_as(sandbox, host, arm, watch).await?;
    let report = &paused.report;
    Ok(Stored {
        name: arm.name,
        bytes: paused.build.stats()?.files_bytes,
        before_stop_ms: report.total_ms - report.durable_ms,
        stop_to_durable_ms: report.durable_ms,
    })
}

fn peers(memory: &MemoryFile, dir: &Path) -> Result<Vec<Stored>> {
    Ok(vec![
        store("full image", dir, |file| full(memory, file))?,
        store("sparse, not zero", dir, |file| sparse(memory, file))?,
        store("zstd -1, not zero", dir, |file| zstd_nonzero(memory, file))?,
    ])
}

/// Writes a file and syncs it. It is removed.
fn store(
    name: &'static str,
    dir: &Path,
    write: impl FnOnce(&mut File) -> Result<()>,
) -> Result<Stored> {
    let mut file = tempfile::tempfile_in(dir)?;
    let since = Instant::now();
    write(&mut file).with_context(|| format!("store the guest as {name}"))?;
    file.sync_all()?;
    let stop_to_durable_ms = elapsed_ms(since);
    Ok(Stored {
        name,
        bytes: file.metadata()?.blocks() * STAT_BLOCK_BYTES,
        before_stop_ms: 0.0,
        stop_to_durable_ms,
    })
}

/// As Firecracker's full snapshot: all RAM, zeros as well.
fn full(memory: &MemoryFile, file: &mut File) -> Result<()> {
    let mut buffer = vec![0; WRITE_BYTES];
    let mut at = 0;
    while at < memory.len_bytes() {
        let len = usize::try_from(memory.len_bytes() - at)?.min(WRITE_BYTES);
        memory.read_at(at, &mut buffer[..len])?;
        file.write_all(&buffer[..len])?;
        at += len as u64;
    }
    Ok(())
}

/// Every page that is not zero, at its place, holes between.
fn sparse(memory: &MemoryFile, file: &mut File) -> Result<()> {
    file.set_len(memory.len_bytes())?;
    let mut run = Pending::default();
    memory.for_each_nonzero(|page, bytes| {
        if !run.takes(page) {
            run.write_to(file)?;
        }
        run.push(page, bytes);
        Ok(())
    })?;
    run.write_to(file)
}

/// Neighbouring pages that are written together.
#[derive(Debug, Default)]
struct Pending {
    first_page: u64,
    bytes: Vec<u8>,
}

impl Pending {
    fn takes(&self, page: u64) -> bool {
        let pages = (self.bytes.len() / PAGE_SIZE) as u64;
        self.bytes.len() < WRITE_BYTES && page == self.first_page + pages
    }

    fn push(&mut self, page: u64, bytes: &[u8]) {
        if self.bytes.is_empty() {
            self.first_page = page;
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn write_to(&mut self, file: &File) -> Result<()> {
        file.write_all_at(&self.bytes, self.first_page * PAGE_SIZE as u64)?;
        self.bytes.clear();
        Ok(())
    }
}

/// Every page that is not zero, one after the other in one stream, and their numbers behind it.
fn zstd_nonzero(memory: &MemoryFile, file: &mut File) -> Result<()> {
    let mut numbers = Vec::new();
    let mut stream = zstd::Encoder::new(
        BufWriter::with_capacity(WRITE_BYTES, &mut *file),
        ZSTD_LEVEL,
    )?;
    memory.for_each_nonzero(|page, bytes| {
        numbers.extend_from_slice(&page.to_le_bytes());
        stream.write_all(bytes)?;
        Ok(())
    })?;
    stream.write_all(&numbers)?;
    stream.finish()?.flush()?;
    file.seek(SeekFrom::End(0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_pages_are_written_together_and_at_their_place() {
        let file = tempfile::tempfile().unwrap();
        let mut run = Pending::default();
        for page in [3, 4, 9] {
            if !run.takes(page) {
                run.write_to(&file).unwrap();
            }
            run.push(page, &[u8::try_from(page).unwrap(); PAGE_SIZE]);
        }
        assert_eq!((run.first_page, run.bytes.len()), (9, PAGE_SIZE));
        run.write_to(&file).unwrap();
        let mut pages = vec![1; 10 * PAGE_SIZE];
        file.read_exact_at(&mut pages, 0).unwrap();
        for (page, bytes) in pages.chunks_exact(PAGE_SIZE).enumerate() {
            let expected = if [3, 4, 9].contains(&page) { page } else { 0 };
            assert!(
                bytes.iter().all(|byte| usize::from(*byte) == expected),
                "{page}"
            );
        }
    }
}
