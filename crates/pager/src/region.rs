//! A piece of guest memory, as the VMM has it mapped.
//!
//! Regions come from outside (a VMM's handshake): whatever computes with one has had it checked
//! first, and then no sum of its fields overflows.

use crate::error::PagerError;
use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE_U64};

/// A piece of guest memory in the VMM's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the VMM has it mapped.
    pub host_addr: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Its offset in the guest's memory file.
    pub guest_offset_bytes: u64,
    /// The size of the pages that back it: 4096, or 2 MiB for anonymous memory of huge pages
    /// (`MAP_HUGETLB`). Transparent huge pages are 4096: the kernel splits them by itself.
    pub page_size: u32,
}

impl Region {
    /// Checks what cannot be served.
    pub(crate) fn check(&self) -> Result<(), PagerError> {
        let refuse = |why| {
            Err(PagerError::Region {
                host_addr: self.host_addr,
                len_bytes: self.len_bytes,
                guest_offset_bytes: self.guest_offset_bytes,
                why,
            })
        };
        let page_bytes = u64::from(self.page_size);
        if ![PAGE_SIZE_U64, HUGE_PAGE_BYTES].contains(&page_bytes) {
            return refuse("only memory of 4 KiB or 2 MiB pages is served");
        }
        let values = [self.host_addr, self.len_bytes, self.guest_offset_bytes];
        if values.iter().any(|value| value % page_bytes != 0) || self.len_bytes == 0 {
            return refuse("address, length and offset must be whole pages, the length not zero");
        }
        if self.host_addr.checked_add(self.len_bytes).is_none()
            || self
                .guest_offset_bytes
                .checked_add(self.len_bytes)
                .is_none()
        {
            return refuse("it ends beyond the address space");
        }
        Ok(())
    }

    pub(crate) fn host_end(&self) -> u64 {
        self.host_addr + self.len_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_that_cannot_be_served_is_refused_with_its_reason() {
        let region = |host_addr, len_bytes, page_size| Region {
            host_addr,
            len_bytes,
            guest_offset_bytes: 0,
            page_size,
        };
        assert!(region(4096, 8192, 4096).check().is_ok());
        assert!(region(2 << 20, 4 << 20, 2 << 20).check().is_ok());
        for (bad, why) in [
            (region(4096, 8192, 1 << 30), "4 KiB or 2 MiB"),
            (region(4096, 8192, u32::MAX), "4 KiB or 2 MiB"),
            (region(2 << 20, 3 << 20, 2 << 20), "whole pages"),
            (region(1 << 20, 2 << 20, 2 << 20), "whole pages"),
            (region(4097, 8192, 4096), "whole pages"),
            (region(4096, 0, 4096), "not zero"),
            (
                region(u64::MAX - 4095, 8192, 4096),
                "beyond the address space",
            ),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
