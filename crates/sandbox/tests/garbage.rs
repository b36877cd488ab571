//! The proof that a page which the scan calls free is nobody's: at random moments of a guest that
//! allocates, frees, writes files and forks without a pause, every such page is overwritten, and
//! the guest goes on as if nothing had been.

#![allow(missing_docs, reason = "a test program has no interface")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use common::*;
use nix::fcntl::{FallocateFlags, fallocate};
use torpor_build::{BuildId, PAGE_SIZE, PageRun};
use torpor_guest::{Command, Selector};
use torpor_sandbox::Sandbox;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_workload::{CHECK_COMMAND, Churned};

/// Moments at which each guest's free pages are overwritten.
const MOMENTS: usize = 10;
const MOMENTS_LONG: usize = 100;
/// Of a lazily resumed guest, after so many moments the next one is resumed.
const MOMENTS_PER_RESUME: usize = 5;
/// Longest wait for the pager to settle.
const SETTLE_MAX: Duration = Duration::from_secs(10);
const ANSWER_MAX: Duration = Duration::from_secs(60);
const GUEST_PROGRAM: &str = "/usr/local/bin/torpor-workload";
const TAG: &str = "churn";

/// What is done with a free page.
#[derive(Debug, Clone, Copy)]
enum Overwrite {
    Garbage,
    Zeros,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_guest_does_not_miss_its_free_pages() {
    for kernel in kernels() {
        booted(&kernel, MOMENTS).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazily_resumed_guest_does_not_miss_its_free_pages() {
    for kernel in kernels() {
        resumed(&kernel, MOMENTS).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: a hundred moments on each kernel"]
async fn a_booted_guest_does_not_miss_its_free_pages_a_hundred_times() {
    for kernel in kernels() {
        booted(&kernel, MOMENTS_LONG).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes long: a hundred moments on each kernel"]
async fn a_lazily_resumed_guest_does_not_miss_its_free_pages_a_hundred_times() {
    for kernel in kernels() {
        resumed(&kernel, MOMENTS_LONG).await;
    }
}

async fn booted(kernel: &str, moments: usize) {
    let host = host().await;
    let sandbox = churning(&host, kernel).await;
    let mut random = seed();
    let mut overwritten = 0;
    for moment in 0..moments {
        let how = if moment % 3 == 2 {
            Overwrite::Zeros
        } else {
            Overwrite::Garbage
        };
        overwritten += at_a_random_moment(&sandbox, &host, &mut random, how).await;
        unharmed(&sandbox, &format!("{kernel}, moment {moment}")).await;
    }
    let done = stop(&sandbox, kernel).await;
    println!("Linux {kernel}, booted: {moments} moments, {overwritten} pages, {done:?}");
    sandbox.end().await;
}

async fn resumed(kernel: &str, moments: usize) {
    let host = host().await;
    let sandbox = churning(&host, kernel).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let mut build = paused(&host, sandbox, &mut cleanup).await;
    let mut random = seed();
    let (mut moment, mut overwritten) = (0, 0);
    loop {
        // Without prefetch nearly all of the page array is absent at the first moment.
        let options = ResumeOptions {
            no_prefetch: true,
            ..ResumeOptions::default()
        };
        let (sandbox, _) = resume(&host, &build, &options).await.unwrap();
        for in_this_resume in 0..MOMENTS_PER_RESUME {
            let what = format!("Linux {kernel}, resumed, moment {moment}");
            if in_this_resume == 0 {
                // Huge pages: taking a large free block changes its head's entry alone; those of its
                // other pages, perhaps on absent pages of the array, stay as the parent had them.
                sh(&sandbox, "python3 -c 'x = bytearray(8 << 20)'").await;
            }
            overwritten +=
                at_a_random_moment(&sandbox, &host, &mut random, Overwrite::Garbage).await;
            unharmed(&sandbox, &what).await;
            moment += 1;
        }
        if moment >= moments {
            let done = stop(&sandbox, kernel).await;
            println!("Linux {kernel}, resumed: {moment} moments, {overwritten} pages, {done:?}");
            sandbox.end().await;
            return;
        }
        // What the scan leaves out of this build reads as zero in the next resume.
        build = paused(&host, sandbox, &mut cleanup).await;
    }
}

async fn paused(host: &Host, sandbox: Sandbox, cleanup: &mut Cleanup<'_>) -> BuildId {
    let paused = pause_into_new(sandbox, host, PauseFlags::default()).await;
    let scan = paused.report.scan.unwrap();
    assert_eq!(scan.why_not(), None);
    cleanup.1.push(paused.build.id());
    paused.build.id()
}

/// A guest of two processors that churns.
async fn churning(host: &Host, kernel: &str) -> Sandbox {
    let request = BootRequest {
        kernel: kernel.to_owned(),
        vcpus: 2,
        ..boot_request("churn")
    };
    let sandbox = boot(host, request).await.unwrap();
    upload(&sandbox, &workload(), GUEST_PROGRAM).await;
    let huge_pages = "cd /sys/kernel/mm/transparent_hugepage; \
                      for f in enabled hugepages-*/enabled; do [ ! -e $f ] || echo always > $f; done";
    sh(&sandbox, huge_pages).await;
    let command = Command::new(GUEST_PROGRAM)
        .arg("churn")
        .arg("/root/churn")
        .stdin()
        .tag(TAG);
    let mut process = sandbox.envd().start(&command, None).await.unwrap();
    let first: Churned = line(&mut process, ANSWER_MAX).await;
    assert_eq!(first.damaged, 0);
    sandbox
}

/// Stops the guest, overwrites every page that is free, lets it go on. How many these were.
async fn at_a_random_moment(
    sandbox: &Sandbox,
    host: &Host,
    random: &mut u64,
    how: Overwrite,
) -> u64 {
    tokio::time::sleep(Duration::from_millis(20 + next(random) % 300)).await;
    sandbox.vmm().stop_vcpus().await.unwrap();
    let found = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await;
    let (report, free) = found.unwrap();
    assert_eq!(report.why_not(), None);
    let memory = File::from(sandbox.vmm().memory().unwrap().memfd);
    let pages = free.iter().map(|run| run.pages).sum();
    assert!(pages > 1000, "{pages} free pages: nothing is proven");
    let seed = next(random);
    tokio::task::spawn_blocking(move || overwrite(&memory, &free, how, seed))
        .await
        .unwrap();
    sandbox.vmm().resume_vcpus().await.unwrap();
    pages
}

fn overwrite(memory: &File, free: &[PageRun], how: Overwrite, mut random: u64) {
    let page = PAGE_SIZE as u64;
    for run in free {
        let (from, len) = (run.first_page * page, run.pages * page);
        match how {
            Overwrite::Zeros => {
                let punch =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (from, len) = (from.try_into().unwrap(), len.try_into().unwrap());
                fallocate(memory, punch, from, len).unwrap();
            }
            Overwrite::Garbage => {
                let mut garbage = vec![0; len.try_into().unwrap()];
                for word in garbage.chunks_exact_mut(8) {
                    word.copy_from_slice(&next(&mut random).to_le_bytes());
                }
                memory.write_all_at(&garbage, from).unwrap();
            }
        }
    }
}

/// The guest's data is whole and its kernel has nothing to say.
async fn unharmed(sandbox: &Sandbox, what: &str) {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = sandbox.envd().connect(&selector).await.unwrap();
    let ask = format!("{CHECK_COMMAND}\n");
    sandbox
        .envd()
        .send_input(&selector, ask.as_bytes())
        .await
        .unwrap();
    let churned: Churned = line(&mut process, ANSWER_MAX).await;
    assert_eq!(churned.damaged, 0, "{what}: {churned:?}");
    kernel_is_content(sandbox, what).await;
}

/// Ends the churn: all that it still held is verified.
async fn stop(sandbox: &Sandbox, what: &str) -> Churned {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = sandbox.envd().connect(&selector).await.unwrap();
    sandbox.envd().close_stdin(&selector).await.unwrap();
    let churned: Churned = line(&mut process, ANSWER_MAX).await;
    assert_eq!(churned.damaged, 0, "{what}: {churned:?}");
    assert!(
        churned.pieces > 0 && churned.files > 0 && churned.forks > 0,
        "{churned:?}"
    );
    kernel_is_content(sandbox, what).await;
    churned
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    // Printed, so that a failure can be repeated as far as a running guest can.
    println!("seed {}", now.as_nanos());
    now.as_nanos() as u64 | 1
}

/// xorshift64*.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}
