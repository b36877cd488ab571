//! The working set: which pages the next resume of this memory should bring in ahead.
//!
//! Pure. The set is in the order in which its pages were needed, as far as that is known: a guest that
//! is resumed again needs them in the same order, and meets fewer that are still on their way.
//!
//! Pages that a thread waited for come first, then those that were brought in around them
//! or ahead of them. Whether one of the latter was used cannot be seen from outside the guest: a
//! page's accessed bit is set by its being installed. They are kept all the same, because a set
//! without them would fault on every one of them at the next resume; pages that the guest gave
//! back drop out, and the bound cuts them, the last to come first, before it cuts a page that was waited
//! for.

use crate::page_set::{PageRun, PageSet};

/// Pages of a working set: 32 MiB, twice what a resumed Debian guest touches until its agent answers.
/// A set is inherited from pause to pause and what it brought in is carried along, so that without a
/// bound it would grow towards all of memory; a guest that needs more is served by faults.
pub const WORKING_SET_PAGES_MAX: u64 = 8192;

/// Runs of a working set. It is stored in each build's manifest: 4,096 runs are about 100 KB.
pub const WORKING_SET_RUNS_MAX: usize = 4096;

/// Runs of pages whose order of arrival is kept: 128 KiB at most, and more than a resume brings in until
/// its agent answers. What comes after them has no order.
const ARRIVALS_MAX: usize = 8192;

/// A long run is put in order in pieces of so many pages: 1 MiB, what is prefetched at once.
const PIECE_PAGES: u64 = 256;

/// Runs this close to each other become one: reading 3 pages more costs less than another read.
const GAP_PAGES: u64 = 3;

/// The order in which pages were installed for the first time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals {
    runs: Vec<PageRun>,
}

impl Arrivals {
    pub(crate) fn add(&mut self, page: u64) {
        if let Some(last) = self.runs.last_mut()
            && last.end_page() == page
        {
            last.pages += 1;
        } else if self.runs.len() < ARRIVALS_MAX {
            self.runs.push(PageRun::new(page, 1));
        }
    }

    pub(crate) fn in_base_pages(mut self, base_pages: u64) -> Self {
        for run in &mut self.runs {
            *run = run.in_base_pages(base_pages);
        }
        self
    }

    /// These runs (sorted), cut into pieces, the first needed first.
    fn in_order(&self, runs: &[PageRun]) -> Vec<PageRun> {
        let cut = |run: &PageRun| {
            let run = *run;
            let pieces = run.pages.div_ceil(PIECE_PAGES);
            (0..pieces).map(move |piece| {
                let first_page = run.first_page + piece * PIECE_PAGES;
                PageRun::new(first_page, PIECE_PAGES.min(run.end_page() - first_page))
            })
        };
        let mut pieces: Vec<(usize, PageRun)> = runs
            .iter()
            .flat_map(cut)
            .map(|piece| (usize::MAX, piece))
            .collect();
        for (number, arrived) in self.runs.iter().enumerate() {
            let next = pieces.partition_point(|(_, piece)| piece.end_page() <= arrived.first_page);
            let met = pieces[next..]
                .iter_mut()
                .take_while(|(_, piece)| piece.first_page < arrived.end_page());
            for (first, _) in met {
                *first = number.min(*first);
            }
        }
        pieces.sort_by_key(|(number, _)| *number);
        let mut ordered: Vec<PageRun> = Vec::new();
        for (_, piece) in pieces {
            match ordered.last_mut() {
                Some(last) if last.end_page() == piece.first_page => last.pages += piece.pages,
                _ => ordered.push(piece),
            }
        }
        ordered
    }
}

/// The set, within the bounds, in order.
pub(crate) fn compact(used: &PageSet, brought_in: &PageSet, arrivals: &Arrivals) -> Vec<PageRun> {
    let mut chosen = PageSet::with_capacity_pages(used.capacity_pages());
    let mut room_pages = WORKING_SET_PAGES_MAX;
    let first_come = arrivals.runs.iter().copied();
    for (runs, of) in [
        (used.runs().collect::<Vec<_>>(), used),
        (first_come.collect(), brought_in),
        (brought_in.runs().collect(), brought_in),
    ] {
        for page in runs.iter().flat_map(|run| run.first_page..run.end_page()) {
            if room_pages > 0 && of.contains(page) && !chosen.contains(page) {
                chosen.insert(page);
                room_pages -= 1;
            }
        }
    }
    let runs: Vec<PageRun> = chosen.runs().collect();
    let runs = joined_within(&runs, room_pages);
    let mut runs = arrivals.in_order(&longest(runs));
    // Cutting may have made a few too many; the last are the least urgent.
    runs.truncate(WORKING_SET_RUNS_MAX);
    runs
}

