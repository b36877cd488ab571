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
