//! Builds, templates and sandboxes in a storage that several use at once.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::sync::Barrier;

use common::{Push, info, names_in, read_all, storage, store, try_store, write_image};
use torpor_build::{BuildId, BuildInfo, Digest, Error, ImageKind, Name, Storage};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn a_committed_build_is_found_again_with_all_that_was_said_of_it() {
    let storage = storage();
    let id = BuildId::random();
    let staged = storage.begin_build(id).unwrap();
    write_image(&staged, ImageKind::Memory, None, &[Push::Data(vec![1, 0])]).unwrap();
    staged.write_vmstate(b"device state").unwrap();
    let said = BuildInfo {
        template: Some(name("debian")),
        memory_bytes: 8192,
        vcpus: 2,
        network: true,
        cmdline: "console=ttyS0".to_owned(),
        working_set: vec![(0, 1).into(), (7, 3).into()],
        pause_report: serde_json::json!({"freeze_ms": 12}),
        ..BuildInfo::default()
    };
    drop(staged.commit(said.clone()).unwrap());

    let again = Storage::open(storage.root()).unwrap();
    let build = again.open_build(&id).unwrap();
    assert_eq!(build.manifest().info, said);
    assert_eq!(build.manifest().layers, [id]);
    assert_eq!(build.read_vmstate().unwrap(), b"device state");
    let error = build.disk().unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let listed: Vec<_> = again.list_builds().unwrap().iter().map(|b| b.id).collect();
    assert_eq!(listed, [id]);
}

#[test]
fn a_staged_build_that_is_dropped_leaves_nothing() {
    let storage = storage();
    let id = BuildId::random();
    let staged = storage.begin_build(id).unwrap();
    write_image(&staged, ImageKind::Memory, None, &[Push::Data(vec![1])]).unwrap();
    assert!(storage.list_builds().unwrap().is_empty());
    drop(staged);
    assert!(names_in(&storage, "staging").is_empty());
    drop(storage.begin_build(id).unwrap());
}

#[test]
fn of_many_who_commit_one_id_exactly_one_succeeds() {
    const RIVALS: usize = 8;
    let storage = storage();
    let id = BuildId::random();
    let start = Barrier::new(RIVALS);
    let results: Vec<_> = std::thread::scope(|scope| {
        let rivals: Vec<_> = (0..RIVALS)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    try_store(&storage, id, None, &[Push::Data(vec![1])]).map(|_| ())
                })
            })
            .collect();
        rivals
            .into_iter()
            .map(|rival| rival.join().unwrap())
            .collect()
    });
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for error in lost.into_iter().filter_map(Result::err) {
        let clear = matches!(error, Error::BuildBusy { .. } | Error::BuildExists { .. });
        assert!(
            clear && error.to_string().contains(&id.to_string()),
            "{error}"
        );
    }
    assert!(
        storage
            .open_build(&id)
            .unwrap()
            .validate(Default::default())
            .is_whole()
    );
    assert!(names_in(&storage, "staging").is_empty());
}

#[test]
fn a_build_with_children_is_not_deleted_and_the_error_names_them() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1])]).id();
    let child = {
        let base = storage.open_build(&base).unwrap();
        store(&storage, Some(&base), &[Push::Parent(1)]).id()
    };
    let error = storage.delete_build(&base).unwrap_err();
    assert!(matches!(&error, Error::HasChildren { children, .. } if *children == [child]));
    assert!(error.to_string().contains(&child.to_string()), "{error}");
    storage.delete_build(&child).unwrap();
    storage.delete_build(&base).unwrap();
    assert!(names_in(&storage, "builds").is_empty());
    assert!(names_in(&storage, "staging").is_empty());
    assert!(matches!(
        storage.delete_build(&base),
        Err(Error::UnknownBuild { .. })
    ));
}

#[test]
fn a_build_in_use_is_not_deleted_not_even_through_a_reader_alone() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    let id = build.id();
    assert!(matches!(
        storage.delete_build(&id),
        Err(Error::BuildInUse { .. })
    ));
    let reader = build.memory().unwrap();
    drop(build);
    assert!(matches!(
        storage.delete_build(&id),
        Err(Error::BuildInUse { .. })
    ));
    drop(reader);
    storage.delete_build(&id).unwrap();
}

#[test]
fn any_number_may_open_one_build() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    let others: Vec<_> = (0..20)
        .map(|_| storage.open_build(&build.id()).unwrap())
        .collect();
    assert!(
        others
            .iter()
            .all(|other| read_all(other, ImageKind::Memory).is_ok())
    );
}

