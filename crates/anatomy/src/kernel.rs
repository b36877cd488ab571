//! A guest kernel as its note and its tables describe it.

use crate::{AnatomyError, Census, FreePages, NoteLocation, PhysicalMemory};

/// A guest kernel: what its note and its tables say, checked once per stop.
#[derive(Debug)]
pub struct GuestKernel {
    release: String,
}

impl GuestKernel {
    /// Reads and checks the note, the page tables and the sections of the page array.
    ///
    /// # Errors
    /// At the first thing that does not fit.
    pub fn find(_memory: &dyn PhysicalMemory, _note: NoteLocation) -> Result<Self, AnatomyError> {
        Err(AnatomyError::Ram {
            what: "not read yet",
        })
    }

    /// The kernel's release, as `uname -r` says it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Finds every page whose content the guest does not need.
    ///
    /// # Errors
    /// At the first thing that does not fit: no page is to be taken as free then.
    pub fn free_pages(&self, _memory: &dyn PhysicalMemory) -> Result<FreePages, AnatomyError> {
        Err(AnatomyError::Ram {
            what: "not read yet",
        })
    }

    /// Says of every page of RAM what it is used for.
    ///
    /// # Errors
    /// At the first thing that does not fit.
    pub fn census(&self, _memory: &dyn PhysicalMemory) -> Result<Census, AnatomyError> {
        Err(AnatomyError::Ram {
            what: "not read yet",
        })
    }
}
