//! Verifies a build to the last byte.
//!
//! Reading verifies what it reads; this reads everything that a resume depends on: every file's
//! length and digest, every frame of every data file, the frames of other builds that the indexes
//! name, the blocks of the base image that they refer to, the base image itself and the kernel; and
//! it checks that indexes stay within the layers that
//! they name, and that nothing lies in a build's directory that its manifest does not know.
//!
//! First everything is opened and put on a list, so that it is known how much there is to read;
//! then it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base_image::BaseImage;
use crate::build::{Build, VMSTATE_FILE};
use crate::data::{DataFile, FRAME_BYTES, FRAME_PAGES};
use crate::error::{Error, Result};
use crate::ids::{BuildId, Digest};
use crate::index::Entry;
use crate::manifest::MANIFEST_FILE;
use crate::objects::digest_with;
use crate::page::{ImageKind, PAGE_SIZE, to_usize};
use crate::reader::ImageReader;
use crate::reading::Reading;
use crate::storage::list_dir;

/// Blocks of a base image read at a time (1 MiB).
const READ_BLOCKS: usize = 256;

/// How far [`Build::validate`] goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValidateOptions {
    /// Also every ancestor as a whole, not only what the build uses of it.
    pub recursive: bool,
}

/// What [`Build::validate`] looked at and found.
#[derive(Debug, Default)]
pub struct Validation {
    /// The builds that were verified, the one asked for first.
    pub builds: Vec<BuildId>,
    /// Bytes of files whose digests were verified: the builds', the base images and the kernels.
    pub bytes: u64,
    /// Frames that were decoded.
    pub frames: u64,
    /// Blocks of base images that pages refer to and that were compared with their hashes.
    pub blocks: u64,
    /// Everything that is wrong.
    pub problems: Vec<Error>,
}

impl Validation {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty()
    }

    fn note<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|problem| self.problems.push(problem)).ok()
    }
}

impl Build {
    /// Verifies every byte. Problems are collected, not returned at the first one.
    #[must_use]
    pub fn validate(&self, options: ValidateOptions) -> Validation {
        self.validate_with(options, &mut |_, _| ())
    }

    /// As [`Self::validate`]; `progress` is told again and again how many bytes of how many have
    /// been gone through. The second figure stays the same, and the first one reaches it.
    #[must_use]
    pub fn validate_with(
        &self,
        options: ValidateOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Validation {
        let mut plan = Plan::default();
        plan.add_build(self, options);
        let mut seen = BTreeSet::from([self.id()]);
        let mut next = self.manifest().info.parent;
        // A chain that leads back to itself can be made by hand.
        while let Some(parent) = next.filter(|id| options.recursive && seen.insert(*id)) {
            let Some(build) = plan.found.note(self.storage().open_build(&parent)) else {
                break;
            };
            plan.add_build(&build, options);
            next = build.manifest().info.parent;
        }
        plan.carry_out(progress)
    }
}

/// Something to be read and verified.
#[derive(Debug)]
struct Work {
    path: PathBuf,
    /// How much it counts in the progress.
    bytes: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Digest(Digest),
    Frames {
        build: BuildId,
        kind: ImageKind,
        /// Half-open ranges.
        frames: Vec<(usize, usize)>,
    },
    Blocks {
        base_image: Arc<BaseImage>,
        /// Half-open ranges.
        blocks: Vec<(usize, usize)>,
    },
}

#[derive(Debug, Default)]
struct Plan {
    works: Vec<Work>,
    /// Base images and kernels, which builds share.
    objects: BTreeSet<PathBuf>,
    found: Validation,
}

impl Plan {
    fn add_build(&mut self, build: &Build, options: ValidateOptions) {
        self.found.builds.push(build.id());
        self.add_files(build);
        for kind in [ImageKind::Memory, ImageKind::Disk] {
            if build.has_image(kind)
                && let Some(image) = self.found.note(build.image(kind))
            {
                self.add_own_frames(&image);
                self.check_layers(&image);
                // Those of ancestors that are verified as a whole are not read twice.
                if !options.recursive {
                    self.add_used_frames(&image);
                }
                self.add_used_blocks(&image);
            }
        }
        let (storage, info) = (build.storage(), &build.manifest().info);
        if let Some(digest) = info.base_image
            && let Some(path) = self.found.note(storage.image_path(&digest))
        {
            self.add_object(path, digest);
        }
        if let Some(digest) = info.kernel
            && let Some(path) = self.found.note(storage.kernel_path(&digest))
        {
            self.add_object(path, digest);
            if let Some((path, digest)) = storage.kernel_config(&digest) {
                self.add_object(path, digest);
            }
        }
    }

