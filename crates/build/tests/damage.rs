//! Whatever happens to a build's files, reading gives the right bytes or an error.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use common::{Push, TestStorage, pages, read_all, sign, storage, store};
use torpor_build::{Build, BuildId, BuildInfo, Digest, Error, ImageKind, Storage, ValidateOptions};

const FILES: [&str; 6] = [
    "manifest.json",
    "memory.index",
    "memory.data",
    "disk.index",
    "disk.data",
    "vmstate",
];

/// Two layers, so that indexes name more than their own build.
fn two_layers(storage: &Storage) -> (Build, Vec<u8>) {
    let base = store(storage, None, &[Push::Data(vec![2, 4, 6, 0])]);
    let pushes = [
        Push::Parent(2),
        Push::Data(vec![1]),
        Push::Removed(1),
        Push::Data(vec![8]),
    ];
    (
        store(storage, Some(&base), &pushes),
        pages(&[2, 4, 1, 0, 8]),
    )
}

/// Opens and verifies everything again; `Err` tells what is wrong.
fn verify(storage: &Storage, id: &BuildId, recursive: bool) -> Result<(), String> {
    let build = storage.open_build(id).map_err(|e| e.to_string())?;
    let found = build.validate(ValidateOptions { recursive });
    match found.problems.first() {
        None => Ok(()),
        Some(problem) => Err(problem.to_string()),
    }
}

/// Reads the memory, which must be right or an error.
fn read_is_right_or_refused(storage: &Storage, id: &BuildId, expected: &[u8]) {
    if let Ok(build) = storage.open_build(id)
        && let Ok(bytes) = read_all(&build, ImageKind::Memory)
    {
        assert!(bytes == expected, "wrong bytes were read");
    }
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let storage = storage();
    let (build, expected) = two_layers(&storage);
    let id = build.id();
    drop(build);
    verify(&storage, &id, true).unwrap();
    for file in FILES {
        let path = storage.root().join(format!("builds/{id}/{file}"));
        let original = std::fs::read(&path).unwrap();
        let mut bytes = original.clone();
        for position in 0..bytes.len() {
            bytes[position] ^= 1 << (position % 8);
            std::fs::write(&path, &bytes).unwrap();
            let found = verify(&storage, &id, false);
            let what = found.expect_err(&format!("{file}: byte {position} is not noticed"));
            assert!(what.contains(file), "{file}: byte {position}: {what}");
            if file != "vmstate" {
                read_is_right_or_refused(&storage, &id, &expected);
            }
            bytes[position] = original[position];
        }
        std::fs::write(&path, &original).unwrap();
    }
    verify(&storage, &id, true).unwrap();
}

#[test]
fn a_flipped_bit_in_an_ancestor_is_found_recursively() {
    let storage = storage();
    let (build, _) = two_layers(&storage);
    let parent = build.manifest().info.parent.unwrap();
    let path = storage.root().join(format!("builds/{parent}/disk.data"));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[70] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    // The build uses that frame.
    for recursive in [false, true] {
        let what = verify(&storage, &build.id(), recursive).unwrap_err();
        assert!(what.contains(&parent.to_string()), "{what}");
    }
}

#[test]
fn of_an_ancestor_only_what_is_used_counts_unless_all_is_asked_for() {
    let storage = storage();
    let base = store(
        &storage,
        None,
        &[Push::Data((0..40).map(|n| 2 * n + 1).collect())],
    );
    // Pages of the first and the last of its three frames.
    let pushes = [Push::Parent(2), Push::Removed(36), Push::Parent(2)];
    let build = store(&storage, Some(&base), &pushes);
    let path = base.path().join("memory.data");
    let original = std::fs::read(&path).unwrap();
    for (position, is_used) in [
        (100, true),
        (64 + 65_536 + 100, false),
        (64 + 131_072 + 100, true),
    ] {
        let mut bytes = original.clone();
        bytes[position] ^= 4;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(
            verify(&storage, &build.id(), false).is_err(),
            is_used,
            "{position}"
        );
        verify(&storage, &build.id(), true).unwrap_err();
    }
    std::fs::write(base.path().join("vmstate"), "another").unwrap();
    std::fs::write(&path, original).unwrap();
    verify(&storage, &build.id(), false).unwrap();
    verify(&storage, &build.id(), true).unwrap_err();
}

