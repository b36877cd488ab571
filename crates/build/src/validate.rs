//! Verifies a build to the last byte.
//!
//! Reading verifies what it reads; this reads everything: every file's length and digest, every
//! frame of every data file, that indexes stay within the layers that they name, and that nothing
//! lies in a build's directory that its manifest does not know.

use std::collections::BTreeSet;

use crate::build::{Build, VMSTATE_FILE};
use crate::data::DataFile;
use crate::error::{Error, Result};
use crate::ids::BuildId;
use crate::index::Entry;
use crate::manifest::MANIFEST_FILE;
use crate::objects::digest_of_file;
use crate::page::{ImageKind, PAGE_SIZE};
use crate::reader::ImageReader;
use crate::storage::list_dir;

/// How far [`Build::validate`] goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValidateOptions {
    /// Also every ancestor, the base images and the kernels.
    pub recursive: bool,
}

/// What [`Build::validate`] looked at and found.
#[derive(Debug, Default)]
pub struct Validation {
    /// The builds that were verified, the one asked for first.
    pub builds: Vec<BuildId>,
    /// Bytes that were verified.
    pub bytes: u64,
    /// Frames that were decoded.
    pub frames: u64,
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
        let mut found = Validation::default();
        let mut seen = BTreeSet::new();
        self.validate_alone(options, &mut found);
        let mut next = self.manifest().info.parent;
        // A chain that leads back to itself can be made by hand.
        while let Some(parent) = next.filter(|id| options.recursive && seen.insert(*id)) {
            let Some(build) = found.note(self.storage().open_build(&parent)) else {
                break;
            };
            build.validate_alone(options, &mut found);
            next = build.manifest().info.parent;
        }
        found
    }

    fn validate_alone(&self, options: ValidateOptions, found: &mut Validation) {
        found.builds.push(self.id());
        self.validate_files(found);
        for kind in [ImageKind::Memory, ImageKind::Disk] {
            if self.has_image(kind)
                && let Some(image) = found.note(self.image(kind))
            {
                image.validate(found);
            }
        }
        if options.recursive {
            let info = &self.manifest().info;
            if let Some(digest) = &info.base_image
                && let Some(path) = found.note(self.storage().image_path(digest))
            {
                found.note(check_digest(&path, digest));
            }
            if let Some(digest) = &info.kernel
                && let Some(path) = found.note(self.storage().kernel_path(digest))
            {
                found.note(check_digest(&path, digest));
            }
        }
    }

    fn validate_files(&self, found: &mut Validation) {
        for (name, record) in &self.manifest().files {
            let path = self.file_path(name);
            let known = [ImageKind::Memory, ImageKind::Disk]
                .iter()
                .any(|kind| [kind.index_file(), kind.data_file()].contains(&name.as_str()));
            if !known && name != VMSTATE_FILE {
                let what = format!("it names the file {name:?}, which no build has");
                found
                    .problems
                    .push(Error::damaged(&self.file_path(MANIFEST_FILE), 0, what));
                continue;
            }
            if found.note(check_digest(&path, &record.digest)).is_some() {
                found.bytes += record.bytes;
            }
        }
        for name in found.note(list_dir(self.path())).unwrap_or_default() {
            if name != MANIFEST_FILE && !self.manifest().files.contains_key(&name) {
                let what = "the manifest does not know this file";
                found
                    .problems
                    .push(Error::damaged(&self.file_path(&name), 0, what));
            }
        }
    }
}

fn check_digest(path: &std::path::Path, expected: &crate::Digest) -> Result<()> {
    let digest = digest_of_file(path)?;
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

    fn validate(&self, found: &mut Validation) {
        if let Some(data) = found.note(self.open_own_data()) {
            let (mut stored, mut pages) = (Vec::new(), Vec::new());
            for frame in 0..data.frame_count() {
                pages.resize(data.frame_len(frame), 0);
                found.note(data.read_frame(frame, &mut stored, &mut pages));
                found.frames += 1;
            }
        }
        for (layer, needed) in (0..).zip(self.index().needed_pages_by_layer()) {
            let Some(data) = found.note(self.layer_data(layer)) else {
                continue;
            };
            if needed > data.len_pages() {
                let what = format!(
                    "it names page {needed} of {}, which holds {} pages",
                    data.path().display(),
                    data.len_pages()
                );
                found
                    .problems
                    .push(Error::damaged(self.index_path(), 0, what));
            }
        }
        found.note(self.validate_base_image());
    }

    /// Reads the last block that the index names.
    fn validate_base_image(&self) -> Result<()> {
        let last = self.index().runs().filter_map(|run| match run.what {
            Entry::BaseImage { block } => Some(block + run.pages - 1),
            _ => None,
        });
        match last.max() {
            Some(block) => self.read_base_image(block, &mut [0; PAGE_SIZE]),
            None => Ok(()),
        }
    }
}
