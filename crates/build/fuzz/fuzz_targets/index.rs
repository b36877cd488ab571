//! `cargo +nightly fuzz run index`: an index is refused, or means exactly the bytes it came from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use torpor_build::Index;
use xxhash_rust::xxh3::Xxh3;

fuzz_target!(|bytes: Vec<u8>| {
    let mut bytes = bytes;
    if bytes.len() >= 24 {
        // A right checksum: otherwise nothing behind it would ever be reached.
        let mut hasher = Xxh3::new();
        hasher.update(&bytes[..16]);
        hasher.update(&bytes[24..]);
        let checksum = hasher.digest();
        bytes[16..24].copy_from_slice(&checksum.to_le_bytes());
    }
    if let Ok(index) = Index::decode(&bytes) {
        assert_eq!(index.encode().unwrap(), bytes);
        for run in index.runs() {
            assert_eq!(index.run_at(run.first_page), Some(run));
        }
    }
});
