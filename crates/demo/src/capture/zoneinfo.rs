//! What a guest's `/proc/zoneinfo` says of pages that are in nobody's hands and on no free list:
//! those on the per-CPU lists, and how far the free counter may be off.
//!
//! The kernel hands out small pages from lists that each processor has of its own, and refills them
//! from the free lists in batches. Such a page is neither free for MemFree nor marked as free in the
//! page array. MemFree itself is exact only to the kernel's *stat threshold* for each processor and
//! zone, since each processor counts for itself up to it.

use serde::Serialize;

/// Pages, over all zones and processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PerCpuLists {
    /// On the lists at the moment of the look.
    pub count: u64,
    /// How many may be on them before some go back (`high`).
    pub high: u64,
    /// How far the free counter may be off (`vm stats threshold`).
    pub counter_slack: u64,
}

impl PerCpuLists {
    /// Reads the text; what is not known is skipped, as kernels add lines.
    #[must_use]
    pub fn parse(zoneinfo: &str) -> Self {
        let mut sum = Self::default();
        for line in zoneinfo.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let Ok(value) = value.trim().parse::<u64>() else {
                continue;
            };
            match name.trim() {
                "count" => sum.count += value,
                "high" => sum.high += value,
                "vm stats threshold" => sum.counter_slack += value,
                _ => {}
            }
        }
        sum
    }

    /// By how many pages two right counts of free memory may differ, when a moment lies between.
    #[must_use]
    pub fn bound_pages(&self) -> u64 {
        self.high.max(self.count) + self.counter_slack
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_of_all_zones_add_up_and_unknown_lines_are_skipped() {
        let text = "Node 0, zone      DMA\n  pages free     3840\n        high     45\n  pagesets\n    \
            cpu: 0\n              count:    0\n              high:     0\n              batch: 1\n  \
            vm stats threshold: 2\nNode 0, zone    DMA32\n  pagesets\n    cpu: 0\n              \
            count:    120\n              high:     340\n              high_min: 300\n  \
            vm stats threshold: 12\n  node_unreclaimable:  0\n";
        let lists = PerCpuLists::parse(text);
        assert_eq!(
            lists,
            PerCpuLists {
                count: 120,
                high: 340,
                counter_slack: 14
            }
        );
        assert_eq!(lists.bound_pages(), 354);
    }
}
