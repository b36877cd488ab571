//! Races with the real kernel that no test from outside can hold open: the kernel is wrapped, and
//! stands still where the test wants it to.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::failure::FailureSignal;
use crate::kernel::{Backing, Event, HostKernel, Kernel, Regions, Waited};
use crate::machine::Machine;
use crate::page_set::{PAGE_SIZE, PAGE_SIZE_U64, PageRun};
use crate::pagemap::Pagemap;
use crate::region::Region;
use crate::service::Service;
use crate::source::{Content, PageSource, SourceKind, SourceRun};
use crate::stats::Counters;
use crate::threads;
use crate::tracking::WriteTracking;
use crate::uffd::{Filled, Uffd};

const PAGES: u64 = 64;
const DEADLINE: Duration = Duration::from_secs(30);

/// Long enough for a thread to do what it must not be able to do.
const TEMPTATION: Duration = Duration::from_millis(100);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// For this thread and those that it starts.
fn stay_on_one_processor() {
    let mut one = rustix::thread::CpuSet::new();
    one.set(rustix::thread::sched_getcpu());
    rustix::thread::sched_setaffinity(None, &one).unwrap();
}

/// A gate in front of the second punch.
#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    moved: Condvar,
    reached: AtomicBool,
}

impl Gate {
    fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.moved.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        if *closed {
            self.reached.store(true, Ordering::SeqCst);
            drop(self.moved.wait_while(closed, |closed| *closed).unwrap());
        }
    }
}

#[derive(Debug)]
struct Held {
    host: HostKernel,
    gate: Arc<Gate>,
    /// As a kernel before 6.4: it maps no page protected.
    is_old: bool,
}

impl Kernel for Held {
    fn wait(&self, timeout: Option<Duration>) -> io::Result<Waited> {
        self.host.wait(timeout)
    }
    fn nudge(&self) {
        self.host.nudge();
    }
    fn read_events(&self, sink: &mut dyn FnMut(Event)) -> io::Result<bool> {
        self.host.read_events(sink)
    }
    fn copy(&self, first_page: u64, content: Content<'_>, protect: bool) -> io::Result<Filled> {
        self.host.copy(first_page, content, protect)
    }
    fn map(&self, page: u64, written: bool) -> io::Result<Filled> {
        if self.is_old && !written {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.host.map(page, written)
    }
    fn zero(&self, run: PageRun, protect: bool, own: bool) -> io::Result<Filled> {
        self.host.zero(run, protect, own)
    }
    fn zeros_take_memory(&self) -> bool {
        self.host.zeros_take_memory()
    }
    fn unprotect(&self, page: u64) -> io::Result<Filled> {
        self.host.unprotect(page)
    }
    fn wake(&self, page: u64) -> io::Result<()> {
        self.host.wake(page)
    }
    fn drop_late_copies(&self, run: PageRun) -> io::Result<()> {
        self.gate.pass();
        self.host.drop_late_copies(run)
    }
    fn region_around(&self, page: u64) -> Option<PageRun> {
        self.host.region_around(page)
    }
}

/// Every page holds its number, plus one.
struct Numbers;

impl PageSource for Numbers {
    fn run_at(&self, page: u64) -> SourceRun {
        SourceRun {
            pages: PAGES.saturating_sub(page).max(1),
            kind: SourceKind::Data,
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
            bytes[..8].copy_from_slice(&(page + 1).to_le_bytes());
        }
        Ok(())
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        self.read(run.first_page, buf).ok()?;
        Some(Content::Bytes(buf))
    }
}

struct Guest {
    memfd: OwnedFd,
    addr: usize,
}

impl Guest {
    fn new() -> Self {
        let memfd = rustix::fs::memfd_create("test-races", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memfd.try_clone().unwrap());
        file.set_len(PAGES * PAGE_SIZE_U64).unwrap();
        let (len, rw) = (
            usize::try_from(PAGES).unwrap() * PAGE_SIZE,
            ProtFlags::READ | ProtFlags::WRITE,
        );
        let null = std::ptr::null_mut();
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        let mapped = unsafe { rustix::mm::mmap(null, len, rw, MapFlags::SHARED, &memfd, 0) };
        let addr = mapped.unwrap().expose_provenance();
        Self { memfd, addr }
    }

    fn word(&self, page: u64) -> *mut u64 {
        assert!(page < PAGES);
        let offset = usize::try_from(page).unwrap() * PAGE_SIZE;
        std::ptr::with_exposed_provenance_mut(self.addr + offset)
    }

    fn read(&self, page: u64) -> u64 {
        // SAFETY: inside the mapping, aligned; volatile, since the pager writes there.
        unsafe { self.word(page).read_volatile() }
    }

    fn write(&self, page: u64, value: u64) {
        // SAFETY: as in `read`.
        unsafe { self.word(page).write_volatile(value) };
    }

    fn punch(&self, page: u64) {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = page * PAGE_SIZE_U64;
        rustix::fs::fallocate(&self.memfd, mode, offset, PAGE_SIZE_U64).unwrap();
    }

    fn madvise(&self, page: u64) {
        let start = self.word(page).cast();
        // SAFETY: inside the mapping, to which no reference exists.
        unsafe { rustix::mm::madvise(start, PAGE_SIZE, Advice::LinuxDontNeed) }.unwrap();
    }

