//! envd's own words, on the guest's console: few, since every byte goes through an emulated port.

use std::io::Write;

/// Writes one line. A console that cannot be written is not worth stopping for.
pub(crate) fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}
