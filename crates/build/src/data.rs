//! A layer's data file: the pages that a build stores itself, packed, in compressed frames.
//!
//! Pages are numbered in the order in which they were stored; that number is the offset that an
//! index's [`Entry::Layer`](crate::Entry::Layer) names. [`FRAME_PAGES`] of them make a frame,
//! the unit of compression, of checksums and of reading: reading one page reads and verifies its
//! frame.
//!
//! # Format, version 1
//!
//! All numbers little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "torporDT"
//!      8      4  version
//!     12      4  which image: 1 memory, 2 disk
//!     16      8  XXH3-64 of the header without these eight bytes
//!     24     16  id of the build
//!     40      4  bytes in a page: 4096
//!     44      4  pages in a frame: 16
//!     48     16  zero
//!     64         frames, without gaps: LZ4 blocks, or the bytes themselves where LZ4 does not help
//!      …     12  each frame: 4 stored bytes (bit 31: not compressed), 8 XXH3-64 of them
//!      …     48  trailer: 8 magic "torporDE", 8 offset of the frame table, 8 pages,
//!                8 frames, 8 XXH3-64 of the frame table, 8 XXH3-64 of the trailer before this
//! ```
//!
//! The header is written before the frames are known, so what is known last stands in the trailer,
//! with a checksum of its own. The last frame may hold fewer pages.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::bytes::Bytes;
use crate::error::{Error, FormatError, IoContext, Result};
use crate::ids::BuildId;
use crate::page::{IMAGE_PAGES_MAX, ImageKind, PAGE_SIZE, to_usize};
use crate::reading::Reading;

const MAGIC: [u8; 8] = *b"torporDT";
const END_MAGIC: [u8; 8] = *b"torporDE";
/// The version written, and the newest one read.
pub const DATA_VERSION: u32 = 1;
/// Pages in a frame: 64 KiB. Smaller frames compress worse, larger ones make a page fault decode
/// more than it needs (measured: about 20 µs for a frame).
pub const FRAME_PAGES: usize = 16;
pub(crate) const FRAME_BYTES: usize = FRAME_PAGES * PAGE_SIZE;
pub(crate) const HEADER_BYTES: usize = 64;
const CHECKSUM_AT: usize = 16;
const FRAME_RECORD_BYTES: usize = 12;
const TRAILER_BYTES: usize = 48;
const NOT_COMPRESSED: u32 = 1 << 31;
/// Most frames in one file: as many as the largest image can fill.
pub(crate) const DATA_FRAMES_MAX: u64 = IMAGE_PAGES_MAX / FRAME_PAGES as u64;

// The same two sizes as the header has them.
const PAGE_SIZE_ON_DISK: u32 = 4096;
const FRAME_PAGES_ON_DISK: u32 = 16;
const _: () = assert!(PAGE_SIZE_ON_DISK as usize == PAGE_SIZE);
const _: () = assert!(FRAME_PAGES_ON_DISK as usize == FRAME_PAGES);
// A frame's length must leave bit 31 alone.
const _: () = assert!(FRAME_BYTES < NOT_COMPRESSED as usize);

/// The first bytes of a data file.
pub(crate) fn encode_header(build: &BuildId, kind: ImageKind) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&DATA_VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&kind.code().to_le_bytes());
    header[24..40].copy_from_slice(build.as_bytes());
    header[40..44].copy_from_slice(&PAGE_SIZE_ON_DISK.to_le_bytes());
    header[44..48].copy_from_slice(&FRAME_PAGES_ON_DISK.to_le_bytes());
    let checksum = header_checksum(&header);
    header[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn header_checksum(header: &[u8; HEADER_BYTES]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&header[..CHECKSUM_AT]);
    hasher.update(&header[CHECKSUM_AT + 8..]);
    hasher.digest()
}

fn check_header(
    header: &[u8; HEADER_BYTES],
    build: &BuildId,
    kind: ImageKind,
) -> Result<(), FormatError> {
    let mut input = Bytes::new(header);
    if input.array()? != MAGIC {
        return Err(FormatError::damaged(0, "this is not a data file"));
    }
    let version = input.u32()?;
    if version > DATA_VERSION {
        return Err(FormatError::Newer {
            found: version,
            known: DATA_VERSION,
        });
    }
    if version != DATA_VERSION {
        return Err(FormatError::damaged(
            8,
            format!("there is no format version {version}"),
        ));
    }
    let found_kind = input.u32()?;
    if input.u64()? != header_checksum(header) {
        return Err(FormatError::damaged(
            CHECKSUM_AT,
            "the header's checksum does not match",
        ));
    }
    if found_kind != kind.code() {
        let what = format!("this is not the data of a {} image", kind.as_str());
        return Err(FormatError::damaged(12, what));
    }
    let found_build = BuildId::from_bytes(input.array()?);
    if found_build != *build {
        let what = format!("this is the data of build {found_build}");
        return Err(FormatError::damaged(24, what));
    }
    if (input.u32()?, input.u32()?) != (PAGE_SIZE_ON_DISK, FRAME_PAGES_ON_DISK) {
        return Err(FormatError::damaged(40, "pages or frames of another size"));
    }
    Ok(())
}

