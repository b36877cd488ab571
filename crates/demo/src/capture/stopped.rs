//! A stopped guest's memory file, read from outside: by physical address for the scan, page by page
//! for those who store it in another way.
//!
//! Only for guests whose memory is all in the file (booted ones): a lazily resumed guest's is partly
//! in its parent build. Read with `pread`, never through a mapping: reading a hole through one fills
//! it.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use anyhow::{Context as _, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use torpor_anatomy::{PhysicalMemory, RamRange};
use torpor_build::{PAGE_SIZE, PageRun};
use torpor_vmm::{RamSegment, Vmm};

/// Read at once: the call's cost vanishes, the buffer stays in a second-level cache.
const CHUNK_BYTES: usize = 1 << 20;
/// `st_blocks` counts in these, whatever the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;
/// What nothing looks like.
const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The memory file of a guest that stands still.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    len_bytes: u64,
    segments: Vec<RamSegment>,
    ram: Vec<RamRange>,
    /// The reads by physical address since [`Self::recorded`] was last asked, by place and length.
    reads: RefCell<Vec<(u64, usize)>>,
}

impl MemoryFile {
    /// That of a VMM.
    ///
    /// # Errors
    /// The VMM is gone.
    pub fn of(vmm: &dyn Vmm) -> Result<Self> {
        let memory = vmm.memory()?;
        let segments = vmm.ram();
        let ram = segments
            .iter()
            .map(|segment| RamRange {
                addr: segment.guest_addr,
                len_bytes: segment.len_bytes,
            })
            .collect();
        Ok(Self {
            len_bytes: memory.len_bytes,
            file: memory.into_memfd()?.into(),
            segments,
            ram,
            reads: RefCell::default(),
        })
    }

    /// The guest's whole memory.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What the host holds of it.
    ///
    /// # Errors
    /// What the system says.
    pub fn held_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * STAT_BLOCK_BYTES)
    }

    /// Where in the file and how much was read by physical address, since this was last asked.
    pub fn recorded(&self) -> Vec<(u64, usize)> {
        self.reads.take()
    }

    /// Reads at a place in the file.
    ///
    /// # Errors
    /// What the system says.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Shows every page that the file has data for and that is not all zero: its number, its bytes.
    ///
    /// # Errors
    /// What reading gives, and what `visit` gives.
    pub fn for_each_nonzero(&self, mut visit: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut at = 0;
        while let Some(data) = self.seek(SeekFrom::Data(at))? {
            let hole = self.seek(SeekFrom::Hole(data))?.unwrap_or(self.len_bytes);
            at = data;
            while at < hole {
                let len = usize::try_from(hole - at)?.min(CHUNK_BYTES);
                let chunk = &mut buffer[..len];
                self.read_at(at, chunk)?;
                let first = at / PAGE_SIZE as u64;
                for (page, bytes) in (first..).zip(chunk.chunks_exact(PAGE_SIZE)) {
                    if bytes != ZERO_PAGE {
                        visit(page, bytes)?;
                    }
                }
                at += len as u64;
            }
        }
        Ok(())
    }

    /// Pages that are neither zero nor in `free`, which is in page order; and those that are not
    /// zero.
    ///
    /// # Errors
    /// What reading gives.
    pub fn left_pages(&self, free: &[PageRun]) -> Result<(u64, u64)> {
        let (mut left, mut nonzero, mut next) = (0, 0, 0);
        self.for_each_nonzero(|page, _| {
            nonzero += 1;
            while free
                .get(next)
                .is_some_and(|run| page >= run.first_page + run.pages)
            {
                next += 1;
            }
            let is_free = free.get(next).is_some_and(|run| run.first_page <= page);
            left += u64::from(!is_free);
            Ok(())
        })?;
        Ok((left, nonzero))
    }

    /// The next data or hole; `None` past the last.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>> {
        match seek(&self.file, to) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error).context("the guest's memory file has no holes to find"),
        }
    }
}

impl PhysicalMemory for MemoryFile {
    fn ram(&self) -> &[RamRange] {
        &self.ram
    }

    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        let segment = self.segments.iter().find(|segment| {
            let skip = addr.checked_sub(segment.guest_addr);
            skip.is_some_and(|skip| buf.len() as u64 <= segment.len_bytes.saturating_sub(skip))
        });
        let segment = segment.ok_or(io::ErrorKind::InvalidInput)?;
        let offset = segment.guest_offset_bytes + (addr - segment.guest_addr);
        self.reads.borrow_mut().push((offset, buf.len()));
        self.read_at(offset, buf)
    }
}
