//! How much is filled around a fault. Pure.
//!
//! A fault that continues where an earlier window ended is a sequential hit: the window doubles
//! and lies ahead of it, up to [`AROUND_PAGES_MAX`]. Any other fault is a miss and gets the aligned
//! window of the base size. Several streams are told apart, so that guest threads which each walk
//! through memory of their own do not look random together. A stream that misses for as long as
//! others hit is forgotten and starts again at the base.
//!
//! It does not know which pages are there or what they hold, and cannot know whether a page that
//! was brought in is used: installing it sets its accessed bit.

use crate::page_set::PageRun;

/// The longest window: 2 MiB. Copying one takes under a millisecond, in which other faults are
/// still served first; beyond it nothing more is gained (the fault costs a hundredth of the copy).
pub(crate) const AROUND_PAGES_MAX: u64 = 512;

/// Streams that are told apart: more than a small guest has processors.
const STREAMS: usize = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// Where a sequential fault would be.
    end_page: u64,
    /// The last window's length; 0: no stream.
    pages: u64,
    /// When it was used last, in faults.
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Around {
    base_pages: u64,
    streams: [Stream; STREAMS],
    faults: u64,
}

impl Around {
    /// Windows of `base_pages` at least; 1 turns filling around off.
    pub(crate) fn new(base_pages: u64) -> Self {
        Self {
            base_pages: base_pages.clamp(1, AROUND_PAGES_MAX),
            streams: [Stream::default(); STREAMS],
            faults: 0,
        }
    }

    /// The window to fill for a fault at `page`, inside its region. It holds the page. `shy`: only
    /// a sequential hit fills more than the page.
    pub(crate) fn window(&mut self, page: u64, region: PageRun, shy: bool) -> PageRun {
        let single = PageRun::new(page, 1);
        if self.base_pages == 1 {
            return single;
        }
        self.faults += 1;
        // Exactly there: with any slack, random touches in a small area look sequential (a guest
        // that frees and faults was served 2 MiB windows, and ran at half the speed).
        let continues = |stream: &&mut Stream| stream.pages > 0 && stream.end_page == page;
        // Aligned at both ends: a source's blocks (compressed frames) are then read whole.
        let start_page = page - page % self.base_pages;
        let wanted = if let Some(stream) = self.streams.iter_mut().find(continues) {
            stream.pages = (stream.pages * 2).min(AROUND_PAGES_MAX);
            stream.end_page = start_page + stream.pages;
            stream.used = self.faults;
            PageRun::new(start_page, stream.pages)
        } else {
            let aligned = if shy {
                single
            } else {
                PageRun::new(start_page, self.base_pages)
            };
            if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
                *oldest = Stream {
                    end_page: aligned.end_page(),
                    pages: aligned.pages.max(self.base_pages / 2),
                    used: self.faults,
                };
            }
            aligned
        };
        wanted.clipped_to(region).unwrap_or(single)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REGION: PageRun = PageRun::new(0, 1 << 20);

    #[test]
    fn a_window_grows_while_faults_are_sequential_and_starts_again_where_they_jump() {
        let mut around = Around::new(16);
        let mut page = 1000;
        let mut lengths = Vec::new();
        for _ in 0..8 {
            let window = around.window(page, REGION, false);
            lengths.push(window.pages);
            page = window.end_page();
        }
        assert_eq!(lengths, [16, 32, 64, 128, 256, 512, 512, 512]);
        assert_eq!(
            around.window(500_003, REGION, false),
            PageRun::new(500_000, 16),
            "aligned, around the page"
        );
    }

    #[test]
    fn threads_that_walk_side_by_side_are_told_apart() {
        let mut around = Around::new(16);
        let mut walkers: Vec<u64> = (0..8).map(|walker| walker * 100_000).collect();
        for _ in 0..6 {
            for page in &mut walkers {
                *page = around.window(*page, REGION, false).end_page();
            }
        }
        for page in walkers {
            assert_eq!(around.window(page, REGION, false).pages, AROUND_PAGES_MAX);
        }
    }

    #[test]
    fn a_shy_window_is_filled_for_sequential_hits_only() {
        let mut around = Around::new(16);
        let mut window = |page| around.window(page, REGION, true);
        assert_eq!(window(1000), PageRun::new(1000, 1));
        assert_eq!(window(5000), PageRun::new(5000, 1));
        assert_eq!(window(1001), PageRun::new(992, 16));
        assert_eq!(window(1008).pages, 32);
    }

    #[test]
    fn a_base_of_one_page_never_grows() {
        let mut around = Around::new(1);
        for page in 0..100 {
            assert_eq!(around.window(page, REGION, false), PageRun::new(page, 1));
        }
    }

    proptest! {
        #[test]
        fn a_window_holds_its_page_and_stays_in_the_region(
            faults in proptest::collection::vec(0_u64..3000, 1..200),
            base in 1_u64..600,
        ) {
            let region = PageRun::new(1000, 777);
            let mut around = Around::new(base);
            for fault in faults {
                let page = region.first_page + fault % region.pages;
                let window = around.window(page, region, false);
                prop_assert!((window.first_page..window.end_page()).contains(&page));
                prop_assert!(window.first_page >= region.first_page);
                prop_assert!(window.end_page() <= region.end_page());
                prop_assert!(window.pages <= AROUND_PAGES_MAX);
            }
        }
    }
}
