//! A process that fails or dies at any durable step leaves no half build behind.
//!
//! Dying is real here: this test binary starts itself again, and the child kills itself with
//! SIGKILL at the fail point. What survives a power cut is more than that can show, so a third
//! test pins the order of the steps. Fail points are the process's: every test holds the scenario,
//! so that they run one after another.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::process::Command;
use std::sync::{Arc, Mutex};

use common::{Push, info, names_in, storage, store, try_store, write_image};
use fail::FailScenario;
use rustix::process::{Signal, getpid, kill_process};
use torpor_build::{BuildId, Digest, Error, ImageKind, Storage, ValidateOptions};

/// Each has a fail point before and one after.
const COMMIT_STEPS: [&str; 9] = [
    "data-write",
    "vmstate-write",
    "commit-data-sync",
    "commit-manifest-file-write",
    "commit-manifest-file-sync",
    "commit-manifest-file-rename",
    "commit-manifest-dir-sync",
    "commit-build-rename",
    "commit-build-sync",
];
const DELETE_STEPS: [&str; 2] = ["delete-rename", "delete-dir-sync"];
const TEMPLATE_STEPS: [&str; 4] = [
    "template-file-write",
    "template-file-sync",
    "template-file-rename",
    "template-dir-sync",
];
const IMPORT_STEPS: [&str; 8] = [
    "import-write",
    "import-file-sync",
    "import-rename",
    "import-dir-sync",
    "block-index-write",
    "block-index-file-sync",
    "block-index-rename",
    "block-index-dir-sync",
];
const IMAGE_REMOVE_STEPS: [&str; 2] = ["image-remove", "image-remove-sync"];

fn points(steps: &[&str]) -> impl Iterator<Item = String> {
    steps
        .iter()
        .flat_map(|step| ["before", "after"].map(|when| format!("{step}-{when}")))
}

fn whole(storage: &Storage, id: &BuildId) -> bool {
    let found = storage
        .open_build(id)
        .unwrap()
        .validate(ValidateOptions { recursive: true });
    found.is_whole()
}

const CHILD_PUSHES: [Push; 2] = [Push::Parent(1), Push::Removed(1)];

#[test]
fn a_commit_that_fails_at_any_step_leaves_nothing_and_can_be_repeated() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let id = BuildId::random();
    for point in points(&COMMIT_STEPS) {
        for kind in ["return", "return(enospc)"] {
            fail::cfg(&point, kind).unwrap();
            let error = try_store(&storage, id, Some(&base), &CHILD_PUSHES)
                .expect_err(&format!("{point} was not passed"));
            fail::remove(&point);
            let full = kind.contains("enospc");
            assert_eq!(
                matches!(error, Error::Full { .. }),
                full,
                "{point}: {error}"
            );
            let next_step = error.to_string().contains("free space on that file system");
            assert_eq!(next_step, full, "{point}: {error}");
            assert_eq!(
                names_in(&storage, "builds"),
                [base.id().to_string()],
                "{point}"
            );
            assert!(names_in(&storage, "staging").is_empty(), "{point}");
            assert!(whole(&storage, &base.id()), "{point}");
        }
    }
    try_store(&storage, id, Some(&base), &CHILD_PUSHES).unwrap();
    assert!(whole(&storage, &id));
    scenario.teardown();
}

#[test]
fn a_template_or_import_that_fails_at_any_step_leaves_the_old_or_the_new_one() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let name = "debian".parse().unwrap();
    let (old, new) = (
        store(&storage, None, &[]).id(),
        store(&storage, None, &[]).id(),
    );
    for point in points(&TEMPLATE_STEPS) {
        storage.set_template(&name, &old).unwrap();
        fail::cfg(&point, "return").unwrap();
        storage.set_template(&name, &new).expect_err(&point);
        fail::remove(&point);
        let found = storage.resolve("debian").unwrap();
        assert!([old, new].contains(&found), "{point}");
        assert_eq!(names_in(&storage, "templates"), ["debian"], "{point}");
    }
    for (number, point) in points(&IMPORT_STEPS).enumerate() {
        let image = storage.dir.path().join("image");
        std::fs::write(&image, format!("image {number}")).unwrap();
        fail::cfg(&point, "return").unwrap();
        storage.import_image(&image).expect_err(&point);
        fail::remove(&point);
        assert!(names_in(&storage, "staging").is_empty(), "{point}");
        let digest = storage.import_image(&image).unwrap();
        let kept = std::fs::read(storage.image_path(&digest).unwrap()).unwrap();
        assert_eq!(kept, std::fs::read(&image).unwrap(), "{point}");
        drop(storage.base_image(&digest).unwrap());
    }
    scenario.teardown();
}

