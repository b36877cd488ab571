//! Decoded frames that are kept, and what reading has cost so far.
//!
//! Two shapes of one thing: the reader's own cache is for the neighbours of a page fault, and small;
//! the one for a walk along an image has room for one frame of each of many layers, since pages that
//! follow one another may stand in a different layer each.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::data::{DataFile, FRAME_BYTES, FRAME_PAGES};
use crate::error::Result;
use crate::page::PAGE_SIZE;
use crate::reading::Reading;

/// Decoded frames that one reader keeps (512 KiB): a few per thread that serves faults.
pub const CACHED_FRAMES: usize = 8;

/// Decoded frames that a walk keeps (4 MiB): as many as a reader has layers open.
const WALK_FRAMES: usize = crate::reader::OPEN_LAYERS_MAX;

/// Blocks of the base image that cost about as much as a frame: each is a read and a strong hash.
const BLOCKS_PER_FRAME: u64 = 4;

/// What opening a layer's file and reading its table costs, in frames.
const OPENING_FRAMES: u64 = 3;

const _: () = assert!(
    CACHED_FRAMES * FRAME_BYTES <= 1 << 20,
    "a reader stays below 1 MiB"
);

/// See the module.
#[derive(Debug)]
pub struct FrameCache {
    slots: Box<[Mutex<CachedFrame>]>,
    /// A layer has one slot only.
    by_layer: bool,
    /// In quarters of a frame.
    cost: AtomicU64,
}

/// A frame's pages, so that the neighbours of a page cost a copy.
#[derive(Debug, Default)]
struct CachedFrame {
    holds: Option<(u32, usize)>,
    /// At most [`FRAME_BYTES`].
    bytes: Vec<u8>,
}

impl FrameCache {
    pub(crate) fn for_faults() -> Self {
        Self::new(CACHED_FRAMES, false)
    }

    /// For one walk along an image, by one thread.
    #[must_use]
    pub fn for_walk() -> Self {
        Self::new(WALK_FRAMES, true)
    }

    fn new(slots: usize, by_layer: bool) -> Self {
        Self {
            slots: (0..slots).map(|_| Mutex::default()).collect(),
            by_layer,
            cost: AtomicU64::new(0),
        }
    }

    /// What has been read by way of it, in frames: those decoded, blocks of the base image, four of
    /// which cost about as much as a frame, and layers opened, each of which costs as much as three.
    #[must_use]
    pub fn cost_frames(&self) -> u64 {
        self.cost.load(Ordering::Relaxed) / BLOCKS_PER_FRAME
    }

    pub(crate) fn count_frame(&self) {
        self.cost.fetch_add(BLOCKS_PER_FRAME, Ordering::Relaxed);
    }

    pub(crate) fn count_opening(&self) {
        self.cost
            .fetch_add(OPENING_FRAMES * BLOCKS_PER_FRAME, Ordering::Relaxed);
    }

    pub(crate) fn count_blocks(&self, blocks: u64) {
        self.cost.fetch_add(blocks, Ordering::Relaxed);
    }

    fn slot(&self, layer: u32, frame: usize) -> &Mutex<CachedFrame> {
        let layer = layer as usize;
        let number = if self.by_layer {
            layer
        } else {
            frame ^ layer.wrapping_mul(5)
        };
        &self.slots[number % self.slots.len()]
    }

    /// Fills `part` with the pages of a frame from `skip` on. `scratch` are a frame as stored and as
    /// decoded, for when the slot is in use.
    pub(crate) fn read_part(
        &self,
        (layer, data): (u32, &DataFile),
        (frame, skip): (usize, usize),
        part: &mut [u8],
        reading: Reading,
        (stored, decoded): (&mut Vec<u8>, &mut Vec<u8>),
    ) -> Result<()> {
        debug_assert!(skip < FRAME_PAGES, "a page of the frame");
        let from = skip * PAGE_SIZE;
        let mut read = |frame_bytes: &mut Vec<u8>| {
            self.count_frame();
            frame_bytes.resize(data.frame_len(frame), 0);
            data.read_frame(frame, stored, frame_bytes, reading)
        };
        // A slot that is held by another thread, perhaps one that waits for the disk, is not
        // waited for.
        let Ok(mut cached) = self.slot(layer, frame).try_lock() else {
            read(decoded)?;
            part.copy_from_slice(&decoded[from..from + part.len()]);
            return Ok(());
        };
        if cached.holds != Some((layer, frame)) {
            cached.holds = None;
            read(&mut cached.bytes)?;
            cached.holds = Some((layer, frame));
        }
        part.copy_from_slice(&cached.bytes[from..from + part.len()]);
        Ok(())
    }
}
