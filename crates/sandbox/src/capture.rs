//! Capture: takes what the next build needs out of the stopped guest's memory, fast.
//!
//! The vCPUs stand still meanwhile, so this only *copies*: comparing with the parent, compressing
//! and writing come after, from the copy. ([`torpor_build`] decides there what is a zero page, the
//! parent's page or data.)
//!
//! Invariants:
//! - Memory is read with `pread` from the memfd, never through a mapping: reading a hole through a
//!   mapping would fill it.
//! - A plan covers every page exactly once, in page order.
//! - What a page is follows from the dirty set alone: *written* beats *removed* (a page that was
//!   given back and then used again is in use), *removed* beats the parent, everything else is as
//!   the parent has it. A hole in a lazily resumed memfd means nothing by itself.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use torpor_build::{LayerWriter, PAGE_SIZE, PageContent, PageRun};

/// Readers that copy at once: memory bandwidth is the limit, and two of them reach it.
const COPY_THREADS: usize = 2;
/// Copied in one read: large enough that the call's cost vanishes, small enough to share out.
const COPY_CHUNK_BYTES: usize = 1 << 20;

/// The page after a run's last.
fn end(run: &PageRun) -> u64 {
    run.first_page + run.pages
}

/// What is done with a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// As the parent build has it.
    Parent,
    /// Given back by the guest (or, in a booted guest, never touched).
    Removed,
    /// Copied.
    Copied,
}

/// Which pages are copied and what holds for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CapturePlan {
    runs: Vec<(PageRun, Verdict)>,
    copied_pages: u64,
}

impl CapturePlan {
    /// For a guest whose changes were tracked since its resume. Both sets in page order.
    #[must_use]
    pub(crate) fn tracked(total_pages: u64, written: &[PageRun], removed: &[PageRun]) -> Self {
        Self::new(total_pages, written, removed, Verdict::Parent)
    }

    /// For a guest without tracking (booted, or filled before it started): what is present is
    /// copied, all else is absent and reads as zero.
    #[must_use]
    pub(crate) fn present(total_pages: u64, present: &[PageRun]) -> Self {
        Self::new(total_pages, present, &[], Verdict::Removed)
    }

    fn new(total_pages: u64, copied: &[PageRun], removed: &[PageRun], otherwise: Verdict) -> Self {
        let mut plan = Self {
            runs: Vec::new(),
            copied_pages: 0,
        };
        let mut copied = copied.iter().copied().peekable();
        let mut removed = removed.iter().copied().peekable();
        let mut at = 0;
        while at < total_pages {
            while copied.next_if(|run| end(run) <= at).is_some() {}
            while removed.next_if(|run| end(run) <= at).is_some() {}
            let next_copied = copied.peek().map_or(total_pages, |run| run.first_page);
            let (verdict, until) = match (copied.peek(), removed.peek()) {
                (Some(run), _) if run.first_page <= at => (Verdict::Copied, end(run)),
                (_, Some(run)) if run.first_page <= at => {
                    (Verdict::Removed, end(run).min(next_copied))
                }
                (_, next) => (
                    otherwise,
                    next_copied.min(next.map_or(total_pages, |run| run.first_page)),
                ),
            };
            plan.push(at, until.min(total_pages), verdict);
            at = until;
        }
        plan
    }

    fn push(&mut self, first: u64, end: u64, verdict: Verdict) {
        if first >= end {
            return;
        }
        let count = end - first;
        if verdict == Verdict::Copied {
            self.copied_pages += count;
        }
        match self.runs.last_mut() {
            Some((run, last)) if *last == verdict => run.pages += count,
            _ => self.runs.push((
                PageRun {
                    first_page: first,
                    pages: count,
                },
                verdict,
            )),
        }
    }

