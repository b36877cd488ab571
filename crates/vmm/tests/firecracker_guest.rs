//! What a real Linux guest lives through under a real Firecracker.
//!
//! Needs a Firecracker (`TORPOR_FIRECRACKER`) and KVM: `make test-firecracker` gives both, on a host
//! without KVM by emulating one. Without them nothing is run here, which each test says.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a helper that fails ends the test, what it measures is shown, pages fit a usize"
)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{GUEST_DEADLINE, Guest, Host};
use tempfile::TempDir;
use tokio::time::timeout;
use torpor_pager::{
    Backing, PageSource, Pager, PagerConfig, Region, SourceKind, SourceRun, Uffd, WriteTracking,
};
use torpor_vmm::firecracker::{self, FirecrackerBinary, Handshake, InstalledBalloon};
use torpor_vmm::{DrainOutcome, DrainReport, MachineConfig, Vmm, VmmError};

const PAGE: usize = 4096;

/// The binary to test, if there is one.
fn binary() -> Option<FirecrackerBinary> {
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

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// A host with a directory for its one machine.
struct Lab {
    host: Host,
    dir: TempDir,
    binary: FirecrackerBinary,
}

impl Lab {
    fn new(binary: FirecrackerBinary) -> Self {
        Self {
            host: Host::new(),
            dir: tempfile::tempdir().unwrap(),
            binary,
        }
    }

    fn machine(&self, reporting: bool) -> MachineConfig {
        MachineConfig {
            free_page_reporting: reporting,
            ..self.host.machine()
        }
    }

    /// Boots, and waits until the guest answers.
    async fn boot(&self, reporting: bool, more: &str) -> (Guest, InstalledBalloon) {
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

async fn drain(guest: &Guest, pager: Option<&Pager>, ceiling: Duration) -> DrainReport {
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
async fn reclaim(guest: &mut Guest) {
    assert_eq!(guest.ask("put /proc/sys/vm/drop_caches 3").await, "ok");
    assert_eq!(guest.ask("put /proc/sys/vm/compact_memory 1").await, "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_guest_has_its_drives_its_channel_and_its_random_numbers() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, balloon) = lab.boot(false, "").await;
    assert!(balloon.hinting && !balloon.reporting);
    assert_eq!(guest.ask("readonly /dev/vda").await, "1");
    assert_eq!(guest.ask("readonly /dev/vdb").await, "0");
    assert_eq!(guest.ask("write /dev/vdb 1048576 4096 7").await, "ok");
    assert_ne!(guest.ask("write /dev/vda 0 4096 7").await, "ok");
    let rng = guest
        .ask("read /sys/class/misc/hw_random/rng_available")
        .await;
    assert!(rng.contains("virtio_rng"), "{rng}");
    let cmdline = guest.ask("read /proc/cmdline").await;
    println!("{cmdline}");
    assert!(cmdline.contains("init_on_alloc=0"), "{cmdline}");

    let memory = guest.vm.memory().unwrap();
    let held = memory.held_bytes().unwrap();
    println!("held: {} MiB of {}", mib(held), mib(memory.len_bytes));
    assert!(held > 16 << 20 && held < memory.len_bytes);
    assert!(lab.host.console().contains("test guest is up"));

    // Pausing and resuming twice is no error, and a guest goes on after its state was taken.
    let error = guest.vm.save_state().await.unwrap_err();
    assert!(matches!(error, VmmError::WrongState { .. }), "{error}");
    for _ in 0..2 {
        guest.vm.stop_vcpus().await.unwrap();
        guest.vm.stop_vcpus().await.unwrap();
        let began = Instant::now();
        let state = guest.vm.save_state().await.unwrap();
        println!(
            "device state: {} bytes in {:?}",
            state.len(),
            began.elapsed()
        );
        assert!((4_000..1_000_000).contains(&state.len()));
        guest.vm.resume_vcpus().await.unwrap();
        guest.vm.resume_vcpus().await.unwrap();
        guest.count().await;
    }
    let exit = guest.vm.kill().await.unwrap();
    assert_eq!(exit.signal, Some(9));
    assert!(guest.vm.memory().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_gets_free_memory_back_ten_times_in_a_row() {
    let Some(binary) = binary() else { return };
    let lab = Lab::new(binary);
    let (mut guest, _) = lab.boot(false, "").await;
    let kept = guest.ask("keep 8").await;
    for round in 0..10 {
        guest.ask("churn 64").await;
        reclaim(&mut guest).await;
        let report = drain(&guest, None, Duration::from_secs(60)).await;
        assert_eq!(report.outcome, DrainOutcome::Done, "round {round}");
        assert!(
            report.released_bytes >= 32 << 20,
            "round {round}: {report:?}"
        );
    }
    assert_eq!(guest.ask("kept").await, kept);

    // No time at all: stopped, and the next one works all the same.
    let report = drain(&guest, None, Duration::from_millis(1)).await;
    let timed_out = [DrainOutcome::CeilingReached, DrainOutcome::Done];
    assert!(timed_out.contains(&report.outcome), "{report:?}");
    guest.ask("churn 64").await;
    let report = drain(&guest, None, Duration::from_secs(60)).await;
    assert_eq!(report.outcome, DrainOutcome::Done);
    assert_eq!(guest.ask("kept").await, kept);
}

/// A guest's memory between two machines: what is `None` is zero and stores nothing.
#[derive(Debug, Clone)]
struct Image(Vec<Option<Box<[u8]>>>);

impl Image {
    fn stored_mib(&self) -> usize {
        (self.0.iter().flatten().count() * PAGE) >> 20
    }
}

struct Source(Arc<Image>);

impl PageSource for Source {
    fn run_at(&self, page: u64) -> SourceRun {
        let stored = self.0.0.get(page as usize).is_some_and(Option::is_some);
        let kind = if stored {
            SourceKind::Data
        } else {
            SourceKind::Zero
        };
        SourceRun { pages: 1, kind }
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
fn serve(handshake: Handshake, pid: u32, image: Arc<Image>) -> Pager {
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
fn capture(vm: &dyn Vmm, served: Option<(&Pager, &Image)>) -> Image {
    let began = Instant::now();
    let memory = vm.memory().unwrap();
    let reader = memory.reader().unwrap();
    let (mut image, take) = match served {
        None => {
            let pages = memory.len_bytes as usize / PAGE;
            let present = reader.present().unwrap();
            let take: Vec<usize> = present
                .iter()
                .flat_map(|run| run.start as usize / PAGE..run.end as usize / PAGE)
                .collect();
            (Image(vec![None; pages]), take)
        }
        Some((pager, parent)) => {
            pager.settle(Duration::from_secs(60)).unwrap();
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
    let mut bytes = vec![0; PAGE];
    for page in take {
        reader
            .read_exact_at(&mut bytes, (page * PAGE) as u64)
            .unwrap();
        let zero = bytes.iter().all(|byte| *byte == 0);
        image.0[page] = (!zero).then(|| bytes.clone().into());
    }
    println!(
        "captured: {taken} pages read in {:?}, the image stores {} MiB",
        began.elapsed(),
        image.stored_mib()
    );
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_resumed_three_generations_deep_with_its_memory_as_it_was() {
    let Some(binary) = binary() else { return };
    let mut lab = Lab::new(binary.clone());
    let (mut guest, _) = lab.boot(false, "").await;
    let mut kept = guest.ask("keep 4").await;
    assert_eq!(guest.ask("write /dev/vdb 1048576 4096 0").await, "ok");
    guest.ask("churn 64").await;
    let mut pager: Option<(Pager, Arc<Image>)> = None;
    for generation in 1..=3_u8 {
        println!("generation {generation}");
        reclaim(&mut guest).await;
        let served = pager.as_ref().map(|(pager, _)| pager);
        let report = drain(&guest, served, Duration::from_secs(120)).await;
        assert_eq!(report.outcome, DrainOutcome::Done);
        assert!(report.released_bytes + report.discarded_bytes.unwrap_or(0) >= 32 << 20);

        guest.vm.stop_vcpus().await.unwrap();
        // The state first: taking it writes to guest memory.
        let state = guest.vm.save_state().await.unwrap();
        let served = pager.as_ref().map(|(pager, image)| (pager, &**image));
        let image = Arc::new(capture(&*guest.vm, served));
        guest.vm.kill().await.unwrap();
        drop(pager);

        let next = Lab::new(binary.clone());
        fs::copy(lab.host.path("layer.img"), next.host.path("layer.img")).unwrap();
        let began = Instant::now();
        let (log, machine) = (next.host.path("console.log"), next.machine(false));
        let incoming = firecracker::prepare_resume(&binary, &machine, next.dir.path(), &log);
        let mut incoming = incoming.await.unwrap();
        let started = began.elapsed();
        let handshake = incoming.hand_over(&state).await.unwrap();
        let handed_over = began.elapsed();
        let serving = serve(handshake, incoming.pid(), Arc::clone(&image));
        let vm = incoming.finish().await.unwrap();
        let loaded = began.elapsed();
        vm.resume_vcpus().await.unwrap();
        guest = Guest::new(vm);
        guest.count().await;
        println!(
            "resumed: started {started:?}, handed over {handed_over:?}, loaded {loaded:?}, \
             answered {:?} after {} faults",
            began.elapsed(),
            serving.stats().faults
        );
        assert_eq!(guest.ask("kept").await, kept, "generation {generation}");
        pager = Some((serving, image));
        lab = next;
        // The next generation differs: other memory, another disk.
        kept = guest.ask("keep 4").await;
        let write = format!("write /dev/vdb 1048576 4096 {generation}");
        assert_eq!(guest.ask(&write).await, "ok");
        let disk = fs::read(lab.host.path("layer.img")).unwrap();
        assert_eq!(disk[1 << 20], generation);
        guest.ask("churn 64").await;
    }
}
