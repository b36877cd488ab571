//! The index of a base image's blocks: which of them holds given bytes, and what each must hold.
//!
//! Memory pages that are copies of a block (most of a guest's page cache and program text) are
//! stored as references. The index answers the two questions that this takes: *where in the image
//! do these bytes stand?* when a build is written, and *is this block still what it was?* when it
//! is read. Both are answered by a BLAKE3 per block of 4 KiB, in block order; the first one also
//! by the blocks' numbers sorted by hash.
//!
//! - Looking up is a binary search: the guest chooses the hash that is looked for, and cannot
//!   choose what the search costs.
//! - Blocks of zeros, and all but the first of equal blocks, have a hash and are never found.
//! - A part of a block at the image's end is no block.
//!
//! It can be made again from the image at any time, which is the truth; see
//! [`BaseImage`](crate::BaseImage). What it does not do: read the image.
//!
//! # Format, version 1
//!
//! All numbers little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "torporBX"
//!      8      4  version
//!     12      4  bytes in a block: 4096
//!     16      8  XXH3-64 of bytes 0..16 and 24..end
//!     24     32  digest of the image
//!     56      8  bytes in the image
//!     64      4  blocks: the image's length divided by 4096, rounded down
//!     68      4  blocks that can be found
//!     72     32  each block, in order: the BLAKE3 of its bytes
//!      …      4  each block that can be found, sorted by hash: its number
//! ```

use std::cmp::Ordering;

use xxhash_rust::xxh3::Xxh3;

use crate::bytes::Bytes;
use crate::error::{Error, FormatError, Result};
use crate::ids::Digest;
use crate::page::{IMAGE_PAGES_MAX, PAGE_SIZE, ZERO_PAGE};

const MAGIC: [u8; 8] = *b"torporBX";
/// The version written, and the newest one read.
pub const BLOCK_INDEX_VERSION: u32 = 1;
const BLOCK_SIZE_ON_DISK: u32 = 4096;
const _: () = assert!(BLOCK_SIZE_ON_DISK as usize == PAGE_SIZE);
const CHECKSUM_AT: usize = 16;
const BLOCKS_AT: usize = 64;
const HEADER_BYTES: usize = 72;
const HASH_BYTES: usize = blake3::OUT_LEN;
const NUMBER_BYTES: usize = 4;

/// Most blocks in one image (1 TiB): as many as the longest image of a build has pages.
pub(crate) const BLOCKS_MAX: u64 = IMAGE_PAGES_MAX;

/// The index of one base image, on bytes that may be mapped. See the module's documentation.
#[derive(Debug)]
pub struct BlockIndex<B = Vec<u8>> {
    bytes: B,
    header: Header,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    image: Digest,
    image_bytes: u64,
    blocks: usize,
    findable: usize,
}

impl<B: AsRef<[u8]>> BlockIndex<B> {
    /// Takes a file's bytes, whatever they are.
    ///
    /// # Errors
    /// [`FormatError`] for what is no whole index of this version, as far as lengths, limits and the
    /// checksum tell.
    pub fn decode(bytes: B) -> Result<Self, FormatError> {
        let header = Header::decode(bytes.as_ref())?;
        Ok(Self { bytes, header })
    }

    /// The image's digest.
    #[must_use]
    pub fn image(&self) -> Digest {
        self.header.image
    }

    /// The image's length in bytes.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        self.header.image_bytes
    }

    /// How many whole blocks the image has.
    #[must_use]
    pub fn len_blocks(&self) -> u64 {
        self.header.blocks as u64
    }

    /// How many blocks can be found: distinct ones that are not zeros.
    #[must_use]
    pub fn findable_blocks(&self) -> u64 {
        self.header.findable as u64
    }

    /// What a block must hash to; `None` past the end.
    #[must_use]
    pub fn hash_of(&self, block: u64) -> Option<Digest> {
        self.hash_bytes(block).map(|hash| Digest::from_bytes(*hash))
    }

    /// The block of this hash. At most 29 comparisons, whatever the hash.
    #[must_use]
    pub fn find(&self, hash: &Digest) -> Option<u64> {
        let (mut low, mut high) = (0, self.header.findable);
        while low < high {
            let middle = low.midpoint(high);
            let block = self.findable(middle)?;
            match self.hash_bytes(block)?.cmp(hash.as_bytes()) {
                Ordering::Less => low = middle + 1,
                Ordering::Equal => return Some(block),
                Ordering::Greater => high = middle,
            }
        }
        None
    }

    fn hash_bytes(&self, block: u64) -> Option<&[u8; HASH_BYTES]> {
        let position = usize::try_from(block).ok()?;
        let hashes = self.bytes.as_ref().get(HEADER_BYTES..)?;
        if position >= self.header.blocks {
            return None;
        }
        hashes.as_chunks().0.get(position)
    }

    fn findable(&self, position: usize) -> Option<u64> {
        let numbers_at = HEADER_BYTES + HASH_BYTES * self.header.blocks;
        let numbers = self.bytes.as_ref().get(numbers_at..)?;
        let number = numbers.as_chunks::<NUMBER_BYTES>().0.get(position)?;
        Some(u64::from(u32::from_le_bytes(*number)))
    }
}

