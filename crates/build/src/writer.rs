//! Takes a new image, page by page, and stores what neither its parent nor the base image has.
//!
//! Pages come in order, each exactly once. What becomes of a page's bytes, first rule that fits:
//!
//! 1. all zero → [`Entry::Zero`]
//! 2. the same bytes as the parent's page of that number → the parent's entry
//! 3. the same bytes as a block of the base image → a reference to that block, if the writer was
//!    told to make them ([`LayerWriter::refer_to`])
//! 4. the same bytes as a page that this build has stored already → that page
//! 5. anything else → stored
//!
//! Rules 1 to 3 are independent of what came before; they are looked at by all cores, a window of
//! pages at a time. Each page is hashed once, for rules 3 and 4. Rule 3 compares the bytes as well;
//! rule 4 takes equal BLAKE3s for equal pages. A guest cannot slow its pause down by what it
//! writes: looking up in the base image is a binary search, and the map behind rule 4 has a random
//! key of its own.
//!
//! What it does not do: look for a page's bytes elsewhere in the parent.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::base_image::BaseImage;
use crate::classify::{Classifier, Found, parent_run};
use crate::data::FRAME_BYTES;
use crate::error::{Error, Result};
use crate::frames::{FrameWriter, HashedFile};
use crate::ids::{BuildId, Digest};
use crate::index::{Entry, IndexBuilder, PageCounts};
use crate::page::{IMAGE_PAGES_MAX, ImageKind, PAGE_SIZE};
use crate::parallel::useful_threads;
use crate::reader::ImageReader;
use crate::staging::{SharedFiles, StagedImage};

/// Pages looked at before the first of them is stored: 4 MiB, so that starting threads for them
/// is little beside the work.
const WINDOW_PAGES: usize = 1024;

/// What pages are, as the capture found it.
#[derive(Debug, Clone, Copy)]
pub enum PageContent<'a> {
    /// As in the parent's image; zero where there is none, or past its end.
    Parent,
    /// Free by the guest's own metadata.
    Free,
    /// Given back by the guest.
    Removed,
    /// These bytes.
    Data(&'a [u8]),
}

/// What became of an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LayerSummary {
    /// The whole image's pages by kind.
    pub pages: PageCounts,
    /// Pages whose bytes were given and found to be the parent's.
    pub same_as_parent_pages: u64,
    /// Pages whose bytes were given, found in the base image, and became references to it.
    #[serde(default)]
    pub base_image_pages: u64,
    /// Pages whose bytes were given and found to be stored already.
    pub duplicate_pages: u64,
    /// Pages whose bytes were given and could not be compared, as the parent's could not be read:
    /// they were stored.
    pub parent_unreadable_pages: u64,
    /// Pages stored by this build.
    pub stored_pages: u64,
    /// Bytes of these pages.
    pub raw_bytes: u64,
    /// Bytes that they take in the data file.
    pub compressed_bytes: u64,
    /// The whole data file, with header and frame table.
    pub data_file_bytes: u64,
    /// The index file.
    pub index_file_bytes: u64,
    /// Runs in the index.
    pub runs: u64,
    /// Layers that the index names.
    pub layers: u64,
}

/// Writes one image of a build. See the module's documentation.
#[derive(Debug)]
pub struct LayerWriter {
    build: BuildId,
    kind: ImageKind,
    len_pages: u64,
    parent: Option<Arc<ImageReader>>,
    base_image: Option<Arc<BaseImage>>,
    /// Where the parent's layers stand in the new table, once used.
    parent_layers: Vec<Option<u32>>,
    own_layer: Option<u32>,
    index: IndexBuilder,
    index_file: HashedFile,
    data: FrameWriter,
    /// The frame that is being filled.
    frame: Vec<u8>,
    stored: StoredPages,
    threads: usize,
    /// Whether the log has been told that the parent cannot be read.
    warned: AtomicBool,
    summary: LayerSummary,
    failed: bool,
    files: SharedFiles,
}

