//! Reads an image's pages, whatever layers they stand in.
//!
//! A reader is shared by the threads that serve page faults. Its costs are bounded: at most
//! [`OPEN_LAYERS_MAX`] data files are open (the least recently used is closed), and
//! [`CACHED_FRAMES`](crate::CACHED_FRAMES) decoded frames are kept. The cache is for neighbours: a fault reads one page
//! of a frame and then the others. Measured on two busy cores, host cache warm: a page of a frame
//! that is not kept 15 µs (8 µs if it is not compressed), of one that is kept 3 µs.
//!
//! As long as a reader lives its build is in use and cannot be deleted; the build keeps its
//! parents from being deleted, so every layer's file stays where it is.
//!
//! Reading may wait for the disk; [`ImageReader::try_read_pages`] never does, and gives what the
//! host's page cache holds, or nothing.
//!
//! Every frame is verified each time that it is read from its file, and so is every block of the
//! base image, against the index of its blocks. Blocks are read from the one shared image file and
//! not cached here: all sandboxes share them in the host's cache.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::base_image::BaseImage;
use crate::build::Build;
use crate::data::{DataFile, FRAME_PAGES};
use crate::error::{Error, Result};
use crate::frame_cache::FrameCache;
use crate::ids::{BuildId, Digest};
use crate::index::{Entry, INDEX_BYTES_MAX, Index, Run};
use crate::page::{ImageKind, PAGE_SIZE, to_usize};
use crate::reading::Reading;

/// Most data files that one reader holds open: a keeper has a few readers, and a process may by
/// default have 1024 files.
pub const OPEN_LAYERS_MAX: usize = 64;

