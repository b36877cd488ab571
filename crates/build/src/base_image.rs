//! A base image, opened to be referred to: the one shared file and the index of its blocks.
//!
//! A match is never believed on its hash alone: [`BaseImage::find`] compares the bytes with the
//! image's before a page becomes a reference, and [`BaseImage::read_blocks`] verifies each block
//! against the index as it serves it. So a damaged image gives errors that name the file and the
//! offset, and a damaged index gives matches that are missed, never a wrong page.
//!
//! The image is read with `pread`, so that all sandboxes share its pages in the host's cache; the
//! index is mapped, for the same reason. An index that is missing (an older storage) or damaged is
//! made again from the image, whose digest is verified on the way; where it cannot be written, it
//! is kept in memory.
//!
//! As long as a handle lives the image is in use (a shared `flock`) and cannot be deleted.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FlockOperation, flock};

use crate::block_index::{BLOCKS_MAX, BlockIndex, encode};
use crate::durable;
use crate::error::{Error, IoContext, Result};
use crate::ids::Digest;
use crate::mapping::MappedFile;
use crate::objects::{OBJECT_MODE, digest_of_file};
use crate::page::{PAGE_SIZE, ZERO_PAGE, is_zero, to_usize};
use crate::parallel::{in_parallel, useful_threads};
use crate::reading::Reading;
use crate::storage::Storage;

/// Where the indexes are, each under its image's digest.
pub(crate) const BLOCK_INDEXES_DIR: &str = "block-indexes";
/// Blocks hashed by one piece of work when an index is made (1 MiB).
const HASH_BLOCKS: u64 = 256;
/// How often an image may be replaced, by imports of the same, while it is being opened.
const REPLACED_MAX: u32 = 100;

/// A base image and the index of its blocks. See the module's documentation.
#[derive(Debug)]
pub struct BaseImage {
    path: PathBuf,
    /// Holds the shared lock.
    file: File,
    index_path: PathBuf,
    index: BlockIndex<IndexBytes>,
    /// Whether the log has been told that the image cannot be read.
    warned: AtomicBool,
}

#[derive(Debug)]
enum IndexBytes {
    Mapped(MappedFile),
    InMemory(Vec<u8>),
}

impl AsRef<[u8]> for IndexBytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file.as_ref(),
            Self::InMemory(bytes) => bytes,
        }
    }
}

impl BaseImage {
    /// The digest of the whole image, which names it.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.index.image()
    }

    /// The image's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many whole blocks of a page's size it has.
    #[must_use]
    pub fn len_blocks(&self) -> u64 {
        self.index.len_blocks()
    }

    /// The block that holds these bytes, given with their digest. A block that cannot be read
    /// holds nothing (the log is told once): a page that is stored instead loses nobody anything.
    #[must_use]
    pub fn find(&self, page: &[u8], digest: &Digest) -> Option<u64> {
        let block = self.candidate(digest, None)?;
        let mut scratch = Vec::new();
        self.compare(block, page, &mut scratch)
            .next()
            .unwrap_or(false)
            .then_some(block)
    }

    /// The block to be compared with a page of this digest: the one after `previous` if its hash
    /// fits, so that what follows one another in the image makes one run, even where a block
    /// occurs more than once.
    pub(crate) fn candidate(&self, digest: &Digest, previous: Option<u64>) -> Option<u64> {
        let after = previous.map(|block| block + 1);
        after
            .filter(|block| self.index.hash_of(*block) == Some(*digest))
            .or_else(|| self.index.find(digest))
    }

    /// For each of some pages, whether the block of its turn holds the same bytes.
    pub(crate) fn compare<'a>(
        &self,
        first_block: u64,
        pages: &'a [u8],
        scratch: &'a mut Vec<u8>,
    ) -> impl Iterator<Item = bool> + use<'a> {
        scratch.resize(pages.len(), 0);
        let offset = first_block.saturating_mul(PAGE_SIZE as u64);
        let read = self.file.read_exact_at(scratch, offset);
        if let Err(error) = &read
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            let path = self.path.display();
            tracing::warn!(%path, offset, %error, "the base image's blocks cannot be compared");
        }
        let was_read = read.is_ok();
        let blocks = scratch.chunks_exact(PAGE_SIZE);
        pages
            .chunks_exact(PAGE_SIZE)
            .zip(blocks)
            .map(move |(page, block)| was_read && page == block)
    }

    /// Fills `buf`, a whole number of pages long, with blocks from `first_block` on, and verifies
    /// each of them.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] past the end, [`Error::BadBuffer`] for a part of a page,
    /// [`Error::Damaged`] for a block that is not what it was; what reading gives. `buf` then
    /// holds nothing of use.
    pub fn read_blocks(&self, first_block: u64, buf: &mut [u8]) -> Result<()> {
        self.read_some_blocks(first_block, buf, Reading::Waiting)
    }

    pub(crate) fn read_some_blocks(
        &self,
        first_block: u64,
        buf: &mut [u8],
        reading: Reading,
    ) -> Result<()> {
        let blocks = (buf.len() / PAGE_SIZE) as u64;
        if !buf.len().is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadBuffer {
                pages: blocks,
                found_bytes: buf.len(),
            });
        }
        let len_blocks = self.len_blocks();
        if first_block
            .checked_add(blocks)
            .is_none_or(|end| end > len_blocks)
        {
            return Err(Error::OutOfBounds {
                first_page: first_block,
                pages: blocks,
                len_pages: len_blocks,
            });
        }
        let offset = first_block * PAGE_SIZE as u64;
        let read = reading.read_exact_at(&self.file, buf, offset);
        read.context("read", &self.path)?;
        for (block, bytes) in (first_block..).zip(buf.chunks_exact(PAGE_SIZE)) {
            if self.index.hash_of(block) != Some(Digest::of(bytes)) {
                let what = format!(
                    "block {block} is not what {} says it was",
                    self.index_path.display()
                );
                return Err(Error::damaged(&self.path, block * PAGE_SIZE as u64, what));
            }
        }
        Ok(())
    }
}

