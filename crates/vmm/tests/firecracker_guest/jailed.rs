//! A Firecracker under its jailer.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use torpor_vmm::firecracker::{self, FirecrackerBinary, Jail, end_left_over};

use crate::lab::{Lab, binary, capture, drain, drained, reclaim};
use crate::support::{GUEST_DEADLINE, wait_until_gone};

const FIRST_UID: u32 = 61_000;

/// The binary with a jail, if there is one with a jailer beside it.
fn jailed(uid: u32) -> Option<FirecrackerBinary> {
    let mut binary = binary()?;
    let Some(jailer) = Jail::find_jailer(&binary.path) else {
        let expected = std::env::var_os("TORPOR_TEST_JAILED").is_some();
        assert!(!expected, "there is a jailer, and it is not found");
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
async fn is_cleaned_up(lab: Lab, cgroup: &Path) {
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
    wait_until_gone(pid).await;
    is_cleaned_up(lab, &its_cgroup).await;
    let pid = guest.vm.pid();
    is_locked_up(pid, second);
    assert_eq!(guest.ask("kept").await, kept);
    let its_cgroup = cgroup(pid);
    drop(guest);
    // The record of it goes next.
    assert!(!its_cgroup.exists());
    wait_until_gone(pid).await;
    is_cleaned_up(next, &its_cgroup).await;
    drop(pager);
}

/// Enters its cgroup, as a jailer does, and leaves its place and its own number (in our namespace of
/// processes, which /proc is of).
const ENTERS: &str = "#!/bin/sh
for word; do
    [ \"$before\" != --parent-cgroup ] || cgroup=/sys/fs/cgroup/$word
    before=$word
done
echo 0 > $cgroup/cgroup.procs && echo $cgroup > DIR/cgroup
read pid rest < /proc/self/stat; echo $pid > DIR/pid
";

#[tokio::test(flavor = "multi_thread")]
async fn a_jailer_that_fails_or_hangs_is_an_error_in_time_and_nothing_is_left_of_the_jail() {
    let Some(mut binary) = jailed(FIRST_UID + 3) else {
        return;
    };
    binary.deadlines.api_up = Duration::from_secs(2);
    let scripts = tempfile::tempdir().unwrap();
    let jailer = scripts.path().join("jailer");
    let to = scripts.path().display().to_string();
    if let Some(jail) = &mut binary.jail {
        jail.jailer.clone_from(&jailer);
    }
    for (does, told) in [
        (
            "echo there is no room in here >&2; exit 3",
            "there is no room",
        ),
        ("exec sleep 600", "--no-jailer"),
    ] {
        fs::write(&jailer, format!("{}{does}\n", ENTERS.replace("DIR", &to))).unwrap();
        fs::set_permissions(&jailer, fs::Permissions::from_mode(0o755)).unwrap();
        let lab = Lab::new(binary.clone());
        let (machine, source) = (lab.machine(false), lab.host.boot_source());
        let log = lab.host.path("console.log");
        let booted = firecracker::boot(&lab.binary, &machine, &source, lab.dir.path(), &log);
        let booted = timeout(Duration::from_secs(60), booted).await;
        let error = booted.expect("no hang").err().unwrap().to_string();
        println!("{error}");
        assert!(error.contains(told), "{error}");
        // Taken away, so that the next one cannot live on what this one wrote.
        let [pid, cgroup] = ["pid", "cgroup"].map(|name| {
            let path = scripts.path().join(name);
            let said = fs::read_to_string(&path).unwrap();
            fs::remove_file(path).unwrap();
            said
        });
        wait_until_gone(pid.trim().parse().unwrap()).await;
        is_cleaned_up(lab, Path::new(cgroup.trim())).await;
    }
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
    let said = said.lines().map_while(Result::ok).find_map(|line| {
        let (pid, dir) = line.split_once("the VMM is ")?.1.split_once(" in ")?;
        Some((pid.parse().ok()?, PathBuf::from(dir)))
    });
    let (pid, dir) = said.unwrap();
    let its_cgroup = cgroup(pid);
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_until_gone(pid).await;
    // Its owner was to take that away.
    assert!(its_cgroup.exists());
    end_left_over(&dir, Instant::now() + GUEST_DEADLINE).unwrap();
    assert!(!its_cgroup.exists());
    fs::remove_dir_all(&dir).unwrap();
}

/// As if its owner had been killed before the process was bound to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_jailed_firecracker_that_outlived_its_owner_ends_when_what_is_left_is_swept() {
    let Some(binary) = jailed(FIRST_UID) else {
        return;
    };
    let lab = Lab::new(binary);
    let incoming = lab.incoming().await;
    let its_cgroup = cgroup(incoming.pid());
    let dir = lab.dir.path().to_owned();
    let swept =
        tokio::task::spawn_blocking(move || end_left_over(&dir, Instant::now() + GUEST_DEADLINE));
    let exit = timeout(GUEST_DEADLINE, incoming.wait_exit()).await.unwrap();
    swept.await.unwrap().unwrap();
    assert_eq!(exit.signal, Some(9));
    assert!(!its_cgroup.exists());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test by itself: a_jailed_firecracker_dies_with_the_process_that_started_it starts and kills it"]
async fn a_jailed_guest_of_a_process_that_is_killed() {
    if std::env::var_os(ALONE_ENV).is_none() {
        return;
    }
    let lab = Lab::new(jailed(FIRST_UID).unwrap());
    let incoming = lab.incoming().await;
    let dir = lab.dir.path().display();
    println!("\nthe VMM is {} in {dir}", incoming.pid());
    incoming.wait_exit().await;
}
