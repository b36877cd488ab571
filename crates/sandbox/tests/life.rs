//! A sandbox's life with a real guest: boot, pause, resume, pause again.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use common::{Cleanup, host, pause_into_new, resume_build, sh, template};
use torpor_sandbox::flags::PauseFlags;

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_files_survive_generations_of_pause_and_resume() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(
        &sandbox,
        "head -c 8000000 /dev/urandom > /dev/shm/kept; cp /dev/shm/kept /root/kept",
    )
    .await;
    let sum = sh(&sandbox, "sha256sum < /dev/shm/kept").await;
    let mut last = pause_into_new(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(last);
    for generation in 0..3 {
        let (sandbox, report) = resume_build(&host, &last).await;
        assert!(report.eager.is_none(), "{report:?}");
        assert_eq!(sh(&sandbox, "sha256sum < /dev/shm/kept").await, sum);
        sh(&sandbox, "echo 3 > /proc/sys/vm/drop_caches").await;
        assert_eq!(sh(&sandbox, "sha256sum < /root/kept").await, sum);
        sh(&sandbox, &format!("echo {generation} >> /root/log")).await;
        last = pause_into_new(sandbox, &host, PauseFlags::default())
            .await
            .build
            .id();
        cleanup.1.push(last);
    }
    let (sandbox, _) = resume_build(&host, &last).await;
    assert_eq!(sh(&sandbox, "cat /root/log").await, "0\n1\n2");
    assert_eq!(
        sh(
            &sandbox,
            "dmesg | grep -cE 'BUG:|Oops|segfault|stall' || true"
        )
        .await,
        "0"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reclaimed_and_drained_pause_stores_about_what_the_guest_still_needs() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    // A page cache and memory that was used and freed: what a lean pause leaves out.
    sh(
        &sandbox,
        "cat /usr/bin/* > /dev/null; head -c 64000000 /dev/urandom > /dev/shm/f; rm /dev/shm/f",
    )
    .await;
    let flags = PauseFlags {
        reclaim: true,
        drain_ceiling_ms: 60_000,
        ..PauseFlags::default()
    };
    let paused = pause_into_new(sandbox, &host, flags).await;
    cleanup.1.push(paused.build.id());
    let stored = paused
        .build
        .stats()
        .unwrap()
        .memory
        .unwrap()
        .reachable_stored_bytes;
    let nonfree = paused.report.guest_nonfree_bytes.unwrap();
    // The bar of the bench is 1.10; a test is no bench, and a guest is never quite still.
    assert!(
        stored < nonfree * 5 / 4,
        "stored {stored}, non-free {nonfree}"
    );
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    sh(&sandbox, "true").await;
}
