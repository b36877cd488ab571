//! The bytes on disk, pinned. If a test here fails, the format has changed: that takes a new
//! version number, and the old version stays readable.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::path::{Path, PathBuf};

use common::{Push, page, pages, read_all, storage, write_image};
use proptest::collection::vec;
use proptest::prelude::*;
use torpor_build::{
    BuildId, BuildInfo, Digest, Entry, FormatError, ImageKind, Index, IndexBuilder, Manifest,
    ValidateOptions, VmmRecord,
};
use xxhash_rust::xxh3::Xxh3;

const ID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const OTHER_ID: &str = "ffeeddcc-bbaa-9988-7766-554433221100";

fn small_index() -> Index {
    let mut builder = IndexBuilder::new(ID.parse().unwrap(), ImageKind::Disk);
    assert_eq!(builder.add_layer(OTHER_ID.parse().unwrap()).unwrap(), 0);
    assert_eq!(builder.add_layer(ID.parse().unwrap()).unwrap(), 1);
    for (pages, what) in [
        (1, Entry::Free),
        (2, Entry::Removed),
        (3, Entry::Zero),
        (
            0x0102_0304,
            Entry::Layer {
                layer: 1,
                offset_pages: 0x0506_0708_090a,
            },
        ),
        (4, Entry::BaseImage { block: 0x0b0c }),
    ] {
        builder.append(pages, what).unwrap();
    }
    builder.finish()
}

#[test]
fn version_1_of_the_index_has_these_bytes() {
    #[rustfmt::skip]
    let expected: Vec<u8> = [
        b"torporIX".as_slice(),
        &[1, 0, 0, 0], // version
        &[2, 0, 0, 0], // disk
        &[0xf5, 0x87, 0xcd, 0x7d, 0x20, 0x1f, 0xc6, 0x76], // checksum
        &[0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff],
        &[0x0e, 0x03, 0x02, 0x01, 0, 0, 0, 0], // pages
        &[2, 0, 0, 0], // layers
        &[5, 0, 0, 0], // runs
        &[0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0x00],
        &[0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3],
        &[4, 3, 2, 1, 1, 0, 0, 0, 0x0a, 9, 8, 7, 6, 5, 0, 4],
        &[4, 0, 0, 0, 0, 0, 0, 0, 0x0c, 0x0b, 0, 0, 0, 0, 0, 5],
    ].concat();
    let encoded = small_index().encode().unwrap();
    assert_eq!(encoded, expected);
    assert_eq!(Index::decode(&expected).unwrap(), small_index());
}

/// Three blocks, of which the first is zeros, and the last two are equal, and a tail.
#[test]
fn version_1_of_the_block_index_has_these_bytes() {
    let storage = storage();
    let image = common::import(&storage, &[0, 2, 2], b"tail");
    let content = [&pages(&[0, 2, 2])[..], b"tail"].concat();
    let zero = blake3::hash(&page(0));
    let two = blake3::hash(&page(2));
    #[rustfmt::skip]
    let expected: Vec<u8> = [
        b"torporBX".as_slice(),
        &[1, 0, 0, 0], // version
        &[0, 0x10, 0, 0], // bytes in a block
        &[0x77, 0x87, 0x70, 0x12, 0xff, 0x7c, 0x69, 0xbd], // checksum
        blake3::hash(&content).as_bytes(),
        &[4, 0x30, 0, 0, 0, 0, 0, 0], // bytes in the image
        &[3, 0, 0, 0], // blocks
        &[1, 0, 0, 0], // blocks that can be found
        zero.as_bytes(),
        two.as_bytes(),
        two.as_bytes(),
        &[1, 0, 0, 0], // sorted by hash
    ].concat();
    let found = std::fs::read(common::block_index_path(&storage, &image.digest())).unwrap();
    assert_eq!(found, expected);
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/v1")
        .join(ID)
}

/// Random pages, which are stored as they are, in memory; pages that LZ4 makes smaller on the disk.
const MEMORY: [u64; 5] = [1, 0, 3, 1, 5];
const DISK: [u64; 20] = [
    2, 4, 6, 8, 0, 0, 2, 4, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32,
];

fn fixture_info() -> BuildInfo {
    BuildInfo {
        template: Some("debian".parse().unwrap()),
        memory_bytes: 5 * 4096,
        disk_bytes: 20 * 4096,
        vcpus: 1,
        vmm: VmmRecord {
            name: "qemu".to_owned(),
            version: "7.2.0".to_owned(),
            machine: "microvm".to_owned(),
            accel: "tcg".to_owned(),
        },
        cmdline: "console=ttyS0".to_owned(),
        working_set: vec![(0, 1).into(), (3, 2).into()],
        pause_report: serde_json::json!({"freeze_ms": 3}),
        ..BuildInfo::default()
    }
}

fn store_fixture(storage: &torpor_build::Storage) -> torpor_build::Build {
    let staged = storage.begin_build(ID.parse().unwrap()).unwrap();
    write_image(
        &staged,
        ImageKind::Memory,
        None,
        &[Push::Data(MEMORY.to_vec())],
    )
    .unwrap();
    write_image(&staged, ImageKind::Disk, None, &[Push::Data(DISK.to_vec())]).unwrap();
    staged.write_vmstate(b"device state").unwrap();
    staged.commit(fixture_info()).unwrap()
}

