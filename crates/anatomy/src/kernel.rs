//! A guest kernel as its note and its tables describe it.

use crate::array::PageArray;
use crate::memory::Ram;
use crate::note::{self, KernelNote};
use crate::tables::Tables;
use crate::{AnatomyError, Census, FreePages, NoteLocation, PhysicalMemory, RamRange};
use crate::{census, free};

/// A guest kernel: what its note and its tables say, read and checked once per stop.
///
/// It holds true only as long as the guest stands still: find it anew at the next stop.
#[derive(Debug)]
pub struct GuestKernel {
    note: KernelNote,
    array: PageArray,
    ram: Vec<RamRange>,
}

impl GuestKernel {
    /// Reads and checks the note, the page tables and the sections of the page array.
    ///
    /// # Errors
    /// At the first thing that does not fit, or when memory cannot be read.
    pub fn find(memory: &dyn PhysicalMemory, note: NoteLocation) -> Result<Self, AnatomyError> {
        let ram = Ram::new(memory)?;
        let note = note::read(&ram, note)?;
        let mut tables = Tables::new(&ram, note.top_table, note.five_levels);
        let array = PageArray::find(&ram, &mut tables, &note)?;
        Ok(Self {
            note,
            array,
            ram: ram.ranges().to_vec(),
        })
    }

    /// The kernel's release, as `uname -r` says it: at most 64 printable characters.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.note.release
    }

    /// Finds every page whose content the guest does not need.
    ///
    /// # Errors
    /// At the first thing that does not fit, or when memory cannot be read: no page is to be taken as
    /// free then.
    pub fn free_pages(&self, memory: &dyn PhysicalMemory) -> Result<FreePages, AnatomyError> {
        free::find(&self.same_ram(memory)?, &self.array, &self.note.entry)
    }

    /// Says of every page of RAM what it is used for.
    ///
    /// # Errors
    /// At the first thing that does not fit, or when memory cannot be read.
    pub fn census(&self, memory: &dyn PhysicalMemory) -> Result<Census, AnatomyError> {
        census::take(&self.same_ram(memory)?, &self.array, &self.note.entry)
    }

    fn same_ram<'a>(&self, memory: &'a dyn PhysicalMemory) -> Result<Ram<'a>, AnatomyError> {
        let ram = Ram::new(memory)?;
        if ram.ranges() == self.ram {
            Ok(ram)
        } else {
            let what = "they have changed since the kernel was found";
            Err(AnatomyError::Ram { what })
        }
    }
}
