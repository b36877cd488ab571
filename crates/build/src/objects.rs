//! Base images and kernels: kept by the digest of their content, never changed.
//!
//! Names are digests, a kernel's configuration's too: whether a file is still what was imported
//! can be told by reading it. An import does, and puts a good copy in the place of a damaged one.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::build::read_bounded;
use crate::durable;
use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Digest};
use crate::page::{PAGE_SIZE, is_zero};
use crate::staging::StagingDir;
use crate::storage::{Storage, list_dir};

/// Base images and kernels are read by guests and never written: by VMMs that are jailed, too, as users
/// of their own. Nobody else comes to them, as the storage's directory is its owner's alone.
pub(crate) const OBJECT_MODE: u32 = 0o444;
/// Bytes read at a time.
const COPY_BYTES: usize = 1 << 20;
const KERNEL_FILE: &str = "vmlinux";
/// Followed by the digest of the configuration.
/// Longest kernel configuration: Debian's have 0.3 MiB.
const KERNEL_CONFIG_BYTES_MAX: u64 = 4 << 20;
const KERNEL_CONFIG_PREFIX: &str = "config-";

impl Storage {
    /// Copies a base image into the storage, with holes where it has zeros, makes the index of its
    /// blocks, and gives its digest. What is there already and whole is not made again.
    ///
    /// # Errors
    /// When it cannot be read or copied.
    pub fn import_image(&self, path: &Path) -> Result<Digest> {
        let known = digest_of_file(path)?;
        let images = self.dir("images");
        if is_whole(&images.join(known.to_string()), &known) {
            self.ensure_block_index(&known)?;
            return Ok(known);
        }
        let staged = self.stage_import()?;
        let copy = staged.path().join("image");
        // What was copied counts: the file may have changed since it was first read.
        let digest = copy_sparse(path, &copy)?;
        let to = images.join(digest.to_string());
        let lock = self.lock()?;
        // Over a damaged one, or one that another import has just brought: equal, then.
        durable::step("import-rename", &to, || durable::rename_over(&copy, &to))?;
        durable::step("import-dir-sync", &images, || durable::sync_dir(&images))?;
        drop(lock);
        self.ensure_block_index(&digest)?;
        Ok(digest)
    }

    /// Where a base image is.
    ///
    /// # Errors
    /// [`Error::UnknownImage`].
    pub fn image_path(&self, digest: &Digest) -> Result<PathBuf> {
        let path = self.dir("images").join(digest.to_string());
        if path.is_file() {
            Ok(path)
        } else {
            Err(Error::UnknownImage {
                digest: *digest,
                path,
            })
        }
    }

    /// Copies a kernel, and its configuration if there is one, and gives the kernel's digest.
    /// One that is there already and whole is left alone; a configuration is added to it if it had
    /// none that is whole.
    ///
    /// # Errors
    /// When they cannot be read or copied.
    pub fn import_kernel(&self, vmlinux: &Path, config: Option<&Path>) -> Result<Digest> {
        let mut staged = self.stage_import()?;
        let digest = copy_sparse(vmlinux, &staged.path().join(KERNEL_FILE))?;
        let config = match config {
            Some(config) => Some(stage_config(config, staged.path())?),
            None => None,
        };
        durable::sync_dir(staged.path())?;
        let to = self.kernel_dir(&digest);
        let mut missing: Vec<String> = Vec::new();
        if !is_whole(&to.join(KERNEL_FILE), &digest) {
            missing.push(KERNEL_FILE.to_owned());
        }
        let kept = self.kernel_config(&digest);
        if !kept.is_some_and(|(path, digest)| is_whole(&path, &digest)) {
            missing.extend(config.clone());
        }
        let _lock = self.lock()?;
        if !to.exists() {
            // The directory stays locked until the guard returned here is dropped; nobody minds.
            drop(staged.publish(&to, &self.dir("kernels"), "import")?);
        } else if !missing.is_empty() {
            for name in &missing {
                durable::rename_over(&staged.path().join(name), &to.join(name))?;
            }
            if config.as_ref().is_some_and(|name| missing.contains(name)) {
                remove_other_configs(&to, config.as_deref())?;
            }
            durable::sync_dir(&to)?;
        }
        Ok(digest)
    }

    fn kernel_dir(&self, digest: &Digest) -> PathBuf {
        self.dir("kernels").join(digest.to_string())
    }

    /// Where a kernel is.
    ///
    /// # Errors
    /// [`Error::UnknownKernel`].
    pub fn kernel_path(&self, digest: &Digest) -> Result<PathBuf> {
        let path = self.kernel_dir(digest).join(KERNEL_FILE);
        if path.is_file() {
            Ok(path)
        } else {
            Err(Error::UnknownKernel {
                digest: *digest,
                path,
            })
        }
    }

    /// Where a kernel's configuration is, if it came with one.
    #[must_use]
    pub fn kernel_config_path(&self, digest: &Digest) -> Option<PathBuf> {
        self.kernel_config(digest).map(|(path, _)| path)
    }

