//! Resumes a build: a VMM with empty memory, device state loaded, pages served on demand.
//!
//! ```text
//! open the build ─▶ VMM waits ─▶ memory ready ─▶ disk ready ─▶ device state, vCPUs ─▶ first answer
//!              │    (incoming)    (pager serves,    ▲
//!              │                   working set      │
//!              │                   on its way)      │
//!              └──────── disk file is written ──────┘
//! ```
//!
//! Invariants:
//! - A build is opened, and so cannot be deleted, for as long as a sandbox resumed from it lives.
//! - Another VMM, version or accelerator than the one that made the build is refused before
//!   anything is started.
//! - Any number of sandboxes may be resumed from one build at once: each has a run directory, a
//!   disk and a memory of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use torpor_build::{BaseImage, Build, BuildId, Manifest, Name, PageRun, RunDir};
use torpor_pager::{Backing, Pager, PagerConfig, Region, Uffd, WriteTracking};
use torpor_vmm::qemu::{self, IncomingVm};
use torpor_vmm::{Accel, GuestMemory, InjectError, Vmm, VmmError, host_tsc_khz};

use crate::disk;
use crate::error::StartError;
use crate::fill::{FillError, ImageSource, fill};
use crate::host::Host;
use crate::progress::Progress;
use crate::sandbox::{
    CONSOLE_FILE, DISK_FILE, Memory, Parent, Parts, Sandbox, Starting, new_name, pager_run,
};
use crate::spec::{GuestSpec, identity_of};

/// Two measurements of one host's clock rate differ by well under a hundredth.
const CLOCK_RATE_TOLERANCE_DIVISOR: u64 = 100;

/// Guest memory is registered in base pages on every host that torpor runs on.
const GUEST_PAGE_BYTES: u32 = 4096;
/// Longest wait for a resumed guest's agent. It takes a tenth of a second; a busy machine and a
/// cold disk make it longer.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How to resume.
#[derive(Debug, Clone, Default)]
pub struct ResumeOptions {
    /// Leave the recorded working set to its faults.
    pub no_prefetch: bool,
    /// Fill all memory before the guest starts.
    pub eager: bool,
    /// Who watches.
    pub progress: Progress,
}

/// How a resume went. Times in milliseconds; the steps add up to the total.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResumeReport {
    /// Opening the build: manifest and indexes verified.
    pub open_ms: f64,
    /// Starting the VMM until it waits for the guest.
    pub vmm_ms: f64,
    /// Making the memory ready: userfaultfd and pager, or filling it.
    pub memory_ms: f64,
    /// Waiting for the sandbox's disk file, which is written from the start on.
    pub disk_ms: f64,
    /// Loading the device state and starting the vCPUs.
    pub load_ms: f64,
    /// From the vCPUs' start to the agent's first answer.
    pub answer_ms: f64,
    /// From the request to the first answer.
    pub total_ms: f64,
    /// Why the memory was filled eagerly, if it was.
    pub eager: Option<String>,
    /// Page faults until the first answer.
    pub pages_faulted: u64,
    /// Pages of the recorded working set brought in until the first answer.
    pub pages_prefetched: u64,
}

