//! Guest memory: a memfd that this process makes and the VMM inherits, and where the VMM has it
//! mapped.
//!
//! The memfd is sealed against shrinking and growing: whoever serves pages or captures them can
//! rely on its length, whatever the VMM does.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};

use crate::error::{Result, VmmError};

/// The name under which the memory shows in `/proc/PID/maps`.
const MEMFD_NAME: &str = "torpor-guest";
/// `st_blocks` counts in these, whatever the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Where a guest's memory is.
#[derive(Debug)]
pub struct GuestMemory {
    /// The memory itself, where it is a memfd of ours (QEMU). Offset in the file = guest offset.
    /// Read it with pread and SEEK_DATA/SEEK_HOLE, never through a mapping. `None` where it is
    /// private to the VMM (Firecracker); [`GuestMemory::reader`] reads either.
    pub memfd: Option<OwnedFd>,
    /// The length of the memory in bytes.
    pub len_bytes: u64,
    /// The process that has it mapped.
    pub pid: u32,
    /// Its mappings, by guest offset; together they cover the whole memory once.
    pub mappings: Vec<MemoryMapping>,
}

/// A stretch of guest memory in the VMM's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMapping {
    /// Its first address in the VMM.
    pub host_addr: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Its offset in the memfd, in bytes.
    pub guest_offset_bytes: u64,
}

/// A stretch of RAM in the guest's physical address space, and where it lies in the memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSegment {
    /// Its first guest-physical address.
    pub guest_addr: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Its offset in the memfd, in bytes.
    pub guest_offset_bytes: u64,
}

impl GuestMemory {
    /// The memfd, where the memory is one.
    ///
    /// # Errors
    /// It is private to the VMM.
    pub fn into_memfd(self) -> Result<OwnedFd> {
        self.memfd.ok_or_else(|| VmmError::Mapping {
            pid: self.pid,
            detail: "it is private to the VMM, no memfd".to_owned(),
        })
    }
}

/// Makes the memory of a guest: all hole.
pub(crate) fn create_memfd(len_bytes: u64) -> Result<OwnedFd> {
    let failed = |source: rustix::io::Errno| VmmError::Host {
        what: "make the guest's memory",
        source: source.into(),
    };
    let fd = memfd_create(MEMFD_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(failed)?;
    ftruncate(&fd, len_bytes).map_err(failed)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed)?;
    Ok(fd)
}

/// Host memory that a memfd holds, in bytes.
pub(crate) fn allocated_bytes(memfd: impl AsFd) -> io::Result<u64> {
    let stat = fstat(memfd)?;
    Ok(u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(STAT_BLOCK_BYTES))
}

/// Finds a memfd in a process that has it mapped, and checks that it is there whole, once.
pub(crate) fn locate(memfd: OwnedFd, pid: u32, len_bytes: u64) -> Result<GuestMemory> {
    let odd = |detail: String| VmmError::Mapping { pid, detail };
    let inode = fstat(&memfd).map_err(|e| odd(e.to_string()))?.st_ino;
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).map_err(|e| odd(format!("{path}: {e}")))?;
    let mut mappings: Vec<MemoryMapping> = text
        .lines()
        .filter_map(parse_maps_line)
        .filter(|line| line.inode == inode && is_our_memfd(line.path))
        .map(|line| line.mapping)
        .collect();
    mappings.sort_by_key(|mapping| mapping.guest_offset_bytes);

    let mut covered = 0;
    for mapping in &mappings {
        if mapping.guest_offset_bytes != covered {
            return Err(odd(format!(
                "offset {covered:#x} is followed by {:#x}",
                mapping.guest_offset_bytes
            )));
        }
        covered += mapping.len_bytes;
    }
    if covered != len_bytes {
        return Err(odd(format!(
            "{covered:#x} of {len_bytes:#x} bytes are mapped"
        )));
    }
    Ok(GuestMemory {
        memfd: Some(memfd),
        len_bytes,
        pid,
        mappings,
    })
}

/// All memfds live in one internal tmpfs: inode and name together say that it is ours.
pub(crate) fn is_our_memfd(path: &str) -> bool {
    path.strip_prefix("/memfd:")
        .and_then(|rest| rest.strip_suffix(" (deleted)"))
        == Some(MEMFD_NAME)
}

struct MapsLine<'a> {
    mapping: MemoryMapping,
    inode: u64,
    path: &'a str,
}

/// `7f00-7fff rw-s 00001000 00:01 1234   /memfd:torpor-guest (deleted)` (proc_pid_maps(5)).
fn parse_maps_line(line: &str) -> Option<MapsLine<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let guest_offset_bytes = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let path = fields.next().unwrap_or("").trim_start();
    let mapping = MemoryMapping {
        host_addr: start,
        len_bytes: end.checked_sub(start)?,
        guest_offset_bytes,
    };
    Some(MapsLine {
        mapping,
        inode,
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    use rustix::io::pwrite;

    #[test]
    fn a_line_of_maps_is_read_as_the_kernel_writes_it() {
        let line = parse_maps_line(
            "7f4b80000000-7f4ba0000000 rw-s 00200000 00:01 5121                       /memfd:torpor-guest (deleted)",
        )
        .unwrap();
        assert_eq!(line.inode, 5121);
        assert!(is_our_memfd(line.path));
        let expected = MemoryMapping {
            host_addr: 0x7f4b_8000_0000,
            len_bytes: 0x2000_0000,
            guest_offset_bytes: 0x20_0000,
        };
        assert_eq!(line.mapping, expected);
        assert!(parse_maps_line("7f00-7eff rw-s 0 00:01 1 /x").is_none());
        assert!(parse_maps_line("nonsense").is_none());
    }

    #[test]
    fn guest_memory_starts_empty_and_keeps_its_length() {
        let memfd = create_memfd(4 << 20).unwrap();
        assert_eq!(allocated_bytes(&memfd).unwrap(), 0);
        pwrite(&memfd, &[1], 8192).unwrap();
        assert_eq!(allocated_bytes(&memfd).unwrap(), 4096);
        assert!(ftruncate(&memfd, 1 << 20).is_err());
        assert!(ftruncate(&memfd, 8 << 20).is_err());
    }

    #[test]
    fn memory_that_is_not_mapped_is_an_error_with_figures() {
        let memfd = create_memfd(2 << 20).unwrap();
        assert!(memfd.as_raw_fd() > 0);
        let error = locate(memfd, std::process::id(), 2 << 20)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("0x0 of 0x200000 bytes are mapped"),
            "{error}"
        );
    }
}
