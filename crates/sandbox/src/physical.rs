//! A stopped guest's memory by guest-physical address: what `torpor_anatomy` reads.
//!
//! Three kinds of memory, one way to read them:
//! - a booted guest's is all held by the host; what is absent is zero;
//! - a lazily resumed guest's is held as far as it has been touched. What is absent is zero if the
//!   guest has given it back, and as its parent build has it otherwise. So nothing is faulted in for
//!   a look, and the pager learns nothing of it;
//! - a build's is all in its image.
//!
//! What is absent is never read from the host: of a memory that is private to its VMM that would
//! wait for the pager, or bring a page in.

use std::io;
use std::sync::Arc;

use torpor_anatomy::{PfnRun, PhysicalMemory, RamRange};
use torpor_build::{ImageReader, PAGE_SIZE, PageRun};
use torpor_vmm::{GuestReader, RamSegment};

const PAGE: u64 = PAGE_SIZE as u64;

/// Where a guest's bytes are.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    /// Held by the host.
    Held(Arc<GuestReader>),
    /// Held by the host as far as they were touched since the resume.
    Lazy {
        /// What was touched.
        held: Arc<GuestReader>,
        /// What was not touched.
        parent: Arc<ImageReader>,
        /// What the guest has given back, in page order.
        removed: Vec<PageRun>,
    },
    /// In a build.
    Image(Arc<ImageReader>),
}

/// What stands in for a page that the host does not hold.
#[derive(Clone, Copy)]
enum Absent<'a> {
    Zero,
    Parent {
        image: &'a ImageReader,
        removed: &'a [PageRun],
    },
}

/// What can be said of pages without bringing anything in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// They hold zeros.
    Zero,
    /// They stand in a build, which stores no page of zeros.
    NotZero,
    /// The host holds them, and they must be looked at.
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
            // The quick way, for scans of all memory.
            Self::Held(held) if held.absent_reads_as_zero() => held.read_exact_at(buf, offset),
            Self::Held(held) => read_held(held, Absent::Zero, offset, buf),
            Self::Lazy {
                held,
                parent,
                removed,
            } => {
                let absent = Absent::Parent {
                    image: parent,
                    removed,
                };
                read_held(held, absent, offset, buf)
            }
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
        let (held, parent) = match self {
            Self::Image(image) => return Ok(of_image(image, pages_max)),
            Self::Held(held) => (held, None),
            Self::Lazy { held, parent, .. } => (held, Some(parent)),
        };
        let from = first_page * PAGE;
        let (is_held, end) = held.held_from(from, from + pages_max * PAGE)?;
        let pages = (end - from) / PAGE;
        Ok(match parent {
            _ if is_held => (pages, Known::Present),
            Some(parent) => of_image(parent, pages),
            None => (pages, Known::Zero),
        })
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

/// Takes what the host holds, and what it does not hold from where it would come.
fn read_held(
    held: &GuestReader,
    absent: Absent<'_>,
    offset: u64,
    buf: &mut [u8],
) -> io::Result<()> {
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let (is_held, until) = held.held_from(at, at + rest.len() as u64)?;
        let (part, after) = rest.split_at_mut(to_len(until - at)?);
        match absent {
            _ if is_held => held.read_exact_at(part, at)?,
            Absent::Zero => part.fill(0),
            Absent::Parent { image, removed } => read_absent(image, removed, at, part)?,
        }
        (at, rest) = (until, after);
    }
    Ok(())
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
