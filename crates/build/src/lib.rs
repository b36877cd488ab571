//! Builds: immutable snapshots of a guest, stored as layers.
//!
//! A build has two images (memory and disk), the VMM's device state, and a manifest. Builds form a
//! tree; each stores what differs from its parent, and has complete indexes, so that reading a
//! page never walks the chain.
//!
//! - [`Storage`] is where builds live: begin, commit, open, list, delete, name.
//! - [`StagedBuild`] is a build in the making; its [`LayerWriter`]s take an image page by page.
//! - [`Build`] is a committed one; its [`ImageReader`]s give pages back.
//!
//! All of it is blocking: from async code, call it on a thread that may block. It does not know
//! what a VMM is, nor who reads the pages.

mod base_image;
mod block_index;
mod build;
mod bytes;
mod classify;
mod data;
mod durable;
mod error;
mod frame_cache;
mod frames;
mod ids;
mod images;
mod index;
mod manifest;
mod mapping;
mod objects;
mod page;
mod parallel;
mod reader;
mod reading;
mod run_dir;
mod staging;
mod stats;
mod storage;
mod validate;
mod working_set;
mod writer;

pub use base_image::BaseImage;
pub use block_index::{BLOCK_INDEX_VERSION, BlockIndex};
pub use build::{Build, VMSTATE_BYTES_MAX};
pub use data::{DATA_VERSION, FRAME_PAGES};
pub use durable::{durable_rename, durable_write};
pub use error::{Error, FormatError, Result};
pub use frame_cache::{CACHED_FRAMES, FrameCache};
pub use ids::{BuildId, Digest, NAME_BYTES_MAX, Name, ParseIdError};
pub use images::ListedImage;
pub use index::{Entry, INDEX_VERSION, Index, IndexBuilder, LAYERS_MAX, PageCounts, Run};
pub use manifest::{BalloonRecord, BuildInfo, FileRecord, MANIFEST_VERSION, Manifest, VmmRecord};
pub use page::{IMAGE_PAGES_MAX, ImageKind, PAGE_SIZE, PageRun};
pub use reader::{ImageReader, OPEN_LAYERS_MAX};
pub use run_dir::{RunDir, SweepReport};
pub use staging::StagedBuild;
pub use stats::{BaseImageUse, BuildStats, ImageStats, LayerUse};
pub use storage::{ListedBuild, STORAGE_LOCK_WAIT_MS, Storage};
pub use validate::{ValidateOptions, Validation};
pub use writer::{LayerSummary, LayerWriter, PageContent};
