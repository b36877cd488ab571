//! Checkpoints with real guests: a build is stored, and the same VM goes on.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use common::{
    Cleanup, assert_gone, at_step, boot_request, counts_on, host, kernel_is_content, kill_for_good,
    pause_into_new, pause_request, resume_build, sh, start_counter, template,
};
use torpor_build::{BuildId, PAGE_SIZE};
use torpor_sandbox::Sandbox;
use torpor_sandbox::boot::boot;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::report::PauseStep;
use torpor_sandbox::pause::{PauseFailure, checkpoint};
use torpor_sandbox::progress::Progress;

/// What the guest makes anew before each checkpoint.
const FRESH_BYTES: u64 = 16_000_000;
/// What a guest that is left alone writes meanwhile: its kernel, its agent and a shell at most.
const IDLE_BYTES_MAX: u64 = 8 << 20;

async fn fill(sandbox: &Sandbox, name: &str) -> String {
    let line = format!(
        "head -c {FRESH_BYTES} /dev/urandom > /dev/shm/{name}; echo {name} >> /root/log; \
         sha256sum < /dev/shm/{name}"
    );
    sh(sandbox, &line).await
}

/// The build is the guest at that moment: these files, no other.
async fn assert_is(host: &Host, build: &BuildId, files: &[(&str, String)]) {
    let (sandbox, _) = resume_build(host, build).await;
    for (name, sum) in files {
        let found = sh(&sandbox, &format!("sha256sum < /dev/shm/{name}")).await;
        assert_eq!(found, *sum, "{name} in {build}");
    }
    let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
    let log = sh(&sandbox, "cat /root/log").await;
    assert_eq!(log.lines().collect::<Vec<_>>(), names, "{build}");
    kernel_is_content(&sandbox, "a checkpoint's build").await;
}

async fn is_stored_again_and_again(host: &Host, mut sandbox: Sandbox) {
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    start_counter(&sandbox).await;
    let pid = sandbox.vmm().pid();
    let mut files = Vec::new();
    let mut seen = Vec::new();
    let mut count = 0;
    for name in ["one", "two", "three"] {
        let parent = sandbox.parent_id();
        files.push((name, fill(&sandbox, name).await));
        let request = pause_request(PauseFlags::default(), Progress::silent());
        let stored = checkpoint(sandbox, host, request).await.unwrap();
        sandbox = stored.sandbox;
        assert!(stored.not_thawed.is_none());
        let id = stored.build.id();
        cleanup.1.push(id);
        assert_eq!(stored.build.manifest().info.parent, parent);
        assert_eq!(sandbox.parent_id(), Some(id));
        assert_eq!(sandbox.vmm().pid(), pid, "the same VM goes on");
        count = counts_on(&sandbox, count).await;
        let memory = stored.report.memory;
        assert!(memory.raw_bytes >= FRESH_BYTES, "{memory:?}");
        if parent.is_some() {
            // Only what changed: not what the checkpoint before it has stored.
            assert!(
                memory.raw_bytes < FRESH_BYTES + IDLE_BYTES_MAX,
                "{} pages stored",
                memory.stored_pages
            );
        }
        seen.push((id, files.clone()));
    }
    // A pause after the checkpoints ends it, and stores next to nothing.
    let paused = pause_into_new(sandbox, host, PauseFlags::default()).await;
    cleanup.1.push(paused.build.id());
    assert_gone(pid);
    let stored_bytes = paused.report.memory.stored_pages * PAGE_SIZE as u64;
    assert!(stored_bytes < IDLE_BYTES_MAX, "{stored_bytes}");
    seen.push((paused.build.id(), files));
    for (id, files) in seen {
        assert_is(host, &id, &files).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_guest_is_stored_again_and_again_while_it_goes_on() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    is_stored_again_and_again(&host, sandbox).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_guest_is_stored_again_and_again_while_it_goes_on() {
    let host = host().await;
    let sandbox = boot(&host, boot_request("booted")).await.unwrap();
    is_stored_again_and_again(&host, sandbox).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dies_after_it_was_written_leaves_that_build() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let files = vec![("kept", fill(&sandbox, "kept").await)];
    let pid = sandbox.vmm().pid();
    let kill = at_step(PauseStep::GoOn, move || kill_for_good(pid));
    let request = pause_request(PauseFlags::default(), kill);
    let id = request.build;
    let _cleanup = Cleanup(host.storage(), vec![id]);
    match checkpoint(sandbox, &host, request).await {
        Err(PauseFailure::Lost {
            step: PauseStep::GoOn,
            last_build,
            ..
        }) => assert_eq!(last_build, Some(id)),
        other => panic!("{other:?}"),
    }
    assert_is(&host, &id, &files).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_whose_commit_fails_leaves_the_guest_running_and_its_next_one_whole() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let mut files = vec![("one", fill(&sandbox, "one").await)];
    let request = pause_request(PauseFlags::default(), Progress::silent());
    let first = checkpoint(sandbox, &host, request).await.unwrap();
    let mut cleanup = Cleanup(host.storage(), vec![first.build.id()]);

    files.push(("two", fill(&first.sandbox, "two").await));
    let id = BuildId::random();
    let staging = common::staging_of(&host, &id);
    let lose = at_step(PauseStep::Commit, move || {
        std::fs::remove_dir_all(staging).unwrap();
    });
    let mut request = pause_request(PauseFlags::default(), lose);
    request.build = id;
    let failed = checkpoint(first.sandbox, &host, request).await;
    let Err(PauseFailure::StillRunning { sandbox, step, .. }) = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(step, PauseStep::Commit);
    assert_eq!(sandbox.parent_id(), Some(first.build.id()));

    files.push(("three", fill(&sandbox, "three").await));
    let paused = pause_into_new(*sandbox, &host, PauseFlags::default()).await;
    cleanup.1.push(paused.build.id());
    assert_is(&host, &paused.build.id(), &files).await;
}
