//! What a real Linux guest lives through under a real Firecracker.
//!
//! Needs a Firecracker (`TORPOR_FIRECRACKER`) and KVM: `make test-firecracker` gives both, on a host
//! without KVM by emulating one. Without them nothing is run here, which each test says.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a helper that fails ends the test, what it measures is shown, pages fit a usize"
)]

mod checkpoint;
mod failures;
mod jailed;
mod lab;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use torpor_pager::Pager;
use torpor_vmm::firecracker::FirecrackerBinary;
use torpor_vmm::{DrainOutcome, VmmError};

use lab::{Image, Lab, binary, can_drain, capture, drain, drained, mib, reclaim};
use support::{GUEST_DEADLINE, Guest};

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_guest_has_its_drives_its_channel_and_its_random_numbers() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, balloon) = lab.boot(false, "").await;
    assert_eq!(balloon.hinting, can_drain(&lab.binary));
    assert!(!balloon.reporting);
    assert_eq!(guest.ask("readonly /dev/vda").await, "1");
    assert_eq!(guest.ask("readonly /dev/vdb").await, "0");
    assert_eq!(guest.ask("write /dev/vdb 1048576 4096 7").await, "ok");
    assert_ne!(guest.ask("write /dev/vda 0 4096 7").await, "ok");
    let rng = guest
        .ask("read /sys/class/misc/hw_random/rng_available")
        .await;
    assert!(rng.contains("virtio_rng"), "{rng}");
    let cmdline = guest.ask("read /proc/cmdline").await;
    println!("{cmdline}");
    assert!(cmdline.contains("init_on_alloc=0"), "{cmdline}");

    let memory = guest.vm.memory().unwrap();
    let held = memory.held_bytes().unwrap();
    println!("held: {} MiB of {}", mib(held), mib(memory.len_bytes));
    assert!(held > 16 << 20 && held < memory.len_bytes);
    assert!(lab.host.console().contains("test guest is up"));

    // A pause that was given up before its state was taken: the agent answers all the same.
    for _ in 0..2 {
        guest.vm.stop_vcpus().await.unwrap();
        guest.vm.resume_vcpus().await.unwrap();
        guest.count().await;
    }

    // Pausing and resuming twice is no error, and a guest goes on after its state was taken.
    let error = guest.vm.save_state().await.unwrap_err();
    assert!(matches!(error, VmmError::WrongState { .. }), "{error}");
    for _ in 0..2 {
        guest.vm.stop_vcpus().await.unwrap();
        guest.vm.stop_vcpus().await.unwrap();
        let began = Instant::now();
        let state = guest.vm.save_state().await.unwrap();
        println!(
            "device state: {} bytes in {:?}",
            state.len(),
            began.elapsed()
        );
        assert!((4_000..1_000_000).contains(&state.len()));
        guest.vm.resume_vcpus().await.unwrap();
        guest.vm.resume_vcpus().await.unwrap();
        guest.count().await;
    }
    let exit = guest.vm.kill().await.unwrap();
    assert_eq!(exit.signal, Some(9));
    assert!(guest.vm.memory().is_err());
}

/// A machine's state and its memory are taken one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_in_while_a_guest_stands_still_waits_outside_its_memory() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    guest.vm.stop_vcpus().await.unwrap();
    guest.vm.save_state().await.unwrap();
    let before = capture(&*guest.vm, None);
    // A device that is at work writes a packet into a queue of the guest's for it.
    let mut caller = UnixStream::connect(lab.dir.path().join("vsock.sock"))
        .await
        .unwrap();
    caller.write_all(b"CONNECT 1024\n").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = capture(&*guest.vm, None);
    let both = before.0.iter().zip(&after.0);
    assert_eq!(both.filter(|(before, after)| before != after).count(), 0);
    drop(caller);
    guest.vm.resume_vcpus().await.unwrap();
    guest.count().await;
}

/// What is hinted: a guest's free memory in the largest blocks of its allocator.
const HINT_BYTES: u64 = 4 << 20;
/// What a guest keeps of it, since it allocates what it hints and stops at its reserve, and what it uses
/// again meanwhile.
const UNHINTED_BYTES_MAX: u64 = 2 * HINT_BYTES;

