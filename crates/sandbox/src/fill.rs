//! How a resumed guest's memory gets its content: on demand through the pager, or all of it before
//! the guest starts.
//!
//! On demand is the way; filling eagerly is for hosts where the VMM cannot be given a userfaultfd
//! (ptrace or userfaultfd forbidden), and for comparing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use nix::fcntl::{FallocateFlags, fallocate};
use torpor_build::{ImageReader, PAGE_SIZE};
use torpor_pager::{Content, PageRun, PageSource, SourceKind, SourceRun};

/// Pages of a compressed frame: reading one of them reads them all.
const FRAME_PAGES: u64 = torpor_build::FRAME_PAGES as u64;

/// A build's memory image as the pager's source.
///
/// What the host's page cache holds of the build's files, and of the base image that it refers to,
/// is decoded and verified by the pager's reader itself: handing a page to another thread costs as
/// much. A run of its pages stands together in one layer, so that what one question costs is
/// bounded: [`FILL_PAGES_MAX`](torpor_pager::FILL_PAGES_MAX) pages lie in five frames at most.
#[derive(Debug)]
pub struct ImageSource(pub std::sync::Arc<ImageReader>);

impl PageSource for ImageSource {
    fn run_at(&self, page: u64) -> SourceRun {
        match self.0.index().run_at(page) {
            Some(run) => {
                let kind = if run.what.reads_as_zero() {
                    SourceKind::Zero
                } else {
                    SourceKind::Data
                };
                SourceRun {
                    pages: run.pages,
                    kind,
                }
            }
            // Past the image's end.
            None => SourceRun {
                pages: u64::MAX - page,
                kind: SourceKind::Zero,
            },
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_pages(first_page, buf).map_err(io::Error::other)
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        let read = self.0.try_read_pages(run.first_page, buf);
        read.then_some(Content::Bytes(buf))
    }

    fn block_pages(&self) -> u64 {
        FRAME_PAGES
    }
}

/// Writes the whole image into a guest's memory file; zero pages stay holes.
///
/// # Errors
/// [`FillError`]: the image does not verify, or there is no room.
pub(crate) fn fill(image: &ImageReader, memory: &File) -> Result<(), FillError> {
    // What the VMM left there while it set itself up would show where the image has zeros.
    let len = i64::try_from(memory.metadata().map_err(FillError::Memory)?.len());
    let len = len.map_err(|error| FillError::Memory(io::Error::other(error)))?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(memory, punch, 0, len).map_err(|error| FillError::Memory(error.into()))?;
    crate::disk::read_stored(image, |first_page, bytes| {
        memory
            .write_all_at(bytes, first_page * PAGE_SIZE as u64)
            .map_err(FillError::Memory)
    })
}

/// Why memory could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The build's memory image.
    #[error(transparent)]
    Image(#[from] torpor_build::Error),
    /// The guest's memory file.
    #[error("the guest's memory cannot be filled: {0}")]
    Memory(#[source] io::Error),
}
