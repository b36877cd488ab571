//! What the pager asks of the kernel, in guest pages.
//!
//! The threads and the page states know the kernel only through [`Kernel`], so that the same code
//! runs against a simulated one in tests. [`HostKernel`] is the real one: it translates between
//! guest pages and host addresses and knows what kind of memory backs the guest.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::{FallocateFlags, SeekFrom};

use crate::error::PagerError;
use crate::machine::FaultKind;
use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE, PAGE_SIZE_U64, PageRun};
use crate::pagemap::Pagemap;
use crate::region::Region;
use crate::source::Content;
use crate::tracking::WriteTracking;
use crate::uffd::{Filled, Uffd};
use crate::uffd_abi::RawEvent;

/// Pages of zeros that one call installs: 64 KiB, or one huge page. Bounds how long the page states
/// stay locked.
pub(crate) const ZERO_PAGES_MAX: u64 = 16;

/// As long as the largest page. It takes no memory: nobody ever writes there.
static ZEROS: [u8; 512 * PAGE_SIZE] = [0; 512 * PAGE_SIZE];

const _: () = assert!(ZEROS.len() as u64 == HUGE_PAGE_BYTES);
const _: () = assert!(ZERO_PAGES_MAX * PAGE_SIZE_U64 <= HUGE_PAGE_BYTES);

/// What backs the guest's memory; it decides what a discard does to a page that was installed
/// while the discard was under way.
#[derive(Debug)]
pub enum Backing {
    /// Private anonymous memory (Firecracker), of small or huge pages: the kernel drops such a
    /// page.
    Anonymous,
    /// A shared memfd (QEMU): the VMM punches the hole *before* the event, so such a page stays
    /// and must be punched again. The descriptor must be writable; its offset is moved by seeks.
    /// Small pages only.
    SharedMemfd(OwnedFd),
}

/// Something that happened to the guest's memory, in guest pages and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread waits for this page.
    Fault { page: u64, kind: FaultKind },
    /// The VMM discards these bytes of guest memory.
    Remove { start_byte: u64, end_byte: u64 },
    /// A fault where the pager serves nothing.
    Stray { host_addr: u64 },
    /// The VMM does to its memory what the pager cannot follow.
    Unasked { event: u8 },
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// There are events.
    Events,
    /// Somebody wants the reader to look at the state. Told once.
    Nudged,
    /// The time has passed.
    TimedOut,
}

/// The kernel's side. All calls return at once; runs must lie inside one region.
pub(crate) trait Kernel: Send + Sync {
    /// Sleeps until there are events, or it is nudged, at most this long. The one call that waits;
    /// for the reader alone.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<Waited>;
    /// Ends the reader's wait, or the one that it begins next.
    fn nudge(&self);
    /// Hands over events that are queued. Returns whether there may be more.
    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool>;
    /// Installs absent pages with this content, and wakes. `protect` where writes to them are
    /// still to be found out.
    fn copy(&self, first_page: u64, content: Content<'_>, protect: bool) -> io::Result<Filled>;
    /// Maps a page that is in the memory's file already, and wakes. `written`: the guest is known
    /// to have written it.
    fn map(&self, page: u64, written: bool) -> io::Result<Filled>;
    /// Installs zero pages, at most [`ZERO_PAGES_MAX`] and perhaps fewer, and wakes. `own`: they are about to be
    /// written, so each is to have memory of its own.
    fn zero(&self, run: PageRun, protect: bool, own: bool) -> io::Result<Filled>;
    /// Whether a zero page that is installed takes memory of its own.
    fn zeros_take_memory(&self) -> bool;
    /// Lets writes through to a page, and wakes.
    fn unprotect(&self, page: u64) -> io::Result<Filled>;
    /// Wakes whoever waits for a page.
    fn wake(&self, page: u64) -> io::Result<()>;
    /// Makes sure that nothing stays of a discarded run.
    fn drop_late_copies(&self, run: PageRun) -> io::Result<()>;
    /// The pages of the region that holds this page.
    fn region_around(&self, page: u64) -> Option<PageRun>;
    /// How large a page is. All page numbers of this trait count such pages.
    fn page_bytes(&self) -> u64 {
        PAGE_SIZE_U64
    }
}

/// The guest's regions, sorted, none overlapping another, all of pages of one size, in which page
/// numbers count here.
#[derive(Debug)]
pub(crate) struct Regions {
    by_guest: Vec<Region>,
    page_bytes: u64,
}

impl Regions {
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, PagerError> {
        let Some(page_size) = regions.first().map(|region| region.page_size) else {
            return Err(PagerError::Config("no region to serve"));
        };
        if regions.iter().any(|region| region.page_size != page_size) {
            return Err(PagerError::Config(
                "regions of small pages and of huge ones cannot be served together",
            ));
        }
        for region in &regions {
            region.check()?;
        }
        regions.sort_by_key(|region| region.host_addr);
        if regions
            .windows(2)
            .any(|pair| pair[0].host_end() > pair[1].host_addr)
        {
            return Err(PagerError::Config(
                "two regions overlap in the VMM's address space",
            ));
        }
        regions.sort_by_key(|region| region.guest_offset_bytes);
        let guest_end = |region: &Region| region.guest_offset_bytes + region.len_bytes;
        if regions
            .windows(2)
            .any(|pair| guest_end(&pair[0]) > pair[1].guest_offset_bytes)
        {
            return Err(PagerError::Config(
                "two regions overlap in the guest's memory",
            ));
        }
        Ok(Self {
            by_guest: regions,
            page_bytes: u64::from(page_size),
        })
    }