    fn add_object(&mut self, path: PathBuf, digest: Digest) {
        if self.objects.insert(path.clone()) {
            self.add_digest(path, digest);
        }
    }

    fn add_digest(&mut self, path: PathBuf, digest: Digest) {
        // One that is not there is a problem when it is read.
        let bytes = std::fs::metadata(&path).map_or(0, |meta| meta.len());
        let what = What::Digest(digest);
        self.works.push(Work { path, bytes, what });
    }

    fn add_files(&mut self, build: &Build) {
        for (name, record) in &build.manifest().files {
            let known = [ImageKind::Memory, ImageKind::Disk]
                .iter()
                .any(|kind| [kind.index_file(), kind.data_file()].contains(&name.as_str()));
            if known || name == VMSTATE_FILE {
                self.add_digest(build.file_path(name), record.digest);
            } else {
                let what = format!("it names the file {name:?}, which no build has");
                self.damaged(&build.file_path(MANIFEST_FILE), what);
            }
        }
        let names = self.found.note(list_dir(build.path()));
        for name in names.unwrap_or_default() {
            if name != MANIFEST_FILE && !build.manifest().files.contains_key(&name) {
                let what = "the manifest does not know this file";
                self.damaged(&build.file_path(&name), what);
            }
        }
    }

    fn damaged(&mut self, path: &Path, what: impl Into<String>) {
        self.found.problems.push(Error::damaged(path, 0, what));
    }

    fn add_own_frames(&mut self, image: &ImageReader) {
        if let Some(data) = self.found.note(image.open_own_data()) {
            let all = vec![(0, data.frame_count())];
            self.add_frames(&data, image.build().id(), image.index().kind(), all);
        }
    }

    /// The frames of other builds that the image uses.
    fn add_used_frames(&mut self, image: &ImageReader) {
        let mut used: BTreeMap<u32, Vec<(usize, usize)>> = BTreeMap::new();
        for run in image.index().runs() {
            if let Entry::Layer {
                layer,
                offset_pages,
            } = run.what
            {
                let end = offset_pages.saturating_add(run.pages);
                let frames = (
                    to_usize(offset_pages) / FRAME_PAGES,
                    to_usize(end).div_ceil(FRAME_PAGES),
                );
                used.entry(layer).or_default().push(frames);
            }
        }
        for (layer, ranges) in used {
            let build = image.index().layers().get(to_usize(u64::from(layer)));
            // A layer that cannot be opened has been noted by `check_layers`.
            if let Some(build) = build.filter(|build| **build != image.build().id())
                && let Ok(data) = image.layer_data(layer)
            {
                let ranges = union(ranges, data.frame_count());
                self.add_frames(&data, *build, image.index().kind(), ranges);
            }
        }
    }

    /// The blocks of the base image that the image uses.
    fn add_used_blocks(&mut self, image: &ImageReader) {
        let Some(base_image) = image.base_image() else {
            return;
        };
        let ranges = image.index().base_image_ranges();
        let ranges = ranges.map(|(start, end)| (to_usize(start), to_usize(end)));
        let blocks = union(ranges.collect(), to_usize(base_image.len_blocks()));
        let count: usize = blocks.iter().map(|(start, end)| end - start).sum();
        self.works.push(Work {
            path: base_image.path().to_owned(),
            bytes: (count * PAGE_SIZE) as u64,
            what: What::Blocks {
                base_image: Arc::clone(base_image),
                blocks,
            },
        });
    }

    fn add_frames(
        &mut self,
        data: &DataFile,
        build: BuildId,
        kind: ImageKind,
        frames: Vec<(usize, usize)>,
    ) {
        let count: usize = frames.iter().map(|(start, end)| end - start).sum();
        self.works.push(Work {
            path: data.path().to_owned(),
            bytes: (count * FRAME_BYTES) as u64,
            what: What::Frames {
                build,
                kind,
                frames,
            },
        });
    }