/// Resumes a build and waits until the agent answers.
///
/// # Errors
/// [`StartError`]; nothing is left behind.
pub async fn resume(
    host: &Host,
    id: &BuildId,
    options: &ResumeOptions,
) -> Result<(Sandbox, ResumeReport), StartError> {
    let started = Instant::now();
    let mut clock = Laps { last: started };
    let _step = options.progress.step("resume");
    let (parent, base_image, spec) = background({
        let (host, id) = (host.clone(), *id);
        move || open(&host, &id)
    })
    .await?;
    let (name, run_dir) = new_run_dir(host).await?;
    let open_ms = clock.lap();

    let disk_file = run_dir.path().join(DISK_FILE);
    disk::create(&parent.disk, &disk_file)?;
    // Written while the VMM starts: it opens the file, and reads it when the vCPUs run.
    let disk = tokio::spawn(background({
        let (image, path) = (Arc::clone(&parent.disk), disk_file.clone());
        move || Ok(disk::fill(&image, &path)?)
    }));
    let machine = spec.machine(host.storage(), disk_file, host_accel(&parent)?)?;
    let console = run_dir.path().join(CONSOLE_FILE);
    let prepared = async {
        let incoming = qemu::prepare_resume(host.qemu(), &machine, &console).await?;
        let vmm_ms = clock.lap();
        let guest_memory = incoming.memory()?;
        let made = make_memory(host, &parent, &incoming, &guest_memory, options).await?;
        Ok((incoming, guest_memory, made, vmm_ms, clock.lap()))
    };
    let prepared: Result<_, StartError> = prepared.await;
    // Awaited on every way out: it holds the build, and writes into the run directory.
    let filled = disk.await;
    let (incoming, guest_memory, (memory, eager), vmm_ms, memory_ms) = prepared?;
    filled.unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))?;
    let disk_ms = clock.lap();

    let state = parent.build.read_vmstate()?;
    // Loading touches guest memory: the devices' queues.
    let start = async {
        let vmm: Arc<dyn Vmm> = Arc::from(incoming.load(&state).await?);
        vmm.resume_vcpus().await?;
        Ok(vmm)
    };
    let vmm = memory.while_served(Some(*id), start).await?;
    let load_ms = clock.lap();
    let memory_file = File::from(guest_memory.into_memfd()?);
    // From here on the guest needs its pager, and the pager's failure must end the wait.
    let starting = Starting::new(Parts {
        vmm,
        memory,
        memory_file,
        base_image,
        parent: Some(parent),
        spec,
        name,
        run_dir,
    });
    let sandbox = starting.answered(ANSWER_MAX).await?;
    let answer_ms = clock.lap();
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    record_working_set(&sandbox).await;
    let stats = sandbox.pager_stats().unwrap_or_default();
    let report = ResumeReport {
        open_ms,
        vmm_ms,
        memory_ms,
        disk_ms,
        load_ms,
        answer_ms,
        total_ms,
        eager,
        pages_faulted: stats.faults,
        pages_prefetched: stats.pages_prefetched,
    };
    Ok((sandbox, report))
}

/// What a resume of this build will touch first: what an earlier one did, or, before there was
/// one, what the resume touched that led to the build (kernel and agent are the same).
fn working_set_of(build: &Build) -> Vec<PageRun> {
    build
        .recorded_working_set()
        .unwrap_or_else(|| build.manifest().info.working_set.clone())
}

/// Keeps what this resume touched for the next, if none did yet. It is a hint: not worth failing for.
async fn record_working_set(sandbox: &Sandbox) {
    let (Some(parent), Some(_)) = (sandbox.parent(), sandbox.pager_stats()) else {
        return;
    };
    let working_set = sandbox.working_set().to_vec();
    let recorded = background(move || match parent.build.recorded_working_set() {
        Some(_) => Ok(()),
        None => Ok(parent.build.record_working_set(&working_set)?),
    });
    if let Err(error) = recorded.await {
        tracing::debug!(%error, "the working set is not kept");
    }
}

async fn new_run_dir(host: &Host) -> Result<(Name, RunDir), StartError> {
    let (storage, name) = (host.storage().clone(), new_name()?);
    background(move || {
        let run_dir = storage.run_dir(&name)?;
        Ok((name, run_dir))
    })
    .await
}

/// Times that follow one another without a gap.
struct Laps {
    last: Instant,
}

impl Laps {
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let ms = (now - self.last).as_secs_f64() * 1e3;
        self.last = now;
        ms
    }
}

fn open(host: &Host, id: &BuildId) -> Result<(Parent, Arc<BaseImage>, GuestSpec), StartError> {
    let build = host.storage().open_build(id)?;
    let spec = GuestSpec::of(build.manifest())?;
    let recorded = identity_of(build.manifest())?;
    // What was made without KVM is resumed without it, on any host.
    let accel = match recorded.accel {
        Accel::Tcg => Accel::Tcg,
        Accel::Kvm => Accel::of_host(),
    };
    host.qemu()
        .identity(accel)
        .can_resume(&recorded)
        .map_err(|source| StartError::Identity { build: *id, source })?;
    if accel == Accel::Tcg {
        // Measuring takes a moment that nobody has to wait for.
        let manifest = build.manifest().clone();
        std::thread::spawn(move || warn_of_another_clock(&manifest));
    }
    let (memory, disk) = (Arc::new(build.memory()?), Arc::new(build.disk()?));
    let base_image = host.storage().base_image(&spec.base_image)?;
    let parent = Parent {
        build,
        memory,
        disk,
    };
    Ok((parent, base_image, spec))
}

