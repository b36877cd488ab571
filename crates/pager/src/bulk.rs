//! Many pages at once: neighbours of a fault, and what is brought in ahead.
//!
//! Nobody waits for any of it, so it gives way: it takes the lock for 64 KiB at a time, when no
//! fault wants it, asks anew before each copy what is still absent, and gives up where the kernel
//! puts it off for long. A run of zeros is never read from the source.
//!
//! The windows around faults whose content is at hand are filled by the reader, out of the
//! [`Backlog`]; those whose content must be read, and what is prefetched, by the thread that
//! reads it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::error::PagerFailure;
use crate::kernel::ZERO_PAGES_MAX;
use crate::machine::{Need, Reason};
use crate::page_set::{PAGE_SIZE, PageRun};
use crate::service::{AGAIN_PAUSE, Service, State};
use crate::source::{Content, SourceKind, runs_of};
use crate::uffd::Filled;

/// The longest read that a source is asked for: 1 MiB. Long enough for storage to reach its
/// bandwidth, short enough that a buffer of it costs nothing.
pub const READ_PAGES_MAX: u64 = 256;

/// Pages installed while the lock is held: 256 KiB, some 80 µs. A fault waits for that at most,
/// and only while another thread walks through memory.
pub const FILL_PAGES_MAX: u64 = 64;

/// The same where nobody is known to want them all: 64 KiB, some 20 µs.
const FILL_PAGES_MIN: u64 = 16;

const _: () = assert!(ZERO_PAGES_MAX == FILL_PAGES_MIN, "zeros come in one size");
const _: () = assert!(FILL_PAGES_MAX <= READ_PAGES_MAX);

/// Pieces of content at hand that one piece of a window may consist of. Each may have to be decoded
/// (a build whose pages stand apart: 15 µs for a frame), and no event is read meanwhile; what is
/// left of the piece has its turn after the next look at the events.
const AT_HAND_MAX: u32 = 4;

/// Windows that wait to be filled. Each belongs to a fault that has been answered, so that only
/// as many threads as a VMM has can be in want of them; the oldest is dropped for a new one.
const BACKLOG_WINDOWS_MAX: usize = 64;

/// Attempts at a read of the source. With the pauses below a source has half a second to recover.
pub(crate) const SOURCE_ATTEMPTS: u32 = 4;

/// The pause before the second attempt; each further one is ten times as long.
pub(crate) const SOURCE_PAUSE: Duration = Duration::from_millis(5);

/// Times that a bulk fill is tried again at one place before it is dropped (nobody waits for it):
/// a fifth of a second.
const BULK_AGAIN_MAX: u32 = 1000;

/// How a bulk fill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bulk {
    Done,
    /// The kernel put it off at this page.
    Again(u64),
    /// The VMM has gone, or the pager has failed.
    Over,
}

/// A window around a fault, or what is left of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) run: PageRun,
    /// How much of it is installed at once. Its thread catches up with the filling once for each
    /// piece, and sleeps: a window that has grown, for a thread that walks through it, is filled in
    /// larger ones, to its end.
    pub(crate) piece_pages: u64,
}

impl Window {
    fn new(run: PageRun) -> Self {
        Self {
            run,
            piece_pages: (run.pages / 4).clamp(FILL_PAGES_MIN, FILL_PAGES_MAX),
        }
    }

    /// What is left of it from this page on.
    pub(crate) fn rest_from(self, page: u64) -> Self {
        let run = PageRun::new(page, self.run.end_page().saturating_sub(page));
        Self { run, ..self }
    }
}

/// Windows around faults that the reader fills when no fault waits.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    windows: VecDeque<Window>,
}

impl Backlog {
    pub(crate) fn push(&mut self, run: PageRun) {
        if run.pages > 1 {
            self.push_last(Window::new(run));
        }
    }

    fn push_last(&mut self, window: Window) {
        if self.windows.len() >= BACKLOG_WINDOWS_MAX {
            self.windows.pop_front();
        }
        self.windows.push_back(window);
    }

