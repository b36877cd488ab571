//! Guest memory for tests: mapped in this process, each page's content known.

#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "shared by several test files, each of which uses a part; page numbers are small"
)]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use torpor_pager::{
    Backing, Content as Bytes, PAGE_SIZE, PageRun, PageSource, Pager, PagerConfig, Region,
    SourceKind, SourceRun, Uffd, WriteTracking,
};

/// Generous: only a hang takes that long.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub const WORDS: usize = PAGE_SIZE / 8;

/// A page's bytes: its number, a generation, a checksum of both, and all of it mixed into the
/// rest. Generation 0 is what the source holds.
pub fn stamp(page: u64, generation: u64) -> [u64; WORDS] {
    let checksum = mix(page ^ mix(generation));
    std::array::from_fn(|index| match index {
        0 => page,
        1 => generation,
        2 => checksum,
        _ => checksum ^ mix(index as u64),
    })
}

pub fn mix(value: u64) -> u64 {
    let value = (value ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (value ^ (value >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) ^ (value >> 32)
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Zero,
    Generation(u64),
    /// Neither zeros nor a whole stamp of this page: never right.
    Torn,
}

pub fn classify(page: u64, words: &[u64]) -> Content {
    if words.iter().all(|word| *word == 0) {
        return Content::Zero;
    }
    let generation = words[1];
    if words == stamp(page, generation) {
        Content::Generation(generation)
    } else {
        Content::Torn
    }
}

/// A source of stamped pages that can be slow, fail, or hang, and that counts.
pub struct TestSource {
    pub zero_pages: HashSet<u64>,
    pub pages: u64,
    pub block_pages: u64,
    pub reads: AtomicU64,
    pub pages_read: AtomicU64,
    pub failing: AtomicBool,
    /// Fails that many reads, then works.
    pub fail_reads: AtomicU64,
    pub delay: Duration,
    /// One page of so many must be read; the others are at hand. 0: all must be read.
    pub read_one_of: u64,
    gate: Mutex<bool>,
    gate_moved: Condvar,
}

impl TestSource {
    pub fn new(pages: u64) -> Self {
        Self {
            zero_pages: HashSet::new(),
            pages,
            block_pages: 1,
            reads: AtomicU64::new(0),
            pages_read: AtomicU64::new(0),
            failing: AtomicBool::new(false),
            fail_reads: AtomicU64::new(0),
            delay: Duration::ZERO,
            read_one_of: 0,
            gate: Mutex::new(true),
            gate_moved: Condvar::new(),
        }
    }

    /// Reads hang from now on (`false`) or go on (`true`).
    pub fn open_gate(&self, open: bool) {
        *self.gate.lock().unwrap() = open;
        self.gate_moved.notify_all();
    }
}

impl PageSource for TestSource {
    fn run_at(&self, page: u64) -> SourceRun {
        let kind = |page: u64| {
            if page >= self.pages || self.zero_pages.contains(&page) {
                SourceKind::Zero
            } else {
                SourceKind::Data
            }
        };
        let mine = kind(page);
        let pages = (page..page + 512)
            .take_while(|page| kind(*page) == mine)
            .count() as u64;
        SourceRun { pages, kind: mine }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        drop(
            self.gate_moved
                .wait_while(self.gate.lock().unwrap(), |open| !*open)
                .unwrap(),
        );
        std::thread::sleep(self.delay);
        if self.failing.load(Ordering::SeqCst)
            || self
                .fail_reads
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
        {
            return Err(io::Error::other("the disk is on fire"));
        }
        assert!(buf.len().is_multiple_of(PAGE_SIZE) && buf.len() <= 256 * PAGE_SIZE);
        self.fill(first_page, buf);
        let pages = (buf.len() / PAGE_SIZE) as u64;
        self.pages_read.fetch_add(pages, Ordering::SeqCst);
        Ok(())
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Bytes<'a>> {
        let must_be_read =
            |page: u64| self.read_one_of == 0 || mix(page).is_multiple_of(self.read_one_of);
        if (run.first_page..run.end_page()).any(must_be_read) {
            return None;
        }
        self.fill(run.first_page, buf);
        Some(Bytes::Bytes(buf))
    }

    fn block_pages(&self) -> u64 {
        self.block_pages
    }
}

impl TestSource {
    fn fill(&self, first_page: u64, buf: &mut [u8]) {
        for (index, page) in buf.chunks_mut(PAGE_SIZE).enumerate() {
            let number = first_page + index as u64;
            assert_eq!(
                self.run_at(number).kind,
                SourceKind::Data,
                "zero page {number} was read"
            );
            for (bytes, word) in page.chunks_mut(8).zip(stamp(number, 0)) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    Anonymous,
    SharedMemfd,
    /// A private mapping of a memfd (QEMU with `share=off`).
    PrivateMemfd,
}

/// Guest memory mapped in this process.
pub struct Guest {
    pub addr: u64,
    pub pages: u64,
    pub memfd: Option<OwnedFd>,
    pub page_size: u32,
}

impl Guest {
    /// Memory of huge pages, if the host has that many left: anonymous, or a private mapping of a
    /// memfd. (Shared, it cannot be served.)
    pub fn of_huge_pages(memory: Memory, pages: u64) -> Option<Self> {
        let len = pages as usize * PAGE_SIZE;
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        let null = std::ptr::null_mut();
        let pointer = match memory {
            Memory::Anonymous => {
                let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
                // SAFETY: as in `new`.
                unsafe { rustix::mm::mmap_anonymous(null, len, rw, flags) }
            }
            Memory::SharedMemfd => return None,
            Memory::PrivateMemfd => {
                let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
                let memfd = rustix::fs::memfd_create("test-guest-huge", flags).unwrap();
                rustix::fs::ftruncate(&memfd, len as u64).unwrap();
                // SAFETY: as in `new`.
                unsafe { rustix::mm::mmap(null, len, rw, MapFlags::PRIVATE, &memfd, 0) }
            }
        };
        Some(Self {
            addr: pointer.ok()?.expose_provenance() as u64,
            pages,
            memfd: None,
            page_size: 2 << 20,
        })
    }

    pub fn new(memory: Memory, pages: u64) -> Self {
        match memory {
            Memory::Anonymous => {
                let len = pages as usize * PAGE_SIZE;
                let rw = ProtFlags::READ | ProtFlags::WRITE;
                let null = std::ptr::null_mut();
                // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
                let pointer =
                    unsafe { rustix::mm::mmap_anonymous(null, len, rw, MapFlags::PRIVATE) };
                Self {
                    addr: pointer.unwrap().expose_provenance() as u64,
                    pages,
                    memfd: None,
                    page_size: PAGE_SIZE as u32,
                }
            }
            Memory::SharedMemfd => Self::of_memfd(guest_memfd(pages), pages),
            Memory::PrivateMemfd => {
                let guest = Self::mapped(&guest_memfd(pages), pages, MapFlags::PRIVATE);
                guest.memfd_gone()
            }
        }
    }

    pub fn of_memfd(memfd: OwnedFd, pages: u64) -> Self {
        Self::mapped(&memfd, pages, MapFlags::SHARED)
    }

    fn memfd_gone(mut self) -> Self {
        self.memfd = None;
        self
    }

    fn mapped(memfd: &OwnedFd, pages: u64, flags: MapFlags) -> Self {
        let len = pages as usize * PAGE_SIZE;
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        let null = std::ptr::null_mut();
        // SAFETY: as in `new`.
        let pointer = unsafe { rustix::mm::mmap(null, len, rw, flags, memfd, 0) };
        Self {
            addr: pointer.unwrap().expose_provenance() as u64,
            pages,
            memfd: Some(memfd.try_clone().unwrap()),
            page_size: PAGE_SIZE as u32,
        }
    }

    pub fn region(&self) -> Region {
        Region {
            host_addr: self.addr,
            len_bytes: self.pages * PAGE_SIZE as u64,
            guest_offset_bytes: 0,
            page_size: self.page_size,
        }
    }

    pub fn backing(&self) -> Backing {
        match &self.memfd {
            None => Backing::Anonymous,
            Some(memfd) => Backing::SharedMemfd(memfd.try_clone().unwrap()),
        }
    }

    /// A pager for this memory; `adjust` changes its configuration.
    pub fn pager(
        &self,
        source: &Arc<TestSource>,
        tracking: WriteTracking,
        adjust: impl FnOnce(&mut PagerConfig),
    ) -> Pager {
        let uffd = Uffd::create().unwrap();
        uffd.negotiate(tracking).unwrap();
        uffd.register(&self.region(), tracking).unwrap();
        let source: Arc<dyn PageSource> = source.clone();
        let mut config = PagerConfig::new(uffd, vec![self.region()], source, self.backing());
        config.tracking = tracking;
        config.pagemap_pid = Some(i32::try_from(std::process::id()).unwrap());
        adjust(&mut config);
        Pager::start(config).unwrap()
    }

    fn word(&self, page: u64, index: usize) -> *mut u64 {
        assert!(page < self.pages && index < WORDS);
        std::ptr::with_exposed_provenance_mut(
            self.addr as usize + page as usize * PAGE_SIZE + index * 8,
        )
    }

    /// Reads the page as a guest does: faults where it must.
    pub fn read(&self, page: u64) -> Content {
        let words: Vec<u64> = (0..WORDS)
            .map(|index| {
                // SAFETY: inside the mapping, aligned; volatile, because others write here.
                unsafe { self.word(page, index).read_volatile() }
            })
            .collect();
        classify(page, &words)
    }

    /// Faults the page in. Returns its first word, the page's number unless it is zero: all that can
    /// be known of a page that others are writing.
    pub fn touch(&self, page: u64) -> u64 {
        // SAFETY: as in `read`.
        unsafe { self.word(page, 0).read_volatile() }
    }

    pub fn write(&self, page: u64, generation: u64) {
        for (index, word) in stamp(page, generation).into_iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { self.word(page, index).write_volatile(word) };
        }
    }

    pub fn write_zeros(&self, page: u64) {
        for index in 0..WORDS {
            // SAFETY: as in `read`.
            unsafe { self.word(page, index).write_volatile(0) };
        }
    }

    /// Makes a huge page of 512 pages that are all there. Returns whether the kernel could.
    pub fn make_huge(&self, first_page: u64) -> bool {
        self.advise(first_page, 512, libc::MADV_COLLAPSE)
    }

    /// Splits the huge page that holds this page, by advice about it alone.
    pub fn split_huge(&self, page: u64) -> bool {
        self.advise(page, 1, libc::MADV_COLD)
    }

    fn advise(&self, first_page: u64, pages: u64, advice: i32) -> bool {
        let start = self.word(first_page, 0).cast();
        assert!(first_page + pages <= self.pages);
        // SAFETY: the range lies in the mapping; the advice leaves its content as it is.
        unsafe { libc::madvise(start, pages as usize * PAGE_SIZE, advice) == 0 }
    }

    /// The first half of QEMU's discard; nothing on anonymous memory.
    pub fn punch(&self, first_page: u64, pages: u64) {
        if let Some(memfd) = &self.memfd {
            punch(memfd, first_page, pages);
        }
    }

    /// The second half, which raises the event.
    pub fn madvise(&self, first_page: u64, len_bytes: usize) {
        let start = self.word(first_page, 0).cast();
        assert!(first_page as usize * PAGE_SIZE + len_bytes <= self.pages as usize * PAGE_SIZE);
        // SAFETY: the range lies in the mapping, to which no Rust reference exists.
        unsafe { rustix::mm::madvise(start, len_bytes, Advice::LinuxDontNeed) }.unwrap();
    }

    /// Discards as a VMM does, up to the moment when it tells its guest. Looking at the pager
    /// takes longer than nothing, as telling a guest does: see the crate's documentation about
    /// the window on shared memfds.
    pub fn discard(&self, pager: &Pager, first_page: u64, pages: u64) {
        self.discard_bytes(pager, first_page, pages as usize * PAGE_SIZE);
    }

    /// The same with an end inside a page, which the kernel takes for the page's end.
    pub fn discard_bytes(&self, pager: &Pager, first_page: u64, len_bytes: usize) {
        self.punch(first_page, len_bytes.div_ceil(PAGE_SIZE) as u64);
        self.madvise(first_page, len_bytes);
        event_applied(pager);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let start = self.word(0, 0).cast();
        // SAFETY: our own mapping; whoever used it has ended.
        unsafe { rustix::mm::munmap(start, self.pages as usize * PAGE_SIZE) }.unwrap();
    }
}

pub fn guest_memfd(pages: u64) -> OwnedFd {
    let memfd = rustix::fs::memfd_create("test-guest", MemfdFlags::CLOEXEC).unwrap();
    File::from(memfd.try_clone().unwrap())
        .set_len(pages * PAGE_SIZE as u64)
        .unwrap();
    memfd
}

pub fn punch(memfd: &impl AsFd, first_page: u64, pages: u64) {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let size = PAGE_SIZE as u64;
    rustix::fs::fallocate(memfd, mode, first_page * size, pages * size).unwrap();
}

/// After this, every discard that has returned is applied: looking at the pager takes its lock.
pub fn event_applied(pager: &Pager) {
    assert!(pager.stats().removes > 0);
}

/// Waits until something holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Printed by the tests that use it, which can be run again with it: `TORPOR_TEST_SEED`.
pub fn seed() -> u64 {
    let given = std::env::var("TORPOR_TEST_SEED").ok();
    given.map_or_else(
        || u64::from(std::process::id()),
        |seed| seed.parse().unwrap(),
    )
}

/// A small generator.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % limit
    }
}
