//! Names of things on disk, checked wherever they come in.
//!
//! Every one of these types becomes a path component, so none can be made from text that has not
//! been checked: no separators, no dots, no case folding, one spelling per value.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest [`Name`], in bytes: well under any file system's limit for one path component.
pub const NAME_BYTES_MAX: usize = 64;

/// Text that is not an id, name or digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// Not a build id.
    #[error(
        "{0:?} is not a build id: it must be a lower-case UUID such as \
         6f1c7ba2-3a4e-4bd0-9df6-0d2b3f5c8a11"
    )]
    BuildId(String),
    /// Not a name.
    #[error("{0:?} is not a name: use 1 to {NAME_BYTES_MAX} of a-z, 0-9 and '-'")]
    Name(String),
    /// Not a digest.
    #[error("{0:?} is not a digest: it must be 64 lower-case hexadecimal digits")]
    Digest(String),
}

/// At most this many characters of rejected text are kept for the message.
const REJECTED_TEXT_CHARS_MAX: usize = 80;

fn rejected(text: &str) -> String {
    text.chars().take(REJECTED_TEXT_CHARS_MAX).collect()
}

/// The id of a build: a UUID, written in its hyphenated lower-case form and in no other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BuildId(Uuid);

impl BuildId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.hyphenated(), f)
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BuildId({self})")
    }
}

impl FromStr for BuildId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let id = Uuid::try_parse(text)
            .map(Self)
            .map_err(|_| ParseIdError::BuildId(rejected(text)))?;
        // The parser also takes braces, URNs and capitals: one value would have many paths.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(ParseIdError::BuildId(rejected(text)))
        }
    }
}

/// The name of a template or a sandbox: `[a-z0-9-]{1,64}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({self})")
    }
}

impl FromStr for Name {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseIdError::Name(rejected(text)))
        }
    }
}

/// The BLAKE3 hash of some content, written as 64 lower-case hexadecimal digits (what `b3sum`
/// prints).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; blake3::OUT_LEN]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::from(blake3::hash(bytes))
    }

    pub(crate) fn from_bytes(bytes: [u8; blake3::OUT_LEN]) -> Self {
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; blake3::OUT_LEN] {
        &self.0
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let digest = blake3::Hash::from_hex(text)
            .map(Self::from)
            .map_err(|_| ParseIdError::Digest(rejected(text)))?;
        // from_hex takes capitals too.
        if digest.to_string() == text {
            Ok(digest)
        } else {
            Err(ParseIdError::Digest(rejected(text)))
        }
    }
}

macro_rules! text_conversions {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    )*};
}
text_conversions!(BuildId, Name, Digest);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_names_and_digests_survive_a_round_trip_through_text_and_json() {
        let id = BuildId::random();
        assert_eq!(id.to_string().parse::<BuildId>().unwrap(), id);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<BuildId>(&json).unwrap(), id);
        let digest = Digest::of(b"content");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        let name: Name = "debian-12".parse().unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"debian-12\"");
    }

    #[test]
    fn a_build_id_has_one_spelling() {
        let id = BuildId::random().to_string();
        for other in [
            id.to_uppercase(),
            format!("{{{id}}}"),
            format!("urn:uuid:{id}"),
            id.replace('-', ""),
            format!("{id}/.."),
            String::new(),
        ] {
            // An id of digits alone has no upper-case form; a random v4 practically never is one.
            assert!(other.parse::<BuildId>().is_err(), "{other:?} was taken");
        }
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        let long = "a".repeat(NAME_BYTES_MAX + 1);
        for bad in ["", ".", "..", "a/b", "A", "a_b", "a b", "ä", "a\0", &long] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was taken");
        }
        assert!("a".repeat(NAME_BYTES_MAX).parse::<Name>().is_ok());
    }

    #[test]
    fn digests_are_lower_case_hexadecimal_of_the_right_length() {
        let good = Digest::of(b"").to_string();
        for bad in [
            good.to_uppercase(),
            good[1..].to_owned(),
            format!("{good}0"),
            String::new(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad:?} was taken");
        }
    }
}
