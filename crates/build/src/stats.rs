//! What a build takes and what it leans on.

use serde::{Deserialize, Serialize};

use crate::build::{Build, VMSTATE_FILE};
use crate::error::Result;
use crate::ids::{BuildId, Digest};
use crate::index::PageCounts;
use crate::page::{ImageKind, PAGE_SIZE};
use crate::reader::ImageReader;

/// What one layer contributes to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerUse {
    /// The build whose data it is.
    pub build: BuildId,
    /// Pages of the image whose bytes stand there.
    pub pages: u64,
    /// Distinct stored pages among them.
    pub distinct_pages: u64,
}

/// What the base image contributes to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseImageUse {
    /// The base image.
    pub image: Digest,
    /// Pages of the image whose bytes stand there.
    pub pages: u64,
    /// Distinct blocks among them.
    pub distinct_blocks: u64,
}

/// One image of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStats {
    /// The image's length in pages.
    pub len_pages: u64,
    /// Its pages by kind.
    pub pages: PageCounts,
    /// Where its data stands: this build's own layer and its ancestors'.
    pub layers: Vec<LayerUse>,
    /// The base image's part, if pages refer to it.
    #[serde(default)]
    pub base_image: Option<BaseImageUse>,
    /// Runs in the index.
    pub runs: u64,
    /// The index file.
    pub index_file_bytes: u64,
    /// This build's own data file: what it takes on the disk.
    pub data_file_bytes: u64,
    /// Pages in this build's own data file.
    pub own_stored_pages: u64,
    /// Distinct uncompressed bytes that the whole index reaches, through all layers: a child
    /// cannot look lean by leaning on its parent. References to the base image do not count.
    pub reachable_stored_bytes: u64,
}

/// A build's sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildStats {
    /// Guest memory, if stored.
    pub memory: Option<ImageStats>,
    /// The guest's disk, if stored.
    pub disk: Option<ImageStats>,
    /// Device state.
    pub vmstate_bytes: u64,
    /// All of the build's files but the manifest.
    pub files_bytes: u64,
}

impl Build {
    /// Adds up what the build takes and what it leans on.
    ///
    /// # Errors
    /// What opening its images and its own data files gives.
    pub fn stats(&self) -> Result<BuildStats> {
        let image = |kind| {
            self.has_image(kind)
                .then(|| self.image(kind)?.stats())
                .transpose()
        };
        Ok(BuildStats {
            memory: image(ImageKind::Memory)?,
            disk: image(ImageKind::Disk)?,
            vmstate_bytes: self.file_bytes(VMSTATE_FILE),
            files_bytes: self.manifest().files.values().map(|file| file.bytes).sum(),
        })
    }

    fn file_bytes(&self, name: &str) -> u64 {
        self.manifest().files.get(name).map_or(0, |file| file.bytes)
    }
}

impl ImageReader {
    /// Adds up what the image takes and what it leans on.
    ///
    /// # Errors
    /// What opening the build's own data file gives.
    pub fn stats(&self) -> Result<ImageStats> {
        let (index, build) = (self.index(), self.build());
        let mut pages_by_layer = vec![0; index.layers().len()];
        for run in index.runs() {
            if let crate::Entry::Layer { layer, .. } = run.what
                && let Some(pages) = pages_by_layer.get_mut(layer as usize)
            {
                *pages += run.pages;
            }
        }
        let layers: Vec<_> = index
            .layers()
            .iter()
            .zip(pages_by_layer)
            .zip(index.distinct_pages_by_layer())
            .map(|((&build, pages), distinct_pages)| LayerUse {
                build,
                pages,
                distinct_pages,
            })
            .collect();
        let distinct_pages: u64 = layers.iter().map(|layer| layer.distinct_pages).sum();
        let pages = index.counts();
        let base_image = self.referred_image().map(|image| BaseImageUse {
            image,
            pages: pages.base_image,
            distinct_blocks: index.distinct_base_image_blocks(),
        });
        Ok(ImageStats {
            len_pages: index.len_pages(),
            pages,
            layers,
            base_image,
            runs: index.run_count() as u64,
            index_file_bytes: build.file_bytes(index.kind().index_file()),
            data_file_bytes: build.file_bytes(index.kind().data_file()),
            own_stored_pages: self.open_own_data()?.len_pages(),
            reachable_stored_bytes: distinct_pages * PAGE_SIZE as u64,
        })
    }
}
