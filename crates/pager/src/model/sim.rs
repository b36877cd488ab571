//! The simulated guest, its VMM's discarding threads and the kernel under them.
//!
//! It behaves as the kernel was seen to: operations are put off from a discard's announcement until
//! its thread runs again; anonymous memory loses its pages only then, a shared memfd before the
//! announcement. Who faults sleeps until woken, and then tries again.
//!
//! [`Page`] is what the kernel has, [`Truth`] what the guest knows: a guest that reads anything else,
//! and not in the middle of a discard, fails the test at once. Of the pager's state nothing is known
//! here.

use std::collections::VecDeque;

use crate::page_set::{PAGE_SIZE, PageRun};
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

pub(super) const PAGES: u64 = 48;
pub(super) const REGION: PageRun = PageRun::new(0, PAGES);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Source,
    Zero,
    Written(u64),
}

/// Pages 24 to 31 are zero in the source.
pub(super) fn in_source(page: u64) -> Content {
    if (24..32).contains(&page) {
        Content::Zero
    } else {
        Content::Source
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Touch {
        page: u64,
        write: bool,
    },
    Discard {
        first_page: u64,
        pages: u64,
    },
    /// Lets one discarding thread run on.
    Discarder {
        which: usize,
    },
    Reader,
    Worker,
    Retry,
    Prefetch {
        first_page: u64,
        pages: u64,
    },
    Prefetcher,
    /// The kernel does less than asked for, next time.
    Short,
    /// The next discard begins and ends inside pages, by so many bytes of each.
    Ragged {
        before_bytes: u64,
        after_bytes: u64,
    },
    /// The next discarding thread is faster than the reader: it is through, and its guest writes
    /// to this page, between the reader's read of the event and all that follows.
    Hasty {
        page: u64,
    },
    /// So many reads of the source fail from now on, one after the other.
    FailReads {
        reads: u32,
    },
    /// Pages that were read before there was a memory are installed.
    ReadAhead {
        first_page: u64,
        pages: u64,
    },
    /// The VMM has been killed: its memory goes, and whoever waited for it.
    Kill,
    /// What the source's cache can answer changes.
    Cached {
        all: bool,
    },
    /// The vCPUs are stopped: nothing is written any more, while discards go on, and the VMM still
    /// reads.
    Pause,
    /// The stopped guest is brought to rest, and what a build would store of it is looked at.
    Capture,
    /// The pause has failed, or is over.
    Resume,
}

/// A discarding thread, by what it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discarder {
    /// Memfd: the hole is punched; will announce it.
    Punched,
    /// Announced; asleep until the event has been read.
    Announced,
    /// Its event has been read; will run on.
    Released,
    /// Runs again, so nothing is put off any more; will drop the pages.
    Running,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    pub(super) page: u64,
    pub(super) write: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) content: Content,
    /// Outlives the mapping, as the kernel's marker does.
    pub(super) protected: bool,
    /// Shared memory only: it may be in the file without being mapped.
    pub(super) mapped: bool,
}

/// What the guest knows of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Truth {
    pub(super) content: Content,
    pub(super) written: bool,
    pub(super) removed: bool,
}

impl Truth {
    fn be_written(&mut self) {
        (self.written, self.removed) = (true, false);
    }
}

#[derive(Debug)]
pub(super) struct Sim {
    pub(super) shared: bool,
    pub(super) tracking: WriteTracking,
    pub(super) pages: Vec<Option<Page>>,
    pub(super) truth: Vec<Truth>,
    /// What the build before would bring back.
    pub(super) stored: Vec<Content>,
    pub(super) discards: Vec<(PageRun, Discarder)>,
    /// Threads asleep in a fault, those whose fault has not been read first.
    pub(super) unread: VecDeque<Waiter>,
    pub(super) asleep: Vec<Waiter>,
    pub(super) meanwhile: VecDeque<Op>,
    pub(super) short: bool,
    pub(super) ragged: (u64, u64),
    pub(super) hasty: Option<u64>,
    pub(super) cached: bool,
    pub(super) paused: bool,
    pub(super) gone: bool,
    /// Reads that are to fail, and the most that were asked for at once.
    pub(super) failing_reads: u32,
    pub(super) failing_reads_most: u32,
    failed_in_a_row: u32,
    pub(super) writes: u64,
    pub(super) nudges: u64,
    pub(super) source_reads: u64,
    pub(super) source_asked: u64,
}

