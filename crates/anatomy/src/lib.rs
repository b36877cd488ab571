//! Reads a stopped Linux guest's own page metadata: which pages are free, what the others are for.
//!
//! What crash-dump tools do when they leave free pages out of a dump (makedumpfile's `-d 16` is the
//! field's reference), done to a guest that goes on afterwards. Nothing need be asked of the guest:
//!
//! ```text
//! NoteLocation ─▶ crash note ─▶ kernel page tables ─▶ memory sections ─▶ page array ─▶ free blocks
//! (said once,     which values   4 or 5 levels         where the array    an entry      runs of
//!  after boot)    mean what                            lies               per page      pages
//! ```
//!
//! [`refusal`] says whether a kernel may be scanned at all; [`GuestKernel::find`] reads the note and
//! everything that leads to the page array; [`GuestKernel::free_pages`] walks along the array, and so
//! does [`GuestKernel::census`]. Memory is reached through [`PhysicalMemory`] alone. This crate knows no
//! VMM and no build, starts no thread and has no unsafe code. x86-64 guests with SPARSEMEM_EXTREME
//! (all of them), pages of 4 KiB.
//!
//! # Why it is exact
//! The kernel marks the head of a free block as the last step of freeing and takes the mark off as the
//! first step of handing it out (`mm/page_alloc.c`, both under the zone's lock). While all vCPUs stand
//! still a marked block is nobody's. Pages on per-CPU lists are free as well and bear no mark: they
//! are not found, which only costs room. Offline pages (`PageOffline`: a balloon's) belong to a driver
//! that has given up their content (`include/linux/page-flags.h`). All that holds for one instant: find
//! the kernel anew at each stop, carry no verdict over, and give free pages back **as zeroes**
//! (`init_on_free=1` relies on that; see [`refusal`]). And it holds for the kernel that runs: after a
//! kexec inside the guest the old kernel's note may still be readable, so the note's place must be
//! asked again of a guest that has booted again.
//!
//! Of the order beside the mark: the kernel stores the order first, then the mark (`set_buddy_order`,
//! `mm/page_alloc.c`), and x86 shows stores in their order. A compiler that swapped the two would open
//! a window of one instruction in which the order is an older value.
//!
//! # A hostile guest
//! The note, the tables, the sections and the array are the guest's word. The first thing that does
//! not fit is an error, and then no page is free. A guest that lies consistently loses its own pages and
//! nothing else. What it can cost the host is bounded by its RAM:
//!
//! | step | reads of guest memory | bytes |
//! |---|---|---|
//! | `find` | 64 for each GiB begun and each range of RAM | 4 KiB each |
//! | `free_pages`, `census` | 1,536 for each GiB begun, and 4 for each range | the array's, each byte at most once: 16 MiB for each GiB |
//!
//! The array may lie in 64 places, and 64 more for each GiB begun; a kernel that maps it page by page
//! in many places (hugetlb's vmemmap optimisation) is refused as well, because a read may mean a
//! decompression. Memory: results have at most an entry for every second page.
//!
//! An honest, tidy guest costs a tenth of that: behind a large free block only a short read is made,
//! so the entries of free memory are hardly read.

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