impl Storage {
    pub(crate) fn block_index_path(&self, image: &Digest) -> PathBuf {
        self.dir(BLOCK_INDEXES_DIR).join(image.to_string())
    }

    /// Opens a base image to refer to its blocks. An index that is missing or damaged is made
    /// again, which reads the whole image.
    ///
    /// # Errors
    /// [`Error::UnknownImage`]; [`Error::Damaged`] for an image that is not what its name says, as
    /// far as that is noticed; [`Error::Newer`] for an index of a newer torpor.
    pub fn base_image(&self, digest: &Digest) -> Result<Arc<BaseImage>> {
        let (path, file) = self.open_image(digest)?;
        let image_bytes = file.metadata().context("look at", &path)?.len();
        let index_path = self.block_index_path(digest);
        let index = match open_index(&index_path, digest) {
            Ok(index) => index,
            Err(error @ Error::Newer { .. }) => return Err(error),
            Err(error) => {
                if !error.is_not_found() {
                    tracing::warn!(%error, "the block index is made again");
                }
                let bytes = make_index(&path, &file, digest)?;
                if let Err(error) = self.store_block_index(digest, &bytes) {
                    tracing::warn!(%error, "the block index is kept in memory");
                }
                decode(IndexBytes::InMemory(bytes), &index_path, digest)?
            }
        };
        if index.image_bytes() != image_bytes {
            let due = index.image_bytes();
            let what = format!("{image_bytes} bytes where {due} are due");
            return Err(Error::damaged(&path, image_bytes.min(due), what));
        }
        Ok(Arc::new(BaseImage {
            path,
            file,
            index_path,
            index,
            warned: AtomicBool::new(false),
        }))
    }

    /// Makes an image's index where it is missing or damaged.
    pub(crate) fn ensure_block_index(&self, digest: &Digest) -> Result<()> {
        match open_index(&self.block_index_path(digest), digest) {
            Ok(_) => Ok(()),
            Err(error @ Error::Newer { .. }) => Err(error),
            Err(_) => {
                let (path, file) = self.open_image(digest)?;
                let bytes = make_index(&path, &file, digest)?;
                self.store_block_index(digest, &bytes)
            }
        }
    }

