//! The working set that a resume of a build recorded, kept beside the builds.
//!
//! It is a hint and no part of the immutable build: it may be replaced at any time, goes with its
//! build, and is ignored when it does not verify. So losing it costs page faults, never a guest.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::build::{Build, read_bounded};
use crate::durable;
use crate::error::{Error, Result};
use crate::ids::{BuildId, Digest};
use crate::page::PageRun;
use crate::storage::Storage;

/// Longest file that is read, in bytes: a few thousand runs at less than 30 bytes each.
const FILE_BYTES_MAX: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Recorded {
    runs: Vec<PageRun>,
    /// Of the runs' JSON.
    digest: Digest,
}

impl Recorded {
    fn new(runs: Vec<PageRun>) -> Self {
        let digest = digest_of(&runs);
        Self { runs, digest }
    }
}

fn digest_of(runs: &[PageRun]) -> Digest {
    let mut bytes = Vec::with_capacity(runs.len() * 16);
    for run in runs {
        bytes.extend_from_slice(&run.first_page.to_le_bytes());
        bytes.extend_from_slice(&run.pages.to_le_bytes());
    }
    Digest::of(&bytes)
}

impl Storage {
    pub(crate) fn working_set_path(&self, id: &BuildId) -> PathBuf {
        self.dir("working-sets").join(format!("{id}.json"))
    }
}

impl Build {
    /// What a resume touched until its first answer; `None` if none has recorded it, or what is
    /// recorded does not verify.
    #[must_use]
    pub fn recorded_working_set(&self) -> Option<Vec<PageRun>> {
        let path = self.storage().working_set_path(&self.id());
        let bytes = read_bounded(&path, FILE_BYTES_MAX).ok()?;
        let recorded: Recorded = serde_json::from_slice(&bytes).ok()?;
        (digest_of(&recorded.runs) == recorded.digest).then_some(recorded.runs)
    }

    /// Records what a resume touched until its first answer, in place of what was recorded before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record_working_set(&self, runs: &[PageRun]) -> Result<()> {
        let path = self.storage().working_set_path(&self.id());
        let recorded = Recorded::new(runs.to_vec());
        let bytes = serde_json::to_vec(&recorded)
            .map_err(|error| Error::io("encode", &path, std::io::Error::other(error)))?;
        // Two resumes of one build may record at once. Not synced: what a power cut leaves either
        // verifies or is ignored.
        let _lock = self.storage().lock()?;
        durable::replace(&path, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::BuildInfo;

    fn committed() -> (tempfile::TempDir, Storage, Build) {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        let staged = storage.begin_build(BuildId::random()).unwrap();
        let build = staged.commit(BuildInfo::default()).unwrap();
        (dir, storage, build)
    }

    #[test]
    fn a_recorded_working_set_is_found_and_leaves_the_build_valid() {
        let (_dir, _storage, build) = committed();
        assert_eq!(build.recorded_working_set(), None);
        let runs = vec![
            PageRun {
                first_page: 7,
                pages: 3,
            },
            PageRun {
                first_page: 100,
                pages: 1,
            },
        ];
        build.record_working_set(&runs).unwrap();
        assert_eq!(build.recorded_working_set(), Some(runs));
        assert!(build.validate(crate::ValidateOptions::default()).is_whole());
    }

    #[test]
    fn a_working_set_that_does_not_verify_is_no_working_set() {
        let (_dir, storage, build) = committed();
        build
            .record_working_set(&[PageRun {
                first_page: 7,
                pages: 3,
            }])
            .unwrap();
        let path = storage.working_set_path(&build.id());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("7,3", "8,3")).unwrap();
        assert_eq!(build.recorded_working_set(), None);
    }

    #[test]
    fn a_working_set_goes_with_its_build() {
        let (_dir, storage, build) = committed();
        build
            .record_working_set(&[PageRun {
                first_page: 7,
                pages: 3,
            }])
            .unwrap();
        let path = storage.working_set_path(&build.id());
        let id = build.id();
        drop(build);
        storage.delete_build(&id).unwrap();
        assert!(!path.exists());
    }
}
