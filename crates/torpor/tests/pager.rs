//! `torpor pager` serving processes that do what Firecracker does when it loads a snapshot: map
//! anonymous memory, make a userfaultfd that tells of discards, register, connect, and send the
//! regions and the descriptor in one message.
//!
//! Such a process is this test binary again, told by an environment variable to play the VMM: it
//! obeys commands on its stdin.
#![allow(
    missing_docs,
    clippy::cast_possible_truncation,
    clippy::multiple_unsafe_ops_per_block,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests are documented by their names and fail by panicking, helpers included"
)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::Value;
use tempfile::TempDir;
use torpor_build::{BuildId, BuildInfo, ImageKind, PageContent, Storage};
use torpor_pager::server::{Server, ServerConfig, ServerReport, StopHandle};
use torpor_pager::{PageSource, Region, SourceKind, SourceRun, Uffd, WriteTracking};

const DEADLINE: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
const PAGES: usize = 2048;
const ROLE: &str = "TORPOR_TEST_PAGER_SOCKET";

/// Waits until something holds.
fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(started.elapsed() < DEADLINE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A running `torpor pager`, and where it keeps things.
struct Served {
    dir: TempDir,
    child: Child,
}

impl Served {
    fn start_in(dir: TempDir, content: &[&str], more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_torpor"))
            .args([
                "--json",
                "pager",
                "--socket",
                "pager.sock",
                "--report",
                "report.json",
            ])
            .args(content)
            .args(more)
            .current_dir(dir.path())
            .env("TORPOR_STORAGE", dir.path().join("storage"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        while !said.contains("listening on") {
            assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "{said}");
        }
        // The rest is to be read, or it would block who says it.
        std::thread::spawn(move || stderr.lines().for_each(drop));
        Self { dir, child }
    }

    /// On a raw memory file: each page holds its number, but pages 100 to 199 are a hole.
    fn on_memory_file(pages: usize, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("memory")).unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        for page in (0..pages).filter(|page| !(100..200).contains(page)) {
            let word = (page as u64).to_le_bytes();
            file.write_all_at(&word, (page * PAGE) as u64).unwrap();
        }
        Self::start_in(dir, &["--memfile", "memory"], more)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("pager.sock")
    }

    fn report(&self) -> Option<Value> {
        let text = std::fs::read(self.dir.path().join("report.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap())
    }

    /// The report, once it tells of so many refused connections.
    fn refusals(&self, refused: u64) -> Vec<Value> {
        let report = || self.report().filter(|report| report["refused"] == refused);
        let report = until("the report", report);
        report["refusals"].as_array().unwrap().clone()
    }

    fn vmm(&self) -> Vmm {
        Vmm::start(&self.socket(), PAGES)
    }

    /// A VMM whose message waits to be read: the pager must be standing.
    fn waiting_vmm(&self) -> Vmm {
        let mut vmm = self.vmm();
        assert_eq!(vmm.ask("hello"), "hello");
        vmm
    }

    fn signal(&self, signal: Signal) {
        assert!(support::signal(self.child.id(), signal));
    }

    fn limit(&self, resource: Resource, limit: u64) {
        let pid = Some(Pid::from_child(&self.child));
        let old = rustix::process::getrlimit(resource);
        let limit = Rlimit {
            current: Some(limit),
            maximum: old.maximum,
        };
        rustix::process::prlimit(pid, resource, limit).unwrap();
    }

    fn open_descriptors(&self) -> u64 {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        open.unwrap().count() as u64
    }

    /// Its exit code, once it has ended.
    fn end(&mut self) -> i32 {
        until("the pager ends", || self.child.try_wait().unwrap())
            .code()
            .unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

struct Vmm {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Vmm {
    fn start(socket: &Path, pages: usize) -> Self {
        Self::start_with(socket, pages, PAGE)
    }

    /// With memory of huge pages, if the host has some left.
    fn start_huge(socket: &Path) -> Option<Self> {
        let mut vmm = Self::start_with(socket, PAGES, HUGE_PAGE);
        (vmm.answer() == "memory").then_some(vmm)
    }

    fn start_with(socket: &Path, pages: usize, page_size: usize) -> Self {
        Self::start_saying(socket, pages, page_size, page_size)
    }

    /// Its message says another size of pages than its memory has.
    fn start_saying(socket: &Path, pages: usize, page_size: usize, said: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vmm_role", "--nocapture", "--test-threads=1"])
            .env(ROLE, socket)
            .env("PAGES", pages.to_string())
            .env("PAGE_SIZE", page_size.to_string())
            .env("SAID_PAGE_SIZE", said.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// One that has been killed already hears nothing.
    fn send(&mut self, command: &str) {
        if let Err(error) = writeln!(self.stdin, "{command}") {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    fn answer(&mut self) -> String {
        loop {
            if self.stdout.buffer().is_empty() {
                let mut fds = [PollFd::new(self.stdout.get_ref(), PollFlags::IN)];
                let deadline = Timespec::try_from(DEADLINE).unwrap();
                let said = rustix::event::poll(&mut fds, Some(&deadline)).unwrap();
                assert_ne!(said, 0, "the VMM does not answer");
            }
            let mut line = String::new();
            let got = self.stdout.read_line(&mut line).unwrap();
            assert_ne!(got, 0, "the VMM process ended");
            if let Some((_, answer)) = line.split_once("@ ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn is_killed(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt as _;
        let status = until("the VMM is killed", || self.child.try_wait().unwrap());
        status.signal() == Some(9)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

/// What a VMM sends: a message, and descriptors beside it.
fn send(stream: &UnixStream, message: &str, fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(beside.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let bytes = [IoSlice::new(message.as_bytes())];
    rustix::net::sendmsg(stream, &bytes, &mut beside, SendFlags::empty()).unwrap();
}

/// Not a test: the other process.
#[test]
fn vmm_role() {
    let Ok(socket) = std::env::var(ROLE) else {
        return;
    };
    let number = |name| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let (pages, page_size) = (number("PAGES"), number("PAGE_SIZE"));
    let (len, rw) = (pages * PAGE, ProtFlags::READ | ProtFlags::WRITE);
    let mut flags = MapFlags::PRIVATE;
    flags.set(
        MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        page_size == HUGE_PAGE,
    );
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
    let memory = unsafe { rustix::mm::mmap_anonymous(null, len, rw, flags) };
    if page_size == HUGE_PAGE {
        let there = memory.is_ok();
        println!("@ {}", if there { "memory" } else { "no memory" });
        if !there {
            return;
        }
    }
    let memory: *mut u64 = memory.unwrap().cast();
    let addr = memory.expose_provenance() as u64;
    let uffd = Uffd::create().unwrap();
    uffd.negotiate(WriteTracking::Off).unwrap();
    // Two regions, as above and below the hole for devices.
    let half = (pages / 2 * PAGE) as u64;
    let regions = [0, half].map(|offset| Region {
        host_addr: addr + offset,
        len_bytes: half,
        guest_offset_bytes: offset,
        page_size: page_size as u32,
    });
    for region in &regions {
        uffd.register(region, WriteTracking::Off).unwrap();
    }
    let said = number("SAID_PAGE_SIZE");
    let json = regions.map(|region| {
        format!(
            "{{\"base_host_virt_addr\":{},\"size\":{},\"offset\":{},\"page_size\":{said},\"page_size_kib\":{said}}}",
            region.host_addr, region.len_bytes, region.guest_offset_bytes
        )
    });
    let stream = UnixStream::connect(socket).unwrap();
    send(&stream, &format!("[{}]", json.join(",")), &[uffd.as_fd()]);
    // Firecracker does not close the connection, and keeps its copy of the descriptor.
    std::mem::forget(stream);
    // SAFETY: `page` is checked; volatile, since the pager fills the memory.
    let at = |page: usize| unsafe {
        assert!(page < pages);
        memory.add(page * PAGE / 8)
    };
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words[index].parse::<usize>().unwrap();
        match words[0] {
            "hello" => println!("@ hello"),
            // SAFETY: as above.
            "read" => println!("@ {}", unsafe { at(number(1)).read_volatile() }),
            "sum" => {
                // SAFETY: as above.
                let word = |page| unsafe { at(page).read_volatile() };
                println!("@ {}", (number(1)..number(2)).map(word).sum::<u64>());
            }
            "discard" => {
                let start = at(number(1)).cast();
                // SAFETY: our own mapping, to which no reference exists.
                unsafe { rustix::mm::madvise(start, number(2) * PAGE, Advice::LinuxDontNeed) }
                    .unwrap();
                println!("@ discarded");
            }
            other => panic!("unknown command {other}"),
        }
    }
}

fn sum(pages: std::ops::Range<u64>) -> String {
    let word = |page: &u64| !(100..200).contains(page);
    pages.filter(word).sum::<u64>().to_string()
}

#[test]
fn several_vmms_at_once_get_their_memory_and_are_reported() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "3"]);
    let mut vmms = [served.vmm(), served.vmm(), served.vmm()];
    for vmm in &mut vmms {
        assert_eq!(vmm.ask("read 1500"), "1500");
        assert_eq!(vmm.ask("read 150"), "0");
    }
    for vmm in &mut vmms {
        assert_eq!(vmm.ask("discard 1490 20"), "discarded");
        assert_eq!(vmm.ask("read 1500"), "0");
        assert_eq!(vmm.ask("read 1510"), "1510");
        assert_eq!(vmm.ask("sum 0 1024"), sum(0..1024));
    }
    let pids = vmms.each_ref().map(|vmm| u64::from(vmm.child.id()));
    drop(vmms);
    assert_eq!(served.end(), 0);
    assert!(!served.socket().exists());
    let report = served.report().unwrap();
    let wanted = [
        "faults",
        "pages_copied",
        "pages_zeroed",
        "pages_prefetched",
        "removes",
        "pages_removed",
        "eagain",
        "p50_us",
        "p99_us",
        "max_us",
        "bytes_per_s",
    ];
    for field in wanted {
        assert!(report[field].is_u64(), "{field}: {report}");
        for vmm in report["vmms"].as_array().unwrap() {
            assert!(vmm[field].is_u64(), "{field}: {vmm}");
        }
    }
    assert_eq!(
        (
            report["vmms_served"].as_u64(),
            report["vmms_failed"].as_u64()
        ),
        (Some(3), Some(0))
    );
    assert_eq!(
        (report["removes"].as_u64(), report["pages_removed"].as_u64()),
        (Some(3), Some(60))
    );
    assert!(report["pages_copied"].as_u64() >= Some(3 * 900));
    assert!(report["pages_zeroed"].as_u64() >= Some(3 * 100));
    assert!(report["bytes_per_s"].as_u64() > Some(0));
    let told = report["vmms"].as_array().unwrap();
    assert!(
        told.iter()
            .all(|vmm| pids.contains(&vmm["pid"].as_u64().unwrap()))
    );
}

/// Needs huge pages of the host; says so in a line where there are none.
#[test]
fn a_vmm_of_huge_pages_is_served() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    let Some(mut vmm) = Vmm::start_huge(&served.socket()) else {
        eprintln!("not run: this host has not enough huge pages (sysctl vm.nr_hugepages=64)");
        return;
    };
    let sum = |pages: std::ops::Range<usize>| pages.sum::<usize>().to_string();
    assert_eq!(vmm.ask("read 700"), "700");
    assert_eq!(vmm.ask("read 150"), "0");
    assert_eq!(vmm.ask("sum 200 2048"), sum(200..2048));
    assert_eq!(vmm.ask("discard 512 1024"), "discarded");
    assert_eq!(vmm.ask("sum 512 1536"), "0");
    assert_eq!(vmm.ask("sum 1536 2048"), sum(1536..2048));
    drop(vmm);
    assert_eq!(served.end(), 0);
    let report = served.report().unwrap();
    let figure = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(figure("pages_copied"), 2048);
    // One for each region that it lies in.
    assert_eq!((figure("removes"), figure("pages_removed")), (2, 1024));
    assert_eq!(figure("pages_zeroed"), 1024);
    assert_eq!(figure("faults"), 6);
}

#[test]
fn a_build_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(&dir.path().join("storage")).unwrap();
    let id = BuildId::random();
    let staged = storage.begin_build(id).unwrap();
    for kind in [ImageKind::Memory, ImageKind::Disk] {
        let mut writer = staged.image_writer(kind, PAGES as u64, None).unwrap();
        let stored: Vec<u8> = (0..1000_u64)
            .flat_map(|page| [page.to_le_bytes(); PAGE / 8].concat())
            .collect();
        writer.push(0, 1000, PageContent::Data(&stored)).unwrap();
        let rest = PAGES as u64 - 1000;
        writer.push(1000, rest, PageContent::Removed).unwrap();
        writer.finish().unwrap();
    }
    staged.write_vmstate(b"device state").unwrap();
    drop(staged.commit(BuildInfo::default()).unwrap());
    drop(storage);
    let mut served = Served::start_in(dir, &["--build", &id.to_string()], &["--connections", "1"]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("sum 0 1000"), (0..1000).sum::<u64>().to_string());
    assert_eq!(vmm.ask("sum 1000 2048"), "0");
    drop(vmm);
    assert_eq!(served.end(), 0);
}

#[test]
fn a_vmm_whose_memory_cannot_be_read_is_killed_and_the_report_says_why() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 3"), "3");
    let memory = File::options()
        .write(true)
        .open(served.dir.path().join("memory"));
    memory.unwrap().set_len(PAGE as u64).unwrap();
    vmm.send("read 1200");
    assert!(vmm.is_killed());
    assert_eq!(served.end(), 0);
    let report = served.report().unwrap();
    assert_eq!(report["vmms_failed"], 1);
    let error = report["vmms"][0]["error"].as_str().unwrap();
    assert!(
        error.contains("guest page 1200 could not be read"),
        "{error}"
    );
}

#[test]
fn a_peer_that_speaks_wrongly_is_refused_and_the_others_are_served() {
    let served = Served::on_memory_file(PAGES, &["--connections", "6"]);
    let null = File::open("/dev/null").unwrap();
    let region = "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0}]";
    let wrong = [
        ("no json at all", vec![], "not a list"),
        ("[]", vec![null.as_fd()], "0 memory regions"),
        (region, vec![], "0 descriptors"),
        (region, vec![null.as_fd()], "no userfaultfd"),
        (region, vec![null.as_fd(), null.as_fd()], "2 descriptors"),
    ];
    for (refused, (message, fds, reason)) in (1..).zip(wrong) {
        let stream = UnixStream::connect(served.socket()).unwrap();
        send(&stream, message, &fds);
        // Refused is: the connection ends.
        let got = std::io::Read::read(&mut &stream, &mut [0]).unwrap();
        assert_eq!(got, 0, "{message}");
        let told = served.refusals(refused).pop().unwrap();
        let error = told["error"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
        assert_eq!(told["pid"], std::process::id());
    }
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 7"), "7");
    drop(vmm);
    let report = until("the report", || {
        served.report().filter(|report| report["vmms_served"] == 1)
    });
    assert_eq!(report["vmms"].as_array().unwrap().len(), 1);
}

#[test]
fn a_guest_larger_than_the_memory_file_is_refused_and_killed() {
    let served = Served::on_memory_file(PAGES / 2, &[]);
    let mut vmm = served.vmm();
    vmm.send("read 2000");
    assert!(vmm.is_killed(), "it would wait for ever");
    let refusal = &served.refusals(1)[0];
    let error = refusal["error"].as_str().unwrap();
    assert!(
        error.contains("larger than") && error.contains("was killed"),
        "{error}"
    );
    assert_eq!(refusal["pid"], vmm.child.id());
}

#[test]
fn a_vmm_whose_regions_cannot_be_served_is_refused_and_killed() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = Vmm::start_saying(&served.socket(), PAGES, PAGE, 1 << 30);
    vmm.send("read 7");
    assert!(vmm.is_killed(), "it would wait for ever");
    assert_eq!(served.vmm().ask("read 7"), "7");
    let refusal = &served.refusals(1)[0];
    let error = refusal["error"].as_str().unwrap();
    assert!(
        error.contains("region at") && error.contains("was killed"),
        "{error}"
    );
    assert_eq!(refusal["pid"], vmm.child.id());
}

#[test]
fn an_interrupt_kills_the_vmms_and_still_reports_them() {
    let mut served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 9"), "9");
    assert!(support::signal(served.child.id(), Signal::INT));
    assert!(vmm.is_killed());
    assert_eq!(served.end(), 130);
    let report = served.report().unwrap();
    assert_eq!(report["vmms_failed"], 1);
    assert!(!served.socket().exists());
}

#[test]
fn a_socket_that_exists_is_not_taken_over() {
    let served = Served::on_memory_file(PAGES, &[]);
    let again = Command::new(env!("CARGO_BIN_EXE_torpor"))
        .args(["pager", "--socket", "pager.sock", "--memfile", "memory"])
        .current_dir(served.dir.path())
        .output()
        .unwrap();
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("another pager may be listening"));
    assert!(served.socket().exists());
}

#[test]
fn connections_beyond_the_descriptors_wait_and_harm_nobody_who_is_served() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut vmm = served.vmm();
    assert_eq!(vmm.ask("read 7"), "7");
    // Enough for one at a time.
    served.limit(Resource::Nofile, served.open_descriptors() + 9);
    let silent: Vec<_> = (0..20)
        .map(|_| UnixStream::connect(served.socket()).unwrap())
        .collect();
    for page in 1000..1100 {
        assert_eq!(vmm.ask(&format!("read {page}")), page.to_string());
    }
    drop(silent);
    let mut another = served.vmm();
    assert_eq!(another.ask("read 8"), "8");
    assert_eq!(vmm.ask("read 9"), "9");
}

#[test]
fn a_vmm_that_comes_when_descriptors_are_short_is_served_when_there_are_some() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut first = served.vmm();
    assert_eq!(first.ask("read 7"), "7");
    let open = served.open_descriptors();
    // As many as a connection needs at most, and every number below.
    for few in 0..=8 {
        served.signal(Signal::STOP);
        let mut vmm = served.waiting_vmm();
        served.limit(Resource::Nofile, open + few);
        served.signal(Signal::CONT);
        // Whatever it does about the newcomer, it has done by then.
        for page in 1000..1100 {
            assert_eq!(first.ask(&format!("read {page}")), page.to_string());
        }
        served.limit(Resource::Nofile, open + 100);
        assert_eq!(vmm.ask("read 8"), "8");
    }
}

#[test]
fn a_vmm_for_which_no_thread_can_be_started_is_killed_and_harms_nobody() {
    let served = Served::on_memory_file(PAGES, &[]);
    let mut first = served.vmm();
    assert_eq!(first.ask("read 7"), "7");
    served.signal(Signal::STOP);
    let mut vmm = served.waiting_vmm();
    vmm.send("read 7");
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", served.child.id())).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    // Room for a message, and for no thread's stack.
    served.limit(Resource::As, (pages + 32) * PAGE as u64);
    served.signal(Signal::CONT);
    assert!(vmm.is_killed(), "it would wait for ever");
    assert_eq!(first.ask("read 8"), "8");
    let error = served.refusals(1)[0]["error"].to_string();
    assert!(error.contains("thread"), "{error}");
}

#[test]
fn a_vmm_beyond_the_last_connection_is_killed_and_does_not_hang() {
    let mut served = Served::on_memory_file(PAGES, &["--connections", "1"]);
    served.signal(Signal::STOP);
    let mut first = served.waiting_vmm();
    let mut second = served.waiting_vmm();
    second.send("read 7");
    served.signal(Signal::CONT);
    assert_eq!(first.ask("read 7"), "7");
    assert!(second.is_killed(), "it would wait for ever");
    assert_eq!(first.ask("read 8"), "8");
    assert!(UnixStream::connect(served.socket()).is_err());
    drop(first);
    assert_eq!(served.end(), 0);
    assert_eq!(served.refusals(1)[0]["pid"], second.child.id());
}

#[test]
fn a_vmm_that_nobody_has_accepted_yet_is_killed_when_the_pager_is_interrupted() {
    let mut served = Served::on_memory_file(PAGES, &[]);
    served.signal(Signal::STOP);
    let mut vmms = [served.waiting_vmm(), served.waiting_vmm()];
    served.signal(Signal::INT);
    served.signal(Signal::CONT);
    for vmm in &mut vmms {
        assert!(vmm.is_killed());
    }
    assert_eq!(served.end(), 130);
}

/// Each page holds its number. Asking what stands at one page takes until a gate is opened, which
/// holds up whoever needs that guest's page states; another one cannot be read.
#[derive(Default)]
struct HangingSource {
    asked: AtomicBool,
    open: Mutex<bool>,
    opened: Condvar,
}

const HANGING_PAGE: u64 = 1600;
const BROKEN_PAGE: u64 = 900;

impl HangingSource {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl PageSource for HangingSource {
    fn run_at(&self, page: u64) -> SourceRun {
        if page == HANGING_PAGE {
            self.asked.store(true, Ordering::Release);
            let open = self.open.lock().unwrap();
            drop(self.opened.wait_while(open, |open| !*open).unwrap());
        }
        SourceRun {
            pages: 1,
            kind: SourceKind::Data,
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for (page, bytes) in (first_page..).zip(buf.chunks_mut(PAGE)) {
            if page == BROKEN_PAGE {
                return Err(std::io::Error::other("this page is broken"));
            }
            bytes[..8].copy_from_slice(&page.to_le_bytes());
        }
        Ok(())
    }
}

/// A server in this process, and its last report.
struct Here {
    dir: TempDir,
    source: Arc<HangingSource>,
    stop: StopHandle,
    report: Arc<Mutex<ServerReport>>,
    thread: JoinHandle<ServerReport>,
}

impl Here {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("pager.sock")).unwrap();
        let source = Arc::new(HangingSource::default());
        let config = ServerConfig {
            source: Arc::clone(&source) as Arc<dyn PageSource>,
            len_pages: PAGES as u64,
            prefetch: Vec::new(),
            connections: None,
        };
        let server = Server::new(listener, config).unwrap();
        let stop = server.stop_handle();
        let report = Arc::new(Mutex::new(ServerReport::default()));
        let kept = Arc::clone(&report);
        let thread = std::thread::spawn(move || {
            let mut keep = |report: &ServerReport| *kept.lock().unwrap() = report.clone();
            server.run(&mut keep).unwrap()
        });
        Self {
            dir,
            source,
            stop,
            report,
            thread,
        }
    }

    fn vmm(&self) -> Vmm {
        Vmm::start(&self.dir.path().join("pager.sock"), PAGES)
    }

    /// A VMM whose pager is held up.
    fn hanging_vmm(&self) -> Vmm {
        let mut vmm = self.vmm();
        assert_eq!(vmm.ask("read 3"), "3");
        vmm.send(&format!("read {HANGING_PAGE}"));
        until("the source hangs", || {
            self.source.asked.load(Ordering::Acquire).then_some(())
        });
        vmm
    }

    fn told_of(&self, vmm: &Vmm) -> bool {
        let told = |pid: i32| u32::try_from(pid).unwrap() == vmm.child.id();
        let report = self.report.lock().unwrap();
        report.vmms.iter().any(|vmm| told(vmm.pid))
    }

    fn end(self) -> ServerReport {
        until("the server ends", || {
            self.thread.is_finished().then_some(())
        });
        self.thread.join().unwrap()
    }
}

#[test]
fn a_vmm_whose_pager_hangs_keeps_no_other_waiting() {
    let here = Here::start();
    let mut other = here.vmm();
    assert_eq!(other.ask("read 3"), "3");
    let mut hanging = here.hanging_vmm();
    hanging.child.kill().unwrap();
    hanging.child.wait().unwrap();
    // A new one,
    let mut new = here.vmm();
    assert_eq!(new.ask("read 4"), "4");
    // one that fails,
    other.send(&format!("read {BROKEN_PAGE}"));
    assert!(other.is_killed(), "it would wait for ever");
    // and one that ends.
    new.child.kill().unwrap();
    until("both ends are reported", || {
        (here.told_of(&other) && here.told_of(&new)).then_some(())
    });
    assert!(!here.told_of(&hanging));
    here.source.open();
    until("the end that took long is reported", || {
        here.told_of(&hanging).then_some(())
    });
    here.stop.stop();
    let report = here.end();
    assert_eq!((report.vmms_served, report.vmms_failed), (3, 1));
}

#[test]
fn a_server_whose_pagers_hang_kills_its_vmms_and_ends() {
    let here = Here::start();
    let mut hanging = [here.hanging_vmm(), here.hanging_vmm()];
    let mut other = here.vmm();
    assert_eq!(other.ask("read 3"), "3");
    here.stop.stop();
    for vmm in hanging.iter_mut().chain([&mut other]) {
        assert!(vmm.is_killed());
    }
    let source = Arc::clone(&here.source);
    let report = here.end();
    assert_eq!((report.vmms_served, report.vmms_failed), (3, 3));
    source.open();
}