/// One frame as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    offset: u64,
    checksum: u64,
    /// With [`NOT_COMPRESSED`] as a flag.
    stored_bytes: u32,
}

/// What a frame is once compressed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrameRecord {
    /// With [`NOT_COMPRESSED`] as a flag.
    stored_bytes: u32,
    checksum: u64,
}

/// Compresses a frame's pages into `out` (whose content is replaced).
///
/// Bytes that LZ4 makes less than 1/16 smaller are stored as they are: reading them is then a copy.
pub(crate) fn encode_frame(raw: &[u8], out: &mut Vec<u8>) -> FrameRecord {
    out.resize(lz4::block::compress_bound(raw.len()).unwrap_or(0), 0);
    // An error would mean that the output is too small, which it is not by construction; storing
    // the bytes as they are is right in any case.
    let compressed_bytes =
        lz4::block::compress_to_buffer(raw, None, false, out).unwrap_or(usize::MAX);
    let mut flag = 0;
    if compressed_bytes < raw.len() - raw.len() / 16 {
        out.truncate(compressed_bytes);
    } else {
        out.clear();
        out.extend_from_slice(raw);
        flag = NOT_COMPRESSED;
    }
    let stored_bytes = u32::try_from(out.len()).unwrap_or(0) | flag;
    FrameRecord {
        stored_bytes,
        checksum: xxh3_64(out),
    }
}

/// The last bytes of a data file: frame table and trailer.
pub(crate) fn encode_footer(frames: &[FrameRecord], pages: u64, table_offset: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(frames.len() * FRAME_RECORD_BYTES + TRAILER_BYTES);
    for frame in frames {
        out.extend_from_slice(&frame.stored_bytes.to_le_bytes());
        out.extend_from_slice(&frame.checksum.to_le_bytes());
    }
    let table_checksum = xxh3_64(&out);
    let trailer_at = out.len();
    out.extend_from_slice(&END_MAGIC);
    out.extend_from_slice(&table_offset.to_le_bytes());
    out.extend_from_slice(&pages.to_le_bytes());
    out.extend_from_slice(&(frames.len() as u64).to_le_bytes());
    out.extend_from_slice(&table_checksum.to_le_bytes());
    let trailer_checksum = xxh3_64(&out[trailer_at..]);
    out.extend_from_slice(&trailer_checksum.to_le_bytes());
    out
}

/// An open data file.
#[derive(Debug)]
pub(crate) struct DataFile {
    path: PathBuf,
    file: File,
    pages: u64,
    frames: Box<[Frame]>,
}

impl DataFile {
    /// Opens and checks everything but the frames' bytes.
    pub(crate) fn open(path: &Path, build: &BuildId, kind: ImageKind) -> Result<Self> {
        let file = File::open(path).context("open", path)?;
        let file_bytes = file.metadata().context("look at", path)?.len();
        if file_bytes < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(Error::damaged(path, file_bytes, "the file ends too early"));
        }
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).context("read", path)?;
        check_header(&header, build, kind).map_err(|e| e.in_file(path))?;
        let trailer_at = file_bytes - TRAILER_BYTES as u64;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at)
            .context("read", path)?;
        let trailer = Trailer::decode(&trailer, trailer_at)
            .map_err(|what| Error::damaged(path, trailer_at, what))?;
        // Bounded by the file's own length: checked above.
        let mut table = vec![0; to_usize(trailer_at - trailer.table_offset)];
        file.read_exact_at(&mut table, trailer.table_offset)
            .context("read", path)?;
        let frames = trailer
            .decode_table(&table)
            .map_err(|what| Error::damaged(path, trailer.table_offset, what))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            pages: trailer.pages,
            frames,
        })
    }

    /// Pages stored in the file.
    pub(crate) fn len_pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn frame_count(&self) -> usize {
        self.frames.len()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that a frame decodes to.
    pub(crate) fn frame_len(&self, frame: usize) -> usize {
        frame_len(frame, self.pages)
    }

    /// Reads, verifies and decodes one frame into `out`, which must be [`Self::frame_len`] long.
    /// `stored` is scratch space.
    pub(crate) fn read_frame(
        &self,
        frame: usize,
        stored: &mut Vec<u8>,
        out: &mut [u8],
        reading: Reading,
    ) -> Result<()> {
        let end = || Error::damaged(&self.path, 0, format!("there is no frame {frame}"));
        let record = *self.frames.get(frame).ok_or_else(end)?;
        let damaged = |what: String| {
            Error::damaged(&self.path, record.offset, format!("frame {frame}: {what}"))
        };
        let not_compressed = record.stored_bytes & NOT_COMPRESSED != 0;
        let stored_bytes = (record.stored_bytes & !NOT_COMPRESSED) as usize;
        if not_compressed {
            if stored_bytes != out.len() {
                return Err(damaged(format!(
                    "{stored_bytes} bytes instead of {}",
                    out.len()
                )));
            }
            self.read_at(out, record.offset, reading)?;
            return if xxh3_64(out) == record.checksum {
                Ok(())
            } else {
                Err(damaged("the checksum does not match".to_owned()))
            };
        }
        stored.resize(stored_bytes, 0);
        self.read_at(stored, record.offset, reading)?;
        if xxh3_64(stored) != record.checksum {
            return Err(damaged("the checksum does not match".to_owned()));
        }
        decompress(stored, out).map_err(damaged)
    }

    fn read_at(&self, out: &mut [u8], offset: u64, reading: Reading) -> Result<()> {
        let read = reading.read_exact_at(&self.file, out, offset);
        read.context("read", &self.path)
    }
}

