//! The whole pipeline with real guests under a real Firecracker: boot, pause, resume, generations,
//! clones, failures, and every build compared byte by byte with the guest that it was made of.
//!
//! Needs a Firecracker (`TORPOR_FIRECRACKER`) and KVM: `make test-firecracker` gives both, on a host
//! without KVM by emulating one. Without them nothing is run here, which each test says. What is
//! printed are figures of one run: ratios between its arms mean something, its times do not.

#![allow(missing_docs, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a helper that fails ends the test, and figures are shown"
)]

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{
    Cleanup, assert_gone, at_step, kernel_is_content, kill_for_good, line, lost, pause_request, sh,
    upload, wait_until, workload,
};
use torpor_build::{BuildId, Digest, Entry, ImageReader, Name, PAGE_SIZE, ValidateOptions};
use torpor_guest::{Command, Selector};
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::DEFAULT_KERNEL;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::inspect::{look_into_build, look_into_sandbox};
use torpor_sandbox::pause::report::{PauseReport, PauseStep};
use torpor_sandbox::pause::{Paused, checkpoint, pause};
use torpor_sandbox::progress::Progress;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::vmm::{VmmKind, VmmOptions};
use torpor_vmm::{DrainOutcome, GuestReader};
use torpor_workload::{CHECK_COMMAND, Check, Ready};

/// The template that most tests stand on. It has a network.
const TEMPLATE: &str = "fc";
const GUEST_MEMORY_BYTES: u64 = 256 << 20;
const GUEST_DISK_BYTES: u64 = 256 << 20;
const CLONES_MAX: usize = 10;
const CLONES_PER_PROCESSOR: usize = 5;
const GREETING: &str = "hello";
const PROGRAM: &str = "/root/torpor-workload";
const TAG: &str = "workload";
/// Emulated in an emulation, a guest is slow: a limit that says *never*, not *slow*.
const PATIENCE: Duration = Duration::from_secs(240);
/// What the workload of the arms uses and frees.
const FREED_MIB: u64 = 16;
/// What a guest makes anew before each checkpoint, …
const FRESH_BYTES: u64 = 4 << 20;
/// … and what it writes besides, left alone.
const IDLE_BYTES_MAX: u64 = 8 << 20;
/// A drain that has all the time.
const DRAIN_MS: u64 = 120_000;
const FLAGS: &str = r#"{ "templates": { "fc-reporting": { "free-page-reporting": true } } }"#;

/// What `make test-firecracker` lends; kept for all the test programs of a run.
fn storage_dir() -> PathBuf {
    std::env::var_os("TORPOR_TEST_STORAGE").map_or_else(
        || std::env::temp_dir().join("torpor-firecracker"),
        PathBuf::from,
    )
}

