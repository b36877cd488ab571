//! The page states and the faults that wait: events in, decisions out.
//!
//! Pure: no I/O, no locks, no clock of its own. Whoever holds the machine (one lock, see `service`)
//! tells it what the kernel said and what became of each copy; it answers what a page must hold
//! now and which fault is next.
//!
//! ```text
//!                 installed                 written (told or scanned)
//!      Absent ───────────────▶ Present ───────────────────────────▶ Written
//!         │                       │  ▲                                 │
//!         │ discarded   discarded │  │ installed, as zero              │ discarded
//!         └────────────────▶ Removed ◀───────────────────────────────┘
//! ```
//!
//! Invariants
//! - **What a page must hold never depends on whether it is there**: once discarded since the
//!   resume it is zero, before that it is what the source says. So a wrong "present" (the kernel
//!   may drop a page that was installed in the middle of a discard) costs a second fault, never
//!   wrong content.
//! - A missing-page fault is proof that the page was not there a moment ago. A state that says
//!   otherwise gives way.
//! - "Discarded since the resume" outlives the page's being read again; being written since ends
//!   its consequences for a capture, not the bit.
//! - Each fault that is taken in leaves by [`Machine::finish`], after a wake. A page waits once,
//!   however many threads wait for it: a wake is for all of them.
//!
//! Pages are of the size that backs the guest's memory; all of them are of one size.
//!
//! It does not know what the source holds, whether a kernel call succeeded before it is told, or
//! what the guest wrote where the kernel tracks writes by itself.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::page_set::{PageRun, PageSet};
use crate::working_set::Arrivals;

/// Faults that may wait at once. A thread waits for one page at a time and no VMM has that many
/// threads; 65,536 entries are about 3 MiB.
pub(crate) const FAULTS_MAX: usize = 1 << 16;

const PRESENT: u8 = 1;
const WRITTEN: u8 = 1 << 1;
const REMOVED: u8 = 1 << 2;
const USED: u8 = 1 << 3;
const BROUGHT_IN: u8 = 1 << 4;
/// Installed since it was last discarded: it may be there, whatever a fault that was read late made
/// of "present".
const INSTALLED: u8 = 1 << 5;
/// Installed as the kernel's zero page and left open to writes, and found to be it at each look since: it
/// holds what it held then.
const OPEN_ZERO: u8 = 1 << 6;

/// What a page must hold when it is installed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// It is there.
    Nothing,
    /// Zeros: it was discarded.
    Zero,
    /// What the source says.
    Source,
}

/// What a waiting thread wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    Read,
    Write,
    /// A write to a page that is there, but protected.
    Protected,
    /// A page that is in the memory's file, but not mapped.
    Unmapped,
}

/// Why a page was installed without a fault of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Fault,
    Neighbour,
    Prefetch,
}

/// Where a waiting fault stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Taken in, not decided on.
    Fresh,
    /// In the queue for a worker, or with one.
    Queued,
    /// The kernel said EAGAIN: to be tried again after the events are read.
    Aside,
    /// Cannot be served; the pager has given up.
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    kind: FaultKind,
    since: Instant,
    stage: Stage,
    /// What is filled along with it.
    window: PageRun,
    /// The watchdog has spoken of it.
    reported: bool,
}

/// What a guest's memory has become since the resume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// Pages that the guest wrote: their content must be looked at. None is missing; a page may
    /// be named that holds what it held before, or (on kernels before 6.7) zeros.
    pub written: PageSet,
    /// Pages that the guest gave back and did not write since: they are zero, present or not. Before
    /// 6.7 one that was given back and read again may be named as written instead.
    pub removed: PageSet,
}

/// What the pager itself knows of the guest's writes and discards.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// Marked as written.
    pub(crate) written: PageSet,
    /// Marked so only because they were installed as the zero page and left open.
    pub(crate) open_zeros: PageSet,
    /// Discarded since the resume.
    pub(crate) removed: PageSet,
}

