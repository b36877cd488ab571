//! Reads a stopped Linux guest's own page metadata: which pages are free, what the others are for.

mod array;
mod census;
mod entry;
mod error;
mod free;
mod kernel;
mod memory;
mod note;
mod refusal;
mod tables;

pub use census::{Census, ClassRun, PageClass};
pub use entry::BLOCK_ORDER_MAX;
pub use error::AnatomyError;
pub use free::{FreePages, PfnRun};
pub use kernel::GuestKernel;
pub use memory::{PAGE_SIZE, PhysicalMemory, RAM_END_MAX, RAM_RANGES_MAX, RamRange};
pub use note::{NoteLocation, ParseNoteLocationError};
pub use refusal::{Refusal, refusal};