/// An emulated guest counts time in ticks of the host that booted it. On a host of another rate its
/// clocks run too fast or too slow between two settings; it works, so it is not refused.
fn warn_of_another_clock(manifest: &Manifest) {
    let recorded = manifest
        .info
        .cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("tsc_early_khz=")?.parse::<u64>().ok());
    let here = host_tsc_khz();
    if let Some(recorded) = recorded
        && recorded.abs_diff(here) > recorded / CLOCK_RATE_TOLERANCE_DIVISOR
    {
        tracing::warn!(
            build = %manifest.id, recorded_khz = recorded, here_khz = here,
            "the build was made on a host with another clock rate: its clocks will drift; build the template again here"
        );
    }
}

fn host_accel(parent: &Parent) -> Result<Accel, StartError> {
    Ok(identity_of(parent.build.manifest())?.accel)
}

/// Makes the memory ready: served on demand, or filled where that cannot be had.
async fn make_memory(
    host: &Host,
    parent: &Parent,
    incoming: &IncomingVm,
    guest_memory: &GuestMemory,
    options: &ResumeOptions,
) -> Result<(Memory, Option<String>), StartError> {
    let why_eager = match lazy_tracking(host, options) {
        Err(why) => why,
        Ok(tracking) => match incoming.userfaultfd().await {
            Ok(fd) => {
                let uffd = Uffd::from_fd(fd)?;
                let pager = start_pager(parent, guest_memory, uffd, tracking, options)?;
                return Ok((Memory::Lazy(Arc::new(pager)), None));
            }
            // The VMM is not to be relied on after these; after a refusal it is as it was.
            Err(error) if !refused(&error) => return Err(error.into()),
            Err(error) => error.to_string(),
        },
    };
    tracing::info!(why = %why_eager, "the guest's memory is filled before it starts");
    let image = Arc::clone(&parent.memory);
    let memory = memfd_of(guest_memory)?;
    background(move || Ok(fill(&image, &File::from(memory))?)).await?;
    Ok((Memory::Eager, Some(why_eager)))
}

/// Another descriptor of a memory that the VMM shares with us.
fn memfd_of(guest_memory: &GuestMemory) -> Result<OwnedFd, StartError> {
    let memfd = guest_memory.memfd.as_ref();
    let copy = memfd.map_or_else(
        || Err(std::io::ErrorKind::Unsupported.into()),
        OwnedFd::try_clone,
    );
    Ok(copy.map_err(FillError::Memory)?)
}

/// How writes will be tracked under lazy memory, or why there is to be none. Decided before the VMM
/// is touched: once its memory is registered there is no way back to filling it.
fn lazy_tracking(host: &Host, options: &ResumeOptions) -> Result<WriteTracking, String> {
    if options.eager {
        return Err("asked for".to_owned());
    }
    match host.tracking() {
        Ok(WriteTracking::Off) => {
            Err("this host's userfaultfd cannot write-protect shared memory".to_owned())
        }
        Ok(tracking) => Ok(tracking),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the VMM is as it was, only without a userfaultfd.
fn refused(error: &VmmError) -> bool {
    match error {
        VmmError::Userfaultfd { source, .. } => !matches!(
            source,
            InjectError::Deadline { .. } | InjectError::Gone { .. }
        ),
        _ => false,
    }
}

fn start_pager(
    parent: &Parent,
    guest_memory: &GuestMemory,
    uffd: Uffd,
    tracking: WriteTracking,
    options: &ResumeOptions,
) -> Result<Pager, StartError> {
    uffd.negotiate(tracking)?;
    let regions: Vec<Region> = guest_memory
        .mappings
        .iter()
        .map(|mapping| Region {
            host_addr: mapping.host_addr,
            len_bytes: mapping.len_bytes,
            guest_offset_bytes: mapping.guest_offset_bytes,
            page_size: GUEST_PAGE_BYTES,
        })
        .collect();
    for region in &regions {
        // No need to write-protect what is absent: whatever the pager installs comes protected.
        uffd.register(region, tracking)?;
    }
    let memfd = memfd_of(guest_memory)?;
    let source = Arc::new(ImageSource(Arc::clone(&parent.memory)));
    let mut config = PagerConfig::new(uffd, regions, source, Backing::SharedMemfd(memfd));
    config.tracking = tracking;
    config.pagemap_pid = i32::try_from(guest_memory.pid).ok();
    if !options.no_prefetch {
        config.prefetch = working_set_of(&parent.build)
            .iter()
            .map(pager_run)
            .collect();
    }
    Ok(Pager::start(config)?)
}

/// Runs work that blocks.
async fn background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))
}
