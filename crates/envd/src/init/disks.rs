//! Tells the guest's two disks apart, and waits for them.
//!
//! The VMM gives each drive a serial; the kernel shows it in `/sys/block/<disk>/serial`. Names like
//! `vda` follow the order in which devices were found, which differs between machine types.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{InStep, InitError};

/// Serial of the read-only base image.
pub(super) const BASE_SERIAL: &str = "base";
/// Serial of the sandbox's writable layer.
pub(super) const LAYER_SERIAL: &str = "layer";

/// Devices are found while their modules load; emulated machines on a busy host are slow at it.
const WAIT_MAX: Duration = Duration::from_secs(20);
/// Short beside a boot, long enough not to steal the only CPU from the driver that is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The block devices that a guest is made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disks {
    /// Base image.
    pub(super) base: PathBuf,
    /// Writable layer.
    pub(super) layer: PathBuf,
}

/// Waits until both disks are there.
pub(super) fn wait(sys_block: &Path) -> Result<Disks, InitError> {
    wait_until(sys_block, Instant::now(), WAIT_MAX)
}

fn wait_until(sys_block: &Path, start: Instant, wait_max: Duration) -> Result<Disks, InitError> {
    loop {
        let seen =
            by_serial(sys_block).in_step(|| format!("list disks in {}", sys_block.display()))?;
        let waited = start.elapsed();
        match (seen.get(BASE_SERIAL), seen.get(LAYER_SERIAL)) {
            (Some(base), Some(layer)) => {
                return Ok(Disks {
                    base: device(base),
                    layer: device(layer),
                });
            }
            (base, _) if waited >= wait_max => {
                return Err(InitError::DiskMissing {
                    serial: if base.is_none() {
                        BASE_SERIAL
                    } else {
                        LAYER_SERIAL
                    },
                    waited_ms: waited.as_millis(),
                    seen: describe(&seen),
                });
            }
            _ => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

fn device(name: &str) -> PathBuf {
    Path::new("/dev").join(name)
}

fn describe(seen: &BTreeMap<String, String>) -> String {
    if seen.is_empty() {
        return "none".to_owned();
    }
    let disks: Vec<_> = seen
        .iter()
        .map(|(serial, name)| format!("{name} with serial \"{serial}\""))
        .collect();
    disks.join(", ")
}

/// The disks that have a serial: serial → name.
fn by_serial(sys_block: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut disks = BTreeMap::new();
    for entry in std::fs::read_dir(sys_block)? {
        let entry = entry?;
        // No serial file: a disk of another driver (loop, ram). One that goes away meanwhile: not ours.
        let Ok(serial) = std::fs::read_to_string(entry.path().join("serial")) else {
            continue;
        };
        let name = entry.file_name().to_string_lossy().into_owned();
        disks.insert(serial.trim_end_matches(['\n', '\0', ' ']).to_owned(), name);
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sys_block(disks: &[(&str, Option<&str>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in disks {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            if let Some(serial) = serial {
                std::fs::write(dir.path().join(name).join("serial"), serial).unwrap();
            }
        }
        dir
    }

    #[test]
    fn disks_are_told_apart_by_serial_not_by_order() {
        let sys = sys_block(&[
            ("loop0", None),
            ("vda", Some("layer\n")),
            ("vdb", Some("base")),
        ]);
        let disks = wait(sys.path()).unwrap();
        assert_eq!(
            disks,
            Disks {
                base: "/dev/vdb".into(),
                layer: "/dev/vda".into()
            }
        );
    }

    #[test]
    fn a_missing_layer_is_named_together_with_the_disks_that_are_there() {
        let sys = sys_block(&[("vda", Some("base")), ("vdb", Some("other"))]);
        let error = wait_until(sys.path(), Instant::now(), Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("serial \"layer\""), "{error}");
        assert!(error.contains("vdb with serial \"other\""), "{error}");
    }
}
