//! The other ways to the same result: older hosts, guests that do not help, flags that change.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use std::time::Duration;

use common::{
    Cleanup, PATIENCE, UNBIND_BALLOON, counts_on, host, host_with, network_template, on_qemu,
    pause_into_new, resume_build, sh, start_counter, storage_dir, template, wait_until,
};
use torpor_build::{BuildId, Entry, ImageReader, PAGE_SIZE};
use torpor_guest::ReclaimCaps;
use torpor_guest::reclaim::StepOutcome;
use torpor_pager::WriteTracking;
use torpor_sandbox::Sandbox;
use torpor_sandbox::flags::{FlagSubject, PauseFlags};
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_vmm::DrainOutcome;

/// Two generations with memory that stays, memory that changes, and memory that goes.
async fn two_generations(host: &Host, options: &ResumeOptions, cleanup: &mut Cleanup<'_>) {
    let mut build = template(host).await;
    let mut kept = None;
    for generation in 0..3 {
        let (sandbox, report) = resume(host, &build, options).await.unwrap();
        assert_eq!(report.eager.is_some(), options.eager, "{report:?}");
        if let Some(sums) = &kept {
            assert_eq!(&sums_of(&sandbox).await, sums, "generation {generation}");
            sh(&sandbox, "[ ! -e /dev/shm/gone ] && rm /dev/shm/changed").await;
        } else {
            sh(&sandbox, "head -c 6000000 /dev/urandom > /dev/shm/kept").await;
            start_counter(&sandbox).await;
        }
        counts_on(&sandbox, generation).await;
        sh(
            &sandbox,
            "head -c 6000000 /dev/urandom | tee /dev/shm/gone > /dev/shm/changed; \
             cp /dev/shm/changed /root/file; rm /dev/shm/gone",
        )
        .await;
        kept = Some(sums_of(&sandbox).await);
        let flags = PauseFlags {
            drain_ceiling_ms: 3000,
            ..PauseFlags::default()
        };
        build = pause_into_new(sandbox, host, flags).await.build.id();
        cleanup.1.push(build);
    }
}