#[test]
fn a_child_whose_parent_was_deleted_meanwhile_is_not_committed() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1])]);
    let parent = base.id();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    write_image(&staged, ImageKind::Memory, Some(&base), &[Push::Parent(1)]).unwrap();
    let info = info(Some(&base));
    drop(base);
    storage.delete_build(&parent).unwrap();
    let error = staged.commit(info).unwrap_err();
    assert!(
        matches!(error, Error::ParentGone { parent: gone, .. } if gone == parent),
        "{error}"
    );
    assert!(storage.list_builds().unwrap().is_empty());
    assert!(names_in(&storage, "staging").is_empty());
}

#[test]
fn a_manifest_that_names_another_parent_than_its_images_is_refused() {
    let storage = storage();
    let base = store(&storage, None, &[Push::Data(vec![1])]);
    let staged = storage.begin_build(BuildId::random()).unwrap();
    write_image(&staged, ImageKind::Memory, Some(&base), &[Push::Parent(1)]).unwrap();
    let error = staged.commit(info(None)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::ParentMismatch {
                image: "memory",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_build_does_not_refer_to_an_image_or_kernel_that_is_not_there() {
    let storage = storage();
    let digest = Digest::of(b"nothing");
    let with_image = BuildInfo {
        base_image: Some(digest),
        ..BuildInfo::default()
    };
    let with_kernel = BuildInfo {
        kernel: Some(digest),
        ..BuildInfo::default()
    };
    let commit = |info| {
        storage
            .begin_build(BuildId::random())
            .unwrap()
            .commit(info)
            .unwrap_err()
    };
    assert!(matches!(commit(with_image), Error::UnknownImage { .. }));
    assert!(matches!(commit(with_kernel), Error::UnknownKernel { .. }));
}

#[test]
fn a_template_keeps_its_build_until_it_means_another_one() {
    let storage = storage();
    let first = store(&storage, None, &[Push::Data(vec![1])]).id();
    let second = store(&storage, None, &[Push::Data(vec![3])]).id();
    let debian = name("debian");
    storage.set_template(&debian, &first).unwrap();
    assert_eq!(storage.resolve("debian").unwrap(), first);
    let error = storage.delete_build(&first).unwrap_err();
    assert!(error.to_string().contains("template debian"), "{error}");
    storage.set_template(&debian, &second).unwrap();
    storage.delete_build(&first).unwrap();
    assert_eq!(storage.resolve("debian").unwrap(), second);
    storage.remove_template(&debian).unwrap();
    assert!(matches!(
        storage.resolve("debian"),
        Err(Error::UnknownTemplate { .. })
    ));
    storage.delete_build(&second).unwrap();
}

#[test]
fn what_is_not_there_is_said_by_name() {
    let storage = storage();
    let id = BuildId::random();
    let error = storage.resolve(&id.to_string()).unwrap_err();
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    assert!(matches!(
        storage.open_build(&id),
        Err(Error::UnknownBuild { .. })
    ));
    assert!(matches!(
        storage.set_template(&name("x"), &id),
        Err(Error::UnknownBuild { .. })
    ));
    assert!(matches!(
        storage.resolve("nothing"),
        Err(Error::UnknownTemplate { .. })
    ));
    assert!(matches!(storage.resolve("../etc"), Err(Error::Id(_))));
    let build = store(&storage, None, &[]);
    let like_an_id = name(&id.to_string());
    let error = storage.set_template(&like_an_id, &build.id()).unwrap_err();
    assert!(matches!(error, Error::NameIsAnId { .. }), "{error}");
}

#[test]
fn a_damaged_template_is_an_error_and_not_a_wrong_build() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    storage.set_template(&name("debian"), &build.id()).unwrap();
    let path = storage.root().join("templates/debian");
    for content in ["", "\n", "nonsense\n", &build.id().to_string()] {
        std::fs::write(&path, content).unwrap();
        let error = storage.resolve("debian").unwrap_err();
        assert!(
            matches!(error, Error::Damaged { .. }),
            "{content:?}: {error}"
        );
    }
}

#[test]
fn builds_that_cannot_be_read_are_listed_with_the_reason_and_can_be_deleted() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1])]).id();
    let damaged = store(&storage, None, &[Push::Data(vec![1])]).id();
    let also_damaged = store(&storage, None, &[Push::Data(vec![1])]).id();
    for id in [damaged, also_damaged] {
        std::fs::write(
            storage.root().join(format!("builds/{id}/manifest.json")),
            "{}",
        )
        .unwrap();
    }
    std::fs::remove_file(
        storage
            .root()
            .join(format!("builds/{also_damaged}/manifest.json")),
    )
    .unwrap();
    let listed = storage.list_builds().unwrap();
    assert_eq!((listed.len(), listed[0].id), (3, build));
    assert!(listed[1..].iter().all(|b| b.manifest.is_err()));
    // It may be the child of any build.
    let error = storage.delete_build(&build).unwrap_err();
    assert!(error.to_string().contains(&damaged.to_string()), "{error}");
    storage.delete_build(&damaged).unwrap();
    storage.delete_build(&also_damaged).unwrap();
    storage.delete_build(&build).unwrap();
}

