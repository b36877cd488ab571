//! The pager serving another process, as it serves QEMU: that process maps a shared memfd and
//! makes the userfaultfd; this one takes the descriptor, registers, serves and looks at dirty
//! pages from outside.
//!
//! The other process is this test binary again, told by an environment variable to play the VMM:
//! it obeys commands on its stdin.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "test names are sentences; page numbers are small; helpers are tests as well"
)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use support::{Content, DEADLINE, Guest, TestSource, guest_memfd, until};
use torpor_pager::{
    Backing, PageRun, PageSource, Pager, PagerConfig, PagerError, PagerFailure, Region, Uffd,
    WriteTracking,
};

const PAGES: u64 = 512;
const ROLE: &str = "TORPOR_TEST_VMM";

/// The other process, killed when dropped.
struct Vmm {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    memfd: OwnedFd,
}

impl Vmm {
    fn start() -> Self {
        let memfd = guest_memfd(PAGES);
        let inherited = rustix::io::dup(&memfd).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vmm_role", "--nocapture", "--test-threads=1"])
            .env(ROLE, inherited.as_raw_fd().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            stdout,
            memfd,
        }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn send(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// The next answer (the test harness of the other process prints lines of its own).
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(
                self.stdout.read_line(&mut line).unwrap(),
                0,
                "the VMM process ended"
            );
            if let Some((_, answer)) = line.split_once("@ ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    fn read(&mut self, page: u64) -> String {
        self.ask(&format!("read {page}"))
    }

    /// Takes the VMM's userfaultfd and serves its memory.
    fn pager(
        &mut self,
        source: &Arc<TestSource>,
        tracking: WriteTracking,
        prefetch: Vec<PageRun>,
    ) -> Pager {
        let answer = self.ask("userfaultfd");
        let (fd, addr) = answer.split_once(' ').unwrap();
        let pid = Pid::from_raw(self.pid()).unwrap();
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let fd =
            rustix::process::pidfd_getfd(&pidfd, fd.parse().unwrap(), PidfdGetfdFlags::empty());
        let uffd = Uffd::from_fd(fd.unwrap()).unwrap();
        let region = Region {
            host_addr: addr.parse().unwrap(),
            len_bytes: PAGES * 4096,
            guest_offset_bytes: 0,
            page_size: 4096,
        };
        uffd.negotiate(tracking).unwrap();
        uffd.register(&region, tracking).unwrap();
        if tracking == WriteTracking::Async {
            // Not needed, and must not do harm.
            uffd.write_protect(&region).unwrap();
        }
        let source: Arc<dyn PageSource> = source.clone();
        let backing = Backing::SharedMemfd(self.memfd.try_clone().unwrap());
        let mut config = PagerConfig::new(uffd, vec![region], source, backing);
        config.tracking = tracking;
        config.pagemap_pid = Some(self.pid());
        config.prefetch = prefetch;
        Pager::start(config).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.kill();
        }
    }
}

/// Not a test: the other process.
#[test]
fn vmm_role() {
    let Ok(fd) = std::env::var(ROLE) else { return };
    let fd = fd.parse().unwrap();
    // SAFETY: our parent made this descriptor for us, and nothing else in this process owns it.
    let memfd = unsafe { OwnedFd::from_raw_fd(fd) };
    let guest = Guest::of_memfd(memfd, PAGES);
    // What a VMM leaves in memory while it sets itself up.
    guest.write(300, 99);
    let mut uffd = None;
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        match words[0] {
            "userfaultfd" => {
                let fd = uffd.insert(Uffd::create().unwrap());
                let raw = std::os::fd::AsFd::as_fd(fd).as_raw_fd();
                println!("@ {raw} {}", guest.addr);
            }
            "read" => println!("@ {:?}", guest.read(number(1))),
            "write" => {
                guest.write(number(1), number(2));
                println!("@ written");
            }
            "punch" => {
                guest.punch(number(1), number(2));
                println!("@ punched");
            }
            "madvise" => {
                guest.madvise(number(1), number(2) as usize * 4096);
                println!("@ discarded");
            }
            other => panic!("unknown command {other}"),
        }
    }
    // Leave at once: the harness's own end is of no interest.
}

