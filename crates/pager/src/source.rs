//! Where a page's first content comes from.
//!
//! The pager knows builds, files and networks only through this trait.

/// What a run of the source's pages holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// All zero: served without a read.
    Zero,
    /// Bytes that [`PageSource::read`] delivers.
    Data,
}

/// A run of pages of one kind, from the page that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRun {
    /// How many pages, from the one asked for, are of this kind. At least 1.
    pub pages: u64,
    /// What they hold.
    pub kind: SourceKind,
}

/// The content of a guest's memory as its build recorded it.
pub trait PageSource: Send + Sync + 'static {
    /// What stands at `page`, and for how many pages from there.
    ///
    /// Must answer from memory, without blocking: it is asked while the page states are locked.
    /// Pages beyond the source's end are zero.
    fn run_at(&self, page: u64) -> SourceRun;

    /// Fills `buf` (whole pages) with the content from `first_page` on.
    ///
    /// May block on storage. Never asked for more than
    /// [`READ_PAGES_MAX`](crate::READ_PAGES_MAX) pages, which are all of kind
    /// [`SourceKind::Data`].
    ///
    /// # Errors
    /// Whatever the storage reports. The pager repeats a failed read a bounded number of times,
    /// then gives up on the guest: it never makes content up.
    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()>;

    /// How many aligned pages cost about as much to read as one of them does, for instance the
    /// pages of a compressed frame. The pager then reads a faulting page's neighbours along with
    /// it instead of asking twice. 1 where a single page is cheapest.
    fn block_pages(&self) -> u64 {
        1
    }
}
