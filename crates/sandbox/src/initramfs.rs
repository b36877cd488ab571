//! The initial RAM file system that a template boots with: the agent and its kernel modules.
//!
//! ```text
//! /init                 envd: static, since nothing else is there
//! /modules/NN-name.ko   kernel modules, NN = position in load order
//! /dev/console          where the kernel gives pid 1 its standard streams
//! /proc /sys /mnt       where envd mounts
//! ```
//!
//! A newc cpio archive, uncompressed: it is read once from memory, and unpacking would cost an emulated
//! guest more than reading. Equal input gives equal bytes (no times, no inode numbers of the host).
//!
//! It does not choose the modules nor their order: the set-up did, when it unpacked the kernel.

use std::io::Write;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};

/// Largest initramfs (bytes). A usual one has 10 MiB; one that takes a quarter of the smallest guest's
/// memory would be a mistake, such as an agent with its debug information.
pub const INITRAMFS_LEN_MAX_BYTES: u64 = 96 << 20;
/// Most modules: their position is two digits, so that names sort as numbers do.
const MODULES_MAX: usize = 100;

/// Why no initramfs could be made.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file that belongs into it cannot be read.
    #[error("cannot read {path} for the initramfs: {source}; run `make setup build`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The agent cannot run alone.
    #[error("{path} cannot be the guest's init: {reason}; run `make build`")]
    NotAnInit {
        /// The agent.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A module's path has no usable name.
    #[error("{path} is no kernel module's name; run `scripts/setup --verify`")]
    ModuleName {
        /// The path.
        path: PathBuf,
    },
    /// More than fits into a guest.
    #[error(
        "the initramfs would have {what}, more than {max}; strip the agent (`make build` does)"
    )]
    TooLarge {
        /// What there is too much of.
        what: String,
        /// The limit.
        max: u64,
    },
    /// The archive could not be written (to memory).
    #[error("cannot write the initramfs: {0}")]
    Archive(#[from] std::io::Error),
}

/// Puts the agent `envd` and `modules`, in load order, into an archive that the kernel unpacks.
///
/// # Errors
/// When a file cannot be read, the agent is not a static x86-64 program, or limits are exceeded.
pub fn assemble(envd: &Path, modules: &[PathBuf]) -> Result<Vec<u8>, InitramfsError> {
    if modules.len() > MODULES_MAX {
        let what = format!("{} modules", modules.len());
        return Err(InitramfsError::TooLarge {
            what,
            max: MODULES_MAX as u64,
        });
    }
    let mut archive = Archive::default();
    let init = read(envd, 0)?;
    static_program(&init).map_err(|reason| InitramfsError::NotAnInit {
        path: envd.to_path_buf(),
        reason,
    })?;
    for dir in ["dev", "proc", "sys", "mnt", "modules"] {
        archive.add(dir, ModeFileType::Directory, 0o755, (0, 0), &[])?;
    }
    // Major 5, minor 1: Documentation/admin-guide/devices.txt.
    archive.add("dev/console", ModeFileType::Char, 0o600, (5, 1), &[])?;
    archive.add("init", ModeFileType::Regular, 0o755, (0, 0), &init)?;
    for (position, module) in modules.iter().enumerate() {
        let content = read(module, archive.bytes.len() as u64)?;
        let name = format!("modules/{position:02}-{}", module_name(module)?);
        archive.add(&name, ModeFileType::Regular, 0o644, (0, 0), &content)?;
    }
    Ok(trailer(archive.bytes)?)
}

/// The archive so far.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), InitramfsError> {
        let too_large = || InitramfsError::TooLarge {
            what: format!("{} bytes of {name}", content.len()),
            max: INITRAMFS_LEN_MAX_BYTES,
        };
        let len = u32::try_from(content.len()).map_err(|_| too_large())?;
        self.entries += 1;
        let mut entry = Builder::new(name)
            .ino(self.entries)
            .mode(mode)
            .set_mode_file_type(kind)
            .rdev_major(major)
            .rdev_minor(minor)
            .write(&mut self.bytes, len);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }
}

/// Reads a file unless the archive, which has `so_far_bytes`, would grow over the limit with it.
fn read(path: &Path, so_far_bytes: u64) -> Result<Vec<u8>, InitramfsError> {
    let failed = |source| InitramfsError::Read {
        path: path.to_path_buf(),
        source,
    };
    let len = std::fs::metadata(path).map_err(failed)?.len();
    let total = so_far_bytes.saturating_add(len);
    if total > INITRAMFS_LEN_MAX_BYTES {
        let what = format!("{total} bytes with {}", path.display());
        return Err(InitramfsError::TooLarge {
            what,
            max: INITRAMFS_LEN_MAX_BYTES,
        });
    }
    std::fs::read(path).map_err(failed)
}

