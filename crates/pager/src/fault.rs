//! One fault: what its page must hold, how that gets there, and what its end means.
//!
//! Every fault ends in one of these ways: its page is installed, mapped or opened to a write (each
//! wakes whoever waits); it is there already, or the thread must fault again, and is woken; it is
//! set aside after EAGAIN, and tried again after the next events; the VMM has gone, or the pager
//! fails. None is forgotten.
//!
//! What needs no storage is done under the lock, by whoever has read the fault. The rest goes to a
//! worker ([`Service::serve`]), which reads without the lock and then looks again what the page
//! must hold: it may have been discarded, or brought in, meanwhile.
//!
//! The lock, the reading of events and the late copies are explained in `service`; what is filled
//! around a fault is `bulk`'s.

use std::time::Instant;

use crate::bulk::{SOURCE_ATTEMPTS, Window};
use crate::error::PagerFailure;
use crate::machine::{FaultKind, Need, Reason};
use crate::page_set::PageRun;
use crate::service::{Service, State};
use crate::source::{Content, SourceKind};
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

impl Service {
    /// Serves a waiting fault that needs no storage; queues it for a worker otherwise.
    pub(crate) fn decide(&self, state: &mut State, page: u64) {
        let Some(kind) = state.machine.kind(page) else {
            return;
        };
        let need = state.machine.need(page);
        match (kind, need) {
            (FaultKind::Protected, _) => self.allow_write(state, page, need),
            (FaultKind::Unmapped, _) => self.map(state, page, need),
            (_, Need::Nothing) => self.wake_and_finish(state, page),
            (_, Need::Zero) => self.install_zero(state, page, kind),
            (_, Need::Source) => match self.source.run_at(page).kind {
                SourceKind::Zero => self.install_zero(state, page, kind),
                SourceKind::Data => self.install_data(state, page, kind),
            },
        }
    }

    /// Copies the page if it is at hand; a worker has to read it otherwise.
    ///
    /// A page inside a window that is being filled is asked for by a thread that has caught up
    /// with the filling. It gets the next piece at once: with a single page it would be back
    /// before the piece is there.
    fn install_data(&self, state: &mut State, page: u64, kind: FaultKind) {
        let claimed = state.backlog.claim(page);
        let run = match claimed {
            Some(rest) if self.protects(kind) => self.data_from(state, page, rest),
            _ => PageRun::new(page, 1),
        };
        let buf = state.scratch.first(self.sizes.bytes(run.pages));
        let filled = self.source.at_hand(run, buf).map(|content| {
            let protect = self.protects(kind);
            self.kernel.copy(page, content, protect)
        });
        let window = match claimed {
            Some(rest) => rest.run,
            None => state.around.window(page, self.region(page), false),
        };
        match filled {
            None | Some(Ok(Filled::Missing)) => {
                state.machine.enqueue(page, window);
                self.work.notify_one();
            }
            Some(filled) => {
                let done_pages = match &filled {
                    Ok(Filled::Bytes(bytes)) => bytes / self.sizes.page_bytes,
                    _ => 1,
                };
                if !self.fault_filled(state, page, kind, filled, SourceKind::Data) {
                    return;
                }
                let more = PageRun::new(page + 1, done_pages.saturating_sub(1));
                self.count(state, more, SourceKind::Data, Reason::Neighbour);
                match claimed {
                    None => state.backlog.push(window),
                    Some(rest) => state.backlog.push_next(rest.rest_from(page + done_pages)),
                }
            }
        }
    }

    /// The absent data pages from `page` on, at most one piece.
    fn data_from(&self, state: &State, page: u64, window: Window) -> PageRun {
        let data_pages = self.source.run_at(page).pages;
        let most = window.run.pages.min(data_pages).min(window.piece_pages);
        let absent = (page..page + most)
            .take_while(|page| state.machine.need(*page) == Need::Source)
            .count() as u64;
        PageRun::new(page, absent.max(1))
    }

