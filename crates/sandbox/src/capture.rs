//! Capture: takes what the next build needs out of the stopped guest's memory, fast.
//!
//! The vCPUs stand still meanwhile, so this only *copies*: comparing with the parent, compressing
//! and writing come after, from the copy. ([`torpor_build`] decides there what is a zero page, the
//! parent's page or data.)
//!
//! Invariants:
//! - Memory is read by a [`GuestReader`], and of memory that is private to its VMM only what is
//!   present: anything else would bring pages in.
//! - A plan covers every page exactly once, in page order.
//! - What a page is follows from the scan and the dirty set alone: *free* beats everything (nobody
//!   owns the content), *written* beats *removed* (a page that was given back and then used again
//!   is in use), *removed* beats the parent, everything else is as the parent has it. That a
//!   page of a lazily resumed guest is absent means nothing by itself.

use std::ops::Range;

use memmap2::MmapMut;
use torpor_build::{LayerWriter, PAGE_SIZE, PageContent, PageRun};
use torpor_vmm::{GuestReader, memory_available};

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
    /// Free by the guest's own metadata.
    Free,
    /// Given back by the guest (or, in a booted guest, never touched).
    Removed,
    /// Copied.
    Copied,
}

/// What has become of a guest's memory since its parent build. All runs in page order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Pages whose bytes may be new.
    pub(crate) written: Vec<PageRun>,
    /// Pages that the guest gave back; some of them may have been written later.
    pub(crate) removed: Vec<PageRun>,
    /// What holds for all others.
    otherwise: Verdict,
}

impl Changes {
    /// Of a guest whose changes were tracked since its resume.
    #[must_use]
    pub(crate) fn tracked(written: Vec<PageRun>, removed: Vec<PageRun>) -> Self {
        Self {
            written,
            removed,
            otherwise: Verdict::Parent,
        }
    }

    /// Of a guest without tracking (booted, or filled before it started): what is present may be
    /// new, all else is absent and reads as zero.
    #[must_use]
    pub(crate) fn present(present: Vec<PageRun>) -> Self {
        Self {
            written: present,
            removed: Vec::new(),
            otherwise: Verdict::Removed,
        }
    }

    /// What must be copied, now that the pages in `free` (in page order) are known to be nobody's.
    #[must_use]
    pub(crate) fn plan(&self, total_pages: u64, free: &[PageRun]) -> CapturePlan {
        let by_precedence = [
            (free, Verdict::Free),
            (self.written.as_slice(), Verdict::Copied),
            (self.removed.as_slice(), Verdict::Removed),
        ];
        CapturePlan::new(total_pages, by_precedence, self.otherwise)
    }
}

/// Which pages are copied and what holds for the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CapturePlan {
    runs: Vec<(PageRun, Verdict)>,
    copied_pages: u64,
}