/// Fills `out` with what was compressed, or says why it cannot.
fn decompress(stored: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    let room = i32::try_from(out.len()).map_err(|error| error.to_string())?;
    match lz4::block::decompress_to_buffer(stored, Some(room), out) {
        Ok(decoded) if decoded == out.len() => Ok(()),
        Ok(decoded) => Err(format!("{decoded} bytes instead of {}", out.len())),
        Err(error) => Err(error.to_string()),
    }
}

fn frame_len(frame: usize, pages: u64) -> usize {
    let before = (frame * FRAME_PAGES) as u64;
    to_usize(pages.saturating_sub(before).min(FRAME_PAGES as u64)) * PAGE_SIZE
}

#[derive(Debug)]
struct Trailer {
    table_offset: u64,
    pages: u64,
    frames: usize,
    table_checksum: u64,
}

impl Trailer {
    fn decode(trailer: &[u8; TRAILER_BYTES], trailer_at: u64) -> Result<Self, String> {
        let mut input = Bytes::new(trailer);
        let mut next = || input.u64().map_err(|e| e.to_string());
        let magic = next()?;
        let (table_offset, pages, frames) = (next()?, next()?, next()?);
        let (table_checksum, trailer_checksum) = (next()?, next()?);
        if magic.to_le_bytes() != END_MAGIC {
            return Err("the file is cut off: it does not end in a trailer".to_owned());
        }
        if xxh3_64(&trailer[..TRAILER_BYTES - 8]) != trailer_checksum {
            return Err("the trailer's checksum does not match".to_owned());
        }
        if pages > IMAGE_PAGES_MAX || frames != pages.div_ceil(FRAME_PAGES as u64) {
            return Err(format!("{frames} frames cannot hold {pages} pages"));
        }
        let table_bytes = frames * FRAME_RECORD_BYTES as u64;
        if table_offset < HEADER_BYTES as u64
            || table_offset.checked_add(table_bytes) != Some(trailer_at)
        {
            return Err("the frame table lies outside of the file".to_owned());
        }
        Ok(Self {
            table_offset,
            pages,
            frames: to_usize(frames),
            table_checksum,
        })
    }

