//! Loads the kernel modules that the initramfs brings.
//!
//! Their order was worked out when the kernel was taken out of its package and stands in their names
//! (`00-virtio_mmio.ko`): nothing is resolved here.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::{InStep, InitError};

const NO_PARAMETERS: &CStr = c"";

/// Loads every module of `dir`, in the order of their names. One that the kernel has already is fine.
pub(super) fn load_all(dir: &Path) -> Result<(), InitError> {
    let modules =
        in_load_order(dir).in_step(|| format!("list kernel modules in {}", dir.display()))?;
    for module in modules {
        let loaded = File::open(&module).and_then(|file| {
            finit_module(&file, NO_PARAMETERS, ModuleInitFlags::empty()).map_err(io::Error::from)
        });
        match loaded {
            Err(error) if error.raw_os_error() != Some(Errno::EEXIST as i32) => {
                return Err(error).in_step(|| format!("load kernel module {}", module.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The modules of `dir` sorted by name. A kernel with everything built in brings none, and no `dir`.
fn in_load_order(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut modules = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<Vec<_>>>()?;
    modules.retain(|path| path.extension().is_some_and(|extension| extension == "ko"));
    modules.sort();
    Ok(modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_in_the_order_of_their_numbers_and_nothing_else_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "10-overlay.ko",
            "02-virtio_blk.ko",
            "00-virtio_mmio.ko",
            "README",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> = in_load_order(dir.path())
            .unwrap()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(
            names,
            ["00-virtio_mmio.ko", "02-virtio_blk.ko", "10-overlay.ko"]
        );
    }

    #[test]
    fn a_kernel_without_modules_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            in_load_order(&dir.path().join("modules"))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_file_that_is_no_module_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("00-broken.ko"), "not a module").unwrap();
        let error = load_all(dir.path()).unwrap_err().to_string();
        assert!(error.contains("00-broken.ko"), "{error}");
    }
}
