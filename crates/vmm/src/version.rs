//! Versions of VMMs: what a program says to `--version`, and the order of releases.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How long `--version` may take: it prints a line; a minute is for a host that swaps.
const VERSION_DEADLINE: Duration = Duration::from_secs(60);
/// How often we look whether it has ended.
const VERSION_LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// The longest `--version` text that we read; QEMU's has about 150 bytes, Firecracker's 20.
const VERSION_BYTES_MAX: u64 = 4 << 10;

/// A version, in the order of releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// `major.minor.patch`.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self {
            major,
            minor,
            patch,
        }
    }

    /// `1.16.1`, also with `v` in front. What follows a `-` (`-dev`) is not part of the order.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let mut numbers = text
            .split_once('-')
            .map_or(text, |(numbers, _)| numbers)
            .split('.')
            .map(str::parse);
        let mut next = || numbers.next()?.ok();
        let version = Self::new(next()?, next()?, next()?);
        numbers.next().is_none().then_some(version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Runs the program and returns what it prints.
pub(crate) fn ask_version(path: &Path) -> io::Result<String> {
    let mut child = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + VERSION_DEADLINE;
    // Its text fits a pipe's buffer many times over, so that it can end before we read.
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(VERSION_LOOK_INTERVAL);
    }
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(VERSION_BYTES_MAX).read_to_string(&mut text)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number() {
        assert!(Version::new(1, 9, 9) < Version::new(1, 10, 0));
        assert!(Version::new(2, 0, 0) > Version::new(1, 99, 99));
    }

    #[test]
    fn a_version_is_three_numbers_and_what_follows_a_dash_does_not_count() {
        for spelled in ["1.16.1", "v1.16.1", "1.16.1-dev"] {
            assert_eq!(Version::parse(spelled), Some(Version::new(1, 16, 1)));
        }
        for wrong in ["", "1.16", "1.16.1.2", "1.x.1", "-1.16.1"] {
            assert_eq!(Version::parse(wrong), None, "{wrong}");
        }
        assert_eq!(Version::new(10, 0, 2).to_string(), "10.0.2");
    }
}
