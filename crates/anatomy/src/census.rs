//! What each page of a stopped guest is used for.

use serde::{Deserialize, Serialize};

use crate::AnatomyError;
use crate::array::PageArray;
use crate::entry::{EntryKind, EntryLayout};
use crate::memory::{Ram, RamRange};

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

/// Walks along the array.
pub(crate) fn take(
    ram: &Ram<'_>,
    array: &PageArray,
    layout: &EntryLayout,
) -> Result<Census, AnatomyError> {
    let mut runs = Runs(Vec::new());
    // The class of the last entry that was no tail: tails follow their head.
    let mut head = PageClass::Kernel;
    let array_bytes_read = array.walk(ram, |pfn, entry, end_pfn| {
        let (class, pages) = match layout.kind(pfn, entry, end_pfn)? {
            EntryKind::FreeBlock(pages) => (PageClass::Free, pages),
            EntryKind::Offline => (PageClass::Balloon, 1),
            EntryKind::Slab => (PageClass::Slab, 1),
            EntryKind::Anonymous => (PageClass::Anonymous, 1),
            EntryKind::PageCache => (PageClass::PageCache, 1),
            EntryKind::Other => (PageClass::Kernel, 1),
            EntryKind::Tail => (head, 1),
        };
        head = class;
        runs.push(pfn, pages, class);
        Ok(pages)
    })?;
    Ok(Census {
        runs: with_gaps_as_kernel(&runs.0, ram.ranges()),
        array_bytes_read,
    })
}

/// RAM that the kernel has no entries for is nobody else's than the kernel's.
fn with_gaps_as_kernel(found: &[ClassRun], ram: &[RamRange]) -> Vec<ClassRun> {
    let mut all = Runs(Vec::with_capacity(found.len()));
    let mut found = found.iter().peekable();
    for range in ram {
        let mut at = range.first_pfn();
        // A run never crosses a gap, but it may go on into a range that touches this one.
        while let Some(run) = found.peek().filter(|run| run.first_pfn < range.end_pfn()) {
            let first = run.first_pfn.max(at);
            let end = (run.first_pfn + run.pages).min(range.end_pfn());
            all.push(at, first - at, PageClass::Kernel);
            all.push(first, end - first, run.class);
            at = end;
            if run.first_pfn + run.pages > range.end_pfn() {
                break;
            }
            found.next();
        }
        all.push(at, range.end_pfn() - at, PageClass::Kernel);
    }
    all.0
}

/// Runs in the making.
struct Runs(Vec<ClassRun>);

impl Runs {
    fn push(&mut self, first_pfn: u64, pages: u64, class: PageClass) {
        if pages == 0 {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.class == class && last.first_pfn + last.pages == first_pfn => {
                last.pages += pages;
            }
            _ => self.0.push(ClassRun {
                first_pfn,
                pages,
                class,
            }),
        }
    }
}