#[test]
fn an_image_whose_deletion_fails_at_any_step_is_whole_or_gone() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let indexes = || names_in(&storage, "block-indexes");
    for point in points(&IMAGE_REMOVE_STEPS) {
        let digest = common::import(&storage, &[1, 2], b"").digest();
        assert_eq!(indexes(), [digest.to_string()], "{point}");
        fail::cfg(&point, "return").unwrap();
        storage.delete_image(&digest).expect_err(&point);
        fail::remove(&point);
        // No index is left without its image.
        assert!(indexes().is_empty(), "{point}");
        if point == "image-remove-before" {
            drop(storage.base_image(&digest).unwrap());
            storage.delete_image(&digest).unwrap();
        }
        assert!(names_in(&storage, "images").is_empty(), "{point}");
        assert!(indexes().is_empty(), "{point}");
    }
    scenario.teardown();
}

#[test]
fn an_index_that_cannot_be_written_is_kept_in_memory() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let digest = common::import(&storage, &[1, 2], b"").digest();
    let path = common::block_index_path(&storage, &digest);
    std::fs::remove_file(&path).unwrap();
    fail::cfg("block-index-write-before", "return(enospc)").unwrap();
    let image = storage.base_image(&digest).unwrap();
    let page = common::page(2);
    assert_eq!(image.find(&page, &Digest::of(&page)), Some(1));
    assert!(!path.exists());
    scenario.teardown();
}

/// What the child process does: not a test by itself.
#[test]
fn child_process() {
    let Ok(point) = std::env::var("TORPOR_TEST_DIE_AT") else {
        return;
    };
    let storage = Storage::open(std::env::var("TORPOR_TEST_STORAGE").unwrap().as_ref()).unwrap();
    let id = std::env::var("TORPOR_TEST_ID").unwrap().parse().unwrap();
    let scenario = FailScenario::setup();
    fail::cfg_callback(&point, || kill_process(getpid(), Signal::KILL).unwrap()).unwrap();
    if point.starts_with("delete") {
        storage.delete_build(&id).unwrap();
    } else {
        let base = storage.list_builds().unwrap()[0].id;
        let base = storage.open_build(&base).unwrap();
        try_store(&storage, id, Some(&base), &CHILD_PUSHES).unwrap();
    }
    scenario.teardown();
    // Not reached: the parent expects death by SIGKILL.
}

fn die_at(point: &str, storage: &Storage, id: &BuildId) {
    use std::os::unix::process::ExitStatusExt;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process"])
        .env("TORPOR_TEST_DIE_AT", point)
        .env("TORPOR_TEST_STORAGE", storage.root())
        .env("TORPOR_TEST_ID", id.to_string())
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(9), "{point}: {output:?}");
}

#[test]
fn a_committer_that_is_killed_at_any_step_leaves_a_whole_build_or_none() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    for point in points(&COMMIT_STEPS) {
        let id = BuildId::random();
        die_at(&point, &storage, &id);
        let renamed =
            point == "commit-build-rename-after" || point.starts_with("commit-build-sync");
        let visible = names_in(&storage, "builds").contains(&id.to_string());
        assert_eq!(visible, renamed, "{point}");
        if visible {
            assert!(whole(&storage, &id), "{point}");
        } else {
            // The id is not blocked by the dead one, nor is its left-over anyone's build.
            drop(storage.begin_build(id).unwrap());
        }
        assert!(names_in(&storage, "staging").is_empty(), "{point}");
        assert!(whole(&storage, &base.id()), "{point}");
    }
    scenario.teardown();
}

#[test]
fn sweep_removes_what_killed_processes_left() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let _base = store(&storage, None, &[Push::Data(vec![1, 3])]);
    let id = BuildId::random();
    die_at("commit-build-rename-before", &storage, &id);
    assert_eq!(
        storage.sweep(&mut |_| Ok(())).unwrap().staging,
        [format!("build-{id}")]
    );
    assert!(names_in(&storage, "staging").is_empty());
    scenario.teardown();
}

