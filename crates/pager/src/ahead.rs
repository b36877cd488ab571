//! Reads what a resume will want before there is a memory to put it into.
//!
//! A VMM takes tens of milliseconds to start, on one processor. Meanwhile another can read, decode
//! and verify the working set, so that once the memory is there nothing is left to do but copy it.
//! That mostly comes before the guest asks; nobody waits for it.
//!
//! Bounded: at most [`WORKING_SET_PAGES_MAX`] pages are held. They stand in mappings of their own,
//! and each is given back to the host as soon as it is installed: a heap would keep them, and a
//! sandbox lives for long after its resume.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use memmap2::MmapMut;

use crate::bulk::READ_PAGES_MAX;
use crate::machine::Reason;
use crate::page_set::{PageRun, bytes_of_pages};
use crate::service::Service;
use crate::source::{PageSource, SourceKind, runs_of};
use crate::threads::STACK_BYTES;
use crate::working_set::WORKING_SET_PAGES_MAX;

/// Pieces that wait to be installed: those of a whole working set, as two that follow each other have
/// more pages than one may have.
const PIECES_MAX: usize = (2 * WORKING_SET_PAGES_MAX / READ_PAGES_MAX) as usize;

/// How often whoever waits for the next piece looks whether it is still wanted.
const WANTED_LOOK: Duration = Duration::from_millis(5);

/// Pages that are being read, on a thread of their own, for a pager that is yet to start. Dropped, it
/// stops reading.
#[derive(Debug)]
pub struct ReadAhead {
    pieces: Receiver<Piece>,
    reader: Option<JoinHandle<()>>,
}

/// What is installed, and forgotten, together.
#[derive(Debug)]
struct Piece {
    /// In the order in which they were asked for.
    parts: Vec<(PageRun, SourceKind)>,
    /// The data parts' content, one after the other.
    bytes: MmapMut,
}

impl ReadAhead {
    /// Starts to read the base pages `runs` of `source`, in this order. Pages beyond
    /// [`WORKING_SET_PAGES_MAX`], and those behind a read that fails, are left to their faults.
    ///
    /// # Errors
    /// The host refuses a thread.
    pub fn start(source: Arc<dyn PageSource>, runs: Vec<PageRun>) -> io::Result<Self> {
        let (sender, pieces) = sync_channel(PIECES_MAX);
        let reader = std::thread::Builder::new()
            .name("pager-read-ahead".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = read_all(&*source, &runs, &sender) {
                    // Nobody waits for these pages; the fault that does will say more.
                    tracing::warn!(%error, "reading ahead ended");
                }
            })?;
        Ok(Self {
            pieces,
            reader: Some(reader),
        })
    }

    /// The thread that reads: for whoever waits for the end of all threads.
    pub(crate) fn take_reader(&mut self) -> Option<JoinHandle<()>> {
        self.reader.take()
    }
}

fn read_all(
    source: &dyn PageSource,
    runs: &[PageRun],
    sender: &SyncSender<Piece>,
) -> io::Result<()> {
    let mut parts = Vec::new();
    let mut pages = 0;
    // Cut where the kind of content changes, and to what a source reads at once.
    let wanted = runs
        .iter()
        .flat_map(|run| runs_of(source, *run, READ_PAGES_MAX));
    for part in within(WORKING_SET_PAGES_MAX, wanted) {
        let (run, _) = part;
        if pages + run.pages > READ_PAGES_MAX {
            let (piece, read) = read_piece(source, std::mem::take(&mut parts))?;
            if sender.send(piece).is_err() {
                return Ok(());
            }
            read?;
            pages = 0;
        }
        pages += run.pages;
        parts.push(part);
    }
    let (last, read) = read_piece(source, parts)?;
    // Who would take it may have gone.
    sender.send(last).ok();
    read
}

fn within(
    mut room_pages: u64,
    parts: impl Iterator<Item = (PageRun, SourceKind)>,
) -> impl Iterator<Item = (PageRun, SourceKind)> {
    parts.map_while(move |(run, kind)| {
        let run = PageRun::new(run.first_page, run.pages.min(room_pages));
        room_pages -= run.pages;
        (run.pages > 0).then_some((run, kind))
    })
}

/// What could be read of these parts, and why not all of them could.
fn read_piece(
    source: &dyn PageSource,
    parts: Vec<(PageRun, SourceKind)>,
) -> io::Result<(Piece, io::Result<()>)> {
    let data = parts.iter().filter(|(_, kind)| *kind == SourceKind::Data);
    let len_bytes = data
        .map(|(run, _)| bytes_of_pages(run.pages))
        .sum::<usize>();
    let mut piece = Piece {
        parts,
        // A mapping cannot be empty.
        bytes: MmapMut::map_anon(len_bytes.max(1))?,
    };
    let mut rest = &mut piece.bytes[..];
    let mut failed = None;
    for (number, (run, kind)) in piece.parts.iter().enumerate() {
        if *kind == SourceKind::Data {
            let (part, after) = rest.split_at_mut(bytes_of_pages(run.pages));
            if let Err(error) = source.read(run.first_page, part) {
                failed = Some((number, error));
                break;
            }
            rest = after;
        }
    }
    let Some((number, error)) = failed else {
        return Ok((piece, Ok(())));
    };
    piece.parts.truncate(number);
    Ok((piece, Err(error)))
}

