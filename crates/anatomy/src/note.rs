//! The guest kernel's crash note (vmcoreinfo).

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where the guest says its crash note lies: the text of `/sys/kernel/vmcoreinfo`, parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoteLocation {
    /// Guest-physical address of the ELF note.
    pub addr: u64,
    /// Its room (bytes), as the guest says; the note itself may be longer.
    pub len_bytes: u64,
}

/// The text is not `<hex address> <hex size>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the text of /sys/kernel/vmcoreinfo, which is a hexadecimal address and size")]
pub struct ParseNoteLocationError;

impl FromStr for NoteLocation {
    type Err = ParseNoteLocationError;

    /// Parses what the kernel prints (`kernel/ksysfs.c`: `%pa %x`, the first with `0x`).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_ascii_whitespace().map(hexadecimal);
        match (words.next(), words.next(), words.next()) {
            (Some(Some(addr)), Some(Some(len_bytes)), None) => Ok(Self { addr, len_bytes }),
            _ => Err(ParseNoteLocationError),
        }
    }
}

/// A hexadecimal number with or without `0x`; no sign, unlike `from_str_radix`.
fn hexadecimal(word: &str) -> Option<u64> {
    let digits = word.strip_prefix("0x").unwrap_or(word);
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok())?
}