impl Header {
    /// Checks all that can be wrong but the hashes themselves and the numbers' order: those are
    /// covered by the checksum, and looking up never trusts them.
    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut input = Bytes::new(bytes);
        if input.array()? != MAGIC {
            return Err(FormatError::damaged(0, "this is not a block index"));
        }
        let version = input.u32()?;
        if version > BLOCK_INDEX_VERSION {
            return Err(FormatError::Newer {
                found: version,
                known: BLOCK_INDEX_VERSION,
            });
        }
        if version != BLOCK_INDEX_VERSION {
            let what = format!("there is no format version {version}");
            return Err(FormatError::damaged(8, what));
        }
        let block_size = input.u32()?;
        let expected_checksum = input.u64()?;
        let image = Digest::from_bytes(input.array()?);
        let image_bytes = input.u64()?;
        let blocks = input.u32()? as usize;
        let findable = input.u32()? as usize;
        let expected_bytes = HEADER_BYTES + HASH_BYTES * blocks + NUMBER_BYTES * findable;
        if bytes.len() != expected_bytes {
            let what = format!("{} bytes where {expected_bytes} are due", bytes.len());
            return Err(FormatError::damaged(bytes.len().min(expected_bytes), what));
        }
        if checksum(bytes) != expected_checksum {
            let what = "the checksum does not match";
            return Err(FormatError::damaged(CHECKSUM_AT, what));
        }
        if block_size != BLOCK_SIZE_ON_DISK {
            let what = format!("blocks of {block_size} bytes");
            return Err(FormatError::damaged(12, what));
        }
        let expected_blocks = image_bytes / PAGE_SIZE as u64;
        if expected_blocks != blocks as u64 || expected_blocks > BLOCKS_MAX || findable > blocks {
            let what = format!("{blocks} blocks, {findable} to be found, in {image_bytes} bytes");
            return Err(FormatError::damaged(BLOCKS_AT, what));
        }
        Ok(Self {
            image,
            image_bytes,
            blocks,
            findable,
        })
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..CHECKSUM_AT]);
    hasher.update(&bytes[CHECKSUM_AT + 8..]);
    hasher.digest()
}

/// The bytes of the index of an image whose blocks have these hashes.
///
/// # Errors
/// [`Error::TooLarge`] for an image of more blocks than a build's image can have pages.
pub(crate) fn encode(image: &Digest, image_bytes: u64, hashes: &[Digest]) -> Result<Vec<u8>> {
    let too_large = || Error::TooLarge {
        what: "the number of blocks in a base image",
        found: hashes.len() as u64,
        max: BLOCKS_MAX,
    };
    let blocks = u32::try_from(hashes.len()).map_err(|_| too_large())?;
    if u64::from(blocks) > BLOCKS_MAX {
        return Err(too_large());
    }
    let findable = findable_blocks(hashes, blocks);
    let mut out = Vec::with_capacity(
        HEADER_BYTES + HASH_BYTES * hashes.len() + NUMBER_BYTES * findable.len(),
    );
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&BLOCK_INDEX_VERSION.to_le_bytes());
    out.extend_from_slice(&BLOCK_SIZE_ON_DISK.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(image.as_bytes());
    out.extend_from_slice(&image_bytes.to_le_bytes());
    out.extend_from_slice(&blocks.to_le_bytes());
    // No more than there are blocks.
    let count = u32::try_from(findable.len()).unwrap_or(blocks);
    out.extend_from_slice(&count.to_le_bytes());
    for hash in hashes {
        out.extend_from_slice(hash.as_bytes());
    }
    for number in findable {
        out.extend_from_slice(&number.to_le_bytes());
    }
    let checksum = checksum(&out);
    out[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum.to_le_bytes());
    Ok(out)
}

/// The first of each kind of block, sorted by hash, but for zeros.
fn findable_blocks(hashes: &[Digest], blocks: u32) -> Vec<u32> {
    let zero = Digest::of(&ZERO_PAGE);
    let mut sorted: Vec<(&Digest, u32)> = hashes
        .iter()
        .zip(0..blocks)
        .filter(|(hash, _)| **hash != zero)
        .collect();
    sorted.sort_unstable();
    sorted.dedup_by_key(|(hash, _)| *hash);
    sorted.into_iter().map(|(_, number)| number).collect()
}
