//! What a real Linux guest sees and lives through.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test that fails ends the test"
)]

mod lazy;
mod support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use lazy::LazyMemory;
use support::{Guest, Host};
use torpor_vmm::{DrainOutcome, GuestMemory, MachineConfig, VmmError};

fn memfd(memory: &GuestMemory) -> OwnedFd {
    memory.memfd.as_ref().unwrap().try_clone().unwrap()
}

/// Copies what a memory holds, hole by hole.
fn copy_memory(from: &GuestMemory, to: &GuestMemory) {
    let source = File::from(memfd(from));
    let target = File::from(memfd(to));
    for (start, end) in data_runs(&memfd(from), from.len_bytes) {
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        source.read_exact_at(&mut bytes, start).unwrap();
        target.write_all_at(&bytes, start).unwrap();
    }
}

fn data_runs(fd: &OwnedFd, len: u64) -> Vec<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};
    let mut runs = Vec::new();
    let mut at = 0;
    while at < len {
        let Ok(start) = seek(fd, SeekFrom::Data(at)) else {
            break;
        };
        let end = seek(fd, SeekFrom::Hole(start)).unwrap();
        runs.push((start, end));
        at = end;
    }
    runs
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_finds_its_drives_in_order_and_its_discards_punch_holes() {
    let host = Host::new();
    let mut guest = host.boot(&host.machine()).await;

    assert_eq!(guest.ask("read /sys/block/vda/serial").await, "base");
    assert_eq!(guest.ask("read /sys/block/vdb/serial").await, "layer");
    assert_eq!(guest.ask("readonly /dev/vda").await, "1");
    assert_eq!(guest.ask("readonly /dev/vdb").await, "0");
    assert_eq!(guest.ask("list /sys/class/net").await, "lo");
    let rng = guest
        .ask("read /sys/class/misc/hw_random/rng_available")
        .await;
    assert!(rng.contains("virtio_rng"), "{rng}");
    let cmdline = guest.ask("read /proc/cmdline").await;
    let expected =
        torpor_vmm::qemu::kernel_command_line(&host.machine(), &host.boot_source()).unwrap();
    assert_eq!(cmdline, expected);

    let layer = host.path("layer.img");
    let allocated = || layer.metadata().unwrap().blocks() * 512;
    assert_eq!(guest.ask("write /dev/vdb 1048576 4194304 7").await, "ok");
    let full = allocated();
    assert!(full >= 4 << 20, "{full}");
    assert_eq!(guest.ask("discard /dev/vdb 1048576 4194304").await, "ok");
    assert!(allocated() <= full - (4 << 20), "{} of {full}", allocated());
    assert_ne!(guest.ask("write /dev/vda 0 4096 7").await, "ok");

    guest.vm.kill().await.unwrap();
    assert!(host.console().contains("test guest is up"));
}