impl Known {
    /// Of pages that are `base_pages` times as large, the same of base pages.
    pub(crate) fn in_base_pages(self, base_pages: u64) -> Self {
        Self {
            written: self.written.in_base_pages(base_pages),
            open_zeros: self.open_zeros.in_base_pages(base_pages),
            removed: self.removed.in_base_pages(base_pages),
        }
    }
}

/// What the kernel holds of the guest's memory.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Pages that it saw being written.
    pub(crate) scanned: PageSet,
    /// Pages that are there (of those in question).
    pub(crate) there: PageSet,
    /// Pages that are its zero page, where it can tell and it matters.
    pub(crate) zero: PageSet,
}

impl DirtyPages {
    /// Puts both together. A page that was marked written and is not there was dropped by a discard
    /// that was under way when it was installed. One that was left open and still is the zero page was
    /// not written. Any other zero page may have been: the kernel makes zero pages of what a guest
    /// filled with zeros (where it splits a huge page, since Linux 6.12; where it merges same pages).
    pub(crate) fn resolve(known: Known, held: &Held) -> Self {
        let Known {
            mut written,
            mut open_zeros,
            mut removed,
        } = known;
        written.intersect(&held.there);
        open_zeros.intersect(&held.zero);
        written.subtract(&open_zeros);
        written.unite(&held.scanned);
        removed.subtract(&written);
        Self { written, removed }
    }
}

/// More faults wait than [`FAULTS_MAX`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TooManyFaults;

/// See the module.
#[derive(Debug)]
pub(crate) struct Machine {
    page_bytes: u64,
    pages: Vec<u8>,
    arrivals: Arrivals,
    waiting: HashMap<u64, Waiting>,
    fresh: Vec<u64>,
    queue: VecDeque<u64>,
    aside: Vec<u64>,
}

impl Machine {
    /// All pages absent.
    pub(crate) fn new(pages: u64, page_bytes: u64) -> Self {
        let pages = vec![0; usize::try_from(pages).unwrap_or(usize::MAX)];
        Self {
            page_bytes,
            pages,
            arrivals: Arrivals::default(),
            waiting: HashMap::new(),
            fresh: Vec::new(),
            queue: VecDeque::new(),
            aside: Vec::new(),
        }
    }

