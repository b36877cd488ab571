//! Runs and sets of guest pages.
//!
//! A guest page number is the page's offset in the guest's memory file divided by [`PAGE_SIZE`];
//! host addresses appear in this crate only where the kernel is spoken to.

use serde::{Deserialize, Serialize};

/// Bytes of a page. Every supported host and guest uses 4 KiB base pages.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] where file offsets and addresses are computed.
pub(crate) const PAGE_SIZE_U64: u64 = 4096;

const _: () = assert!(
    PAGE_SIZE as u64 == PAGE_SIZE_U64,
    "one page size, two integer types"
);

/// The bytes of some base pages (saturating).
pub(crate) fn bytes_of_pages(pages: u64) -> usize {
    usize::try_from(pages)
        .unwrap_or(usize::MAX)
        .saturating_mul(PAGE_SIZE)
}

/// The other size of pages that guest memory may consist of.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Pages that one word of a set holds.
const WORD_PAGES: u64 = 64;

/// A run of consecutive guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PageRun {
    /// The run's first guest page.
    pub first_page: u64,
    /// Its length; an empty run names no page.
    pub pages: u64,
}

impl PageRun {
    /// A run from its first page and its length.
    #[must_use]
    pub const fn new(first_page: u64, pages: u64) -> Self {
        Self { first_page, pages }
    }

    /// The page after the run's last (saturating: runs come from files).
    #[must_use]
    pub const fn end_page(&self) -> u64 {
        self.first_page.saturating_add(self.pages)
    }

    /// The part of this run that lies inside `other`; `None` where they do not meet.
    #[must_use]
    pub fn clipped_to(&self, other: Self) -> Option<Self> {
        let first_page = self.first_page.max(other.first_page);
        let end_page = self.end_page().min(other.end_page());
        (first_page < end_page).then(|| Self::new(first_page, end_page - first_page))
    }
}

/// Between base pages, in which all public numbers count, and larger ones, each of which consists
/// of so many.
impl PageRun {
    /// The larger pages that a run of base pages touches.
    pub(crate) const fn covered_by(self, base_pages: u64) -> Self {
        let first_page = self.first_page / base_pages;
        let end_page = self.end_page().div_ceil(base_pages);
        Self::new(first_page, end_page.saturating_sub(first_page))
    }

    /// The base pages of a run of larger ones.
    pub(crate) const fn in_base_pages(self, base_pages: u64) -> Self {
        Self::new(self.first_page * base_pages, self.pages * base_pages)
    }
}

/// A set of guest pages, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set that can hold the pages `0..pages`.
    #[must_use]
    pub fn with_capacity_pages(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(usize::MAX);
        Self {
            words: vec![0; words],
            pages,
        }
    }

    /// How many pages the set could hold (not how many it holds).
    #[must_use]
    pub fn capacity_pages(&self) -> u64 {
        self.pages
    }

    fn slot(page: u64) -> (usize, u64) {
        (
            usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX),
            1 << (page % WORD_PAGES),
        )
    }

    /// Adds a page. Pages beyond the capacity are not part of the guest and are left out.
    pub fn insert(&mut self, page: u64) {
        let (word, bit) = Self::slot(page);
        if page < self.pages
            && let Some(word) = self.words.get_mut(word)
        {
            *word |= bit;
        }
    }

    /// Adds every page of a run, clipped to the capacity.
    pub fn insert_run(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page().min(self.pages) {
            self.insert(page);
        }
    }

    /// The base pages of a set of larger ones.
    pub(crate) fn in_base_pages(self, base_pages: u64) -> Self {
        if base_pages == 1 {
            return self;
        }
        let mut all = Self::with_capacity_pages(self.pages * base_pages);
        for run in self.runs() {
            all.insert_run(run.in_base_pages(base_pages));
        }
        all
    }

    fn combine(&mut self, other: &Self, combined: impl Fn(u64, u64) -> u64) {
        debug_assert_eq!(self.pages, other.pages, "sets of one guest");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine = combined(*mine, *theirs);
        }
    }

    /// Adds what another set of the same guest holds.
    pub(crate) fn unite(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine | theirs);
    }

    /// Keeps what another set of the same guest holds as well.
    pub fn intersect(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & theirs);
    }

    /// Takes out what another set of the same guest holds.
    pub(crate) fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| mine & !theirs);
    }

    /// Whether the set holds this page.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let (word, bit) = Self::slot(page);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many pages the set holds.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether the set holds no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The set's pages as sorted runs, neither touching nor overlapping.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let mut next_page = 0;
        std::iter::from_fn(move || {
            let first_page = self.next_with(next_page, true)?;
            let end_page = self.next_with(first_page, false).unwrap_or(self.pages);
            next_page = end_page;
            Some(PageRun::new(first_page, end_page - first_page))
        })
    }

    /// The first page at or after `from` that is in the set (or, for `false`, is not).
    fn next_with(&self, from: u64, held: bool) -> Option<u64> {
        let mut page = from;
        while page < self.pages {
            let (index, _) = Self::slot(page);
            let word = if held {
                self.words[index]
            } else {
                !self.words[index]
            };
            let rest = word >> (page % WORD_PAGES);
            if rest != 0 {
                let found = page + u64::from(rest.trailing_zeros());
                return (found < self.pages).then_some(found);
            }
            page = (page / WORD_PAGES + 1) * WORD_PAGES;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_holds_what_a_plain_set_holds(
            inserted in proptest::collection::vec((0_u64..300, 0_u64..90), 0..20),
            taken in proptest::collection::vec(0_u64..300, 0..40),
        ) {
            let mut set = PageSet::with_capacity_pages(257);
            let mut model = BTreeSet::new();
            for (first_page, pages) in inserted {
                set.insert_run(PageRun::new(first_page, pages));
                model.extend((first_page..first_page + pages).filter(|page| *page < 257));
            }
            let mut gone = PageSet::with_capacity_pages(257);
            for page in taken {
                gone.insert(page);
                model.remove(&page);
            }
            set.subtract(&gone);
            prop_assert_eq!(set.len(), model.len() as u64);
            let runs: Vec<_> = set.runs().collect();
            let listed: Vec<_> =
                runs.iter().flat_map(|run| run.first_page..run.end_page()).collect();
            prop_assert_eq!(listed, model.into_iter().collect::<Vec<_>>());
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end_page() < pair[1].first_page);
            }
        }
    }
}