async fn sums_of(sandbox: &Sandbox) -> String {
    sh(
        sandbox,
        "sha256sum /dev/shm/kept /dev/shm/changed /root/file",
    )
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_right_over_generations_when_writes_are_tracked_synchronously() {
    let host = host_with(Some(WriteTracking::Sync)).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    two_generations(&host, &ResumeOptions::default(), &mut cleanup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_right_over_generations_when_it_is_filled_before_the_guest_starts() {
    let host = host().await;
    let options = ResumeOptions {
        eager: true,
        ..ResumeOptions::default()
    };
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    two_generations(&host, &options, &mut cleanup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_of_a_millisecond_says_that_its_ceiling_was_reached_and_the_pause_is_whole() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "head -c 6000000 /dev/urandom > /dev/shm/kept").await;
    let sum = sh(&sandbox, "sha256sum /dev/shm/kept").await;
    let flags = PauseFlags {
        drain_ceiling_ms: 1,
        ..PauseFlags::default()
    };
    let paused = pause_into_new(sandbox, &host, flags).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    assert_eq!(
        paused.report.drain.unwrap().outcome,
        DrainOutcome::CeilingReached
    );
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_eq!(sh(&sandbox, "sha256sum /dev/shm/kept").await, sum);
}

/// A host with a flag file of its own.
async fn host_with_flags(dir: &tempfile::TempDir, flags: &str) -> Host {
    let file = dir.path().join("flags.json");
    std::fs::write(&file, flags).unwrap();
    let options = HostOptions {
        storage: storage_dir(),
        flags: Some(file),
        vmm: on_qemu(),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    Host::open(options).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_report_is_paused_without_a_drain() {
    let dir = tempfile::tempdir().unwrap();
    let host = host_with_flags(&dir, r#"{"flags": {"free-page-reporting": false}}"#).await;
    let template = network_template(&host, "silent-network").await;
    let (sandbox, _) = resume_build(&host, &template).await;
    assert!(!sandbox.spec().balloon.reporting);
    let flags = PauseFlags {
        drain_ceiling_ms: 5000,
        ..PauseFlags::default()
    };
    let paused = pause_into_new(sandbox, &host, flags).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    assert_eq!(
        paused.report.drain.unwrap().outcome,
        DrainOutcome::Unsupported
    );
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_in_a_file_hold_for_the_next_pause_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let host = host_with_flags(&dir, r#"{"flags": {"reclaim-on-pause": true}}"#).await;
    let mut build = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let edits = [
        None,
        Some(r#"{"flags": {"free-page-hinting-timeout-ms": 10}}"#),
        Some(
            r#"{"flags": {"reclaim-on-pause": true, "guest-pause-reclaim": {"sync": 0, "compact_memory": 0}}}"#,
        ),
        Some(
            r#"{"flags": {"reclaim-on-pause": true}, "templates": {"plain": {"reclaim-on-pause": false}}}"#,
        ),
    ];
    let mut seen = Vec::new();
    for edit in edits {
        let (sandbox, _) = resume_build(&host, &build).await;
        if let Some(edit) = edit {
            std::fs::write(dir.path().join("flags.json"), edit).unwrap();
        }
        let subject = FlagSubject {
            sandbox: Some(sandbox.name().to_string()),
            template: sandbox.spec().template.as_ref().map(ToString::to_string),
        };
        let flags = host.flags().for_pause(&subject).await;
        let paused = pause_into_new(sandbox, &host, flags).await;
        let outcomes = paused.report.reclaim.map(|report| {
            let outcome = |at: usize| report.steps[at].outcome == StepOutcome::Skipped;
            (outcome(0), outcome(2))
        });
        seen.push((outcomes, paused.report.drain.is_some()));
        build = paused.build.id();
        cleanup.1.push(build);
    }
    assert_eq!(
        seen,
        [
            (Some((false, false)), false),
            (None, true),
            (Some((true, true)), false),
            (None, false),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reclaim_whose_sync_hangs_is_bounded_by_its_cap_and_the_other_steps_still_run() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    replace_sync(&sandbox, "exec sleep 1000").await;
    let flags = PauseFlags {
        reclaim: true,
        ..PauseFlags::default()
    };
    let paused = pause_into_new(sandbox, &host, flags).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    let reclaim = paused.report.reclaim.unwrap();
    assert_eq!(
        reclaim.steps[0].outcome,
        StepOutcome::Timeout,
        "{reclaim:?}"
    );
    assert!(
        reclaim.steps[1..]
            .iter()
            .all(|step| step.outcome != StepOutcome::NotReached),
        "{reclaim:?}"
    );
    // Ten times the cap, and a hundredth of the hang.
    assert!(reclaim.steps[0].ms < 5000, "{reclaim:?}");
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_eq!(sh(&sandbox, "pgrep -c -x sleep || true").await, "0");
}

/// Puts another program in front of the guest's `sync`.
async fn replace_sync(sandbox: &Sandbox, line: &str) {
    let before = sh(sandbox, "command -v sync").await;
    sh(
        sandbox,
        &format!(
            "mkdir -p /usr/local/sbin; printf '#!/bin/sh\\n%s\\n' '{line}' > /usr/local/sbin/sync; \
             chmod +x /usr/local/sbin/sync"
        ),
    )
    .await;
    let after = sh(sandbox, "command -v sync").await;
    assert_ne!(
        before, after,
        "the guest's PATH has no room for another sync"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_users_processes_stand_still_while_the_guest_reclaims() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    start_counter(&sandbox).await;
    counts_on(&sandbox, 1).await;
    // The reclaim itself looks at the counter, ten of its periods apart.
    replace_sync(
        &sandbox,
        "tail -n 1 /dev/shm/count > /dev/shm/frozen; sleep 1; tail -n 1 /dev/shm/count >> /dev/shm/frozen",
    )
    .await;
    let flags = PauseFlags {
        reclaim: true,
        reclaim_caps: ReclaimCaps {
            sync_ms: 20_000,
            ..ReclaimCaps::default()
        },
        ..PauseFlags::default()
    };
    let paused = pause_into_new(sandbox, &host, flags).await;
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    assert!(
        paused.report.user_frozen_ms >= 1000.0,
        "{:?}",
        paused.report
    );
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    let seen = sh(&sandbox, "cat /dev/shm/frozen").await;
    let (first, second) = seen.split_once('\n').unwrap();
    assert_eq!(first, second, "the counter went on while it was frozen");
    counts_on(&sandbox, first.parse().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_removed_while_the_guest_ran_reads_as_zero_after_the_resume() {
    freed_pages_read_as_zero(false, Entry::Removed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_free_by_the_scan_reads_as_zero_after_the_resume() {
    freed_pages_read_as_zero(true, Entry::Free).await;
}

async fn freed_pages_read_as_zero(free_page_scan: bool, recorded_as: Entry) {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "head -c 32000000 /dev/urandom > /dev/shm/gone").await;
    let before = pause_into_new(sandbox, &host, PauseFlags::default()).await;
    cleanup.1.push(before.build.id());
    let (sandbox, _) = resume_build(&host, &before.build.id()).await;
    let removed = || sandbox.pager_stats().unwrap().pages_removed;
    let removed_before = removed();
    // What is being reported is on no list of free pages: no round may meet the stop.
    if free_page_scan {
        sh(&sandbox, UNBIND_BALLOON).await;
    }
    sh(&sandbox, "rm /dev/shm/gone").await;
    if !free_page_scan {
        wait_until("the guest has given back most of the file", || {
            removed() >= removed_before + 5000
        });
    }
    let flags = PauseFlags {
        drain_ceiling_ms: if free_page_scan { 0 } else { 10_000 },
        free_page_scan,
        ..PauseFlags::default()
    };
    let after = pause_into_new(sandbox, &host, flags).await;
    cleanup.1.push(after.build.id());

    let (old, new) = (
        before.build.memory().unwrap(),
        after.build.memory().unwrap(),
    );
    let freed = freed_since(&old, &new, recorded_as);
    let report = (
        &after.report.memory,
        &after.report.scan,
        &after.report.drain,
    );
    assert!(
        freed.len() > 4000,
        "only {} pages freed: {report:?}",
        freed.len()
    );
    let (sandbox, _) = resume_build(&host, &after.build.id()).await;
    let mut zero = 0;
    for page in &freed {
        // As the guest's processor would read it: by a fault that the pager answers.
        let bytes = read_as_guest(&sandbox, *page);
        let mut stale = vec![0; PAGE_SIZE];
        old.read_pages(*page, &mut stale).unwrap();
        assert_ne!(bytes, stale, "page {page} came back from the parent");
        zero += u64::from(bytes.iter().all(|byte| *byte == 0));
    }
    // A running guest may have begun to use a few of them.
    assert!(
        zero * 10 >= freed.len() as u64 * 9,
        "{zero} of {}",
        freed.len()
    );
}

/// Pages with data in `old` that `new` has recorded as nobody's.
fn freed_since(old: &ImageReader, new: &ImageReader, recorded_as: Entry) -> Vec<u64> {
    let has_data = |page| {
        old.index()
            .run_at(page)
            .is_some_and(|run| !run.what.reads_as_zero())
    };
    new.index()
        .runs()
        .filter(|run| run.what == recorded_as)
        .flat_map(|run| run.first_page..run.first_page + run.pages)
        .filter(|page| has_data(*page))
        .take(8000)
        .collect()
}

fn read_as_guest(sandbox: &Sandbox, page: u64) -> Vec<u8> {
    let memory = sandbox.vmm().memory().unwrap();
    let offset = page * PAGE_SIZE as u64;
    let mapping = memory
        .mappings
        .iter()
        .find(|mapping| {
            (mapping.guest_offset_bytes..mapping.guest_offset_bytes + mapping.len_bytes)
                .contains(&offset)
        })
        .unwrap();
    let base = mapping.host_addr + (offset - mapping.guest_offset_bytes);
    let mut bytes = vec![0; PAGE_SIZE];
    let read = nix::sys::uio::process_vm_readv(
        nix::unistd::Pid::from_raw(memory.pid.try_into().unwrap()),
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &[nix::sys::uio::RemoteIoVec {
            base: base.try_into().unwrap(),
            len: PAGE_SIZE,
        }],
    );
    assert_eq!(read, Ok(PAGE_SIZE));
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_a_network_reaches_the_host_before_and_after_a_resume() {
    let dir = tempfile::tempdir().unwrap();
    let host = host_with_flags(&dir, r#"{"flags": {"free-page-reporting": false}}"#).await;
    let template = network_template(&host, "silent-network").await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        for greeting in 0_u64.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            // A guest that has gone is no failure of the server.
            drop(
                stream
                    .write_all(format!("hello {greeting}").as_bytes())
                    .await,
            );
        }
    });
    // 10.0.2.2 is the host's loopback.
    let ask = format!("exec 3<>/dev/tcp/10.0.2.2/{port} && cat <&3");
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let mut build: BuildId = template;
    for generation in 0..3 {
        let (sandbox, _) = resume_build(&host, &build).await;
        assert!(sandbox.spec().network);
        let command = torpor_guest::Command::new("bash").arg("-c").arg(&ask);
        let output = sandbox
            .envd()
            .run(&command, Duration::from_secs(60))
            .await
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            format!("hello {generation}"),
            "{output:?}"
        );
        build = pause_into_new(sandbox, &host, PauseFlags::default())
            .await
            .build
            .id();
        cleanup.1.push(build);
    }
    server.abort();
}
