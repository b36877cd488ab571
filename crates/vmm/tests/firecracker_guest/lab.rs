//! A host with one machine after the other, and what the tests do with them.

use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::timeout;
use torpor_pager::{
    Backing, PageSource, Pager, PagerConfig, Region, SourceKind, SourceRun, Uffd, WriteTracking,
};
use torpor_vmm::firecracker::{
    self, FirecrackerBinary, Handshake, IncomingFirecracker, InstalledBalloon,
};
use torpor_vmm::{DrainOutcome, DrainReport, GuestReader, MachineConfig, Version, Vmm};

use crate::support::{GUEST_DEADLINE, Guest, Host};

pub(crate) const PAGE: usize = 4096;
/// How long a pager may take to come to rest.
pub(crate) const SETTLE_DEADLINE: Duration = Duration::from_secs(60);
/// The longest run that a test's source tells of.
const RUN_PAGES_MAX: u64 = 64;

/// The binary to test, if there is one.
pub(crate) fn binary() -> Option<FirecrackerBinary> {
    let Some(path) = std::env::var_os("TORPOR_FIRECRACKER") else {
        println!("not run: TORPOR_FIRECRACKER names no Firecracker (make test-firecracker)");
        return None;
    };
    assert!(
        fs::exists("/dev/kvm").unwrap(),
        "TORPOR_FIRECRACKER is set, and there is no /dev/kvm: use make test-firecracker"
    );
    Some(FirecrackerBinary::find(Some(&PathBuf::from(path))).unwrap())
}

/// Whether this Firecracker can be drained: those before 1.14 know no hinting. A test of nothing else
/// ends here then, and says so.
pub(crate) fn can_drain(binary: &FirecrackerBinary) -> bool {
    // By its number: what was installed is for the tests to find out.
    let hinting = binary.version >= Version::new(1, 14, 0);
    if !hinting {
        println!("no drain: Firecracker {} has no hinting", binary.version);
    }
    hinting
}

/// What a drain that has the time comes to.
pub(crate) fn drained(binary: &FirecrackerBinary) -> DrainOutcome {
    if can_drain(binary) {
        DrainOutcome::Done
    } else {
        DrainOutcome::Unsupported
    }
}

pub(crate) fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// A host with a directory for its one machine.
pub(crate) struct Lab {
    pub(crate) host: Host,
    pub(crate) dir: TempDir,
    pub(crate) binary: FirecrackerBinary,
}

impl Lab {
    pub(crate) fn new(binary: FirecrackerBinary) -> Self {
        Self {
            host: Host::new(),
            dir: tempfile::tempdir().unwrap(),
            binary,
        }
    }

    pub(crate) fn machine(&self, reporting: bool) -> MachineConfig {
        MachineConfig {
            free_page_reporting: reporting,
            ..self.host.machine()
        }
    }

    /// Boots, and waits until the guest answers.
    pub(crate) async fn boot(&self, reporting: bool, more: &str) -> (Guest, InstalledBalloon) {
        let mut source = self.host.boot_source();
        more.clone_into(&mut source.extra_cmdline);
        let log = self.host.path("console.log");
        let machine = self.machine(reporting);
        let began = Instant::now();
        let booted = firecracker::boot(&self.binary, &machine, &source, self.dir.path(), &log);
        let (vm, balloon) = booted.await.unwrap();
        let started = began.elapsed();
        let mut guest = Guest::new(vm);
        let answered = timeout(GUEST_DEADLINE, guest.ask("count")).await;
        if !matches!(&answered, Ok(answer) if !answer.is_empty()) {
            let alive = guest.vm.is_alive();
            panic!("alive: {alive}; the console:\n{}", self.host.console());
        }
        println!(
            "booted: started {started:?}, answered {:?}",
            began.elapsed()
        );
        (guest, balloon)
    }
}

impl Lab {
    /// Resumes a guest on a host of its own, with this host's disk, until it answers.
    pub(crate) async fn resume(&self, state: &[u8], image: &Arc<Image>) -> (Self, Guest, Pager) {
        let next = Self::new(self.binary.clone());
        let disk = next.host.path("layer.img");
        fs::copy(self.host.path("layer.img"), disk).unwrap();
        let began = Instant::now();
        let mut incoming = next.incoming().await;
        let started = began.elapsed();
        let handshake = incoming.hand_over(state).await.unwrap();
        let handed_over = began.elapsed();
        let pager = serve(handshake, incoming.pid(), Arc::clone(image));
        let vm = incoming.finish().await.unwrap();
        let loaded = began.elapsed();
        vm.resume_vcpus().await.unwrap();
        let mut guest = Guest::new(vm);
        guest.count().await;
        println!(
            "resumed: started {started:?}, handed over {handed_over:?}, loaded {loaded:?}, \
             answered {:?} after {} faults",
            began.elapsed(),
            pager.stats().faults
        );
        (next, guest, pager)
    }

    /// A Firecracker that waits for a state.
    pub(crate) async fn incoming(&self) -> IncomingFirecracker {
        let (log, machine) = (self.host.path("console.log"), self.machine(false));
        let incoming = firecracker::prepare_resume(&self.binary, &machine, self.dir.path(), &log);
        incoming.await.unwrap()
    }
}

