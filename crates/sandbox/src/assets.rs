//! What a guest is booted from: kernel, modules, base root file system, agent.
//!
//! `make setup` fills a cache directory with the first three and `make build` puts the agent beside
//! the program; this module only finds them, and says what to type when one is missing. Nothing
//! here is needed to *resume* a build: what a build needs has been imported into the storage.
//!
//! ```text
//! <assets>/kernels/<series>/{vmlinux, config, release, modules.order, modules/*.ko}
//! <assets>/kernels/default -> <series>
//! <assets>/base.ext4
//! ```

use std::path::{Path, PathBuf};

/// The kernel that a template gets unless another is asked for: what the set-up chose (a link in the
/// cache; the newest that the distribution has).
pub const DEFAULT_KERNEL: &str = "default";

/// Why there is nothing to boot from.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// A file that the set-up makes is not there.
    #[error("{what} is missing: {path} does not exist; {next_step}")]
    Missing {
        /// What it is for.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What to type.
        next_step: &'static str,
    },
    /// A file that the set-up makes cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cache directory cannot be told.
    #[error(
        "neither TORPOR_ASSETS, XDG_CACHE_HOME nor HOME is set; set TORPOR_ASSETS to the directory that `make setup` filled"
    )]
    NoDirectory,
}

/// The files of one guest to boot.
#[derive(Debug, Clone)]
pub struct Assets {
    /// Uncompressed kernel with a PVH entry.
    pub kernel: PathBuf,
    /// The kernel's configuration, kept with the build that runs it.
    pub kernel_config: PathBuf,
    /// The initramfs's modules in the order in which they load.
    pub modules: Vec<PathBuf>,
    /// The base root file system's image.
    pub base_image: PathBuf,
    /// The agent.
    pub envd: PathBuf,
}

impl Assets {
    /// Finds everything below `dir` (default: [`default_dir`]) for the kernel series `kernel`.
    ///
    /// # Errors
    /// [`AssetError::Missing`] names the first file that is not there and the command that makes it.
    pub fn find(dir: Option<&Path>, kernel: &str) -> Result<Self, AssetError> {
        let dir = match dir {
            Some(dir) => dir.to_path_buf(),
            None => default_dir()?,
        };
        let kernel_dir = dir.join("kernels").join(kernel);
        let setup = "run `make setup` (for another kernel than the default: `scripts/setup --kernel SERIES`)";
        Ok(Self {
            kernel: present("the guest kernel", kernel_dir.join("vmlinux"), setup)?,
            kernel_config: present(
                "the kernel's configuration",
                kernel_dir.join("config"),
                setup,
            )?,
            modules: modules(&kernel_dir, setup)?,
            base_image: present("the base root file system", dir.join("base.ext4"), setup)?,
            envd: find_envd()?,
        })
    }
}

/// `TORPOR_ASSETS`, else `torpor` in the user's cache directory.
///
/// # Errors
/// [`AssetError::NoDirectory`] when the environment names neither.
pub fn default_dir() -> Result<PathBuf, AssetError> {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    from("TORPOR_ASSETS")
        .or_else(|| from("XDG_CACHE_HOME").map(|cache| cache.join("torpor")))
        .or_else(|| from("HOME").map(|home| home.join(".cache").join("torpor")))
        .ok_or(AssetError::NoDirectory)
}

fn present(
    what: &'static str,
    path: PathBuf,
    next_step: &'static str,
) -> Result<PathBuf, AssetError> {
    if path.exists() {
        Ok(path)
    } else {
        Err(AssetError::Missing {
            what,
            path,
            next_step,
        })
    }
}

fn modules(kernel_dir: &Path, setup: &'static str) -> Result<Vec<PathBuf>, AssetError> {
    let order = present(
        "the list of kernel modules",
        kernel_dir.join("modules.order"),
        setup,
    )?;
    let names = std::fs::read_to_string(&order).map_err(|source| AssetError::Read {
        path: order.clone(),
        source,
    })?;
    names
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(|name| {
            present(
                "a kernel module",
                kernel_dir.join("modules").join(name),
                setup,
            )
        })
        .collect()
}

/// `TORPOR_ENVD`, else `envd` beside this program (or one directory up, where test programs find
/// it).
fn find_envd() -> Result<PathBuf, AssetError> {
    let next_step = "run `make build`, or set TORPOR_ENVD";
    if let Some(path) = std::env::var_os("TORPOR_ENVD") {
        return present("the agent", PathBuf::from(path), next_step);
    }
    let program = std::env::current_exe().map_err(|source| AssetError::Read {
        path: PathBuf::from("/proc/self/exe"),
        source,
    })?;
    let mut candidates = program
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("envd"));
    let nearest = candidates.next().unwrap_or_else(|| PathBuf::from("envd"));
    if nearest.is_file() {
        return Ok(nearest);
    }
    match candidates.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => Err(AssetError::Missing {
            what: "the agent",
            path: nearest,
            next_step,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kernel_is_named_with_the_command_that_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = Assets::find(Some(dir.path()), "6.12")
            .unwrap_err()
            .to_string();
        assert!(error.contains("kernels/6.12/vmlinux"), "{error}");
        assert!(error.contains("make setup"), "{error}");
    }

    #[test]
    fn modules_come_in_the_listed_order_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let modules_dir = dir.path().join("modules");
        std::fs::create_dir(&modules_dir).unwrap();
        std::fs::write(dir.path().join("modules.order"), "b.ko\na.ko\n").unwrap();
        std::fs::write(modules_dir.join("b.ko"), "").unwrap();
        let error = modules(dir.path(), "").unwrap_err().to_string();
        assert!(error.contains("a.ko"), "{error}");
        std::fs::write(modules_dir.join("a.ko"), "").unwrap();
        let found = modules(dir.path(), "").unwrap();
        assert_eq!(found, [modules_dir.join("b.ko"), modules_dir.join("a.ko")]);
    }
}