#[test]
fn everything_is_private_to_its_owner() {
    let storage = storage();
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    let mut looked_at = 0;
    let mut todo = vec![storage.root().to_owned()];
    while let Some(path) = todo.pop() {
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.permissions().mode() & 0o077, 0, "{}", path.display());
        if meta.is_dir() {
            todo.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        looked_at += 1;
    }
    assert!(looked_at > 10 && build.path().is_dir());
}

#[test]
fn a_sandbox_id_has_one_owner_and_its_directory_goes_with_it() {
    let storage = storage();
    let id = name("sandbox-1");
    let run = storage.run_dir(&id).unwrap();
    std::fs::write(run.path().join("console.log"), "…").unwrap();
    assert!(matches!(
        storage.run_dir(&id),
        Err(Error::SandboxBusy { .. })
    ));
    assert_eq!(
        storage.running_sandboxes().unwrap(),
        std::slice::from_ref(&id)
    );
    let swept = storage.sweep(&mut |_| Ok(())).unwrap();
    assert!(swept.sandboxes.is_empty() && swept.staging.is_empty());
    drop(run);
    assert!(names_in(&storage, "run").is_empty());
    drop(storage.run_dir(&id).unwrap());
}

#[test]
fn sweep_removes_what_has_no_owner_and_nothing_else() {
    let storage = storage();
    let id = BuildId::random();
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    let staged = storage.begin_build(id).unwrap();
    let alive = storage.run_dir(&name("alive")).unwrap();
    // As processes leave it that were killed: at work, and before they could own anything.
    for (dir, file) in [
        ("run/dead", "owner"),
        ("run/unborn", ""),
        ("staging/build-x", "data"),
    ] {
        let dir = storage.root().join(dir);
        std::fs::create_dir(&dir).unwrap();
        if !file.is_empty() {
            std::fs::write(dir.join(file), "").unwrap();
        }
    }
    assert_eq!(storage.running_sandboxes().unwrap(), [name("alive")]);
    let mut told = Vec::new();
    let swept = storage
        .sweep(&mut |dir| {
            told.push(dir.join("owner").exists());
            Ok(())
        })
        .unwrap();
    told.sort_unstable();
    assert_eq!(
        told,
        [false, false, true],
        "each is told of while it is there"
    );
    assert!(swept.failures.is_empty(), "{:?}", swept.failures);
    assert_eq!(swept.staging, ["build-x"]);
    assert_eq!(swept.sandboxes, [name("dead"), name("unborn")]);
    assert_eq!(names_in(&storage, "run"), ["alive"]);
    assert_eq!(names_in(&storage, "staging"), [format!("build-{id}")]);
    assert!(build.validate(Default::default()).is_whole());
    drop((alive, staged));
}

#[test]
fn what_still_runs_in_a_left_over_keeps_it_until_it_can_be_ended() {
    let storage = storage();
    let run = storage.root().join("run/dead");
    std::fs::create_dir(&run).unwrap();
    std::fs::write(run.join("kept"), "").unwrap();
    let swept = storage
        .sweep(&mut |_| Err(std::io::Error::other("it runs on")))
        .unwrap();
    assert!(swept.failures[0].to_string().contains("it runs on"));
    // Its name is free, and one that takes it does not lose what is left either.
    drop(storage.run_dir(&name("dead")).unwrap());
    let mut shown = Vec::new();
    let mut look = |dir: &std::path::Path| {
        shown.push(dir.join("kept").exists());
        Ok(())
    };
    let swept = storage.sweep(&mut look).unwrap();
    assert!(swept.failures.is_empty(), "{:?}", swept.failures);
    assert_eq!(shown, [true]);
    assert!(names_in(&storage, "staging").is_empty());
}

