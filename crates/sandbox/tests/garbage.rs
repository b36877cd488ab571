//! The proof that a page which the scan calls free is nobody's: at random moments of a guest that
//! allocates, frees, writes files and forks without a pause, every such page is overwritten, and
//! the guest goes on as if nothing had been.

#![allow(missing_docs, reason = "a test program has no interface")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "the tests' helpers: what goes wrong in them fails the test, what they measured is told"
)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use common::*;
use nix::fcntl::{FallocateFlags, fallocate};
use torpor_build::{BuildId, PAGE_SIZE, PageRun};
use torpor_guest::{Command, Selector};
use torpor_sandbox::Sandbox;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_workload::{CHECK_COMMAND, Churned, KEEP_COMMAND};

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
    /// What a page that the capture leaves out comes back as.
    Zeros,
    /// Zeros as well, by taking the page away. Not where a pager serves the memory: it believes that
    /// page to be there.
    Hole,
}

const BOOTED: [Overwrite; 3] = [Overwrite::Garbage, Overwrite::Zeros, Overwrite::Hole];
/// Of each pair of resumed guests, the one begins with garbage and the other with zeros: an odd
/// number of moments lies between.
const RESUMED: [Overwrite; 2] = [Overwrite::Garbage, Overwrite::Zeros];
const _: () = assert!(MOMENTS_PER_RESUME % RESUMED.len() == 1);

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
#[ignore = "takes minutes: a hundred moments on each kernel; run by make test-long"]
async fn a_booted_guest_does_not_miss_its_free_pages_a_hundred_times() {
    for kernel in kernels() {
        booted(&kernel, MOMENTS_LONG).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: a hundred moments on each kernel; run by make test-long"]
async fn a_lazily_resumed_guest_does_not_miss_its_free_pages_a_hundred_times() {
    for kernel in kernels() {
        resumed(&kernel, MOMENTS_LONG).await;
    }
}

async fn booted(kernel: &str, moments: usize) {
    let host = host().await;
    let (sandbox, mut churned) = churning(&host, kernel).await;
    let mut random = seed();
    let mut overwritten = 0;
    for moment in 0..moments {
        let how = BOOTED[moment % BOOTED.len()];
        let stopped = at_a_random_moment(&sandbox, &host, &mut random, how).await;
        overwritten += stopped.free_pages;
        let what = format!("Linux {kernel}, booted, moment {moment}, {how:?}");
        churned = unharmed(&sandbox, churned, &what).await;
    }
    let done = stop(&sandbox, kernel).await;
    println!("Linux {kernel}, booted: {moments} moments, {overwritten} pages, {done:?}");
    sandbox.end().await;
}

async fn resumed(kernel: &str, moments: usize) {
    let host = host().await;
    let (sandbox, mut churned) = churning(&host, kernel).await;
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
            let how = RESUMED[moment % RESUMED.len()];
            let what = format!("Linux {kernel}, resumed, moment {moment}, {how:?}");
            if in_this_resume == 0 {
                // Taking a large free block changes its head's entry alone; those of its other pages,
                // perhaps on absent pages of the array, stay as the parent had them.
                churned = ask(&sandbox, KEEP_COMMAND).await;
                assert_eq!(churned.damaged, 0, "{what}: {churned:?}");
            }
            let stopped = at_a_random_moment(&sandbox, &host, &mut random, how).await;
            if in_this_resume == 0 {
                let all_pages = sandbox.spec().memory_pages();
                println!(
                    "{what}: {} of {all_pages} pages present, {} free",
                    stopped.present_pages, stopped.free_pages
                );
            }
            overwritten += stopped.free_pages;
            churned = unharmed(&sandbox, churned, &what).await;
            assert!(churned.kept_bytes > 0, "{what}: {churned:?}");
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
async fn churning(host: &Host, kernel: &str) -> (Sandbox, Churned) {
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
    (sandbox, first)
}

/// A guest's memory at the moment when it was stopped, in pages.
struct Stopped {
    free_pages: u64,
    present_pages: u64,
}

/// Stops the guest, overwrites every page that is free, lets it go on.
async fn at_a_random_moment(
    sandbox: &Sandbox,
    host: &Host,
    random: &mut u64,
    how: Overwrite,
) -> Stopped {
    tokio::time::sleep(Duration::from_millis(20 + next(random) % 300)).await;
    sandbox.vmm().stop_vcpus().await.unwrap();
    let found = sandbox.find_free_pages(host.storage(), SETTLE_MAX).await;
    let (report, free) = found.unwrap();
    assert_eq!(report.why_not(), None);
    let memory = File::from(sandbox.vmm().memory().unwrap().into_memfd().unwrap());
    let stopped = Stopped {
        free_pages: free.iter().map(|run| run.pages).sum(),
        present_pages: present_pages(&memory),
    };
    assert!(
        stopped.free_pages > 1000,
        "{} free pages: nothing is proven",
        stopped.free_pages
    );
    let seed = next(random);
    tokio::task::spawn_blocking(move || overwrite(&memory, &free, how, seed))
        .await
        .unwrap();
    sandbox.vmm().resume_vcpus().await.unwrap();
    stopped
}

fn overwrite(memory: &File, free: &[PageRun], how: Overwrite, mut random: u64) {
    let page = PAGE_SIZE as u64;
    for run in free {
        let (from, len) = (run.first_page * page, run.pages * page);
        match how {
            Overwrite::Hole => {
                let punch =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (from, len) = (from.try_into().unwrap(), len.try_into().unwrap());
                fallocate(memory, punch, from, len).unwrap();
            }
            Overwrite::Zeros => memory
                .write_all_at(&vec![0; len.try_into().unwrap()], from)
                .unwrap(),
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

/// The guest's data is whole, its threads have all gone on since `before`, and its kernel has nothing
/// to say.
async fn unharmed(sandbox: &Sandbox, before: Churned, what: &str) -> Churned {
    let deadline = Instant::now() + ANSWER_MAX;
    let churned = loop {
        let now = ask(sandbox, CHECK_COMMAND).await;
        assert_eq!(now.damaged, 0, "{what}: {now:?}");
        if now.pieces > before.pieces && now.files > before.files && now.forks > before.forks {
            break now;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: a thread stands still: {before:?}, then {now:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    kernel_is_content(sandbox, what).await;
    churned
}

async fn ask(sandbox: &Sandbox, command: &str) -> Churned {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = sandbox.envd().connect(&selector).await.unwrap();
    let ask = format!("{command}\n");
    sandbox
        .envd()
        .send_input(&selector, ask.as_bytes())
        .await
        .unwrap();
    line(&mut process, ANSWER_MAX).await
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
    u64::try_from(now.as_nanos()).unwrap() | 1
}

/// xorshift64*.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D)
}
