//! A compressed build beside the raw memory file: the same pages, as torpor stores them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use tempfile::TempDir;
use torpor_build::{BuildId, BuildInfo, FRAME_PAGES, ImageKind, ImageReader, PageContent, Storage};
use torpor_pager::{Content, PageRun, PageSource, SourceKind, SourceRun};

use crate::arms::{SERVERS_CPU, TOUCHERS_CPU, per_second, pin};
use crate::memory::PAGE;

/// Pages that are handed to the build's writer at once.
const CHUNK_PAGES: usize = 256;

/// A build of a memory file, in a storage that goes with it.
pub(crate) struct Build {
    storage: Storage,
    id: BuildId,
    _dir: TempDir,
}

impl Build {
    pub(crate) fn of(file: &File, pages: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(&dir.path().join("storage")).unwrap();
        let id = BuildId::random();
        let staged = storage.begin_build(id).unwrap();
        let mut writer = staged
            .image_writer(ImageKind::Memory, pages as u64, None)
            .unwrap();
        let mut chunk = vec![0; CHUNK_PAGES * PAGE];
        for first in (0..pages).step_by(CHUNK_PAGES) {
            let chunk = &mut chunk[..CHUNK_PAGES.min(pages - first) * PAGE];
            file.read_exact_at(chunk, (first * PAGE) as u64).unwrap();
            let len = (chunk.len() / PAGE) as u64;
            writer
                .push(first as u64, len, PageContent::Data(chunk))
                .unwrap();
        }
        let summary = writer.finish().unwrap();
        println!(
            "the build stores {} MiB as {} MiB",
            (summary.stored_pages as usize * PAGE) >> 20,
            summary.data_file_bytes >> 20,
        );
        staged.commit(BuildInfo::default()).unwrap();
        Self {
            storage,
            id,
            _dir: dir,
        }
    }

    /// How fast it is read out of the page cache in pieces of so many pages that stand apart: for
    /// single pages a frame is decoded for each. Pages a second.
    pub(crate) fn decoding(&self, pages: usize, piece: usize) -> f64 {
        pin(SERVERS_CPU);
        let source = self.source(false);
        let mut buf = vec![0; piece * PAGE];
        let frames = piece.max(FRAME_PAGES);
        let mut read = 0;
        let started = Instant::now();
        for first in (0..pages).step_by(frames * 3) {
            let run = PageRun::new(first as u64, piece.min(pages - first) as u64);
            let buf = &mut buf[..run.pages as usize * PAGE];
            if source.at_hand(run, buf).is_none() {
                // The host has dropped it from its cache meanwhile.
                source.read(run.first_page, buf).unwrap();
            }
            read += run.pages as usize;
        }
        let rate = per_second(read, started.elapsed());
        pin(TOUCHERS_CPU);
        rate
    }

    /// A reader of its own, whose files are open already. `by_worker`: without the shortcut.
    pub(crate) fn source(&self, by_worker: bool) -> BuildSource {
        let image = self.storage.open_build(&self.id).unwrap().memory().unwrap();
        image.read_pages(0, &mut vec![0; PAGE]).unwrap();
        BuildSource { image, by_worker }
    }
}

/// As torpor's own sandboxes read a build.
pub(crate) struct BuildSource {
    image: ImageReader,
    by_worker: bool,
}

impl PageSource for BuildSource {
    fn run_at(&self, page: u64) -> SourceRun {
        let run = self.image.index().run_at(page);
        run.map_or(
            SourceRun {
                pages: u64::MAX - page,
                kind: SourceKind::Zero,
            },
            |run| SourceRun {
                pages: run.pages,
                kind: if run.what.reads_as_zero() {
                    SourceKind::Zero
                } else {
                    SourceKind::Data
                },
            },
        )
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let read = self.image.read_pages(first_page, buf);
        read.map_err(std::io::Error::other)
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        let read = !self.by_worker && self.image.try_read_pages(run.first_page, buf);
        read.then_some(Content::Bytes(buf))
    }

    fn block_pages(&self) -> u64 {
        FRAME_PAGES as u64
    }
}
