//! Where a microvm's RAM lies in the guest's physical address space.
//!
//! Part of the machine's identity, like its devices: a build's memory is read by these addresses
//! long after its VMM has gone.

use crate::memory::RamSegment;

/// RAM below 4 GiB ends here: QEMU keeps the rest for devices (`MICROVM_MAX_BELOW_4G`).
const BELOW_4G_END: u64 = 0xc000_0000;
/// Where what does not fit goes on.
const ABOVE_4G_START: u64 = 1 << 32;
/// The firmware's shadow lies over the RAM here (`pc.bios`), up to 1 MiB: the guest never sees what
/// is below.
const FIRMWARE_START: u64 = 0xf_0000;
const FIRMWARE_END: u64 = 0x10_0000;

/// The RAM of a machine with this much memory, by address. (Verified with `info mtree -f` of QEMU
/// 7.2 and 10.0, and by reading the kernel's page metadata of guests on both sides of the hole.)
#[must_use]
pub(super) fn ram_layout(memory_bytes: u64) -> Vec<RamSegment> {
    let low = [
        (0, FIRMWARE_START.min(memory_bytes)),
        (FIRMWARE_END, BELOW_4G_END.min(memory_bytes)),
    ];
    let mut segments: Vec<_> = low
        .into_iter()
        .filter(|(start, end)| start < end)
        .map(|(start, end)| RamSegment {
            guest_addr: start,
            len_bytes: end - start,
            guest_offset_bytes: start,
        })
        .collect();
    if memory_bytes > BELOW_4G_END {
        segments.push(RamSegment {
            guest_addr: ABOVE_4G_START,
            len_bytes: memory_bytes - BELOW_4G_END,
            guest_offset_bytes: BELOW_4G_END,
        });
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_hole_goes_on_at_4_gib() {
        let segments = ram_layout(6 << 30);
        let last = segments.last().unwrap();
        assert_eq!(last.guest_addr, 1 << 32);
        assert_eq!(last.guest_offset_bytes, 3 << 30);
        assert_eq!(last.len_bytes, 3 << 30);
    }

    #[test]
    fn ram_is_in_order_and_covers_all_but_the_firmware() {
        for memory_bytes in [64 << 20, 512 << 20, 3 << 30, 4 << 30, 1 << 40] {
            let segments = ram_layout(memory_bytes);
            let sum: u64 = segments.iter().map(|segment| segment.len_bytes).sum();
            assert_eq!(sum, memory_bytes - (FIRMWARE_END - FIRMWARE_START));
            for pair in segments.windows(2) {
                assert!(pair[0].guest_addr + pair[0].len_bytes < pair[1].guest_addr);
            }
        }
    }
}
