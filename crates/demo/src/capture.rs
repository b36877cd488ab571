//! What `torpor-bench-capture` measures: the scan of the stopped guest, references to the base image,
//! and what others do with the same guest.
//!
//! ```text
//! stopped     a stopped guest's memory file: its bytes by physical address, its pages with data
//! zoneinfo    what the guest's kernel says of its per-CPU lists
//! scan_time   the scan alone: sizes, fragmented guests, a lazily resumed one; beside it plain reads
//! fragmented  small files, every other one deleted: what the scan leaves, what reporting leaves
//! pauses      request to paused, again and again: by the scan, and by reclaim and drain
//! warm        the next command of a resumed guest whose page cache was kept, or dropped
//! peers       the same stopped guest as others store it
//! summary     a line for each figure: ours, the machine's limit, the peer's, the target
//! tables      all of it for a person;  picture: bars
//! ```
//!
//! A missed target is a figure like any other. Where a figure would need a guess, there is none.

pub mod fragmented;
pub mod pauses;
pub mod peers;
pub mod picture;
pub mod scan_time;
pub mod scattered;
pub mod stopped;
pub mod summary;
pub mod tables;
pub mod warm;
pub mod zoneinfo;
