//! A `torpor pager`, and VMMs for it to serve: processes of this test program.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::Value;
use tempfile::TempDir;
use torpor_pager::{Region, Uffd, WriteTracking};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const PAGE: usize = 4096;
pub(crate) const HUGE_PAGE: usize = 2 << 20;
pub(crate) const PAGES: usize = 2048;
pub(crate) const ROLE: &str = "TORPOR_TEST_PAGER_SOCKET";

/// Waits until something holds.
pub(crate) fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
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
pub(crate) struct Served {
    pub(crate) dir: TempDir,
    pub(crate) child: Child,
}

impl Served {
    pub(crate) fn start_in(dir: TempDir, content: &[&str], more: &[&str]) -> Self {
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
    pub(crate) fn on_memory_file(pages: usize, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("memory")).unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        for page in (0..pages).filter(|page| !(100..200).contains(page)) {
            let word = (page as u64).to_le_bytes();
            file.write_all_at(&word, (page * PAGE) as u64).unwrap();
        }
        Self::start_in(dir, &["--memfile", "memory"], more)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("pager.sock")
    }

    pub(crate) fn report(&self) -> Option<Value> {
        let text = std::fs::read(self.dir.path().join("report.json")).ok()?;
        Some(serde_json::from_slice(&text).unwrap())
    }

    /// The report, once it tells of so many refused connections.
    pub(crate) fn refusals(&self, refused: u64) -> Vec<Value> {
        let report = || self.report().filter(|report| report["refused"] == refused);
        let report = until("the report", report);
        report["refusals"].as_array().unwrap().clone()
    }

    pub(crate) fn vmm(&self) -> Vmm {
        Vmm::start(&self.socket(), PAGES)
    }

    /// A VMM whose message waits to be read: the pager must be standing.
    pub(crate) fn waiting_vmm(&self) -> Vmm {
        let mut vmm = self.vmm();
        assert_eq!(vmm.ask("hello"), "hello");
        vmm
    }

    pub(crate) fn signal(&self, signal: Signal) {
        assert!(crate::support::signal(self.child.id(), signal));
    }

    pub(crate) fn limit(&self, resource: Resource, limit: u64) {
        let pid = Some(Pid::from_child(&self.child));
        let old = rustix::process::getrlimit(resource);
        let limit = Rlimit {
            current: Some(limit),
            maximum: old.maximum,
        };
        rustix::process::prlimit(pid, resource, limit).unwrap();
    }

    pub(crate) fn open_descriptors(&self) -> u64 {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        open.unwrap().count() as u64
    }

    /// Its exit code, once it has ended.
    pub(crate) fn end(&mut self) -> i32 {
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

pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) stdin: ChildStdin,
    pub(crate) stdout: BufReader<ChildStdout>,
}

impl Vmm {
    pub(crate) fn start(socket: &Path, pages: usize) -> Self {
        Self::start_with(socket, pages, PAGE)
    }

    /// With memory of huge pages, if the host has some left.
    pub(crate) fn start_huge(socket: &Path) -> Option<Self> {
        let mut vmm = Self::start_with(socket, PAGES, HUGE_PAGE);
        (vmm.answer() == "memory").then_some(vmm)
    }

    pub(crate) fn start_with(socket: &Path, pages: usize, page_size: usize) -> Self {
        Self::start_saying(socket, pages, page_size, page_size)
    }

    /// Its message says another size of pages than its memory has.
    pub(crate) fn start_saying(socket: &Path, pages: usize, page_size: usize, said: usize) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "peers::vmm_role",
                "--nocapture",
                "--test-threads=1",
            ])
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
    pub(crate) fn send(&mut self, command: &str) {
        if let Err(error) = writeln!(self.stdin, "{command}") {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        }
    }

    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    pub(crate) fn answer(&mut self) -> String {
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

    pub(crate) fn is_killed(&mut self) -> bool {
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
pub(crate) fn send(stream: &UnixStream, message: &str, fds: &[BorrowedFd<'_>]) {
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
