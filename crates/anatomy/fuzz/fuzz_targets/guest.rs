//! `cargo +nightly fuzz run guest`: a kernel whose note, tables, sections and page array are spoilt is
//! refused, or read at a bounded cost. The same harness runs as a proptest in `tests/lies.rs`.
#![no_main]

#[path = "../../tests/support/mod.rs"]
mod support;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| support::harness::run(input));