/// While it boots, a kernel patches code that other processors run: emulated ones may go on with the
/// old code (3 of 100 did).
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes five minutes: a hundred boots; run by make test-long"]
async fn a_guest_of_four_processors_boots_each_of_a_hundred_times() {
    let host = Host::new();
    let machine = MachineConfig {
        vcpus: 4,
        ..host.machine()
    };
    for _ in 0..100 {
        let guest = host.boot(&machine).await;
        guest.vm.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_machine_goes_on_and_its_state_resumes_in_another_process() {
    let host = Host::new();
    let machine = host.machine();
    let mut first = host.boot(&machine).await;
    let kept = first.ask("keep 24").await;
    assert_eq!(first.ask("write /dev/vdb 0 4096 42").await, "ok");

    let error = first.vm.save_state().await.unwrap_err();
    assert!(matches!(error, VmmError::WrongState { .. }), "{error}");

    // Twice: a pause that failed after its state was taken must be able to be tried again.
    for _ in 0..2 {
        let before = first.count().await;
        first.vm.stop_vcpus().await.unwrap();
        let state = first.vm.save_state().await.unwrap();
        assert!(
            (10_000..1_000_000).contains(&state.len()),
            "{}",
            state.len()
        );
        let error = first.vm.save_state().await.unwrap_err();
        assert!(matches!(error, VmmError::WrongState { .. }), "{error}");
        first.vm.resume_vcpus().await.unwrap();
        assert!(first.count().await >= before);
        assert_eq!(first.ask("write /dev/vdb 4096 4096 43").await, "ok");
    }

    first.vm.stop_vcpus().await.unwrap();
    first.vm.stop_vcpus().await.unwrap();
    let stopping = Instant::now();
    let state = first.vm.save_state().await.unwrap();
    let took = stopping.elapsed();
    println!("device state: {} bytes in {took:?}", state.len());

    let second = Host::new();
    std::fs::copy(host.path("layer.img"), second.path("layer.img")).unwrap();
    let incoming = second.incoming(&second.machine()).await;
    copy_memory(&first.vm.memory().unwrap(), &incoming.memory().unwrap());
    let vm = incoming.load(&state).await.unwrap();
    vm.resume_vcpus().await.unwrap();
    vm.resume_vcpus().await.unwrap();
    let mut resumed = Guest::new(vm);
    let then = resumed.count().await;
    assert_eq!(resumed.ask("kept").await, kept);
    assert_eq!(resumed.ask("write /dev/vdb 8192 4096 44").await, "ok");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(
        resumed.count().await > then,
        "the resumed guest's clock stands still"
    );
    assert_eq!(resumed.vm.identity(), first.vm.identity());

    // The first goes on by itself, too.
    first.vm.resume_vcpus().await.unwrap();
    assert_eq!(first.ask("kept").await, kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_resumes_with_empty_memory_and_its_page_faults_bring_it_back() {
    let host = Host::new();
    let mut first = host.boot(&host.machine()).await;
    let kept = first.ask("keep 24").await;
    first.vm.stop_vcpus().await.unwrap();
    let state = first.vm.save_state().await.unwrap();
    let source = first.vm.memory().unwrap();

    for round in 0..5 {
        let second = Host::new();
        let starting = Instant::now();
        let incoming = second.incoming(&second.machine()).await;
        let started = starting.elapsed();
        let memory = incoming.memory().unwrap();
        let uffd = incoming.userfaultfd().await.unwrap();
        let injected = starting.elapsed();
        let lazy = LazyMemory::serve(uffd, &memory, memfd(&source));
        let vm = incoming.load(&state).await.unwrap();
        let loaded = starting.elapsed();
        vm.resume_vcpus().await.unwrap();
        let mut resumed = Guest::new(vm);
        resumed.count().await;
        let answered = starting.elapsed();
        let faults = lazy.faults();
        println!(
            "round {round}: started {started:?}, injected {injected:?}, loaded {loaded:?}, \
             answered {answered:?} after {faults} faults"
        );
        assert!((1..20_000).contains(&faults), "{faults}");
        assert_eq!(resumed.ask("kept").await, kept);
        assert!(lazy.faults() >= faults + 24 * 256);
        resumed.vm.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_whose_page_faults_nobody_serves_ends_by_its_deadline() {
    let host = Host::new();
    let first = host.boot(&host.machine()).await;
    first.vm.stop_vcpus().await.unwrap();
    let state = first.vm.save_state().await.unwrap();

    let second = Host::new();
    let incoming = second.incoming(&second.machine()).await;
    let pid = incoming.pid();
    let uffd = incoming.userfaultfd().await.unwrap();
    lazy::register(&uffd, &incoming.memory().unwrap());
    let error = incoming.load(&state).await.unwrap_err();
    assert!(matches!(error, VmmError::Timeout { .. }), "{error}");
    support::wait_until_gone(pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_state_is_refused_in_qemus_words() {
    let host = Host::new();
    let guest = host.boot(&host.machine()).await;
    guest.vm.stop_vcpus().await.unwrap();
    let state = guest.vm.save_state().await.unwrap();
    let memory = guest.vm.memory().unwrap();

    let other = Host::new();
    for (what, damaged) in [("cut short", &state[..state.len() / 2]), ("empty", &[][..])] {
        let incoming = other.incoming(&other.machine()).await;
        let pid = incoming.pid();
        copy_memory(&memory, &incoming.memory().unwrap());
        let error = incoming.load(damaged).await.unwrap_err();
        println!("{what}: {error}");
        assert!(
            matches!(error, VmmError::State { .. } | VmmError::Died { .. }),
            "{what}: {error}"
        );
        support::wait_until_gone(pid).await;
    }

    // And one of a machine of another size.
    let larger = torpor_vmm::MachineConfig {
        memory_bytes: 320 << 20,
        ..other.machine()
    };
    let incoming = other.incoming(&larger).await;
    copy_memory(&memory, &incoming.memory().unwrap());
    let error = incoming.load(&state).await.unwrap_err().to_string();
    println!("other machine: {error}");
    assert!(error.contains("ram"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_for_what_a_guest_reports() {
    let host = Host::new();
    let guest = &mut host.boot(&host.machine()).await;
    // The guest's rounds begin when it frees the 96 MiB. On a busy host its answer may come after the
    // first ones, or one of them half a second late: then it is asked again.
    for attempt in 1.. {
        guest.ask("churn 96").await;
        let report = guest.vm.drain(Duration::from_secs(60), None).await;
        println!("{report:?}");
        assert_eq!(report.outcome, DrainOutcome::Settled);
        assert!(report.ms >= 2_500, "a round may be off for so long");
        if report.released_bytes >= 48 << 20 && report.held_bytes <= 128 << 20 {
            break;
        }
        assert!(attempt < 5, "{report:?}");
    }

    let report = guest.vm.drain(Duration::ZERO, None).await;
    assert_eq!(report.outcome, DrainOutcome::Skipped);
    let report = guest.vm.drain(Duration::from_millis(300), None).await;
    assert_eq!(report.outcome, DrainOutcome::CeilingReached);
    assert!(report.ms >= 300, "{report:?}");

    guest.vm.kill().await.unwrap();
    let report = guest.vm.drain(Duration::from_secs(60), None).await;
    assert!(
        matches!(
            report.outcome,
            DrainOutcome::Failed(_) | DrainOutcome::Unsupported
        ),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_of_a_machine_that_reports_nothing_says_so_at_once() {
    let host = Host::new();
    let silent = torpor_vmm::MachineConfig {
        free_page_reporting: false,
        ..host.machine()
    };
    let log = host.path("console.log");
    let binary = support::binary();
    let vm = torpor_vmm::qemu::boot(&binary, &silent, &host.boot_source(), &log)
        .await
        .unwrap();
    assert_eq!(
        vm.drain(Duration::from_secs(60), None).await.outcome,
        DrainOutcome::Unsupported
    );
    drop(vm);

    // A guest that has no driver for its balloon.
    let reporting = host.machine();
    let mut source = host.boot_source();
    source.extra_cmdline += " module_blacklist=virtio_balloon";
    let vm = torpor_vmm::qemu::boot(&binary, &reporting, &source, &log)
        .await
        .unwrap();
    vm.stop_vcpus().await.unwrap();
    assert_eq!(
        vm.drain(Duration::from_secs(60), None).await.outcome,
        DrainOutcome::GuestSilent
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics_ends_its_machine_and_leaves_its_words() {
    let host = Host::new();
    let machine = torpor_vmm::MachineConfig {
        network: true,
        vcpus: 2,
        ..host.machine()
    };
    let mut guest = host.boot(&machine).await;
    assert_eq!(guest.ask("list /sys/class/net").await, "eth0 lo");
    assert_eq!(
        guest.ask("read /sys/devices/system/cpu/online").await,
        "0-1"
    );

    // It dies over the question: the channel closes instead of an answer.
    assert_eq!(guest.ask("panic").await, "");
    let vm = guest.vm;
    let exit = vm.wait_exit().await;
    assert!(exit.guest_ended(), "{exit}");
    assert!(!vm.is_alive());
    assert!(
        host.console().contains("Kernel panic"),
        "{}",
        host.console()
    );
    let error = vm.stop_vcpus().await.unwrap_err();
    assert!(matches!(error, VmmError::Died { .. }), "{error}");
}
