//! Reading a guest's memory from outside, whichever VMM has it.
//!
//! Two kinds: a memfd of ours, whose holes are absent pages, and memory that is private to the VMM,
//! read by /proc/PID/mem. In both, what is absent must not be read blindly: of a memfd it says
//! nothing but zero, and in private memory under userfaultfd a read fails (EIO on 6.12) or *waits for
//! the page*, by the host's kernel: for ever if it is the pager itself that reads. So [`GuestReader::present`] comes first.
//!
//! The vCPUs must stand still, and discards must have settled: presence is looked at, not locked.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};

use crate::error::{Result, VmmError};
use crate::memory::{GuestMemory, MemoryMapping, allocated_bytes};
use crate::page_cache::holds_all;

pub(crate) const PAGE_BYTES: u64 = 4096;
/// Bit 63 of a pagemap entry: present (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) const ENTRY_PRESENT: u64 = 1 << 63;
/// Present, or swapped out (bit 62).
pub(crate) const ENTRY_THERE: u64 = 3 << 62;
pub(crate) const ENTRY_BYTES: u64 = 8;
/// Entries that are read at once: 64 KiB of them speak of 32 MiB of memory.
const ENTRIES_PER_READ: u64 = 8192;
/// Entries that are read for one look at a place: those of a MiB, which is what is read at once.
const HELD_ENTRIES_PER_LOOK: usize = 256;

/// A guest's memory, open for reading by guest offset.
#[derive(Debug)]
pub enum GuestReader {
    /// A memfd.
    Memfd(File),
    /// Private memory of a process.
    Process {
        /// Its /proc/PID/mem.
        mem: File,
        /// Its /proc/PID/pagemap.
        pagemap: File,
        /// Where the guest's memory lies in it, by guest offset.
        mappings: Vec<MemoryMapping>,
    },
}

impl GuestMemory {
    /// Opens the memory for reading.
    ///
    /// # Errors
    /// The VMM is gone, or may not be looked into.
    pub fn reader(&self) -> Result<GuestReader> {
        let failed = |source| VmmError::Host {
            what: "open the guest's memory",
            source,
        };
        if let Some(memfd) = &self.memfd {
            return Ok(GuestReader::Memfd(
                memfd.try_clone().map_err(failed)?.into(),
            ));
        }
        GuestReader::of_process(self.pid, self.mappings.clone()).map_err(failed)
    }

    /// Host memory that the guest holds now, in bytes.
    ///
    /// # Errors
    /// As [`GuestMemory::reader`].
    pub fn held_bytes(&self) -> Result<u64> {
        let failed = |source| VmmError::Host {
            what: "look at the guest's memory",
            source,
        };
        if let Some(memfd) = &self.memfd {
            return allocated_bytes(memfd).map_err(failed);
        }
        let present = self.reader()?.present().map_err(failed)?;
        Ok(present.iter().map(|run| run.end - run.start).sum())
    }
}

impl GuestReader {
    /// Opens memory that is private to a process, at these places.
    ///
    /// # Errors
    /// The process is gone, or may not be looked into.
    pub(crate) fn of_process(pid: u32, mappings: Vec<MemoryMapping>) -> io::Result<Self> {
        let open = |name: &str| File::open(format!("/proc/{pid}/{name}"));
        Ok(Self::Process {
            mem: open("mem")?,
            pagemap: open("pagemap")?,
            mappings,
        })
    }

