//! What a VMM's private guest memory has become since it was looked at last: for a checkpoint after
//! which the same VMM goes on, so that the next one takes only what changed since.
//!
//! ```text
//! stop ─▶ save_state ─▶ changes ─▶ read them ─▶ mark ─▶ resume … stop ─▶ save_state ─▶ changes …
//! ```
//!
//! The kernel keeps a bit for each page that says whether it was written since all of a process's bits
//! were cleared (Documentation/admin-guide/mm/soft-dirty.rst). The guest's own writes set it, too:
//! clearing takes the pages from KVM, which must ask the host's page table for them again before the
//! guest can write. So do KVM's writes and the VMM's: all go through that table.
//!
//! What the bits do not say:
//! * A page that was given back and read since is the kernel's zero page, and nobody wrote it. It is
//!   told by not being the process's own (bit 56 of its entry), and counted as touched.
//! * A page that was given back and left alone is absent: so what was there is remembered.
//! * Where the host backs memory by huge pages, one write marks all 512 of them.
//!
//! Named pages are a superset of what changed, never less: content must be compared where that
//! matters. In a guest whose page faults are served, a page that was brought in looks touched, and a
//! page that was given back may look like one that was never brought in. Whoever serves them knows
//! better: touched pages count there only if he saw them written, and given-back ones are his to name.
//!
//! Clearing covers the whole process: only one of these may exist for a VMM.

use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::error::{Result, VmmError};
use crate::memory::{GuestMemory, MemoryMapping};
use crate::reader::{ENTRY_BYTES, ENTRY_PRESENT, ENTRY_THERE, PAGE_BYTES, Runs, pages_where};

/// Bit 55 of a pagemap entry: written since the bits were cleared.
const ENTRY_SOFT_DIRTY: u64 = 1 << 55;
/// Bit 56: mapped by this process alone. The zero page is not.
const ENTRY_EXCLUSIVE: u64 = 1 << 56;
/// What to write to /proc/PID/clear_refs (proc_pid_clear_refs(5)).
const CLEAR_SOFT_DIRTY: &str = "4";

/// Stretches of guest memory (bytes, whole pages, in order).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// There, and perhaps with other content than at the mark.
    pub touched: Vec<Range<u64>>,
    /// There at the mark, and not any more: zero, unless somebody serves this guest's page faults.
    pub gone: Vec<Range<u64>>,
}

/// Tells what changed since its mark.
#[derive(Debug)]
pub struct ChangeTracker {
    pid: u32,
    pagemap: File,
    mappings: Vec<MemoryMapping>,
    /// What was there at the mark.
    there: Vec<Range<u64>>,
}

impl ChangeTracker {
    /// Begins, with a mark at this moment: the vCPUs must stand still, and the memory must be captured
    /// as it is now. `None` where this host's kernel keeps no such bits, or the memory is a memfd.
    ///
    /// # Errors
    /// The VMM is gone, or may not be looked into.
    pub fn start(memory: &GuestMemory) -> Result<Option<Self>> {
        if memory.memfd.is_some() || !host_keeps_bits().map_err(failed)? {
            return Ok(None);
        }
        let mut tracker = Self {
            pid: memory.pid,
            pagemap: File::open(format!("/proc/{}/pagemap", memory.pid)).map_err(failed)?,
            mappings: memory.mappings.clone(),
            there: Vec::new(),
        };
        tracker.mark()?;
        Ok(Some(tracker))
    }

