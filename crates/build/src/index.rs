//! An image's index: what each of its pages is, and where its bytes are.
//!
//! An index is **complete**: every page of the image is in exactly one run, and a page's bytes are
//! found without looking at any other build's index, however deep the chain of parents is. Runs
//! are sorted and coalesced, so equal images have equal bytes.
//!
//! What it does not do: read files, or know whether the layers that it names exist.
//!
//! # Format, version 1
//!
//! All numbers little-endian.
//!
//! ```text
//! offset  bytes
//!      0      8  magic "torporIX"
//!      8      4  version
//!     12      4  which image: 1 memory, 2 disk
//!     16      8  XXH3-64 of bytes 0..16 and 24..end
//!     24     16  id of the build that this index belongs to
//!     40      8  pages in the image
//!     48      4  layers
//!     52      4  runs
//!     56     16  each layer: the id of the build whose data file it is
//!      …     16  each run, in page order:
//!                  0  4  pages
//!                  4  4  layer (zero unless the kind is 4)
//!                  8  7  first page in the layer's data, or block of the base image, or zero
//!                 15  1  kind: 1 free, 2 removed, 3 zero, 4 layer, 5 base image
//! ```
//!
//! The first page of a run is the sum of the lengths before it: there is no way to write down
//! overlaps or gaps.

use xxhash_rust::xxh3::Xxh3;

use crate::bytes::Bytes;
use crate::error::{Error, FormatError, Result};
use crate::ids::BuildId;
use crate::page::{IMAGE_PAGES_MAX, ImageKind, to_usize};

const MAGIC: [u8; 8] = *b"torporIX";
/// The version written, and the newest one read.
pub const INDEX_VERSION: u32 = 1;
const CHECKSUM_AT: usize = 16;
const HEADER_BYTES: usize = 56;
const LAYER_BYTES: usize = 16;
const RUN_BYTES: usize = 16;

/// Most layers in one index: two hundred times the deepest chain that is expected, and a layer
/// table of 1 MiB at most.
pub const LAYERS_MAX: usize = 1 << 16;

/// Highest page in a layer's data, or block of a base image, that a run can name.
const OFFSET_MAX: u64 = (1 << 56) - 1;

/// Longest valid index file, in bytes.
pub(crate) const INDEX_BYTES_MAX: u64 =
    (HEADER_BYTES + LAYERS_MAX * LAYER_BYTES) as u64 + IMAGE_PAGES_MAX * RUN_BYTES as u64;

/// What pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entry {
    /// The guest's kernel calls them free. They read as zeros.
    Free,
    /// The guest gave them back. They read as zeros.
    Removed,
    /// They hold zeros.
    Zero,
    /// Their bytes stand in a layer's data file.
    Layer {
        /// Position in the index's layer table.
        layer: u32,
        /// The first page's position in that layer's data, in pages.
        offset_pages: u64,
    },
    /// Their bytes stand in the build's base image.
    BaseImage {
        /// The first page's block (of a page's size) in the base image.
        block: u64,
    },
}

impl Entry {
    /// Whether pages like this read as zeros without any file.
    #[must_use]
    pub fn reads_as_zero(self) -> bool {
        matches!(self, Self::Free | Self::Removed | Self::Zero)
    }

    /// What the page `pages` further on is, in the same run.
    #[must_use]
    pub fn advanced(self, pages: u64) -> Self {
        match self {
            Self::Layer {
                layer,
                offset_pages,
            } => Self::Layer {
                layer,
                offset_pages: offset_pages + pages,
            },
            Self::BaseImage { block } => Self::BaseImage {
                block: block + pages,
            },
            same => same,
        }
    }

    fn to_parts(self) -> (u32, u64, u8) {
        match self {
            Self::Free => (0, 0, 1),
            Self::Removed => (0, 0, 2),
            Self::Zero => (0, 0, 3),
            Self::Layer {
                layer,
                offset_pages,
            } => (layer, offset_pages, 4),
            Self::BaseImage { block } => (0, block, 5),
        }
    }

    fn from_parts(layer: u32, value: u64, kind: u8) -> Option<Self> {
        Some(match (kind, layer, value) {
            (1, 0, 0) => Self::Free,
            (2, 0, 0) => Self::Removed,
            (3, 0, 0) => Self::Zero,
            (4, layer, offset_pages) => Self::Layer {
                layer,
                offset_pages,
            },
            (5, 0, block) => Self::BaseImage { block },
            _ => return None,
        })
    }
}

