//! Guest-physical memory, as this crate sees it: ranges of RAM, and a way to read inside one.
//!
//! Everything that the guest says is an address sooner or later, so all reads pass through
//! `Ram::read`, which refuses what does not lie inside one range before the caller's code is asked.

use std::io;

/// Size of a guest page (bytes): x86-64's base page.
pub const PAGE_SIZE: u64 = 4096;
/// Most ranges of RAM that a guest may have: a machine has two or three, hot-plugged memory more.
pub const RAM_RANGES_MAX: usize = 1024;
/// Highest guest-physical address plus one (bytes): what x86-64's page table entries can hold.
pub const RAM_END_MAX: u64 = 1 << 52;

/// A stretch of guest-physical RAM, page aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Its first guest-physical address.
    pub addr: u64,
    /// Its length (bytes).
    pub len_bytes: u64,
}

impl RamRange {
    /// One past its last address.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.addr.saturating_add(self.len_bytes)
    }
}

/// A stopped guest's memory. It must not change while it is looked at.
pub trait PhysicalMemory {
    /// The guest's RAM: page aligned, sorted, disjoint; two ranges may touch.
    fn ram(&self) -> &[RamRange];

    /// Fills `buf` with the bytes at the guest-physical address `addr`.
    ///
    /// This crate calls it only for ranges that lie wholly inside one [`RamRange`].
    ///
    /// # Errors
    /// When the bytes cannot be had.
    fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()>;
}