    /// What changed since the mark. The vCPUs must stand still, and the device state must be taken
    /// already, which writes to guest memory.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn changes(&self) -> Result<Changes> {
        let touched = self.pages(|entry| {
            let there = entry & ENTRY_THERE != 0;
            let not_its_own = entry & ENTRY_PRESENT != 0 && entry & ENTRY_EXCLUSIVE == 0;
            there && (entry & ENTRY_SOFT_DIRTY != 0 || not_its_own)
        })?;
        Ok(Changes {
            touched,
            gone: without(&self.there, &self.there_now()?),
        })
    }

    /// Counts from here on. The vCPUs must stand still since [`ChangeTracker::changes`]. If this
    /// fails, the next changes are at least those since the mark before.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn mark(&mut self) -> Result<()> {
        let there = self.there_now()?;
        let path = format!("/proc/{}/clear_refs", self.pid);
        fs::write(path, CLEAR_SOFT_DIRTY).map_err(failed)?;
        self.there = there;
        Ok(())
    }

    fn there_now(&self) -> Result<Vec<Range<u64>>> {
        self.pages(|entry| entry & ENTRY_THERE != 0)
    }

    fn pages(&self, wanted: impl Fn(u64) -> bool) -> Result<Vec<Range<u64>>> {
        let mut runs = Runs::default();
        for mapping in &self.mappings {
            pages_where(&self.pagemap, mapping, &wanted, &mut runs).map_err(failed)?;
        }
        Ok(runs.0)
    }
}

fn failed(source: io::Error) -> VmmError {
    VmmError::Host {
        what: "look for changes of the guest's memory",
        source,
    }
}

/// A kernel without these bits takes the request to clear them, and shows them as never set.
fn host_keeps_bits() -> io::Result<bool> {
    let just_written = black_box(vec![1_u8; usize::try_from(2 * PAGE_BYTES).unwrap_or(0)]);
    let first_whole_page = (just_written.as_ptr().addr() as u64).next_multiple_of(PAGE_BYTES);
    let mut entry = [0; 8];
    let pagemap = File::open("/proc/self/pagemap")?;
    pagemap.read_exact_at(&mut entry, first_whole_page / PAGE_BYTES * ENTRY_BYTES)?;
    Ok(u64::from_le_bytes(entry) & ENTRY_SOFT_DIRTY != 0)
}

/// What of sorted stretches lies outside of others.
fn without(all: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut others = others.iter().peekable();
    for run in all {
        let mut start = run.start;
        while start < run.end {
            while others.next_if(|other| other.end <= start).is_some() {}
            match others.peek() {
                Some(other) if other.start <= start => start = other.end,
                other => {
                    let end = other.map_or(run.end, |other| other.start.min(run.end));
                    left.push(start..end);
                    start = end;
                }
            }
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_what_was_there_and_is_not() {
        let all = [0..10, 20..30, 40..50];
        assert_eq!(without(&all, &[]), all);
        let everything = 0..60;
        assert!(without(&all, &[everything]).is_empty());
        let others = [2..4, 8..22, 25..26, 30..40, 49..60];
        assert_eq!(without(&all, &others), [0..2, 4..8, 22..25, 26..30, 40..49]);
    }

    #[test]
    fn a_host_without_the_bits_says_so_and_one_with_them_shows_each_write() {
        let mut map = memmap2::MmapOptions::new().len(8 << 12).map_anon().unwrap();
        map[..6 << 12].fill(1);
        let memory = GuestMemory {
            memfd: None,
            len_bytes: 8 << 12,
            pid: std::process::id(),
            mappings: vec![MemoryMapping {
                host_addr: map.as_ptr().addr() as u64,
                len_bytes: 8 << 12,
                guest_offset_bytes: 0,
            }],
        };
        let Some(mut tracker) = ChangeTracker::start(&memory).unwrap() else {
            assert!(!host_keeps_bits().unwrap());
            return;
        };
        assert_eq!(tracker.changes().unwrap(), Changes::default());
        map[1 << 12] = 2;
        map[7 << 12] = 2;
        let changes = tracker.changes().unwrap();
        for written in [1, 7] {
            let page = written << 12;
            assert!(changes.touched.iter().any(|run| run.contains(&page)));
        }
        tracker.mark().unwrap();
        assert_eq!(tracker.changes().unwrap(), Changes::default());
    }
}
