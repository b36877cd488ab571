//! `cargo +nightly fuzz run handshake`: a message is refused, or names memory that can be served.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| torpor_pager::fuzz::handshake(message));
