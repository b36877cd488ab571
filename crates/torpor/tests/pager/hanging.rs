//! Servers within this process, whose storage hangs.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use tempfile::TempDir;
use torpor_pager::server::{Server, ServerConfig, ServerReport, StopHandle};
use torpor_pager::{PageSource, SourceKind, SourceRun};

use crate::peers::{PAGE, PAGES, Vmm, until};

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