    /// Has the kernel take the page's mapping away. It can only of pages that it has put into its lists,
    /// which it does by the dozen, for each processor by itself: see [`stay_on_one_processor`].
    fn page_out(&self, page: u64) {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let at = (self.addr as u64 / PAGE_SIZE_U64 + page) * 8;
        until("the page is unmapped", || {
            let start = self.word(page).cast();
            // SAFETY: inside the mapping, to which no reference exists; pages stay in the file.
            unsafe { rustix::mm::madvise(start, PAGE_SIZE, Advice::LinuxPageOut) }.unwrap();
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, at).unwrap();
            u64::from_le_bytes(entry) >> 63 == 0
        });
    }

    fn service(&self, tracking: WriteTracking, gate: &Arc<Gate>) -> Arc<Service> {
        self.service_on(tracking, gate, false)
    }

    fn service_on(&self, tracking: WriteTracking, gate: &Arc<Gate>, is_old: bool) -> Arc<Service> {
        let region = Region {
            host_addr: self.addr as u64,
            len_bytes: PAGES * PAGE_SIZE_U64,
            guest_offset_bytes: 0,
            page_size: 4096,
        };
        let uffd = Uffd::create().unwrap();
        uffd.negotiate(tracking).unwrap();
        uffd.register(&region, tracking).unwrap();
        let pagemap = Pagemap::of_process(i32::try_from(std::process::id()).unwrap()).unwrap();
        let host = HostKernel::new(
            uffd,
            Regions::new(vec![region]).unwrap(),
            Backing::SharedMemfd(self.memfd.try_clone().unwrap()),
            tracking,
            Some(Arc::new(pagemap)),
        );
        let kernel = Held {
            host: host.unwrap(),
            gate: Arc::clone(gate),
            is_old,
        };
        let parts = (
            Machine::new(PAGES, PAGE_SIZE as u64),
            Counters::new().unwrap(),
            FailureSignal::new().unwrap(),
        );
        let source = Arc::new(Numbers);
        Arc::new(Service::new(Box::new(kernel), source, tracking, 1, parts))
    }
}

/// The late copy on a shared memfd, at its worst: the discard is through, and the guest has its
/// page back and writes to it, before the reader, which has read the event, gets to anything else.
///
/// Fails without the registration for unmapped pages (tried: the guest's write is lost, the page
/// reads as zero).
#[test]
fn a_write_that_overtakes_the_reader_is_not_lost_with_the_late_copy() {
    for tracking in [
        WriteTracking::Async,
        WriteTracking::Sync,
        WriteTracking::Off,
    ] {
        let guest = Guest::new();
        let gate = Arc::new(Gate::default());
        let service = guest.service(tracking, &gate);
        let reader = threads::spawn(&service, "reader", threads::reader).unwrap();
        assert_eq!(guest.read(40), 41);
        guest.punch(40);
        assert_eq!(guest.read(40), 41, "the late copy");
        gate.set(true);
        std::thread::scope(|scope| {
            let vmm = scope.spawn(|| {
                guest.madvise(40);
                guest.write(40, 7);
                guest.write(41, 8);
            });
            until("the reader is held", || gate.reached.load(Ordering::SeqCst));
            std::thread::sleep(TEMPTATION);
            gate.set(false);
            vmm.join().unwrap();
        });
        assert_eq!((guest.read(40), guest.read(41)), (7, 8), "{tracking:?}");
        service.tell_to_stop();
        reader.join().unwrap();
    }
}

/// A page that the kernel has unmapped by itself is mapped again, with what the guest wrote and
/// with what is known of its being written.
#[test]
fn a_page_that_lost_its_mapping_keeps_what_was_written_to_it() {
    for tracking in [
        WriteTracking::Async,
        WriteTracking::Sync,
        WriteTracking::Off,
    ] {
        stay_on_one_processor();
        let guest = Guest::new();
        let service = guest.service(tracking, &Arc::new(Gate::default()));
        let reader = threads::spawn(&service, "reader", threads::reader).unwrap();
        assert_eq!(guest.read(3), 4);
        guest.write(4, 99);
        [3, 4].into_iter().for_each(|page| guest.page_out(page));
        assert_eq!((guest.read(3), guest.read(4)), (4, 99), "{tracking:?}");
        service.tell_to_stop();
        reader.join().unwrap();
    }
}

/// Before Linux 6.4 UFFDIO_CONTINUE cannot protect what it maps.
#[test]
fn a_page_that_cannot_be_mapped_protected_counts_as_written() {
    stay_on_one_processor();
    let guest = Guest::new();
    let service = guest.service_on(WriteTracking::Sync, &Arc::new(Gate::default()), true);
    let reader = threads::spawn(&service, "reader", threads::reader).unwrap();
    assert_eq!((guest.read(3), guest.read(4)), (4, 5));
    guest.page_out(3);
    assert_eq!(guest.read(3), 4);
    let written = service.lock().machine.known_written();
    assert!(written.contains(3) && !written.contains(4));
    guest.write(3, 99);
    until("the fault is dealt with", || {
        service.lock().machine.waiting().0 == 0
    });
    assert_eq!(guest.read(3), 99);
    service.tell_to_stop();
    reader.join().unwrap();
}
