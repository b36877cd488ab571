//! `cargo +nightly fuzz run block_index`: an index is refused, or finds only blocks of that hash.
#![no_main]

use libfuzzer_sys::fuzz_target;
use torpor_build::{BlockIndex, Digest};
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
    let Ok(index) = BlockIndex::decode(bytes) else {
        return;
    };
    assert!(index.findable_blocks() <= index.len_blocks());
    assert_eq!(index.hash_of(index.len_blocks()), None);
    let hashes = (0..index.len_blocks()).filter_map(|block| index.hash_of(block));
    for hash in hashes.chain([Digest::of(b"no block")]) {
        if let Some(found) = index.find(&hash) {
            assert_eq!(index.hash_of(found), Some(hash));
        }
    }
});