    /// The length of the memory in bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn len_bytes(&self) -> io::Result<u64> {
        match self {
            Self::Memfd(file) => Ok(file.metadata()?.len()),
            Self::Process { mappings, .. } => {
                Ok(mappings.iter().map(|mapping| mapping.len_bytes).sum())
            }
        }
    }

    /// Where the memory lies in its process, if it is private to one.
    #[must_use]
    pub fn private(&self) -> Option<&[MemoryMapping]> {
        match self {
            Self::Memfd(_) => None,
            Self::Process { mappings, .. } => Some(mappings),
        }
    }

    /// Whether what is absent may be read, and reads as zero (of a memfd), rather than waiting for
    /// whoever serves it.
    #[must_use]
    pub fn absent_reads_as_zero(&self) -> bool {
        matches!(self, Self::Memfd(_))
    }

    /// Whether the page at a guest offset is held, and the end (a page's, at most `end`) of those
    /// from there on of which the same is known.
    ///
    /// # Errors
    /// The place lies outside the guest's memory, or what the system says.
    pub fn held_from(&self, guest_offset: u64, end: u64) -> io::Result<(bool, u64)> {
        match self {
            Self::Memfd(file) => held_in_file(file, guest_offset, end),
            Self::Process {
                pagemap, mappings, ..
            } => held_in_process(pagemap, mappings, guest_offset, end),
        }
    }

    /// The stretches of guest memory (bytes, whole pages, in order) that the host holds.
    ///
    /// # Errors
    /// What the system says.
    pub fn present(&self) -> io::Result<Vec<Range<u64>>> {
        let mut runs = Runs::default();
        match self {
            Self::Memfd(file) => present_in_file(file, &mut runs)?,
            Self::Process {
                pagemap, mappings, ..
            } => {
                let there = |entry| entry & ENTRY_THERE != 0;
                for mapping in mappings {
                    pages_where(pagemap, mapping, &there, &mut runs)?;
                }
            }
        }
        Ok(runs.0)
    }

    /// Reads from this guest offset. In private memory every page must be present.
    ///
    /// # Errors
    /// The stretch lies outside the guest's memory, or what the system says.
    pub fn read_exact_at(&self, buf: &mut [u8], guest_offset: u64) -> io::Result<()> {
        match self {
            Self::Memfd(file) => file.read_exact_at(buf, guest_offset),
            Self::Process { mem, mappings, .. } => {
                let (mut at, mut rest) = (guest_offset, buf);
                while !rest.is_empty() {
                    let (addr, left) = host_addr(mappings, at)?;
                    let len = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let (now, later) = rest.split_at_mut(len);
                    mem.read_exact_at(now, addr)?;
                    at += len as u64;
                    rest = later;
                }
                Ok(())
            }
        }
    }
}

/// Where a guest offset is mapped, and how much of the mapping is left from there.
fn host_addr(mappings: &[MemoryMapping], guest_offset: u64) -> io::Result<(u64, u64)> {
    mappings
        .iter()
        .find_map(|mapping| {
            let skip = guest_offset.checked_sub(mapping.guest_offset_bytes)?;
            let left = mapping
                .len_bytes
                .checked_sub(skip)
                .filter(|left| *left > 0)?;
            Some((mapping.host_addr + skip, left))
        })
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Runs in order; one that touches the last makes it longer.
#[derive(Debug, Default)]
pub(crate) struct Runs(pub(crate) Vec<Range<u64>>);

impl Runs {
    fn add(&mut self, start: u64, end: u64) {
        match self.0.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.0.push(start..end),
        }
    }
}

fn present_in_file(file: &File, runs: &mut Runs) -> io::Result<()> {
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but holes from here on.
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        at = end.next_multiple_of(PAGE_BYTES);
        runs.add(start / PAGE_BYTES * PAGE_BYTES, at);
    }
}

fn held_in_file(file: &File, at: u64, end: u64) -> io::Result<(bool, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        // A file system may know blocks that are smaller than a page.
        Ok(data) => data / PAGE_BYTES * PAGE_BYTES,
        // Nothing but holes from here on.
        Err(rustix::io::Errno::NXIO) => return Ok((false, end)),
        Err(error) => return Err(error.into()),
    };
    if data > at {
        return Ok((false, data.min(end)));
    }
    // Looking for a hole walks to the end of the data, however far behind `end` that is.
    if holds_all(file, at, end.saturating_sub(at), PAGE_BYTES) {
        return Ok((true, end));
    }
    let hole = seek(file, SeekFrom::Hole(at))?;
    Ok((true, hole.next_multiple_of(PAGE_BYTES).min(end)))
}

fn held_in_process(
    pagemap: &File,
    mappings: &[MemoryMapping],
    at: u64,
    end: u64,
) -> io::Result<(bool, u64)> {
    let first = at / PAGE_BYTES * PAGE_BYTES;
    let (addr, left) = host_addr(mappings, first)?;
    let pages = (end.min(first + left) - first).div_ceil(PAGE_BYTES);
    let mut buf = [[0; 8]; HELD_ENTRIES_PER_LOOK];
    let entries = usize::try_from(pages).map_or(buf.len(), |pages| pages.min(buf.len()));
    let words = &mut buf[..entries];
    pagemap.read_exact_at(words.as_flattened_mut(), addr / PAGE_BYTES * ENTRY_BYTES)?;
    let is_held = |word: &[u8; 8]| u64::from_le_bytes(*word) & ENTRY_THERE != 0;
    let held = words.first().is_some_and(is_held);
    let same = words
        .iter()
        .take_while(|word| is_held(word) == held)
        .count();
    Ok((held, (first + same as u64 * PAGE_BYTES).min(end)))
}

