//! One entry of the page array: the kernel's `struct page`, read by the places that the note names.
//!
//! The marks are those of `include/linux/page-flags.h`. A *page type* stands in the word of
//! `_mapcount` while nobody maps the page: an exact 32-bit value for free and offline pages, in all
//! kernels from 4.18 on. Slab pages had a flag until 6.9, and have a type since 6.10.

use crate::AnatomyError;

/// Highest order of a free block (log2 of its pages): `MAX_PAGE_ORDER` in `include/linux/mmzone.h`
/// (x86-64 cannot be configured otherwise).
pub const BLOCK_ORDER_MAX: u32 = 10;
/// The lowest bit of `mapping`: memory of processes (`PAGE_MAPPING_ANON`).
const MAPPING_ANONYMOUS: u64 = 1;
/// The two bits of `mapping` that tell its kind; neither is set for files.
const MAPPING_KIND: u64 = 3;
/// Types are below this, read as signed numbers; from here on it is a count of mappings
/// (`PAGE_MAPCOUNT_RESERVE`, −128).
const MAPCOUNT_MIN: i32 = -128;

/// Where the fields are in an entry, and which values mean what. All offsets lie inside `stride`.
#[derive(Debug, Clone)]
pub(crate) struct EntryLayout {
    /// Size of an entry (bytes).
    pub(crate) stride: usize,
    pub(crate) flags: usize,
    pub(crate) compound_head: usize,
    pub(crate) mapping: usize,
    pub(crate) private: usize,
    pub(crate) mapcount: usize,
    pub(crate) refcount: usize,
    pub(crate) buddy: u32,
    pub(crate) offline: Option<u32>,
    pub(crate) hugetlb: Option<u32>,
    pub(crate) slab: Option<SlabMark>,
}

/// How a kernel marks pages of small objects.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SlabMark {
    /// A bit of `flags`, as a mask.
    Flag(u64),
    /// A page type.
    Type(u32),
}

/// What an entry says of its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// First page of a free block of this many pages.
    FreeBlock(u64),
    Offline,
    /// Belongs to the compound page whose head comes before.
    Tail,
    Slab,
    Anonymous,
    PageCache,
    Other,
}

impl EntryLayout {
    /// Whether the page is offline or heads a free block, and nothing else: `Other` is all the rest.
    /// The scan asks this of each entry, so that it looks at one word of most.
    #[inline]
    pub(crate) fn free_kind(
        &self,
        pfn: u64,
        entry: &[u8],
        end_pfn: u64,
    ) -> Result<EntryKind, AnatomyError> {
        let page_type = word(entry, self.mapcount);
        if page_type == self.buddy {
            self.free_block(pfn, entry, end_pfn)
        } else if Some(page_type) == self.offline && !self.has_slab_flag(entry) {
            Ok(EntryKind::Offline)
        } else {
            Ok(EntryKind::Other)
        }
    }

    /// What the page is used for.
    pub(crate) fn kind(
        &self,
        pfn: u64,
        entry: &[u8],
        end_pfn: u64,
    ) -> Result<EntryKind, AnatomyError> {
        let free = self.free_kind(pfn, entry, end_pfn)?;
        if free != EntryKind::Other {
            return Ok(free);
        }
        let page_type = word(entry, self.mapcount);
        let is_slab = match self.slab {
            Some(SlabMark::Type(slab)) => page_type == slab,
            Some(SlabMark::Flag(_)) => self.has_slab_flag(entry),
            None => false,
        };
        if self.is_tail(entry) {
            return Ok(EntryKind::Tail);
        }
        if is_slab {
            return Ok(EntryKind::Slab);
        }
        // Another type (page tables, …): `mapping` has another meaning there.
        let typed = page_type.cast_signed() < MAPCOUNT_MIN;
        if typed && Some(page_type) != self.hugetlb {
            return Ok(EntryKind::Other);
        }
        Ok(kind_by_mapping(long(entry, self.mapping)))
    }

    /// The mark of a free block, with everything else that the kernel promises of one: a page that
    /// breaks a promise shows that the array is not what it seems to be.
    #[cold]
    fn not_free(pfn: u64, what: &'static str) -> AnatomyError {
        AnatomyError::FreeBlock { pfn, what }
    }

    fn free_block(&self, pfn: u64, entry: &[u8], end_pfn: u64) -> Result<EntryKind, AnatomyError> {
        let order = long(entry, self.private);
        if order > u64::from(BLOCK_ORDER_MAX) {
            return Err(Self::not_free(pfn, "its order is over 10"));
        }
        let pages = 1 << order;
        if !pfn.is_multiple_of(pages) {
            return Err(Self::not_free(pfn, "it is not aligned to its order"));
        }
        if pages > end_pfn - pfn {
            return Err(Self::not_free(pfn, "it reaches beyond its RAM"));
        }
        if word(entry, self.refcount) != 0 {
            return Err(Self::not_free(pfn, "somebody holds a reference to it"));
        }
        if self.is_tail(entry) {
            return Err(Self::not_free(pfn, "it is part of a compound page"));
        }
        if self.has_slab_flag(entry) {
            return Err(Self::not_free(pfn, "it is a slab page"));
        }
        Ok(EntryKind::FreeBlock(pages))
    }

    fn is_tail(&self, entry: &[u8]) -> bool {
        long(entry, self.compound_head) & 1 != 0
    }

    /// Pages with the flag use the word of `_mapcount` for themselves.
    fn has_slab_flag(&self, entry: &[u8]) -> bool {
        match self.slab {
            Some(SlabMark::Flag(mask)) => long(entry, self.flags) & mask != 0,
            _ => false,
        }
    }
}

fn kind_by_mapping(mapping: u64) -> EntryKind {
    if mapping & MAPPING_ANONYMOUS != 0 {
        EntryKind::Anonymous
    } else if mapping != 0 && mapping & MAPPING_KIND == 0 {
        EntryKind::PageCache
    } else {
        EntryKind::Other
    }
}

/// The 32 bits at `offset`; the layout is checked, so they are always there.
#[inline]
fn word(entry: &[u8], offset: usize) -> u32 {
    let bytes = entry.get(offset..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The 64 bits at `offset`.
#[inline]
fn long(entry: &[u8], offset: usize) -> u64 {
    let bytes = entry.get(offset..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