impl LayerWriter {
    pub(crate) fn create(
        dir: &Path,
        build: BuildId,
        kind: ImageKind,
        len_pages: u64,
        parent: Option<Arc<ImageReader>>,
        files: SharedFiles,
    ) -> Result<Self> {
        if len_pages > IMAGE_PAGES_MAX {
            let what = "the number of pages in an image";
            return Err(Error::TooLarge {
                what,
                found: len_pages,
                max: IMAGE_PAGES_MAX,
            });
        }
        files.begun(kind.index_file());
        files.begun(kind.data_file());
        let mut data = FrameWriter::create(dir.join(kind.data_file()), &build, kind)?;
        let parent_layers = vec![None; parent.as_ref().map_or(0, |p| p.index().layers().len())];
        Ok(Self {
            build,
            kind,
            len_pages,
            parent,
            base_image: None,
            parent_layers,
            own_layer: None,
            index: IndexBuilder::new(build, kind),
            index_file: HashedFile::create(dir.join(kind.index_file()))?,
            frame: data.buffer(),
            data,
            stored: StoredPages::default(),
            threads: useful_threads(),
            warned: AtomicBool::new(false),
            summary: LayerSummary::default(),
            failed: false,
            files,
        })
    }

    /// From now on, pages of data that are copies of a block of this image, which must be the
    /// build's base image, become references to it.
    ///
    /// # Errors
    /// [`Error::BaseImageMismatch`] if pages, the parent's or this image's, refer to another one.
    pub fn refer_to(&mut self, base_image: Arc<BaseImage>) -> Result<()> {
        let found = base_image.digest();
        if let Some(referred) = self.referred_image().filter(|digest| *digest != found) {
            return Err(Error::BaseImageMismatch {
                id: self.build,
                image: self.kind.as_str(),
                referred,
                found: Some(found),
            });
        }
        self.base_image = Some(base_image);
        Ok(())
    }

    /// The base image that its pages may refer to by now.
    fn referred_image(&self) -> Option<Digest> {
        let own = self.base_image.as_ref().map(|image| image.digest());
        own.or_else(|| self.parent.as_ref().and_then(|p| p.referred_image()))
    }

    /// Adds the next pages.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] unless `first_page` is the page that is due and the image is long
    /// enough, [`Error::BadBuffer`] unless the bytes are that many pages; both change nothing.
    /// Any other error ends the writer.
    pub fn push(&mut self, first_page: u64, pages: u64, content: PageContent<'_>) -> Result<()> {
        if self.failed {
            return Err(Error::WriterFailed {
                path: self.data.path().to_owned(),
            });
        }
        let (expected, len_pages) = (self.index.len_pages(), self.len_pages);
        if first_page != expected || pages > len_pages - expected {
            return Err(Error::OutOfOrder {
                expected,
                found: first_page,
                len_pages,
            });
        }
        if let PageContent::Data(bytes) = content
            && bytes.len() as u64 != pages * PAGE_SIZE as u64
        {
            return Err(Error::BadBuffer {
                pages,
                found_bytes: bytes.len(),
            });
        }
        self.failed = true;
        match content {
            PageContent::Parent => self.push_parent(first_page, pages)?,
            PageContent::Free => self.index.append(pages, Entry::Free)?,
            PageContent::Removed => self.index.append(pages, Entry::Removed)?,
            PageContent::Data(bytes) => self.push_data(first_page, bytes)?,
        }
        self.failed = false;
        Ok(())
    }

    /// The page that is due.
    #[must_use]
    pub fn next_page(&self) -> u64 {
        self.index.len_pages()
    }

    /// The image's length in pages.
    #[must_use]
    pub fn len_pages(&self) -> u64 {
        self.len_pages
    }

    /// Writes what is left. The files are synced by the build's commit.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] if pages are missing; what writing gives.
    pub fn finish(mut self) -> Result<LayerSummary> {
        if self.failed {
            return Err(Error::WriterFailed {
                path: self.data.path().to_owned(),
            });
        }
        let (expected, len_pages) = (self.index.len_pages(), self.len_pages);
        if expected != len_pages {
            return Err(Error::OutOfOrder {
                expected,
                found: len_pages,
                len_pages,
            });
        }
        let referred_image = self.referred_image();
        if !self.frame.is_empty() {
            self.data.push(std::mem::take(&mut self.frame))?;
        }
        let (file, record, compressed_bytes) = self.data.finish(self.stored.pages())?;
        self.files.finished(self.kind.data_file(), file, record);

        let index = self.index.finish();
        self.index_file.append(&index.encode()?)?;
        let (file, index_record) = self.index_file.finish()?;
        self.files
            .finished(self.kind.index_file(), file, index_record);
        let counts = index.counts();
        let image = StagedImage {
            kind: self.kind,
            parent: self.parent.as_ref().map(|parent| parent.build().id()),
            base_image: referred_image.filter(|_| counts.base_image > 0),
        };
        self.files.image(image, index.layers());
        Ok(LayerSummary {
            pages: counts,
            stored_pages: self.stored.pages(),
            raw_bytes: self.stored.pages() * PAGE_SIZE as u64,
            compressed_bytes,
            data_file_bytes: record.bytes,
            index_file_bytes: index_record.bytes,
            runs: index.run_count() as u64,
            layers: index.layers().len() as u64,
            ..self.summary
        })
    }