    /// How large a page is.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Region> {
        self.by_guest.iter()
    }

    /// The pages that the guest's memory spans, holes between regions included.
    pub(crate) fn span_pages(&self) -> u64 {
        let end = |region: &Region| region.guest_offset_bytes + region.len_bytes;
        self.by_guest.last().map_or(0, end) / self.page_bytes
    }

    /// The pages of the region that holds `page`.
    pub(crate) fn around(&self, page: u64) -> Option<PageRun> {
        let pages = |region: &Region| {
            PageRun::new(
                region.guest_offset_bytes / self.page_bytes,
                region.len_bytes / self.page_bytes,
            )
        };
        let next = self
            .by_guest
            .partition_point(|region| pages(region).first_page <= page);
        let run = pages(self.by_guest.get(next.checked_sub(1)?)?);
        (page < run.end_page()).then_some(run)
    }

    /// Where a guest page is mapped in the VMM.
    fn host_addr(&self, page: u64) -> Option<u64> {
        let byte = page * self.page_bytes;
        let next = self
            .by_guest
            .partition_point(|region| region.guest_offset_bytes <= byte);
        let region = self.by_guest.get(next.checked_sub(1)?)?;
        let offset = byte - region.guest_offset_bytes;
        (offset < region.len_bytes).then(|| region.host_addr + offset)
    }

    /// The guest page that an address in the VMM belongs to.
    fn guest_page(&self, host_addr: u64) -> Option<u64> {
        let holds = |region: &&Region| (region.host_addr..region.host_end()).contains(&host_addr);
        let region = self.by_guest.iter().find(holds)?;
        let byte = host_addr - region.host_addr + region.guest_offset_bytes;
        Some(byte / self.page_bytes)
    }

    /// Translates an event; a discard that spans regions becomes one event for each.
    pub(crate) fn translate(&self, event: RawEvent, sink: &mut dyn FnMut(Event)) {
        match event {
            RawEvent::Fault {
                host_addr,
                write,
                protected,
                unmapped,
            } => {
                let kind = match (protected, unmapped, write) {
                    (true, _, _) => FaultKind::Protected,
                    (_, true, _) => FaultKind::Unmapped,
                    (_, _, true) => FaultKind::Write,
                    _ => FaultKind::Read,
                };
                sink(match self.guest_page(host_addr) {
                    Some(page) => Event::Fault { page, kind },
                    None => Event::Stray { host_addr },
                });
            }
            RawEvent::Remove { start, end } => {
                for region in &self.by_guest {
                    let start = start.max(region.host_addr);
                    let end = end.min(region.host_end());
                    if start < end {
                        let to_guest = |addr| addr - region.host_addr + region.guest_offset_bytes;
                        sink(Event::Remove {
                            start_byte: to_guest(start),
                            end_byte: to_guest(end),
                        });
                    }
                }
            }
            RawEvent::Unasked { event } => sink(Event::Unasked { event }),
        }
    }
}

/// The kernel of this host, for one guest.
#[derive(Debug)]
pub(crate) struct HostKernel {
    pub(crate) uffd: Uffd,
    pub(crate) regions: Regions,
    pub(crate) backing: Backing,
    pub(crate) tracking: WriteTracking,
    /// Of the VMM; needed where the kernel tracks writes by itself.
    pub(crate) pagemap: Option<Arc<Pagemap>>,
    nudged: OwnedFd,
}

