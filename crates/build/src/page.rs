//! Pages: the unit of everything here.

use serde::{Deserialize, Serialize};

/// Bytes in a page. The guest's page, the host's page and the file system's block on the machines
/// that torpor runs on.
pub const PAGE_SIZE: usize = 4096;

/// Longest image, in pages (1 TiB): keeps page numbers in 32 bits, and bounds what a damaged
/// header can make us allocate.
pub const IMAGE_PAGES_MAX: u64 = 1 << 28;

// The index keeps page numbers as u32.
const _: () = assert!(IMAGE_PAGES_MAX <= u32::MAX as u64);
// Lengths are kept as u64 on disk and usize in memory.
const _: () = assert!(usize::BITS == 64);

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct PageRun {
    /// The first page's number: its offset in the image divided by [`PAGE_SIZE`].
    pub first_page: u64,
    /// How many pages.
    pub pages: u64,
}

impl From<(u64, u64)> for PageRun {
    fn from((first_page, pages): (u64, u64)) -> Self {
        Self { first_page, pages }
    }
}

impl From<PageRun> for (u64, u64) {
    fn from(run: PageRun) -> Self {
        (run.first_page, run.pages)
    }
}

/// Which of a build's two images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ImageKind {
    /// Guest memory.
    Memory,
    /// The guest's writable disk.
    Disk,
}

impl ImageKind {
    /// The word for it, which is also how its files' names begin.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }

    pub(crate) fn index_file(self) -> &'static str {
        match self {
            Self::Memory => "memory.index",
            Self::Disk => "disk.index",
        }
    }

    pub(crate) fn data_file(self) -> &'static str {
        match self {
            Self::Memory => "memory.data",
            Self::Disk => "disk.data",
        }
    }

    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Memory => 1,
            Self::Disk => 2,
        }
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Memory),
            2 => Some(Self::Disk),
            _ => None,
        }
    }
}

pub(crate) static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Whether a page holds nothing but zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page == ZERO_PAGE
}

/// A file length or page count as an index into memory.
#[expect(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits: asserted above"
)]
pub(crate) fn to_usize(n: u64) -> usize {
    n as usize
}
