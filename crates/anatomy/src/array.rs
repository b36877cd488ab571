//! The page array: where it lies, and walking along it.
//!
//! ```text
//! note: mem_section ──▶ [root pointer; LENGTH] ──▶ a page of sections ──▶ section_mem_map
//!                                                                          │  where page 0's
//! note: vmemmap ────────────────── must agree, where it is said ───────────┤  entry would be
//!                                                                          ▼
//! pages of RAM × SIZE(page), virtual ── page tables ──▶ segments of guest-physical memory
//! ```
//!
//! All of it is found once ([`PageArray::find`]); walking then only reads. Invariants of what was
//! found: pieces are sorted and disjoint, each lies in one range of RAM; a piece's segments cover its
//! entries exactly, each in RAM.

use crate::AnatomyError;
use crate::memory::{PAGE_SIZE, Ram};
use crate::note::{KernelNote, SectionLayout};
use crate::tables::Tables;

/// Most bytes of the array that are read at once: fits a processor's second-level cache.
const CHUNK_BYTES: usize = 128 << 10;
/// What is read first behind a large free block (bytes): the next page is most likely the head of
/// another one, whose entries need not be read.
const PROBE_BYTES: usize = 4 << 10;
/// A block is large if its entries have so many bytes. Blocks are disjoint, so this bounds the number of
/// small reads.
const PROBE_AFTER_BYTES: u64 = 16 << 10;
/// In how many places of guest memory the array may lie: this many, …
const SEGMENTS_MIN: u64 = 64;
/// … and this many more per GiB of RAM. The kernel maps 16 MiB of array per GiB by leaves of 2 MiB, so
/// an honest guest has 8 at worst. Each costs a read, perhaps a decompression.
const SEGMENTS_PER_GIB: u64 = 64;
const PAGES_PER_GIB: u64 = (1 << 30) / PAGE_SIZE;
/// Bits of `section_mem_map` (`include/linux/mmzone.h`); the address is page aligned, the rest of the
/// low bits are flags that come and go with versions.
const SECTION_PRESENT: u64 = 1;
const SECTION_HAS_MEM_MAP: u64 = 2;
const SECTION_FLAGS: u64 = PAGE_SIZE - 1;

/// The array, found.
#[derive(Debug)]
pub(crate) struct PageArray {
    stride: usize,
    pieces: Vec<Piece>,
}

/// Entries that follow one another in virtual memory.
#[derive(Debug)]
struct Piece {
    first_pfn: u64,
    pages: u64,
    /// Virtual address of the first page's entry.
    vaddr: u64,
    /// In order, without gaps; found after the piece itself.
    segments: Vec<Segment>,
}

/// Bytes of a piece that follow one another in guest-physical memory.
#[derive(Debug)]
struct Segment {
    /// Where in the piece (bytes).
    offset: u64,
    addr: u64,
    len_bytes: u64,
}

impl PageArray {
    /// Finds the entries of all pages of RAM that the kernel has entries for.
    pub(crate) fn find(
        ram: &Ram<'_>,
        tables: &mut Tables<'_>,
        note: &KernelNote,
    ) -> Result<Self, AnatomyError> {
        let stride = note.entry.stride;
        let mut pieces = Sections::new(&note.sections, note.vmemmap).pieces(ram, tables, stride)?;
        let max = SEGMENTS_MIN + SEGMENTS_PER_GIB * ram.pages().div_ceil(PAGES_PER_GIB);
        let mut left = max;
        for piece in &mut pieces {
            let len_bytes = piece.pages * stride as u64;
            piece.segments = segments(ram, tables, piece.vaddr, len_bytes, left)?
                .ok_or(AnatomyError::Scattered { max })?;
            left -= piece.segments.len() as u64;
        }
        Ok(Self { stride, pieces })
    }

