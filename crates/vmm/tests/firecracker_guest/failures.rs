//! A Firecracker that is killed in the middle of something, and one whose page faults nobody serves.

use std::fs::{self, File};
use std::future::Future;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{sleep, timeout};
use torpor_pager::{Backing, FileSource, Pager, PagerConfig, Region, Uffd, WriteTracking};
use torpor_vmm::firecracker::{self, Handshake};
use torpor_vmm::{DrainOutcome, VmmError};

use crate::lab::{Image, Lab, PAGE, binary, can_drain, capture, reclaim};
use crate::support::{GUEST_DEADLINE, Guest, wait_until_gone};

/// How long a Firecracker that stands still is waited for before it is killed: long enough that the
/// request has reached it.
const STANDSTILL: Duration = Duration::from_millis(300);

fn send(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// Does something with a Firecracker that stands still and is killed over it.
async fn killed_over<T>(pid: u32, work: impl Future<Output = T>) -> T {
    send(pid, Signal::STOP);
    let kill = async {
        sleep(STANDSTILL).await;
        send(pid, Signal::KILL);
    };
    let (done, ()) = timeout(GUEST_DEADLINE, async { tokio::join!(work, kill) })
        .await
        .expect("no hang");
    wait_until_gone(pid).await;
    done
}

fn names_the_kill(error: &VmmError, step: &str) {
    let text = error.to_string();
    println!("{}", text.lines().next().unwrap());
    assert!(
        text.contains(step) && text.contains("was killed by signal 9"),
        "{text}"
    );
}

/// The Firecracker that works in this directory.
fn process_in(dir: &Path) -> Option<u32> {
    let dir = dir.canonicalize().unwrap();
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let entry = entry.unwrap();
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let works_there = fs::read_link(entry.path().join("cwd")).ok()? == dir;
        let program = fs::read_link(entry.path().join("exe")).ok()?;
        let name = program.file_name()?.to_str()?;
        (works_there && name.starts_with("firecracker")).then_some(pid)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firecracker_that_is_killed_over_its_boot_is_an_error() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (log, machine, source) = (
        lab.host.path("console.log"),
        lab.machine(false),
        lab.host.boot_source(),
    );
    let dir = lab.dir.path();
    let booting = firecracker::boot(&lab.binary, &machine, &source, dir, &log);
    let booting = Box::pin(booting);
    let kill = async {
        loop {
            if let Some(pid) = process_in(dir) {
                send(pid, Signal::KILL);
                return pid;
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    let (booted, pid) = timeout(GUEST_DEADLINE, async { tokio::join!(booting, kill) })
        .await
        .unwrap();
    names_the_kill(&booted.unwrap_err(), "VMM");
    wait_until_gone(pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_firecracker_that_is_killed_at_any_step_of_a_pause_or_a_resume_is_an_error() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary.clone());
    let (mut guest, _) = lab.boot(false, "").await;
    guest.vm.stop_vcpus().await.unwrap();
    let state = guest.vm.save_state().await.unwrap();
    let image = Arc::new(capture(&*guest.vm, None));
    let pid = guest.vm.pid();
    let saved = killed_over(pid, guest.vm.save_state()).await;
    names_the_kill(&saved.unwrap_err(), "state");
    assert!(!guest.vm.is_alive());
    names_the_kill(&guest.vm.resume_vcpus().await.unwrap_err(), "state");
    names_the_kill(&guest.vm.memory().unwrap_err(), "find the guest's memory");
    assert_eq!(guest.ask("count").await, "", "the channel is closed");

    // Over the hand-over of its page faults.
    let next = Lab::new(binary.clone());
    let mut incoming = next.incoming().await;
    let handed = killed_over(incoming.pid(), incoming.hand_over(&state)).await;
    names_the_kill(&handed.unwrap_err(), "load the device state");

    // Over the rest of the load, with nobody who serves it.
    let next = Lab::new(binary);
    let mut incoming = next.incoming().await;
    let _unserved = incoming.hand_over(&state).await.unwrap();
    let finished = killed_over(incoming.pid(), incoming.finish()).await;
    names_the_kill(&finished.unwrap_err(), "load the device state");

    // Over a drain, in one that was resumed.
    if !can_drain(&lab.binary) {
        return;
    }
    let (_next, mut guest, pager) = lab.resume(&state, &image).await;
    guest.ask("churn 16").await;
    reclaim(&mut guest).await;
    let drained = killed_over(guest.vm.pid(), guest.vm.drain(GUEST_DEADLINE, None)).await;
    println!("{drained:?}");
    assert!(
        matches!(drained.outcome, DrainOutcome::Failed(_)),
        "{drained:?}"
    );
    assert_eq!(guest.vm.wait_exit().await.signal, Some(9));
    drop(pager);
}

/// How long a load may take whose pager stands still, …
const STALLED_LOAD: Duration = Duration::from_secs(12);
/// … a drain, …
const STALLED_DRAIN: Duration = Duration::from_secs(3);
/// … and any other request then.
const STALLED_REQUEST: Duration = Duration::from_secs(6);
/// How often a drain may miss that: the guest waits for another page before it has hinted one.
const STALLS_MAX: u32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn a_pager_that_stands_still_hangs_neither_a_resume_nor_a_drain() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (guest, _) = lab.boot(false, "").await;
    guest.vm.stop_vcpus().await.unwrap();
    let state = guest.vm.save_state().await.unwrap();
    let image = capture(&*guest.vm, None);
    guest.vm.kill().await.unwrap();
    over_a_load(&lab, &state, &image).await;
    if can_drain(&lab.binary) {
        over_a_drain(&lab, &state, &image).await;
    }
}

/// The resume ends with an error, and nothing is left running.
async fn over_a_load(lab: &Lab, state: &[u8], image: &Image) {
    let mut next = Lab::new(lab.binary.clone());
    next.binary.deadlines.load = STALLED_LOAD;
    let mut incoming = next.incoming().await;
    let pid = incoming.pid();
    let handshake = incoming.hand_over(state).await.unwrap();
    // It can touch nothing before its pager is there, and stopped.
    send(pid, Signal::STOP);
    let mut pager = PagerProcess::start(handshake, pid, image, &next.host.path("image"));
    send(pager.0.id(), Signal::STOP);
    send(pid, Signal::CONT);
    let error = timeout(GUEST_DEADLINE, incoming.finish())
        .await
        .expect("no hang")
        .unwrap_err();
    println!("{error}");
    let text = error.to_string();
    assert!(
        text.contains("/snapshot/load") && text.contains("page faults"),
        "{text}"
    );
    wait_until_gone(pid).await;
    pager.0.kill().unwrap();
    pager.0.wait().unwrap();
}

/// The drain ends at its ceiling, a stop fails in time, and all goes on with the pager.
async fn over_a_drain(lab: &Lab, state: &[u8], image: &Image) {
    let mut next = Lab::new(lab.binary.clone());
    next.binary.deadlines.request = STALLED_REQUEST;
    let disk = next.host.path("layer.img");
    fs::copy(lab.host.path("layer.img"), disk).unwrap();
    let mut incoming = next.incoming().await;
    let pid = incoming.pid();
    let handshake = incoming.hand_over(state).await.unwrap();
    let pager = PagerProcess::start(handshake, pid, image, &next.host.path("image"));
    let vm = incoming.finish().await.unwrap();
    vm.resume_vcpus().await.unwrap();
    let mut guest = Guest::new(vm);
    // What the drain itself touches is there: else the guest waits for a page, and nobody else.
    guest.ask("churn 32").await;
    reclaim(&mut guest).await;
    let drained = guest.vm.drain(GUEST_DEADLINE, None).await;
    assert_eq!(drained.outcome, DrainOutcome::Done);
    guest.ask("churn 16").await;
    let counted = guest.count().await;

    let mut stuck = None;
    for _ in 0..STALLS_MAX {
        send(pager.0.id(), Signal::STOP);
        let began = Instant::now();
        let drained = timeout(GUEST_DEADLINE, guest.vm.drain(STALLED_DRAIN, None)).await;
        let drained = drained.expect("no hang");
        println!("{drained:?} after {:?}", began.elapsed());
        assert_eq!(drained.outcome, DrainOutcome::CeilingReached);
        let stopped = timeout(GUEST_DEADLINE, guest.vm.stop_vcpus()).await;
        stuck = stopped.expect("no hang").err();
        if stuck.is_some() {
            break;
        }
        // Only the guest stood still, in a page fault of something else.
        send(pager.0.id(), Signal::CONT);
        guest.vm.resume_vcpus().await.unwrap();
        guest.ask("churn 16").await;
    }
    let text = stuck
        .expect("its thread stands still in a discard")
        .to_string();
    println!("{text}");
    assert!(
        text.contains("PATCH /vm") && text.contains("page faults"),
        "{text}"
    );
    assert!(guest.vm.is_alive());

    send(pager.0.id(), Signal::CONT);
    let stop = async {
        // What was asked before is carried out first.
        while let Err(error) = guest.vm.stop_vcpus().await {
            println!("not yet: {error}");
        }
    };
    timeout(GUEST_DEADLINE, stop).await.expect("it goes on");
    assert!(!guest.vm.save_state().await.unwrap().is_empty());
    guest.vm.resume_vcpus().await.unwrap();
    assert!(guest.count().await > counted);
    let drained = guest.vm.drain(GUEST_DEADLINE, None).await;
    assert_eq!(drained.outcome, DrainOutcome::Done);
    guest.vm.kill().await.unwrap();
}

/// A pager in a process of its own, which can be stopped.
struct PagerProcess(Child);

/// Where it finds the userfaultfd.
const USERFAULTFD: i32 = 3;
const PAGER_ENV: &str = "TORPOR_LAB_PAGER";

impl PagerProcess {
    fn start(handshake: Handshake, pid: u32, image: &Image, path: &Path) -> Self {
        let file = File::create(path).unwrap();
        file.set_len((image.0.len() * PAGE) as u64).unwrap();
        for (page, bytes) in image.0.iter().enumerate() {
            if let Some(bytes) = bytes {
                file.write_all_at(bytes, (page * PAGE) as u64).unwrap();
            }
        }
        let [mapping] = handshake.mappings.as_slice() else {
            panic!("a small guest has one region");
        };
        let words = format!(
            "{pid} {} {} {}",
            mapping.host_addr,
            mapping.len_bytes,
            path.display()
        );
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args([
                "--exact",
                "failures::pager_process",
                "--ignored",
                "--nocapture",
            ])
            .env(PAGER_ENV, words)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .fd_mappings(vec![FdMapping {
                parent_fd: handshake.userfaultfd,
                child_fd: USERFAULTFD,
            }])
            .unwrap();
        let mut child = child.spawn().unwrap();
        let mut ready = [0; 1];
        child
            .stderr
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        Self(child)
    }
}

impl Drop for PagerProcess {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
#[ignore = "no test by itself: PagerProcess starts it as the process that serves the page faults"]
fn pager_process() {
    let Ok(words) = std::env::var(PAGER_ENV) else {
        return;
    };
    let words: Vec<&str> = words.split(' ').collect();
    // SAFETY: whoever starts this process has put a userfaultfd there, for it alone.
    let userfaultfd = unsafe { OwnedFd::from_raw_fd(USERFAULTFD) };
    let uffd = Uffd::from_fd(userfaultfd).unwrap();
    let region = Region {
        host_addr: words[1].parse().unwrap(),
        len_bytes: words[2].parse().unwrap(),
        guest_offset_bytes: 0,
        page_size: 4096,
    };
    uffd.register(&region, WriteTracking::Off).unwrap();
    let source = Arc::new(FileSource::new(File::open(words[3]).unwrap()).unwrap());
    let pager = Pager::start(PagerConfig::new(
        uffd,
        vec![region],
        source,
        Backing::Anonymous,
    ))
    .unwrap();
    std::io::stderr().write_all(b".").unwrap();
    // Until it is killed, or alone.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(pager);
}
