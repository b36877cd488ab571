//! Where a booted Firecracker has its guest's memory. (A resumed one says so itself.)
//!
//! It is private anonymous memory, mapped without a reservation of swap (`MAP_NORESERVE`, `nr` in
//! /proc/PID/smaps; not on hosts with `vm.overcommit_memory=2`, where every mapping reserves). The kernel joins it with other such memory that happens to lie beside it (a
//! heap of the C library's, seen with 0x21000 bytes), so the length alone does not find it. What
//! does: Firecracker puts the kernel's command line at a fixed guest address, in the first MiB, which
//! Linux reserves and leaves as it is. The command line is ours, and is looked for right after the
//! start. What is not certain is an error: reading the wrong memory would make a build of rubbish.
//!
//! A guest with memory above 4 GiB has two regions, mapped one after the other. The kernel maps from the
//! top down, so it usually joins them, the later one in front of the first.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::error::{Result, VmmError};
use crate::memory::{MemoryMapping, RamSegment};

/// Where Firecracker puts the command line (`CMDLINE_START`, arch/x86_64/layout.rs).
const COMMAND_LINE_ADDR: u64 = 0x2_0000;
/// How much foreign memory a joined mapping may hold, beside the guest's own: so many places are
/// looked at.
const FOREIGN_BYTES_MAX: u64 = 256 << 20;
/// Mappings begin at whole pages.
const PAGE_BYTES: usize = 4096;

/// Finds the regions (the first begins at guest address 0) by what the kernel was given to read.
pub(super) fn locate(
    pid: u32,
    regions: &[RamSegment],
    command_line: &str,
) -> Result<Vec<MemoryMapping>> {
    let odd = |detail: String| VmmError::Mapping { pid, detail };
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).map_err(|e| odd(format!("{path}: {e}")))?;
    let path = format!("/proc/{pid}/mem");
    let mem = File::open(&path).map_err(|e| odd(format!("{path}: {e}")))?;
    let candidates = candidates_in(&text);
    let mut mappings: Vec<MemoryMapping> = Vec::with_capacity(regions.len());
    let later_len = regions.iter().skip(1).map(|region| region.len_bytes).sum();
    for region in regions {
        let places = match mappings.last() {
            None => places_of_first(&candidates, region.len_bytes, later_len, |host_addr| {
                holds(&mem, host_addr + COMMAND_LINE_ADDR, command_line)
            }),
            Some(first) => places_of_next(&candidates, region.len_bytes, first),
        };
        let [host_addr] = places.as_slice() else {
            return Err(odd(format!(
                "{:#x} bytes could be at {places:x?} of {candidates:x?}",
                region.len_bytes
            )));
        };
        mappings.push(MemoryMapping {
            host_addr: *host_addr,
            len_bytes: region.len_bytes,
            guest_offset_bytes: region.guest_offset_bytes,
        });
    }
    Ok(mappings)
}

/// Where `len` bytes fit in and are found to be the first region, alone or behind the later ones.
fn places_of_first(
    candidates: &[(u64, u64)],
    len: u64,
    later_len: u64,
    is_first: impl Fn(u64) -> bool,
) -> Vec<u64> {
    candidates
        .iter()
        .filter_map(|(start, candidate)| {
            let slack = candidate.checked_sub(len)?;
            let first_place = if slack <= FOREIGN_BYTES_MAX {
                0
            } else {
                let foreign = slack.checked_sub(later_len)?;
                (foreign <= FOREIGN_BYTES_MAX).then_some(later_len)?
            };
            Some(
                (first_place..=slack)
                    .step_by(PAGE_BYTES)
                    .map(move |at| start + at),
            )
        })
        .flatten()
        .filter(|host_addr| is_first(*host_addr))
        .collect()
}

/// A mapping of exactly that length, or the beginning of the one that goes on with the region
/// before: the kernel maps the later region below the earlier one.
fn places_of_next(candidates: &[(u64, u64)], len: u64, before: &MemoryMapping) -> Vec<u64> {
    let joined = before.host_addr.checked_sub(len);
    candidates
        .iter()
        .filter(|(start, candidate)| {
            let alone = *candidate == len && *start != before.host_addr;
            alone || (Some(*start) == joined && *candidate > len)
        })
        .map(|(start, _)| *start)
        .collect()
}

fn holds(mem: &File, host_addr: u64, text: &str) -> bool {
    let mut bytes = vec![0; text.len()];
    mem.read_exact_at(&mut bytes, host_addr).is_ok() && bytes == text.as_bytes()
}

/// Address and length of the anonymous private mappings that reserve no swap; of all, where none is
/// marked so.
fn candidates_in(smaps: &str) -> Vec<(u64, u64)> {
    let (mut without_reserve, mut all) = (Vec::new(), Vec::new());
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            all.extend(current);
            if flags.split_whitespace().any(|flag| flag == "nr") {
                without_reserve.extend(current);
            }
            current = None;
        } else if let Some(mapping) = anonymous_private(line) {
            current = Some(mapping);
        }
    }
    if without_reserve.is_empty() {
        all
    } else {
        without_reserve
    }
}