    /// Shows `visit` the entries in order: page frame number, bytes, and the end of the pages that
    /// the entry may speak for. It answers how many pages the entry does speak for, not beyond that
    /// end; the entries of the others are skipped, unread where that saves something.
    ///
    /// Returns how many bytes of the array were read.
    pub(crate) fn walk(
        &self,
        ram: &Ram<'_>,
        mut visit: impl FnMut(u64, &[u8], u64) -> Result<u64, AnatomyError>,
    ) -> Result<u64, AnatomyError> {
        let mut buf = vec![0; CHUNK_BYTES];
        let mut bytes_read = 0;
        for piece in &self.pieces {
            let end_pfn = piece.first_pfn + piece.pages;
            let mut pfn = piece.first_pfn;
            let mut want_bytes = CHUNK_BYTES;
            while pfn < end_pfn {
                let entries = ((want_bytes / self.stride) as u64).min(end_pfn - pfn);
                let chunk_end = pfn + entries;
                let chunk = &mut buf[..self.len_bytes(entries)];
                piece.read(ram, (pfn - piece.first_pfn) * self.stride as u64, chunk)?;
                bytes_read += chunk.len() as u64;
                let chunk_start = pfn;
                let mut last_pages = 1;
                while pfn < chunk_end {
                    let at = self.len_bytes(pfn - chunk_start);
                    last_pages = visit(pfn, &chunk[at..at + self.stride], end_pfn)?;
                    pfn += last_pages;
                }
                want_bytes = if last_pages * self.stride as u64 >= PROBE_AFTER_BYTES {
                    PROBE_BYTES
                } else {
                    CHUNK_BYTES
                };
            }
        }
        Ok(bytes_read)
    }

    /// Length of so many entries of one chunk (bytes).
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a chunk's entries fit into its buffer"
    )]
    fn len_bytes(&self, entries: u64) -> usize {
        entries as usize * self.stride
    }
}

