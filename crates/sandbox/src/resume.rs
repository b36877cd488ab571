//! Resumes a build: the VMM that made it with empty memory, device state loaded, pages served on
//! demand.
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

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use torpor_build::{BaseImage, BuildId, Manifest, Name, RunDir};
use torpor_vmm::{Accel, host_tsc_khz};

use crate::disk;
use crate::error::StartError;
use crate::host::Host;
use crate::incoming::{self, Ready};
use crate::metrics;
use crate::progress::Progress;
use crate::sandbox::{DISK_FILE, Parent, Parts, Sandbox, Starting, new_name};
use crate::spec::{GuestSpec, identity_of};
use crate::vmm::VmmBinary;

/// Two measurements of one host's clock rate differ by well under a hundredth.
const CLOCK_RATE_TOLERANCE_DIVISOR: u64 = 100;

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
    let resumed = Box::pin(try_resume(host, id, options)).await;
    metrics::resumed(&resumed);
    resumed
}

async fn try_resume(
    host: &Host,
    id: &BuildId,
    options: &ResumeOptions,
) -> Result<(Sandbox, ResumeReport), StartError> {
    let started = Instant::now();
    let mut clock = Laps { last: started };
    let _step = options.progress.step("resume");
    let opened = background({
        let (host, id) = (host.clone(), *id);
        move || open(&host, &id)
    });
    let Opened {
        parent,
        base_image,
        spec,
        vmm: (binary, accel),
        state,
    } = opened.await?;
    let (name, run_dir) = new_run_dir(host).await?;
    let open_ms = clock.lap();

    let disk_file = run_dir.path().join(DISK_FILE);
    disk::create(&parent.disk, &disk_file)?;
    let machine = spec.machine(host.storage(), disk_file.clone(), accel)?;
    // Written while the VMM starts: it opens the file, and reads it when the vCPUs run.
    let disk = tokio::spawn(background({
        let (image, path) = (Arc::clone(&parent.disk), disk_file);
        move || Ok(disk::fill(&image, &path)?)
    }));
    let dir = run_dir.path();
    let prepared = incoming::prepare(host, &binary, &machine, dir, &parent, &state, options).await;
    // Awaited before any return: it holds the build, and writes into the run directory.
    let (memory_at, filled) = (Instant::now(), disk.await);
    let ready = prepared?;
    // With `ready` whole, which lets go of the VMM before its pager.
    filled.unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))?;
    let Ready {
        incoming,
        memory,
        eager,
        vmm_started,
    } = ready;
    let (vmm_ms, memory_ms) = (clock.lap_at(vmm_started), clock.lap_at(memory_at));
    let disk_ms = clock.lap();

    // Loading touches guest memory: the devices' queues.
    let starting = incoming.start(&state);
    let vmm = memory.while_served(Some(*id), starting).await?;
    let load_ms = clock.lap();
    let reader = vmm.memory()?.reader()?;
    // From here on the guest needs its pager, and the pager's failure must end the wait.
    let starting = Starting::new(Parts {
        vmm,
        memory,
        reader,
        base_image,
        parent: Some(parent),
        spec,
        name,
        run_dir,
    });
    let sandbox = starting.answered(host.patience()).await?;
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
        self.lap_at(Instant::now())
    }

    fn lap_at(&mut self, now: Instant) -> f64 {
        let ms = (now - self.last).as_secs_f64() * 1e3;
        self.last = now;
        ms
    }
}

/// A build that can be resumed here, and by what.
struct Opened {
    parent: Parent,
    base_image: Arc<BaseImage>,
    spec: GuestSpec,
    vmm: (VmmBinary, Accel),
    state: Vec<u8>,
}

fn open(host: &Host, id: &BuildId) -> Result<Opened, StartError> {
    let build = host.storage().open_build(id)?;
    let spec = GuestSpec::of(build.manifest())?;
    let recorded = identity_of(build.manifest())?;
    let binary = host.vmm_of(id, &recorded)?;
    // What was made without KVM is resumed without it, on any host.
    let accel = match recorded.accel {
        Accel::Tcg => Accel::Tcg,
        Accel::Kvm => binary.accel(),
    };
    binary
        .identity_as(accel)
        .can_resume(&recorded)
        .map_err(|source| StartError::Identity { build: *id, source })?;
    if accel == Accel::Tcg {
        // Measuring takes a moment that nobody has to wait for.
        let manifest = build.manifest().clone();
        std::thread::spawn(move || warn_of_another_clock(&manifest));
    }
    let base_image = host.storage().base_image(&spec.base_image)?;
    let state = build.read_vmstate()?;
    Ok(Opened {
        parent: Parent::open(build)?,
        base_image,
        spec,
        vmm: (binary, accel),
        state,
    })
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

/// Runs work that blocks.
pub(crate) async fn background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))
}
