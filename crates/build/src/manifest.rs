//! A build's manifest: what it is, what it stands on, and the digest of each of its files.
//!
//! It is the last file of a build to be written. The file is JSON, so that any tool can read it,
//! with a frame that is fixed to the byte around the manifest proper:
//!
//! ```text
//! {
//! "checksum": "<BLAKE3 of the manifest's bytes>",
//! "manifest": {…}
//! }
//! ```
//!
//! Every byte is either compared with this frame or covered by the checksum, so a flipped bit
//! anywhere is found. The frame stays as it is in later versions; `format_version` inside counts.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, FormatError, Result};
use crate::ids::{BuildId, Digest, Name};
use crate::page::PageRun;

/// The version written, and the newest one read.
pub const MANIFEST_VERSION: u32 = 1;
/// Longest manifest that is read or written: a working set of a million runs and a large report.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 64 << 20;
pub(crate) const MANIFEST_FILE: &str = "manifest.json";

const BEFORE_CHECKSUM: &str = "{\n\"checksum\": \"";
const BEFORE_MANIFEST: &str = "\",\n\"manifest\": ";
const AFTER_MANIFEST: &str = "\n}\n";
const CHECKSUM_CHARS: usize = 2 * blake3::OUT_LEN;

/// Which VMM wrote the device state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmRecord {
    /// "qemu", "firecracker".
    pub name: String,
    /// As the VMM itself gives it; device state is only loaded into the same one.
    pub version: String,
    /// Machine type.
    pub machine: String,
    /// "tcg" or "kvm".
    pub accel: String,
}

/// The balloon's features as the guest has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonRecord {
    /// Free page reporting.
    pub reporting: bool,
    /// Free page hinting.
    #[serde(default)]
    pub hinting: bool,
}

/// What the one who commits a build says about it. The rest of the manifest is found out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BuildInfo {
    /// The build that this one stands on.
    pub parent: Option<BuildId>,
    /// The template that it was made for or from.
    pub template: Option<Name>,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// The guest's writable disk, in bytes.
    pub disk_bytes: u64,
    /// The guest's virtual CPUs.
    pub vcpus: u32,
    /// Whether the guest has a network device.
    pub network: bool,
    /// The VMM that wrote `vmstate`.
    pub vmm: VmmRecord,
    /// The balloon's features.
    pub balloon: BalloonRecord,
    /// The kernel, in the storage's `kernels/`.
    pub kernel: Option<Digest>,
    /// The base image, in the storage's `images/`.
    pub base_image: Option<Digest>,
    /// The guest's kernel command line.
    pub cmdline: String,
    /// What the resume that led to this build touched: prefetched by the next.
    #[serde(default)]
    pub working_set: Vec<PageRun>,
    /// The pause's report, opaque here.
    #[serde(default)]
    pub pause_report: serde_json::Value,
    /// What other crates need to resume the build and this one does not understand.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, serde_json::Value>,
}

/// One file of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its length, in bytes.
    pub bytes: u64,
    /// Its content's digest.
    pub digest: Digest,
}

/// A build's manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub format_version: u32,
    /// The build.
    pub id: BuildId,
    /// When it was committed: milliseconds since 1970, by the host's clock.
    pub created_unix_ms: u64,
    /// All builds whose data its indexes name, itself included, sorted.
    pub layers: Vec<BuildId>,
    /// Its files but for the manifest, by name.
    pub files: BTreeMap<String, FileRecord>,
    /// The rest.
    #[serde(flatten)]
    pub info: BuildInfo,
}

/// The one field that every version of the manifest has.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

impl Manifest {
    /// The file's bytes.
    pub(crate) fn encode(&self, path: &Path) -> Result<Vec<u8>> {
        let manifest = serde_json::to_string(self)
            .map_err(|e| Error::io("encode", path, std::io::Error::other(e)))?;
        let checksum = Digest::of(manifest.as_bytes());
        let text =
            format!("{BEFORE_CHECKSUM}{checksum}{BEFORE_MANIFEST}{manifest}{AFTER_MANIFEST}");
        if text.len() as u64 > MANIFEST_BYTES_MAX {
            let (found, max) = (text.len() as u64, MANIFEST_BYTES_MAX);
            return Err(Error::TooLarge {
                what: "the manifest in bytes",
                found,
                max,
            });
        }
        Ok(text.into_bytes())
    }

    /// Reads a manifest out of a file's bytes, whatever they are.
    ///
    /// # Errors
    /// [`FormatError`] for everything that does not verify.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (body_at, body) = unwrap_frame(bytes)?;
        let json_error = |e: serde_json::Error| FormatError::damaged(body_at, e.to_string());
        let Version { format_version } = serde_json::from_slice(body).map_err(json_error)?;
        if format_version > MANIFEST_VERSION {
            return Err(FormatError::Newer {
                found: format_version,
                known: MANIFEST_VERSION,
            });
        }
        if format_version != MANIFEST_VERSION {
            let what = format!("there is no format version {format_version}");
            return Err(FormatError::damaged(body_at, what));
        }
        serde_json::from_slice(body).map_err(json_error)
    }
}

/// The manifest's bytes and where they begin, once checksum and frame have been verified.
fn unwrap_frame(bytes: &[u8]) -> Result<(usize, &[u8]), FormatError> {
    let frame = |offset| FormatError::damaged(offset, "this is not a manifest");
    let rest = bytes
        .strip_prefix(BEFORE_CHECKSUM.as_bytes())
        .ok_or_else(|| frame(0))?;
    let (checksum, rest) = rest
        .split_at_checked(CHECKSUM_CHARS)
        .ok_or_else(|| frame(BEFORE_CHECKSUM.len()))?;
    let body_at = BEFORE_CHECKSUM.len() + CHECKSUM_CHARS + BEFORE_MANIFEST.len();
    let body = rest
        .strip_prefix(BEFORE_MANIFEST.as_bytes())
        .ok_or_else(|| frame(BEFORE_CHECKSUM.len() + CHECKSUM_CHARS))?
        .strip_suffix(AFTER_MANIFEST.as_bytes())
        .ok_or_else(|| FormatError::damaged(bytes.len(), "the manifest is cut off"))?;
    if Digest::of(body).to_string().as_bytes() != checksum {
        let what = "the manifest's checksum does not match";
        return Err(FormatError::damaged(BEFORE_CHECKSUM.len(), what));
    }
    Ok((body_at, body))
}

/// The parent that a manifest names, even if the manifest is of a newer version. `None` where even
/// that cannot be told.
///
/// Only for deciding whether a build may be deleted.
pub(crate) fn parent_if_legible(bytes: &[u8]) -> Option<Option<BuildId>> {
    field_if_legible(bytes, "parent")
}

/// As [`parent_if_legible`], for deciding whether a base image may be deleted.
pub(crate) fn base_image_if_legible(bytes: &[u8]) -> Option<Option<Digest>> {
    field_if_legible(bytes, "base_image")
}

fn field_if_legible<T: DeserializeOwned>(bytes: &[u8], field: &str) -> Option<Option<T>> {
    let outer: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    match outer.get("manifest")?.as_object()?.get(field) {
        Some(value) => serde_json::from_value(value.clone()).ok(),
        None => Some(None),
    }
}

pub(crate) fn now_unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
