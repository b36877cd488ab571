//! Where a page's first content comes from.
//!
//! The pager knows builds, files and networks only through this trait.

use std::marker::PhantomData;

use crate::page_set::PageRun;

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

    /// The content of a run, if it can be had without waiting for anything: out of memory, or out
    /// of the host's page cache. `None` where it cannot; the pager then calls
    /// [`PageSource::read`] on another thread.
    ///
    /// Must not block: it is called while the page states are locked, by the thread that reads the
    /// kernel's events. `buf` is as long as the run and may be filled and returned. Asked for at
    /// most [`FILL_PAGES_MAX`](crate::FILL_PAGES_MAX) pages, all of kind [`SourceKind::Data`]; for a
    /// guest of huge pages, and a source whose [`PageSource::block_pages`] is 1, for one of them.
    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        let _ = (run, buf);
        None
    }

    /// How many aligned pages cost about as much to read as one of them does, for instance the
    /// pages of a compressed frame. The pager then reads a faulting page's neighbours along with
    /// it instead of asking twice. 1 where a single page is cheapest.
    fn block_pages(&self) -> u64 {
        1
    }
}

/// The runs of one kind that a run of the source's pages consists of, none longer than `pages_max`
/// (at least 1).
pub(crate) fn runs_of(
    source: &dyn PageSource,
    run: PageRun,
    pages_max: u64,
) -> impl Iterator<Item = (PageRun, SourceKind)> {
    let mut at = run.first_page;
    std::iter::from_fn(move || {
        let left = run.end_page().checked_sub(at).filter(|left| *left > 0)?;
        let found = source.run_at(at);
        let part = PageRun::new(at, found.pages.clamp(1, left.min(pages_max)));
        at = part.end_page();
        Some((part, found.kind))
    })
}

/// Pages' bytes, for the kernel to copy.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Bytes like any others.
    Bytes(&'a [u8]),
    /// A mapped file's bytes.
    Mapped(Mapped<'a>),
}

/// A piece of a mapped file that only the kernel reads. Not a slice: the file may change, shrink
/// or fail under it, which the kernel answers with an error where a program would be killed.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<'a> {
    addr: u64,
    len_bytes: u64,
    mapping: PhantomData<&'a [u8]>,
}

impl Mapped<'_> {
    /// A piece of a mapping of the calling process.
    ///
    /// # Safety
    /// The range must stay mapped to the file, and to nothing else, for the lifetime that is given
    /// to it. Whether it can be read does not matter.
    #[must_use]
    pub unsafe fn new(addr: u64, len_bytes: u64) -> Self {
        Self {
            addr,
            len_bytes,
            mapping: PhantomData,
        }
    }
}

impl Content<'_> {
    /// Where it stands in this process, and how long it is.
    pub(crate) fn range(&self) -> (u64, u64) {
        match self {
            Self::Bytes(bytes) => (bytes.as_ptr().addr() as u64, bytes.len() as u64),
            Self::Mapped(mapped) => (mapped.addr, mapped.len_bytes),
        }
    }
}

impl<'a> From<&'a [u8]> for Content<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}
