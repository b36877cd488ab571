//! Why a guest's memory could not be understood. Nothing is taken as free then.

use std::io;

/// Why a guest's page metadata cannot be used.
///
/// None of these is the host's failure except [`Read`](Self::Read) and [`Ram`](Self::Ram): all
/// others are the guest's word that does not fit, and the caller goes on without a scan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnatomyError {
    /// The bytes could not be had.
    #[error("cannot read {len_bytes} bytes of guest memory at {addr:#x}: {source}")]
    Read {
        /// Guest-physical address.
        addr: u64,
        /// How many bytes.
        len_bytes: u64,
        /// Why not.
        source: io::Error,
    },
    /// The caller's list of RAM ranges is malformed, or is not that of `GuestKernel::find`.
    #[error("the guest's RAM ranges cannot be used: {what}")]
    Ram {
        /// What is wrong.
        what: &'static str,
    },
}
