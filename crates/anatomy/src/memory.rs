//! Guest-physical memory, as this crate sees it: ranges of RAM, and a way to read inside one.
//!
//! Everything that the guest says is an address sooner or later, so all reads pass through
//! `Ram::read`, which refuses what does not lie in RAM before the caller's code is asked.

use std::cell::Cell;
use std::io;

use crate::AnatomyError;

/// Size of a guest page (bytes): x86-64's base page.
pub const PAGE_SIZE: u64 = 4096;
/// Most ranges of RAM that a guest may have: a machine has two or three, hot-plugged memory more.
pub const RAM_RANGES_MAX: usize = 1024;
/// Highest guest-physical address plus one (bytes): what x86-64's page table entries can hold.
pub const RAM_END_MAX: u64 = 1 << 52;

/// A stretch of guest-physical RAM, page aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Its first guest-physical address.
    pub addr: u64,
    /// Its length (bytes).
    pub len_bytes: u64,
}

impl RamRange {
    /// One past its last address.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.addr.saturating_add(self.len_bytes)
    }

    /// Its first page frame number.
    pub(crate) fn first_pfn(&self) -> u64 {
        self.addr / PAGE_SIZE
    }

    /// One past its last page frame number.
    pub(crate) fn end_pfn(&self) -> u64 {
        self.end() / PAGE_SIZE
    }
}

/// A stopped guest's memory. It must not change while it is looked at.
pub trait PhysicalMemory {
    /// The guest's RAM: page aligned, sorted, disjoint; two ranges may touch.
    fn ram(&self) -> &[RamRange];

    /// Fills `buf` with the bytes at the guest-physical address `addr`.
    ///
    /// This crate calls it only for ranges that lie wholly inside one [`RamRange`].
    ///
    /// # Errors
    /// When the bytes cannot be had.
    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// A guest's memory with its ranges checked; counts what is read of it.
pub(crate) struct Ram<'a> {
    memory: &'a dyn PhysicalMemory,
    ranges: &'a [RamRange],
    reads: Cell<u64>,
}

impl<'a> Ram<'a> {
    pub(crate) fn new(memory: &'a dyn PhysicalMemory) -> Result<Self, AnatomyError> {
        let ranges = memory.ram();
        check(ranges).map_err(|what| AnatomyError::Ram { what })?;
        let reads = Cell::new(0);
        Ok(Self {
            memory,
            ranges,
            reads,
        })
    }

    pub(crate) fn ranges(&self) -> &'a [RamRange] {
        self.ranges
    }

    /// How many pages of RAM there are.
    pub(crate) fn pages(&self) -> u64 {
        self.ranges.iter().map(|r| r.len_bytes / PAGE_SIZE).sum()
    }

    /// How often the caller's memory was asked.
    pub(crate) fn reads(&self) -> u64 {
        self.reads.get()
    }

    /// How many bytes of RAM there are from `addr` on without a gap, up to `max`; 0 if it is not in RAM.
    pub(crate) fn bytes_from(&self, addr: u64, max: u64) -> u64 {
        let mut end = addr;
        for range in self.from(addr) {
            if range.addr > end || end - addr >= max {
                break;
            }
            end = range.end();
        }
        (end - addr).min(max)
    }

    /// The ranges that end behind `addr`.
    fn from(&self, addr: u64) -> &'a [RamRange] {
        &self.ranges[self.ranges.partition_point(|r| r.end() <= addr)..]
    }

    /// Reads what lies wholly in RAM, and refuses anything else.
    pub(crate) fn read(
        &self,
        what: &'static str,
        addr: u64,
        buf: &mut [u8],
    ) -> Result<(), AnatomyError> {
        let len_bytes = buf.len() as u64;
        if self.bytes_from(addr, len_bytes) < len_bytes {
            return Err(AnatomyError::OutsideRam {
                what,
                addr,
                len_bytes,
            });
        }
        let mut at = addr;
        let mut rest = buf;
        // One round, unless two ranges touch: the caller is asked inside a single one.
        for range in self.from(addr) {
            if rest.is_empty() {
                break;
            }
            let here = usize::try_from(range.end() - at).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(here.min(rest.len()));
            self.reads.set(self.reads.get() + 1);
            let read = self.memory.read(at, now);
            read.map_err(|source| AnatomyError::Read {
                addr: at,
                len_bytes: now.len() as u64,
                source,
            })?;
            at = range.end();
            rest = later;
        }
        Ok(())
    }
}

fn check(ranges: &[RamRange]) -> Result<(), &'static str> {
    if ranges.is_empty() || ranges.len() > RAM_RANGES_MAX {
        return Err("there must be one, and not over a thousand");
    }
    let mut end = 0;
    for range in ranges {
        if range.addr % PAGE_SIZE != 0 || range.len_bytes % PAGE_SIZE != 0 {
            return Err("one is not page aligned");
        }
        if range.len_bytes == 0 || range.addr < end || range.end() > RAM_END_MAX {
            return Err("one is empty, not in order, or beyond what a guest can address");
        }
        end = range.end();
    }
    Ok(())
}