    /// Copies the planned pages out of `memory`.
    ///
    /// # Errors
    /// What the system says when the memfd cannot be read, or there is no room for the copy.
    pub(crate) fn copy_from(self, memory: &File) -> std::io::Result<CapturedMemory> {
        let len = usize::try_from(self.copied_pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_SIZE))
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        // Asked first, because the allocation below ends the process where there is no room.
        Vec::<u8>::new()
            .try_reserve_exact(len)
            .map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        // Zero pages that the kernel hands out at first touch: by both copying threads, instead of
        // by one that clears them all while the guest stands still.
        let mut bytes = vec![0; len];
        copy_in_parallel(memory, &self.runs, &mut bytes)?;
        Ok(CapturedMemory { plan: self, bytes })
    }
}

/// One piece of the copy: where it comes from, where it goes.
struct Piece<'a> {
    offset: u64,
    into: &'a mut [u8],
}

fn copy_in_parallel(
    memory: &File,
    runs: &[(PageRun, Verdict)],
    mut bytes: &mut [u8],
) -> std::io::Result<()> {
    let mut pieces = Vec::new();
    for (run, _) in runs
        .iter()
        .filter(|(_, verdict)| *verdict == Verdict::Copied)
    {
        let mut offset = run.first_page * PAGE_SIZE as u64;
        let mut left = to_len(run.pages)?;
        while left > 0 {
            let (into, rest) = std::mem::take(&mut bytes).split_at_mut(left.min(COPY_CHUNK_BYTES));
            bytes = rest;
            left -= into.len();
            let from = offset;
            offset += into.len() as u64;
            pieces.push(Piece { offset: from, into });
        }
    }
    // Round robin: long runs are cut into chunks, so both hands get the same.
    let mut hands: Vec<Vec<Piece<'_>>> = (0..COPY_THREADS).map(|_| Vec::new()).collect();
    for (at, piece) in pieces.into_iter().enumerate() {
        hands[at % COPY_THREADS].push(piece);
    }
    std::thread::scope(|scope| {
        let copying: Vec<_> = hands
            .into_iter()
            .map(|hand| {
                scope.spawn(move || {
                    hand.into_iter()
                        .try_for_each(|piece| memory.read_exact_at(piece.into, piece.offset))
                })
            })
            .collect();
        copying.into_iter().try_for_each(|copy| {
            copy.join()
                .unwrap_or_else(|_| Err(std::io::Error::other("a copying thread panicked")))
        })
    })
}

fn to_len(pages: u64) -> std::io::Result<usize> {
    usize::try_from(pages)
        .ok()
        .and_then(|pages| pages.checked_mul(PAGE_SIZE))
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::OutOfMemory))
}