    /// The page is in the memory's file, and not mapped: the kernel has unmapped it, or the VMM
    /// wrote it past its mapping (a device of its own process, into a discarded page, too: late copies
    /// have been dropped by now).
    fn map(&self, state: &mut State, page: u64, need: Need) {
        let mut written = need != Need::Nothing || state.machine.is_written(page);
        let mut mapped = self.kernel.map(page, written);
        let refused = mapped
            .as_ref()
            .is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL));
        if refused && !written {
            // Before 6.4 a page cannot be mapped protected: then it counts as written.
            written = true;
            mapped = self.kernel.map(page, written);
        }
        match mapped {
            Ok(Filled::Bytes(_)) => {
                state.machine.found(page, Reason::Fault);
                if written {
                    state.machine.written(page);
                }
                self.finish(state, page);
            }
            Ok(Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Missing) => {
                // Punched meanwhile: the thread faults again, on a missing page.
                state.machine.missing(page);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Again) => self.put_off(state, page),
            Ok(Filled::Gone) => self.vmm_gone(state),
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("map the page", page, error);
            }
        }
    }

    /// A write to a protected page.
    fn allow_write(&self, state: &mut State, page: u64, need: Need) {
        if need == Need::Zero {
            // Discarded since: the thread must fault again, on the missing page.
            self.wake_and_finish(state, page);
            return;
        }
        match self.kernel.unprotect(page) {
            Ok(Filled::Bytes(_) | Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                state.machine.written(page);
                state.counters.stats.write_faults += 1;
                self.finish(state, page);
            }
            Ok(Filled::Missing) => {
                state.machine.missing(page);
                self.wake_and_finish(state, page);
            }
            Ok(Filled::Again) => self.put_off(state, page),
            Ok(Filled::Gone) => self.vmm_gone(state),
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("let a write through", page, error);
            }
        }
    }

    fn install_zero(&self, state: &mut State, page: u64, kind: FaultKind) {
        // Zeros are not pressed on a guest that gives memory back, nor where they take memory.
        let removed = state.machine.need(page) == Need::Zero;
        let shy = removed || self.kernel.zeros_take_memory();
        // What a guest takes back it writes to: a shared zero page would be broken up at once.
        let own = removed || kind == FaultKind::Write;
        let run = PageRun::new(page, 1);
        let open = !own && self.zeros_count_as_written();
        let filled = self.kernel.zero(run, self.protects(kind) && !open, own);
        let installed = matches!(filled, Ok(Filled::Bytes(_)));
        if self.fault_filled(state, page, kind, filled, SourceKind::Zero) {
            if open && installed {
                state.machine.installed_open(page);
            }
            match state.backlog.claim(page) {
                Some(rest) => state.backlog.push_next(rest),
                None => {
                    let window = state.around.window(page, self.region(page), shy);
                    let zeros = self.zeros_around(state, page, window);
                    state.backlog.push(zeros);
                }
            }
        }
    }

    /// The part of a window around a page that needs no content: zeros cost next to nothing, and
    /// who asks for one has not asked for what lies behind them.
    fn zeros_around(&self, state: &State, page: u64, window: PageRun) -> PageRun {
        let free = |page: &u64| {
            state.machine.need(*page) != Need::Source
                || self.source.run_at(*page).kind == SourceKind::Zero
        };
        let before = (window.first_page..page).rev().take_while(free).count() as u64;
        let after = (page..window.end_page()).take_while(free).count() as u64;
        PageRun::new(page - before, before + after)
    }

    /// The region that holds a page.
    fn region(&self, page: u64) -> PageRun {
        let region = self.kernel.region_around(page);
        region.unwrap_or(PageRun::new(page, 1))
    }

    /// Whether a page installed for this fault is write-protected. Where each write is a fault, a
    /// page that is about to be written need not be protected first.
    fn protects(&self, kind: FaultKind) -> bool {
        !(self.tracking == WriteTracking::Sync && kind == FaultKind::Write)
    }

    /// Whether zero pages are left open to writes, and held for written. Where each write to a protected
    /// page is a round trip to us, a guest that takes fresh memory into use would pay one for every page
    /// of it. Those that still are the kernel's zero page in the end are told from the others then, and
    /// on kernels that cannot tell whoever captures reads zeros.
    pub(crate) fn zeros_count_as_written(&self) -> bool {
        self.tracking == WriteTracking::Sync && !self.kernel.zeros_take_memory()
    }

    /// The faulting page's own installation has ended so. Returns whether the page is there.
    fn fault_filled(
        &self,
        state: &mut State,
        page: u64,
        kind: FaultKind,
        filled: std::io::Result<Filled>,
        content: SourceKind,
    ) -> bool {
        match filled {
            Ok(Filled::Bytes(_)) => {
                self.count(state, PageRun::new(page, 1), content, Reason::Fault);
                if !self.protects(kind) {
                    state.machine.written(page);
                }
                self.finish(state, page);
                true
            }
            Ok(Filled::Exists) => {
                state.machine.found(page, Reason::Fault);
                self.wake_and_finish(state, page);
                true
            }
            Ok(Filled::Again) => {
                self.put_off(state, page);
                false
            }
            Ok(Filled::Gone) => {
                self.vmm_gone(state);
                false
            }
            Ok(Filled::Missing) => {
                let error = std::io::Error::from_raw_os_error(libc::EFAULT);
                state.machine.lose(page);
                self.fail_kernel("install the page", page, error);
                false
            }
            Err(error) => {
                state.machine.lose(page);
                self.fail_kernel("install the page", page, error);
                false
            }
        }
    }

    fn put_off(&self, state: &mut State, page: u64) {
        state.counters.stats.eagain += 1;
        state.machine.set_aside(page);
    }

    pub(crate) fn wake_and_finish(&self, state: &mut State, page: u64) {
        if let Err(error) = self.kernel.wake(page) {
            self.fail_kernel("wake a thread", page, error);
        }
        self.finish(state, page);
    }

    pub(crate) fn finish(&self, state: &mut State, page: u64) {
        if let Some(since) = state.machine.finish(page) {
            state.counters.fault_answered(since.elapsed());
        }
        if state.settlers > 0 && state.machine.waiting().0 == 0 {
            self.rest.notify_all();
        }
    }

    pub(crate) fn count(
        &self,
        state: &mut State,
        run: PageRun,
        content: SourceKind,
        reason: Reason,
    ) {
        for page in run.first_page..run.end_page() {
            state.machine.installed(page, reason);
        }
        state.counters.last_install = Some(Instant::now());
        let stats = &mut state.counters.stats;
        match content {
            SourceKind::Zero => stats.pages_zeroed += run.pages,
            SourceKind::Data => stats.pages_copied += run.pages,
        }
        match reason {
            Reason::Fault => {}
            Reason::Neighbour => stats.pages_around += run.pages,
            Reason::Prefetch => stats.pages_prefetched += run.pages,
        }
    }

    /// Serves a fault whose content must be fetched: the page first, then its neighbours.
    pub(crate) fn serve(&self, page: u64, buf: &mut Vec<u8>) {
        let window = self.lock().machine.window(page);
        let span = self.data_span(page, window);
        let at_once = self.own_block(page, span);
        if let Err(failure) = self.read(at_once, SOURCE_ATTEMPTS, buf) {
            return self.read_failed(page, failure);
        }
        let there = self.install_read(page, self.sizes.slice(at_once, page, 1, buf));
        self.nudge_if_left(&self.lock());
        if !there {
            return;
        }
        if at_once.pages > 1 {
            self.fill(at_once, buf, Reason::Neighbour);
        }
        // A kindness: that it cannot be read is for the fault to say that needs it, and to try again.
        if at_once != span
            && let Some(rest) = self.absent_part(span)
            && self.read(rest, 1, buf).is_ok()
        {
            self.fill(rest, buf, Reason::Neighbour);
        }
    }

    fn read_failed(&self, page: u64, failure: Option<PagerFailure>) {
        let mut state = self.lock();
        if state.machine.need(page) != Need::Source {
            // Discarded, or brought in, while it could not be read.
            self.decide(&mut state, page);
            return self.nudge_if_left(&state);
        }
        state.machine.lose(page);
        drop(state);
        if let Some(failure) = failure {
            self.fail(failure);
        }
    }

    /// The reader may sleep, all events read: it is to try again what has been put off, and to fill
    /// what somebody else has left to it.
    pub(crate) fn nudge_if_left(&self, state: &State) {
        if state.machine.has_aside() || !state.backlog.is_empty() {
            self.kernel.nudge();
        }
    }

    /// What is read along with a page because it costs no more: the pages of its frame, if any.
    fn own_block(&self, page: u64, span: PageRun) -> PageRun {
        let block_pages = self.source.block_pages().max(1);
        PageRun::new(page - page % block_pages, block_pages)
            .clipped_to(span)
            .unwrap_or(PageRun::new(page, 1))
    }

    /// Installs a faulting page whose content has been read. Returns whether it is there.
    fn install_read(&self, page: u64, content: &[u8]) -> bool {
        let mut state = self.lock();
        // It may have been discarded, or brought in, while its content was fetched.
        match (state.machine.need(page), state.machine.kind(page)) {
            (Need::Source, Some(kind)) => {
                let content = Content::Bytes(content);
                let filled = self.kernel.copy(page, content, self.protects(kind));
                self.fault_filled(&mut state, page, kind, filled, SourceKind::Data)
            }
            _ => {
                self.decide(&mut state, page);
                true
            }
        }
    }

    /// Tries again what the kernel put off.
    pub(crate) fn retry(&self, state: &mut State) {
        self.drain(state);
        for page in state.machine.take_aside() {
            self.decide(state, page);
        }
    }
}
