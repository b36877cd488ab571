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
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use torpor_build::{Build, BuildId, PageRun};
use torpor_pager::{Backing, Pager, PagerConfig, Region, Uffd, WriteTracking};
use torpor_vmm::qemu::{self, IncomingVm};
use torpor_vmm::{Accel, GuestMemory, InjectError, Vmm, VmmError};

use crate::disk;
use crate::error::StartError;
use crate::fill::{FillError, ImageSource, fill};
use crate::host::Host;
use crate::progress::Progress;
use crate::sandbox::{
    CONSOLE_FILE, DISK_FILE, Memory, Parent, Parts, Sandbox, Starting, new_name, pager_run,
};
use crate::spec::{GuestSpec, identity_of};

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
    let (parent, spec) = background({
        let (host, id) = (host.clone(), *id);
        move || open(&host, &id)
    })
    .await?;
    let name = new_name()?;
    let run_dir = host.storage().run_dir(&name)?;
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
    let incoming = qemu::prepare_resume(host.qemu(), &machine, &console).await?;
    let vmm_ms = clock.lap();

    let guest_memory = incoming.memory()?;
    let (memory, eager) = make_memory(host, &parent, &incoming, &guest_memory, options).await?;
    let memory_ms = clock.lap();
    disk.await
        .unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))?;
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
    let memory_file = File::from(guest_memory.memfd);
    // From here on the guest needs its pager, and the pager's failure must end the wait.
    let starting = Starting::new(Parts {
        vmm,
        memory,
        memory_file,
        parent: Some(parent),
        spec,
        name,
        run_dir,
    });
    let sandbox = starting.answered(ANSWER_MAX).await?;
    let answer_ms = clock.lap();
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    record_working_set(&sandbox);
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

/// Keeps what this resume touched for the next, if none did yet. Nobody waits for it: it is a hint.
fn record_working_set(sandbox: &Sandbox) {
    let (Some(parent), Some(_)) = (sandbox.parent(), sandbox.pager_stats()) else {
        return;
    };
    let working_set = sandbox.working_set().to_vec();
    tokio::task::spawn_blocking(move || {
        if parent.build.recorded_working_set().is_none()
            && let Err(error) = parent.build.record_working_set(&working_set)
        {
            tracing::debug!(%error, "the working set is not kept");
        }
    });
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

fn open(host: &Host, id: &BuildId) -> Result<(Parent, GuestSpec), StartError> {
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
    let (memory, disk) = (Arc::new(build.memory()?), Arc::new(build.disk()?));
    Ok((
        Parent {
            build,
            memory,
            disk,
        },
        spec,
    ))
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
    let why_eager = if options.eager {
        "asked for".to_owned()
    } else {
        match incoming.userfaultfd().await {
            Ok(fd) => {
                let uffd = Uffd::from_fd(fd)?;
                let pager = start_pager(host, parent, guest_memory, uffd, options)?;
                return Ok((Memory::Lazy(Arc::new(pager)), None));
            }
            // The VMM is not to be relied on after these; after a refusal it is as it was.
            Err(error) if !refused(&error) => return Err(error.into()),
            Err(error) => error.to_string(),
        }
    };
    tracing::info!(why = %why_eager, "the guest's memory is filled before it starts");
    let image = Arc::clone(&parent.memory);
    let memory = guest_memory.memfd.try_clone().map_err(FillError::Memory)?;
    background(move || Ok(fill(&image, &File::from(memory))?)).await?;
    Ok((Memory::Eager, Some(why_eager)))
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
    host: &Host,
    parent: &Parent,
    guest_memory: &GuestMemory,
    uffd: Uffd,
    options: &ResumeOptions,
) -> Result<Pager, StartError> {
    let tracking = host.tracking()?;
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
        uffd.register(region, tracking)?;
        if tracking != WriteTracking::Off {
            uffd.write_protect(region)?;
        }
    }
    let memfd = guest_memory.memfd.try_clone().map_err(FillError::Memory)?;
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
