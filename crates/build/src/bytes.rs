//! Reading little-endian numbers out of bytes that may be anything.

use crate::error::FormatError;

/// A cursor that gives errors, with the offset, instead of reading past the end.
#[derive(Debug)]
pub(crate) struct Bytes<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Bytes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, offset: 0 }
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let found = self
            .bytes
            .get(self.offset..)
            .and_then(<[u8]>::first_chunk::<N>)
            .ok_or_else(|| FormatError::damaged(self.bytes.len(), "the file ends too early"))?;
        self.offset += N;
        Ok(*found)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}