impl HostKernel {
    pub(crate) fn new(
        uffd: Uffd,
        regions: Regions,
        backing: Backing,
        tracking: WriteTracking,
        pagemap: Option<Arc<Pagemap>>,
    ) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let nudged = rustix::event::eventfd(0, flags)?;
        Ok(Self {
            uffd,
            regions,
            backing,
            tracking,
            pagemap,
            nudged,
        })
    }

    fn addr(&self, page: u64) -> io::Result<u64> {
        self.regions
            .host_addr(page)
            .ok_or_else(|| io::Error::other("the page is in no region"))
    }

    /// Empties a shared memfd before the guest runs: whatever the VMM put there while it set
    /// itself up would stand in the way of the build's content.
    pub(crate) fn clear_shared(&self) -> io::Result<()> {
        for region in self.regions.iter() {
            let pages = region.len_bytes / PAGE_SIZE_U64;
            self.drop_late_copies(PageRun::new(
                region.guest_offset_bytes / PAGE_SIZE_U64,
                pages,
            ))?;
        }
        Ok(())
    }
}

impl Kernel for HostKernel {
    fn page_bytes(&self) -> u64 {
        self.regions.page_bytes
    }

    fn region_around(&self, page: u64) -> Option<PageRun> {
        self.regions.around(page)
    }

    fn wait(&self, timeout: Option<Duration>) -> io::Result<Waited> {
        let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
        let mut fds = [
            PollFd::new(&self.uffd, PollFlags::IN),
            PollFd::new(&self.nudged, PollFlags::IN),
        ];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [uffd_says, nudge_says] = fds.map(|fd| fd.revents());
        if uffd_says.intersects(PollFlags::ERR | PollFlags::NVAL) {
            return Err(io::Error::other("the descriptor is no longer usable"));
        }
        if !nudge_says.is_empty() {
            let mut count = [0_u8; 8];
            if let Err(error) = rustix::io::read(&self.nudged, &mut count) {
                tracing::debug!(%error, "a nudge was taken back");
            }
            return Ok(Waited::Nudged);
        }
        Ok(if uffd_says.is_empty() {
            Waited::TimedOut
        } else {
            Waited::Events
        })
    }

    fn nudge(&self) {
        if let Err(error) = rustix::io::write(&self.nudged, &1_u64.to_ne_bytes()) {
            tracing::debug!(%error, "the reader was nudged already");
        }
    }

    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool> {
        self.uffd
            .read_events(&mut |event| self.regions.translate(event, sink))
    }

    fn copy(&self, first_page: u64, content: Content<'_>, protect: bool) -> io::Result<Filled> {
        self.uffd.copy(
            self.addr(first_page)?,
            content,
            protect && self.tracking.protects(),
        )
    }

    fn map(&self, page: u64, written: bool) -> io::Result<Filled> {
        let addr = self.addr(page)?;
        let protect = match (self.tracking, &self.pagemap) {
            // What the kernel itself would do: a marker of the protection outlives the mapping,
            // and a page without one counts as written.
            (WriteTracking::Async, Some(pagemap)) => pagemap.protected(addr)?,
            (WriteTracking::Sync, _) => !written,
            _ => false,
        };
        self.uffd.map(addr, self.page_bytes(), protect)
    }

    fn zero(&self, run: PageRun, protect: bool, own: bool) -> io::Result<Filled> {
        let len_bytes = match self.page_bytes() {
            PAGE_SIZE_U64 => run.pages.min(ZERO_PAGES_MAX) * PAGE_SIZE_U64,
            huge => huge,
        };
        if !own && !self.zeros_take_memory() {
            return self.uffd.zero(self.addr(run.first_page)?, len_bytes);
        }
        // ZEROPAGE cannot write-protect, as asynchronous tracking must have it, allocates a page on
        // shared memory all the same, and knows no huge pages.
        let zeros = usize::try_from(len_bytes).unwrap_or(ZEROS.len());
        self.copy(run.first_page, Content::Bytes(&ZEROS[..zeros]), protect)
    }

    fn zeros_take_memory(&self) -> bool {
        self.tracking == WriteTracking::Async
            || !matches!(self.backing, Backing::Anonymous)
            || self.page_bytes() > PAGE_SIZE_U64
    }