/// Pages that follow one another in the image and where they are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first page's number in the image.
    pub first_page: u64,
    /// How many pages: never zero.
    pub pages: u64,
    /// What the first of them is; see [`Entry::advanced`] for the others.
    pub what: Entry,
}

/// What every page of an image is. Immutable; about 20 bytes of memory per run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    build: BuildId,
    kind: ImageKind,
    len_pages: u64,
    layers: Vec<BuildId>,
    /// First page of each run; the two vectors are as long as one another.
    starts: Vec<u32>,
    entries: Vec<Entry>,
}

impl Index {
    /// The build that this index belongs to.
    #[must_use]
    pub fn build_id(&self) -> BuildId {
        self.build
    }

    /// Which image it describes.
    #[must_use]
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// The image's length in pages.
    #[must_use]
    pub fn len_pages(&self) -> u64 {
        self.len_pages
    }

    /// The builds whose data files hold this image's pages.
    #[must_use]
    pub fn layers(&self) -> &[BuildId] {
        &self.layers
    }

    /// How many runs there are.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.starts.len()
    }

    /// The run that `page` is in, clipped to start at `page`; `None` past the end of the image.
    #[must_use]
    pub fn run_at(&self, page: u64) -> Option<Run> {
        if page >= self.len_pages {
            return None;
        }
        let after = self
            .starts
            .partition_point(|&start| u64::from(start) <= page);
        let run = self.run(after.checked_sub(1)?)?;
        let skip = page - run.first_page;
        Some(Run {
            first_page: page,
            pages: run.pages - skip,
            what: run.what.advanced(skip),
        })
    }

    /// All runs in page order.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        (0..self.starts.len()).filter_map(|position| self.run(position))
    }

    /// The runs of some pages, clipped to them; ends at the end of the image.
    pub fn runs_in(&self, first_page: u64, pages: u64) -> impl Iterator<Item = Run> + '_ {
        let end = first_page.saturating_add(pages).min(self.len_pages);
        let mut page = first_page;
        std::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            let mut run = self.run_at(page)?;
            run.pages = run.pages.min(end - page);
            page += run.pages;
            Some(run)
        })
    }

    fn run(&self, position: usize) -> Option<Run> {
        let first_page = u64::from(*self.starts.get(position)?);
        let end = self
            .starts
            .get(position + 1)
            .map_or(self.len_pages, |&start| u64::from(start));
        Some(Run {
            first_page,
            pages: end - first_page,
            what: *self.entries.get(position)?,
        })
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when a run's offset does not fit the format.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let runs = u32::try_from(self.starts.len()).unwrap_or(u32::MAX);
        let layers = u32::try_from(self.layers.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(
            HEADER_BYTES + LAYER_BYTES * self.layers.len() + RUN_BYTES * self.starts.len(),
        );
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&INDEX_VERSION.to_le_bytes());
        out.extend_from_slice(&self.kind.code().to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(self.build.as_bytes());
        out.extend_from_slice(&self.len_pages.to_le_bytes());
        out.extend_from_slice(&layers.to_le_bytes());
        out.extend_from_slice(&runs.to_le_bytes());
        for layer in &self.layers {
            out.extend_from_slice(layer.as_bytes());
        }
        for run in self.runs() {
            let (layer, value, kind) = run.what.to_parts();
            check_limit("a run's offset in pages", value, OFFSET_MAX)?;
            let pages = u32::try_from(run.pages).unwrap_or(u32::MAX);
            out.extend_from_slice(&pages.to_le_bytes());
            out.extend_from_slice(&layer.to_le_bytes());
            out.extend_from_slice(&(value | u64::from(kind) << 56).to_le_bytes());
        }
        let checksum = checksum(&out);
        out[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum.to_le_bytes());
        Ok(out)
    }

    /// Reads an index out of a file's bytes, whatever they are.
    ///
    /// # Errors
    /// [`FormatError`] for everything but the bytes that [`Index::encode`] gives for some index.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let header = Header::decode(bytes)?;
        let mut input = Bytes::new(bytes);
        input.array::<HEADER_BYTES>()?;
        let mut layers = Vec::with_capacity(header.layers);
        for _ in 0..header.layers {
            layers.push(BuildId::from_bytes(input.array()?));
        }
        let mut builder = IndexBuilder::with_layers(header.build, header.kind, layers);
        for expected_runs in 1..=header.runs {
            let at = input.offset();
            let pages = u64::from(input.u32()?);
            let layer = input.u32()?;
            let [v0, v1, v2, v3, v4, v5, v6, kind] = input.array()?;
            let value = u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, 0]);
            let entry = Entry::from_parts(layer, value, kind)
                .ok_or_else(|| FormatError::damaged(at, "a run of no known kind"))?;
            builder
                .append_decoded(pages, entry)
                .map_err(|what| FormatError::damaged(at, what))?;
            if builder.index.starts.len() != expected_runs {
                return Err(FormatError::damaged(at, "two runs that should be one"));
            }
        }
        if builder.index.len_pages != header.pages {
            let what = format!(
                "the runs cover {} pages of {}",
                builder.index.len_pages, header.pages
            );
            return Err(FormatError::damaged(40, what));
        }
        builder.index.starts.shrink_to_fit();
        builder.index.entries.shrink_to_fit();
        Ok(builder.index)
    }
}

