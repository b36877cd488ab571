//! Pauses that fail: the sandbox goes on as it was or is lost, and the last build is intact.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{
    Cleanup, CopiedStorage, PATIENCE, assert_gone, at_step, counts_on, host, kill_for_good, lost,
    on_qemu, pause_into_new, pause_request, resume_build, sh, signal, staging_of, start_counter,
    still_running, template, try_pause, wait_until,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use torpor_build::{BuildId, ValidateOptions};
use torpor_guest::ReclaimCaps;
use torpor_sandbox::Sandbox;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::pause::report::PauseStep;
use torpor_sandbox::pause::{PauseFailure, PauseRequest, pause};

/// Reclaim and drain, both short.
fn every_step() -> PauseFlags {
    let reclaim_caps = ReclaimCaps {
        sync_ms: 200,
        drop_caches_ms: 200,
        compact_memory_ms: 200,
        fstrim_ms: 200,
    };
    PauseFlags {
        reclaim: true,
        reclaim_caps,
        drain_ceiling_ms: 100,
        ..PauseFlags::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_before_its_changes_are_known_loses_the_sandbox_and_nothing_else() {
    let host = host().await;
    let template = template(&host).await;
    for step in [
        PauseStep::FreezeUser,
        PauseStep::Reclaim,
        PauseStep::Drain,
        PauseStep::Stop,
        PauseStep::SaveState,
        PauseStep::Settle,
    ] {
        let (sandbox, _) = resume_build(&host, &template).await;
        let pid = sandbox.vmm().pid();
        let run = host.storage().run_path(sandbox.name());
        let progress = at_step(step, move || kill_for_good(pid));
        let request = pause_request(every_step(), progress);
        let id = request.build;
        let told = lost(pause(sandbox, &host, request).await);
        assert!(
            told.contains(&format!("its last build {template} is intact")),
            "{step}: {told}"
        );
        assert_gone(pid);
        assert!(!run.exists(), "{step}");
        assert!(!staging_of(&host, &id).exists(), "{step}");
        assert!(host.storage().open_build(&id).is_err(), "{step}");
    }
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_after_its_changes_are_known_leaves_a_whole_build() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    for step in [
        PauseStep::Scan,
        PauseStep::CaptureMemory,
        PauseStep::WriteMemory,
        PauseStep::WriteDisk,
        PauseStep::Commit,
    ] {
        let (sandbox, _) = resume_build(&host, &template).await;
        sh(
            &sandbox,
            &format!("echo {step} | tee /dev/shm/step > /root/step"),
        )
        .await;
        let pid = sandbox.vmm().pid();
        let progress = at_step(step, move || kill_for_good(pid));
        let paused = pause(
            sandbox,
            &host,
            pause_request(PauseFlags::default(), progress),
        )
        .await
        .unwrap();
        cleanup.1.push(paused.build.id());
        assert_gone(pid);
        let whole = paused.build.validate(ValidateOptions::default());
        assert!(whole.is_whole(), "{step}: {whole:?}");
        let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
        assert_eq!(
            sh(&sandbox, "cat /dev/shm/step /root/step").await,
            format!("{step}\n{step}")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_is_given_up_in_the_middle_leaves_nothing() {
    let host = host().await;
    let template = template(&host).await;
    for step in [
        PauseStep::Reclaim,
        PauseStep::SaveState,
        PauseStep::WriteMemory,
    ] {
        let (sandbox, _) = resume_build(&host, &template).await;
        let pid = sandbox.vmm().pid();
        let run = host.storage().run_path(sandbox.name());
        let (reached, at_the_step) = tokio::sync::oneshot::channel();
        let progress = at_step(step, move || reached.send(()).unwrap());
        let request = pause_request(every_step(), progress);
        let id = request.build;
        tokio::select! {
            biased;
            _ = at_the_step => {}
            _ = pause(sandbox, &host, request) => {}
        }
        assert_gone(pid);
        wait_until("the run directory is gone", || !run.exists());
        wait_until("nothing is staged", || !staging_of(&host, &id).exists());
        // Whether it was still in time or not: no half build.
        if let Ok(build) = host.storage().open_build(&id) {
            assert!(build.validate(ValidateOptions::default()).is_whole());
            drop(build);
            host.storage().delete_build(&id).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_stands_still_for_a_while_is_paused_without_its_help() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    start_counter(&sandbox).await;
    let count = counts_on(&sandbox, 1).await;
    let pid = sandbox.vmm().pid();
    signal(pid, Signal::SIGSTOP);
    // It goes on when the vCPUs are to be stopped: until then nobody in the guest can answer.
    let progress = at_step(PauseStep::Stop, move || signal(pid, Signal::SIGCONT));
    // With the ceilings of a host that is not slow.
    let options = HostOptions {
        storage: host.storage().root().to_path_buf(),
        vmm: on_qemu(),
        ..HostOptions::default()
    };
    let quick = Host::open(options).await.unwrap();
    let paused = pause(sandbox, &quick, pause_request(every_step(), progress))
        .await
        .unwrap();
    cleanup.1.push(paused.build.id());
    let report = &paused.report;
    let frozen = &report.steps[1];
    assert_eq!(frozen.step, PauseStep::FreezeUser);
    assert!(
        frozen.skipped.as_ref().unwrap().contains("did not answer"),
        "{frozen:?}"
    );
    assert!(
        report.reclaim.as_ref().unwrap().budget_exhausted,
        "{report:?}"
    );
    assert_eq!(report.guest_nonfree_bytes, None);
    // Who did not answer in time may have frozen them: they count as frozen.
    assert!(report.user_frozen_ms > 0.0, "{report:?}");
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    counts_on(&sandbox, count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_never_goes_on_is_given_up_and_killed() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let pid = sandbox.vmm().pid();
    signal(pid, Signal::SIGSTOP);
    let told = lost(try_pause(sandbox, &host, PauseFlags::default()).await);
    assert!(
        told.contains("did not answer stop") && told.contains("could not be resumed"),
        "{told}"
    );
    assert_gone(pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_id_committed_by_two_sandboxes_goes_to_one_and_the_other_runs_on() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (first, _) = resume_build(&host, &template).await;
    let (second, _) = resume_build(&host, &template).await;
    for (sandbox, name) in [(&first, "first"), (&second, "second")] {
        sh(sandbox, &format!("echo {name} > /dev/shm/name")).await;
        start_counter(sandbox).await;
    }
    let id = BuildId::random();
    cleanup.1.push(id);
    let request = || PauseRequest {
        build: id,
        ..pause_request(PauseFlags::default(), Default::default())
    };
    let (first, second) = tokio::join!(
        pause(first, &host, request()),
        pause(second, &host, request())
    );
    let (won, loser) = if first.is_ok() {
        ("first", second)
    } else {
        second.unwrap();
        ("second", first)
    };
    let (sandbox, step, reason) = still_running(loser);
    assert_eq!(
        step,
        PauseStep::Claim,
        "before anything is done to the guest"
    );
    assert!(reason.contains(&id.to_string()), "{reason}");
    assert_ne!(sh(&sandbox, "cat /dev/shm/name").await, won);
    counts_on(&sandbox, 1).await;
    let (resumed, _) = resume_build(&host, &id).await;
    assert_eq!(sh(&resumed, "cat /dev/shm/name").await, won);
    // Under another id it can be paused.
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    cleanup.1.push(paused.build.id());
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_ne!(sh(&sandbox, "cat /dev/shm/name").await, won);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_not_deleted_under_a_sandbox_nor_under_a_pause_on_top_of_it() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    let parent = pause_into_new(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(parent);
    let (sandbox, _) = resume_build(&host, &parent).await;
    let refused = move |host: &Host| {
        host.storage()
            .delete_build(&parent)
            .unwrap_err()
            .to_string()
    };
    let error = refused(&host);
    assert!(error.contains(&parent.to_string()), "{error}");

    let (sender, errors) = std::sync::mpsc::sync_channel(1);
    let rival = host.clone();
    let progress = at_step(PauseStep::Commit, move || {
        sender.send(refused(&rival)).unwrap();
    });
    let paused = pause(
        sandbox,
        &host,
        pause_request(PauseFlags::default(), progress),
    )
    .await
    .unwrap();
    let child = paused.build.id();
    cleanup.1.push(child);
    let error = errors.recv().unwrap();
    assert!(error.contains(&parent.to_string()), "{error}");
    let error = host
        .storage()
        .delete_build(&parent)
        .unwrap_err()
        .to_string();
    assert!(error.contains(&child.to_string()), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_whose_parent_was_torn_away_fails_and_the_sandbox_goes_on_counting() {
    let host = host().await;
    let template = template(&host).await;
    let copy = CopiedStorage::of(&host, &[template]).await;
    let (sandbox, _) = resume_build(&copy.host, &template).await;
    start_counter(&sandbox).await;
    // No delete of ours does this; a person with `rm -r` or `mv` does.
    let builds = copy.dir.path().join("builds");
    let (there, away) = (
        builds.join(template.to_string()),
        copy.dir.path().join("away"),
    );
    let mover = (there.clone(), away.clone());
    let progress = at_step(PauseStep::Commit, move || move_dir(&mover.0, &mover.1));
    let failed = pause(sandbox, &copy.host, pause_request(every_step(), progress)).await;
    let (sandbox, step, reason) = still_running(failed);
    assert_eq!(step, PauseStep::Commit);
    assert!(reason.contains(&template.to_string()), "{reason}");
    let count = counts_on(&sandbox, 1).await;

    move_dir(&away, &there);
    let paused = pause_into_new(sandbox, &copy.host, PauseFlags::default()).await;
    let (sandbox, _) = resume_build(&copy.host, &paused.build.id()).await;
    counts_on(&sandbox, count).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_a_freezer_survives_a_failed_pause() {
    let host = host().await;
    let template = template(&host).await;
    let copy = CopiedStorage::of(&host, &[template]).await;
    let (sandbox, _) = resume_build(&copy.host, &template).await;
    sh(&sandbox, "umount -l /sys/fs/cgroup").await;
    let builds = copy.dir.path().join("builds");
    let (there, away) = (
        builds.join(template.to_string()),
        copy.dir.path().join("away"),
    );
    let mover = (there.clone(), away.clone());
    let progress = at_step(PauseStep::Commit, move || move_dir(&mover.0, &mover.1));
    let failed = pause(sandbox, &copy.host, pause_request(every_step(), progress)).await;
    move_dir(&away, &there);
    // Whether its processes are frozen nobody can say; that it runs is what counts.
    let Err(PauseFailure::StillRunning {
        sandbox,
        not_thawed: Some(why),
        ..
    }) = failed
    else {
        panic!("not still running");
    };
    assert!(why.to_string().contains("cgroup"), "{why}");
    sandbox.envd().health().await.unwrap();
}

/// Out of process: the project's own renames are durable ones.
fn move_dir(from: &Path, to: &Path) {
    let moved = std::process::Command::new("mv")
        .arg(from)
        .arg(to)
        .status()
        .unwrap();
    assert!(moved.success());
}

/// A file system of a fixed size, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, bytes: u64) -> Self {
        let options = format!("size={bytes},mode=0700");
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        Self(at.to_path_buf())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_in_the_middle_of_a_pause_leaves_the_sandbox_as_it_was() {
    const ROOM_BYTES: u64 = 64 << 20;
    let origin = host().await;
    let template = template(&origin).await;
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path(), 1 << 30);
    let storage = disk.0.join("storage");
    let options = HostOptions {
        storage: storage.clone(),
        vmm: on_qemu(),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    let host = Host::open(options).await.unwrap();
    let manifest = origin.storage().open_build(&template).unwrap();
    let info = &manifest.manifest().info;
    let image = origin
        .storage()
        .image_path(&info.base_image.unwrap())
        .unwrap();
    let kernel = origin.storage().kernel_path(&info.kernel.unwrap()).unwrap();
    host.storage().import_image(&image).unwrap();
    host.storage().import_kernel(&kernel, None).unwrap();
    common::copy_dir(
        manifest.path(),
        &storage.join("builds").join(template.to_string()),
    );

    let (sandbox, _) = resume_build(&host, &template).await;
    start_counter(&sandbox).await;
    sh(&sandbox, "head -c 30000000 /dev/urandom > /dev/shm/kept").await;
    let sum = sh(&sandbox, "sha256sum < /dev/shm/kept").await;
    let count = counts_on(&sandbox, 1).await;
    // All but a few MiB of what the pause needs are taken when it begins to write.
    let filler = disk.0.join("filler");
    let progress = at_step(PauseStep::WriteMemory, {
        let filler = filler.clone();
        move || {
            fill_all_but(&filler, 8 << 20);
            // Long enough for a clock that nobody sets to show it.
            std::thread::sleep(STOOD_STILL);
        }
    });
    let request = pause_request(PauseFlags::default(), progress);
    let id = request.build;
    let (sandbox, step, reason) = still_running(pause(sandbox, &host, request).await);
    assert!(
        matches!(step, PauseStep::WriteMemory | PauseStep::WriteDisk),
        "{step}"
    );
    assert!(
        reason.contains("memory.data") && reason.contains("--storage"),
        "{reason}"
    );
    assert!(!staging_of(&host, &id).exists());
    assert_eq!(host.storage().list_builds().unwrap().len(), 1);
    let count = counts_on(&sandbox, count).await;
    assert_eq!(sh(&sandbox, "sha256sum < /dev/shm/kept").await, sum);
    assert!(
        clock_lag(&sandbox).await < STOOD_STILL / 2,
        "the clock is set"
    );

    std::fs::remove_file(&filler).unwrap();
    let room = nix::sys::statvfs::statvfs(&disk.0).unwrap();
    assert!(room.blocks_available() * room.fragment_size() > ROOM_BYTES);
    let paused = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_eq!(sh(&sandbox, "sha256sum < /dev/shm/kept").await, sum);
    counts_on(&sandbox, count).await;
    sandbox.end().await;
}

/// How long a guest stands still in the test of its clock.
const STOOD_STILL: Duration = Duration::from_secs(4);

/// How far the guest's wall clock is behind the host's.
async fn clock_lag(sandbox: &Sandbox) -> Duration {
    // Taken first: how long the answer takes is not the clock's.
    let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let guest: u64 = sh(sandbox, "date +%s%3N").await.parse().unwrap();
    host.saturating_sub(Duration::from_millis(guest))
}

/// Takes all room of a file's disk but `left_bytes`.
fn fill_all_but(filler: &Path, left_bytes: u64) {
    let file = std::fs::File::create(filler).unwrap();
    let room = nix::sys::statvfs::statvfs(filler).unwrap();
    let free = room.blocks_available() * room.fragment_size();
    let bytes = i64::try_from(free.saturating_sub(left_bytes)).unwrap();
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, bytes).unwrap();
}
