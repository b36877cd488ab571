//! What /proc/PID/pagemap says of a guest's pages: which were written, which are there.
//!
//! PAGEMAP_SCAN (kernel 6.7) answers in runs; the plain file, 8 bytes for each page, is the
//! fallback for the question "is it there?". Layouts are those of `include/uapi/linux/fs.h` and
//! `Documentation/admin-guide/mm/pagemap.rst`.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::page_set::PAGE_SIZE_U64;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// The page was written since it was write-protected (or never was protected).
pub(crate) const WRITTEN: u64 = 1 << 1;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
/// The page is the kernel's zero page: nobody wrote it since it was installed as such.
const ZERO: u64 = 1 << 5;

const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// Bit 57: write-protected through userfaultfd, also where only a marker is left of the page.
const ENTRY_PROTECTED: u64 = 1 << 57;
const ENTRY_BYTES: u64 = 8;

/// Runs that one PAGEMAP_SCAN returns. 24 bytes each: 24 KiB of buffer, and a guest whose every
/// other page was written costs 64 calls for 512 MiB.
const REGIONS_PER_SCAN: usize = 1024;

/// Entries of the plain file read at once: 32 KiB.
const ENTRIES_PER_READ: u64 = 4096;

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(
    size_of::<ScanArg>() == 0x60,
    "the ioctl number holds the size"
);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// An open /proc/PID/pagemap.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
}

impl Pagemap {
    pub(crate) fn of_process(pid: i32) -> io::Result<Self> {
        Ok(Self {
            file: File::open(format!("/proc/{pid}/pagemap"))?,
        })
    }

    /// Every page in `start..end` that was written and is present or swapped out.
    pub(crate) fn written_there(
        &self,
        start: u64,
        end: u64,
        sink: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        self.scan(start, end, (WRITTEN, PRESENT | SWAPPED), WRITTEN, sink)
    }

    /// Every page in `start..end` that carries no write-protection: written ones, and those of
    /// which no trace is left in the page table.
    pub(crate) fn unprotected(
        &self,
        start: u64,
        end: u64,
        sink: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        self.scan(start, end, (WRITTEN, 0), WRITTEN, sink)
    }

    /// Every page in `start..end` that is the zero page; none on kernels that cannot tell.
    pub(crate) fn zero_pages(
        &self,
        start: u64,
        end: u64,
        sink: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        match self.scan(start, end, (ZERO, 0), ZERO, sink) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
            result => result,
        }
    }

    fn scan(
        &self,
        start: u64,
        end: u64,
        (all_of, any_of): (u64, u64),
        returned: u64,
        sink: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let mut found = vec![PageRegion::default(); REGIONS_PER_SCAN];
        let mut from = start;
        while from < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: 0,
                start: from,
                end,
                walk_end: 0,
                vec: found.as_mut_ptr().addr() as u64,
                vec_len: REGIONS_PER_SCAN as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: all_of,
                category_anyof_mask: any_of,
                // Of written pages nothing but WRITTEN may be asked back: it keeps runs long, and
                // the kernel counts unpopulated entries as written only on this path.
                return_mask: returned,
            };
            // SAFETY: `arg` is the struct that this request reads and writes, and `vec` names a
            // live buffer of `vec_len` regions that nobody else uses during the call.
            let count = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    PAGEMAP_SCAN,
                    std::ptr::from_mut(&mut arg),
                )
            };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            for region in found.iter().take(count) {
                sink(region.start, region.end);
            }
            if arg.walk_end <= from {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            from = arg.walk_end;
        }
        Ok(())
    }

    /// Whether a page carries write-protection, mapped or not.
    pub(crate) fn protected(&self, addr: u64) -> io::Result<bool> {
        let mut entry = [0; 8];
        let offset = addr / PAGE_SIZE_U64 * ENTRY_BYTES;
        self.file.read_exact_at(&mut entry, offset)?;
        Ok(u64::from_le_bytes(entry) & ENTRY_PROTECTED != 0)
    }

    /// Every page in `start..end` that is present or swapped out, by the plain file. What is swapped
    /// out and write-protected is left out: nobody has written it, and the marker that a discard
    /// leaves on a private mapping of a file looks the same.
    pub(crate) fn there(
        &self,
        start: u64,
        end: u64,
        sink: &mut dyn FnMut(u64, u64),
    ) -> io::Result<()> {
        let mut page = start / PAGE_SIZE_U64;
        let end_page = end / PAGE_SIZE_U64;
        while page < end_page {
            let entries = ENTRIES_PER_READ.min(end_page - page);
            let mut buf = vec![0; usize::try_from(entries * ENTRY_BYTES).unwrap_or(0)];
            self.file.read_exact_at(&mut buf, page * ENTRY_BYTES)?;
            let (words, _) = buf.as_chunks::<8>();
            for (word, page) in words.iter().zip(page..) {
                let entry = u64::from_le_bytes(*word);
                let swapped = entry & ENTRY_SWAPPED != 0 && entry & ENTRY_PROTECTED == 0;
                if entry & ENTRY_PRESENT != 0 || swapped {
                    sink(page * PAGE_SIZE_U64, (page + 1) * PAGE_SIZE_U64);
                }
            }
            page += entries;
        }
        Ok(())
    }
}