#[derive(Debug)]
struct Header {
    build: BuildId,
    kind: ImageKind,
    pages: u64,
    layers: usize,
    runs: usize,
}

impl Header {
    /// Checks everything but the runs' meaning: after this, the lengths agree with the file.
    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut input = Bytes::new(bytes);
        if input.array()? != MAGIC {
            return Err(FormatError::damaged(0, "this is not an index file"));
        }
        let version = input.u32()?;
        if version > INDEX_VERSION {
            return Err(FormatError::Newer {
                found: version,
                known: INDEX_VERSION,
            });
        }
        if version != INDEX_VERSION {
            return Err(FormatError::damaged(
                8,
                format!("there is no format version {version}"),
            ));
        }
        let kind = input.u32()?;
        let expected_checksum = input.u64()?;
        let build = BuildId::from_bytes(input.array()?);
        let pages = input.u64()?;
        let layers = input.u32()? as usize;
        let runs = input.u32()? as usize;
        let expected_bytes = HEADER_BYTES + LAYER_BYTES * layers + RUN_BYTES * runs;
        if bytes.len() != expected_bytes {
            let what = format!("{} bytes where {expected_bytes} are due", bytes.len());
            return Err(FormatError::damaged(bytes.len().min(expected_bytes), what));
        }
        if checksum(bytes) != expected_checksum {
            return Err(FormatError::damaged(
                CHECKSUM_AT,
                "the checksum does not match",
            ));
        }
        let kind = ImageKind::from_code(kind)
            .ok_or_else(|| FormatError::damaged(12, "no known kind of image"))?;
        if pages > IMAGE_PAGES_MAX {
            return Err(FormatError::damaged(
                40,
                "more pages than an image can have",
            ));
        }
        if layers > LAYERS_MAX {
            return Err(FormatError::damaged(
                48,
                "more layers than an image can have",
            ));
        }
        Ok(Self {
            build,
            kind,
            pages,
            layers,
            runs,
        })
    }
}

/// The checksum of an index file, over everything but the checksum's own place.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..CHECKSUM_AT]);
    hasher.update(&bytes[CHECKSUM_AT + 8..]);
    hasher.digest()
}

fn check_limit(what: &'static str, found: u64, max: u64) -> Result<()> {
    if found > max {
        Err(Error::TooLarge { what, found, max })
    } else {
        Ok(())
    }
}

/// Makes an [`Index`], run after run, and coalesces them.
#[derive(Debug)]
pub struct IndexBuilder {
    index: Index,
}

impl IndexBuilder {
    /// Starts an empty index.
    #[must_use]
    pub fn new(build: BuildId, kind: ImageKind) -> Self {
        Self::with_layers(build, kind, Vec::new())
    }

    fn with_layers(build: BuildId, kind: ImageKind, layers: Vec<BuildId>) -> Self {
        let (starts, entries) = (Vec::new(), Vec::new());
        Self {
            index: Index {
                build,
                kind,
                len_pages: 0,
                layers,
                starts,
                entries,
            },
        }
    }

    /// Adds a layer to the table and gives its position.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when there are [`LAYERS_MAX`] already.
    pub fn add_layer(&mut self, layer: BuildId) -> Result<u32> {
        let position = self.index.layers.len();
        check_limit(
            "the number of layers",
            position as u64 + 1,
            LAYERS_MAX as u64,
        )?;
        self.index.layers.push(layer);
        Ok(u32::try_from(position).unwrap_or(u32::MAX))
    }

    /// Adds pages at the end; none is no run.
    ///
    /// # Errors
    /// [`Error::TooLarge`] past [`IMAGE_PAGES_MAX`], or for a layer that is not in the table.
    pub fn append(&mut self, pages: u64, what: Entry) -> Result<()> {
        if pages == 0 {
            return Ok(());
        }
        self.append_decoded(pages, what)
            .map_err(|what| Error::TooLarge {
                what,
                found: self.index.len_pages.saturating_add(pages),
                max: IMAGE_PAGES_MAX,
            })
    }

