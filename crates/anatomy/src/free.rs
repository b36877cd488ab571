//! Which pages of the stopped guest are free.

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