    /// Indexes stay within the layers that they name.
    fn check_layers(&mut self, image: &ImageReader) {
        for (layer, needed) in (0..).zip(image.index().needed_pages_by_layer()) {
            let Some(data) = self.found.note(image.layer_data(layer)) else {
                continue;
            };
            if needed > data.len_pages() {
                let what = format!(
                    "it names page {needed} of {}, which holds {} pages",
                    data.path().display(),
                    data.len_pages()
                );
                self.damaged(image.index_path(), what);
            }
        }
    }

    fn carry_out(self, progress: &mut dyn FnMut(u64, u64)) -> Validation {
        let Self {
            works, mut found, ..
        } = self;
        let total: u64 = works.iter().map(|work| work.bytes).sum();
        let mut before = 0;
        progress(before, total);
        for work in works {
            let mut done = 0;
            let mut advance = |bytes: u64| {
                // A file that grows or shrinks meanwhile must not confuse the figures.
                done = work.bytes.min(done + bytes);
                progress(before + done, total);
            };
            match &work.what {
                What::Digest(digest) => {
                    let checked = check_digest(&work.path, digest, &mut advance);
                    if found.note(checked).is_some() {
                        found.bytes += work.bytes;
                    }
                }
                What::Frames {
                    build,
                    kind,
                    frames,
                } => {
                    if let Some(data) = found.note(DataFile::open(&work.path, build, *kind)) {
                        read_frames(&data, frames, &mut found, &mut advance);
                    }
                }
                What::Blocks { base_image, blocks } => {
                    read_blocks(base_image, blocks, &mut found, &mut advance);
                }
            }
            before += work.bytes;
            progress(before, total);
        }
        found
    }
}

fn read_frames(
    data: &DataFile,
    frames: &[(usize, usize)],
    found: &mut Validation,
    advance: &mut dyn FnMut(u64),
) {
    let (mut stored, mut pages) = (Vec::new(), Vec::new());
    for frame in frames.iter().flat_map(|&(start, end)| start..end) {
        pages.resize(data.frame_len(frame), 0);
        found.note(data.read_frame(frame, &mut stored, &mut pages, Reading::Waiting));
        found.frames += 1;
        advance(FRAME_BYTES as u64);
    }
}

fn read_blocks(
    base_image: &BaseImage,
    blocks: &[(usize, usize)],
    found: &mut Validation,
    advance: &mut dyn FnMut(u64),
) {
    let mut bytes = Vec::new();
    for &(start, end) in blocks {
        for first in (start..end).step_by(READ_BLOCKS) {
            let count = READ_BLOCKS.min(end - first);
            bytes.resize(count * PAGE_SIZE, 0);
            found.note(base_image.read_blocks(first as u64, &mut bytes));
            found.blocks += count as u64;
            advance((count * PAGE_SIZE) as u64);
        }
    }
}

/// Half-open ranges as few and sorted ones that do not overlap, cut off at `max`.
fn union(mut ranges: Vec<(usize, usize)>, max: usize) -> Vec<(usize, usize)> {
    ranges.sort_unstable();
    let mut union: Vec<(usize, usize)> = Vec::new();
    for (start, end) in ranges {
        let (start, end) = (start.min(max), end.min(max));
        match union.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => union.push((start, end)),
        }
    }
    union
}

fn check_digest(path: &Path, expected: &Digest, advance: &mut dyn FnMut(u64)) -> Result<()> {
    let digest = digest_with(path, advance)?;
    if digest == *expected {
        Ok(())
    } else {
        Err(Error::damaged(
            path,
            0,
            format!("its digest is {digest}, {expected} is recorded"),
        ))
    }
}

impl ImageReader {
    /// Opens the data file of this very build, whether the index names it or not.
    pub(crate) fn open_own_data(&self) -> Result<DataFile> {
        let (build, kind) = (self.build(), self.index().kind());
        DataFile::open(&build.file_path(kind.data_file()), &build.id(), kind)
    }
}