    fn bits(&self, page: u64) -> u8 {
        usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get(page))
            .copied()
            .unwrap_or(PRESENT)
    }

    fn set(&mut self, page: u64, bits: u8) {
        if let Some(slot) = usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get_mut(page))
        {
            *slot |= bits;
        }
    }

    fn clear(&mut self, page: u64, bits: u8) {
        if let Some(slot) = usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get_mut(page))
        {
            *slot &= !bits;
        }
    }

    /// What the page needs now. Asked again right before each copy: it may have been discarded
    /// while its content was fetched.
    pub(crate) fn need(&self, page: u64) -> Need {
        let bits = self.bits(page);
        if bits & PRESENT != 0 {
            Need::Nothing
        } else if bits & REMOVED != 0 {
            Need::Zero
        } else {
            Need::Source
        }
    }

    /// The first pages of `run` that need the same thing as each other and are not there.
    pub(crate) fn next_absent(&self, run: PageRun, need: Need) -> Option<PageRun> {
        let end_page = run.end_page();
        let first_page = (run.first_page..end_page).find(|page| self.need(*page) == need)?;
        let last = (first_page..end_page)
            .take_while(|page| self.need(*page) == need)
            .count();
        Some(PageRun::new(first_page, last as u64))
    }

    /// Event: a thread waits for this page.
    pub(crate) fn fault(
        &mut self,
        page: u64,
        kind: FaultKind,
        now: Instant,
    ) -> Result<(), TooManyFaults> {
        self.set(page, USED);
        if matches!(kind, FaultKind::Read | FaultKind::Write) {
            self.clear(page, PRESENT);
        }
        if self.waiting.contains_key(&page) {
            // Whoever serves the first one wakes this thread as well; if that was not what it
            // needed, it faults again.
            return Ok(());
        }
        if self.waiting.len() >= FAULTS_MAX {
            return Err(TooManyFaults);
        }
        let waiting = Waiting {
            kind,
            since: now,
            stage: Stage::Fresh,
            window: PageRun::new(page, 1),
            reported: false,
        };
        self.waiting.insert(page, waiting);
        self.fresh.push(page);
        Ok(())
    }

    /// Event: these bytes are being discarded. Returns the pages that lie wholly inside: they are
    /// removed; and whether any of them may have been there. Partly covered ones hold zeros that the
    /// guest did not have before: written.
    pub(crate) fn remove(&mut self, start_byte: u64, end_byte: u64) -> (PageRun, bool) {
        let page_bytes = self.page_bytes;
        let first_page = start_byte.div_ceil(page_bytes);
        let end_page = (end_byte / page_bytes).min(self.pages.len() as u64);
        if start_byte >= end_byte {
            return (PageRun::new(first_page, 0), false);
        }
        let mut some_there = false;
        if !start_byte.is_multiple_of(page_bytes) {
            self.set(start_byte / page_bytes, WRITTEN);
        }
        if !end_byte.is_multiple_of(page_bytes) {
            self.set(end_byte / page_bytes, WRITTEN);
        }
        for page in first_page..end_page {
            some_there |= self.bits(page) & INSTALLED != 0;
            self.clear(
                page,
                PRESENT | WRITTEN | USED | BROUGHT_IN | INSTALLED | OPEN_ZERO,
            );
            self.set(page, REMOVED);
        }
        let run = PageRun::new(first_page, end_page.saturating_sub(first_page));
        (run, some_there)
    }

    /// The page was absent and has just been installed. Whatever was written to it before is gone
    /// with it: a discard that was under way when it was installed the last time dropped it.
    pub(crate) fn installed(&mut self, page: u64, reason: Reason) {
        self.clear(page, WRITTEN | OPEN_ZERO);
        if self.bits(page) & (INSTALLED | REMOVED) == 0 {
            self.arrivals.add(page);
        }
        self.found(page, reason);
    }

    /// The page turned out to be there.
    pub(crate) fn found(&mut self, page: u64, reason: Reason) {
        self.set(page, PRESENT | INSTALLED);
        if reason != Reason::Fault {
            self.set(page, BROUGHT_IN);
        }
    }

    /// The guest may write to the page unnoticed from here on, or has written.
    pub(crate) fn written(&mut self, page: u64) {
        self.set(page, WRITTEN);
    }

    /// The page has just been installed as the kernel's zero page, open to writes.
    pub(crate) fn installed_open(&mut self, page: u64) {
        self.set(page, WRITTEN | OPEN_ZERO);
    }

    /// Somebody has looked which pages are the kernel's zero page. One that was left open and is not is
    /// written from here on, zeros included: it may have been stored as it is now, and the next look is
    /// compared with that.
    pub(crate) fn looked(&mut self, zero: &PageSet) {
        for (bits, page) in self.pages.iter_mut().zip(0..) {
            if *bits & OPEN_ZERO != 0 && !zero.contains(page) {
                *bits &= !OPEN_ZERO;
            }
        }
    }

    /// Faults that are still to be decided on.
    pub(crate) fn take_fresh(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.fresh)
    }

    /// Faults to be tried again.
    pub(crate) fn take_aside(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.aside)
    }

    pub(crate) fn has_aside(&self) -> bool {
        !self.aside.is_empty()
    }

    /// What the thread wants that waits for this page.
    pub(crate) fn kind(&self, page: u64) -> Option<FaultKind> {
        self.waiting.get(&page).map(|waiting| waiting.kind)
    }

    fn move_to(&mut self, page: u64, stage: Stage) -> bool {
        self.waiting
            .get_mut(&page)
            .map(|waiting| waiting.stage = stage)
            .is_some()
    }

    /// The page's content must be fetched: to a worker, and this window after it.
    pub(crate) fn enqueue(&mut self, page: u64, window: PageRun) {
        if let Some(waiting) = self.waiting.get_mut(&page) {
            waiting.stage = Stage::Queued;
            waiting.window = window;
            self.queue.push_back(page);
        }
    }

    /// What is to be filled along with a waiting fault.
    pub(crate) fn window(&self, page: u64) -> PageRun {
        let waiting = self.waiting.get(&page);
        waiting.map_or(PageRun::new(page, 1), |waiting| waiting.window)
    }

    /// Whether the guest is known to have written to the page.
    pub(crate) fn is_written(&self, page: u64) -> bool {
        self.bits(page) & WRITTEN != 0
    }

    /// Event: the page is not there, whatever was believed.
    pub(crate) fn missing(&mut self, page: u64) {
        self.clear(page, PRESENT);
    }

    /// The next fault for a worker.
    pub(crate) fn dequeue(&mut self) -> Option<u64> {
        self.queue.pop_front()
    }

    /// The kernel said EAGAIN.
    pub(crate) fn set_aside(&mut self, page: u64) {
        if self.move_to(page, Stage::Aside) {
            self.aside.push(page);
        }
    }

    /// The page cannot be had. Its thread goes on waiting until its process is killed.
    pub(crate) fn lose(&mut self, page: u64) {
        self.move_to(page, Stage::Lost);
    }

    /// The page's threads have been woken. Returns since when they waited.
    pub(crate) fn finish(&mut self, page: u64) -> Option<Instant> {
        self.waiting.remove(&page).map(|waiting| waiting.since)
    }

    /// How many faults wait: all of them, and those that wait for the kernel only.
    pub(crate) fn waiting(&self) -> (usize, usize) {
        (self.waiting.len(), self.aside.len())
    }

    /// Faults older than `limit` that were not named before.
    pub(crate) fn overdue(&mut self, now: Instant, limit: std::time::Duration) -> Vec<Overdue> {
        let mut found = Vec::new();
        for (page, waiting) in &mut self.waiting {
            let age = now.saturating_duration_since(waiting.since);
            if age >= limit && !waiting.reported {
                waiting.reported = true;
                found.push(Overdue {
                    page: *page,
                    age,
                    stage: waiting.stage.name(),
                });
            }
        }
        found.sort_by_key(|overdue| overdue.page);
        found
    }

    fn all_with(&self, wanted: impl Fn(u8) -> bool) -> PageSet {
        let mut set = PageSet::with_capacity_pages(self.pages.len() as u64);
        for (bits, page) in self.pages.iter().zip(0..) {
            if wanted(*bits) {
                set.insert(page);
            }
        }
        set
    }

    /// Pages that are known to be written (all of them only where each write is a fault).
    pub(crate) fn known_written(&self) -> PageSet {
        self.all_with(|bits| bits & WRITTEN != 0)
    }

    /// What is known of the guest's writes and discards.
    pub(crate) fn known(&self) -> Known {
        Known {
            written: self.known_written(),
            open_zeros: self.all_with(|bits| bits & OPEN_ZERO != 0),
            removed: self.removed_since_resume(),
        }
    }

    /// Pages that were discarded since the resume.
    pub(crate) fn removed_since_resume(&self) -> PageSet {
        self.all_with(|bits| bits & REMOVED != 0)
    }

    /// Pages that were discarded and not installed since: the kernel must not have them any more.
    pub(crate) fn removed_and_absent(&self) -> PageSet {
        self.all_with(|bits| bits & (REMOVED | PRESENT) == REMOVED)
    }

    /// Pages that a thread waited for, and pages that were brought in around or before them;
    /// none that the guest has given back and not touched since.
    /// Also in which order they came; discarded ones apart.
    pub(crate) fn used_and_brought_in(&self) -> (PageSet, PageSet, Arrivals) {
        let used = self.all_with(|bits| bits & USED != 0);
        let brought_in = self.all_with(|bits| bits & (USED | BROUGHT_IN) == BROUGHT_IN);
        (used, brought_in, self.arrivals.clone())
    }
}