#[test]
fn a_left_over_that_cannot_be_removed_is_reported_and_stops_nothing() {
    let storage = storage();
    let root = storage.root();
    std::fs::write(root.join("staging/a-file"), "").unwrap();
    std::os::unix::fs::symlink("/nowhere", root.join("staging/b-link")).unwrap();
    std::fs::write(root.join("run/a-file"), "").unwrap();
    for dir in ["staging/build-x", "run/dead"] {
        std::fs::create_dir(root.join(dir)).unwrap();
    }
    let swept = storage.sweep(&mut |_| Ok(())).unwrap();
    assert_eq!(swept.staging, ["build-x"]);
    assert_eq!(swept.sandboxes, [name("dead")]);
    let failures: Vec<_> = swept.failures.iter().map(ToString::to_string).collect();
    assert_eq!(failures.len(), 3, "{failures:?}");
    for (failure, path) in failures.iter().zip(["a-file", "b-link", "run/a-file"]) {
        assert!(failure.contains(path), "{failure}");
    }
    assert_eq!(names_in(&storage, "staging"), ["a-file", "b-link"]);
}

#[test]
fn left_overs_are_removed_while_others_may_have_the_lock() {
    let storage = storage();
    let id = BuildId::random();
    // As killed processes leave them, with enough in them to take a while.
    let dirs = [format!("staging/build-{id}"), "run/dead".to_owned()];
    for dir in &dirs {
        let dir = storage.root().join(dir);
        std::fs::create_dir(&dir).unwrap();
        for number in 0..2000 {
            std::fs::write(dir.join(number.to_string()), "").unwrap();
        }
    }
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| storage.sweep(&mut |_| Ok(())).unwrap());
        // Whoever comes first: neither name is busy, nor is anything of the new owner's removed.
        let staged = storage.begin_build(id).unwrap();
        let run = storage.run_dir(&name("dead")).unwrap();
        let swept = sweeper.join().unwrap();
        assert!(swept.failures.is_empty(), "{:?}", swept.failures);
        assert!(staged.path().is_dir() && run.path().is_dir());
        staged.write_vmstate(b"device state").unwrap();
        staged.commit(BuildInfo::default()).unwrap();
    });
    assert!(names_in(&storage, "staging").is_empty());
}

#[test]
fn a_template_is_deleted_with_its_build_or_neither_is() {
    let storage = storage();
    let debian = name("debian");
    let error = storage.delete_template_and_build(&debian).unwrap_err();
    assert!(matches!(error, Error::UnknownTemplate { .. }), "{error}");
    let build = store(&storage, None, &[Push::Data(vec![1])]);
    let id = build.id();
    storage.set_template(&debian, &id).unwrap();

    let in_use = storage.delete_template_and_build(&debian).unwrap_err();
    assert!(matches!(in_use, Error::BuildInUse { .. }), "{in_use}");
    let child = store(&storage, Some(&build), &[Push::Parent(1)]).id();
    drop(build);
    let parent = storage.delete_template_and_build(&debian).unwrap_err();
    assert!(matches!(parent, Error::HasChildren { .. }), "{parent}");
    storage.delete_build(&child).unwrap();
    storage.set_template(&name("other"), &id).unwrap();
    let named = storage.delete_template_and_build(&debian).unwrap_err();
    assert!(
        matches!(&named, Error::NamedByTemplate { templates, .. } if *templates == [name("other")]),
        "{named}"
    );
    storage.remove_template(&name("other")).unwrap();
    assert_eq!(storage.resolve("debian").unwrap(), id);

    assert_eq!(
        storage.delete_template_and_build(&debian).unwrap(),
        Some(id)
    );
    for part in ["builds", "templates", "staging"] {
        assert!(names_in(&storage, part).is_empty(), "{part}");
    }
}

#[test]
fn a_template_whose_build_is_gone_is_deleted_all_the_same() {
    let storage = storage();
    let id = store(&storage, None, &[]).id();
    storage.set_template(&name("debian"), &id).unwrap();
    std::fs::remove_dir_all(storage.root().join(format!("builds/{id}"))).unwrap();
    let deleted = storage.delete_template_and_build(&name("debian")).unwrap();
    assert_eq!(deleted, None);
    assert!(names_in(&storage, "templates").is_empty());
}