/// `7f00-7fff rw-p 00000000 00:00 0` (proc_pid_maps(5)): no inode and no name.
fn anonymous_private(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    );
    let ours = fields.next()? == "rw-p" && fields.nth(2)? == "0" && fields.next().is_none();
    ours.then_some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
VmFlags: rd wr mr mw me ac nr sd
7f0020000000-7f0030000000 rw-p 00000000 00:00 0
Size:             262144 kB
VmFlags: rd wr mr mw me ac sd
7f0040000000-7f0050000000 rw-s 00000000 00:01 77   /memfd:other (deleted)
VmFlags: rd wr sh mr mw me ms nr sd
7f0060000000-7f0060021000 rw-p 00000000 00:00 0    [heap]
VmFlags: rd wr mr mw me ac nr
";

    #[test]
    fn only_private_anonymous_memory_without_reserve_counts() {
        assert_eq!(candidates_in(SMAPS), [(0x7f00_0000_0000, 0x1000_0000)]);
    }

    #[test]
    fn where_all_memory_reserves_all_private_anonymous_memory_counts() {
        let reserved = SMAPS.replace(" nr", "");
        let found = candidates_in(&reserved);
        let both = [
            (0x7f00_0000_0000, 0x1000_0000),
            (0x7f00_2000_0000, 0x1000_0000),
        ];
        assert_eq!(found, both);
    }

    #[test]
    fn memory_that_was_joined_with_foreign_memory_is_found_by_its_command_line() {
        const LEN: u64 = 1 << 20;
        let text = "console=ttyS0 torpor.test=memory";
        let mut map = memmap2::MmapOptions::new()
            .len(usize::try_from(LEN + 0x2_1000).unwrap())
            .no_reserve_swap()
            .map_anon()
            .unwrap();
        // Foreign memory of 0x3000 bytes in front, the rest behind.
        let at = usize::try_from(0x3000 + COMMAND_LINE_ADDR).unwrap();
        map[at..at + text.len()].copy_from_slice(text.as_bytes());
        let start = map.as_ptr().addr() as u64;
        let is_first = |host_addr| {
            let mem = File::open("/proc/self/mem").unwrap();
            holds(&mem, host_addr + COMMAND_LINE_ADDR, text)
        };
        let candidates = [(start, map.len() as u64), (start, LEN / 2)];
        assert_eq!(
            places_of_first(&candidates, LEN, 0, is_first),
            [start + 0x3000]
        );
    }

    #[test]
    fn two_regions_that_were_joined_are_both_found() {
        const FIRST_LEN: u64 = 1 << 20;
        const LATER_LEN: u64 = FOREIGN_BYTES_MAX + (64 << 20);
        let text = "console=ttyS0 torpor.test=joined";
        for foreign_behind in [0, 0x2_1000] {
            let len = LATER_LEN + FIRST_LEN + foreign_behind;
            let mut map = memmap2::MmapOptions::new()
                .len(usize::try_from(len).unwrap())
                .no_reserve_swap()
                .map_anon()
                .unwrap();
            let at = usize::try_from(LATER_LEN + COMMAND_LINE_ADDR).unwrap();
            map[at..at + text.len()].copy_from_slice(text.as_bytes());
            let start = map.as_ptr().addr() as u64;
            let mem = File::open("/proc/self/mem").unwrap();
            let is_first = |host_addr| holds(&mem, host_addr + COMMAND_LINE_ADDR, text);
            let candidates = [(start, len)];
            let places = places_of_first(&candidates, FIRST_LEN, LATER_LEN, is_first);
            assert_eq!(places, [start + LATER_LEN]);
            let first = MemoryMapping {
                host_addr: places[0],
                len_bytes: FIRST_LEN,
                guest_offset_bytes: 0,
            };
            assert_eq!(places_of_next(&candidates, LATER_LEN, &first), [start]);
        }
    }

    #[test]
    fn the_second_region_is_alone_or_right_below_the_first() {
        let first = MemoryMapping {
            host_addr: 0x9000_0000,
            len_bytes: 0x2000_0000,
            guest_offset_bytes: 0,
        };
        let len = 0x1000_0000;
        let joined = [(0x8000_0000, 0x3000_0000)];
        assert_eq!(places_of_next(&joined, len, &first), [0x8000_0000]);
        let alone = [(0x1000_0000, len), (0x9000_0000, 0x2000_0000)];
        assert_eq!(places_of_next(&alone, len, &first), [0x1000_0000]);
        let foreign_in_front = [(0x7fff_0000, 0x3001_0000)];
        assert!(places_of_next(&foreign_in_front, len, &first).is_empty());
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_with_what_is() {
        let region = RamSegment {
            guest_addr: 0,
            len_bytes: 1 << 50,
            guest_offset_bytes: 0,
        };
        let error = locate(std::process::id(), &[region], "")
            .unwrap_err()
            .to_string();
        assert!(error.contains("0x4000000000000 bytes"), "{error}");
    }
}
