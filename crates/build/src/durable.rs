//! The steps that make something last: fsync and rename, each with a fail point before and after.
//!
//! A file is durable when its bytes *and* the directory entry that leads to it are: every function
//! here that renames also syncs the directory it renamed into.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::error::{IoContext, Result};

/// Files hold guest memory: their owner alone may read them.
pub(crate) const FILE_MODE: u32 = 0o600;
/// As [`FILE_MODE`], for directories.
pub(crate) const DIR_MODE: u32 = 0o700;

/// A named place where tests make things fail: nothing without the feature `failpoints`.
#[cfg(feature = "failpoints")]
pub(crate) fn fail_point(step: &str, when: &str, path: &Path) -> Result<()> {
    fail::fail_point!(&format!("{step}-{when}"), |kind| {
        let source = match kind.as_deref() {
            Some("enospc") => std::io::Error::from(rustix::io::Errno::NOSPC),
            _ => std::io::Error::from(rustix::io::Errno::IO),
        };
        Err(crate::Error::io("finish (fail point) with", path, source))
    });
    Ok(())
}

#[cfg(not(feature = "failpoints"))]
pub(crate) fn fail_point(_step: &str, _when: &str, _path: &Path) -> Result<()> {
    Ok(())
}

/// Does one durable step between its two fail points.
pub(crate) fn step<T>(name: &str, path: &Path, action: impl FnOnce() -> Result<T>) -> Result<T> {
    fail_point(name, "before", path)?;
    let done = action()?;
    fail_point(name, "after", path)?;
    Ok(done)
}

/// Waits until a file's bytes are on the disk.
pub(crate) fn sync_file(file: &File, path: &Path) -> Result<()> {
    file.sync_all().context("sync", path)
}

/// Waits until a directory's entries are on the disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .context("open", path)?
        .sync_all()
        .context("sync", path)
}

/// Renames to a name that must be free; does not sync.
pub(crate) fn rename_to_new(from: &Path, to: &Path) -> Result<()> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).context("rename to", to)
}

/// Renames over what is there; does not sync.
pub(crate) fn rename_over(from: &Path, to: &Path) -> Result<()> {
    rustix::fs::renameat(CWD, from, CWD, to).context("rename to", to)
}

/// Renames within one directory, over what is there, and syncs the directory.
///
/// The file's bytes must have been synced before: otherwise a crash can leave the new name with
/// old or no content.
///
/// # Errors
/// When renaming or syncing fails; after the latter, the name is in place and may or may not
/// survive a crash.
pub fn durable_rename(from: &Path, to: &Path) -> Result<()> {
    rustix::fs::renameat(CWD, from, CWD, to).context("rename to", to)?;
    sync_dir(parent_of(to))
}

/// Writes a whole file: under a temporary name beside it, synced, then renamed into place. After
/// a crash either the old or the new content is there, whole.
///
/// The temporary name ends in `.tmp`; one that a crash left behind is overwritten.
///
/// # Errors
/// When a step fails; the temporary file is removed.
pub fn durable_write(path: &Path, bytes: &[u8]) -> Result<()> {
    durable_write_steps(path, bytes, "write")
}

/// [`durable_write`] with the name under which its fail points go.
pub(crate) fn durable_write_steps(path: &Path, bytes: &[u8], steps: &str) -> Result<()> {
    let temporary = temporary_name(path);
    let written = write_and_rename(path, &temporary, bytes, steps);
    if written.is_err() {
        // Best effort: it may never have been created, or have been renamed already.
        drop(std::fs::remove_file(&temporary));
    }
    written
}

/// Replaces a file by one rename, without syncing anything: for what may be lost. The caller sees
/// to it that nobody else does the same to this file.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_name(path);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes));
    written.context("write", &temporary)?;
    rustix::fs::renameat(CWD, &temporary, CWD, path).context("rename to", path)
}

fn write_and_rename(path: &Path, temporary: &Path, bytes: &[u8], steps: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(temporary)
        .context("create", temporary)?;
    step(&format!("{steps}-file-write"), temporary, || {
        file.write_all(bytes).context("write", temporary)
    })?;
    step(&format!("{steps}-file-sync"), temporary, || {
        sync_file(&file, temporary)
    })?;
    step(&format!("{steps}-file-rename"), path, || {
        rustix::fs::renameat(CWD, temporary, CWD, path).context("rename to", path)
    })?;
    let dir = parent_of(path);
    step(&format!("{steps}-dir-sync"), dir, || sync_dir(dir))
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates a file that must not exist, for its owner alone.
pub(crate) fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(path)
        .context("create", path)
}