impl Piece {
    /// Reads the piece's bytes at `offset`; they lie in it, and its segments cover it.
    fn read(&self, ram: &Ram<'_>, offset: u64, mut buf: &mut [u8]) -> Result<(), AnatomyError> {
        let first = self
            .segments
            .partition_point(|s| s.offset + s.len_bytes <= offset);
        let mut at = offset;
        for segment in &self.segments[first..] {
            let inside = at - segment.offset;
            let here = usize::try_from(segment.len_bytes - inside).unwrap_or(usize::MAX);
            let (now, later) = buf.split_at_mut(here.min(buf.len()));
            ram.read(WHAT, segment.addr + inside, now)?;
            at += now.len() as u64;
            buf = later;
            if buf.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// What errors call it.
const WHAT: &str = "page array";

/// Where `len_bytes` at `vaddr` lie, all in RAM; `None` if in more than `max` places.
fn segments(
    ram: &Ram<'_>,
    tables: &mut Tables<'_>,
    vaddr: u64,
    len_bytes: u64,
    max: u64,
) -> Result<Option<Vec<Segment>>, AnatomyError> {
    let mut found: Vec<Segment> = Vec::new();
    let mut offset = 0;
    while offset < len_bytes {
        let mapped = tables.translate(WHAT, vaddr.wrapping_add(offset))?;
        let here = mapped.len_bytes.min(len_bytes - offset);
        if ram.bytes_from(mapped.addr, here) < here {
            return Err(AnatomyError::OutsideRam {
                what: WHAT,
                addr: mapped.addr,
                len_bytes: here,
            });
        }
        let full = found.len() as u64 == max;
        match found.last_mut() {
            Some(last) if last.addr + last.len_bytes == mapped.addr => last.len_bytes += here,
            _ if full => return Ok(None),
            _ => found.push(Segment {
                offset,
                addr: mapped.addr,
                len_bytes: here,
            }),
        }
        offset += here;
    }
    Ok(Some(found))
}

/// The kernel's memory sections, read as they are asked for.
struct Sections<'n> {
    layout: &'n SectionLayout,
    vmemmap: Option<u64>,
    /// The last page of sections that was read, by its number; empty where the kernel has none.
    page: Option<(u64, Vec<u8>)>,
}

impl<'n> Sections<'n> {
    fn new(layout: &'n SectionLayout, vmemmap: Option<u64>) -> Self {
        Self {
            layout,
            vmemmap,
            page: None,
        }
    }

    /// The parts of the array that stand for RAM, without those sections that have none.
    fn pieces(
        mut self,
        ram: &Ram<'_>,
        tables: &mut Tables<'_>,
        stride: usize,
    ) -> Result<Vec<Piece>, AnatomyError> {
        let mut pieces: Vec<Piece> = Vec::new();
        for range in ram.ranges() {
            let mut pfn = range.first_pfn();
            let mut continues = false;
            while pfn < range.end_pfn() {
                let section = pfn >> self.layout.pages_bits;
                let end = ((section + 1) << self.layout.pages_bits).min(range.end_pfn());
                let base = self.array_base(tables, section)?;
                let vaddr = base.map(|b| b.wrapping_add(pfn.wrapping_mul(stride as u64)));
                match (vaddr, pieces.last_mut()) {
                    (Some(vaddr), Some(last)) if continues && last.end_vaddr(stride) == vaddr => {
                        last.pages += end - pfn;
                    }
                    (Some(vaddr), _) => pieces.push(Piece {
                        first_pfn: pfn,
                        pages: end - pfn,
                        vaddr,
                        segments: Vec::new(),
                    }),
                    (None, _) => {}
                }
                continues = vaddr.is_some();
                pfn = end;
            }
        }
        Ok(pieces)
    }

    /// Where page 0's entry would be, seen from this section; `None` if it has no entries.
    fn array_base(
        &mut self,
        tables: &mut Tables<'_>,
        section: u64,
    ) -> Result<Option<u64>, AnatomyError> {
        let per_page = PAGE_SIZE / self.layout.section_bytes;
        let number = section / per_page;
        if self.page.as_ref().is_none_or(|(kept, _)| *kept != number) {
            self.page = Some((number, self.read_page(tables, number, section)?));
        }
        let index = usize::try_from((section % per_page) * self.layout.section_bytes);
        let at = index
            .unwrap_or(usize::MAX)
            .saturating_add(self.layout.mem_map_offset);
        let page = self.page.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        let Some(bytes) = page.get(at..).and_then(<[u8]>::first_chunk) else {
            return Ok(None);
        };
        let coded = u64::from_le_bytes(*bytes);
        let usable = SECTION_PRESENT | SECTION_HAS_MEM_MAP;
        if coded & usable != usable {
            return Ok(None);
        }
        let by_section = coded & !SECTION_FLAGS;
        match self.vmemmap {
            Some(by_vmemmap) if by_vmemmap != by_section => Err(AnatomyError::Disagree {
                section,
                by_section,
                by_vmemmap,
            }),
            _ => Ok(Some(by_section)),
        }
    }

    /// Reads one page of sections; none if its pointer is null.
    fn read_page(
        &self,
        tables: &mut Tables<'_>,
        number: u64,
        section: u64,
    ) -> Result<Vec<u8>, AnatomyError> {
        if number >= self.layout.roots_len {
            let per_page = PAGE_SIZE / self.layout.section_bytes;
            let max = self.layout.roots_len.saturating_mul(per_page);
            return Err(AnatomyError::SectionNumber { section, max });
        }
        let what = "list of memory sections";
        let mut pointer = [0; size_of::<u64>()];
        let place = self
            .layout
            .roots
            .wrapping_add(number * pointer.len() as u64);
        tables.read(what, place, &mut pointer)?;
        let pointer = u64::from_le_bytes(pointer);
        if pointer == 0 {
            return Ok(Vec::new());
        }
        let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap_or(0)];
        tables.read(what, pointer, &mut page)?;
        Ok(page)
    }
}

impl Piece {
    /// One past its last entry.
    fn end_vaddr(&self, stride: usize) -> u64 {
        self.vaddr
            .wrapping_add(self.pages.wrapping_mul(stride as u64))
    }
}
