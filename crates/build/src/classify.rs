//! What pages of data are, compared with the parent's pages and the base image: the costly part of
//! writing an image, done by all cores.
//!
//! Each page is hashed once; the hash then serves to find its block in the base image, and, in the
//! writer, its like among the pages that were stored already. Nothing here writes, or depends on
//! what was written before, so pieces of pages are looked at in any order.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::base_image::BaseImage;
use crate::data::FRAME_PAGES;
use crate::ids::Digest;
use crate::index::Entry;
use crate::page::{PAGE_SIZE, is_zero, to_usize};
use crate::parallel::in_parallel;
use crate::reader::ImageReader;

/// Pages looked at by one piece of work: 256 KiB, a fraction of a millisecond.
const PIECE_PAGES: usize = 64;
/// Pages compared with the parent's at a time: where one of its frames cannot be read, few pages
/// must be stored that might have been the same.
const COMPARE_PAGES: u64 = FRAME_PAGES as u64;
/// Bytes for which one more thread is worth its start, on a busy machine too (1 MiB).
const THREAD_BYTES_MIN: usize = 1 << 20;
const PIECE_BYTES: usize = PIECE_PAGES * PAGE_SIZE;

/// What a page of data is; the first that fits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found {
    /// All zero.
    Zero,
    /// The same bytes as the parent's page, whose entry this is.
    Parent(Entry),
    /// The same bytes as this block of the base image.
    BaseImage(u64),
    /// Anything else, of this digest.
    Other(Digest),
}

/// Pages, one after the other, and how many could not be compared with the parent's.
#[derive(Debug, Default)]
pub(crate) struct Classified {
    pub(crate) pages: Vec<Found>,
    pub(crate) parent_unreadable_pages: u64,
}

/// What pages are compared with.
#[derive(Debug)]
pub(crate) struct Classifier<'a> {
    pub(crate) parent: Option<&'a ImageReader>,
    pub(crate) base_image: Option<&'a BaseImage>,
    /// Whether the log has been told that the parent cannot be read: a parent that has lost a file
    /// would fill it.
    pub(crate) warned: &'a AtomicBool,
}

impl Classifier<'_> {
    /// Looks at pages of the image from `first_page` on.
    pub(crate) fn classify(&self, threads: usize, first_page: u64, bytes: &[u8]) -> Classified {
        let pieces: Vec<_> = bytes.chunks(PIECE_BYTES).collect();
        let threads = threads.min(bytes.len() / THREAD_BYTES_MIN);
        let done = in_parallel(threads, pieces.len(), |piece| {
            self.classify_piece(first_page + (piece * PIECE_PAGES) as u64, pieces[piece])
        });
        let mut all = Classified::default();
        for piece in done {
            all.pages.extend(piece.pages);
            all.parent_unreadable_pages += piece.parent_unreadable_pages;
        }
        all
    }

    fn classify_piece(&self, first_page: u64, bytes: &[u8]) -> Classified {
        let mut found = Classified::default();
        let mut candidates = Vec::new();
        let (mut parent_pages, mut at) = (Vec::new(), first_page);
        let mut rest = bytes;
        while !rest.is_empty() {
            // Within one run of the parent's index.
            let pages_max = COMPARE_PAGES.min((rest.len() / PAGE_SIZE) as u64);
            let (pages, entry) = parent_run(self.parent, at, pages_max);
            let (run, after) = rest.split_at(to_usize(pages) * PAGE_SIZE);
            let comparable = !entry.reads_as_zero() && !run.chunks_exact(PAGE_SIZE).all(is_zero);
            let of_parent = if comparable && self.read_parent(at, run.len(), &mut parent_pages) {
                Some((entry, parent_pages.as_slice()))
            } else {
                found.parent_unreadable_pages += if comparable { pages } else { 0 };
                None
            };
            self.classify_run(run, of_parent, &mut found.pages, &mut candidates);
            (rest, at) = (after, at + pages);
        }
        self.confirm(bytes, &candidates, &mut found.pages);
        found
    }

    /// Pages of one run of the parent, whose bytes are given if they can be compared.
    fn classify_run(
        &self,
        run: &[u8],
        of_parent: Option<(Entry, &[u8])>,
        found: &mut Vec<Found>,
        candidates: &mut Vec<Candidate>,
    ) {
        for (position, page) in run.chunks_exact(PAGE_SIZE).enumerate() {
            let from = position * PAGE_SIZE;
            let same = |(entry, pages): (Entry, &[u8])| {
                let same = pages.get(from..from + PAGE_SIZE) == Some(page);
                same.then(|| entry.advanced(position as u64))
            };
            let what = if is_zero(page) {
                Found::Zero
            } else if let Some(entry) = of_parent.and_then(same) {
                Found::Parent(entry)
            } else {
                let digest = Digest::of(page);
                self.add_candidate(&digest, found.len(), candidates);
                Found::Other(digest)
            };
            found.push(what);
        }
    }

    fn add_candidate(&self, digest: &Digest, position: usize, candidates: &mut Vec<Candidate>) {
        let Some(image) = self.base_image else {
            return;
        };
        let previous = candidates
            .last()
            .filter(|last| last.position + 1 == position)
            .map(|last| last.block);
        if let Some(block) = image.candidate(digest, previous) {
            candidates.push(Candidate { position, block });
        }
    }

    /// Compares pages with the blocks of the same hash, byte by byte.
    fn confirm(&self, bytes: &[u8], candidates: &[Candidate], found: &mut [Found]) {
        let Some(image) = self.base_image else {
            return;
        };
        let mut blocks = Vec::new();
        for run in candidates.chunk_by(|a, b| a.next() == *b) {
            let Some(first) = run.first() else { continue };
            let from = first.position * PAGE_SIZE;
            let pages = &bytes[from..from + run.len() * PAGE_SIZE];
            let same = image.compare(first.block, pages, &mut blocks);
            for (candidate, _) in run.iter().zip(same).filter(|(_, same)| *same) {
                found[candidate.position] = Found::BaseImage(candidate.block);
            }
        }
    }

    /// Reads the parent's pages. A parent that cannot be read is no reason to lose the guest's
    /// pages: they are stored, and the summary says so.
    fn read_parent(&self, first_page: u64, bytes: usize, into: &mut Vec<u8>) -> bool {
        let Some(parent) = self.parent else {
            return false;
        };
        into.resize(bytes, 0);
        let read = parent.read_pages(first_page, into);
        if let Err(error) = &read
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(first_page, %error, "the parent's pages cannot be compared");
        }
        read.is_ok()
    }
}

/// A page of a piece, and a block of the same hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    position: usize,
    block: u64,
}

impl Candidate {
    fn next(self) -> Self {
        Self {
            position: self.position + 1,
            block: self.block + 1,
        }
    }
}

/// What the parent has at a page, for how many pages (at most `pages_max`).
pub(crate) fn parent_run(parent: Option<&ImageReader>, page: u64, pages_max: u64) -> (u64, Entry) {
    match parent.and_then(|parent| parent.index().run_at(page)) {
        Some(run) => (run.pages.min(pages_max), run.what),
        // No parent, or past its end: nothing there until the end.
        None => (pages_max, Entry::Zero),
    }
}