    fn push_parent(&mut self, first_page: u64, pages: u64) -> Result<()> {
        let (mut page, end) = (first_page, first_page + pages);
        while page < end {
            let (pages, entry) = parent_run(self.parent.as_deref(), page, end - page);
            self.append_parent(pages, entry)?;
            page += pages;
        }
        Ok(())
    }

    /// Appends an entry of the parent's index, translated to the new layer table.
    fn append_parent(&mut self, pages: u64, entry: Entry) -> Result<()> {
        let Entry::Layer {
            layer,
            offset_pages,
        } = entry
        else {
            return self.index.append(pages, entry);
        };
        let position = layer as usize;
        let known = self.parent_layers.get(position).copied().flatten();
        let layer = match (known, &self.parent) {
            (Some(layer), _) => layer,
            (None, Some(parent)) => {
                let id = parent.index().layers()[position];
                let layer = self.index.add_layer(id)?;
                self.parent_layers[position] = Some(layer);
                layer
            }
            (None, None) => return self.index.append(pages, Entry::Zero),
        };
        self.index.append(
            pages,
            Entry::Layer {
                layer,
                offset_pages,
            },
        )
    }

    fn push_data(&mut self, first_page: u64, bytes: &[u8]) -> Result<()> {
        let firsts = (first_page..).step_by(WINDOW_PAGES);
        for (first_page, window) in firsts.zip(bytes.chunks(WINDOW_PAGES * PAGE_SIZE)) {
            let classifier = Classifier {
                parent: self.parent.as_deref(),
                base_image: self.base_image.as_deref(),
                warned: &self.warned,
            };
            let classified = classifier.classify(self.threads, first_page, window);
            self.summary.parent_unreadable_pages += classified.parent_unreadable_pages;
            for (page, found) in window.chunks_exact(PAGE_SIZE).zip(classified.pages) {
                self.push_found(page, found)?;
            }
        }
        Ok(())
    }

    fn push_found(&mut self, page: &[u8], found: Found) -> Result<()> {
        match found {
            Found::Zero => self.index.append(1, Entry::Zero),
            Found::Parent(entry) => {
                self.summary.same_as_parent_pages += 1;
                self.append_parent(1, entry)
            }
            Found::BaseImage(block) => {
                self.summary.base_image_pages += 1;
                self.index.append(1, Entry::BaseImage { block })
            }
            Found::Other(digest) => self.store(page, digest),
        }
    }

    fn store(&mut self, page: &[u8], digest: Digest) -> Result<()> {
        let (offset_pages, is_new) = self.stored.find_or_add(digest);
        if is_new {
            self.frame.extend_from_slice(page);
            if self.frame.len() == FRAME_BYTES {
                let empty = self.data.buffer();
                self.data.push(std::mem::replace(&mut self.frame, empty))?;
            }
        } else {
            self.summary.duplicate_pages += 1;
        }
        let layer = match self.own_layer {
            Some(layer) => layer,
            None => *self.own_layer.insert(self.index.add_layer(self.build)?),
        };
        self.index.append(
            1,
            Entry::Layer {
                layer,
                offset_pages,
            },
        )
    }
}

/// Which pages this build has stored: about 50 bytes of memory for each.
///
/// The map's own hasher has a random key: a guest that could choose digests to its liking could
/// still not choose where they fall.
#[derive(Debug, Default)]
struct StoredPages(HashMap<Digest, u32>);

impl StoredPages {
    fn pages(&self) -> u64 {
        self.0.len() as u64
    }

    /// Where the page is stored, and whether it is to be stored there now.
    fn find_or_add(&mut self, digest: Digest) -> (u64, bool) {
        // An image has at most IMAGE_PAGES_MAX pages, which fit.
        let next = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        match self.0.entry(digest) {
            Slot::Occupied(known) => (u64::from(*known.get()), false),
            Slot::Vacant(free) => (u64::from(*free.insert(next)), true),
        }
    }
}