/// `virtio_blk.ko` of `…/01-virtio_blk.ko`: the number is given anew by the position in the list.
fn module_name(path: &Path) -> Result<&str, InitramfsError> {
    path.file_name()
        .and_then(|name| name.to_str())
        .filter(|name| name.ends_with(".ko"))
        .map(|name| {
            name.split_once('-')
                .filter(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit()))
                .map_or(name, |(_, rest)| rest)
        })
        .ok_or_else(|| InitramfsError::ModuleName {
            path: path.to_path_buf(),
        })
}

/// Whether `program` is an x86-64 ELF program that needs no interpreter. A dynamic one would be the
/// kernel's panic "no working init found", a minute later and without a reason.
fn static_program(program: &[u8]) -> Result<(), &'static str> {
    // ELF-64 specification: e_machine at 18, e_phoff at 32, e_phentsize at 54, e_phnum at 56; p_type
    // is the first word of a program header.
    const MACHINE_X86_64: u64 = 62;
    const PT_INTERP: u64 = 3;
    const CUT_OFF: &str = "it is cut off";
    if !program.starts_with(b"\x7fELF\x02\x01") || number(program, 18, 2) != Some(MACHINE_X86_64) {
        return Err("it is not an x86-64 program");
    }
    let first = number(program, 32, 8).ok_or(CUT_OFF)?;
    let size = number(program, 54, 2).ok_or(CUT_OFF)?;
    let count = number(program, 56, 2).ok_or(CUT_OFF)?;
    for header in 0..count {
        let at = usize::try_from(first.saturating_add(header * size)).map_err(|_| CUT_OFF)?;
        if number(program, at, 4).ok_or(CUT_OFF)? == PT_INTERP {
            return Err("it is dynamically linked");
        }
    }
    Ok(())
}

/// The little-endian number of `len` bytes (at most 8) at `at`.
fn number(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(len)?)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |number, byte| (number << 8) | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The head of a static program: an ELF header and one program header of type `p_type`.
    fn program(p_type: u32) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf.extend(p_type.to_le_bytes());
        elf.resize(64 + 56, 0);
        elf
    }

    fn file(dir: &Path, name: &str, content: &[u8]) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    #[test]
    fn the_archive_holds_init_the_console_and_the_modules_in_load_order() {
        let dir = tempfile::tempdir().unwrap();
        let envd = file(dir.path(), "envd", &program(1));
        let modules = [
            file(dir.path(), "07-late.ko", b"second"),
            file(dir.path(), "virtio-rng.ko", b"third"),
        ];
        let archive = assemble(&envd, &modules).unwrap();
        assert_eq!(
            archive,
            assemble(&envd, &modules).unwrap(),
            "equal input, other bytes"
        );

        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut content).unwrap();
            let entry = reader.entry();
            if entry.name() == "dev/console" {
                assert_eq!((entry.rdev_major(), entry.rdev_minor()), (5, 1));
            }
            found.push((entry.name().to_owned(), content));
            rest = reader.finish().unwrap();
        }
        let content = |name: &str| &found.iter().find(|(found, _)| found == name).unwrap().1;
        assert_eq!(content("init"), &program(1));
        assert_eq!(content("modules/00-late.ko"), b"second");
        assert_eq!(content("modules/01-virtio-rng.ko"), b"third");
        content("dev/console");
    }

    #[test]
    fn a_dynamic_agent_is_refused_before_a_guest_panics_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let envd = file(dir.path(), "envd", &program(3));
        let error = assemble(&envd, &[]).unwrap_err().to_string();
        assert!(
            error.contains("dynamically linked") && error.contains("make build"),
            "{error}"
        );
        let cut_off = file(dir.path(), "cut", &program(1)[..100 - 40]);
        assert!(matches!(
            assemble(&cut_off, &[]),
            Err(InitramfsError::NotAnInit { .. })
        ));
        let script = file(dir.path(), "script", b"#!/bin/sh\n");
        assert!(matches!(
            assemble(&script, &[]),
            Err(InitramfsError::NotAnInit { .. })
        ));
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let envd = file(dir.path(), "envd", &program(1));
        let error = assemble(&envd, &[dir.path().join("overlay.ko")])
            .unwrap_err()
            .to_string();
        assert!(error.contains("overlay.ko"), "{error}");
    }

    #[test]
    fn an_agent_that_would_fill_the_guest_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let envd = file(dir.path(), "envd", &program(1));
        let grown = std::fs::File::options().write(true).open(&envd).unwrap();
        grown.set_len(INITRAMFS_LEN_MAX_BYTES + 1).unwrap();
        assert!(matches!(
            assemble(&envd, &[]),
            Err(InitramfsError::TooLarge { .. })
        ));
    }
}
