//! Whatever happens to a base image or the index of its blocks, a reference reads as the right
//! bytes or is an error, and a page becomes a reference only if the bytes are there.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use common::{
    Push, TestStorage, block_index_path, import, page, pages, read_all, sign, storage,
    store_referring,
};
use torpor_build::{
    BaseImage, BlockIndex, Build, Digest, Error, FormatError, ImageKind, PAGE_SIZE, ValidateOptions,
};

const BLOCKS: [u64; 4] = [1, 2, 0, 3];
const MEMORY: [u64; 4] = [3, 2, 1, 7];

fn referring(storage: &TestStorage) -> (Build, Arc<BaseImage>) {
    let image = import(storage, &BLOCKS, b"tail");
    let memory = [Push::Data(MEMORY.to_vec())];
    let (build, summary) = store_referring(storage, None, &image, &memory);
    assert_eq!(summary.base_image_pages, 3);
    (build, image)
}

/// In place, as a disk does it; tests run as the owner, who may make it writable.
fn flip(path: &Path, position: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[position] ^= 1 << (position % 8);
    overwrite(path, &bytes);
}

/// Another inode in its place: the old one may be mapped.
fn overwrite(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_under_a_reference_is_an_error_that_names_file_and_offset() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let path = image.path().to_owned();
    let original = std::fs::read(&path).unwrap();
    for (block, page_number) in [(0, 2), (1, 1), (3, 0)] {
        for position in [0, 1000, PAGE_SIZE - 1] {
            flip(&path, block * PAGE_SIZE + position);
            let reader = build.memory().unwrap();
            let mut bytes = vec![0; PAGE_SIZE];
            let error = reader.read_pages(page_number, &mut bytes).unwrap_err();
            let at = (block * PAGE_SIZE) as u64;
            assert!(
                matches!(&error, Error::Damaged { path: named, offset, .. }
                    if *named == path && *offset == at),
                "{error}"
            );
            for other in (0..4).filter(|other| *other != page_number) {
                reader.read_pages(other, &mut bytes).unwrap();
                assert!(bytes == page(MEMORY[usize::try_from(other).unwrap()]));
            }
            read_all(&build, ImageKind::Memory).unwrap_err();
            let found = build.validate(ValidateOptions::default());
            let named = |problem: &Error| problem.to_string().contains(path.to_str().unwrap());
            // The block and the image's digest.
            assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
            assert!(found.problems.iter().all(named), "{:?}", found.problems);
            overwrite(&path, &original);
        }
    }
    assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&MEMORY));
}

#[test]
fn a_page_is_stored_where_the_image_does_not_hold_its_bytes_any_more() {
    let storage = storage();
    let (_, image) = referring(&storage);
    flip(image.path(), PAGE_SIZE + 7);
    let damaged = storage.base_image(&image.digest()).unwrap();
    let memory = [Push::Data(MEMORY.to_vec())];
    let (build, summary) = store_referring(&storage, None, &damaged, &memory);
    assert_eq!((summary.base_image_pages, summary.stored_pages), (2, 2));
    assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&MEMORY));
}

#[test]
fn an_image_of_another_length_is_refused() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let path = image.path().to_owned();
    let original = std::fs::read(&path).unwrap();
    let longer = [&original[..], b"x"].concat();
    for bytes in [&original[..original.len() - 1], &original[..100], &longer] {
        overwrite(&path, bytes);
        let error = build.memory().unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { path: named, .. } if *named == path),
            "{error}"
        );
    }
    std::fs::remove_file(&path).unwrap();
    let error = build.memory().unwrap_err();
    assert!(matches!(error, Error::UnknownImage { .. }), "{error}");
}

/// With this in the index's place, reads are right, and the index is made again.
fn is_made_again(build: &Build, index: &Path, original: &[u8], damaged: &[u8], what: &str) {
    overwrite(index, damaged);
    let read = read_all(build, ImageKind::Memory).unwrap();
    assert!(read == pages(&MEMORY), "{what}: wrong bytes were read");
    assert!(std::fs::read(index).unwrap() == original, "{what}");
    let mode = std::fs::metadata(index).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444, "{what}");
}

#[test]
fn a_damaged_block_index_is_refused_and_made_again() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let index = block_index_path(&storage, &image.digest());
    let original = std::fs::read(&index).unwrap();
    for position in 0..original.len() {
        let mut bytes = original.clone();
        bytes[position] ^= 1 << (position % 8);
        let refused = BlockIndex::decode(bytes.as_slice()).map(|_| ());
        // A higher version is not damage: see below.
        if (8..12).contains(&position) {
            let newer = matches!(refused, Err(FormatError::Newer { known: 1, .. }));
            assert!(newer || bytes[8] == 0, "{position}");
            continue;
        }
        assert!(
            matches!(refused, Err(FormatError::Damaged { .. })),
            "{position}"
        );
        is_made_again(
            &build,
            &index,
            &original,
            &bytes,
            &format!("byte {position}"),
        );
    }
}

