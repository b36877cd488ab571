//! Whether a memory file holds all of a stretch, asked without walking any further (cachestat(2)).

use std::fs::File;
use std::os::fd::AsRawFd;

/// The system call's number, the same on every architecture; the C library's header is older.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    len_bytes: u64,
}

/// `struct cachestat`, all of it in pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether so many bytes from `offset` on are all held in memory. Kernels before 6.5 do not know, and
/// then it is no.
pub(crate) fn holds_all(file: &File, offset: u64, len_bytes: u64, page_bytes: u64) -> bool {
    let range = Range { offset, len_bytes };
    let mut found = CacheStat::default();
    // SAFETY: the kernel reads `range` and writes `found`, both of which live until it returns.
    let answer = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            0,
        )
    };
    let first_page = offset / page_bytes;
    let end_page = (offset + len_bytes).div_ceil(page_bytes);
    answer == 0 && found.cached == end_page - first_page
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::memory::create_memfd;

    const PAGE: u64 = 4096;

    #[test]
    fn a_stretch_with_a_hole_is_told_from_one_without() {
        let file = File::from(create_memfd(64 * PAGE).unwrap());
        file.write_all_at(&[7; 8 * 4096], 10 * PAGE).unwrap();
        // Not known on kernels before 6.5: then it is no everywhere.
        let knows = holds_all(&file, 10 * PAGE, PAGE, PAGE);
        let all = |from: u64, len: u64| holds_all(&file, from, len, PAGE);
        assert_eq!(all(10 * PAGE, 8 * PAGE), knows);
        assert_eq!(all(10 * PAGE + 5, 8 * PAGE - 7), knows);
        assert!(!all(10 * PAGE, 8 * PAGE + 1));
        assert!(!all(9 * PAGE, 4 * PAGE));
        assert!(!all(0, 64 * PAGE));
    }
}
