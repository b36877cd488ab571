//! Builds that must not be resumed, or not any further: unknown, damaged, another VMM's.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use std::time::Duration;

use common::{
    Cleanup, CopiedStorage, PATIENCE, assert_gone, every_frame, flip, host, lost, pause_into_new,
    put_program, resume_build, sh, storage_dir, template, try_pause,
};
use torpor_build::{Build, BuildId, BuildInfo, ImageKind, PageContent};
use torpor_sandbox::error::StartError;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::vmm::{VmmKind, VmmOptions};

/// The error of a resume that must fail, and leave no sandbox.
async fn refused(host: &Host, id: &BuildId, options: &ResumeOptions) -> StartError {
    let error = match resume(host, id, options).await {
        Ok(_) => panic!("build {id} was resumed"),
        Err(error) => error,
    };
    if host.storage().root() != storage_dir() {
        assert_eq!(host.storage().running_sandboxes().unwrap(), []);
    }
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_build_is_refused_by_its_id() {
    let host = host().await;
    let id = BuildId::random();
    let error = refused(&host, &id, &ResumeOptions::default()).await;
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    assert!(
        matches!(
            error,
            StartError::Build(torpor_build::Error::UnknownBuild { .. })
        ),
        "{error:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_manifest_index_or_device_state_is_named_and_nothing_runs() {
    let host = host().await;
    let id = template(&host).await;
    let copy = CopiedStorage::of(&host, &[id]).await;
    for name in ["manifest.json", "memory.index", "disk.index", "vmstate"] {
        let path = copy.file(&id, name);
        let middle = std::fs::metadata(&path).unwrap().len() / 2;
        flip(&path, std::iter::once(middle));
        let error = refused(&copy.host, &id, &ResumeOptions::default())
            .await
            .to_string();
        assert!(error.contains(path.to_str().unwrap()), "{name}: {error}");
        flip(&path, std::iter::once(middle));
    }
    // Turned back, it is as good as before.
    let (sandbox, _) = resume_build(&copy.host, &id).await;
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_memory_ends_the_resume_with_file_and_offset_lazily_and_eagerly() {
    let host = host().await;
    let id = template(&host).await;
    let copy = CopiedStorage::of(&host, &[id]).await;
    let path = copy.file(&id, "memory.data");
    flip(&path, every_frame(&path));
    for (eager, no_prefetch) in [(false, false), (false, true), (true, false)] {
        let options = ResumeOptions {
            eager,
            no_prefetch,
            ..ResumeOptions::default()
        };
        let error = refused(&copy.host, &id, &options).await.to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("is damaged at byte"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_damaged_under_a_running_guest_kills_its_vmm_and_is_named() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "head -c 16000000 /dev/urandom > /dev/shm/kept").await;
    let child = pause_into_new(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(child);
    let copy = CopiedStorage::of(&host, &[template, child]).await;
    let (sandbox, _) = resume_build(&copy.host, &child).await;
    let path = copy.file(&child, "memory.data");
    flip(&path, every_frame(&path));

    let reading = torpor_guest::Command::shell("cat /dev/shm/kept > /dev/null");
    let read = sandbox.envd().run(&reading, Duration::from_secs(60)).await;
    read.unwrap_err();
    let pid = sandbox.vmm().pid();
    sandbox.vmm().wait_exit().await;
    let failure = sandbox.pager_failure().unwrap().to_string();
    assert!(failure.contains(path.to_str().unwrap()), "{failure}");

    let told = lost(try_pause(sandbox, &copy.host, PauseFlags::default()).await);
    assert!(told.contains(path.to_str().unwrap()), "{told}");
    assert!(
        told.contains(&format!("its last build {child} is intact")),
        "{told}"
    );
    assert_gone(pid);
}

/// A build on top of `parent` that says something else about its VMM.
fn same_but(parent: &Build, change: impl FnOnce(&mut BuildInfo)) -> BuildId {
    let staged = parent.storage().begin_build(BuildId::random()).unwrap();
    for kind in [ImageKind::Memory, ImageKind::Disk] {
        let image = std::sync::Arc::new(parent.image(kind).unwrap());
        let pages = image.len_pages();
        let mut writer = staged.image_writer(kind, pages, Some(image)).unwrap();
        writer.push(0, pages, PageContent::Parent).unwrap();
        writer.finish().unwrap();
    }
    staged
        .write_vmstate(&parent.read_vmstate().unwrap())
        .unwrap();
    let mut info = parent.manifest().info.clone();
    info.parent = Some(parent.id());
    change(&mut info);
    staged.commit(info).unwrap().id()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_qemus_build_is_refused_with_both_versions_and_the_next_step() {
    let host = host().await;
    let template = template(&host).await;
    let parent = host.storage().open_build(&template).unwrap();
    let ours = host.vmm().version();
    // This host's VMM was chosen by name, so that another one is not looked for.
    let others: [fn(&mut BuildInfo); 3] = [
        |info| info.vmm.version = "6.0.0".to_owned(),
        |info| info.vmm.accel = "kvm".to_owned(),
        |info| info.vmm.name = "firecracker".to_owned(),
    ];
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    for (change, words) in others.into_iter().zip([
        ["6.0.0", &ours, "install"],
        ["kvm", "tcg", "install"],
        [
            "firecracker",
            "--vmm qemu was asked for",
            "or say --vmm firecracker",
        ],
    ]) {
        let id = same_but(&parent, change);
        cleanup.1.push(id);
        let error = refused(&host, &id, &ResumeOptions::default())
            .await
            .to_string();
        for word in words.into_iter().chain([id.to_string().as_str()]) {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
    // The same build but for that can be resumed.
    let id = same_but(&parent, |_| ());
    cleanup.1.push(id);
    let (sandbox, _) = resume_build(&host, &id).await;
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_qemu_has_another_version_resumes_nothing_of_ours() {
    let host = host().await;
    let template = template(&host).await;
    let dir = tempfile::tempdir().unwrap();
    let qemu = dir.path().join("qemu");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo 'QEMU emulator version 9.9.9'; exit; }}\nexec {} \"$@\"\n",
        host.vmm().path().display()
    );
    put_program(&qemu, &script);
    let options = HostOptions {
        storage: storage_dir(),
        vmm: VmmOptions {
            kind: Some(VmmKind::Qemu),
            qemu: Some(qemu),
            firecracker: None,
            ..VmmOptions::default()
        },
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    let other = Host::open(options).await.unwrap();
    let error = refused(&other, &template, &ResumeOptions::default())
        .await
        .to_string();
    assert!(
        error.contains("9.9.9") && error.contains(&host.vmm().version()),
        "{error}"
    );
}
