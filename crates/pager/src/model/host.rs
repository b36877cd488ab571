//! The simulated host, as the service sees it: the kernel and the source of a [`World`].
//!
//! Each call is one step of the simulation. Faults are read before discards that came earlier, one
//! event at a time; a read of the source is when everything else happens. Bytes are checked on the
//! way in, so that no page can be given another's.

use std::io;
use std::time::Duration;

use super::World;
use super::sim::{Content, Discarder, PAGES, REGION, at, in_source};
use crate::kernel::{Event, Kernel, Waited};
use crate::machine::FaultKind;
use crate::page_set::{PAGE_SIZE, PageRun};
use crate::source::{Content as Bytes, PageSource, SourceKind, SourceRun};
use crate::tracking::WriteTracking;
use crate::uffd::Filled;

pub(super) struct SimKernel(pub(super) World);

impl Kernel for SimKernel {
    fn wait(&self, _timeout: Option<Duration>) -> io::Result<Waited> {
        unreachable!("nobody waits in this model");
    }

    fn nudge(&self) {
        self.0.sim().nudges += 1;
    }

    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool> {
        let mut sim = self.0.sim();
        if let Some(waiter) = sim.unread.pop_front() {
            sim.asleep.push(waiter);
            let kind = match (sim.pages[at(waiter.page)], waiter.write) {
                (Some(there), _) if !there.mapped => FaultKind::Unmapped,
                (Some(_), Some(_)) => FaultKind::Protected,
                (_, None) => FaultKind::Read,
                (None, Some(_)) => FaultKind::Write,
            };
            sink(Event::Fault {
                page: waiter.page,
                kind,
            });
            return Ok(true);
        }
        let announced = sim
            .discards
            .iter()
            .position(|(_, stage)| *stage == Discarder::Announced);
        let Some(which) = announced else {
            return Ok(false);
        };
        let (run, _) = sim.discards[which];
        sim.discards[which].1 = Discarder::Released;
        if sim.shared {
            // Whatever is written from here on is written to a page that comes after.
            sim.discarded(run);
        }
        let (start_byte, end_byte) = sim.ragged_bytes(run);
        sink(Event::Remove {
            start_byte,
            end_byte,
        });
        sim.overtake(run);
        Ok(true)
    }

    fn copy(&self, first_page: u64, content: Bytes<'_>, protect: bool) -> io::Result<Filled> {
        let Bytes::Bytes(data) = content else {
            unreachable!("nothing is mapped in this model");
        };
        for (bytes, page) in data.chunks(PAGE_SIZE).zip(first_page..) {
            assert_eq!(bytes[..8], page.to_le_bytes(), "another page's bytes");
        }
        let run = PageRun::new(first_page, (data.len() / PAGE_SIZE) as u64);
        let protect = protect && self.0.sim().tracking.protects();
        Ok(self.0.sim().install(run, protect, |_| Content::Source))
    }

    fn zero(&self, run: PageRun, protect: bool, _own: bool) -> io::Result<Filled> {
        let protect = protect && self.0.sim().tracking.protects();
        Ok(self.0.sim().install(run, protect, |_| Content::Zero))
    }

    fn map(&self, page: u64, written: bool) -> io::Result<Filled> {
        let mut sim = self.0.sim();
        if sim.gone {
            return Ok(Filled::Gone);
        }
        if sim.changing() {
            return Ok(sim.put_off());
        }
        let sync = sim.tracking == WriteTracking::Sync;
        let Some(there) = &mut sim.pages[at(page)] else {
            return Ok(Filled::Missing);
        };
        if there.mapped {
            return Ok(Filled::Exists);
        }
        there.mapped = true;
        if sync {
            there.protected = !written;
        }
        sim.wake_run(PageRun::new(page, 1));
        Ok(Filled::Bytes(PAGE_SIZE as u64))
    }

    fn unprotect(&self, page: u64) -> io::Result<Filled> {
        let mut sim = self.0.sim();
        if sim.gone {
            return Ok(Filled::Gone);
        }
        if sim.changing() {
            return Ok(sim.put_off());
        }
        if let Some(there) = &mut sim.pages[at(page)] {
            there.protected = false;
        }
        sim.wake_run(PageRun::new(page, 1));
        Ok(Filled::Bytes(PAGE_SIZE as u64))
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        self.0.sim().wake_run(PageRun::new(page, 1));
        Ok(())
    }

    fn drop_late_copies(&self, run: PageRun) -> io::Result<()> {
        let mut sim = self.0.sim();
        if sim.shared {
            sim.drop_pages(run);
        }
        Ok(())
    }

    fn zeros_take_memory(&self) -> bool {
        self.0.sim().shared
    }

    fn region_around(&self, page: u64) -> Option<PageRun> {
        (page < PAGES).then_some(REGION)
    }
}

/// The source's content: each page begins with its number. Zero pages are never asked for.
pub(super) fn number_pages(first_page: u64, buf: &mut [u8]) {
    for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
        assert_eq!(in_source(page), Content::Source, "zero page {page}");
        bytes[..8].copy_from_slice(&page.to_le_bytes());
    }
}

pub(super) struct SimSource(pub(super) World);

impl PageSource for SimSource {
    fn run_at(&self, page: u64) -> SourceRun {
        let kind = |page| match in_source(page) {
            Content::Source => SourceKind::Data,
            _ => SourceKind::Zero,
        };
        let mine = kind(page);
        let pages = (page..PAGES).take_while(|page| kind(*page) == mine).count() as u64;
        SourceRun {
            pages: pages.max(1),
            kind: mine,
        }
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Bytes<'a>> {
        self.0.sim().source_asked += 1;
        if !self.0.sim().cached {
            return None;
        }
        number_pages(run.first_page, buf);
        Some(Bytes::Bytes(buf))
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.sim().source_reads += 1;
        let fails = self.0.sim().next_read_fails();
        loop {
            let next = self.0.sim().meanwhile.pop_front();
            let Some(op) = next else { break };
            self.0.happen(op);
        }
        if fails {
            // What a read that fails leaves behind is nobody's page.
            buf.fill(0xee);
            return Err(io::ErrorKind::Other.into());
        }
        number_pages(first_page, buf);
        Ok(())
    }
}
