//! Which Firecracker there is, and what its version knows.
//!
//! The version is asked first and believed: a request that a version does not understand may end
//! the process (a failed snapshot load does), so it must not be found out by trying.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Result, VmmError};
use crate::firecracker::jail::Jail;
use crate::machine::{Accel, VmmIdentity};
use crate::version::{Version, ask_version};

/// The program's name in its releases, once unpacked.
const BINARY_NAME: &str = "firecracker";
/// Where its releases are to be had.
const NEXT_STEP: &str =
    "get it from https://github.com/firecracker-microvm/firecracker/releases (1.10 or newer)";
/// The oldest version that torpor drives.
const OLDEST: Version = Version::new(1, 10, 0);
/// The machine as an identity records it: the revision of our device layout. Raise it with every
/// change of a device or of its options: a device state fits the layout that made it.
const MACHINE_IDENTITY: &str = "firecracker/1";

/// A Firecracker that was found and has told its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirecrackerBinary {
    /// The program.
    pub path: PathBuf,
    /// Its version, for comparing.
    pub version: Version,
    /// Its version as it spells it (`1.17.0-dev`): what an identity records.
    pub release: String,
    /// How its machines are locked up, if they are: for the caller to set.
    pub jail: Option<Jail>,
    /// How long its machines may take to answer: for the caller to change.
    pub deadlines: Deadlines,
}

/// How long a Firecracker may take for what it is asked, before that is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Any request but a load: all of them are answered in milliseconds.
    pub request: Duration,
    /// Until its API is up: a few milliseconds on an idle host.
    pub api_up: Duration,
    /// From the request to load a state to its userfaultfd.
    pub handshake: Duration,
    /// A load: milliseconds, and what its page faults take.
    pub load: Duration,
    /// The wait for the reason when a request breaks: a Firecracker that ends closes its socket some
    /// milliseconds before it is reaped.
    pub last_words: Duration,
}

impl Default for Deadlines {
    /// Long enough for a host that is overloaded, short enough for a person.
    fn default() -> Self {
        Self {
            request: Duration::from_secs(30),
            api_up: Duration::from_secs(30),
            handshake: Duration::from_secs(30),
            load: Duration::from_secs(60),
            last_words: Duration::from_secs(10),
        }
    }
}

impl FirecrackerBinary {
    /// Takes `explicit`, or else the first `firecracker` in `PATH`. Blocks for some milliseconds.
    ///
    /// # Errors
    /// There is none, it is none, or it is older than 1.10.
    pub fn find(explicit: Option<&Path>) -> Result<Self> {
        let missing = |searched: String| VmmError::FirecrackerMissing {
            searched,
            next_step: NEXT_STEP,
        };
        let path = match explicit {
            Some(path) if path.is_file() => path.to_owned(),
            Some(path) => return Err(missing(format!("there is no file {}", path.display()))),
            None => search_path()
                .ok_or_else(|| missing("looked in every directory of PATH".to_owned()))?,
        };
        // It is started in a directory of its own.
        let path = std::path::absolute(&path).map_err(|source| VmmError::File {
            role: "firecracker binary",
            path: path.clone(),
            source,
        })?;
        let unusable = |detail: String| VmmError::BinaryUnusable {
            path: path.clone(),
            detail,
        };
        let text = ask_version(&path).map_err(|e| unusable(e.to_string()))?;
        let (version, release) =
            parse(&text).ok_or_else(|| unusable(format!("it said {:?}", text.trim())))?;
        if version < OLDEST {
            return Err(unusable(format!(
                "it is version {version}, torpor needs {OLDEST} or newer"
            )));
        }
        Ok(Self {
            path,
            version,
            release,
            jail: None,
            deadlines: Deadlines::default(),
        })
    }

    /// Who a machine under this Firecracker would be, to be compared with a record before it is
    /// started. It always runs its guests by KVM.
    #[must_use]
    pub fn identity(&self) -> VmmIdentity {
        VmmIdentity {
            name: "firecracker".to_owned(),
            version: self.release.clone(),
            machine: MACHINE_IDENTITY.to_owned(),
            accel: Accel::Kvm,
        }
    }
}

fn search_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|dir| dir.join(BINARY_NAME))
        .find(|path| path.is_file())
}

/// `Firecracker v1.16.1`, a blank line, and sometimes a log line behind it.
fn parse(text: &str) -> Option<(Version, String)> {
    let release = text
        .split_once("Firecracker v")?
        .1
        .split_whitespace()
        .next()?;
    Some((Version::parse(release)?, release.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_as_releases_spell_it() {
        let (version, release) =
            parse("Firecracker v1.16.1\n\n2026-01-01 [anonymous:main] exiting").unwrap();
        assert_eq!(version, Version::new(1, 16, 1));
        assert_eq!(release, "1.16.1");
        let (version, release) = parse("Firecracker v1.17.0-dev\n").unwrap();
        assert_eq!(version, Version::new(1, 17, 0));
        assert_eq!(release, "1.17.0-dev");
        assert_eq!(parse("QEMU emulator version 7.2.22"), None);
        assert_eq!(parse("Firecracker v1.x"), None);
    }

    #[test]
    fn the_oldest_version_is_1_10() {
        assert!(Version::new(1, 9, 9) < OLDEST);
        assert!(Version::new(1, 10, 0) >= OLDEST);
    }

    #[test]
    fn a_missing_firecracker_says_where_to_get_it() {
        let error = FirecrackerBinary::find(Some(Path::new("/nonexistent/firecracker")))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/firecracker"), "{error}");
        assert!(error.contains("releases"), "{error}");
    }

    #[test]
    fn another_program_is_not_taken_for_firecracker() {
        let error = FirecrackerBinary::find(Some(Path::new("/bin/true")))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/bin/true does not answer"), "{error}");
    }
}
