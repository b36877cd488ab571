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
use std::time::Instant;

use torpor_anatomy::{PfnRun, PhysicalMemory, RamRange};
use torpor_build::{FRAME_PAGES, FrameCache, ImageReader, PAGE_SIZE, PageRun};
use torpor_vmm::{GuestReader, RamSegment};

const PAGE: u64 = PAGE_SIZE as u64;
/// Size of an entry of the page array (bytes), in any usual kernel.
const ENTRY_BYTES: u64 = 64;
/// Frames that a scan may read beyond those that its page array fills: for the ends of its stretches in
/// each layer, the note and the tables. A frame takes some 15 µs to decode, so that a guest whose pages
/// lie as badly as it can arrange costs 9 ms more than an honest one.
const MORE_FRAMES: u64 = 600;

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
        parent: Walked,
        /// What the guest has given back, in page order.
        removed: Vec<PageRun>,
    },
    /// In a build.
    Image(Walked),
}

/// A build's memory image, of which much is read once.
#[derive(Debug, Clone)]
pub(crate) struct Walked {
    image: Arc<ImageReader>,
    frames: Arc<FrameCache>,
    max_frames: u64,
}

impl Walked {
    pub(crate) fn new(image: Arc<ImageReader>) -> Self {
        Self {
            image,
            frames: Arc::new(FrameCache::for_walk()),
            max_frames: u64::MAX,
        }
    }

    /// Not more than an honest guest's scan takes, and some.
    pub(crate) fn for_scan(image: Arc<ImageReader>) -> Self {
        let max_frames = scan_frames_max(image.len_pages());
        Self {
            max_frames,
            ..Self::new(image)
        }
    }

    /// Any bytes; the image gives whole pages.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (first_page, skip) = (offset / PAGE, to_len(offset % PAGE)?);
        if skip == 0 && buf.len().is_multiple_of(PAGE_SIZE) {
            return self.read_pages(first_page, buf);
        }
        let mut pages = vec![0; (skip + buf.len()).next_multiple_of(PAGE_SIZE)];
        self.read_pages(first_page, &mut pages)?;
        buf.copy_from_slice(&pages[skip..skip + buf.len()]);
        Ok(())
    }

    fn read_pages(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.frames.cost_frames() > self.max_frames {
            return Err(io::Error::other(format!(
                "the page array is scattered over more than {} frames of the parent build",
                self.max_frames
            )));
        }
        let read = self.image.read_pages_through(&self.frames, first_page, buf);
        read.map_err(io::Error::other)
    }
}

/// Frames that the scan of a guest of so many pages may read of its parent.
fn scan_frames_max(pages: u64) -> u64 {
    let array_frames = (pages * ENTRY_BYTES).div_ceil(FRAME_PAGES as u64 * PAGE);
    array_frames + MORE_FRAMES
}

/// What stands in for a page that the host does not hold.
#[derive(Clone, Copy)]
enum Absent<'a> {
    Zero,
    Parent {
        image: &'a Walked,
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
    until: Option<Instant>,
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
            until: None,
        }
    }

    /// The same, read no longer than until then: whoever looks at it stops by an error.
    pub(crate) fn until(self, until: Instant) -> Self {
        Self {
            until: Some(until),
            ..self
        }
    }

    /// Whether there is time left.
    pub(crate) fn check_time(&self) -> io::Result<()> {
        match self.until {
            Some(until) if Instant::now() >= until => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long"))
            }
            _ => Ok(()),
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
            Self::Image(image) => image.read(offset, buf),
        }
    }

    /// What is known of the page `first_page` of the memory image, and of how many from there on.
    pub(crate) fn known(&self, first_page: u64, pages_max: u64) -> io::Result<(u64, Known)> {
        let of_image =
            |walked: &Walked, pages_max: u64| match walked.image.index().run_at(first_page) {
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
        self.check_time()?;
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
    parent: &Walked,
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
            parent.read(at, part)?;
        }
        (at, rest) = (until, after);
    }
    Ok(())
}

fn to_len(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use torpor_build::{BuildId, BuildInfo, ImageKind, PageContent, Storage};

    use super::*;

    #[test]
    fn a_scan_may_read_its_page_array_and_not_much_more() {
        assert_eq!(scan_frames_max((1 << 30) / PAGE), 256 + 600);
        assert_eq!(scan_frames_max((6 << 30) / PAGE), 6 * 256 + 600);
    }

    #[test]
    fn a_parent_that_gives_a_scan_too_much_to_read_is_read_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(&dir.path().join("storage")).unwrap();
        let staged = storage.begin_build(BuildId::random()).unwrap();
        for (kind, pages) in [(ImageKind::Memory, 80_u8), (ImageKind::Disk, 1)] {
            let bytes: Vec<u8> = (1..=pages).flat_map(|n| vec![n; PAGE_SIZE]).collect();
            let mut writer = staged.image_writer(kind, u64::from(pages), None).unwrap();
            let content = PageContent::Data(&bytes);
            writer.push(0, u64::from(pages), content).unwrap();
            writer.finish().unwrap();
        }
        staged.write_vmstate(b"state").unwrap();
        let build = staged.commit(BuildInfo::default()).unwrap();
        let walked = Walked {
            // The layer is opened, and then it may be three.
            max_frames: 3 + 3,
            ..Walked::new(Arc::new(build.memory().unwrap()))
        };
        let mut bytes = [0; 100];
        for frame in 0..4 {
            walked
                .read(frame * FRAME_PAGES as u64 * PAGE, &mut bytes)
                .unwrap();
            assert_eq!(
                bytes[0],
                u8::try_from(1 + frame * FRAME_PAGES as u64).unwrap()
            );
        }
        let error = walked
            .read(4 * FRAME_PAGES as u64 * PAGE, &mut bytes)
            .unwrap_err();
        assert!(error.to_string().contains("scattered"), "{error}");
    }
}
