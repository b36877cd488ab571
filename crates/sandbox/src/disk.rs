//! The guest's writable disk: a sparse file per sandbox, made from a build's disk image and stored
//! back into the next one.
//!
//! The file is whole before the guest runs (no network block device, no lazy disk): what a
//! sandbox has written is small, and a hole costs nothing. What the guest discards (`fstrim`) the
//! VMM punches out of the file, so a hole is a block that nobody needs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use torpor_build::{ImageReader, LayerWriter, PAGE_SIZE, PageContent, PageRun};

/// Read and written in one piece.
const CHUNK_PAGES: u64 = 256;

/// Why a disk could not be made or stored.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The sandbox's disk file.
    #[error("the sandbox's disk {path}: {source}")]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The build that is read or written.
    #[error(transparent)]
    Build(#[from] torpor_build::Error),
}

/// Makes the disk's file at `path`, all hole, long enough for `image`.
///
/// # Errors
/// [`DiskError::File`] when it cannot be made.
pub fn create(image: &ImageReader, path: &Path) -> Result<(), DiskError> {
    let failed = |source| DiskError::File {
        path: path.to_path_buf(),
        source,
    };
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    file.set_len(image.len_pages() * PAGE_SIZE as u64)
        .map_err(failed)
}

/// Writes what `image` describes into the file that [`create`] made.
///
/// # Errors
/// [`DiskError`] when the image does not verify or the file cannot be written.
pub fn fill(image: &ImageReader, path: &Path) -> Result<(), DiskError> {
    let failed = |source| DiskError::File {
        path: path.to_path_buf(),
        source,
    };
    let file = File::options().write(true).open(path).map_err(failed)?;
    read_stored(image, |first_page, bytes| {
        file.write_all_at(bytes, first_page * PAGE_SIZE as u64)
            .map_err(failed)
    })
}

/// Reads every page of `image` that is not zero, in page order and in pieces.
///
/// # Errors
/// What reading gives, or `each`.
pub(crate) fn read_stored<E: From<torpor_build::Error>>(
    image: &ImageReader,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; chunk_len(CHUNK_PAGES)];
    for run in image.index().runs().filter(|run| !run.what.reads_as_zero()) {
        let mut done = 0;
        while done < run.pages {
            let pages = CHUNK_PAGES.min(run.pages - done);
            let into = &mut buffer[..chunk_len(pages)];
            image.read_pages(run.first_page + done, into)?;
            each(run.first_page + done, into)?;
            done += pages;
        }
    }
    Ok(())
}

/// Gives every block of the disk at `path` to the writer of the next build's disk image.
///
/// # Errors
/// [`DiskError`] when the file cannot be read or the image not written.
pub fn store(path: &Path, total_pages: u64, writer: &mut LayerWriter) -> Result<(), DiskError> {
    let failed = |source| DiskError::File {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut buffer = vec![0; chunk_len(CHUNK_PAGES)];
    let mut next = 0;
    for extent in stored_pages(&file, total_pages).map_err(failed)? {
        if extent.first_page > next {
            writer.push(next, extent.first_page - next, PageContent::Removed)?;
        }
        let mut done = 0;
        while done < extent.pages {
            let pages = CHUNK_PAGES.min(extent.pages - done);
            let into = &mut buffer[..chunk_len(pages)];
            let first_page = extent.first_page + done;
            file.read_exact_at(into, first_page * PAGE_SIZE as u64)
                .map_err(failed)?;
            writer.push(first_page, pages, PageContent::Data(into))?;
            done += pages;
        }
        next = extent.first_page + extent.pages;
    }
    if next < total_pages {
        writer.push(next, total_pages - next, PageContent::Removed)?;
    }
    Ok(())
}

/// Bytes of `pages` pages; at most [`CHUNK_PAGES`] of them, so it always fits.
fn chunk_len(pages: u64) -> usize {
    usize::try_from(pages)
        .unwrap_or(usize::MAX)
        .saturating_mul(PAGE_SIZE)
}

/// The runs of pages that a file has data for (an allocated block anywhere in a page counts).
///
/// # Errors
/// What the system says; a file system without SEEK_DATA answers with the whole file, which is
/// right, only slower.
fn stored_pages(file: &File, total_pages: u64) -> std::io::Result<Vec<PageRun>> {
    use nix::unistd::{Whence, lseek64};
    let page = PAGE_SIZE as u64;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut at = 0;
    while at < total_pages * page {
        let from = i64::try_from(at).map_err(std::io::Error::other)?;
        let data = match lseek64(file, from, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but holes from here on.
            Err(nix::errno::Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = lseek64(file, data, Whence::SeekHole)?;
        let first = u64::try_from(data).map_err(std::io::Error::other)? / page;
        let last = u64::try_from(hole)
            .map_err(std::io::Error::other)?
            .div_ceil(page)
            .min(total_pages);
        match runs.last_mut() {
            Some(run) if run.first_page + run.pages >= first => run.pages = last - run.first_page,
            _ => runs.push(PageRun {
                first_page: first,
                pages: last.saturating_sub(first),
            }),
        }
        at = last * page;
    }
    Ok(runs)
}