/// Adds the pages of a mapping whose entry in its process's pagemap is a wanted one.
pub(crate) fn pages_where(
    pagemap: &File,
    mapping: &MemoryMapping,
    wanted: &dyn Fn(u64) -> bool,
    runs: &mut Runs,
) -> io::Result<()> {
    let pages = mapping.len_bytes / PAGE_BYTES;
    let first_entry = mapping.host_addr / PAGE_BYTES * ENTRY_BYTES;
    let mut buf = vec![0; usize::try_from(ENTRIES_PER_READ * ENTRY_BYTES).unwrap_or(0)];
    let mut page = 0;
    while page < pages {
        let entries = ENTRIES_PER_READ.min(pages - page);
        let bytes = usize::try_from(entries * ENTRY_BYTES).unwrap_or(0);
        let buf = &mut buf[..bytes];
        pagemap.read_exact_at(buf, first_entry + page * ENTRY_BYTES)?;
        let (words, _) = buf.as_chunks::<8>();
        for (word, page) in words.iter().zip(page..) {
            if wanted(u64::from_le_bytes(*word)) {
                let start = mapping.guest_offset_bytes + page * PAGE_BYTES;
                runs.add(start, start + PAGE_BYTES);
            }
        }
        page += entries;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::create_memfd;

    #[test]
    fn both_kinds_of_memory_show_the_same_pages_and_bytes() {
        let memfd = create_memfd(64 * PAGE_BYTES).unwrap();
        let file = File::from(memfd.try_clone().unwrap());
        file.write_all_at(&[7; 8192], 10 * PAGE_BYTES).unwrap();
        file.write_all_at(&[9; 10], 50 * PAGE_BYTES + 5).unwrap();
        let of_file = GuestReader::Memfd(file);

        // This process's own memory, in two mappings that are swapped in guest order.
        let mut map = anonymous(64);
        let base = map.as_mut_ptr().addr() as u64;
        map[42 * 4096..44 * 4096].fill(7);
        map[18 * 4096 + 5..18 * 4096 + 15].fill(9);
        let half = 32 * PAGE_BYTES;
        let memory = GuestMemory {
            memfd: None,
            len_bytes: 64 * PAGE_BYTES,
            pid: std::process::id(),
            mappings: vec![
                MemoryMapping {
                    host_addr: base + half,
                    len_bytes: half,
                    guest_offset_bytes: 0,
                },
                MemoryMapping {
                    host_addr: base,
                    len_bytes: half,
                    guest_offset_bytes: half,
                },
            ],
        };
        let of_process = memory.reader().unwrap();
        let page = |from: u64, to: u64| from * PAGE_BYTES..to * PAGE_BYTES;
        for reader in [&of_file, &of_process] {
            assert_eq!(reader.present().unwrap(), [page(10, 12), page(50, 51)]);
            assert_eq!(reader.len_bytes().unwrap(), 64 * PAGE_BYTES);
            let held = |from: u64, to: u64| {
                let (held, end) = reader.held_from(from, to).unwrap();
                (held, end.div_ceil(PAGE_BYTES))
            };
            assert_eq!(held(0, 64 * PAGE_BYTES), (false, 10));
            assert_eq!(held(0, 5 * PAGE_BYTES), (false, 5));
            assert_eq!(held(10 * PAGE_BYTES + 7, 64 * PAGE_BYTES), (true, 12));
            assert_eq!(held(11 * PAGE_BYTES, 11 * PAGE_BYTES + 9), (true, 12));
            // A mapping's end is the end of one look.
            assert!(!held(12 * PAGE_BYTES, 64 * PAGE_BYTES).0);
            assert_eq!(held(50 * PAGE_BYTES, 64 * PAGE_BYTES), (true, 51));
            assert_eq!(held(51 * PAGE_BYTES, 64 * PAGE_BYTES), (false, 64));
            let mut bytes = [0; 20];
            reader.read_exact_at(&mut bytes, 50 * PAGE_BYTES).unwrap();
            assert_eq!(bytes[..5], [0; 5]);
            assert_eq!(bytes[5..15], [9; 10]);
            let mut beyond = [0; 1];
            assert!(reader.read_exact_at(&mut beyond, 64 * PAGE_BYTES).is_err());
        }
        assert_eq!(memory.held_bytes().unwrap(), 3 * PAGE_BYTES);
    }

    /// Anonymous memory without a page in it.
    fn anonymous(pages: usize) -> memmap2::MmapMut {
        memmap2::MmapOptions::new()
            .len(pages * 4096)
            .map_anon()
            .unwrap()
    }
}
