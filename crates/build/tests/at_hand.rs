//! What the host's page cache holds of a build is read without waiting; nothing else is.
#![allow(
    missing_docs,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "test code, which says what it did not run"
)]

mod common;

use std::fs::File;
use std::path::Path;

use common::{Push, TestStorage, import, pages, store_referring};
use rustix::fs::{Advice, fadvise};
use torpor_build::{ImageReader, PAGE_SIZE, Storage};

/// Drops a synced file from the host's page cache.
fn drop_cached(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

/// On a disk: a file in memory cannot be read without waiting, and is never dropped.
fn storage() -> TestStorage {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(&dir.path().join("storage")).unwrap();
    TestStorage { storage, dir }
}

/// Reads some pages both ways. `false`: this file system cannot read without waiting.
fn cached_reads_work(reader: &ImageReader, pages: u64) -> bool {
    let mut bytes = vec![0; usize::try_from(pages).unwrap() * PAGE_SIZE];
    reader.read_pages(0, &mut bytes).unwrap();
    let works = reader.try_read_pages(0, &mut bytes);
    if !works {
        eprintln!("not run: this file system cannot read without waiting");
    }
    works
}

#[test]
fn what_is_cached_is_read_without_waiting_and_what_is_not_is_not() {
    let storage = storage();
    // Blocks of the base image, pages that compress and pages that do not, free ones.
    let base_image = import(&storage, &[101, 102, 103, 104], b"");
    let seeds: Vec<u64> = (101..105)
        .chain((1..40).map(|n| 2 * n))
        .chain((1..40).map(|n| 2 * n + 1001))
        .collect();
    let memory = [Push::Free(4), Push::Data(seeds.clone())];
    let (build, _) = store_referring(&storage, None, &base_image, &memory);
    let expected = [vec![0; 4 * PAGE_SIZE], pages(&seeds)].concat();

    let reader = build.memory().unwrap();
    let mut found = vec![0xaa; expected.len()];
    let data_page = |seed: usize| (seed * PAGE_SIZE)..((seed + 1) * PAGE_SIZE);
    assert!(
        !reader.try_read_pages(10, &mut found[data_page(10)]),
        "opening a layer's file is a wait"
    );
    if !cached_reads_work(&reader, reader.len_pages()) {
        return;
    }
    assert!(reader.try_read_pages(0, &mut found));
    assert_eq!(found, expected);
    assert!(!reader.try_read_pages(expected.len() as u64, &mut found[..PAGE_SIZE]));

    let build_page = 4 + 30;
    drop_cached(&build.path().join("memory.data"));
    drop_cached(base_image.path());
    let reader = build.memory().unwrap();
    let mut page = vec![0; PAGE_SIZE];
    reader.read_pages(build_page, &mut page).unwrap();
    let far = 4 + 4 + 39 + 30;
    // A try that finds nothing has the kernel begin to read, and finds it read if it is stopped just
    // then: one that waits would find it each time.
    let mut refused = |what: &str, path: &Path, cold: u64| {
        let refused = (0..3).any(|_| {
            drop_cached(path);
            !reader.try_read_pages(cold, &mut page)
        });
        assert!(refused, "{what} that was dropped");
    };
    refused("a frame", &build.path().join("memory.data"), far);
    refused("a block", base_image.path(), 4);
    for cold in [far, 4] {
        reader.read_pages(cold, &mut page).unwrap();
        page.fill(0);
        assert!(reader.try_read_pages(cold, &mut page));
        let at = usize::try_from(cold).unwrap();
        assert_eq!(page, expected[data_page(at)]);
    }
}

#[test]
fn what_does_not_verify_is_not_at_hand() {
    let storage = storage();
    let build = common::store(&storage, None, &[Push::Data((1..20).collect())]);
    let reader = build.memory().unwrap();
    let mut found = vec![0; 19 * PAGE_SIZE];
    if !cached_reads_work(&reader, 19) {
        return;
    }
    let path = build.path().join("memory.data");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(&path, bytes).unwrap();
    assert!(!reader.try_read_pages(0, &mut found));
    assert!(reader.read_pages(0, &mut found).is_err());
}