fn source() -> Arc<TestSource> {
    Arc::new(TestSource::new(PAGES))
}

fn generation(number: u64) -> String {
    format!("{:?}", Content::Generation(number))
}

#[test]
fn another_process_gets_its_memory_and_its_dirty_pages_are_known() {
    for tracking in [WriteTracking::Async, WriteTracking::Sync] {
        let mut vmm = Vmm::start();
        let pager = vmm.pager(&source(), tracking, vec![PageRun::new(100, 50)]);
        for page in [0, 1, 40, 120, 300] {
            assert_eq!(vmm.read(page), generation(0), "page {page}");
        }
        assert_eq!(vmm.ask("write 41 5"), "written");
        assert_eq!(vmm.ask("write 200 6"), "written");
        assert_eq!(vmm.ask("punch 90 20"), "punched");
        assert_eq!(vmm.ask("madvise 90 20"), "discarded");
        assert_eq!(vmm.read(95), "Zero");
        assert_eq!(vmm.ask("write 105 7"), "written");
        assert_eq!(vmm.read(105), generation(7));
        pager.settle(DEADLINE).unwrap();
        let dirty = pager.dirty().unwrap();
        let written: Vec<_> = dirty.written.runs().collect();
        assert_eq!(
            written,
            [41, 105, 200].map(|page| PageRun::new(page, 1)),
            "{tracking:?}"
        );
        let removed: Vec<_> = dirty.removed.runs().collect();
        assert_eq!(
            removed,
            [PageRun::new(90, 15), PageRun::new(106, 4)],
            "{tracking:?}"
        );
    }
}

#[test]
fn a_late_copy_in_another_process_is_dropped() {
    let mut vmm = Vmm::start();
    let pager = vmm.pager(&source(), WriteTracking::Async, Vec::new());
    assert_eq!(vmm.ask("punch 64 8"), "punched");
    // No event yet: the content comes back, a whole window of it.
    assert_eq!(vmm.read(66), generation(0));
    until("its neighbours too", || pager.stats().pages_copied == 16);
    assert_eq!(vmm.ask("madvise 64 8"), "discarded");
    support::event_applied(&pager);
    assert_eq!(vmm.read(66), "Zero");
    assert_eq!(vmm.read(64), "Zero");
    assert_eq!(vmm.read(72), generation(0));
    pager.settle(DEADLINE).unwrap();
    let dirty = pager.dirty().unwrap();
    assert!(dirty.written.is_empty());
    assert_eq!(
        dirty.removed.runs().collect::<Vec<_>>(),
        [PageRun::new(64, 8)]
    );
}

#[test]
fn a_page_that_cannot_be_read_fails_the_pager_and_is_never_made_up() {
    let mut vmm = Vmm::start();
    let source = source();
    let pager = vmm.pager(&source, WriteTracking::Async, Vec::new());
    assert_eq!(vmm.read(10), generation(0));
    source.failing.store(true, Ordering::SeqCst);
    vmm.send("read 200");
    let failure = pager.failure().wait(DEADLINE);
    let Some(PagerFailure::Source {
        page: 200,
        attempts: 4,
        ..
    }) = failure
    else {
        panic!("{failure:?}");
    };
    assert!(matches!(pager.settle(DEADLINE), Err(PagerError::Failed(_))));
    assert_eq!(
        pager.stats().faults_waiting,
        1,
        "nothing was given to the thread"
    );
    // What the pager's owner does now.
    vmm.kill();
    pager.shutdown().unwrap();
}

#[test]
fn a_process_that_dies_in_the_middle_of_its_faults_is_noticed() {
    let mut vmm = Vmm::start();
    let source = source();
    let pager = vmm.pager(&source, WriteTracking::Async, Vec::new());
    source.open_gate(false);
    vmm.send("read 5");
    until("the source is asked", || {
        source.reads.load(Ordering::SeqCst) == 1
    });
    vmm.kill();
    source.open_gate(true);
    until("it is noticed", || {
        matches!(pager.settle(DEADLINE), Err(PagerError::VmmGone))
    });
    assert!(
        pager.failure().get().is_none(),
        "a VMM that ends is no failure of the pager"
    );
    pager.shutdown().unwrap();
}
