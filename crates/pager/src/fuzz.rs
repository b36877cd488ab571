//! What comes from outside, as bytes: for the fuzz targets, and for a short run in each test.
//!
//! The kernel is no adversary, but its events say what a guest does, and so must never bring the
//! page states out of step, in whatever order and with whatever addresses they come.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::handshake;
use crate::kernel::{Event, Regions};
use crate::machine::{FaultKind, Machine, Need, Reason};
use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE_U64, PageRun, PageSet};
use crate::region::Region;
use crate::uffd_abi::event_of;

/// A message from a VMM: refused, or regions that can be served (or are refused together).
pub fn handshake(message: &[u8]) {
    let Ok(regions) = handshake::parse(message) else {
        return;
    };
    assert!(!regions.is_empty() && regions.len() <= handshake::REGIONS_MAX);
    for region in &regions {
        let ends = [region.host_addr, region.guest_offset_bytes]
            .map(|start| start.checked_add(region.len_bytes));
        assert!(ends.iter().all(Option::is_some));
    }
    if let Ok(known) = Regions::new(regions) {
        for region in known.iter() {
            let page = region.guest_offset_bytes / known.page_bytes();
            let around = known.around(page);
            assert_eq!(around.map(|run| run.first_page), Some(page));
        }
    }
}

/// Pages of each of the two regions, and where the second one begins in the guest.
const REGION_PAGES: u64 = 16;
const SECOND_PAGE: u64 = 24;
const SPAN_PAGES: u64 = SECOND_PAGE + REGION_PAGES;
/// Where the VMM has them. Between them lie as many pages that are not the guest's.
const HOST_ADDR: u64 = 0x7000_0000_0000;

/// A byte that says what is done next, and a `struct uffd_msg`.
const RECORD_BYTES: usize = 33;

/// Events as they are read, with served and waiting faults in between. The first byte chooses the
/// size of the pages.
pub fn events(bytes: &[u8]) {
    let Some((first, records)) = bytes.split_first() else {
        return;
    };
    let page_bytes = [PAGE_SIZE_U64, HUGE_PAGE_BYTES][usize::from(first & 1)];
    let mut stream = Stream::new(page_bytes);
    for record in records.chunks_exact(RECORD_BYTES) {
        if let Some((action, message)) = record.split_first()
            && let Some(message) = message.first_chunk()
        {
            stream.take_in(message);
            stream.act(*action);
            stream.check();
        }
    }
    stream.serve_all();
    assert_eq!(stream.machine.waiting(), (0, 0), "a fault was lost");
}

/// What a page must be by a plain account of what happened.
#[derive(Clone, Copy, Default)]
struct Page {
    present: bool,
    /// Since the last discard.
    installed: bool,
    removed: bool,
    written: bool,
}

struct Stream {
    regions: Regions,
    page_bytes: u64,
    machine: Machine,
    pages: Vec<Page>,
    waiting: BTreeSet<u64>,
    now: Instant,
}

impl Stream {
    fn new(page_bytes: u64) -> Self {
        let region = |host_page: u64, guest_page: u64| Region {
            host_addr: HOST_ADDR + host_page * page_bytes,
            len_bytes: REGION_PAGES * page_bytes,
            guest_offset_bytes: guest_page * page_bytes,
            page_size: u32::try_from(page_bytes).unwrap_or(0),
        };
        let regions = vec![region(0, 0), region(2 * REGION_PAGES, SECOND_PAGE)];
        #[expect(clippy::unwrap_used, reason = "two regions that lie apart")]
        let regions = Regions::new(regions).unwrap();
        Self {
            machine: Machine::new(regions.span_pages(), page_bytes),
            regions,
            page_bytes,
            pages: vec![Page::default(); usize::try_from(SPAN_PAGES).unwrap_or(0)],
            waiting: BTreeSet::new(),
            now: Instant::now(),
        }
    }

    /// An odd third byte brings both words near the regions: the fuzzer need not guess addresses.
    fn take_in(&mut self, message: &[u8; 32]) {
        let mut message = *message;
        if message[2] & 1 == 1 {
            for at in [8, 16] {
                let word = message[at..].first_chunk::<8>();
                let word = word.map_or(0, |word| u64::from_ne_bytes(*word));
                let near = HOST_ADDR + word % (4 * REGION_PAGES * self.page_bytes);
                // A fault's first word holds its flags.
                if at == 16 || message[0] != 0x12 {
                    message[at..at + 8].copy_from_slice(&near.to_ne_bytes());
                }
            }
        }
        let event = event_of(&message);
        let mut events = Vec::new();
        self.regions
            .translate(event, &mut |event| events.push(event));
        for event in events {
            self.one(event);
        }
    }