    /// A piece of the window whose turn it is.
    fn next_piece(&mut self) -> Option<Window> {
        let window = self.windows.pop_front()?;
        let pages = window.run.pages.min(window.piece_pages);
        let run = PageRun::new(window.run.first_page, pages);
        if window.run.pages > pages {
            self.push_last(window.rest_from(run.end_page()));
        }
        Some(Window { run, ..window })
    }

    /// Takes out the window that holds this page, if one does: its thread has caught up with the
    /// filling. Returns what is left of it from the page on; what lies before it stays.
    pub(crate) fn claim(&mut self, page: u64) -> Option<Window> {
        let holds =
            |window: &Window| (window.run.first_page..window.run.end_page()).contains(&page);
        let window = self.windows.remove(self.windows.iter().position(holds)?)?;
        let before = PageRun::new(window.run.first_page, page - window.run.first_page);
        if before.pages > 0 {
            self.push_last(Window {
                run: before,
                ..window
            });
        }
        Some(window.rest_from(page))
    }

    /// A window whose turn is now.
    pub(crate) fn push_next(&mut self, window: Window) {
        if window.run.pages > 0 {
            self.windows.push_front(window);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    pub(crate) fn drop_overlapping(&mut self, run: PageRun) {
        self.windows
            .retain(|window| window.run.clipped_to(run).is_none());
    }
}

impl Service {
    /// Fills a piece of the windows around recent faults, with what is at hand. Returns its length.
    pub(crate) fn fill_around(&self, state: &mut State) -> u64 {
        let Some(window) = state.backlog.next_piece() else {
            return 0;
        };
        let piece = window.run;
        let mut at = piece.first_page;
        let mut asked = 0;
        while at < piece.end_page() {
            let rest = PageRun::new(at, piece.end_page() - at);
            let filled = match state.machine.need(at) {
                Need::Nothing => Ok(1),
                Need::Zero => self.fill_zero_run(state, rest, Reason::Neighbour),
                Need::Source => match self.source.run_at(at).kind {
                    SourceKind::Zero => self.fill_zero_run(state, rest, Reason::Neighbour),
                    SourceKind::Data if asked == AT_HAND_MAX => {
                        state.backlog.push_next(window.rest_from(at));
                        return at - piece.first_page;
                    }
                    SourceKind::Data => {
                        asked += 1;
                        self.fill_data_at_hand(state, rest)
                    }
                },
            };
            match filled {
                Ok(pages) => at += pages,
                // A kindness: not worth waiting for.
                Err(_) => break,
            }
        }
        piece.pages
    }

    /// Copies the absent data pages at a run's start, all of them or none. Returns how many pages
    /// of the run are dealt with.
    fn fill_data_at_hand(&self, state: &mut State, run: PageRun) -> Result<u64, Bulk> {
        let pages = self.source.run_at(run.first_page).pages.min(run.pages);
        let data = PageRun::new(run.first_page, pages);
        let Some(absent) = state.machine.next_absent(data, Need::Source) else {
            return Ok(pages);
        };
        let buf = state.scratch.first(self.sizes.bytes(absent.pages));
        let filled = self
            .source
            .at_hand(absent, buf)
            .map(|content| self.kernel.copy(absent.first_page, content, true));
        match filled {
            None | Some(Ok(Filled::Missing)) => Ok(absent.pages),
            Some(filled) => {
                self.bulk_filled(state, absent, filled, SourceKind::Data, Reason::Neighbour)
            }
        }
    }

    /// The run of the source's data pages around a page, inside its window.
    pub(crate) fn data_span(&self, page: u64, window: PageRun) -> PageRun {
        let holds = |(run, kind): &(PageRun, SourceKind)| {
            *kind == SourceKind::Data && (run.first_page..run.end_page()).contains(&page)
        };
        // One read brings the page; the rest of a long window is left to its own faults.
        let most = self.sizes.read_pages_max;
        let near = PageRun::new(page - page % most, most);
        runs_of(&*self.source, window, window.pages.max(1))
            .find(holds)
            .and_then(|(data, _)| data.clipped_to(near))
            .unwrap_or(PageRun::new(page, 1))
    }

    /// From the first to the last page of a run that is still to come from the source.
    pub(crate) fn absent_part(&self, run: PageRun) -> Option<PageRun> {
        let state = self.lock_when_calm();
        let absent = |page: &u64| state.machine.need(*page) == Need::Source;
        let first_page = (run.first_page..run.end_page()).find(absent)?;
        let last_page = (run.first_page..run.end_page()).rev().find(absent)?;
        Some(PageRun::new(first_page, last_page + 1 - first_page))
    }

    /// Reads from the source, in so many attempts at most. `Err(None)`: the pager stops.
    pub(crate) fn read(
        &self,
        run: PageRun,
        attempts: u32,
        buf: &mut Vec<u8>,
    ) -> Result<(), Option<PagerFailure>> {
        let len_bytes = self.sizes.bytes(run.pages.min(self.sizes.read_pages_max));
        buf.resize(len_bytes, 0);
        let mut pause = self.source_pause;
        for attempt in 1..=attempts {
            match self.source.read(run.first_page, buf) {
                Ok(()) => return Ok(()),
                Err(error) if attempt == attempts => {
                    return Err(Some(PagerFailure::Source {
                        page: run.first_page,
                        attempts,
                        source: Arc::new(error),
                    }));
                }
                Err(error) => {
                    tracing::warn!(page = run.first_page, attempt, %error, "source read failed");
                    self.lock().counters.stats.source_retries += 1;
                    if !self.pause(pause) {
                        return Err(None);
                    }
                    pause *= 10;
                }
            }
        }
        Err(None)
    }

    /// Installs what is still absent of a run whose content is in `data`.
    pub(crate) fn fill(&self, run: PageRun, data: &[u8], reason: Reason) {
        let mut from = run.first_page;
        for _ in 0..BULK_AGAIN_MAX {
            let rest = PageRun::new(from, run.end_page() - from);
            match self.fill_some(rest, self.sizes.slice(run, from, rest.pages, data), reason) {
                Bulk::Done | Bulk::Over => return,
                // Neighbours are a kindness: not worth waiting for.
                Bulk::Again(_) if reason == Reason::Neighbour => return,
                Bulk::Again(page) => {
                    from = page;
                    if !self.pause(AGAIN_PAUSE) {
                        return;
                    }
                    self.drain_for_others(&mut self.lock());
                }
            }
        }
    }

    fn fill_some(&self, run: PageRun, data: &[u8], reason: Reason) -> Bulk {
        let mut from = run.first_page;
        while from < run.end_page() {
            let piece = PageRun::new(from, FILL_PAGES_MAX.min(run.end_page() - from));
            let mut state = self.lock_when_calm();
            if state.stopping || state.vmm_gone {
                return Bulk::Over;
            }
            let mut rest = piece;
            while let Some(absent) = state.machine.next_absent(rest, Need::Source) {
                let content = self.sizes.slice(run, absent.first_page, absent.pages, data);
                let content = Content::Bytes(content);
                let filled = self.kernel.copy(absent.first_page, content, true);
                match self.bulk_filled(&mut state, absent, filled, SourceKind::Data, reason) {
                    Ok(pages) => {
                        let next_page = absent.first_page + pages;
                        rest = PageRun::new(next_page, piece.end_page() - next_page);
                    }
                    Err(end) => return end,
                }
            }
            from = piece.end_page();
        }
        Bulk::Done
    }

    /// Installs zeros where the run (a piece) needs them, under the caller's lock. Discarded pages
    /// are filled only around a fault: ahead of one they are to stay as empty as the guest wanted
    /// them.
    fn fill_zeros(&self, state: &mut State, run: PageRun, reason: Reason) -> Bulk {
        let mut at = run.first_page;
        while at < run.end_page() {
            let rest = PageRun::new(at, run.end_page() - at);
            match self.fill_zero_run(state, rest, reason) {
                Ok(pages) => at += pages,
                Err(end) => return end,
            }
        }
        Bulk::Done
    }

    /// Installs the zeros at a run's start. Returns how many pages are dealt with.
    fn fill_zero_run(&self, state: &mut State, run: PageRun, reason: Reason) -> Result<u64, Bulk> {
        let zeros = (run.first_page..run.end_page())
            .take_while(|page| self.zero_wanted(state, *page, reason))
            .count() as u64;
        if zeros == 0 {
            return Ok(1);
        }
        let zeros = PageRun::new(run.first_page, zeros.min(self.sizes.zero_pages_max));
        let filled = self
            .kernel
            .zero(zeros, !self.zeros_count_as_written(), false);
        self.bulk_filled(state, zeros, filled, SourceKind::Zero, reason)
    }

    fn zero_wanted(&self, state: &State, page: u64, reason: Reason) -> bool {
        match state.machine.need(page) {
            Need::Nothing => false,
            Need::Zero => reason == Reason::Neighbour,
            Need::Source => self.source.run_at(page).kind == SourceKind::Zero,
        }
    }

    /// A fill that nobody waited for has ended so. Returns how many pages are dealt with.
    fn bulk_filled(
        &self,
        state: &mut State,
        run: PageRun,
        filled: std::io::Result<Filled>,
        content: SourceKind,
        reason: Reason,
    ) -> Result<u64, Bulk> {
        match filled {
            Ok(Filled::Bytes(bytes)) => {
                let pages = (bytes / self.sizes.page_bytes).clamp(1, run.pages);
                let filled = PageRun::new(run.first_page, pages);
                self.count(state, filled, content, reason);
                if content == SourceKind::Zero && self.zeros_count_as_written() {
                    for page in filled.first_page..filled.end_page() {
                        state.machine.installed_open(page);
                    }
                }
                // The kernel has woken whoever waited there.
                if state.machine.waiting().0 > 0 {
                    (filled.first_page..filled.end_page())
                        .for_each(|page| self.finish(state, page));
                }
                Ok(pages)
            }
            Ok(Filled::Exists) => {
                state.machine.found(run.first_page, reason);
                self.wake_and_finish(state, run.first_page);
                Ok(1)
            }
            Ok(Filled::Again) => {
                state.counters.stats.eagain += 1;
                Err(Bulk::Again(run.first_page))
            }
            Ok(Filled::Gone) => {
                self.vmm_gone(state);
                Err(Bulk::Over)
            }
            Ok(Filled::Missing) => {
                let error = std::io::Error::from_raw_os_error(libc::EFAULT);
                self.fail_kernel("install pages", run.first_page, error);
                Err(Bulk::Over)
            }
            Err(error) => {
                self.fail_kernel("install pages", run.first_page, error);
                Err(Bulk::Over)
            }
        }
    }

    /// Reads events on a thread other than the reader, and lets the reader watch what came.
    pub(crate) fn drain_for_others(&self, state: &mut State) {
        let (before, _) = state.machine.waiting();
        self.drain(state);
        if before == 0 && state.machine.waiting().0 > 0 {
            self.kernel.nudge();
        } else {
            self.nudge_if_left(state);
        }
    }

    // Prefetch

    /// Brings in the next piece of the prefetch queue. `false`: there is none (any more).
    pub(crate) fn prefetch_some(&self, buf: &mut Vec<u8>) -> bool {
        let Some((run, kind)) = self.next_prefetch() else {
            return false;
        };
        match kind {
            SourceKind::Zero => self.prefetch_zeros(run),
            SourceKind::Data => {
                let Some(absent) = self.absent_part(run) else {
                    return true;
                };
                match self.read(absent, SOURCE_ATTEMPTS, buf) {
                    Ok(()) => self.fill(absent, buf, Reason::Prefetch),
                    Err(failure) => {
                        // Nobody waits for these pages; the fault that does will say more.
                        if let Some(failure) = failure {
                            tracing::warn!(%failure, "prefetch dropped");
                        }
                        self.lock().prefetch.clear();
                    }
                }
            }
        }
        true
    }

    /// Takes the next piece that is all of one kind, in one region, and not too long.
    fn next_prefetch(&self) -> Option<(PageRun, SourceKind)> {
        let mut state = self.lock_when_calm();
        while !state.stopping && !state.vmm_gone {
            let Some(wanted) = state.prefetch.pop_front() else {
                break;
            };
            let Some((run, kind)) = self.first_inside(wanted).and_then(|inside| {
                runs_of(&*self.source, inside, self.sizes.read_pages_max).next()
            }) else {
                continue;
            };
            if wanted.end_page() > run.end_page() {
                let rest = PageRun::new(run.end_page(), wanted.end_page() - run.end_page());
                state.prefetch.push_front(rest);
            }
            return Some((run, kind));
        }
        state.prefetcher_runs = false;
        None
    }

    /// The first part of a run that lies in one region of the guest's memory.
    pub(crate) fn first_inside(&self, run: PageRun) -> Option<PageRun> {
        (run.first_page..run.end_page()).find_map(|page| {
            let rest = PageRun::new(page, run.end_page() - page);
            rest.clipped_to(self.kernel.region_around(page)?)
        })
    }

    pub(crate) fn prefetch_zeros(&self, run: PageRun) {
        let mut from = run.first_page;
        let mut again_left = BULK_AGAIN_MAX;
        while from < run.end_page() {
            let piece = PageRun::new(from, self.sizes.zero_pages_max.min(run.end_page() - from));
            let mut state = self.lock_when_calm();
            match self.fill_zeros(&mut state, piece, Reason::Prefetch) {
                Bulk::Done => from = piece.end_page(),
                Bulk::Over => return,
                Bulk::Again(page) => {
                    self.drain_for_others(&mut state);
                    drop(state);
                    from = page;
                    again_left -= 1;
                    if again_left == 0 || !self.pause(AGAIN_PAUSE) {
                        return;
                    }
                }
            }
        }
    }
}

/// A buffer that only grows. What is in it is what was left there.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    bytes: Vec<u8>,
}

impl Scratch {
    /// Room for so many bytes.
    pub(crate) fn first(&mut self, len_bytes: usize) -> &mut [u8] {
        if self.bytes.len() < len_bytes {
            // Not resized: pages of it that nobody fills (content that is lent instead) are then
            // never touched.
            self.bytes = vec![0; len_bytes];
        }
        &mut self.bytes[..len_bytes]
    }
}

/// How large the guest's pages are, and how many of them are dealt with at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) page_bytes: u64,
    /// In one read of the source.
    pub(crate) read_pages_max: u64,
    /// Zeros in one call.
    pub(crate) zero_pages_max: u64,
}

impl Sizes {
    pub(crate) fn of_pages(page_bytes: u64) -> Self {
        let base_pages = page_bytes / PAGE_SIZE as u64;
        Self {
            page_bytes,
            read_pages_max: (READ_PAGES_MAX / base_pages).max(1),
            zero_pages_max: (ZERO_PAGES_MAX / base_pages).max(1),
        }
    }

    pub(crate) fn bytes(&self, pages: u64) -> usize {
        usize::try_from(pages * self.page_bytes).unwrap_or(usize::MAX)
    }

    /// The bytes of some pages in a buffer that starts at the first page of `whole`.
    pub(crate) fn slice<'a>(
        &self,
        whole: PageRun,
        first_page: u64,
        pages: u64,
        data: &'a [u8],
    ) -> &'a [u8] {
        let start = self.bytes(first_page - whole.first_page);
        &data[start..start + self.bytes(pages)]
    }
}
