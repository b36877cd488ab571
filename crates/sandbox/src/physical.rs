//! A stopped guest's memory by guest-physical address: what `torpor_anatomy` reads.
//!
//! Three kinds of memory, one way to read them:
//! - a booted guest's is all in its memfd;
//! - a lazily resumed guest's is in its memfd as far as it has been touched. What is absent there
//!   is zero if the guest has given it back, and as its parent build has it otherwise. So nothing
//!   is faulted in for a look, and the pager learns nothing of it;
//! - a build's is all in its image.
//!
//! A memfd is read with `pread`, never through a mapping: reading a hole through one fills it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use torpor_anatomy::{PfnRun, PhysicalMemory, RamRange};
use torpor_build::{ImageReader, PAGE_SIZE, PageRun};
use torpor_vmm::RamSegment;

const PAGE: u64 = PAGE_SIZE as u64;

/// Where a guest's bytes are.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// All in the memory file.
    File(Arc<File>),
    /// In the memory file as far as they were touched since the resume.
    Lazy {
        /// The memory file.
        file: Arc<File>,
        /// What was not touched.
        parent: Arc<ImageReader>,
        /// What the guest has given back, in page order.
        removed: Vec<PageRun>,
    },
    /// In a build.
    Image(Arc<ImageReader>),
}

/// What can be said of pages without bringing anything in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// They hold zeros.
    Zero,
    /// They stand in a build, which stores no page of zeros.
    NotZero,
    /// They are in the memory file and must be looked at.
    Present,
}

/// A guest's memory. Nothing of it changes while this is used: the vCPUs stand still.
#[derive(Debug)]
pub(crate) struct StoppedMemory {
    segments: Vec<RamSegment>,
    ram: Vec<RamRange>,
    content: Content,
}

impl StoppedMemory {
    pub(crate) fn new(segments: Vec<RamSegment>, content: Content) -> Self {
        let ram = segments
            .iter()
            .map(|segment| RamRange {
                addr: segment.guest_addr,
                len_bytes: segment.len_bytes,
            })
            .collect();
        Self {
            segments,
            ram,
            content,
        }
    }

    /// Where the bytes are.
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// The same pages, by their place in the memory image. Keeps their order, as segments do.
    pub(crate) fn image_pages(&self, run: PfnRun) -> impl Iterator<Item = PageRun> {
        let (start, end) = (run.first_pfn, run.first_pfn + run.pages);
        self.segments.iter().filter_map(move |segment| {
            let first = segment.guest_addr / PAGE;
            let from = start.max(first);
            let until = end.min(first + segment.len_bytes / PAGE);
            (from < until).then(|| PageRun {
                first_page: segment.guest_offset_bytes / PAGE + (from - first),
                pages: until - from,
            })
        })
    }
}

impl Content {
    /// Fills `buf` with what the guest has at an offset of the memory image.
    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buf, offset),
            Self::Lazy {
                file,
                parent,
                removed,
            } => read_lazy(file, parent, removed, offset, buf),
            Self::Image(image) => read_image(image, offset, buf),
        }
    }

    /// What is known of the page `first_page` of the memory image, and of how many from there on.
    pub(crate) fn known(&self, first_page: u64, pages_max: u64) -> io::Result<(u64, Known)> {
        let of_image = |image: &ImageReader, pages_max: u64| match image.index().run_at(first_page)
        {
            Some(run) if run.what.reads_as_zero() => (run.pages.min(pages_max), Known::Zero),
            Some(run) => (run.pages.min(pages_max), Known::NotZero),
            None => (pages_max, Known::Zero),
        };
        let (file, parent) = match self {
            Self::Image(image) => return Ok(of_image(image, pages_max)),
            Self::File(file) => (file, None),
            Self::Lazy { file, parent, .. } => (file, Some(parent)),
        };
        let from = first_page * PAGE;
        let end = from + pages_max * PAGE;
        let data = seek(file, from, Whence::SeekData)?.unwrap_or(end).min(end);
        if data > from {
            let absent = (data - from) / PAGE;
            return Ok(parent.map_or((absent, Known::Zero), |parent| of_image(parent, absent)));
        }
        let hole = seek(file, from, Whence::SeekHole)?.unwrap_or(end).min(end);
        Ok(((hole - from) / PAGE, Known::Present))
    }
}

impl PhysicalMemory for StoppedMemory {
    fn ram(&self) -> &[RamRange] {
        &self.ram
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        let segment = self.segments.iter().find(|segment| {
            addr.checked_sub(segment.guest_addr)
                .is_some_and(|skip| len <= segment.len_bytes.saturating_sub(skip))
        });
        let Some(segment) = segment else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let offset = segment.guest_offset_bytes + (addr - segment.guest_addr);
        self.content.read_at(offset, buf)
    }
}

/// Takes what the memory file has, and what it has not from where it would come.
fn read_lazy(
    file: &File,
    parent: &ImageReader,
    removed: &[PageRun],
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let end = at + rest.len() as u64;
        let data = seek(file, at, Whence::SeekData)?.unwrap_or(end).min(end);
        let (absent, present) = rest.split_at_mut(to_len(data - at)?);
        read_absent(parent, removed, at, absent)?;
        if data == end {
            return Ok(());
        }
        let hole = seek(file, data, Whence::SeekHole)?.unwrap_or(end).min(end);
        let (present, after) = present.split_at_mut(to_len(hole - data)?);
        file.read_exact_at(present, data)?;
        (at, rest) = (hole, after);
    }
    Ok(())
}

/// The next data or hole; `None` past the last.
fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    match lseek64(file, from, whence) {
        Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read_absent(
    parent: &ImageReader,
    removed: &[PageRun],
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let end = at + rest.len() as u64;
        let next = removed.partition_point(|run| (run.first_page + run.pages) * PAGE <= at);
        let (until, is_removed) = match removed.get(next) {
            Some(run) if run.first_page * PAGE <= at => ((run.first_page + run.pages) * PAGE, true),
            Some(run) => (run.first_page * PAGE, false),
            None => (end, false),
        };
        let (part, after) = rest.split_at_mut(to_len(until.min(end) - at)?);
        if is_removed {
            part.fill(0);
        } else {
            read_image(parent, at, part)?;
        }
        (at, rest) = (until, after);
    }
    Ok(())
}

/// Any bytes of an image; it gives whole pages.
fn read_image(image: &ImageReader, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let (first_page, skip) = (offset / PAGE, to_len(offset % PAGE)?);
    if skip == 0 && buf.len().is_multiple_of(PAGE_SIZE) {
        return image.read_pages(first_page, buf).map_err(io::Error::other);
    }
    let mut pages = vec![0; (skip + buf.len()).next_multiple_of(PAGE_SIZE)];
    image
        .read_pages(first_page, &mut pages)
        .map_err(io::Error::other)?;
    buf.copy_from_slice(&pages[skip..skip + buf.len()]);
    Ok(())
}

fn to_len(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}
