//! QEMU as a process: how it starts, fails, hangs and ends. No guest is needed for these.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test that fails ends the test"
)]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::{Host, binary, wait_until_gone};
use torpor_vmm::Version;
use torpor_vmm::qemu::{self, QemuBinary};
use torpor_vmm::{MachineConfig, VmmError};

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_waits_for_its_state_has_all_its_memory_mapped_and_none_of_it_touched() {
    let host = Host::new();
    let machine = host.machine();
    let incoming = host.incoming(&machine).await;
    let memory = incoming.memory().unwrap();
    assert_eq!(memory.pid, incoming.pid());
    assert_eq!(
        memory.mappings.iter().map(|m| m.len_bytes).sum::<u64>(),
        machine.memory_bytes
    );
    assert_eq!(
        rustix::fs::fstat(memory.memfd.as_ref().unwrap())
            .unwrap()
            .st_blocks,
        0
    );

    for _ in 0..3 {
        let uffd = incoming.userfaultfd().await.unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", uffd.as_raw_fd())).unwrap();
        assert_eq!(link, Path::new("anon_inode:[userfaultfd]"));
    }
    let pid = incoming.pid();
    drop(incoming);
    wait_until_gone(pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_of_its_own_session_inherits_nothing_but_what_it_needs() {
    let host = Host::new();
    // A descriptor that a C library might leave open.
    let leaked = rustix::pipe::pipe().unwrap();
    let incoming = host.incoming(&host.machine()).await;
    let pid = incoming.pid();
    let raw = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    assert_eq!(rustix::process::getsid(Some(raw)).unwrap(), raw);
    assert_eq!(rustix::process::getpgid(Some(raw)).unwrap(), raw);
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    let ours = fs::read_link(format!("/proc/self/fd/{}", leaked.0.as_raw_fd())).unwrap();
    let theirs: Vec<PathBuf> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(!theirs.contains(&ours), "{theirs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writable_disk_serves_one_machine_at_a_time_and_the_error_has_qemus_words() {
    let host = Host::new();
    let machine = host.machine();
    let log = host.path("console.log");
    let boot = host.boot_source();
    let first = qemu::boot(&binary(), &machine, &boot, &log).await.unwrap();
    let second_log = host.path("second.log");
    let error = qemu::boot(&binary(), &machine, &boot, &second_log)
        .await
        .unwrap_err();
    let VmmError::Start { exit } = &error else {
        panic!("{error}")
    };
    assert_eq!(exit.code, Some(1));
    assert!(error.to_string().contains("write\" lock"), "{error}");
    assert!(first.is_alive());

    let exit = first.kill().await.unwrap();
    assert_eq!(exit.signal, Some(9));
    assert_eq!(first.wait_exit().await, exit);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named_before_anything_is_started() {
    let host = Host::new();
    let log = host.path("console.log");
    let good = host.machine();
    let missing = PathBuf::from("/nonexistent/image");
    let cases = [
        (
            "base image /nonexistent/image",
            MachineConfig {
                base_image: missing.clone(),
                ..good.clone()
            },
        ),
        (
            "writable disk /nonexistent/image",
            MachineConfig {
                writable_disk: missing,
                ..good.clone()
            },
        ),
        (
            "no room",
            MachineConfig {
                memory_bytes: 1 << 40,
                ..good.clone()
            },
        ),
        (
            "0 vCPUs",
            MachineConfig {
                vcpus: 0,
                ..good.clone()
            },
        ),
    ];
    for (words, machine) in cases {
        let error = qemu::prepare_resume(&binary(), &machine, &log)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    }
    let gone = QemuBinary {
        path: "/nonexistent/qemu".into(),
        version: Version::new(7, 2, 22),
    };
    let error = qemu::prepare_resume(&gone, &good, &log)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/qemu"), "{error}");
    let other = QemuBinary {
        path: "/bin/ls".into(),
        version: Version::new(7, 2, 22),
    };
    let error = qemu::prepare_resume(&other, &good, &log)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("did not start") && error.contains("ls:"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_hangs_is_an_error_in_time_and_is_of_use_again_when_it_wakes() {
    let host = Host::new();
    let log = host.path("console.log");
    let vm = qemu::boot(&binary(), &host.machine(), &host.boot_source(), &log)
        .await
        .unwrap();
    signal(vm.pid(), Signal::STOP);
    // Both: the command itself, and one that finds another's answer still owed.
    for _ in 0..2 {
        let error = vm.stop_vcpus().await.unwrap_err();
        assert!(matches!(error, VmmError::Timeout { .. }), "{error}");
    }
    signal(vm.pid(), Signal::CONT);
    vm.stop_vcpus().await.unwrap();
    vm.resume_vcpus().await.unwrap();

    // Killed by somebody else while it is needed.
    signal(vm.pid(), Signal::KILL);
    let error = vm.stop_vcpus().await.unwrap_err();
    let VmmError::Died { exit, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(exit.signal, Some(9));
    assert!(vm.memory().is_err());
}

/// Set for the process that `a_machine_dies_with_the_process_that_holds_it` starts.
const HOLD: &str = "TORPOR_TEST_HOLD_A_MACHINE";

/// Not a test: a process that holds a machine until it is killed. Started by the next one.
#[tokio::test(flavor = "multi_thread")]
async fn helper_that_holds_a_machine() {
    if std::env::var_os(HOLD).is_none() {
        return;
    }
    let host = Host::new();
    let incoming = host.incoming(&host.machine()).await;
    println!("holding {}", incoming.pid());
    tokio::time::sleep(Duration::from_secs(600)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_dies_with_the_process_that_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_that_holds_a_machine", "--nocapture"])
        .env(HOLD, "1")
        .env("TMPDIR", dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(holder.stdout.take().unwrap()).lines();
    let pid: u32 = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("holding ")?.1.trim().parse().ok())
        .unwrap();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    holder.kill().unwrap();
    holder.wait().unwrap();
    wait_until_gone(pid).await;
}
