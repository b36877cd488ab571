//! What this machine can do with as many bytes: the floor under any pause.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::elapsed_ms;

/// One size.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limit {
    /// How many bytes.
    pub bytes: u64,
    /// Copying them from memory to memory, on one core, both sides touched before.
    pub memcpy_ms: f64,
    /// Writing them to a new file, one after the other, and syncing it: the same file system that
    /// the storage is on.
    pub write_sync_ms: f64,
}

/// Measures one size. The file is removed.
///
/// # Errors
/// The file cannot be written.
pub fn measure(bytes: u64, dir: &Path) -> Result<Limit> {
    let len = usize::try_from(bytes)?;
    let mut state = 1_u64;
    // Incompressible, in case the file system compresses.
    let mut source = vec![0_u8; len];
    for chunk in source.chunks_mut(8) {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let word = (state ^ (state >> 29)).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    let mut target = vec![1_u8; len];
    let since = Instant::now();
    target.copy_from_slice(&source);
    std::hint::black_box(&target);
    let memcpy_ms = elapsed_ms(since);

    let mut file: File = tempfile::tempfile_in(dir)?;
    let since = Instant::now();
    file.write_all(&source)?;
    file.sync_all()?;
    Ok(Limit {
        bytes,
        memcpy_ms,
        write_sync_ms: elapsed_ms(since),
    })
}