impl CapturePlan {
    /// The first set that holds a page decides.
    fn new(
        total_pages: u64,
        by_precedence: [(&[PageRun], Verdict); 3],
        otherwise: Verdict,
    ) -> Self {
        let mut plan = Self {
            runs: Vec::new(),
            copied_pages: 0,
        };
        let mut sets = by_precedence.map(|(runs, verdict)| (runs.iter().peekable(), verdict));
        let mut at = 0;
        while at < total_pages {
            let (mut verdict, mut until) = (otherwise, total_pages);
            for (runs, of_set) in &mut sets {
                while runs.next_if(|run| end(run) <= at).is_some() {}
                match runs.peek() {
                    Some(run) if run.first_page <= at => {
                        (verdict, until) = (*of_set, until.min(end(run)));
                        break;
                    }
                    // From there on this set decides.
                    Some(run) => until = until.min(run.first_page),
                    None => {}
                }
            }
            plan.push(at, until, verdict);
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
    /// What the system says when the memory cannot be read, or there is no room for the copy.
    pub(crate) fn copy_from(self, memory: &GuestReader) -> std::io::Result<CapturedMemory> {
        let len = usize::try_from(self.copied_pages)
            .ok()
            .and_then(|pages| pages.checked_mul(PAGE_SIZE))
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        check_room(len as u64, memory_available()?)?;
        // Zero pages that the kernel hands out at first touch: by both copying threads, instead of
        // by one that clears them all while the guest stands still. (Not huge ones: on a host whose
        // memory is in pieces, making them took longer than all the copying.) A mapping has at least a
        // byte.
        let mut bytes = MmapMut::map_anon(len.max(1))?;
        copy_in_parallel(memory, &self.runs, &mut bytes[..len])?;
        Ok(CapturedMemory { plan: self, bytes })
    }
}

/// Refuses a copy that the host has no memory for: the kernel would grant it, and kill somebody when it is
/// filled; the guest itself, as a rule.
fn check_room(needed_bytes: u64, available_bytes: Option<u64>) -> std::io::Result<()> {
    match available_bytes {
        Some(available) if available < needed_bytes => Err(std::io::Error::new(
            std::io::ErrorKind::OutOfMemory,
            format!(
                "the copy takes {} MiB, and the host has {} MiB left; end or pause other sandboxes first",
                needed_bytes >> 20,
                available >> 20
            ),
        )),
        _ => Ok(()),
    }
}

/// One piece of the copy: where it comes from, where it goes.
struct Piece<'a> {
    offset: u64,
    into: &'a mut [u8],
}

fn copy_in_parallel(
    memory: &GuestReader,
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
    bytes: MmapMut,
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
        let mut bytes = &self.bytes[..];
        for (run, verdict) in &self.plan.runs {
            let content = match verdict {
                Verdict::Parent => PageContent::Parent,
                Verdict::Free => PageContent::Free,
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

/// The runs of pages that the host holds.
///
/// # Errors
/// What the system says.
pub(crate) fn present_pages(memory: &GuestReader) -> std::io::Result<Vec<PageRun>> {
    Ok(memory.present()?.iter().map(page_run).collect())
}

/// A stretch of whole pages in bytes, in pages.
pub(crate) fn page_run(bytes: &Range<u64>) -> PageRun {
    let page = PAGE_SIZE as u64;
    PageRun {
        first_page: bytes.start / page,
        pages: (bytes.end - bytes.start) / page,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first_page: u64, pages: u64) -> PageRun {
        PageRun { first_page, pages }
    }

    #[test]
    fn written_beats_removed_and_removed_beats_the_parent() {
        let changes = Changes::tracked(
            vec![pages(4, 2), pages(10, 1)],
            vec![pages(3, 5), pages(9, 4)],
        );
        let plan = changes.plan(20, &[]);
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
    fn a_copy_that_the_host_has_no_memory_for_is_refused() {
        check_room(1 << 30, Some(1 << 30)).unwrap();
        check_room(1 << 30, None).unwrap();
        let error = check_room(3 << 30, Some(1 << 30)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::OutOfMemory);
        let text = error.to_string();
        assert!(
            text.contains("3072 MiB") && text.contains("1024 MiB"),
            "{text}"
        );
    }

    #[test]
    fn a_free_page_is_free_whatever_was_done_with_it() {
        let changes = Changes::tracked(vec![pages(2, 4)], vec![pages(5, 3)]);
        let plan = changes.plan(10, &[pages(1, 2), pages(5, 2), pages(9, 1)]);
        assert_eq!(
            plan.runs,
            [
                (pages(0, 1), Verdict::Parent),
                (pages(1, 2), Verdict::Free),
                (pages(3, 2), Verdict::Copied),
                (pages(5, 2), Verdict::Free),
                (pages(7, 1), Verdict::Removed),
                (pages(8, 1), Verdict::Parent),
                (pages(9, 1), Verdict::Free),
            ]
        );
        assert_eq!(plan.copied_pages, 2);
    }

    #[test]
    fn holes_of_a_booted_guest_are_removed() {
        let plan = Changes::present(vec![pages(2, 3)]).plan(10, &[]);
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
        // Each page's bits: free, written, removed.
        let sets = proptest::collection::vec(0_u8..8, 0..64);
        proptest!(|(sets in sets)| {
            let total = sets.len() as u64;
            let of = |bit: u8| -> Vec<PageRun> {
                let mut runs: Vec<PageRun> = Vec::new();
                for (at, bits) in sets.iter().enumerate() {
                    if bits & bit != 0 {
                        match runs.last_mut() {
                            Some(run) if end(run) == at as u64 => run.pages += 1,
                            _ => runs.push(pages(at as u64, 1)),
                        }
                    }
                }
                runs
            };
            let plan = Changes::tracked(of(2), of(4)).plan(total, &of(1));
            let flat: Vec<Verdict> = plan.runs.iter().flat_map(|(run, verdict)| {
                std::iter::repeat_n(*verdict, usize::try_from(run.pages).unwrap())
            }).collect();
            let expected: Vec<Verdict> = sets.iter().map(|bits| match bits {
                bits if bits & 1 != 0 => Verdict::Free,
                bits if bits & 2 != 0 => Verdict::Copied,
                bits if bits & 4 != 0 => Verdict::Removed,
                _ => Verdict::Parent,
            }).collect();
            prop_assert_eq!(flat, expected);
        });
    }

    #[test]
    fn a_sparse_file_shows_its_data_and_reading_it_fills_no_hole() {
        use std::os::unix::fs::FileExt as _;
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * PAGE_SIZE as u64).unwrap();
        file.write_all_at(&[7; 2 * PAGE_SIZE], 10 * PAGE_SIZE as u64)
            .unwrap();
        file.write_all_at(&[9; 10], 50 * PAGE_SIZE as u64 + 5)
            .unwrap();
        let file = GuestReader::Memfd(file);
        let present = present_pages(&file).unwrap();
        assert_eq!(present, [pages(10, 2), pages(50, 1)]);
        let plan = Changes::tracked(vec![pages(9, 4)], vec![]).plan(100, &[]);
        let captured = plan.copy_from(&file).unwrap();
        assert_eq!(captured.bytes[..PAGE_SIZE], [0; PAGE_SIZE]);
        assert_eq!(captured.bytes[PAGE_SIZE..3 * PAGE_SIZE], [7; 2 * PAGE_SIZE]);
        assert_eq!(present_pages(&file).unwrap(), present);
    }
}
