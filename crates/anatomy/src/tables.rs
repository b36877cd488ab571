//! The guest kernel's page tables: virtual to guest-physical addresses.
//!
//! Four or five levels of 512 entries (Intel SDM volume 3, "4-level paging and 5-level paging");
//! leaves of 4 KiB, 2 MiB and 1 GiB. A walk takes one step per level whatever the tables say, so
//! tables that point at themselves cost nothing. Of each level the last table read is kept: walking
//! along an array reads one table per 2 MiB of it at most, never one entry at a time.

use crate::AnatomyError;
use crate::memory::{PAGE_SIZE, Ram};

const PRESENT: u64 = 1;
/// The entry maps memory itself (levels 2 and 3).
const LARGE: u64 = 1 << 7;
/// Bits 12 to 51: the address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const INDEX_BITS: u32 = 9;
const TABLE_BYTES: usize = 4096;

/// A stretch of virtual addresses that is contiguous in guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) addr: u64,
    pub(crate) len_bytes: u64,
}

/// A walker, with the last table of each level.
pub(crate) struct Tables<'a> {
    ram: &'a Ram<'a>,
    top: u64,
    levels: u8,
    /// Address and content of the last table read, by level − 1.
    kept: Vec<(u64, [u8; TABLE_BYTES])>,
}

/// No table is here: addresses of tables are page aligned.
const NOWHERE: u64 = u64::MAX;

impl<'a> Tables<'a> {
    pub(crate) fn new(ram: &'a Ram<'a>, top: u64, five_levels: bool) -> Self {
        let levels = if five_levels { 5 } else { 4 };
        Self {
            ram,
            top: top & ADDRESS,
            levels,
            kept: vec![(NOWHERE, [0; TABLE_BYTES]); usize::from(levels)],
        }
    }

    /// Where `vaddr` lies, up to the end of the leaf that maps it.
    pub(crate) fn translate(
        &mut self,
        what: &'static str,
        vaddr: u64,
    ) -> Result<Mapped, AnatomyError> {
        // The kernel's half: all bits above those that the tables translate are ones.
        let translated_bits = PAGE_SIZE.ilog2() + INDEX_BITS * u32::from(self.levels);
        if vaddr.leading_ones() < u64::BITS - translated_bits + 1 {
            return Err(AnatomyError::NotKernelAddress { what, vaddr });
        }
        let mut table = self.top;
        for level in (1..=self.levels).rev() {
            let shift = PAGE_SIZE.ilog2() + INDEX_BITS * u32::from(level - 1);
            let entry = self.entry(level, table, vaddr >> shift)?;
            if entry & PRESENT == 0 {
                return Err(AnatomyError::NotMapped { vaddr, level });
            }
            if level == 1 || (level <= 3 && entry & LARGE != 0) {
                let leaf_bytes = 1_u64 << shift;
                let offset = vaddr & (leaf_bytes - 1);
                return Ok(Mapped {
                    addr: (entry & ADDRESS & !(leaf_bytes - 1)) | offset,
                    len_bytes: leaf_bytes - offset,
                });
            }
            table = entry & ADDRESS;
        }
        Err(AnatomyError::NotMapped { vaddr, level: 1 })
    }

    fn entry(&mut self, level: u8, table: u64, index: u64) -> Result<u64, AnatomyError> {
        let (kept, bytes) = &mut self.kept[usize::from(level - 1)];
        if *kept != table {
            // Forgotten first: a failed read leaves half a table.
            *kept = NOWHERE;
            self.ram.read("page table", table, bytes)?;
            *kept = table;
        }
        let at = (index % (1 << INDEX_BITS)) as usize * size_of::<u64>();
        let entry = bytes[at..].first_chunk();
        Ok(entry.map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    }

    /// Reads `buf` from a virtual address, leaf by leaf.
    pub(crate) fn read(
        &mut self,
        what: &'static str,
        vaddr: u64,
        mut buf: &mut [u8],
    ) -> Result<(), AnatomyError> {
        let mut at = vaddr;
        while !buf.is_empty() {
            let mapped = self.translate(what, at)?;
            let here = usize::try_from(mapped.len_bytes).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(here.min(buf.len()));
            self.ram.read(what, mapped.addr, now)?;
            at = at.wrapping_add(now.len() as u64);
            buf = later;
        }
        Ok(())
    }
}
