//! Tells the guest's two disks apart, and waits for them.
//!
//! The VMM gives each drive a serial; the kernel shows it in `/sys/block/<disk>/serial`. Names like
//! `vda` follow the order in which devices were found, which differs between machine types.
//!
//! Firecracker's drives have serials that it makes up. Where none is ours, two disks of which one can
//! only be read are told apart by that: the base image is never writable.

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
        if let Some(disks) = by_permission(sys_block, &seen) {
            return Ok(disks);
        }
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

/// Two disks with serials of somebody else's making, one of them read-only.
fn by_permission(sys_block: &Path, seen: &BTreeMap<String, String>) -> Option<Disks> {
    if seen.contains_key(BASE_SERIAL) || seen.contains_key(LAYER_SERIAL) {
        return None;
    }
    let read_only = |name: &String| {
        let flag = std::fs::read_to_string(sys_block.join(name).join("ro"));
        flag.is_ok_and(|flag| flag.trim() == "1")
    };
    let (base, layer): (Vec<_>, Vec<_>) = seen.values().partition(|name| read_only(name));
    match (base.as_slice(), layer.as_slice()) {
        ([base], [layer]) => Some(Disks {
            base: device(base),
            layer: device(layer),
        }),
        _ => None,
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
    fn disks_without_our_serials_are_told_apart_by_what_can_be_written() {
        let sys = sys_block(&[("vda", Some("fd0123")), ("vdb", Some("fd0124"))]);
        std::fs::write(sys.path().join("vda/ro"), "0\n").unwrap();
        std::fs::write(sys.path().join("vdb/ro"), "1\n").unwrap();
        let disks = wait(sys.path()).unwrap();
        assert_eq!(disks.base, Path::new("/dev/vdb"));
        assert_eq!(disks.layer, Path::new("/dev/vda"));

        std::fs::write(sys.path().join("vdb/ro"), "0\n").unwrap();
        wait_until(sys.path(), Instant::now(), Duration::ZERO).unwrap_err();
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
