//! What each page of a stopped guest is used for.

use serde::{Deserialize, Serialize};

/// What a page is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PageClass {
    /// In a free block of the buddy allocator.
    Free,
    /// File contents, buffers, shared memory.
    PageCache,
    /// Memory of processes that no file stands behind.
    Anonymous,
    /// The kernel's own small objects.
    Slab,
    /// Held by a balloon, or otherwise logically offline.
    Balloon,
    /// All the rest: kernel text and data, page tables, stacks, per-CPU free lists, reserved pages.
    Kernel,
}

impl PageClass {
    /// Every class, in the order of the enum.
    pub const ALL: [Self; 6] = [
        Self::Free,
        Self::PageCache,
        Self::Anonymous,
        Self::Slab,
        Self::Balloon,
        Self::Kernel,
    ];
}

/// Neighbouring pages of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassRun {
    /// The first page frame number.
    pub first_pfn: u64,
    /// How many pages, at least one.
    pub pages: u64,
    /// What they are used for.
    pub class: PageClass,
}

/// Every page of the guest's RAM with its class.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Census {
    /// Sorted, coalesced; together they cover all RAM and nothing else.
    pub runs: Vec<ClassRun>,
    /// Bytes of the page array that were read.
    pub array_bytes_read: u64,
}

impl Census {
    /// How many pages have this class.
    #[must_use]
    pub fn pages(&self, class: PageClass) -> u64 {
        self.runs
            .iter()
            .filter(|run| run.class == class)
            .map(|run| run.pages)
            .sum()
    }
}