/// A storage with a base image, a kernel and its configuration, and a build of them; and the three
/// objects' files.
fn with_objects(storage: &TestStorage) -> (Build, [PathBuf; 3]) {
    let source = |name: &str, content: &[u8]| {
        let path = storage.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let image = storage.import_image(&source("image", &pages(&[1, 0, 3])));
    let kernel = source("kernel", &pages(&[2, 5]));
    let kernel = storage.import_kernel(&kernel, Some(&source("config", b"CONFIG_X=y\n")));
    let (image, kernel) = (image.unwrap(), kernel.unwrap());
    let info = BuildInfo {
        base_image: Some(image),
        kernel: Some(kernel),
        ..BuildInfo::default()
    };
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let build = staged.commit(info).unwrap();
    let files = [
        storage.image_path(&image).unwrap(),
        storage.kernel_path(&kernel).unwrap(),
        storage.kernel_config_path(&kernel).unwrap(),
    ];
    (build, files)
}

#[test]
fn a_flipped_bit_in_the_base_image_or_the_kernel_is_found_and_an_import_repairs_it() {
    let storage = storage();
    let (build, files) = with_objects(&storage);
    verify(&storage, &build.id(), false).unwrap();
    let repairs: [&dyn Fn(); 2] = [
        &|| {
            let image = storage.dir.path().join("image");
            storage.import_image(&image).unwrap();
        },
        &|| {
            let [kernel, config] = ["kernel", "config"].map(|name| storage.dir.path().join(name));
            storage.import_kernel(&kernel, Some(&config)).unwrap();
        },
    ];
    for (path, repair) in files.iter().zip([0, 1, 1]) {
        let original = std::fs::read(path).unwrap();
        for position in [0, original.len() / 2, original.len() - 1] {
            let mut bytes = original.clone();
            bytes[position] ^= 0x10;
            std::fs::write(path, bytes).unwrap();
            let what = verify(&storage, &build.id(), false).unwrap_err();
            assert!(what.contains(path.to_str().unwrap()), "{what}");
            repairs[repair]();
            assert!(std::fs::read(path).unwrap() == original);
            verify(&storage, &build.id(), false).unwrap();
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o444);
        }
    }
    assert!(common::names_in(&storage, "staging").is_empty());
}

#[test]
fn a_damaged_configuration_gives_way_to_another_one() {
    let storage = storage();
    let (build, [_, kernel, config]) = with_objects(&storage);
    let other = storage.dir.path().join("other");
    std::fs::write(&other, "CONFIG_Y=y\n").unwrap();
    let digest = storage.import_kernel(&kernel, Some(&other)).unwrap();
    assert_eq!(storage.kernel_config_path(&digest), Some(config.clone()));
    std::fs::write(&config, "nonsense").unwrap();
    storage.import_kernel(&kernel, Some(&other)).unwrap();
    let kept = storage.kernel_config_path(&digest).unwrap();
    assert_eq!(std::fs::read(kept).unwrap(), b"CONFIG_Y=y\n");
    assert!(!config.exists());
    verify(&storage, &build.id(), false).unwrap();
}

#[test]
fn progress_only_grows_and_ends_at_what_was_announced() {
    let storage = storage();
    let (with_objects, _) = with_objects(&storage);
    let (two_layers, _) = two_layers(&storage);
    for (build, recursive) in [
        (&with_objects, false),
        (&two_layers, false),
        (&two_layers, true),
    ] {
        let mut told = Vec::new();
        let found = build.validate_with(ValidateOptions { recursive }, &mut |done, total| {
            told.push((done, total));
        });
        assert!(found.is_whole());
        let (first, last) = (told[0], *told.last().unwrap());
        assert!(told.is_sorted() && told.iter().all(|(_, total)| *total == last.1));
        assert_eq!((first.0, last.0), (0, last.1));
        assert!(told.len() > 3 && last.1 >= found.bytes);
    }
}

