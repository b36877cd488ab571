//! Base images and kernels in a storage: kept once, and for as long as a build names them.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::{Push, names_in, storage, store};
use torpor_build::{BuildId, BuildInfo, Digest, Error, ImageKind, Storage};

#[test]
fn an_image_is_kept_once_sparse_and_read_only() {
    let storage = storage();
    let original = storage.dir.path().join("image");
    let mut content = vec![0; 3 << 20];
    content[5000] = 1;
    content[(2 << 20) + 1] = 2;
    content.extend_from_slice(b"and an odd end");
    std::fs::write(&original, &content).unwrap();

    let digest = storage.import_image(&original).unwrap();
    assert_eq!(digest, Digest::of(&content));
    assert_eq!(storage.import_image(&original).unwrap(), digest);
    let path = storage.image_path(&digest).unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o444);
    assert!(meta.blocks() * 512 <= 5 * 4096, "{} blocks", meta.blocks());
    assert_eq!(names_in(&storage, "images").len(), 1);
    assert!(names_in(&storage, "staging").is_empty());
    let error = storage.import_image(storage.dir.path()).unwrap_err();
    assert!(error.to_string().contains("not a file"), "{error}");
}

#[test]
fn a_kernel_is_kept_with_its_config_even_if_that_comes_later() {
    let storage = storage();
    let (kernel, config) = (storage.dir.path().join("k"), storage.dir.path().join("c"));
    std::fs::write(&kernel, b"ELF").unwrap();
    std::fs::write(&config, b"CONFIG_X=y").unwrap();
    let digest = storage.import_kernel(&kernel, None).unwrap();
    assert_eq!(storage.kernel_config_path(&digest), None);
    assert_eq!(
        storage.import_kernel(&kernel, Some(&config)).unwrap(),
        digest
    );
    assert_eq!(
        storage.import_kernel(&kernel, Some(&config)).unwrap(),
        digest
    );
    assert_eq!(
        std::fs::read(storage.kernel_path(&digest).unwrap()).unwrap(),
        b"ELF"
    );
    let config = storage.kernel_config_path(&digest).unwrap();
    assert_eq!(std::fs::read(config).unwrap(), b"CONFIG_X=y");
    assert!(names_in(&storage, "staging").is_empty());
}

/// A build that names a base image and stores nothing.
fn naming(storage: &Storage, image: Digest) -> BuildId {
    let info = BuildInfo {
        base_image: Some(image),
        ..BuildInfo::default()
    };
    let staged = storage.begin_build(BuildId::random()).unwrap();
    staged.commit(info).unwrap().id()
}

#[test]
fn a_base_image_stays_as_long_as_a_build_names_it_and_the_error_names_the_builds() {
    let storage = storage();
    let image = common::import(&storage, &[1, 2], b"").digest();
    let builds = [naming(&storage, image), naming(&storage, image)];
    for (left, build) in [(2, builds[0]), (1, builds[1])] {
        let error = storage.delete_image(&image).unwrap_err();
        assert!(
            matches!(&error, Error::ImageNeeded { builds, .. }
                if builds.len() == left && builds.contains(&build)),
            "{error}"
        );
        assert!(error.to_string().contains(&build.to_string()), "{error}");
        storage.delete_build(&build).unwrap();
    }
    storage.delete_image(&image).unwrap();
    assert!(names_in(&storage, "images").is_empty());
    assert!(names_in(&storage, "block-indexes").is_empty());
    let again = storage.delete_image(&image).unwrap_err();
    assert!(matches!(again, Error::UnknownImage { .. }), "{again}");
}

#[test]
fn a_base_image_in_use_is_not_deleted() {
    let storage = storage();
    let image = common::import(&storage, &[1, 2], b"");
    let digest = image.digest();
    let error = storage.delete_image(&digest).unwrap_err();
    assert!(matches!(error, Error::ImageInUse { .. }), "{error}");
    drop(image);
    storage.delete_image(&digest).unwrap();
}

#[test]
fn builds_that_cannot_be_read_keep_every_base_image() {
    let storage = storage();
    let image = common::import(&storage, &[1, 2], b"").digest();
    let damaged = store(&storage, None, &[Push::Data(vec![1])]).id();
    let manifest = storage
        .root()
        .join(format!("builds/{damaged}/manifest.json"));
    std::fs::write(manifest, "{}").unwrap();
    let error = storage.delete_image(&image).unwrap_err();
    assert!(
        matches!(&error, Error::ImageMayBeNeeded { unreadable, .. } if *unreadable == [damaged]),
        "{error}"
    );
    storage.delete_build(&damaged).unwrap();
    storage.delete_image(&image).unwrap();
}

#[test]
fn a_build_of_a_newer_version_keeps_its_base_image_and_no_other() {
    let storage = storage();
    let image = common::import(&storage, &[1, 2], b"").digest();
    let other = common::import(&storage, &[3], b"").digest();
    let build = naming(&storage, image);
    common::make_newer(&storage, &build);
    let error = storage.delete_image(&image).unwrap_err();
    assert!(matches!(error, Error::ImageNeeded { .. }), "{error}");
    storage.delete_image(&other).unwrap();
}

#[test]
fn a_build_whose_base_image_was_deleted_meanwhile_is_not_committed() {
    let storage = storage();
    let image = common::import(&storage, &[1, 2], b"");
    let digest = image.digest();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    let memory = [Push::Data(vec![1])];
    common::write_referring_image(&staged, ImageKind::Memory, None, Some(&image), &memory).unwrap();
    drop(image);
    storage.delete_image(&digest).unwrap();
    let info = BuildInfo {
        base_image: Some(digest),
        ..BuildInfo::default()
    };
    let error = staged.commit(info).unwrap_err();
    assert!(
        matches!(error, Error::UnknownImage { digest: gone, .. } if gone == digest),
        "{error}"
    );
    assert!(storage.list_builds().unwrap().is_empty());
    assert!(names_in(&storage, "staging").is_empty());
}

#[test]
fn images_are_listed_with_the_builds_that_name_them() {
    let storage = storage();
    let one = common::import(&storage, &[1, 2, 0, 0], b"").digest();
    let other = common::import(&storage, &[3], b"and a tail").digest();
    let builds = [naming(&storage, one), naming(&storage, one)];
    store(&storage, None, &[Push::Data(vec![1])]);
    let listed = storage.list_images().unwrap();
    assert!(listed.is_sorted_by_key(|image| image.digest.to_string()));
    assert_eq!(listed.len(), 2);
    for image in listed {
        let (bytes, expected): (u64, &[BuildId]) = if image.digest == one {
            (4 * 4096, &builds)
        } else {
            assert_eq!(image.digest, other);
            (4096 + 10, &[])
        };
        assert_eq!(image.bytes, bytes);
        assert!(image.stored_bytes <= 2 * 4096, "{}", image.stored_bytes);
        assert_eq!(image.builds.len(), expected.len());
        assert!(expected.iter().all(|build| image.builds.contains(build)));
    }
}
