//! A source in huge pages, for guest memory that consists of them.
//!
//! A huge page is zero if all of it is; otherwise it is put together from runs of data and zeros.
//! Content at hand is passed on only where it stands ready for all of the page (a raw file in the
//! page cache): decoding 2 MiB is a worker's work.

use std::io;
use std::sync::Arc;

use crate::bulk::READ_PAGES_MAX;
use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE, PAGE_SIZE_U64, PageRun, bytes_of_pages};
use crate::source::{Content, PageSource, SourceKind, SourceRun, runs_of};

/// Base pages of a huge one.
pub(crate) const BASE_PAGES: u64 = HUGE_PAGE_BYTES / PAGE_SIZE_U64;

/// See the module. Its page numbers count huge pages.
pub(crate) struct HugeSource(pub(crate) Arc<dyn PageSource>);

impl PageSource for HugeSource {
    fn run_at(&self, page: u64) -> SourceRun {
        let base = PageRun::new(page, 1).in_base_pages(BASE_PAGES);
        let first = self.0.run_at(base.first_page);
        if first.kind == SourceKind::Zero && first.pages >= BASE_PAGES {
            return SourceRun {
                pages: first.pages / BASE_PAGES,
                kind: SourceKind::Zero,
            };
        }
        let zero = runs_of(&*self.0, base, BASE_PAGES).all(|(_, kind)| kind == SourceKind::Zero);
        SourceRun {
            pages: 1,
            kind: if zero {
                SourceKind::Zero
            } else {
                SourceKind::Data
            },
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        let base_pages = (buf.len() / PAGE_SIZE) as u64;
        let whole = PageRun::new(first_page * BASE_PAGES, base_pages);
        let mut rest = buf;
        for (run, kind) in runs_of(&*self.0, whole, READ_PAGES_MAX) {
            let (part, after) = rest.split_at_mut(bytes_of_pages(run.pages));
            match kind {
                SourceKind::Zero => part.fill(0),
                SourceKind::Data => self.0.read(run.first_page, part)?,
            }
            rest = after;
        }
        Ok(())
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        let base = run.in_base_pages(BASE_PAGES);
        let there = self.0.run_at(base.first_page);
        let whole = there.kind == SourceKind::Data && there.pages >= base.pages;
        if self.0.block_pages() > 1 || !whole {
            return None;
        }
        self.0.at_hand(base, buf)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Each data page holds its number; pages 300 to 1199 are data, the others zero.
    struct Numbers {
        reads: Mutex<Vec<PageRun>>,
    }

    impl PageSource for Numbers {
        fn run_at(&self, page: u64) -> SourceRun {
            let (end_page, kind) = match page {
                0..300 => (300, SourceKind::Zero),
                300..1200 => (1200, SourceKind::Data),
                _ => (u64::MAX, SourceKind::Zero),
            };
            SourceRun {
                pages: end_page - page,
                kind,
            }
        }

        fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
            let read = PageRun::new(first_page, (buf.len() / PAGE_SIZE) as u64);
            self.reads.lock().unwrap().push(read);
            for (bytes, page) in buf.chunks_mut(PAGE_SIZE).zip(first_page..) {
                bytes.fill(0);
                bytes[..8].copy_from_slice(&page.to_le_bytes());
            }
            Ok(())
        }
    }

    #[test]
    fn a_huge_page_is_put_together_from_zeros_and_short_enough_reads_of_data() {
        let source = Arc::new(Numbers {
            reads: Mutex::default(),
        });
        let huge = HugeSource(source.clone());
        let kinds = [0, 1, 2, 3].map(|page| huge.run_at(page).kind);
        let data = SourceKind::Data;
        assert_eq!(kinds, [data, data, data, SourceKind::Zero]);

        let mut buf = vec![0xAA; bytes_of_pages(3 * BASE_PAGES)];
        huge.read(0, &mut buf).unwrap();
        for (bytes, page) in buf.chunks(PAGE_SIZE).zip(0..) {
            let number = if (300..1200).contains(&page) { page } else { 0 };
            assert_eq!(bytes[..8], u64::to_le_bytes(number), "page {page}");
            assert!(bytes[8..].iter().all(|byte| *byte == 0), "page {page}");
        }
        let reads = source.reads.lock().unwrap().clone();
        let expected = [(300, 256), (556, 256), (812, 256), (1068, 132)];
        assert_eq!(
            reads,
            expected.map(|(first, pages)| PageRun::new(first, pages))
        );
    }
}
