//! Which QEMU there is.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::{Result, VmmError};
use crate::machine::{Accel, VmmIdentity};
use crate::qemu::command_line::MACHINE_IDENTITY;
use crate::version::{Version, ask_version};

/// The program's name on every distribution that we know.
const BINARY_NAME: &str = "qemu-system-x86_64";
/// A QEMU that was found and has told its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuBinary {
    /// The program.
    pub path: PathBuf,
    /// Its upstream version.
    pub version: Version,
}

impl QemuBinary {
    /// Takes `explicit`, or else the first `qemu-system-x86_64` in `PATH`. Blocks for some ten
    /// milliseconds.
    ///
    /// # Errors
    /// There is none, or it is none.
    pub fn find(explicit: Option<&Path>) -> Result<Self> {
        let path = match explicit {
            Some(path) if path.is_file() => path.to_owned(),
            Some(path) => {
                return Err(VmmError::BinaryMissing {
                    binary: "QEMU".to_owned(),
                    searched: format!("there is no file {}", path.display()),
                });
            }
            None => search_path().ok_or_else(|| VmmError::BinaryMissing {
                binary: BINARY_NAME.to_owned(),
                searched: "looked in every directory of PATH".to_owned(),
            })?,
        };
        let unusable = |detail: String| VmmError::BinaryUnusable {
            path: path.clone(),
            detail,
        };
        let text = ask_version(&path).map_err(|e| unusable(e.to_string()))?;
        let version =
            parse_version(&text).ok_or_else(|| unusable(format!("it said {:?}", text.trim())))?;
        Ok(Self { path, version })
    }

    /// Who a machine under this QEMU would be, to be compared with a record before it is started.
    #[must_use]
    pub fn identity(&self, accel: Accel) -> VmmIdentity {
        VmmIdentity {
            name: "qemu".to_owned(),
            version: self.version.to_string(),
            machine: MACHINE_IDENTITY.to_owned(),
            accel,
        }
    }
}

fn search_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(BINARY_NAME))
        .find(|path| path.is_file())
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`
fn parse_version(text: &str) -> Option<Version> {
    let spelled = text
        .split_once("QEMU emulator version ")?
        .1
        .split_whitespace()
        .next()?;
    // An identity records it: what `Version` leaves out (`-rc1`) would hide that two differ.
    Version::parse(spelled).filter(|version| version.to_string() == spelled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_upstream_one() {
        let debian12 = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(debian12), Some(Version::new(7, 2, 22)));
        let debian13 = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1)\n";
        assert_eq!(parse_version(debian13), Some(Version::new(10, 0, 2)));
        assert_eq!(parse_version("Python 3.11.2"), None);
        for wrong in ["x", "10.0.2-rc1", "v10.0.2", "10.0"] {
            let text = format!("QEMU emulator version {wrong}");
            assert_eq!(parse_version(&text), None, "{wrong}");
        }
    }

    #[test]
    fn a_missing_qemu_names_the_package_to_install() {
        let error = QemuBinary::find(Some(Path::new("/nonexistent/qemu")))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/qemu"), "{error}");
        assert!(error.contains("apt-get install qemu-system-x86"), "{error}");
    }

    #[test]
    fn another_program_is_not_taken_for_qemu() {
        let error = QemuBinary::find(Some(Path::new("/bin/true")))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/bin/true does not answer --version"),
            "{error}"
        );
    }

    #[test]
    fn the_distributions_qemu_is_found() {
        let found = QemuBinary::find(None).unwrap();
        assert!(found.version >= Version::new(1, 0, 0));
        assert_eq!(
            found.identity(Accel::Tcg).version,
            found.version.to_string()
        );
    }
}