    /// Opens an image and takes a shared lock on it.
    fn open_image(&self, digest: &Digest) -> Result<(PathBuf, File)> {
        let path = self.image_path(digest)?;
        let unknown = || Error::UnknownImage {
            digest: *digest,
            path: path.clone(),
        };
        for _ in 0..REPLACED_MAX {
            let file = File::open(&path).context("open", &path)?;
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => {}
                // Only someone who deletes it holds the lock alone.
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(unknown()),
                Err(e) => return Err(Error::io("lock", &path, e.into())),
            }
            // It may have been deleted between opening and locking, or have been imported once more:
            // a lock on what is not there any more keeps nobody from deleting what is.
            let opened = file.metadata().context("look at", &path)?;
            match fs::metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => {
                    return Ok((path, file));
                }
                Ok(_) => {}
                Err(_) => return Err(unknown()),
            }
        }
        Err(unknown())
    }

    /// Puts an index into its place; two that do it at once bring the same bytes.
    fn store_block_index(&self, image: &Digest, bytes: &[u8]) -> Result<()> {
        let staged = self.stage_import()?;
        let copy = staged.path().join("block-index");
        let mut file = durable::create_file(&copy)?;
        durable::step("block-index-write", &copy, || {
            file.write_all(bytes).context("write", &copy)
        })?;
        file.set_permissions(Permissions::from_mode(OBJECT_MODE))
            .context("protect", &copy)?;
        durable::step("block-index-file-sync", &copy, || {
            durable::sync_file(&file, &copy)
        })?;
        let (to, dir) = (self.block_index_path(image), self.dir(BLOCK_INDEXES_DIR));
        let lock = self.lock()?;
        durable::step("block-index-rename", &to, || {
            durable::rename_over(&copy, &to)
        })?;
        durable::step("block-index-dir-sync", &dir, || durable::sync_dir(&dir))?;
        drop(lock);
        Ok(())
    }
}

fn open_index(path: &Path, image: &Digest) -> Result<BlockIndex<IndexBytes>> {
    decode(IndexBytes::Mapped(MappedFile::open(path)?), path, image)
}

fn decode(bytes: IndexBytes, path: &Path, image: &Digest) -> Result<BlockIndex<IndexBytes>> {
    let index = BlockIndex::decode(bytes).map_err(|e| e.in_file(path))?;
    if index.image() == *image {
        Ok(index)
    } else {
        let what = format!("this is the block index of image {}", index.image());
        Err(Error::damaged(path, 24, what))
    }
}

/// Reads a whole image, verifies its digest, and hashes its blocks, on all cores.
fn make_index(path: &Path, file: &File, expected: &Digest) -> Result<Vec<u8>> {
    enum Done {
        Whole(Digest),
        Blocks(Vec<Digest>),
    }
    let image_bytes = file.metadata().context("look at", path)?.len();
    let blocks = image_bytes / PAGE_SIZE as u64;
    if blocks > BLOCKS_MAX {
        return Err(Error::TooLarge {
            what: "the number of blocks in a base image",
            found: blocks,
            max: BLOCKS_MAX,
        });
    }
    let pieces = to_usize(blocks.div_ceil(HASH_BLOCKS));
    // The digest of the whole is the longest piece, and begun first. It reads the image a second
    // time, from the host's cache; a block that changed in between would not verify when read.
    let done = in_parallel(useful_threads(), 1 + pieces, |piece| {
        let Some(piece) = piece.checked_sub(1) else {
            return digest_of_file(path).map(Done::Whole);
        };
        let first = piece as u64 * HASH_BLOCKS;
        let count = HASH_BLOCKS.min(blocks - first);
        hash_blocks(path, file, first, count).map(Done::Blocks)
    });
    let mut hashes = Vec::with_capacity(to_usize(blocks));
    for piece in done {
        match piece? {
            Done::Whole(digest) if digest == *expected => {}
            Done::Whole(digest) => {
                let what = format!("its digest is {digest}");
                return Err(Error::damaged(path, 0, what));
            }
            Done::Blocks(of_piece) => hashes.extend(of_piece),
        }
    }
    encode(expected, image_bytes, &hashes)
}

fn hash_blocks(path: &Path, file: &File, first_block: u64, count: u64) -> Result<Vec<Digest>> {
    let zero = Digest::of(&ZERO_PAGE);
    let mut bytes = vec![0; to_usize(count) * PAGE_SIZE];
    let read = file.read_exact_at(&mut bytes, first_block * PAGE_SIZE as u64);
    read.context("read", path)?;
    let hash = |block: &[u8]| {
        if is_zero(block) {
            zero
        } else {
            Digest::of(block)
        }
    };
    Ok(bytes.chunks_exact(PAGE_SIZE).map(hash).collect())
}
