//! Files of ours, mapped into memory: the crate's only unsafe code.
//!
//! What it does not do: map anything that is written in place, or that a guest or a peer can
//! reach. Guest memory and base images are read with `pread`.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{IoContext, Result};

/// A whole file, read-only, as long as this lives.
#[derive(Debug)]
pub(crate) struct MappedFile(Mmap);

impl MappedFile {
    /// Maps a file that is never written or cut once it bears its name: it was written in
    /// `staging/`, made read-only (0400), and is only ever replaced by a rename.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).context("open", path)?;
        // SAFETY: the bytes must not change and the file must not shrink as long as the mapping
        // lives. Nobody writes to this inode any more: a new content comes by rename, as another
        // inode, and this one lives on until it is unmapped. It is private to its owner and
        // read-only; an owner who cuts it off by hand all the same gets a SIGBUS, as with a
        // program's own file.
        let mapped = unsafe { Mmap::map(&file) };
        mapped.context("map", path).map(Self)
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
