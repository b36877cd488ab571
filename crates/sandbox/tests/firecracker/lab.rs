//! What the tests share: a host with a template, guests with work in them, and builds that are compared
//! with the guest that they were made of.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use torpor_build::{BuildId, Digest, Entry, ImageReader, Name, PAGE_SIZE};
use torpor_guest::{Command, Selector};
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::DEFAULT_KERNEL;
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::pause::report::{PauseReport, PauseStep};
use torpor_sandbox::pause::{Paused, pause};
use torpor_sandbox::progress::Progress;
use torpor_sandbox::resume::{ResumeOptions, resume};
use torpor_sandbox::vmm::{VmmBinary, VmmKind, VmmOptions};
use torpor_vmm::Version;
use torpor_vmm::firecracker::FirecrackerBinary;
use torpor_vmm::{DrainOutcome, GuestReader};
use torpor_workload::{CHECK_COMMAND, Check, Ready};

use crate::common::{PATIENCE, at_step, line, pause_request, sh, upload, workload};

/// The template that most tests stand on. It has a network.
pub(crate) const TEMPLATE: &str = "fc";
pub(crate) const GUEST_MEMORY_BYTES: u64 = 256 << 20;
pub(crate) const GUEST_DISK_BYTES: u64 = 256 << 20;
pub(crate) const PROGRAM: &str = "/root/torpor-workload";
pub(crate) const TAG: &str = "workload";
/// A drain that has all the time.
pub(crate) const DRAIN_MS: u64 = 120_000;
pub(crate) const FLAGS: &str =
    r#"{ "templates": { "fc-reporting": { "free-page-reporting": true } } }"#;

/// What `make test-firecracker` lends; kept for all the test programs of a run.
pub(crate) fn storage_dir() -> PathBuf {
    std::env::var_os("TORPOR_TEST_STORAGE").map_or_else(
        || std::env::temp_dir().join("torpor-firecracker"),
        PathBuf::from,
    )
}

pub(crate) async fn host() -> Option<Host> {
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
    let host = Host::open(options).await.unwrap();
    let VmmBinary::Firecracker(program) = host.vmm() else {
        panic!("{:?}", host.vmm());
    };
    let jailed = std::env::var_os("TORPOR_TEST_JAILED").is_some();
    assert_eq!(program.jailer().is_ok(), jailed, "{:?}", program.jailer());
    Some(host)
}

/// Whether a guest can be drained: a Firecracker before 1.14 knows no hinting, nor reporting. A test of
/// nothing else ends here then, and says so.
pub(crate) fn can_drain(sandbox: &Sandbox) -> bool {
    // By its number: what was installed is for the tests to find out.
    let path = std::env::var_os("TORPOR_FIRECRACKER").map(PathBuf::from);
    let binary = FirecrackerBinary::find(path.as_deref()).unwrap();
    let hinting = binary.version >= Version::new(1, 14, 0);
    assert_eq!(sandbox.spec().balloon.hinting, hinting);
    if !hinting {
        println!("no drain: this Firecracker has no hinting");
    }
    hinting
}

/// What a drain that has the time comes to.
pub(crate) fn drained_whole(sandbox: &Sandbox) -> DrainOutcome {
    if can_drain(sandbox) {
        DrainOutcome::Done
    } else {
        DrainOutcome::Unsupported
    }
}

pub(crate) async fn boot_guest(host: &Host, template: &str, memory_bytes: u64) -> Sandbox {
    let began = Instant::now();
    let request = BootRequest {
        memory_bytes,
        disk_bytes: GUEST_DISK_BYTES,
        vcpus: 1,
        network: template == TEMPLATE,
        kernel: DEFAULT_KERNEL.to_owned(),
        kernel_args: String::new(),
        rootfs: None,
        template: Some(template.parse().unwrap()),
        progress: Progress::silent(),
    };
    let sandbox = boot(host, request).await.unwrap();
    println!("booted {template} in {:?}", began.elapsed());
    sandbox
}

/// A template, booted once for all tests (and by `torpor create-build` where its tests ran before).
pub(crate) async fn template(host: &Host) -> BuildId {
    let name: Name = TEMPLATE.parse().unwrap();
    if let Ok(id) = host.storage().resolve(name.as_str()) {
        return id;
    }
    let sandbox = boot_guest(host, name.as_str(), GUEST_MEMORY_BYTES).await;
    let paused = paused_exactly(sandbox, host, PauseFlags::default()).await;
    let id = paused.build.id();
    host.storage().set_template(&name, &id).unwrap();
    id
}

pub(crate) async fn resume_guest(host: &Host, id: &BuildId) -> Sandbox {
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
pub(crate) async fn work(sandbox: &Sandbox, freed_mib: u64) {
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

pub(crate) async fn check(sandbox: &Sandbox) -> Check {
    let selector = Selector::Tag(TAG.to_owned());
    let mut process = sandbox.envd().connect(&selector).await.unwrap();
    let ask = format!("{CHECK_COMMAND}\n");
    let envd = sandbox.envd();
    envd.send_input(&selector, ask.as_bytes()).await.unwrap();
    line(&mut process, PATIENCE).await
}

/// The guest is as it was, and goes on.
pub(crate) async fn verify(sandbox: &Sandbox, before: &Check) -> Check {
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
pub(crate) fn held_pages(reader: &GuestReader) -> BTreeMap<u64, Digest> {
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
pub(crate) fn seen_at_capture(sandbox: &Sandbox) -> (Arc<Mutex<BTreeMap<u64, Digest>>>, Progress) {
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
pub(crate) async fn paused_exactly(sandbox: Sandbox, host: &Host, flags: PauseFlags) -> Paused {
    paused_and_seen(sandbox, host, flags).await.0
}

/// As [`paused_exactly`], with what the host held.
pub(crate) async fn paused_and_seen(
    sandbox: Sandbox,
    host: &Host,
    flags: PauseFlags,
) -> (Paused, BTreeMap<u64, Digest>) {
    let (seen, progress) = seen_at_capture(&sandbox);
    let began = Instant::now();
    let paused = Box::pin(pause(sandbox, host, pause_request(flags, progress))).await;
    let paused = paused.unwrap();
    println!("paused and compared in {:?}", began.elapsed());
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    compare(&paused.build.memory().unwrap(), &seen);
    show(&paused.report);
    (paused, seen)
}

pub(crate) fn compare(image: &ImageReader, seen: &BTreeMap<u64, Digest>) {
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

pub(crate) fn show(report: &PauseReport) {
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

pub(crate) fn plain() -> PauseFlags {
    PauseFlags {
        free_page_scan: false,
        disk_references: false,
        ..PauseFlags::default()
    }
}

/// Hints come in blocks of 4 MiB: memory is compacted first.
pub(crate) fn drained(flags: PauseFlags) -> PauseFlags {
    PauseFlags {
        reclaim: true,
        drain_ceiling_ms: DRAIN_MS,
        ..flags
    }
}