async fn large_free_bytes(guest: &mut Guest) -> u64 {
    let zones = guest.ask("read /proc/buddyinfo").await;
    let largest = |zone: &str| -> u64 { zone.split_whitespace().last().unwrap().parse().unwrap() };
    zones.split("Node").skip(1).map(largest).sum::<u64>() * HINT_BYTES
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_gets_free_memory_back_ten_times_in_a_row() {
    let Some(binary) = binary().filter(can_drain) else {
        return;
    };
    let lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    let kept = guest.ask("keep 8").await;
    let memory_bytes = guest.vm.memory().unwrap().len_bytes;
    let mut released = 0;
    for round in 0..10 {
        guest.ask("churn 64").await;
        reclaim(&mut guest).await;
        // How much is free in large pieces is the guest's affair; what is goes back to the host.
        let free = large_free_bytes(&mut guest).await;
        let report = drain(&guest, None, Duration::from_secs(60)).await;
        println!("{} MiB were free in blocks that are hinted", mib(free));
        assert_eq!(report.outcome, DrainOutcome::Done, "round {round}");
        assert!(free >= 64 << 20, "round {round}: {free}");
        assert!(
            report.held_bytes <= memory_bytes - (free - UNHINTED_BYTES_MAX),
            "round {round}: {free}, {report:?}"
        );
        released += report.released_bytes;
    }
    assert!(released >= 10 * (24 << 20), "{released}");
    assert_eq!(guest.ask("kept").await, kept);

    // No time at all: it may be over before it was asked for, and the next one works all the same.
    let report = drain(&guest, None, Duration::from_millis(1)).await;
    let timed_out = [DrainOutcome::CeilingReached, DrainOutcome::Done];
    assert!(timed_out.contains(&report.outcome), "{report:?}");
    guest.ask("churn 64").await;
    let report = drain(&guest, None, Duration::from_secs(60)).await;
    assert_eq!(report.outcome, DrainOutcome::Done);
    assert_eq!(guest.ask("kept").await, kept);
}

/// A guest that zeroes each block before it hints it takes long, so that there is something to cut short.
async fn cut_short_in_full_swing(guest: &mut Guest, whole_ms: u64) {
    guest.ask("churn 64").await;
    reclaim(guest).await;
    let ceiling = Duration::from_millis((whole_ms / 3).max(1));
    let report = drain(guest, None, ceiling).await;
    assert_eq!(report.outcome, DrainOutcome::CeilingReached);
    let report = drain(guest, None, GUEST_DEADLINE).await;
    assert_eq!(report.outcome, DrainOutcome::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_guest_stores_less_whether_it_zeroes_what_it_allocates_or_not() {
    let Some(binary) = binary().filter(can_drain) else {
        return;
    };
    let mut ms = Vec::new();
    for init_on_alloc in [0, 1] {
        let lab = Lab::new(binary.clone());
        let words = format!("init_on_alloc={init_on_alloc}");
        println!("{words}");
        let (mut guest, _) = lab.boot(false, &words).await;
        let kept = guest.ask("keep 8").await;
        guest.ask("churn 64").await;
        reclaim(&mut guest).await;
        let mut stored = Vec::new();
        for drained in [false, true] {
            if drained {
                let report = drain(&guest, None, GUEST_DEADLINE).await;
                assert_eq!(report.outcome, DrainOutcome::Done);
                ms.push(report.ms.max(1));
            }
            guest.vm.stop_vcpus().await.unwrap();
            guest.vm.save_state().await.unwrap();
            stored.push(capture(&*guest.vm, None).stored_mib());
            guest.vm.resume_vcpus().await.unwrap();
        }
        println!(
            "FIGURE drain of a booted guest, {words}: {} ms; MiB stored without and with it {stored:?}",
            ms[init_on_alloc]
        );
        assert!(stored[1] + 16 <= stored[0], "{stored:?}");
        if init_on_alloc == 1 {
            cut_short_in_full_swing(&mut guest, ms[init_on_alloc]).await;
        }
        assert_eq!(guest.ask("kept").await, kept);
    }
    println!(
        "FIGURE drain with init_on_alloc=1 and 0: {} and {} ms",
        ms[1], ms[0]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_guest_is_resumed_three_generations_deep_with_its_memory_as_it_was() {
    let Some(binary) = binary() else { return };
    three_generations(binary, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_never_drained_is_resumed_three_generations_deep_just_so() {
    let Some(binary) = binary() else { return };
    three_generations(binary, false).await;
}

async fn three_generations(binary: FirecrackerBinary, drains: bool) {
    let mut lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    let mut kept = guest.ask("keep 4").await;
    assert_eq!(guest.ask("write /dev/vdb 1048576 4096 0").await, "ok");
    guest.ask("churn 64").await;
    let mut pager: Option<(Pager, Arc<Image>)> = None;
    for generation in 1..=3_u8 {
        println!("generation {generation}");
        reclaim(&mut guest).await;
        if drains {
            let served = pager.as_ref().map(|(pager, _)| pager);
            let report = drain(&guest, served, Duration::from_secs(120)).await;
            assert_eq!(report.outcome, drained(&lab.binary));
            let given_back = report.released_bytes + report.discarded_bytes.unwrap_or(0);
            assert!(report.outcome != DrainOutcome::Done || given_back >= 16 << 20);
        }

        guest.vm.stop_vcpus().await.unwrap();
        // The state first: taking it writes to guest memory.
        let state = guest.vm.save_state().await.unwrap();
        let served = pager.as_ref().map(|(pager, image)| (pager, &**image));
        let image = Arc::new(capture(&*guest.vm, served));
        guest.vm.kill().await.unwrap();
        drop(pager);

        let (next, resumed, serving) = lab.resume(&state, &image).await;
        guest = resumed;
        assert_eq!(guest.ask("kept").await, kept, "generation {generation}");
        pager = Some((serving, image));
        lab = next;
        // The next generation differs: other memory, another disk.
        kept = guest.ask("keep 4").await;
        let write = format!("write /dev/vdb 1048576 4096 {generation}");
        assert_eq!(guest.ask(&write).await, "ok");
        let disk = fs::read(lab.host.path("layer.img")).unwrap();
        assert_eq!(disk[1 << 20], generation);
        // Each page that is written for the first time is a round trip to the pager.
        guest.ask("churn 16").await;
    }
}