    /// A kernel's configuration, if it came with one, and its bytes are those that its name tells.
    #[must_use]
    pub fn read_kernel_config(&self, digest: &Digest) -> Option<String> {
        let (path, expected) = self.kernel_config(digest)?;
        let bytes = read_bounded(&path, KERNEL_CONFIG_BYTES_MAX).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        (Digest::of(text.as_bytes()) == expected).then_some(text)
    }

    /// Where a kernel's configuration is, and its digest.
    pub(crate) fn kernel_config(&self, digest: &Digest) -> Option<(PathBuf, Digest)> {
        let dir = self.kernel_dir(digest);
        let names = list_dir(&dir).ok()?;
        names.iter().find_map(|name| {
            let digest = name.strip_prefix(KERNEL_CONFIG_PREFIX)?.parse().ok()?;
            Some((dir.join(name), digest))
        })
    }

    pub(crate) fn stage_import(&self) -> Result<StagingDir> {
        let id = BuildId::random();
        let lock = self.lock()?;
        // A random name is never taken.
        StagingDir::create(self, lock, &format!("import-{id}"))?.ok_or(Error::BuildBusy { id })
    }
}

/// Copies a configuration to where its name tells its digest; gives that name.
fn stage_config(config: &Path, staged: &Path) -> Result<String> {
    let copy = staged.join("config.tmp");
    let name = format!("{KERNEL_CONFIG_PREFIX}{}", copy_sparse(config, &copy)?);
    durable::rename_over(&copy, &staged.join(&name))?;
    Ok(name)
}

/// Removes damaged configurations, once `kept` has taken their place.
fn remove_other_configs(kernel_dir: &Path, kept: Option<&str>) -> Result<()> {
    for name in list_dir(kernel_dir)? {
        if name.starts_with(KERNEL_CONFIG_PREFIX) && Some(name.as_str()) != kept {
            let path = kernel_dir.join(name);
            fs::remove_file(&path).context("delete", &path)?;
        }
    }
    Ok(())
}

/// Whether a file is there and has this digest. One that cannot be read is as good as damaged.
fn is_whole(path: &Path, digest: &Digest) -> bool {
    digest_of_file(path).is_ok_and(|found| found == *digest)
}

/// The digest of a file's content.
pub(crate) fn digest_of_file(path: &Path) -> Result<Digest> {
    digest_with(path, |_| ())
}

/// As [`digest_of_file`]; `progress` is told the length of each chunk that has been read.
pub(crate) fn digest_with(path: &Path, mut progress: impl FnMut(u64)) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    read_chunks(path, |chunk, _| {
        hasher.update_rayon(chunk);
        progress(chunk.len() as u64);
        Ok(())
    })?;
    Ok(hasher.finalize().into())
}

/// Copies a file, with holes where it has pages of zeros, syncs the copy, and makes it read-only.
fn copy_sparse(from: &Path, to: &Path) -> Result<Digest> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(durable::FILE_MODE)
        .open(to)
        .context("create", to)?;
    let mut hasher = blake3::Hasher::new();
    let len = read_chunks(from, |chunk, offset| {
        hasher.update_rayon(chunk);
        for (start, end) in data_pieces(chunk) {
            durable::step("import-write", to, || {
                file.write_all_at(&chunk[start..end], offset + start as u64)
                    .context("write", to)
            })?;
        }
        Ok(())
    })?;
    file.set_len(len).context("write", to)?;
    file.set_permissions(Permissions::from_mode(OBJECT_MODE))
        .context("protect", to)?;
    durable::step("import-file-sync", to, || durable::sync_file(&file, to))?;
    Ok(hasher.finalize().into())
}

/// The parts of a chunk that lie between its pages of zeros.
fn data_pieces(chunk: &[u8]) -> Vec<(usize, usize)> {
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    for (position, page) in chunk.chunks(PAGE_SIZE).enumerate() {
        let start = position * PAGE_SIZE;
        let end = start + page.len();
        if is_zero(page) {
            continue;
        }
        match pieces.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => pieces.push((start, end)),
        }
    }
    pieces
}

/// Reads a file from beginning to end; gives its length.
fn read_chunks(path: &Path, mut each: impl FnMut(&[u8], u64) -> Result<()>) -> Result<u64> {
    let mut file = File::open(path).context("open", path)?;
    let is_file = fs::metadata(path).context("look at", path)?.is_file();
    if !is_file {
        let source = std::io::Error::other("it is not a file");
        return Err(Error::io("read", path, source));
    }
    let mut chunk = vec![0; COPY_BYTES];
    let (mut offset, mut filled) = (0, 0);
    loop {
        let read = file.read(&mut chunk[filled..]).context("read", path)?;
        filled += read;
        // Whole chunks, so that pages stay pages.
        if read == 0 || filled == chunk.len() {
            each(&chunk[..filled], offset)?;
            offset += filled as u64;
            filled = 0;
        }
        if read == 0 {
            return Ok(offset);
        }
    }
}
