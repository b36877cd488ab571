//! Which pages of the stopped guest are free.
//!
//! Only the first page of a free block bears the mark; the entries of its other pages keep whatever
//! they had. So blocks are derived afresh from their heads at every scan, what lies inside a block is
//! not looked at, and a verdict about a single page must not be carried over to another stop.

use crate::AnatomyError;
use crate::array::PageArray;
use crate::entry::{EntryKind, EntryLayout};
use crate::memory::Ram;

/// A run of pages, by page frame number (guest-physical address / 4096).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PfnRun {
    /// The first page frame number.
    pub first_pfn: u64,
    /// How many pages, at least one.
    pub pages: u64,
}

impl PfnRun {
    /// One past its last page frame number.
    #[must_use]
    pub fn end_pfn(&self) -> u64 {
        self.first_pfn + self.pages
    }
}

/// The pages whose content the stopped guest does not need, and what finding them took.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FreePages {
    /// Sorted, disjoint, coalesced; each page lies in RAM.
    pub runs: Vec<PfnRun>,
    /// Pages of them in free blocks of the buddy allocator.
    pub buddy_pages: u64,
    /// Pages of them held by a balloon (or otherwise logically offline).
    pub balloon_pages: u64,
    /// Bytes of the page array that were read.
    pub array_bytes_read: u64,
    /// Reads of guest memory that this took.
    pub reads: u64,
}

impl FreePages {
    /// All pages in `runs`.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.buddy_pages + self.balloon_pages
    }
}

/// Walks along the array.
pub(crate) fn find(
    ram: &Ram<'_>,
    array: &PageArray,
    layout: &EntryLayout,
) -> Result<FreePages, AnatomyError> {
    let mut found = FreePages::default();
    let reads_before = ram.reads();
    found.array_bytes_read = array.walk(ram, |pfn, entry, end_pfn| {
        let pages = match layout.free_kind(pfn, entry, end_pfn)? {
            EntryKind::FreeBlock(pages) => {
                found.buddy_pages += pages;
                pages
            }
            EntryKind::Offline => {
                found.balloon_pages += 1;
                1
            }
            _ => return Ok(1),
        };
        match found.runs.last_mut() {
            Some(last) if last.end_pfn() == pfn => last.pages += pages,
            _ => found.runs.push(PfnRun {
                first_pfn: pfn,
                pages,
            }),
        }
        Ok(pages)
    })?;
    found.reads = ram.reads() - reads_before;
    Ok(found)
}
