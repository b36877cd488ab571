//! `--cold`: makes the host forget a build's files, so that a resume reads them from the disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};
use torpor_build::Build;

use crate::error::CliError;

/// Drops the host's page cache of everything that a resume of this build reads. Blocks.
///
/// The kernel only drops what has been written to the disk, so each file is synced first.
pub(crate) fn drop_host_cache(build: &Build) -> Result<(), CliError> {
    for path in files(build)? {
        drop_file(&path).map_err(|source| torpor_build::Error::Io {
            action: "drop the host's cache of",
            path,
            source,
        })?;
    }
    Ok(())
}

fn drop_file(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.sync_data()?;
    // No length: to the file's end.
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// The files of the build and of every layer that it leans on, and its base image.
fn files(build: &Build) -> Result<Vec<PathBuf>, CliError> {
    let builds_dir = build.path().parent().unwrap_or(build.path());
    let mut dirs = vec![build.path().to_owned()];
    let layers = build.manifest().layers.iter();
    dirs.extend(
        layers
            .filter(|id| **id != build.id())
            .map(|id| builds_dir.join(id.to_string())),
    );
    let mut files = Vec::new();
    for dir in dirs {
        let entries = fs::read_dir(&dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = entries.map_err(|source| torpor_build::Error::Io {
            action: "list",
            path: dir,
            source,
        })?;
        files.extend(
            entries
                .into_iter()
                .map(|entry| entry.path())
                .filter(|path| path.is_file()),
        );
    }
    if let Some(digest) = &build.manifest().info.base_image {
        files.push(build.storage().image_path(digest)?);
    }
    Ok(files)
}