/// Joins neighbouring runs over small gaps, as long as there is room for the pages between.
fn joined_within(runs: &[PageRun], mut room_pages: u64) -> Vec<PageRun> {
    let mut joined: Vec<PageRun> = Vec::new();
    for run in runs {
        if let Some(last) = joined.last_mut() {
            let gap_pages = run.first_page - last.end_page();
            if gap_pages <= GAP_PAGES && gap_pages <= room_pages {
                room_pages -= gap_pages;
                last.pages = run.end_page() - last.first_page;
                continue;
            }
        }
        joined.push(*run);
    }
    joined
}

/// As many runs as there may be: the longest, which save the most faults for each.
fn longest(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    if runs.len() <= WORKING_SET_RUNS_MAX {
        return runs;
    }
    runs.sort_by_key(|run| std::cmp::Reverse(run.pages));
    runs.truncate(WORKING_SET_RUNS_MAX);
    runs.sort_by_key(|run| run.first_page);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::with_capacity_pages(1 << 17);
        for (first_page, pages) in runs {
            set.insert_run(PageRun::new(*first_page, *pages));
        }
        set
    }

    #[test]
    fn near_runs_are_joined_and_far_ones_are_not() {
        let runs = compact(
            &set(&[(0, 2), (5, 1), (10, 1)]),
            &set(&[]),
            &Arrivals::default(),
        );
        assert_eq!(runs, [PageRun::new(0, 6), PageRun::new(10, 1)]);
    }

    #[test]
    fn pages_that_were_waited_for_are_kept_before_the_others() {
        let used = set(&[(50_000, 10)]);
        let runs = compact(&used, &set(&[(0, 40_000)]), &Arrivals::default());
        assert!(runs.contains(&PageRun::new(50_000, 10)));
        assert_eq!(
            runs.iter().map(|run| run.pages).sum::<u64>(),
            WORKING_SET_PAGES_MAX
        );
    }

    #[test]
    fn of_what_was_brought_in_the_first_to_come_is_kept() {
        let mut arrivals = Arrivals::default();
        (60_000..60_100).for_each(|page| arrivals.add(page));
        let brought_in = set(&[(0, 40_000), (60_000, 100)]);
        let runs = compact(&set(&[]), &brought_in, &arrivals);
        assert!(runs.contains(&PageRun::new(60_000, 100)));
        assert_eq!(
            runs.iter().map(|run| run.pages).sum::<u64>(),
            WORKING_SET_PAGES_MAX
        );
    }

    #[test]
    fn the_number_of_runs_is_bounded() {
        let scattered: Vec<_> = (0..6000).map(|index| (index * 10, 1)).collect();
        let mut used = set(&scattered);
        used.insert_run(PageRun::new(100_000, 50));
        let runs = compact(&used, &set(&[]), &Arrivals::default());
        assert_eq!(runs.len(), WORKING_SET_RUNS_MAX);
        assert!(runs.contains(&PageRun::new(100_000, 50)));
        assert!(runs.is_sorted());
    }

    #[test]
    fn what_was_needed_first_comes_first() {
        let used = set(&[(100, 10), (5000, 600), (90_000, 4)]);
        let mut arrivals = Arrivals::default();
        [90_001, 5300, 5301, 100, 5000, 90_002, 7]
            .into_iter()
            .for_each(|page| arrivals.add(page));
        let expected = [
            PageRun::new(90_000, 4),
            PageRun::new(5256, 256),
            PageRun::new(100, 10),
            PageRun::new(5000, 256),
            PageRun::new(5512, 88),
        ];
        assert_eq!(compact(&used, &set(&[]), &arrivals), expected);
    }

    #[test]
    fn the_order_that_is_kept_is_bounded() {
        let mut arrivals = Arrivals::default();
        (0..100_000).for_each(|page| arrivals.add(page * 7 % 100_000));
        assert_eq!(arrivals.runs.len(), ARRIVALS_MAX);
    }
}