/// The copy: everything that a build needs of the guest's memory. The guest may go on.
pub(crate) struct CapturedMemory {
    plan: CapturePlan,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for CapturedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapturedMemory")
            .field("bytes", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl CapturedMemory {
    /// Gives every page to the writer of a build's memory, in page order.
    ///
    /// # Errors
    /// What the writer says, a full disk for instance.
    pub(crate) fn write_to(&self, writer: &mut LayerWriter) -> Result<(), torpor_build::Error> {
        let mut bytes = self.bytes.as_slice();
        for (run, verdict) in &self.plan.runs {
            let content = match verdict {
                Verdict::Parent => PageContent::Parent,
                Verdict::Removed => PageContent::Removed,
                Verdict::Copied => {
                    let len = usize::try_from(run.pages)
                        .unwrap_or(usize::MAX)
                        .saturating_mul(PAGE_SIZE);
                    let (data, rest) = bytes.split_at(len.min(bytes.len()));
                    bytes = rest;
                    PageContent::Data(data)
                }
            };
            writer.push(run.first_page, run.pages, content)?;
        }
        Ok(())
    }
}

/// The runs of pages that a file has data for (an allocated block anywhere in a page counts).
///
/// # Errors
/// What the system says; a file system without SEEK_DATA answers with the whole file, which is
/// right, only slower.
pub(crate) fn present_pages(file: &File, total_pages: u64) -> std::io::Result<Vec<PageRun>> {
    use nix::unistd::{Whence, lseek64};
    let page = PAGE_SIZE as u64;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut at = 0;
    while at < total_pages * page {
        let from = i64::try_from(at).map_err(std::io::Error::other)?;
        let data = match lseek64(file, from, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but holes from here on.
            Err(nix::errno::Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = lseek64(file, data, Whence::SeekHole)?;
        let first = u64::try_from(data).map_err(std::io::Error::other)? / page;
        let last = u64::try_from(hole)
            .map_err(std::io::Error::other)?
            .div_ceil(page)
            .min(total_pages);
        match runs.last_mut() {
            Some(run) if end(run) >= first => run.pages = last - run.first_page,
            _ => runs.push(PageRun {
                first_page: first,
                pages: last.saturating_sub(first),
            }),
        }
        at = last * page;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first_page: u64, pages: u64) -> PageRun {
        PageRun { first_page, pages }
    }

    #[test]
    fn written_beats_removed_and_removed_beats_the_parent() {
        let plan = CapturePlan::tracked(
            20,
            &[pages(4, 2), pages(10, 1)],
            &[pages(3, 5), pages(9, 4)],
        );
        assert_eq!(
            plan.runs,
            [
                (pages(0, 3), Verdict::Parent),
                (pages(3, 1), Verdict::Removed),
                (pages(4, 2), Verdict::Copied),
                (pages(6, 2), Verdict::Removed),
                (pages(8, 1), Verdict::Parent),
                (pages(9, 1), Verdict::Removed),
                (pages(10, 1), Verdict::Copied),
                (pages(11, 2), Verdict::Removed),
                (pages(13, 7), Verdict::Parent),
            ]
        );
        assert_eq!(plan.copied_pages, 3);
    }

    #[test]
    fn holes_of_a_booted_guest_are_removed() {
        let plan = CapturePlan::present(10, &[pages(2, 3)]);
        assert_eq!(
            plan.runs,
            [
                (pages(0, 2), Verdict::Removed),
                (pages(2, 3), Verdict::Copied),
                (pages(5, 5), Verdict::Removed)
            ]
        );
    }

    #[test]
    fn a_plan_covers_every_page_once_whatever_the_sets() {
        use proptest::prelude::*;
        let runs = proptest::collection::vec(0_u8..3, 0..64);
        proptest!(|(verdicts in runs)| {
            let total = verdicts.len() as u64;
            let of = |wanted: u8| -> Vec<PageRun> {
                let mut runs: Vec<PageRun> = Vec::new();
                for (at, verdict) in verdicts.iter().enumerate() {
                    if *verdict == wanted {
                        match runs.last_mut() {
                            Some(run) if end(run) == at as u64 => run.pages += 1,
                            _ => runs.push(pages(at as u64, 1)),
                        }
                    }
                }
                runs
            };
            let plan = CapturePlan::tracked(total, &of(1), &of(2));
            let flat: Vec<u8> = plan.runs.iter().flat_map(|(run, verdict)| {
                let code = match verdict { Verdict::Parent => 0, Verdict::Copied => 1, Verdict::Removed => 2 };
                std::iter::repeat_n(code, usize::try_from(run.pages).unwrap())
            }).collect();
            prop_assert_eq!(flat, verdicts.clone());
        });
    }

    #[test]
    fn a_sparse_file_shows_its_data_and_reading_it_fills_no_hole() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * PAGE_SIZE as u64).unwrap();
        file.write_all_at(&[7; 2 * PAGE_SIZE], 10 * PAGE_SIZE as u64)
            .unwrap();
        file.write_all_at(&[9; 10], 50 * PAGE_SIZE as u64 + 5)
            .unwrap();
        let present = present_pages(&file, 100).unwrap();
        assert_eq!(present, [pages(10, 2), pages(50, 1)]);
        let plan = CapturePlan::tracked(100, &[pages(9, 4)], &[]);
        let captured = plan.copy_from(&file).unwrap();
        assert_eq!(captured.bytes[..PAGE_SIZE], [0; PAGE_SIZE]);
        assert_eq!(captured.bytes[PAGE_SIZE..3 * PAGE_SIZE], [7; 2 * PAGE_SIZE]);
        assert_eq!(present_pages(&file, 100).unwrap(), present);
    }
}