thread_local! {
    /// A frame as stored, and one as decoded.
    static SCRATCH: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Reads one image of one build. See the module's documentation.
#[derive(Debug)]
pub struct ImageReader {
    build: Build,
    index: Index,
    index_path: PathBuf,
    layers: Layers,
    cache: FrameCache,
    /// There if the index names blocks of it.
    base_image: Option<Arc<BaseImage>>,
}

impl ImageReader {
    pub(crate) fn open(build: &Build, kind: ImageKind) -> Result<Self> {
        let index_path = build.file_path(kind.index_file());
        let bytes = build.read_file(kind.index_file(), INDEX_BYTES_MAX)?;
        let index = Index::decode(&bytes).map_err(|e| e.in_file(&index_path))?;
        if index.build_id() != build.id() || index.kind() != kind {
            let what = format!(
                "this is the {} index of {}",
                index.kind().as_str(),
                index.build_id()
            );
            return Err(Error::damaged(&index_path, 24, what));
        }
        if let Some(stranger) = index
            .layers()
            .iter()
            .find(|id| !build.manifest().layers.contains(id))
        {
            let what = format!("it names the layer {stranger}, the manifest does not");
            return Err(Error::damaged(&index_path, 56, what));
        }
        let layers = Layers::new(build.storage().builds_dir(), index.layers().to_vec(), kind);
        let base_image = open_base_image(build, &index, &index_path)?;
        Ok(Self {
            build: build.clone(),
            index,
            index_path,
            layers,
            cache: FrameCache::for_faults(),
            base_image,
        })
    }

    /// The image's index.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// The build whose image this is.
    #[must_use]
    pub fn build(&self) -> &Build {
        &self.build
    }

    /// The image's length in pages.
    #[must_use]
    pub fn len_pages(&self) -> u64 {
        self.index.len_pages()
    }

    /// The base image that some of its pages refer to.
    #[must_use]
    pub fn referred_image(&self) -> Option<Digest> {
        self.base_image.as_ref().map(|image| image.digest())
    }

    /// Fills `buf`, a whole number of pages long, with the image's pages from `first_page` on.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] past the end, [`Error::BadBuffer`] for a part of a page, and what
    /// reading and verifying the layers' files gives; `buf` then holds nothing of use.
    pub fn read_pages(&self, first_page: u64, buf: &mut [u8]) -> Result<()> {
        self.read(&self.cache, first_page, buf, Reading::Waiting)
    }

    /// The same by way of a cache of the caller's, who walks along much of the image.
    ///
    /// # Errors
    /// As [`Self::read_pages`].
    pub fn read_pages_through(
        &self,
        cache: &FrameCache,
        first_page: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        self.read(cache, first_page, buf, Reading::Waiting)
    }

    /// The same without waiting for anything: whether the host's page cache held all that it takes,
    /// and all of it verified. If not, `buf` holds nothing of use, and [`Self::read_pages`] says
    /// more.
    ///
    /// What it costs is decoding and verifying: for pages that stand next to each other in one
    /// layer, that of the frames that they lie in.
    #[must_use]
    pub fn try_read_pages(&self, first_page: u64, buf: &mut [u8]) -> bool {
        self.read(&self.cache, first_page, buf, Reading::AtHand)
            .is_ok()
    }

    fn read(
        &self,
        cache: &FrameCache,
        first_page: u64,
        buf: &mut [u8],
        reading: Reading,
    ) -> Result<()> {
        let pages = (buf.len() / PAGE_SIZE) as u64;
        if !buf.len().is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadBuffer {
                pages,
                found_bytes: buf.len(),
            });
        }
        let len_pages = self.len_pages();
        if first_page
            .checked_add(pages)
            .is_none_or(|end| end > len_pages)
        {
            return Err(Error::OutOfBounds {
                first_page,
                pages,
                len_pages,
            });
        }
        let mut rest = buf;
        for run in self.index.runs_in(first_page, pages) {
            let (part, after) = rest.split_at_mut(to_usize(run.pages) * PAGE_SIZE);
            self.read_run(cache, run, part, reading)?;
            rest = after;
        }
        Ok(())
    }

    fn read_run(
        &self,
        cache: &FrameCache,
        run: Run,
        buf: &mut [u8],
        reading: Reading,
    ) -> Result<()> {
        match run.what {
            Entry::Free | Entry::Removed | Entry::Zero => {
                buf.fill(0);
                Ok(())
            }
            Entry::Layer {
                layer,
                offset_pages,
            } => self.read_layer(cache, (layer, offset_pages), buf, reading),
            Entry::BaseImage { block } => {
                cache.count_blocks(run.pages);
                self.read_base_image(block, buf, reading)
            }
        }
    }

    fn read_layer(
        &self,
        cache: &FrameCache,
        (layer, offset_pages): (u32, u64),
        buf: &mut [u8],
        reading: Reading,
    ) -> Result<()> {
        let data = match reading {
            Reading::Waiting => match self.layers.get_open(layer as usize) {
                Some(open) => open,
                None => {
                    cache.count_opening();
                    self.layer_data(layer)?
                }
            },
            // Opening it reads its table.
            Reading::AtHand => self.layers.get_open(layer as usize).ok_or_else(|| {
                let not_open = std::io::ErrorKind::WouldBlock.into();
                Error::io("open a layer for", &self.index_path, not_open)
            })?,
        };
        let end = offset_pages.saturating_add((buf.len() / PAGE_SIZE) as u64);
        if end > data.len_pages() {
            let what = format!(
                "it names page {end} of {}, which holds {} pages",
                data.path().display(),
                data.len_pages()
            );
            return Err(Error::damaged(&self.index_path, 0, what));
        }
        let (mut offset, mut rest) = (to_usize(offset_pages), buf);
        while !rest.is_empty() {
            let (frame, skip) = (offset / FRAME_PAGES, offset % FRAME_PAGES);
            let part_bytes = rest.len().min((FRAME_PAGES - skip) * PAGE_SIZE);
            let (part, after) = rest.split_at_mut(part_bytes);
            SCRATCH.with_borrow_mut(|(stored, decoded)| {
                if part.len() == data.frame_len(frame) {
                    cache.count_frame();
                    return data.read_frame(frame, stored, part, reading);
                }
                let (from, at) = ((layer, &*data), (frame, skip));
                cache.read_part(from, at, part, reading, (stored, decoded))
            })?;
            (offset, rest) = (offset + part_bytes / PAGE_SIZE, after);
        }
        Ok(())
    }

    fn read_base_image(&self, first_block: u64, buf: &mut [u8], reading: Reading) -> Result<()> {
        match &self.base_image {
            Some(image) => image.read_some_blocks(first_block, buf, reading),
            None => Err(Error::damaged(
                &self.index_path,
                0,
                "its base image is not open",
            )),
        }
    }

    pub(crate) fn base_image(&self) -> Option<&Arc<BaseImage>> {
        self.base_image.as_ref()
    }

    pub(crate) fn layer_data(&self, layer: u32) -> Result<Arc<DataFile>> {
        let stranger = || {
            let what = format!("it names layer {layer}, which is not in its table");
            Error::damaged(&self.index_path, 0, what)
        };
        self.layers.get(layer as usize, stranger)
    }

    pub(crate) fn index_path(&self) -> &Path {
        &self.index_path
    }

    /// How many data files are open now.
    #[must_use]
    pub fn open_layers(&self) -> usize {
        self.layers.open_count()
    }
}