/// A fault that has waited too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overdue {
    pub(crate) page: u64,
    pub(crate) age: std::time::Duration,
    pub(crate) stage: &'static str,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Fresh => "not yet looked at",
            Self::Queued => "waiting for the page source",
            Self::Aside => "waiting for the kernel to finish a discard",
            Self::Lost => "lost: the pager has given up",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE_U64};
    use proptest::prelude::*;

    proptest! {
        /// As the kernel does on pages larger than ours: it drops what is wholly covered and
        /// zeroes the rest in place.
        #[test]
        fn a_discard_of_any_alignment_removes_whole_pages_and_dirties_the_parts(
            start_parts in 0_u64..80,
            len_parts in 0_u64..40,
            huge in any::<bool>(),
        ) {
            let page_bytes = if huge { HUGE_PAGE_BYTES } else { PAGE_SIZE_U64 };
            let (start_byte, len_bytes) = (start_parts * page_bytes / 8, len_parts * page_bytes / 8);
            let end_byte = start_byte + len_bytes;
            let mut machine = Machine::new(8, page_bytes);
            (0..8).for_each(|page| machine.installed(page, Reason::Fault));
            // Every other page was written before.
            (0..8).step_by(2).for_each(|page| machine.written(page));
            let (whole, _) = machine.remove(start_byte, end_byte);
            let absent = machine.removed_and_absent();
            let (written, removed) = (machine.known_written(), machine.removed_since_resume());
            for page in 0..8 {
                let (from, to) = (page * page_bytes, (page + 1) * page_bytes);
                let covered = end_byte.min(to).saturating_sub(start_byte.max(from));
                prop_assert_eq!(removed.contains(page), covered == page_bytes);
                prop_assert_eq!(absent.contains(page), covered == page_bytes);
                let partly = covered > 0 && covered < page_bytes;
                let kept = page % 2 == 0 && covered < page_bytes;
                prop_assert_eq!(written.contains(page), partly || kept);
                let named = (whole.first_page..whole.end_page()).contains(&page);
                prop_assert_eq!(named, covered == page_bytes);
            }
        }
    }

    #[test]
    fn a_page_waits_once_however_many_threads_wait_for_it() {
        let now = Instant::now();
        let mut machine = Machine::new(8, PAGE_SIZE_U64);
        for _ in 0..100 {
            machine.fault(3, FaultKind::Read, now).unwrap();
        }
        assert_eq!(machine.take_fresh(), [3]);
        machine.enqueue(3, PageRun::new(3, 1));
        machine.fault(3, FaultKind::Write, now).unwrap();
        assert_eq!((machine.dequeue(), machine.dequeue()), (Some(3), None));
        assert_eq!(machine.finish(3), Some(now));
        assert_eq!(machine.waiting(), (0, 0));
    }

    #[test]
    fn the_faults_that_wait_are_bounded() {
        let now = Instant::now();
        let mut machine = Machine::new(FAULTS_MAX as u64 + 1, PAGE_SIZE_U64);
        for page in 0..FAULTS_MAX as u64 {
            machine.fault(page, FaultKind::Read, now).unwrap();
        }
        let one_more = machine.fault(FAULTS_MAX as u64, FaultKind::Read, now);
        assert_eq!(one_more, Err(TooManyFaults));
    }

    #[test]
    fn an_overdue_fault_is_named_once_with_where_it_stands() {
        let now = Instant::now();
        let limit = std::time::Duration::from_secs(1);
        let mut machine = Machine::new(8, PAGE_SIZE_U64);
        machine.fault(3, FaultKind::Read, now).unwrap();
        machine.enqueue(3, PageRun::new(3, 1));
        assert!(machine.overdue(now, limit).is_empty());
        let later = now + limit;
        let found = machine.overdue(later, limit);
        assert_eq!(
            found,
            [Overdue {
                page: 3,
                age: limit,
                stage: "waiting for the page source"
            }]
        );
        assert!(machine.overdue(later, limit).is_empty());
    }
}
