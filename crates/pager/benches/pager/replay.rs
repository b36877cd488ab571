//! A real resume, replayed: the pages that a guest touched until its agent answered, in its order.
//!
//! `resume.trace` says at its top how it was recorded. A line is a first touch: `r` read or `w`
//! written; `p` is the first write to a page that was read before.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use torpor_pager::PageRun;

use crate::arms::{Latency, Touched, per_second};
use crate::memory::{Memory, PAGE};

const TRACE: &str = include_str!("resume.trace");

/// Pages of the recorded guest: 512 MiB.
pub(crate) const GUEST_PAGES: usize = 131_072;

/// The memory file holds data in the 2 MiB around each touch, which is as far as a pager looks.
const STAMPED_PAGES: usize = 512;

/// Pages of the window around a fault.
const WINDOW_PAGES: u64 = 16;

/// Pages of a piece of the working set.
const PIECE_PAGES: u64 = 256;

#[derive(Clone, Copy)]
pub(crate) struct Touch {
    pub(crate) page: usize,
    write: bool,
    first: bool,
}

pub(crate) fn trace() -> Vec<Touch> {
    let lines = TRACE.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (how, page) = line.split_once(' ').unwrap();
            Touch {
                page: page.parse().unwrap(),
                write: how != "r",
                first: how != "p",
            }
        })
        .collect()
}

/// The working set as a pager records it: the windows around the touches, joined, in pieces that are in
/// the order of their first touch.
pub(crate) fn working_set(trace: &[Touch]) -> Vec<PageRun> {
    let windows: BTreeSet<u64> = trace
        .iter()
        .map(|touch| touch.page as u64 / WINDOW_PAGES)
        .collect();
    let mut pieces: Vec<PageRun> = Vec::new();
    for window in windows {
        let first_page = window * WINDOW_PAGES;
        match pieces.last_mut() {
            Some(last) if last.end_page() == first_page && last.pages < PIECE_PAGES => {
                last.pages += WINDOW_PAGES;
            }
            _ => pieces.push(PageRun::new(first_page, WINDOW_PAGES)),
        }
    }
    pieces.sort_by_cached_key(|piece| {
        let inside =
            |touch: &Touch| (piece.first_page..piece.end_page()).contains(&(touch.page as u64));
        trace.iter().position(inside)
    });
    pieces
}

/// A memory file for the trace.
pub(crate) fn memory_file(trace: &[Touch]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len((GUEST_PAGES * PAGE) as u64).unwrap();
    let mut chunks: Vec<usize> = trace
        .iter()
        .map(|touch| touch.page / STAMPED_PAGES)
        .collect();
    chunks.sort_unstable();
    chunks.dedup();
    let mut bytes = vec![0_u8; STAMPED_PAGES * PAGE];
    for chunk in chunks {
        let first = chunk * STAMPED_PAGES;
        crate::stamp(&mut bytes, first);
        file.write_all_at(&bytes, (first * PAGE) as u64).unwrap();
    }
    file.sync_all().unwrap();
    file
}

/// Touches what the guest touched, one after the other.
pub(crate) fn replay(memory: &Memory, trace: &[Touch]) -> Touched {
    let mut slow = Vec::new();
    let started = Instant::now();
    for touch in trace {
        let before = Instant::now();
        let word = if touch.first {
            memory.read(touch.page)
        } else {
            touch.page as u64
        };
        if touch.write {
            memory.write(touch.page, touch.page as u64);
        }
        let took = before.elapsed();
        assert_eq!(word, touch.page as u64, "page {} holds {word}", touch.page);
        if took > crate::arms::FAULT_MIN {
            slow.push(took);
        }
    }
    let rate = per_second(trace.len(), started.elapsed());
    Touched {
        rate,
        latency: Latency::of(&mut slow),
    }
}

/// Memory of this process, each page that others share as its part, in bytes.
pub(crate) fn taken_bytes() -> f64 {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = pss.and_then(|pss| pss.split_whitespace().next());
    kib.unwrap().parse::<f64>().unwrap() * 1024.0
}