    fn append_decoded(&mut self, pages: u64, what: Entry) -> Result<(), &'static str> {
        let index = &mut self.index;
        if pages == 0 {
            return Err("a run of no pages");
        }
        if pages > IMAGE_PAGES_MAX - index.len_pages {
            return Err("the number of pages in an image");
        }
        let (layer, value, _) = what.to_parts();
        if matches!(what, Entry::Layer { .. }) && layer as usize >= index.layers.len() {
            return Err("the position of a layer");
        }
        if value > OFFSET_MAX - pages {
            return Err("a run's offset in pages");
        }
        let continues =
            index
                .starts
                .last()
                .zip(index.entries.last())
                .is_some_and(|(&start, &last)| {
                    last.advanced(index.len_pages - u64::from(start)) == what
                });
        if !continues {
            let start = u32::try_from(index.len_pages).map_err(|_| "the number of pages")?;
            index.starts.push(start);
            index.entries.push(what);
        }
        index.len_pages += pages;
        Ok(())
    }

    /// Pages so far.
    #[must_use]
    pub fn len_pages(&self) -> u64 {
        self.index.len_pages
    }

    /// The index of what has been appended.
    #[must_use]
    pub fn finish(mut self) -> Index {
        self.index.starts.shrink_to_fit();
        self.index.entries.shrink_to_fit();
        self.index
    }
}

/// Pages of an index, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PageCounts {
    /// Free by the guest's own metadata.
    pub free: u64,
    /// Given back by the guest.
    pub removed: u64,
    /// All zeros.
    pub zero: u64,
    /// In some layer's data.
    pub layer: u64,
    /// In the base image.
    pub base_image: u64,
}

impl Index {
    /// How many pages there are of each kind.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        for run in self.runs() {
            let kind = match run.what {
                Entry::Free => &mut counts.free,
                Entry::Removed => &mut counts.removed,
                Entry::Zero => &mut counts.zero,
                Entry::Layer { .. } => &mut counts.layer,
                Entry::BaseImage { .. } => &mut counts.base_image,
            };
            *kind += run.pages;
        }
        counts
    }

    /// The distinct stored pages that each layer contributes, in the layer table's order: a page
    /// of data that several pages of the image share counts once.
    #[must_use]
    pub fn distinct_pages_by_layer(&self) -> Vec<u64> {
        let mut ranges: Vec<Vec<(u64, u64)>> = vec![Vec::new(); self.layers.len()];
        for run in self.runs() {
            if let Entry::Layer {
                layer,
                offset_pages,
            } = run.what
                && let Some(of_layer) = ranges.get_mut(layer as usize)
            {
                of_layer.push((offset_pages, offset_pages + run.pages));
            }
        }
        ranges.into_iter().map(union_len).collect()
    }

    /// The last page (exclusive) of each layer's data that the index names.
    pub(crate) fn needed_pages_by_layer(&self) -> Vec<u64> {
        let mut needed = vec![0; self.layers.len()];
        for run in self.runs() {
            if let Entry::Layer {
                layer,
                offset_pages,
            } = run.what
                && let Some(of_layer) = needed.get_mut(to_usize(u64::from(layer)))
            {
                *of_layer = offset_pages.saturating_add(run.pages).max(*of_layer);
            }
        }
        needed
    }
}

impl Index {
    /// The distinct blocks of the base image that the index names.
    #[must_use]
    pub fn distinct_base_image_blocks(&self) -> u64 {
        union_len(self.base_image_ranges().collect())
    }

    /// The last block (exclusive) of the base image that the index names.
    pub(crate) fn needed_base_image_blocks(&self) -> u64 {
        self.base_image_ranges()
            .map(|(_, end)| end)
            .max()
            .unwrap_or(0)
    }

    /// The blocks of the base image that the index names, as half-open ranges in page order.
    pub(crate) fn base_image_ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs().filter_map(|run| match run.what {
            Entry::BaseImage { block } => Some((block, block.saturating_add(run.pages))),
            _ => None,
        })
    }
}

/// How many numbers lie in at least one of the half-open ranges.
fn union_len(mut ranges: Vec<(u64, u64)>) -> u64 {
    ranges.sort_unstable();
    let (mut total, mut covered_to) = (0, 0);
    for (start, end) in ranges {
        total += end.saturating_sub(start.max(covered_to));
        covered_to = covered_to.max(end);
    }
    total
}
