//! File system images: a base image out of whatever the user has, and the empty writable layer.
//!
//! The work is `mke2fs`'s, which fills an image from a directory without mounting it. No journal:
//! a build holds memory and disk of one and the same instant, so there is nothing to replay, and a
//! journal would only be bytes to store.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

/// Free room in a base image beyond its files, as a divisor of their size: directories, inode
/// tables and block maps of small files take about a tenth; the rest stays sparse.
const BASE_IMAGE_SLACK_DIVISOR: u64 = 4;
/// The smallest base image that `mke2fs` fills without complaint.
const BASE_IMAGE_BYTES_MIN: u64 = 64 << 20;
/// Bytes of an ext4 image in which its magic number stands (superblock at 1024, `s_magic` at 0x38).
const EXT4_MAGIC_AT: usize = 1024 + 0x38;
const EXT4_MAGIC: [u8; 2] = [0x53, 0xef];
/// How much of a tool's complaint is shown.
const STDERR_SHOWN_BYTES: usize = 2000;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The path is no directory, tar archive or ext4 image.
    #[error(
        "{path} is neither a directory, a tar archive nor an ext4 image: give --rootfs one of them"
    )]
    Unknown {
        /// What was given.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("cannot run {program}: {source}; it is in Debian's package {package}")]
    Spawn {
        /// The program.
        program: &'static str,
        /// Where it comes from.
        package: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{program} failed on {path}: {stderr}")]
    Failed {
        /// The program.
        program: &'static str,
        /// What it worked on.
        path: PathBuf,
        /// The end of what it wrote.
        stderr: String,
    },
}

/// A base image, ready to be imported.
#[derive(Debug)]
pub struct RootImage {
    path: PathBuf,
    /// Removes what was made on the way, once the image has been imported.
    _scratch: Option<tempfile::TempDir>,
}

impl RootImage {
    /// The ext4 image.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes an ext4 image as it is, and makes one from a directory or a tar archive in `scratch`.
    ///
    /// # Errors
    /// [`RootfsError`] when `source` is none of them, or a tool fails.
    pub async fn from_source(source: &Path, scratch: &Path) -> Result<Self, RootfsError> {
        let meta = std::fs::metadata(source).map_err(|error| RootfsError::Io {
            path: source.to_path_buf(),
            source: error,
        })?;
        if meta.is_file() && is_ext4(source)? {
            return Ok(Self {
                path: source.to_path_buf(),
                _scratch: None,
            });
        }
        let scratch_dir = tempfile::tempdir_in(scratch).map_err(|error| RootfsError::Io {
            path: scratch.to_path_buf(),
            source: error,
        })?;
        let tree = if meta.is_dir() {
            source.to_path_buf()
        } else {
            let tree = scratch_dir.path().join("tree");
            unpack(source, &tree).await?;
            tree
        };
        let path = scratch_dir.path().join("base.ext4");
        let bytes = tree_bytes(&tree).await?;
        let room = bytes + bytes / BASE_IMAGE_SLACK_DIVISOR + BASE_IMAGE_BYTES_MIN;
        make_ext4(&path, room, Some(&tree)).await?;
        Ok(Self {
            path,
            _scratch: Some(scratch_dir),
        })
    }
}

/// Makes an empty ext4 of `bytes` at `path`: the writable layer of a new sandbox. Sparse.
///
/// # Errors
/// [`RootfsError`] when the file cannot be made or `mke2fs` fails.
pub async fn make_layer(path: &Path, bytes: u64) -> Result<(), RootfsError> {
    make_ext4(path, bytes, None).await
}

fn is_ext4(path: &Path) -> Result<bool, RootfsError> {
    use std::os::unix::fs::FileExt as _;
    let io = |source| RootfsError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut magic = [0; 2];
    let read = file.read_at(&mut magic, EXT4_MAGIC_AT as u64).map_err(io)?;
    Ok(read == magic.len() && magic == EXT4_MAGIC)
}

async fn unpack(archive: &Path, tree: &Path) -> Result<(), RootfsError> {
    std::fs::create_dir(tree).map_err(|source| RootfsError::Io {
        path: tree.to_path_buf(),
        source,
    })?;
    let mut tar = Command::new("tar");
    // A colon in the name does not mean another machine.
    tar.args(["--extract", "--numeric-owner", "--force-local", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(tree);
    run(tar, "tar", "tar", archive)
        .await
        .map(drop)
        .map_err(|error| match error {
            // tar's own words ("This does not look like a tar archive") help less than ours.
            RootfsError::Failed { path, stderr, .. } if stderr.contains("not look like a tar") => {
                RootfsError::Unknown { path }
            }
            other => other,
        })
}

async fn tree_bytes(tree: &Path) -> Result<u64, RootfsError> {
    let mut du = Command::new("du");
    // Blocks of 4 KiB, as the image has them: many small files take more than their bytes.
    du.args(["--summarize", "--block-size=1"]).arg(tree);
    let out = run(du, "du", "coreutils", tree).await?;
    out.split_whitespace()
        .next()
        .and_then(|bytes| bytes.parse().ok())
        .ok_or_else(|| RootfsError::Failed {
            program: "du",
            path: tree.to_path_buf(),
            stderr: out.clone(),
        })
}

async fn make_ext4(path: &Path, bytes: u64, tree: Option<&Path>) -> Result<(), RootfsError> {
    let io = |source| RootfsError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = std::fs::File::create(path).map_err(io)?;
    file.set_len(bytes).map_err(io)?;
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-m",
        "0",
        "-O",
        "^has_journal",
    ]);
    // Inode tables are left as holes, and the guest is told not to fill them (`noinit_itable`).
    mke2fs.args(["-E", "lazy_itable_init=1,nodiscard"]);
    if let Some(tree) = tree {
        mke2fs.arg("-d").arg(tree);
    }
    mke2fs.arg(path);
    run(mke2fs, "mke2fs", "e2fsprogs", path).await.map(drop)
}

async fn run(
    mut command: Command,
    program: &'static str,
    package: &'static str,
    path: &Path,
) -> Result<String, RootfsError> {
    let out = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .env("LC_ALL", "C")
        .output()
        .await
        .map_err(|source| RootfsError::Spawn {
            program,
            package,
            source,
        })?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let tail = out.stderr.len().saturating_sub(STDERR_SHOWN_BYTES);
    let stderr = String::from_utf8_lossy(&out.stderr[tail..])
        .trim()
        .to_owned();
    Err(RootfsError::Failed {
        program,
        path: path.to_path_buf(),
        stderr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_image_is_made_from_a_directory_and_from_a_tar_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("hello"), "world").unwrap();
        let archive = dir.path().join("tree.tar");
        let done = std::process::Command::new("tar")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&tree)
            .arg(".")
            .status()
            .unwrap();
        assert!(done.success());
        for source in [&tree, &archive] {
            let image = RootImage::from_source(source, dir.path()).await.unwrap();
            assert!(is_ext4(image.path()).unwrap());
            let hello = std::process::Command::new("/sbin/debugfs")
                .args(["-R", "cat /hello"])
                .arg(image.path())
                .output()
                .unwrap();
            assert_eq!(hello.stdout, b"world");
            let again = RootImage::from_source(image.path(), dir.path())
                .await
                .unwrap();
            assert_eq!(again.path(), image.path(), "an image is taken as it is");
        }
    }

    #[tokio::test]
    async fn what_is_no_root_file_system_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, "not an image ".repeat(1000)).unwrap();
        let error = RootImage::from_source(&path, dir.path()).await.unwrap_err();
        assert!(matches!(error, RootfsError::Unknown { .. }), "{error}");
        assert!(error.to_string().contains("notes.txt"));
    }
}