async fn host() -> Option<Host> {
    let Some(path) = std::env::var_os("TORPOR_FIRECRACKER") else {
        println!("not run: TORPOR_FIRECRACKER names no Firecracker (make test-firecracker)");
        return None;
    };
    std::fs::create_dir_all(storage_dir()).unwrap();
    let flags = storage_dir().with_extension("flags.json");
    std::fs::write(&flags, FLAGS).unwrap();
    let options = HostOptions {
        storage: storage_dir(),
        vmm: VmmOptions {
            kind: Some(VmmKind::Firecracker),
            firecracker: Some(path.into()),
            ..VmmOptions::default()
        },
        flags: Some(flags),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    Some(Host::open(options).await.unwrap())
}

async fn boot_guest(host: &Host, template: &str, kernel_args: &str) -> Sandbox {
    let began = Instant::now();
    let request = BootRequest {
        memory_bytes: GUEST_MEMORY_BYTES,
        disk_bytes: GUEST_DISK_BYTES,
        vcpus: 1,
        network: template == TEMPLATE,
        kernel: DEFAULT_KERNEL.to_owned(),
        kernel_args: kernel_args.to_owned(),
        rootfs: None,
        template: Some(template.parse().unwrap()),
        progress: Progress::silent(),
    };
    let sandbox = boot(host, request).await.unwrap();
    println!("booted {template} in {:?}", began.elapsed());
    sandbox
}

/// A template, booted once for all tests (and by `torpor create-build` where its tests ran before).
async fn template(host: &Host) -> BuildId {
    let name: Name = TEMPLATE.parse().unwrap();
    if let Ok(id) = host.storage().resolve(name.as_str()) {
        return id;
    }
    let sandbox = boot_guest(host, name.as_str(), "").await;
    let paused = paused_exactly(sandbox, host, PauseFlags::default()).await;
    let id = paused.build.id();
    host.storage().set_template(&name, &id).unwrap();
    id
}

async fn resume_guest(host: &Host, id: &BuildId) -> Sandbox {
    let resumed = resume(host, id, &ResumeOptions::default()).await;
    let (sandbox, report) = resumed.unwrap();
    println!(
        "resumed in {:.0} ms: VMM {:.0}, memory {:.0}, state {:.0}, answer {:.0}; {} faults, {} pages prefetched",
        report.total_ms,
        report.vmm_ms,
        report.memory_ms,
        report.load_ms,
        report.answer_ms,
        report.pages_faulted,
        report.pages_prefetched
    );
    assert_eq!(report.eager, None);
    sandbox
}

/// Memory, disk and page cache that the guest keeps, and memory that it used and freed. In a resumed
/// guest each page of it is a fault or two, and a fault takes milliseconds in the lab.
async fn work(sandbox: &Sandbox, freed_mib: u64) {
    upload(sandbox, &workload(), PROGRAM).await;
    let command = Command::new(PROGRAM)
        .arg("run")
        .arg("/root/work")
        .arg("4")
        .arg(freed_mib.to_string())
        .arg("4")
        .stdin()
        .tag(TAG);
    let mut process = sandbox.envd().start(&command, None).await.unwrap();
    let ready: Ready = line(&mut process, PATIENCE).await;
    assert_eq!(ready.freed_bytes, freed_mib << 20);
}

/// Greets whoever connects to the host.
struct Greeter {
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Greeter {
    async fn start() -> Self {
        // No packet is sent: it says by which of its addresses the host would send one.
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        probe.connect("192.0.2.1:9").unwrap();
        let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            use tokio::io::AsyncWriteExt as _;
            loop {
                let (mut guest, _) = listener.accept().await.unwrap();
                // A guest that has gone is no failure of the server.
                drop(guest.write_all(GREETING.as_bytes()).await);
            }
        });
        Self {
            address: (probe.local_addr().unwrap().ip(), port).into(),
            server,
        }
    }

    /// What a guest's shell asks it by.
    fn ask(&self) -> String {
        self.ask_at(&self.address.ip().to_string())
    }

    fn ask_at(&self, host: &str) -> String {
        let port = self.address.port();
        format!("bash -c 'exec 3<>/dev/tcp/{host}/{port} && cat <&3' 2>/dev/null")
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn check(sandbox: &Sandbox) -> Check {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = sandbox.envd().connect(&selector).await.unwrap();
    let ask = format!("{CHECK_COMMAND}\n");
    let envd = sandbox.envd();
    envd.send_input(&selector, ask.as_bytes()).await.unwrap();
    line(&mut process, PATIENCE).await
}

/// The guest is as it was, and goes on.
async fn verify(sandbox: &Sandbox, before: &Check) -> Check {
    sh(sandbox, "sync; echo 1 > /proc/sys/vm/drop_caches").await;
    let now = check(sandbox).await;
    assert!(
        now.memory_intact && now.disk_file_intact && now.shm_file_intact,
        "{now:?}"
    );
    assert!(now.counter > before.counter, "{before:?} {now:?}");
    assert_ne!(now.random, before.random);
    now
}

/// The digest of each page that the host holds.
fn held_pages(reader: &GuestReader) -> BTreeMap<u64, Digest> {
    let mut pages = BTreeMap::new();
    let mut bytes = vec![0; PAGE_SIZE];
    let page = PAGE_SIZE as u64;
    for Range { start, end } in reader.present().unwrap() {
        for number in start / page..end / page {
            reader.read_exact_at(&mut bytes, number * page).unwrap();
            pages.insert(number, Digest::of(&bytes));
        }
    }
    pages
}

/// What the host holds of a guest at the moment of its capture, and who looks.
fn seen_at_capture(sandbox: &Sandbox) -> (Arc<Mutex<BTreeMap<u64, Digest>>>, Progress) {
    let reader = sandbox.vmm().memory().unwrap().reader().unwrap();
    let seen: Arc<Mutex<BTreeMap<u64, Digest>>> = Arc::default();
    let progress = at_step(PauseStep::CaptureMemory, {
        let seen = Arc::clone(&seen);
        move || *seen.lock().unwrap() = held_pages(&reader)
    });
    (seen, progress)
}

/// Pauses, and compares the build with what the guest had when it stood still: every page that the
/// host held and that the guest still uses, byte for byte.
async fn paused_exactly(sandbox: Sandbox, host: &Host, flags: PauseFlags) -> Paused {
    let (seen, progress) = seen_at_capture(&sandbox);
    let began = Instant::now();
    let paused = Box::pin(pause(sandbox, host, pause_request(flags, progress))).await;
    let paused = paused.unwrap();
    println!("paused and compared in {:?}", began.elapsed());
    compare(&paused.build.memory().unwrap(), &seen.lock().unwrap());
    show(&paused.report);
    paused
}

fn compare(image: &ImageReader, seen: &BTreeMap<u64, Digest>) {
    assert!(
        seen.len() > 1000,
        "nothing is proven by {} pages",
        seen.len()
    );
    let mut bytes = vec![0; PAGE_SIZE];
    let mut compared = 0;
    for (page, digest) in seen {
        let run = image.index().run_at(*page).unwrap();
        // Nobody's: by the guest's own metadata.
        if run.what == Entry::Free {
            continue;
        }
        image.read_pages(*page, &mut bytes).unwrap();
        assert_eq!(Digest::of(&bytes), *digest, "page {page}: {:?}", run.what);
        compared += 1;
    }
    println!(
        "{compared} pages of the build are those of the guest, of {} held",
        seen.len()
    );
}

fn show(report: &PauseReport) {
    let memory = &report.memory;
    println!(
        "stored {} KiB of memory (free {} pages, removed {}, zero {}, parent's {}, base image's {}); frozen {:.0} ms; scan: {:?}",
        memory.raw_bytes >> 10,
        memory.pages.free,
        memory.pages.removed,
        memory.pages.zero,
        memory.pages.layer,
        memory.pages.base_image,
        report.freeze_ms,
        report.scan.as_ref().map(|scan| scan.why_not()),
    );
    if let Some(drain) = &report.drain {
        println!(
            "drain: {} after {} ms, {} KiB released, {:?} REMOVE events, {:?} bytes discarded",
            drain.outcome,
            drain.ms,
            drain.released_bytes >> 10,
            report.drain_removes,
            drain.discarded_bytes
        );
    }
}

fn plain() -> PauseFlags {
    PauseFlags {
        free_page_scan: false,
        disk_references: false,
        ..PauseFlags::default()
    }
}

/// Hints come in blocks of 4 MiB: memory is compacted first.
fn drained(flags: PauseFlags) -> PauseFlags {
    PauseFlags {
        reclaim: true,
        drain_ceiling_ms: DRAIN_MS,
        ..flags
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_to_pause_makes_a_build_of_the_guest_as_it_was() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let arms = [
        ("plain", plain()),
        ("drain", drained(plain())),
        (
            "scan",
            PauseFlags {
                disk_references: false,
                ..PauseFlags::default()
            },
        ),
        ("scan and references", PauseFlags::default()),
    ];
    let mut stored = BTreeMap::new();
    for (name, flags) in arms {
        println!("arm {name}");
        let sandbox = resume_guest(&host, &template).await;
        work(&sandbox, FREED_MIB).await;
        let before = check(&sandbox).await;
        let paused = paused_exactly(sandbox, &host, flags).await;
        cleanup.1.push(paused.build.id());
        assert!(paused.build.validate(ValidateOptions::default()).is_whole());
        stored.insert(name, paused.report.memory.raw_bytes);
        if flags.drain_ceiling_ms > 0 {
            let drain = paused.report.drain.as_ref().unwrap();
            assert_eq!(drain.outcome, DrainOutcome::Done);
            assert!(paused.report.drain_removes.unwrap() > 0);
            assert!(paused.report.memory.pages.removed > 0);
        }
        if flags.free_page_scan {
            assert_eq!(paused.report.scan.as_ref().unwrap().why_not(), None);
        }
        let sandbox = resume_guest(&host, &paused.build.id()).await;
        verify(&sandbox, &before).await;
        kernel_is_content(&sandbox, name).await;
        sandbox.end().await;
    }
    for (name, bytes) in &stored {
        println!(
            "FIGURE stored, {name}: {:.2} of plain",
            *bytes as f64 / stored["plain"] as f64
        );
    }
    // What the host gets of the freed memory is a matter of blocks; the scan finds all of it.
    let freed = FREED_MIB << 20;
    assert!(stored["drain"] + freed / 4 < stored["plain"], "{stored:?}");
    assert!(stored["scan"] + freed / 2 < stored["plain"], "{stored:?}");
    assert!(
        stored["scan and references"] <= stored["scan"],
        "{stored:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_disk_survive_three_generations_and_a_drain_that_is_cut_short() {
    let Some(host) = host().await else { return };
    let mut last = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let mut before = None;
    // No drain, one that ends by itself, one that has no time at all.
    for (generation, drain_ceiling_ms) in [0, DRAIN_MS, 1].into_iter().enumerate() {
        println!("generation {generation}");
        let sandbox = resume_guest(&host, &last).await;
        match &before {
            None => work(&sandbox, 2).await,
            Some(before) => drop(verify(&sandbox, before).await),
        }
        // Other memory, another disk, and memory that is freed again.
        let line = format!(
            "echo {generation} >> /root/log; head -c 4000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x"
        );
        sh(&sandbox, &line).await;
        before = Some(check(&sandbox).await);
        let flags = PauseFlags {
            reclaim: true,
            drain_ceiling_ms,
            ..PauseFlags::default()
        };
        let paused = paused_exactly(sandbox, &host, flags).await;
        last = paused.build.id();
        cleanup.1.push(last);
        let outcome = paused.report.drain.map(|drain| drain.outcome);
        let expected: &[Option<DrainOutcome>] = match drain_ceiling_ms {
            0 => &[None],
            1 => &[Some(DrainOutcome::CeilingReached), Some(DrainOutcome::Done)],
            _ => &[Some(DrainOutcome::Done)],
        };
        assert!(expected.contains(&outcome), "{outcome:?}");
    }
    let sandbox = resume_guest(&host, &last).await;
    verify(&sandbox, &before.unwrap()).await;
    assert_eq!(sh(&sandbox, "cat /root/log").await, "0\n1\n2");
    kernel_is_content(&sandbox, "after three generations").await;

    // A look at it while it runs, and at the build that it came from.
    let (storage, name) = (host.storage().clone(), sandbox.name().clone());
    let running = tokio::task::spawn_blocking(move || look_into_sandbox(&storage, &name));
    let running = running.await.unwrap().unwrap();
    let stored = look_into_build(&host.storage().open_build(&last).unwrap()).unwrap();
    for look in [&running, &stored] {
        let pages: u64 = look.classes.iter().map(|class| class.pages).sum();
        assert_eq!(look.ram_bytes, GUEST_MEMORY_BYTES);
        assert_eq!(pages * PAGE_SIZE as u64, GUEST_MEMORY_BYTES);
    }
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_resumed_from_one_build_at_once_each_have_a_disk_of_their_own() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = resume_guest(&host, &template).await;
    sh(&sandbox, "head -c 1000000 /dev/urandom > /root/kept").await;
    let sum = sh(&sandbox, "sha256sum < /root/kept").await;
    let build = paused_exactly(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(build);

    let began = Instant::now();
    let processors = std::thread::available_parallelism().unwrap().get();
    let number = CLONES_MAX.min(CLONES_PER_PROCESSOR * processors);
    let mut resuming = tokio::task::JoinSet::new();
    for _ in 0..number {
        let host = host.clone();
        resuming.spawn(async move { resume_guest(&host, &build).await });
    }
    let clones = resuming.join_all().await;
    println!("{number} resumed at once in {:?}", began.elapsed());
    let greeter = Greeter::start().await;
    for clone in &clones {
        assert!(clone.spec().network);
        assert_eq!(sh(clone, &greeter.ask()).await, GREETING);
    }
    // The gateway is not the host's loopback.
    let refused = format!("{} || echo refused", greeter.ask_at("10.0.2.2"));
    assert_eq!(sh(&clones[0], &refused).await, "refused");
    let write = |(number, clone)| async move {
        sh(
            clone,
            &format!("echo {number} | tee /dev/shm/mine > /root/mine; sync"),
        )
        .await;
    };
    for clone in clones.iter().enumerate() {
        write(clone).await;
    }
    for (number, clone) in clones.iter().enumerate() {
        let said = sh(
            clone,
            "echo 3 > /proc/sys/vm/drop_caches; cat /dev/shm/mine /root/mine; sha256sum < /root/kept",
        );
        assert_eq!(said.await, format!("{number}\n{number}\n{sum}"));
    }
    let pids: Vec<u32> = clones.iter().map(|clone| clone.vmm().pid()).collect();
    drop(clones);
    pids.into_iter().for_each(assert_gone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_at_any_step_leaves_the_last_build_or_a_whole_new_one() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let before_the_copy = [
        PauseStep::Drain,
        PauseStep::SaveState,
        PauseStep::Settle,
        PauseStep::CaptureMemory,
    ];
    for step in before_the_copy {
        println!("killed at {step}");
        let sandbox = resume_guest(&host, &template).await;
        let pid = sandbox.vmm().pid();
        let run = host.storage().run_path(sandbox.name());
        let progress = at_step(step, move || kill_for_good(pid));
        let flags = PauseFlags {
            drain_ceiling_ms: 1000,
            ..PauseFlags::default()
        };
        let request = pause_request(flags, progress);
        let id = request.build;
        let told = lost(Box::pin(pause(sandbox, &host, request)).await);
        let last = format!("its last build {template} is intact");
        assert!(told.contains(&last), "{step}: {told}");
        assert_gone(pid);
        assert!(!run.exists(), "{step}");
        assert!(host.storage().open_build(&id).is_err(), "{step}");
    }
    println!("killed after the copy");
    let sandbox = resume_guest(&host, &template).await;
    sh(&sandbox, "echo last | tee /dev/shm/step > /root/step").await;
    let pid = sandbox.vmm().pid();
    let progress = at_step(PauseStep::WriteMemory, move || kill_for_good(pid));
    let request = pause_request(PauseFlags::default(), progress);
    let paused = Box::pin(pause(sandbox, &host, request)).await.unwrap();
    cleanup.1.push(paused.build.id());
    assert!(paused.build.validate(ValidateOptions::default()).is_whole());
    let sandbox = resume_guest(&host, &paused.build.id()).await;
    assert_eq!(
        sh(&sandbox, "cat /dev/shm/step /root/step").await,
        "last\nlast"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reports_its_free_pages_is_stored_as_exactly_as_one_that_does_not() {
    let Some(host) = host().await else { return };
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = boot_guest(&host, "fc-reporting", "").await;
    let balloon = sandbox.spec().balloon;
    assert!(balloon.reporting && balloon.hinting, "{balloon:?}");
    work(&sandbox, 64).await;
    let held = || sandbox.vmm().memory().unwrap().held_bytes().unwrap();
    let after_the_work = held();
    wait_until("the freed memory is reported", || {
        held() + (32 << 20) < after_the_work
    });
    println!(
        "reported: {} of {} MiB are still held",
        held() >> 20,
        after_the_work >> 20
    );
    let before = check(&sandbox).await;
    let paused = paused_exactly(sandbox, &host, plain()).await;
    cleanup.1.push(paused.build.id());
    let recorded = &paused.build.manifest().info;
    assert_eq!(recorded.balloon, balloon);
    assert_eq!(recorded.vmm.name, "firecracker");

    // It reports on, and the pager learns of it.
    let sandbox = resume_guest(&host, &paused.build.id()).await;
    let before = verify(&sandbox, &before).await;
    let line = "head -c 12000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x";
    sh(&sandbox, line).await;
    let removed = || sandbox.pager_stats().unwrap().pages_removed;
    wait_until("the freed memory is reported again", || removed() > 1500);
    let paused = paused_exactly(sandbox, &host, plain()).await;
    cleanup.1.push(paused.build.id());
    let sandbox = resume_guest(&host, &paused.build.id()).await;
    verify(&sandbox, &before).await;
    kernel_is_content(&sandbox, "reporting").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booted_guest_is_drained_with_and_without_zeroing_at_allocation() {
    let Some(host) = host().await else { return };
    let mut ms = Vec::new();
    for (number, args) in ["", "init_on_alloc=1"].into_iter().enumerate() {
        let sandbox = boot_guest(&host, &format!("fc-drain-{number}"), args).await;
        let line = "head -c 60000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x; \
                    echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory";
        sh(&sandbox, line).await;
        let ceiling = Duration::from_millis(DRAIN_MS);
        let drain = sandbox.vmm().drain(ceiling, None).await;
        println!(
            "FIGURE drain of a booted guest, {args:?}: {} after {} ms, {} MiB released, {} MiB held",
            drain.outcome,
            drain.ms,
            drain.released_bytes >> 20,
            drain.held_bytes >> 20
        );
        assert_eq!(drain.outcome, DrainOutcome::Done);
        ms.push(drain.ms.max(1));
        sh(&sandbox, "true").await;
        sandbox.end().await;
    }
    println!(
        "FIGURE drain with init_on_alloc=1: {:.1} times as long",
        ms[1] as f64 / ms[0] as f64
    );
}

/// Its memory is private to the VMM: what changed since a checkpoint is the host kernel's word.
#[tokio::test(flavor = "multi_thread")]
async fn one_firecracker_is_stored_again_and_again_while_it_goes_on() {
    let Some(host) = host().await else { return };
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let template = template(&host).await;
    let booted = boot_guest(&host, "fc-checkpoints", "").await;
    let resumed = resume_guest(&host, &template).await;
    for (name, mut sandbox) in [("booted", booted), ("resumed", resumed)] {
        let pid = sandbox.vmm().pid();
        let mut sums = Vec::new();
        for round in 0..3 {
            let fill = format!(
                "rm -f /dev/shm/{}; head -c {FRESH_BYTES} /dev/urandom > /dev/shm/{round}; \
                 sha256sum < /dev/shm/{round}",
                round - 2_i32
            );
            sums.push(sh(&sandbox, &fill).await);
            let (seen, progress) = seen_at_capture(&sandbox);
            let request = pause_request(PauseFlags::default(), progress);
            let stored = Box::pin(checkpoint(sandbox, &host, request)).await.unwrap();
            let parent = sums.len() > 1;
            cleanup.1.push(stored.build.id());
            println!("{name}, checkpoint {round}");
            show(&stored.report);
            compare(&stored.build.memory().unwrap(), &seen.lock().unwrap());
            assert!(stored.not_thawed.is_none());
            let bytes = stored.report.memory.raw_bytes;
            assert!(bytes >= FRESH_BYTES, "{bytes}");
            assert!(!parent || bytes < FRESH_BYTES + IDLE_BYTES_MAX, "{bytes}");
            sandbox = stored.sandbox;
            assert_eq!(sandbox.vmm().pid(), pid, "the same VM goes on");
        }
        sandbox.end().await;
        let last = cleanup.1.last().copied().unwrap();
        let sandbox = resume_guest(&host, &last).await;
        let left = sh(
            &sandbox,
            "cat /dev/shm/1 | sha256sum; sha256sum < /dev/shm/2; ls /dev/shm",
        )
        .await;
        assert_eq!(left, format!("{}\n{}\n1\n2", sums[1], sums[2]));
        kernel_is_content(&sandbox, name).await;
        sandbox.end().await;
    }
}