pub(super) fn at(page: u64) -> usize {
    usize::try_from(page).unwrap()
}

impl Sim {
    /// A guest that has just been resumed: none of its pages is there.
    pub(super) fn new(shared: bool, tracking: WriteTracking) -> Self {
        let truth = |page| Truth {
            content: in_source(page),
            written: false,
            removed: false,
        };
        Self {
            shared,
            tracking,
            pages: vec![None; at(PAGES)],
            truth: (0..PAGES).map(truth).collect(),
            stored: (0..PAGES).map(in_source).collect(),
            discards: Vec::new(),
            unread: VecDeque::new(),
            asleep: Vec::new(),
            meanwhile: VecDeque::new(),
            short: false,
            ragged: (0, 0),
            hasty: None,
            cached: false,
            paused: false,
            gone: false,
            failing_reads: 0,
            failing_reads_most: 0,
            failed_in_a_row: 0,
            writes: 0,
            nudges: 0,
            source_reads: 0,
            source_asked: 0,
        }
    }

    /// See [`Op::FailReads`]. Not where the last read has failed: as many in a row are to fail.
    pub(super) fn fail_reads(&mut self, reads: u32) {
        if self.failed_in_a_row == 0 {
            self.failing_reads = reads;
            self.failing_reads_most = self.failing_reads_most.max(reads);
        }
    }

    pub(super) fn next_read_fails(&mut self) -> bool {
        let fails = self.failing_reads > 0;
        self.failing_reads = self.failing_reads.saturating_sub(1);
        self.failed_in_a_row = if fails { self.failed_in_a_row + 1 } else { 0 };
        fails
    }

    /// See [`Op::Kill`].
    pub(super) fn kill(&mut self) {
        self.gone = true;
        self.pages.fill(None);
        self.discards.clear();
        self.unread.clear();
        self.asleep.clear();
    }

    /// A guest thread touches a page: does it, or falls asleep.
    pub(super) fn touch(&mut self, waiter: Waiter) {
        if self.gone {
            return;
        }
        let Waiter { page, write } = waiter;
        let Some(there) = self.pages[at(page)].filter(|there| there.mapped) else {
            self.unread.push_back(waiter);
            return;
        };
        let Some(number) = write else {
            if !self.in_discard(page) {
                assert_eq!(
                    there.content,
                    self.truth[at(page)].content,
                    "page {page} read wrong"
                );
            }
            return;
        };
        if there.protected && self.tracking == WriteTracking::Sync {
            self.unread.push_back(waiter);
            return;
        }
        // Now and then a guest writes zeros.
        let content = if number.is_multiple_of(4) {
            Content::Zero
        } else {
            Content::Written(number)
        };
        self.pages[at(page)] = Some(Page {
            content,
            protected: false,
            mapped: true,
        });
        self.truth[at(page)] = Truth {
            content,
            written: true,
            removed: false,
        };
    }

    pub(super) fn in_discard(&self, page: u64) -> bool {
        self.discards
            .iter()
            .any(|(run, _)| (run.first_page..run.end_page()).contains(&page))
    }

    pub(super) fn changing(&self) -> bool {
        let changing = [Discarder::Announced, Discarder::Released];
        self.discards
            .iter()
            .any(|(_, stage)| changing.contains(stage))
    }