/// Wrote the fixture, once: `TORPOR_WRITE_FIXTURE=1 cargo test -p torpor-build --test format`. For
/// a new version, a new folder.
#[test]
fn write_fixture() {
    if std::env::var_os("TORPOR_WRITE_FIXTURE").is_none() {
        return;
    }
    let storage = storage();
    let build = store_fixture(&storage);
    std::fs::create_dir_all(fixture()).unwrap();
    for entry in std::fs::read_dir(build.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), fixture().join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_build_of_version_1_is_read_as_it_was_stored() {
    let storage = storage();
    let target = storage.root().join("builds").join(ID);
    std::fs::create_dir(&target).unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
    }
    let build = storage.open_build(&ID.parse().unwrap()).unwrap();
    assert_eq!(build.manifest().info, fixture_info());
    assert!(read_all(&build, ImageKind::Memory).unwrap() == pages(&MEMORY));
    assert!(read_all(&build, ImageKind::Disk).unwrap() == pages(&DISK));
    assert_eq!(build.read_vmstate().unwrap(), b"device state");
    let found = build.validate(ValidateOptions { recursive: true });
    assert!(found.is_whole(), "{:?}", found.problems);
}

#[test]
fn a_build_is_stored_today_as_version_1_was() {
    let storage = storage();
    let build = store_fixture(&storage);
    // What LZ4 makes of a page may change with its version, so the disk's data is not compared.
    for file in ["memory.index", "memory.data", "disk.index", "vmstate"] {
        let today = std::fs::read(build.path().join(file)).unwrap();
        assert!(
            today == std::fs::read(fixture().join(file)).unwrap(),
            "{file}"
        );
    }
    let bytes = std::fs::read(fixture().join("manifest.json")).unwrap();
    let pinned = Manifest::decode(&bytes).unwrap();
    let mut today = build.manifest().clone();
    today.created_unix_ms = pinned.created_unix_ms;
    today
        .files
        .insert("disk.data".to_owned(), pinned.files["disk.data"]);
    assert_eq!(today, pinned);
    // And the data file's frame holds the bytes themselves, as they are random.
    let data = std::fs::read(fixture().join("memory.data")).unwrap();
    assert!(data[64..64 + 4096] == page(1));
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        Just(Entry::Free),
        Just(Entry::Removed),
        Just(Entry::Zero),
        (0..3_u32, 0..50_u64).prop_map(|(layer, offset_pages)| Entry::Layer {
            layer,
            offset_pages
        }),
        (0..50_u64).prop_map(|block| Entry::BaseImage { block }),
    ]
}

fn index_of(runs: &[(u64, Entry)]) -> Index {
    let mut builder = IndexBuilder::new(BuildId::random(), ImageKind::Memory);
    for _ in 0..3 {
        builder.add_layer(BuildId::random()).unwrap();
    }
    for &(pages, what) in runs {
        builder.append(pages, what).unwrap();
    }
    builder.finish()
}

fn sign(bytes: &mut [u8]) {
    let mut hasher = Xxh3::new();
    hasher.update(&bytes[..16]);
    hasher.update(&bytes[24..]);
    let checksum = hasher.digest();
    bytes[16..24].copy_from_slice(&checksum.to_le_bytes());
}

proptest! {
    #[test]
    fn an_index_survives_its_file_and_gives_each_page_what_was_appended(
        runs in vec((0..20_u64, entry()), 0..40)
    ) {
        let index = index_of(&runs);
        prop_assert_eq!(&Index::decode(&index.encode().unwrap()).unwrap(), &index);
        let mut page = 0;
        for (pages, what) in runs {
            for n in 0..pages {
                let run = index.run_at(page).unwrap();
                prop_assert_eq!((run.first_page, run.what), (page, what.advanced(n)));
                prop_assert!(run.pages >= pages - n);
                page += 1;
            }
        }
        prop_assert_eq!(index.len_pages(), page);
        prop_assert_eq!(index.run_at(page), None);
        let all: Vec<_> = index.runs().collect();
        prop_assert_eq!(&index.runs_in(0, u64::MAX).collect::<Vec<_>>(), &all);
        // Sorted, complete, coalesced.
        for pair in all.windows(2) {
            prop_assert_eq!(pair[0].first_page + pair[0].pages, pair[1].first_page);
            prop_assert!(pair[0].what.advanced(pair[0].pages) != pair[1].what);
        }
    }

    /// With a right checksum, so that the decoder itself has to notice.
    #[test]
    fn a_forged_index_is_refused_or_means_what_it_says(
        runs in vec((1..20_u64, entry()), 0..10),
        forgeries in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in 0..40_usize,
    ) {
        let mut bytes = index_of(&runs).encode().unwrap();
        for (position, value) in forgeries {
            let position = position.index(bytes.len());
            bytes[position] = value;
        }
        bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(20)).max(24));
        sign(&mut bytes);
        if let Ok(index) = Index::decode(&bytes) {
            prop_assert_eq!(index.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn any_bytes_at_all_are_refused_without_a_panic(bytes in vec(any::<u8>(), 0..300)) {
        prop_assert!(Index::decode(&bytes).is_err());
        prop_assert!(Manifest::decode(&bytes).is_err());
    }
}

#[test]
fn an_index_that_promises_more_than_its_file_holds_allocates_nothing() {
    let mut bytes = small_index().encode().unwrap();
    bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    bytes[52..56].copy_from_slice(&u32::MAX.to_le_bytes());
    sign(&mut bytes);
    let error = Index::decode(&bytes).unwrap_err();
    assert!(matches!(error, FormatError::Damaged { .. }), "{error}");
}

#[test]
fn a_manifest_is_json_that_any_tool_can_read() {
    let bytes = std::fs::read(fixture().join("manifest.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["manifest"]["id"], ID);
    assert_eq!(
        json["manifest"]["working_set"],
        serde_json::json!([[0, 1], [3, 2]])
    );
    let digest = json["manifest"]["files"]["vmstate"]["digest"]
        .as_str()
        .unwrap();
    assert_eq!(digest, Digest::of(b"device state").to_string());
}
