//! `cargo +nightly fuzz run manifest`: anything between a right frame and a right checksum.
#![no_main]

use libfuzzer_sys::fuzz_target;
use torpor_build::{Digest, Manifest};

fuzz_target!(|body: &[u8]| {
    let checksum = Digest::of(body);
    let mut file = format!("{{\n\"checksum\": \"{checksum}\",\n\"manifest\": ").into_bytes();
    file.extend_from_slice(body);
    file.extend_from_slice(b"\n}\n");
    drop(Manifest::decode(&file));
    drop(Manifest::decode(body));
});
