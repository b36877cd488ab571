//! The guest's serial console, in a file that cannot grow without end.
//!
//! The guest decides how much it prints. The file keeps the newest output: when it is full, its
//! second half becomes its first. So it never exceeds [`CONSOLE_LOG_BYTES_MAX`] and, once it was
//! full, always holds at least the last half of that. Cut lines are the price.
//!
//! A log that cannot be written is not worth a guest: the first failure is reported, the guest
//! goes on without a log.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Result, VmmError};

/// The largest console log. A boot prints about 30 KiB, a kernel panic with its traces 10 KiB.
const CONSOLE_LOG_BYTES_MAX: u64 = 1 << 20;
/// What is kept of a full log.
const KEPT_BYTES: u64 = CONSOLE_LOG_BYTES_MAX / 2;

/// A console log that is being written.
#[derive(Debug)]
pub(crate) struct ConsoleLog {
    file: File,
    len_bytes: u64,
    broken: bool,
}

impl ConsoleLog {
    /// Starts an empty log, readable by its owner only: a console shows what a guest does.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| VmmError::File {
                role: "console log",
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            file,
            len_bytes: 0,
            broken: false,
        })
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) {
        if self.broken {
            return;
        }
        if let Err(e) = self.try_append(bytes) {
            self.broken = true;
            tracing::warn!("the console log ends here, it cannot be written: {e}");
        }
    }

    fn try_append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // More at once than is kept: only its end matters.
        let excess = bytes
            .len()
            .saturating_sub(usize::try_from(KEPT_BYTES).unwrap_or(usize::MAX));
        let bytes = &bytes[excess..];
        if self.len_bytes + bytes.len() as u64 > CONSOLE_LOG_BYTES_MAX {
            self.halve()?;
        }
        self.file.write_all_at(bytes, self.len_bytes)?;
        self.len_bytes += bytes.len() as u64;
        Ok(())
    }

    fn halve(&mut self) -> io::Result<()> {
        let kept = self.len_bytes.min(KEPT_BYTES);
        let mut tail = vec![0; usize::try_from(kept).unwrap_or(0)];
        self.file.read_exact_at(&mut tail, self.len_bytes - kept)?;
        self.file.set_len(0)?;
        self.file.write_all_at(&tail, 0)?;
        self.len_bytes = kept;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_log_keeps_the_newest_output_and_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::create(&path).unwrap();
        let mut written = Vec::new();
        for number in 0..400_000_u32 {
            let line = format!("line {number}\n");
            log.append(line.as_bytes());
            written.extend_from_slice(line.as_bytes());
        }
        let kept = fs::read(&path).unwrap();
        assert!(kept.len() as u64 <= CONSOLE_LOG_BYTES_MAX);
        assert!(kept.len() as u64 >= KEPT_BYTES);
        assert!(written.ends_with(&kept));
    }

    #[test]
    fn one_huge_write_leaves_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = ConsoleLog::create(&path).unwrap();
        log.append(b"before");
        let huge: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        log.append(&huge);
        assert!(huge.ends_with(&fs::read(&path).unwrap()[b"before".len()..]));
    }

    #[test]
    fn a_log_that_cannot_be_made_names_its_path() {
        let error = ConsoleLog::create(Path::new("/nonexistent/console.log")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/console.log"),
            "{error}"
        );
    }
}
