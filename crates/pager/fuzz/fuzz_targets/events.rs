//! `cargo +nightly fuzz run events`: whatever the kernel says, the page states stay in step.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| torpor_pager::fuzz::events(bytes));
