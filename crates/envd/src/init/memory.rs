//! How the guest's kernel keeps its free memory.
//!
//! Each processor has lists of free pages of its own, in front of the kernel's. Since Linux 6.7 they
//! grow with what is freed, up to an eighth of all memory: pages that are free and that neither
//! free page reporting, nor hinting, nor a scan of the stopped guest can know to be. Measured after
//! deleting 32 MB in a guest of 256 MiB: 12 to 16 MB were kept there.
//!
//! What is best effort here: a kernel without the setting has smaller lists.

use std::fs;
use std::num::NonZero;

use crate::console::say;

/// Pages that a processor's lists may keep: 2 MiB, about what kernels before 6.7 allow them.
const LIST_PAGES_MAX: u64 = 512;
/// The kernel takes no smaller fraction (`MIN_PERCPU_PAGELIST_HIGH_FRACTION`, mm/page_alloc.c).
const FRACTION_MIN: u64 = 8;
const SETTING: &str = "/proc/sys/vm/percpu_pagelist_high_fraction";

/// Bounds the lists of free pages that each processor keeps.
pub(super) fn bound_per_cpu_lists() {
    let Some(total_kib) = total_kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
    else {
        return;
    };
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let text = fraction(total_kib / 4, processors).to_string();
    if let Err(error) = fs::write(SETTING, text) {
        say(&format!("envd: {SETTING} cannot be set: {error}"));
    }
}

/// All memory divided by this, and by the processors, is what one of them may keep.
fn fraction(total_pages: u64, processors: u64) -> u64 {
    (total_pages / (processors * LIST_PAGES_MAX)).clamp(FRACTION_MIN, i32::MAX as u64)
}

fn total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_keeps_two_to_four_mebibytes() {
        for (mib, processors) in [(256, 1), (512, 4), (65536, 8)] {
            let pages = mib * 256;
            let kept = pages / fraction(pages, processors) / processors;
            assert!(
                (LIST_PAGES_MAX..=2 * LIST_PAGES_MAX).contains(&kept),
                "{mib} MiB: {kept}"
            );
        }
        // The kernel refuses less than this.
        assert_eq!(fraction(16 << 8, 8), FRACTION_MIN);
    }

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(
            total_kib("MemFree:  1 kB\nMemTotal:         482532 kB\n"),
            Some(482_532)
        );
        assert_eq!(total_kib("nonsense"), None);
    }
}