    pub(super) fn drop_pages(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            self.pages[at(page)] = None;
        }
    }

    fn unmap(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            if let Some(there) = &mut self.pages[at(page)] {
                there.mapped = false;
            }
        }
    }

    /// The guest's view of a discard: from here on the pages are zero.
    pub(super) fn discarded(&mut self, run: PageRun) {
        for page in run.first_page..run.end_page() {
            self.truth[at(page)] = Truth {
                content: Content::Zero,
                written: false,
                removed: true,
            };
        }
    }

    /// The bytes that a discard of these pages names, and what it does to the pages that it covers in
    /// part: some of their bytes are not what they were.
    pub(super) fn ragged_bytes(&mut self, run: PageRun) -> (u64, u64) {
        let size = PAGE_SIZE as u64;
        let (before_bytes, after_bytes) = std::mem::take(&mut self.ragged);
        let (mut start, mut end) = (run.first_page * size, run.end_page() * size);
        let there = |sim: &Self, page: u64| {
            sim.pages.get(at(page)).is_some_and(Option::is_some) && !sim.in_discard(page)
        };
        if before_bytes > 0 && start > 0 && there(self, run.first_page - 1) {
            start -= before_bytes;
            self.truth[at(run.first_page - 1)].be_written();
        }
        if after_bytes > 0 && there(self, run.end_page()) {
            end += after_bytes;
            self.truth[at(run.end_page())].be_written();
        }
        (start, end)
    }

    /// See [`Op::Hasty`].
    pub(super) fn overtake(&mut self, run: PageRun) {
        let inside = |page: &u64| (run.first_page..run.end_page()).contains(page);
        let Some(page) = self.hasty.take_if(|page| inside(page)) else {
            return;
        };
        for _ in 0..2 {
            if let Some(which) = self.discards.iter().position(|(found, _)| *found == run) {
                self.run_discarder(which);
            }
        }
        self.writes += 1;
        let write = (!self.paused).then_some(self.writes);
        self.touch(Waiter { page, write });
    }

    pub(super) fn begin_discard(&mut self, run: PageRun) {
        // A guest hands each page in once at a time.
        if self.gone || (run.first_page..run.end_page()).any(|page| self.in_discard(page)) {
            return;
        }
        if self.shared {
            self.drop_pages(run);
            self.discards.push((run, Discarder::Punched));
        } else {
            self.discards.push((run, Discarder::Announced));
        }
    }

    pub(super) fn run_discarder(&mut self, which: usize) {
        if self.discards.is_empty() {
            return;
        }
        let which = which % self.discards.len();
        let (run, stage) = self.discards[which];
        match stage {
            Discarder::Punched => self.discards[which].1 = Discarder::Announced,
            Discarder::Announced => {}
            Discarder::Released => self.discards[which].1 = Discarder::Running,
            Discarder::Running => {
                if self.shared {
                    self.unmap(run);
                } else {
                    self.drop_pages(run);
                    self.discarded(run);
                }
                self.discards.remove(which);
            }
        }
    }

    /// Wakes whoever waits in the run; they try again.
    pub(super) fn wake_run(&mut self, run: PageRun) {
        let inside = |waiter: &Waiter| (run.first_page..run.end_page()).contains(&waiter.page);
        let mut woken: Vec<_> = self.asleep.iter().copied().filter(inside).collect();
        self.asleep.retain(|waiter| !inside(waiter));
        woken.extend(self.unread.iter().copied().filter(inside));
        self.unread.retain(|waiter| !inside(waiter));
        woken.into_iter().for_each(|waiter| self.touch(waiter));
    }

    pub(super) fn put_off(&mut self) -> Filled {
        // While somebody tries in vain, the discarding threads get on.
        for which in 0..self.discards.len() {
            if self.discards[which].1 == Discarder::Released {
                self.run_discarder(which);
            }
        }
        Filled::Again
    }

    pub(super) fn install(
        &mut self,
        run: PageRun,
        protect: bool,
        content: impl Fn(u64) -> Content,
    ) -> Filled {
        if self.gone {
            return Filled::Gone;
        }
        if self.changing() {
            return self.put_off();
        }
        let end_page = if std::mem::take(&mut self.short) {
            run.first_page + run.pages.div_ceil(2)
        } else {
            run.end_page()
        };
        let absent = (run.first_page..end_page)
            .take_while(|page| self.pages[at(*page)].is_none())
            .count();
        if absent == 0 {
            return Filled::Exists;
        }
        let done = PageRun::new(run.first_page, absent as u64);
        for page in done.first_page..done.end_page() {
            self.pages[at(page)] = Some(Page {
                content: content(page),
                protected: protect,
                mapped: true,
            });
        }
        self.wake_run(done);
        Filled::Bytes(done.pages * PAGE_SIZE as u64)
    }
}
