//! What the kernel itself says of its pages: `/proc/kpageflags`, read by root, over and over.
//!
//! Two looks are not enough to know a page: one that was freed and taken again between them (the
//! kernel moves pages between its per-CPU lists and its free blocks by the dozen) is in use in both.
//! So the looks follow each other without a pause and without taking memory, from before the moment that is
//! asked for until after it, and a page that was ever seen otherwise counts as changed.

use std::fs::File;
use std::io::{self, BufRead as _};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use torpor_workload::{FreePages, Watching};

/// `KPF_BUDDY`: in a free block of the buddy allocator, its head or not
/// (include/uapi/linux/kernel-page-flags.h).
const KPF_BUDDY: u32 = 10;
const ENTRY_BYTES: usize = 8;
/// Read at once; whole entries.
const CHUNK_BYTES: usize = 256 << 10;

/// How a page was seen, in any of the looks.
const SEEN_FREE: u8 = 1;
const SEEN_USED: u8 = 2;

/// Says [`Watching`] after a first look; looks until a line comes in, and once more; says
/// [`FreePages`].
pub(crate) fn run() -> io::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let mut watch = Watch::new()?;
    // The first look finds out how many pages there are, and warms up what looking needs.
    watch.look()?;
    watch.seen.fill(0);
    watch.look()?;
    let mem_free_kib = mem_free_kib()?;
    // A reader of its own: to ask whether there is a line would be a system call more in each look.
    let reader = std::thread::Builder::new().spawn(|| {
        let asked = io::stdin().lock().read_line(&mut String::new());
        ASKED.store(true, Ordering::Release);
        asked
    })?;
    crate::say(&Watching {
        pages: watch.seen.len() as u64,
    })?;
    let mut looks = 1;
    while !ASKED.load(Ordering::Acquire) {
        watch.look()?;
        looks += 1;
    }
    watch.look()?;
    let asked = reader.join();
    asked.map_err(|_panic| io::Error::other("the reader of the standard input panicked"))??;
    crate::say(&FreePages {
        free: watch.runs(SEEN_FREE),
        changed: watch.runs(SEEN_FREE | SEEN_USED),
        looks: looks + 1,
        mem_free_kib,
    })
}

struct Watch {
    flags: File,
    chunk: Vec<u8>,
    /// For each page frame number, how it was seen.
    seen: Vec<u8>,
}

impl Watch {
    fn new() -> io::Result<Self> {
        Ok(Self {
            flags: File::open("/proc/kpageflags")?,
            chunk: vec![0; CHUNK_BYTES],
            seen: Vec::new(),
        })
    }

    /// Takes memory in the first look only.
    fn look(&mut self) -> io::Result<()> {
        let mut pfn = 0;
        loop {
            let at = (pfn * ENTRY_BYTES) as u64;
            let got = self.flags.read_at(&mut self.chunk, at)?;
            let entries = self.chunk[..got].as_chunks::<ENTRY_BYTES>().0;
            if entries.is_empty() {
                return Ok(());
            }
            let end = pfn + entries.len();
            if self.seen.len() < end {
                self.seen.resize(end, 0);
            }
            for (seen, entry) in self.seen[pfn..end].iter_mut().zip(entries) {
                let free = u64::from_le_bytes(*entry) >> KPF_BUDDY & 1 == 1;
                *seen |= if free { SEEN_FREE } else { SEEN_USED };
            }
            pfn = end;
        }
    }

    /// The runs of pages that were seen exactly so.
    fn runs(&self, seen: u8) -> Vec<(u64, u64)> {
        let mut first = 0;
        let mut runs = Vec::new();
        for same in self.seen.chunk_by(|one, next| one == next) {
            let pages = same.len() as u64;
            if same.first() == Some(&seen) {
                runs.push((first, pages));
            }
            first += pages;
        }
        runs
    }
}

fn mem_free_kib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("MemFree:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemFree"))
}