impl Service {
    /// Installs what is read ahead, as it comes, until all of it is or nobody wants it any more.
    pub(crate) fn install_ahead(&self, ahead: &ReadAhead) {
        while self.wants_ahead() {
            match ahead.pieces.recv_timeout(WANTED_LOOK) {
                Ok(piece) => self.install_piece(piece),
                // A source may hang; nobody who stops the pager waits for it here.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn wants_ahead(&self) -> bool {
        let state = self.lock_when_calm();
        state.ahead_wanted && !state.stopping && !state.vmm_gone
    }

    fn install_piece(&self, piece: Piece) {
        let mut rest = &piece.bytes[..];
        for (run, kind) in piece.parts {
            if !self.wants_ahead() {
                return;
            }
            let content = match kind {
                SourceKind::Zero => None,
                SourceKind::Data => {
                    let (content, after) = rest.split_at(bytes_of_pages(run.pages));
                    rest = after;
                    Some(content)
                }
            };
            self.install_inside(run, content);
        }
    }

    /// The parts of a run that lie in the guest's memory. No content: zeros.
    pub(crate) fn install_inside(&self, run: PageRun, content: Option<&[u8]>) {
        let mut rest = run;
        while let Some(inside) = self.first_inside(rest) {
            match content {
                None => self.prefetch_zeros(inside),
                Some(bytes) => {
                    let bytes = self
                        .sizes
                        .slice(run, inside.first_page, inside.pages, bytes);
                    self.fill(inside, bytes, Reason::Prefetch);
                }
            }
            rest = PageRun::new(inside.end_page(), run.end_page() - inside.end_page());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::*;
    use crate::page_set::PAGE_SIZE;
    use crate::source::SourceRun;

    /// Each page holds its number; every tenth run of ten pages is zero.
    #[derive(Default)]
    struct Numbers {
        reads: AtomicU64,
        fails_from: Option<u64>,
        held: AtomicBool,
    }

    impl PageSource for Numbers {
        fn run_at(&self, page: u64) -> SourceRun {
            let kind = match page / 10 % 10 {
                9 => SourceKind::Zero,
                _ => SourceKind::Data,
            };
            SourceRun {
                pages: 10 - page % 10,
                kind,
            }
        }

        fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            while self.held.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            if self.fails_from.is_some_and(|from| first_page >= from) {
                return Err(io::ErrorKind::Other.into());
            }
            for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
                bytes[..8].copy_from_slice(&page.to_le_bytes());
            }
            Ok(())
        }
    }

    /// Each page's number, and what stands first in it.
    fn pages_of(ahead: &ReadAhead) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        for piece in &ahead.pieces {
            let mut pages = piece.bytes.chunks(PAGE_SIZE);
            for (run, kind) in piece.parts {
                for page in run.first_page..run.end_page() {
                    let number = match kind {
                        SourceKind::Zero => 0,
                        SourceKind::Data => {
                            let bytes = pages.next().unwrap();
                            u64::from_le_bytes(bytes[..8].try_into().unwrap())
                        }
                    };
                    found.push((page, number));
                }
            }
        }
        found
    }

    #[test]
    fn pages_come_in_the_order_asked_for_with_their_content() {
        let runs = vec![
            PageRun::new(5000, 700),
            PageRun::new(85, 10),
            PageRun::new(3, 1),
        ];
        let asked = runs
            .iter()
            .flat_map(|run| run.first_page..run.end_page())
            .map(|page| (page, if page / 10 % 10 == 9 { 0 } else { page }))
            .collect::<Vec<_>>();
        let ahead = ReadAhead::start(Arc::new(Numbers::default()), runs).unwrap();
        assert_eq!(pages_of(&ahead), asked);
    }

    #[test]
    fn no_more_is_held_than_a_working_set() {
        let runs = vec![PageRun::new(0, 20), PageRun::new(100_000, u64::MAX / 2)];
        let ahead = ReadAhead::start(Arc::new(Numbers::default()), runs).unwrap();
        let pages = pages_of(&ahead);
        assert_eq!(pages.len() as u64, WORKING_SET_PAGES_MAX);
        assert_eq!(pages[20].0, 100_000);
    }

    #[test]
    fn what_lies_behind_a_failed_read_is_left_out_and_nothing_before_it() {
        let source = Numbers {
            fails_from: Some(5000),
            ..Numbers::default()
        };
        let runs = vec![
            PageRun::new(100, 300),
            PageRun::new(5000, 10),
            PageRun::new(1, 1),
        ];
        let ahead = ReadAhead::start(Arc::new(source), runs).unwrap();
        assert_eq!(pages_of(&ahead).len(), 300);
    }

    #[test]
    fn reading_ends_when_nobody_wants_it() {
        let source = Arc::new(Numbers {
            held: AtomicBool::new(true),
            ..Numbers::default()
        });
        let runs = vec![PageRun::new(0, WORKING_SET_PAGES_MAX)];
        drop(ReadAhead::start(source.clone(), runs).unwrap());
        source.held.store(false, Ordering::Release);
        // The thread holds the source for as long as it reads.
        while Arc::strong_count(&source) > 1 {
            std::thread::yield_now();
        }
        let reads = source.reads.load(Ordering::Relaxed);
        assert!(reads <= READ_PAGES_MAX / 10, "{reads}");
    }
}