    fn decode_table(&self, table: &[u8]) -> Result<Box<[Frame]>, String> {
        if xxh3_64(table) != self.table_checksum {
            return Err("the frame table's checksum does not match".to_owned());
        }
        let mut input = Bytes::new(table);
        let mut offset = HEADER_BYTES as u64;
        let mut frames = Vec::with_capacity(self.frames);
        for frame in 0..self.frames {
            let stored_bytes = input.u32().map_err(|e| e.to_string())?;
            let checksum = input.u64().map_err(|e| e.to_string())?;
            frames.push(Frame {
                offset,
                checksum,
                stored_bytes,
            });
            let bytes = stored_bytes & !NOT_COMPRESSED;
            if bytes as usize > frame_len(frame, self.pages) {
                return Err(format!("frame {frame} is longer than its pages"));
            }
            offset += u64::from(bytes);
        }
        if offset == self.table_offset {
            Ok(frames.into_boxed_slice())
        } else {
            Err(format!(
                "the frames end at {offset}, the table begins elsewhere"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const KIND: ImageKind = ImageKind::Memory;

    /// A file of 40 pages that compress, and where its table begins.
    fn data_file(build: &BuildId) -> (Vec<u8>, usize) {
        let mut file = encode_header(build, KIND).to_vec();
        let pages: Vec<u8> = (0..40_u8).flat_map(|n| vec![n + 1; PAGE_SIZE]).collect();
        let mut records = Vec::new();
        for raw in pages.chunks(FRAME_BYTES) {
            let mut stored = Vec::new();
            records.push(encode_frame(raw, &mut stored));
            file.extend_from_slice(&stored);
        }
        let table_offset = file.len();
        file.extend_from_slice(&encode_footer(&records, 40, table_offset as u64));
        (file, table_offset)
    }

    /// Makes the checksums right, as a forger would, wherever the file still allows it.
    fn sign(file: &mut [u8], table_offset: usize) {
        let mut frame_at = HEADER_BYTES;
        for frame in 0..3 {
            let record = table_offset + frame * FRAME_RECORD_BYTES;
            let stored = u32::from_le_bytes(*file[record..].first_chunk().unwrap());
            let frame_end = frame_at + (stored & !NOT_COMPRESSED) as usize;
            if let Some(bytes) = file.get(frame_at..frame_end) {
                let checksum = xxh3_64(bytes);
                file[record + 4..record + 12].copy_from_slice(&checksum.to_le_bytes());
            }
            frame_at = frame_end.min(file.len());
        }
        let trailer_at = file.len() - TRAILER_BYTES;
        let table_checksum = xxh3_64(&file[table_offset..trailer_at]);
        file[trailer_at + 32..trailer_at + 40].copy_from_slice(&table_checksum.to_le_bytes());
        let trailer_checksum = xxh3_64(&file[trailer_at..trailer_at + 40]);
        file[trailer_at + 40..].copy_from_slice(&trailer_checksum.to_le_bytes());
    }

    fn read_all(file: &[u8], build: &BuildId) -> Result<u64> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file).unwrap();
        let data = DataFile::open(path.path(), build, KIND)?;
        let (mut stored, mut pages) = (Vec::new(), Vec::new());
        for frame in 0..data.frame_count() {
            pages.resize(data.frame_len(frame), 0);
            data.read_frame(frame, &mut stored, &mut pages, Reading::Waiting)?;
        }
        Ok(data.len_pages())
    }

    #[test]
    fn a_file_is_read_back() {
        let build = BuildId::random();
        let (mut file, table_offset) = data_file(&build);
        assert_eq!(read_all(&file, &build).unwrap(), 40);
        let before = file.clone();
        sign(&mut file, table_offset);
        assert_eq!(file, before);
    }

    proptest! {
        /// Frames, table and trailer are forged, with checksums that are right: nothing panics,
        /// reads past the end or takes memory that the file does not justify.
        #[test]
        fn a_forged_file_is_refused_or_read(
            forgeries in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let build = BuildId::random();
            let (mut file, table_offset) = data_file(&build);
            for (position, value) in forgeries {
                let position = HEADER_BYTES + position.index(file.len() - HEADER_BYTES);
                file[position] = value;
            }
            sign(&mut file, table_offset);
            if let Ok(pages) = read_all(&file, &build) {
                prop_assert!(pages <= 48);
            }
        }
    }

    proptest! {
        /// The library that decodes is not Rust.
        #[test]
        fn whatever_stands_for_a_frame_is_decoded_inside_its_pages_or_refused(
            pages in 1..=FRAME_PAGES,
            fill in vec(any::<u8>(), 1..200),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
            cut in any::<prop::sample::Index>(),
        ) {
            const GUARD: usize = PAGE_SIZE;
            let raw: Vec<u8> = fill.iter().copied().cycle().take(pages * PAGE_SIZE).collect();
            let mut stored = Vec::new();
            encode_frame(&raw, &mut stored);
            let mut out = vec![0xa5; raw.len() + 2 * GUARD];
            let inside = GUARD..GUARD + raw.len();
            prop_assert!(decompress(&stored, &mut out[inside.clone()]).is_ok());
            prop_assert_eq!(&out[inside.clone()], &raw[..]);
            for (at, byte) in changes {
                let at = at.index(stored.len());
                stored[at] = byte;
            }
            stored.truncate(cut.index(stored.len() + 1));
            drop(decompress(&stored, &mut out[inside]));
            let guards = out[..GUARD].iter().chain(&out[GUARD + raw.len()..]);
            prop_assert!(guards.copied().all(|byte| byte == 0xa5));
        }
    }
}