#[test]
fn a_file_cut_off_anywhere_or_too_long_is_found() {
    let storage = storage();
    let (build, expected) = two_layers(&storage);
    let id = build.id();
    drop(build);
    for file in FILES {
        let path = storage.root().join(format!("builds/{id}/{file}"));
        let original = std::fs::read(&path).unwrap();
        let cut = (0..original.len())
            .step_by(13)
            .map(|len| original[..len].to_vec());
        let longer = std::iter::once([&original[..], b"x"].concat());
        for bytes in cut.chain(longer) {
            std::fs::write(&path, &bytes).unwrap();
            let found = verify(&storage, &id, false);
            let what = found.expect_err(&format!("{file}: {} bytes are taken", bytes.len()));
            assert!(what.contains(file), "{what}");
            read_is_right_or_refused(&storage, &id, &expected);
        }
        std::fs::remove_file(&path).unwrap();
        verify(&storage, &id, false).unwrap_err();
        std::fs::write(&path, &original).unwrap();
    }
}

#[test]
fn a_file_that_does_not_belong_is_found() {
    let storage = storage();
    let (build, _) = two_layers(&storage);
    std::fs::write(build.path().join("memory.data.tmp"), "x").unwrap();
    let what = verify(&storage, &build.id(), false).unwrap_err();
    assert!(what.contains("memory.data.tmp"), "{what}");
}

#[test]
fn the_files_of_another_build_or_image_are_refused_as_such() {
    let storage = storage();
    let one = store(&storage, None, &[Push::Data(vec![2, 0])]);
    let other = store(&storage, None, &[Push::Data(vec![2, 0])]);
    let refused = |path: PathBuf, by: PathBuf| {
        let original = std::fs::read(&path).unwrap();
        std::fs::copy(by, &path).unwrap();
        let error = read_all(&one, ImageKind::Memory).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        std::fs::write(&path, original).unwrap();
    };
    let in_one = |file| one.path().join(file);
    refused(in_one("memory.data"), other.path().join("memory.data"));
    refused(in_one("memory.index"), other.path().join("memory.index"));
    refused(in_one("memory.data"), in_one("disk.data"));
    refused(in_one("memory.index"), in_one("disk.index"));
    let manifest = std::fs::read(other.path().join("manifest.json")).unwrap();
    std::fs::write(in_one("manifest.json"), manifest).unwrap();
    let error = storage.open_build(&one.id()).unwrap_err();
    assert!(
        error.to_string().contains(&other.id().to_string()),
        "{error}"
    );
}

#[test]
fn a_newer_version_is_refused_and_the_error_says_so() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![2])]);
    for (file, signed_bytes) in [("memory.index", usize::MAX), ("memory.data", 64)] {
        let path = build.path().join(file);
        let original = std::fs::read(&path).unwrap();
        let mut bytes = original.clone();
        bytes[8] = 2;
        let end = signed_bytes.min(bytes.len());
        sign(&mut bytes, end);
        std::fs::write(&path, bytes).unwrap();
        let error = read_all(&build, ImageKind::Memory).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Newer {
                    found: 2,
                    known: 1,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.to_string().contains(file), "{error}");
        std::fs::write(&path, original).unwrap();
    }
    let path = build.path().join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let (frame, body) = text.split_once("\n\"manifest\": ").unwrap();
    let body = body.strip_suffix("\n}\n").unwrap();
    let body = body.replace(
        "\"format_version\":1",
        "\"format_version\":2,\"unheard_of\":true",
    );
    let (open, _) = frame.split_once(": \"").unwrap();
    let checksum = Digest::of(body.as_bytes());
    std::fs::write(
        &path,
        format!("{open}: \"{checksum}\",\n\"manifest\": {body}\n}}\n"),
    )
    .unwrap();
    let error = storage.open_build(&build.id()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Newer {
                found: 2,
                known: 1,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn the_children_of_a_build_of_a_newer_version_keep_it_from_being_deleted() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![2])]);
    let child = store(&storage, Some(&base), &[Push::Parent(1)]);
    common::make_newer(&storage, &child.id());
    let id = base.id();
    drop(base);
    assert!(matches!(
        storage.delete_build(&id),
        Err(Error::HasChildren { .. })
    ));
}
