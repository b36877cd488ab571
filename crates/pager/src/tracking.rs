//! How writes are tracked, and what this host's kernel offers for it.
//!
//! Each mode names the features without which it cannot be right, so that a kernel that lacks one
//! is refused at the start, by that feature's name. Nothing here holds a guest's descriptor.

use crate::error::PagerError;
use crate::uffd_abi::{
    FEATURE_EVENT_REMOVE, FEATURE_PAGEFAULT_FLAG_WP, FEATURE_WP_ASYNC, FEATURE_WP_HUGETLBFS_SHMEM,
    FEATURE_WP_UNPOPULATED, USER_MODE_ONLY, api, create,
};

/// How the pager learns which pages the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteTracking {
    /// The kernel lifts the protection of a written page by itself, and PAGEMAP_SCAN finds the
    /// written ones. Costs the guest nothing it notices. Kernel 6.7 or newer.
    Async,
    /// Each first write to a page is a fault that the pager answers. For older kernels
    /// (5.7 for anonymous memory, 5.19 for shared).
    Sync,
    /// No tracking: there is no dirty set.
    Off,
}

impl WriteTracking {
    /// The best that this host's kernel offers.
    ///
    /// # Errors
    /// The host has no userfaultfd, or its features cannot be asked for.
    pub fn best_of_host() -> Result<Self, PagerError> {
        let features = host_features()?;
        let offers = |wanted: u64| features & wanted == wanted;
        Ok(if offers(FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED) {
            Self::Async
        } else if offers(FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM) {
            Self::Sync
        } else {
            Self::Off
        })
    }

    /// Features without which this tracking cannot be right, with their kernel names.
    pub(crate) fn required(self) -> &'static [(u64, &'static str)] {
        const REMOVE: (u64, &str) = (FEATURE_EVENT_REMOVE, "UFFD_FEATURE_EVENT_REMOVE");
        const WP: (u64, &str) = (FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP");
        const ASYNC: (u64, &str) = (FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC");
        const UNPOPULATED: (u64, &str) = (FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED");
        match self {
            Self::Async => &[REMOVE, WP, UNPOPULATED, ASYNC],
            Self::Sync => &[REMOVE, WP],
            Self::Off => &[REMOVE],
        }
    }

    /// Whether pages are installed write-protected.
    pub(crate) fn protects(self) -> bool {
        self != Self::Off
    }
}

/// The features of this host's kernel, asked of a descriptor that is then thrown away: asking
/// settles a descriptor's features for good.
pub(crate) fn host_features() -> Result<u64, PagerError> {
    let probe = create(USER_MODE_ONLY).or_else(|_| create(0))?;
    api(&probe, 0).map_err(|source| PagerError::Setup {
        step: "ask for the kernel's features (UFFDIO_API)",
        next_step: "the kernel speaks another userfaultfd than 0xAA",
        source,
    })
}
