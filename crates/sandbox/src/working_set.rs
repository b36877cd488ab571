//! The recorded working set: what a resume of a build touched until its first answer, brought in
//! ahead of the faults by the next resume.
//!
//! It is a hint, and no part of the immutable build: it stands in a file beside the build's, is
//! replaced by each resume that had none to follow, and is ignored when it does not verify. A build
//! that was never resumed has no file yet; what the resume *before* it touched (its manifest knows)
//! is the best guess then, because kernel and agent are the same.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use torpor_build::{Build, Digest, PageRun};

/// Largest file that is read: the pager records 4,096 runs at most, each under 30 bytes of JSON.
const FILE_BYTES_MAX: u64 = 256 << 10;
const FILE_NAME: &str = "working-set.json";

#[derive(Serialize, Deserialize)]
struct Recorded {
    runs: Vec<PageRun>,
    /// BLAKE3 of the runs' JSON.
    digest: Digest,
}

/// The working set to prefetch, and whether it is this build's own.
pub(crate) fn load(build: &Build) -> (Vec<PageRun>, bool) {
    match read(build) {
        Some(runs) => (runs, true),
        None => (build.manifest().info.working_set.clone(), false),
    }
}

fn read(build: &Build) -> Option<Vec<PageRun>> {
    let path = path(build);
    if std::fs::metadata(&path).ok()?.len() > FILE_BYTES_MAX {
        return None;
    }
    let recorded: Recorded = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
    (digest(&recorded.runs)? == recorded.digest).then_some(recorded.runs)
}

/// Keeps what a resume touched. A hint that cannot be kept is not worth failing for.
pub(crate) fn store(build: &Build, runs: &[PageRun]) {
    let Some(digest) = digest(runs) else { return };
    let Ok(text) = serde_json::to_vec(&Recorded {
        runs: runs.to_vec(),
        digest,
    }) else {
        return;
    };
    if let Err(error) = torpor_build::durable_write(&path(build), &text) {
        tracing::debug!(%error, "the working set is not kept");
    }
}

fn digest(runs: &[PageRun]) -> Option<Digest> {
    serde_json::to_vec(runs).ok().map(|json| Digest::of(&json))
}

fn path(build: &Build) -> PathBuf {
    build.path().join(FILE_NAME)
}