pub(crate) async fn drain(guest: &Guest, pager: Option<&Pager>, ceiling: Duration) -> DrainReport {
    let removes_before = pager.map_or(0, |pager| pager.stats().removes);
    let report = match pager {
        Some(pager) => {
            let discarded = || pager.stats().pages_removed * PAGE as u64;
            guest.vm.drain(ceiling, Some(&discarded)).await
        }
        None => guest.vm.drain(ceiling, None).await,
    };
    if let Some(pager) = pager {
        let removes = pager.stats().removes - removes_before;
        println!("{removes} REMOVE events");
    }
    println!(
        "drain: {:?} after {} ms, {} MiB released, {} MiB held",
        report.outcome,
        report.ms,
        mib(report.released_bytes),
        mib(report.held_bytes)
    );
    report
}

/// The guest gives up what it can, in large pieces.
pub(crate) async fn reclaim(guest: &mut Guest) {
    assert_eq!(guest.ask("put /proc/sys/vm/drop_caches 3").await, "ok");
    assert_eq!(guest.ask("put /proc/sys/vm/compact_memory 1").await, "ok");
}

/// A guest's memory between two machines: what is `None` is zero and stores nothing.
#[derive(Debug, Clone)]
pub(crate) struct Image(pub(crate) Vec<Option<Box<[u8]>>>);

/// The pages of stretches of guest memory.
pub(crate) fn pages_of(runs: &[Range<u64>]) -> Vec<usize> {
    runs.iter()
        .flat_map(|run| run.start as usize / PAGE..run.end as usize / PAGE)
        .collect()
}

impl Image {
    /// Takes these pages as they are now.
    pub(crate) fn take(&mut self, reader: &GuestReader, pages: impl IntoIterator<Item = usize>) {
        let mut bytes = vec![0; PAGE];
        for page in pages {
            let at = (page * PAGE) as u64;
            reader.read_exact_at(&mut bytes, at).unwrap();
            let zero = bytes.iter().all(|byte| *byte == 0);
            self.0[page] = (!zero).then(|| bytes.clone().into());
        }
    }

    /// These pages are zero now.
    pub(crate) fn forget(&mut self, pages: impl IntoIterator<Item = usize>) {
        for page in pages {
            self.0[page] = None;
        }
    }

    pub(crate) fn stored_mib(&self) -> usize {
        (self.0.iter().flatten().count() * PAGE) >> 20
    }
}

pub(crate) struct Source(pub(crate) Arc<Image>);

impl PageSource for Source {
    fn run_at(&self, page: u64) -> SourceRun {
        let kind_of = |page: u64| match self.0.0.get(page as usize) {
            Some(Some(_)) => SourceKind::Data,
            _ => SourceKind::Zero,
        };
        let kind = kind_of(page);
        let alike = (page + 1..page + RUN_PAGES_MAX).take_while(|page| kind_of(*page) == kind);
        SourceRun {
            pages: 1 + alike.count() as u64,
            kind,
        }
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for (into, page) in buf.chunks_mut(PAGE).zip(first_page as usize..) {
            match &self.0.0[page] {
                Some(bytes) => into.copy_from_slice(bytes),
                None => into.fill(0),
            }
        }
        Ok(())
    }
}

/// Serves a resuming Firecracker's page faults, and tracks what its guest writes.
pub(crate) fn serve(handshake: Handshake, pid: u32, image: Arc<Image>) -> Pager {
    let uffd = Uffd::from_fd(handshake.userfaultfd).unwrap();
    let regions: Vec<Region> = handshake
        .mappings
        .iter()
        .map(|mapping| Region {
            host_addr: mapping.host_addr,
            len_bytes: mapping.len_bytes,
            guest_offset_bytes: mapping.guest_offset_bytes,
            page_size: 4096,
        })
        .collect();
    for region in &regions {
        uffd.register(region, WriteTracking::Sync).unwrap();
    }
    let mut config = PagerConfig::new(uffd, regions, Arc::new(Source(image)), Backing::Anonymous);
    config.tracking = WriteTracking::Sync;
    config.pagemap_pid = i32::try_from(pid).ok();
    Pager::start(config).unwrap()
}

/// What a stopped machine holds, taken whole (booted) or as what changed since the parent.
pub(crate) fn capture(vm: &dyn Vmm, served: Option<(&Pager, &Image)>) -> Image {
    let began = Instant::now();
    let memory = vm.memory().unwrap();
    let reader = memory.reader().unwrap();
    let (mut image, take) = match served {
        None => {
            let image = Image(vec![None; memory.len_bytes as usize / PAGE]);
            (image, pages_of(&reader.present().unwrap()))
        }
        Some((pager, parent)) => {
            pager.settle(SETTLE_DEADLINE).unwrap();
            let dirty = pager.dirty().unwrap();
            let pages = |set: &torpor_pager::PageSet| -> Vec<usize> {
                set.runs()
                    .flat_map(|run| run.first_page as usize..run.end_page() as usize)
                    .collect()
            };
            let mut image = parent.clone();
            for page in pages(&dirty.removed) {
                image.0[page] = None;
            }
            (image, pages(&dirty.written))
        }
    };
    let taken = take.len();
    image.take(&reader, take);
    println!(
        "captured: {taken} pages read in {:?}, the image stores {} MiB",
        began.elapsed(),
        image.stored_mib()
    );
    image
}
