//! Why a guest's memory could not be understood. Nothing is taken as free then.

use std::io;

/// Why a guest's page metadata cannot be used.
///
/// [`Read`](Self::Read) and [`Ram`](Self::Ram) are the host's own failures. All others are the
/// guest's word that does not fit; the caller goes on without a scan and says why.
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
    /// The caller's list of RAM ranges is malformed, or is not the one of `GuestKernel::find`.
    #[error("the guest's RAM ranges cannot be used: {what}")]
    Ram {
        /// What is wrong.
        what: &'static str,
    },
    /// Something that the guest points at is not in its RAM.
    #[error("the guest's {what} ({len_bytes} bytes at {addr:#x}) lies outside its RAM")]
    OutsideRam {
        /// What was to be read there.
        what: &'static str,
        /// Guest-physical address.
        addr: u64,
        /// How many bytes.
        len_bytes: u64,
    },
    /// There is no crash note where the guest says.
    #[error("no crash note (vmcoreinfo) at {addr:#x}: {what}")]
    NotANote {
        /// Guest-physical address.
        addr: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The note lacks a line.
    #[error("the guest's crash note does not say {key}; its kernel cannot be scanned")]
    KeyMissing {
        /// The line's key.
        key: &'static str,
    },
    /// The note has a line twice.
    #[error("the guest's crash note says {key} twice")]
    KeyTwice {
        /// The line's key.
        key: &'static str,
    },
    /// A line's value is no number, or one that no supported kernel has.
    #[error("the guest's crash note has an unusable value for {key}: {what}")]
    KeyValue {
        /// The line's key.
        key: &'static str,
        /// What was expected.
        what: &'static str,
    },
    /// An address that no x86-64 kernel has for its own data.
    #[error("the guest's {what} is said to lie at {vaddr:#x}, which is no kernel address")]
    NotKernelAddress {
        /// What lies there.
        what: &'static str,
        /// The virtual address.
        vaddr: u64,
    },
    /// The guest's page tables do not map an address that it uses.
    #[error("the guest's page tables do not map {vaddr:#x} (level {level})")]
    NotMapped {
        /// The virtual address.
        vaddr: u64,
        /// The level whose entry is not there: 5 or 4 is the top, 1 maps single pages.
        level: u8,
    },
    /// The two ways to the page array lead to different places.
    #[error(
        "section {section}: the page array is at {by_section:#x} by mem_section, at \
         {by_vmemmap:#x} by vmemmap"
    )]
    Disagree {
        /// The section's number.
        section: u64,
        /// Where page 0's entry would be by the section.
        by_section: u64,
        /// Where it would be by `vmemmap`.
        by_vmemmap: u64,
    },
    /// A section's number is beyond what the kernel has room for.
    #[error("the guest has RAM in section {section}, and its kernel knows {max} sections")]
    SectionNumber {
        /// The section's number.
        section: u64,
        /// How many the kernel has.
        max: u64,
    },
    /// The page array is in too many places: reading it would cost too much.
    #[error("the guest's page array is scattered over more than {max} places in its memory")]
    Scattered {
        /// How many there may be.
        max: u64,
    },
    /// A page bears the mark of a free block, and what else it says contradicts that.
    #[error("page frame {pfn:#x} is marked as a free block, but {what}")]
    FreeBlock {
        /// The page frame number.
        pfn: u64,
        /// What contradicts.
        what: &'static str,
    },
}
