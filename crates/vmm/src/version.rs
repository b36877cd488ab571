//! What a VMM's program says to `--version`.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long `--version` may take: it prints a line; a minute is for a host that swaps.
const VERSION_DEADLINE: Duration = Duration::from_secs(60);
/// How often we look whether it has ended.
const VERSION_LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// The longest `--version` text that we read; QEMU's has about 150 bytes, Firecracker's 20.
const VERSION_BYTES_MAX: u64 = 4 << 10;

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
