//! Base images and kernels: kept by the digest of their content, never changed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::durable;
use crate::error::{Error, IoContext, Result};
use crate::ids::{BuildId, Digest};
use crate::page::{PAGE_SIZE, is_zero};
use crate::staging::StagingDir;
use crate::storage::Storage;

/// Base images and kernels are read by guests and never written.
const OBJECT_MODE: u32 = 0o400;
/// Bytes read at a time.
const COPY_BYTES: usize = 1 << 20;
const KERNEL_FILE: &str = "vmlinux";
const KERNEL_CONFIG_FILE: &str = "config";

impl Storage {
    /// Copies a base image into the storage, with holes where it has zeros, and gives its digest.
    /// One that is there already is not copied again.
    ///
    /// # Errors
    /// When it cannot be read or copied.
    pub fn import_image(&self, path: &Path) -> Result<Digest> {
        let known = digest_of_file(path)?;
        if self.image_path(&known).is_ok() {
            return Ok(known);
        }
        let staged = self.stage_import()?;
        let copy = staged.path().join("image");
        // What was copied counts: the file may have changed since it was first read.
        let digest = copy_sparse(path, &copy)?;
        let lock = self.lock()?;
        let images = self.dir("images");
        if self.image_path(&digest).is_err() {
            let to = images.join(digest.to_string());
            durable::step("import-rename", &to, || durable::rename_to_new(&copy, &to))?;
            durable::step("import-dir-sync", &images, || durable::sync_dir(&images))?;
        }
        drop(lock);
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
    /// One that is there already is not copied again; a configuration is added to it if it had
    /// none.
    ///
    /// # Errors
    /// When they cannot be read or copied.
    pub fn import_kernel(&self, vmlinux: &Path, config: Option<&Path>) -> Result<Digest> {
        let staged = self.stage_import()?;
        let digest = copy_sparse(vmlinux, &staged.path().join(KERNEL_FILE))?;
        if let Some(config) = config {
            copy_sparse(config, &staged.path().join(KERNEL_CONFIG_FILE))?;
        }
        durable::sync_dir(staged.path())?;
        let _lock = self.lock()?;
        let to = self.kernel_dir(&digest);
        if !to.exists() {
            // The directory stays locked until the guard returned here is dropped; nobody minds.
            drop(staged.publish(&to, &self.dir("kernels"), "import")?);
        } else if config.is_some() && self.kernel_config_path(&digest).is_none() {
            let from = staged.path().join(KERNEL_CONFIG_FILE);
            durable::rename_to_new(&from, &to.join(KERNEL_CONFIG_FILE))?;
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
        let path = self.kernel_dir(digest).join(KERNEL_CONFIG_FILE);
        path.is_file().then_some(path)
    }

    fn stage_import(&self) -> Result<StagingDir> {
        let id = BuildId::random();
        let lock = self.lock()?;
        // A random name is never taken.
        StagingDir::create(self, &lock, &format!("import-{id}"))?.ok_or(Error::BuildBusy { id })
    }
}

/// The digest of a file's content.
pub(crate) fn digest_of_file(path: &Path) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    read_chunks(path, |chunk, _| {
        hasher.update(chunk);
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
        hasher.update(chunk);
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