#[test]
fn a_deletion_that_is_killed_at_any_step_leaves_a_whole_build_or_none() {
    let scenario = FailScenario::setup();
    let storage = storage();
    for point in points(&DELETE_STEPS) {
        let id = store(&storage, None, &[Push::Data(vec![1, 3])]).id();
        die_at(&point, &storage, &id);
        let visible = names_in(&storage, "builds").contains(&id.to_string());
        assert_eq!(visible, point == "delete-rename-before", "{point}");
        if visible {
            assert!(whole(&storage, &id), "{point}");
            storage.delete_build(&id).unwrap();
        }
        storage.sweep(&mut |_| Ok(())).unwrap();
        assert!(names_in(&storage, "staging").is_empty(), "{point}");
    }
    scenario.teardown();
}

#[test]
fn a_template_whose_deletion_fails_at_any_step_can_be_deleted_again() {
    let scenario = FailScenario::setup();
    let storage = storage();
    let name = "debian".parse().unwrap();
    for point in points(&DELETE_STEPS).chain(points(&["template-remove-sync"])) {
        let id = store(&storage, None, &[Push::Data(vec![1])]).id();
        storage.set_template(&name, &id).unwrap();
        fail::cfg(&point, "return").unwrap();
        let failed = storage.delete_template_and_build(&name);
        failed.expect_err(&point);
        fail::remove(&point);
        // Whole and named, or gone: never a build that no name leads to any more.
        let visible = names_in(&storage, "builds").contains(&id.to_string());
        assert_eq!(visible, point == "delete-rename-before", "{point}");
        if visible {
            assert_eq!(storage.resolve("debian").unwrap(), id, "{point}");
        }
        match storage.delete_template_and_build(&name) {
            Ok(deleted) => assert_eq!(deleted, visible.then_some(id), "{point}"),
            Err(error) => assert!(matches!(error, Error::UnknownTemplate { .. }), "{error}"),
        }
        assert!(names_in(&storage, "builds").is_empty(), "{point}");
        assert!(names_in(&storage, "templates").is_empty(), "{point}");
        storage.sweep(&mut |_| Ok(())).unwrap();
        assert!(names_in(&storage, "staging").is_empty(), "{point}");
    }
    scenario.teardown();
}

#[test]
fn a_storage_is_synced_into_its_place_when_it_is_made_and_only_then() {
    let scenario = FailScenario::setup();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for point in ["open-root-sync-after", "open-dir-sync-after"] {
        let seen = Arc::clone(&seen);
        fail::cfg_callback(point, move || seen.lock().unwrap().push(point)).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/b");
    let open = || {
        drop(Storage::open(&root).unwrap());
        std::mem::take(&mut *seen.lock().unwrap())
    };
    // For `a`, for `b`, for what is in it.
    let (parent, parts) = ("open-root-sync-after", "open-dir-sync-after");
    assert_eq!(open(), [parent, parent, parts]);
    assert!(open().is_empty());
    std::fs::remove_dir(root.join("working-sets")).unwrap();
    assert_eq!(open(), [parts]);
    scenario.teardown();
}

#[test]
fn a_build_becomes_visible_only_after_everything_in_it_is_synced() {
    let scenario = FailScenario::setup();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for point in points(&COMMIT_STEPS) {
        let (seen, name) = (Arc::clone(&seen), point.clone());
        fail::cfg_callback(&point, move || seen.lock().unwrap().push(name.clone())).unwrap();
    }
    let storage = storage();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    write_image(&staged, ImageKind::Memory, None, &[Push::Data(vec![1])]).unwrap();
    staged.write_vmstate(b"device state").unwrap();
    staged.commit(info(None)).unwrap();
    scenario.teardown();
    let ended: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .filter_map(|p| p.strip_suffix("-after"))
        .map(str::to_owned)
        .collect();
    let expected = [
        // Data, then index.
        "data-write",
        "data-write",
        "vmstate-write",
        // Each of the three files.
        "commit-data-sync",
        "commit-data-sync",
        "commit-data-sync",
        "commit-manifest-file-write",
        "commit-manifest-file-sync",
        "commit-manifest-file-rename",
        "commit-manifest-dir-sync",
        "commit-build-rename",
        "commit-build-sync",
    ];
    assert_eq!(ended, expected);
}
