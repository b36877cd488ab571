//! Many sandboxes of one build, and a process that is killed with its sandboxes.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use common::{
    Cleanup, PATIENCE, assert_gone, counts_on, host, on_qemu, pause_into_new, pause_request,
    resume_build, sh, signal, staging_of, start_counter, template,
};
use nix::sys::signal::Signal;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::pause::pause;
use torpor_sandbox::pause::report::PauseStep;

const CLONES: usize = 10;
/// How far a clone's clock may be off, seconds: what a shell in ten busy guests takes.
const CLOCK_OFF_S_MAX: u64 = 30;
/// Set for the process that is to be killed.
const VICTIM: &str = "TORPOR_TEST_VICTIM";

#[tokio::test(flavor = "multi_thread")]
async fn ten_sandboxes_of_one_build_run_side_by_side_and_go_their_own_ways() {
    let host = host().await;
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(
        &sandbox,
        "head -c 4000000 /dev/urandom > /dev/shm/kept; cp /dev/shm/kept /root/kept",
    )
    .await;
    start_counter(&sandbox).await;
    let sum = sh(&sandbox, "sha256sum < /dev/shm/kept").await;
    let count = counts_on(&sandbox, 1).await;
    // A build that lies for long has an old clock; this one's is old at once.
    sh(&sandbox, "date -s @$(($(date +%s) - 3600))").await;
    let build = pause_into_new(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(build);

    let mut resuming = tokio::task::JoinSet::new();
    for _ in 0..CLONES {
        let host = host.clone();
        resuming.spawn(async move { resume_build(&host, &build).await.0 });
    }
    let clones = resuming.join_all().await;
    let (mut random, mut uuids, mut names) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (number, clone) in clones.iter().enumerate() {
        names.insert(clone.name().clone());
        // One shell each: ten emulated guests share the host's processors.
        let said = sh(
            clone,
            &format!(
                "date +%s; sha256sum < /dev/shm/kept; head -c 16 /dev/urandom | base64; \
                 cat /proc/sys/kernel/random/uuid; echo {number} | tee /root/mine > /dev/shm/mine"
            ),
        )
        .await;
        let host_now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let [date, kept, bytes, uuid] = said.lines().collect::<Vec<_>>()[..] else {
            panic!("{said}");
        };
        assert_eq!(kept, sum);
        random.insert(bytes.to_owned());
        uuids.insert(uuid.to_owned());
        let date: u64 = date.parse().unwrap();
        assert!(
            host_now.abs_diff(date) <= CLOCK_OFF_S_MAX,
            "{date} is not {host_now}"
        );
    }
    for (number, clone) in clones.iter().enumerate() {
        counts_on(clone, count).await;
        let said = sh(
            clone,
            "sync; echo 3 > /proc/sys/vm/drop_caches; cat /dev/shm/mine /root/mine; \
             sha256sum < /root/kept",
        )
        .await;
        assert_eq!(said, format!("{number}\n{number}\n{sum}"));
    }
    for distinct in [random.len(), uuids.len(), names.len()] {
        assert_eq!(distinct, CLONES);
    }
    let pids: Vec<u32> = clones.iter().map(|clone| clone.vmm().pid()).collect();
    drop(clones);
    pids.into_iter().for_each(assert_gone);
}

/// What the next test runs as a process of its own, to kill it; nothing without its variable.
#[tokio::test(flavor = "multi_thread")]
async fn a_victim_says_what_it_runs_and_waits_for_its_end() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let host = host().await;
    let template = template(&host).await;
    let (idle, _) = resume_build(&host, &template).await;
    let (pausing, _) = resume_build(&host, &template).await;
    let words =
        |sandbox: &torpor_sandbox::Sandbox| format!("{} {}", sandbox.vmm().pid(), sandbox.name());
    let (idle_words, pausing_words) = (words(&idle), words(&pausing));
    // Stuck in the middle of writing, with a build half staged.
    let progress = common::at_step(PauseStep::WriteDisk, || stand_still());
    let request = pause_request(PauseFlags::default(), progress);
    let id = request.build;
    tokio::spawn(async move { pause(pausing, &host, request).await.map(drop).unwrap() });
    let storage = common::storage_dir();
    let staged = storage.join("staging").join(format!("build-{id}"));
    common::wait_until("a build is staged", || staged.join("memory.data").exists());
    println!("\nVICTIM {idle_words} {pausing_words} {id}");
    stand_still();
}

/// Until it is killed: a parked thread may wake for no reason.
fn stand_still() -> ! {
    loop {
        std::thread::park();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_takes_its_vmms_with_it_and_the_next_one_sweeps_up() {
    let host = host().await;
    // Made before, so that the victim dies where it is meant to.
    template(&host).await;
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "a_victim_says_what_it_runs_and_waits_for_its_end",
            "--nocapture",
        ])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let said = BufReader::new(victim.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .find_map(|line| line.strip_prefix("VICTIM ").map(str::to_owned))
        .expect("the victim ended early");
    let words: Vec<&str> = said.split(' ').collect();
    let [idle_pid, idle, pausing_pid, pausing, build] = words[..] else {
        panic!("{said}");
    };
    let pids: [u32; 2] = [idle_pid, pausing_pid].map(|pid| pid.parse().unwrap());
    let runs = [idle, pausing].map(|name| host.storage().run_path(&name.parse().unwrap()));
    let staging = staging_of(&host, &build.parse().unwrap());
    let left = || runs.iter().chain([&staging]).filter(|path| path.exists());
    assert!(pids.iter().all(|pid| is_qemu(*pid)), "{said}");
    assert_eq!(left().count(), 3);
    // What lives is not swept.
    host.storage().sweep(&mut |_| Ok(())).unwrap();
    assert_eq!(left().count(), 3);

    signal(victim.id(), Signal::SIGKILL);
    victim.wait().unwrap();
    common::wait_until("its VMMs are gone", || {
        !pids.iter().any(|pid| is_qemu(*pid))
    });
    host.storage().sweep(&mut |_| Ok(())).unwrap();
    assert_eq!(left().count(), 0, "left: {:?}", left().collect::<Vec<_>>());
    assert!(host.storage().open_build(&build.parse().unwrap()).is_err());
}

/// An orphan's zombie is its new parent's to reap.
fn is_qemu(pid: u32) -> bool {
    let exe = std::fs::read_link(Path::new("/proc").join(pid.to_string()).join("exe"));
    exe.is_ok_and(|exe| exe.to_string_lossy().contains("qemu"))
}

/// Whatever is left running in it could not be found any more.
#[tokio::test]
async fn what_cannot_be_ended_of_a_left_over_is_not_removed_and_no_start_fails_over_it() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let options = || HostOptions {
        storage: dir.path().to_path_buf(),
        vmm: on_qemu(),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    let storage = Host::open(options()).await.unwrap().storage().clone();
    let machine = storage.run_path(&"dead".parse().unwrap()).join("machine");
    std::fs::create_dir_all(&machine).unwrap();
    std::fs::write(machine.join("cgroup"), "of none that could be ended").unwrap();
    let left = || std::fs::read_dir(dir.path().join("staging")).unwrap();
    let record = || {
        left()
            .next()
            .unwrap()
            .unwrap()
            .path()
            .join("machine/cgroup")
    };
    for _ in 0..2 {
        Host::open(options()).await.unwrap();
        assert!(record().exists());
    }
    std::fs::remove_file(record()).unwrap();
    Host::open(options()).await.unwrap();
    assert_eq!(left().count(), 0);
}
