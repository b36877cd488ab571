//! Whether a read may wait for storage.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use rustix::io::ReadWriteFlags;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// It may.
    Waiting,
    /// It may not: what the host's page cache does not hold is an error of kind `WouldBlock`, or
    /// whatever else the file system answers that cannot tell.
    AtHand,
}

impl Reading {
    pub(crate) fn read_exact_at(self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Waiting => file.read_exact_at(buf, offset),
            Self::AtHand => {
                let wanted = buf.len();
                let mut bufs = [IoSliceMut::new(buf)];
                let got = rustix::io::preadv2(file, &mut bufs, offset, ReadWriteFlags::NOWAIT)?;
                if got == wanted {
                    Ok(())
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                }
            }
        }
    }
}