/// The build's base image, if the index names blocks of it, which must all be there.
fn open_base_image(
    build: &Build,
    index: &Index,
    index_path: &Path,
) -> Result<Option<Arc<BaseImage>>> {
    let needed_blocks = index.needed_base_image_blocks();
    if needed_blocks == 0 {
        return Ok(None);
    }
    let nameless = || {
        let what = "it names blocks of a base image, the manifest names none";
        Error::damaged(index_path, 0, what)
    };
    let digest = build.manifest().info.base_image.ok_or_else(nameless)?;
    let image = build.storage().base_image(&digest)?;
    if needed_blocks <= image.len_blocks() {
        Ok(Some(image))
    } else {
        let what = format!(
            "it names block {} of {}, which holds {} blocks",
            needed_blocks - 1,
            image.path().display(),
            image.len_blocks()
        );
        Err(Error::damaged(index_path, 0, what))
    }
}

/// The data files of an index's layer table, opened when needed.
#[derive(Debug)]
struct Layers {
    builds_dir: PathBuf,
    kind: ImageKind,
    ids: Vec<BuildId>,
    open: RwLock<Vec<Option<OpenLayer>>>,
    clock: AtomicU64,
}

#[derive(Debug)]
struct OpenLayer {
    data: Arc<DataFile>,
    last_used: AtomicU64,
}

impl Layers {
    fn new(builds_dir: PathBuf, ids: Vec<BuildId>, kind: ImageKind) -> Self {
        let open = ids.iter().map(|_| None).collect();
        Self {
            builds_dir,
            kind,
            ids,
            open: RwLock::new(open),
            clock: AtomicU64::new(0),
        }
    }

    fn get(&self, layer: usize, stranger: impl Fn() -> Error) -> Result<Arc<DataFile>> {
        if let Some(found) = self.get_open(layer) {
            return Ok(found);
        }
        // Opened without the lock, so that nobody waits for it; two threads may both do it.
        let id = self.ids.get(layer).ok_or_else(&stranger)?;
        let path = self
            .builds_dir
            .join(id.to_string())
            .join(self.kind.data_file());
        let data = Arc::new(DataFile::open(&path, id, self.kind)?);
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.iter().flatten().count() >= OPEN_LAYERS_MAX {
            let idle_longest = open
                .iter()
                .enumerate()
                .filter_map(|(i, o)| Some((o.as_ref()?.last_used.load(Ordering::Relaxed), i)))
                .min();
            if let Some((_, position)) = idle_longest {
                open[position] = None;
            }
        }
        let last_used = AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed));
        open[layer] = Some(OpenLayer {
            data: Arc::clone(&data),
            last_used,
        });
        Ok(data)
    }

    /// The layer's file, if it is open.
    fn get_open(&self, layer: usize) -> Option<Arc<DataFile>> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let found = open.get(layer)?.as_ref()?;
        found.last_used.store(now, Ordering::Relaxed);
        Some(Arc::clone(&found.data))
    }

    fn open_count(&self) -> usize {
        self.open
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .flatten()
            .count()
    }
}
