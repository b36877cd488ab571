//! A Firecracker under its jailer.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use torpor_vmm::firecracker::{FirecrackerBinary, Jail};

use crate::lab::{Lab, binary, capture, drain, drained, reclaim};
use crate::support::{GUEST_DEADLINE, wait_until_gone};

const FIRST_UID: u32 = 61_000;

/// The binary with a jail, if there is one with a jailer beside it.
fn jailed(uid: u32) -> Option<FirecrackerBinary> {
    let mut binary = binary()?;
    let Some(jailer) = Jail::find_jailer(None, &binary.path) else {
        println!(
            "not run: there is no jailer beside {}",
            binary.path.display()
        );
        return None;
    };
    binary.jail = Some(Jail {
        jailer,
        uid,
        gid: uid,
    });
    Some(binary)
}

fn status(pid: u32, field: &str) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .unwrap();
    line.split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect()
}

/// Its cgroup's directory.
fn cgroup(pid: u32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text.trim().strip_prefix("0::/").unwrap();
    Path::new("/sys/fs/cgroup").join(path)
}

/// What a locked up process is, seen from outside.
fn is_locked_up(pid: u32, uid: u32) {
    assert_eq!(status(pid, "Uid:"), [uid; 4]);
    assert_eq!(status(pid, "Gid:"), [uid; 4]);
    assert_eq!(status(pid, "NSpid:"), [pid, 1], "number 1 of a namespace");
    let namespace =
        |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let same = |kind: &str| namespace(&pid.to_string(), kind) == namespace("self", kind);
    assert!(!same("mnt") && !same("pid") && !same("net"));
    let cgroup = cgroup(pid);
    assert!(
        cgroup.starts_with("/sys/fs/cgroup/torpor"),
        "{}",
        cgroup.display()
    );
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), pid.to_string(), "alone in it");
    let seen = fs::read_dir(format!("/proc/{pid}/root")).unwrap();
    let seen: Vec<String> = seen
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    println!("it sees {seen:?}");
    assert!(seen.iter().any(|name| name == "layer.img") && !seen.iter().any(|name| name == "proc"));
}

/// Nothing of it is left, and its directory can be taken away with what is in it.
async fn is_cleaned_up(lab: Lab, pid: u32, cgroup: &Path) {
    wait_until_gone(pid).await;
    // Its warden takes the cgroup away, once it has reaped the process.
    let gone = async {
        while cgroup.exists() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(GUEST_DEADLINE, gone)
        .await
        .expect("the cgroup is taken away");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(lab.dir.path().to_str().unwrap()),
        "{mounts}"
    );
    let base = lab.host.path("base.img");
    lab.dir.close().unwrap();
    assert_eq!(fs::metadata(base).unwrap().len(), 16 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_guest_boots_is_drained_and_resumed_by_another_user() {
    let Some(binary) = jailed(FIRST_UID) else {
        return;
    };
    let mut lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    let pid = guest.vm.pid();
    is_locked_up(pid, FIRST_UID);
    let kept = guest.ask("keep 4").await;
    assert_eq!(guest.ask("write /dev/vdb 1048576 4096 7").await, "ok");
    assert_ne!(guest.ask("write /dev/vda 0 4096 7").await, "ok");
    guest.ask("churn 32").await;
    reclaim(&mut guest).await;
    let report = drain(&guest, None, Duration::from_secs(60)).await;
    assert_eq!(report.outcome, drained(&lab.binary));
    assert!(lab.host.console().contains("test guest is up"));
    guest.vm.stop_vcpus().await.unwrap();
    let state = guest.vm.save_state().await.unwrap();
    let image = Arc::new(capture(&*guest.vm, None));
    let its_cgroup = cgroup(pid);
    let exit = guest.vm.kill().await.unwrap();
    assert_eq!(exit.signal, Some(9));
    assert_eq!(fs::read(lab.host.path("layer.img")).unwrap()[1 << 20], 7);

    let second = FIRST_UID + 1;
    lab.binary = jailed(second).unwrap();
    let (next, mut guest, pager) = lab.resume(&state, &image).await;
    is_cleaned_up(lab, pid, &its_cgroup).await;
    let pid = guest.vm.pid();
    is_locked_up(pid, second);
    assert_eq!(guest.ask("kept").await, kept);
    let its_cgroup = cgroup(pid);
    drop(guest);
    is_cleaned_up(next, pid, &its_cgroup).await;
    drop(pager);
}

/// A test of its own process, which is killed over it.
const ALONE: &str = "jailed::a_jailed_guest_of_a_process_that_is_killed";
/// Tells it that it is that process, and not one of all the tests.
const ALONE_ENV: &str = "TORPOR_TEST_KILLED_OWNER";

#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_firecracker_dies_with_the_process_that_started_it() {
    if jailed(FIRST_UID).is_none() {
        return;
    }
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", ALONE, "--ignored", "--nocapture"])
        .env(ALONE_ENV, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(owner.stdout.take().unwrap());
    let pid = said.lines().map_while(Result::ok).find_map(|line| {
        let pid = line.split_once("the VMM is ")?.1;
        pid.parse().ok()
    });
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_until_gone(pid.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test by itself: a_jailed_firecracker_dies_with_the_process_that_started_it starts and kills it"]
async fn a_jailed_guest_of_a_process_that_is_killed() {
    if std::env::var_os(ALONE_ENV).is_none() {
        return;
    }
    let lab = Lab::new(jailed(FIRST_UID).unwrap());
    let incoming = lab.incoming().await;
    println!("\nthe VMM is {}", incoming.pid());
    incoming.wait_exit().await;
}