    fn unprotect(&self, page: u64) -> io::Result<Filled> {
        self.uffd.unprotect(self.addr(page)?, self.page_bytes())
    }

    fn wake(&self, page: u64) -> io::Result<()> {
        self.uffd.wake(self.addr(page)?, self.page_bytes())
    }

    fn drop_late_copies(&self, run: PageRun) -> io::Result<()> {
        match &self.backing {
            Backing::Anonymous => Ok(()),
            Backing::SharedMemfd(memfd) => {
                // Mostly there is nothing: looking costs a tenth of punching.
                let mut punched = Ok(());
                memfd_runs(memfd.as_fd(), run, &mut |found| {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    let offset = found.first_page * PAGE_SIZE_U64;
                    let len = found.pages * PAGE_SIZE_U64;
                    punched = punched.and(rustix::fs::fallocate(memfd, mode, offset, len));
                })?;
                Ok(punched?)
            }
        }
    }
}

/// Every run of pages inside `among` that a memfd holds (in memory or swapped out).
pub(crate) fn memfd_runs(
    memfd: BorrowedFd<'_>,
    among: PageRun,
    sink: &mut dyn FnMut(PageRun),
) -> io::Result<()> {
    let end_byte = among.end_page() * PAGE_SIZE_U64;
    let mut byte = among.first_page * PAGE_SIZE_U64;
    while byte < end_byte {
        let data = match rustix::fs::seek(memfd, SeekFrom::Data(byte)) {
            Ok(data) if data < end_byte => data,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(memfd, SeekFrom::Hole(data))?.min(end_byte);
        let first_page = data / PAGE_SIZE_U64;
        let end_page = hole.div_ceil(PAGE_SIZE_U64);
        sink(PageRun::new(first_page, end_page - first_page));
        byte = hole.max(data + 1);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(host_page: u64, pages: u64, guest_page: u64) -> Region {
        Region {
            host_addr: host_page * PAGE_SIZE_U64,
            len_bytes: pages * PAGE_SIZE_U64,
            guest_offset_bytes: guest_page * PAGE_SIZE_U64,
            page_size: 4096,
        }
    }

    fn events(regions: &Regions, event: RawEvent) -> Vec<Event> {
        let mut events = Vec::new();
        regions.translate(event, &mut |event| events.push(event));
        events
    }

    #[test]
    fn regions_may_lie_in_any_order_and_leave_holes() {
        // Guest pages 0-9 at host page 500, 20-29 at 490: next to each other, the other way round.
        let regions = Regions::new(vec![region(500, 10, 0), region(490, 10, 20)]).unwrap();
        assert_eq!(regions.span_pages(), 30);
        assert_eq!(regions.around(9), Some(PageRun::new(0, 10)));
        assert_eq!(regions.around(10), None);
        assert_eq!(regions.host_addr(21), Some(491 * PAGE_SIZE_U64));
        assert_eq!(regions.host_addr(30), None);
        let fault = |host_addr| RawEvent::Fault {
            host_addr,
            write: true,
            protected: false,
            unmapped: false,
        };
        let page = |page| Event::Fault {
            page,
            kind: FaultKind::Write,
        };
        assert_eq!(events(&regions, fault(501 * PAGE_SIZE_U64 + 8)), [page(1)]);
        assert_eq!(events(&regions, fault(490 * PAGE_SIZE_U64)), [page(20)]);
        let stray = 510 * PAGE_SIZE_U64;
        assert_eq!(
            events(&regions, fault(stray)),
            [Event::Stray { host_addr: stray }]
        );
    }

    #[test]
    fn a_discard_across_regions_is_one_for_each() {
        let regions = Regions::new(vec![region(500, 10, 0), region(490, 10, 20)]).unwrap();
        let start = 488 * PAGE_SIZE_U64;
        let end = 502 * PAGE_SIZE_U64;
        let parts = events(&regions, RawEvent::Remove { start, end });
        let part = |first: u64, end: u64| Event::Remove {
            start_byte: first * PAGE_SIZE_U64,
            end_byte: end * PAGE_SIZE_U64,
        };
        assert_eq!(parts, [part(0, 2), part(20, 30)]);
    }

    #[test]
    fn overlapping_regions_are_refused() {
        assert!(Regions::new(vec![region(500, 10, 0), region(505, 10, 20)]).is_err());
        assert!(Regions::new(vec![region(500, 10, 0), region(600, 10, 9)]).is_err());
        assert!(Regions::new(Vec::new()).is_err());
    }
}