    fn one(&mut self, event: Event) {
        match event {
            Event::Fault { page, kind } => {
                assert!(self.regions.around(page).is_some(), "page {page}");
                assert_eq!(self.machine.fault(page, kind, self.now), Ok(()));
                if matches!(kind, FaultKind::Read | FaultKind::Write) {
                    self.page(page).present = false;
                }
                self.waiting.insert(page);
            }
            Event::Remove {
                start_byte,
                end_byte,
            } => {
                let mut whole = PageSet::with_capacity_pages(SPAN_PAGES);
                let mut was_there = false;
                for page in 0..SPAN_PAGES {
                    let (from, to) = (page * self.page_bytes, (page + 1) * self.page_bytes);
                    let covered = end_byte.min(to).saturating_sub(start_byte.max(from));
                    if covered == self.page_bytes {
                        whole.insert(page);
                        was_there |= self.page(page).installed;
                        *self.page(page) = Page {
                            removed: true,
                            ..Page::default()
                        };
                    } else if covered > 0 {
                        self.page(page).written = true;
                    }
                }
                let (told, some_there) = self.machine.remove(start_byte, end_byte);
                assert_eq!(some_there, was_there);
                let told: Vec<PageRun> =
                    Some(told).filter(|run| run.pages > 0).into_iter().collect();
                assert_eq!(told, whole.runs().collect::<Vec<_>>());
            }
            Event::Stray { host_addr } => {
                let inside =
                    |region: &Region| (region.host_addr..region.host_end()).contains(&host_addr);
                assert!(!self.regions.iter().any(inside), "{host_addr:#x}");
            }
            Event::Unasked { event } => assert!(event != 0x12 && event != 0x15),
        }
    }

    fn page(&mut self, page: u64) -> &mut Page {
        let last = self.pages.len() - 1;
        &mut self.pages[usize::try_from(page).unwrap_or(last).min(last)]
    }

    fn act(&mut self, action: u8) {
        match action % 6 {
            0 => {}
            1 => self.serve_fresh(),
            2 => {
                for page in self.machine.take_fresh() {
                    self.machine.set_aside(page);
                }
            }
            3 => {
                for page in self.machine.take_fresh() {
                    self.machine.enqueue(page, PageRun::new(page, 1));
                }
            }
            4 => {
                for page in self.machine.take_aside() {
                    self.serve(page);
                }
            }
            _ => {
                if let Some(page) = self.machine.dequeue() {
                    self.serve(page);
                }
            }
        }
    }

    fn serve_fresh(&mut self) {
        for page in self.machine.take_fresh() {
            self.serve(page);
        }
    }

    /// Installs what the page needs, and wakes.
    fn serve(&mut self, page: u64) {
        let Some(kind) = self.machine.kind(page) else {
            return;
        };
        assert!(self.waiting.remove(&page), "nobody waits for page {page}");
        if self.machine.need(page) == Need::Nothing {
            self.machine.found(page, Reason::Fault);
        } else {
            self.machine.installed(page, Reason::Fault);
            self.page(page).written = false;
        }
        self.page(page).present = true;
        self.page(page).installed = true;
        if kind == FaultKind::Protected {
            self.machine.written(page);
            self.page(page).written = true;
        }
        assert_eq!(self.machine.finish(page), Some(self.now));
    }

    fn serve_all(&mut self) {
        self.serve_fresh();
        for page in self.machine.take_aside() {
            self.serve(page);
        }
        while let Some(page) = self.machine.dequeue() {
            self.serve(page);
        }
        self.check();
    }

    fn check(&self) {
        let (written, removed) = (
            self.machine.known_written(),
            self.machine.removed_since_resume(),
        );
        let absent = self.machine.removed_and_absent();
        for (page, known) in (0..SPAN_PAGES).zip(&self.pages) {
            let need = match (known.present, known.removed) {
                (true, _) => Need::Nothing,
                (_, true) => Need::Zero,
                _ => Need::Source,
            };
            assert_eq!(self.machine.need(page), need, "page {page}");
            assert_eq!(
                written.contains(page),
                known.written,
                "written? page {page}"
            );
            assert_eq!(
                removed.contains(page),
                known.removed,
                "removed? page {page}"
            );
            let gone = known.removed && !known.present;
            assert_eq!(absent.contains(page), gone, "absent? page {page}");
        }
        assert_eq!(self.machine.waiting().0, self.waiting.len());
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A record whose message is one that was asked for, near the regions more often than not.
    fn record() -> impl Strategy<Value = Vec<u8>> {
        let kinds = prop_oneof![Just(0x12_u8), Just(0x15), any::<u8>()];
        let aligned = prop_oneof![any::<u64>(), (0_u64..200).prop_map(|part| part * 2048)];
        let head = (any::<u8>(), kinds, any::<u8>());
        (head, 0_u64..8, aligned, any::<u64>()).prop_map(
            |((action, kind, near), flags, second, third)| {
                let first = if kind == 0x12 { flags } else { third };
                let mut record = vec![action, kind, 0, near, 0, 0, 0, 0, 0];
                for word in [first, second, 0] {
                    record.extend_from_slice(&word.to_ne_bytes());
                }
                record
            },
        )
    }

    proptest! {
        #[test]
        fn no_stream_of_events_brings_the_states_out_of_step(
            huge in any::<bool>(),
            records in vec(record(), 0..60),
        ) {
            let stream = [vec![u8::from(huge)], records.concat()].concat();
            events(&stream);
        }

        #[test]
        fn no_bytes_at_all_do(bytes in vec(any::<u8>(), 0..400)) {
            events(&bytes);
            super::handshake(&bytes);
        }
    }
}