#[test]
fn a_block_index_cut_off_anywhere_or_too_long_is_refused_and_made_again() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let index = block_index_path(&storage, &image.digest());
    let original = std::fs::read(&index).unwrap();
    let cut = (0..original.len())
        .step_by(7)
        .map(|len| original[..len].to_vec());
    let longer = [
        [&original[..], b"x"].concat(),
        [&original[..], &[0; 36]].concat(),
    ];
    for bytes in cut.chain(longer) {
        let refused = BlockIndex::decode(bytes.as_slice()).map(|_| ());
        assert!(matches!(refused, Err(FormatError::Damaged { .. })));
        is_made_again(
            &build,
            &index,
            &original,
            &bytes,
            &format!("{} bytes", bytes.len()),
        );
    }
}

#[test]
fn the_block_index_of_another_image_is_refused_and_made_again() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let other = import(&storage, &[9, 9, 9, 9], b"tail");
    let index = block_index_path(&storage, &image.digest());
    let original = std::fs::read(&index).unwrap();
    let strange = std::fs::read(block_index_path(&storage, &other.digest())).unwrap();
    is_made_again(&build, &index, &original, &strange, "another image's");
}

#[test]
fn a_newer_block_index_is_refused_and_left_alone() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let index = block_index_path(&storage, &image.digest());
    let mut bytes = std::fs::read(&index).unwrap();
    bytes[8] = 2;
    let end = bytes.len();
    sign(&mut bytes, end);
    overwrite(&index, &bytes);
    let original = storage.dir.path().join("base image");
    let errors = [
        storage.base_image(&image.digest()).unwrap_err(),
        build.memory().unwrap_err(),
        storage.import_image(&original).unwrap_err(),
    ];
    for error in errors {
        assert!(
            matches!(&error, Error::Newer { path, found: 2, known: 1 } if *path == index),
            "{error}"
        );
    }
    assert!(std::fs::read(&index).unwrap() == bytes);
}

#[test]
fn lengths_that_do_not_fit_together_are_refused_however_well_signed() {
    let storage = storage();
    let (_, image) = referring(&storage);
    let original = std::fs::read(block_index_path(&storage, &image.digest())).unwrap();
    // The block's size, the image's length, the numbers of blocks.
    for (at, value) in [(12, 8192), (56, 5 * 4096), (64, 3), (64, u32::MAX), (68, 4)] {
        let mut bytes = original.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let end = bytes.len();
        sign(&mut bytes, end);
        let refused = BlockIndex::decode(bytes).map(|_| ());
        assert!(matches!(refused, Err(FormatError::Damaged { .. })), "{at}");
    }
}

#[test]
fn numbers_of_no_block_and_in_no_order_are_never_found() {
    let storage = storage();
    let (_, image) = referring(&storage);
    let original = std::fs::read(block_index_path(&storage, &image.digest())).unwrap();
    let numbers_at = original.len() - 3 * 4;
    let hashes = BLOCKS.map(|seed| Digest::of(&page(seed)));
    for numbers in [[u32::MAX; 3], [4, 4, 4], [2, 2, 2], [3, 1, 0], [0, 0, 0]] {
        let mut bytes = original.clone();
        let encoded = numbers.map(u32::to_le_bytes).concat();
        bytes[numbers_at..].copy_from_slice(&encoded);
        let end = bytes.len();
        sign(&mut bytes, end);
        let index = BlockIndex::decode(bytes).unwrap();
        for hash in &hashes {
            if let Some(found) = index.find(hash) {
                assert_eq!(index.hash_of(found).as_ref(), Some(hash), "{numbers:?}");
            }
        }
    }
}

#[test]
fn an_index_is_not_made_from_a_damaged_image() {
    let storage = storage();
    let (build, image) = referring(&storage);
    let index = block_index_path(&storage, &image.digest());
    std::fs::remove_file(&index).unwrap();
    // In a block that nobody refers to.
    flip(image.path(), 2 * PAGE_SIZE);
    for error in [
        storage.base_image(&image.digest()).unwrap_err(),
        build.memory().unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::Damaged { path, .. } if path == image.path()),
            "{error}"
        );
    }
    assert!(!index.exists());
    // An import brings both back.
    drop(image);
    let image = import(&storage, &BLOCKS, b"tail");
    assert!(index.exists());
    assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&MEMORY));
    assert_eq!(image.len_blocks(), 4);
}
