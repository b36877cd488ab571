//! A VMM that waits for a device state, and its guest's memory made ready.
//!
//! ```text
//! QEMU:         start ─▶ userfaultfd put into it, pager serves ─▶ load
//!                   or ─▶ memory filled (eager) ────────────────▶ load
//! Firecracker:  start ─▶ load begins ─▶ hands its page faults over, pager serves ─▶ load ends
//! ```
//!
//! Firecracker negotiates its userfaultfd itself, without asynchronous write-protect, so writes are
//! always tracked synchronously there; and its memory is filled by nobody but a pager.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use torpor_build::{Build, PageRun};
use torpor_pager::{Backing, Pager, PagerConfig, ReadAhead, Region, Uffd, WriteTracking};
use torpor_vmm::firecracker::{self, IncomingFirecracker};
use torpor_vmm::qemu::{self, IncomingVm};
use torpor_vmm::{GuestMemory, InjectError, MachineConfig, MemoryMapping, Vmm, VmmError};

use crate::error::StartError;
use crate::fill::{FillError, ImageSource, fill};
use crate::host::Host;
use crate::resume::{ResumeOptions, background};
use crate::sandbox::{CONSOLE_FILE, Memory, Parent, machine_dir, pager_run};
use crate::vmm::VmmBinary;

/// Guest memory is registered in base pages on every host that torpor runs on.
const GUEST_PAGE_BYTES: u32 = 4096;

/// The VMM.
pub(crate) enum Incoming {
    Qemu(Box<IncomingVm>),
    Firecracker(Box<IncomingFirecracker>),
}

/// A VMM that waits, and memory that is ready. The VMM goes first.
pub(crate) struct Ready {
    pub(crate) incoming: Incoming,
    pub(crate) memory: Memory,
    /// Why the memory was filled eagerly, if it was.
    pub(crate) eager: Option<String>,
    /// When the VMM had started.
    pub(crate) vmm_started: Instant,
}

impl Incoming {
    /// Loads the state, or waits until it is loaded, and lets the vCPUs run. The memory must be
    /// served meanwhile.
    pub(crate) async fn start(self, state: &[u8]) -> Result<Arc<dyn Vmm>, StartError> {
        let vmm = match self {
            Self::Qemu(incoming) => incoming.load(state).await?,
            Self::Firecracker(incoming) => incoming.finish().await?,
        };
        vmm.resume_vcpus().await?;
        Ok(Arc::from(vmm))
    }
}

/// Starts the VMM in `run_dir` and makes the memory of `parent` ready in it.
pub(crate) async fn prepare(
    host: &Host,
    binary: &VmmBinary,
    machine: &MachineConfig,
    run_dir: &Path,
    parent: &Parent,
    state: &[u8],
    options: &ResumeOptions,
) -> Result<Ready, StartError> {
    let console = run_dir.join(CONSOLE_FILE);
    // While the VMM starts, the other processor has time for it.
    let ahead = read_ahead(parent, options);
    match binary {
        VmmBinary::Qemu(binary) => {
            let incoming = qemu::prepare_resume(binary, machine, &console).await?;
            let vmm_started = Instant::now();
            let (memory, eager) = memory_of_qemu(host, parent, &incoming, ahead, options).await?;
            Ok(Ready {
                incoming: Incoming::Qemu(Box::new(incoming)),
                memory,
                eager,
                vmm_started,
            })
        }
        VmmBinary::Firecracker(_) if options.eager => Err(StartError::NotEager),
        VmmBinary::Firecracker(program) => {
            let (dir, binary) = (machine_dir(run_dir)?, program.for_machine());
            let prepared = firecracker::prepare_resume(&binary, machine, &dir, &console);
            let mut incoming = prepared.await?;
            let vmm_started = Instant::now();
            let handshake = incoming.hand_over(state).await?;
            let served = Served {
                uffd: Uffd::from_fd(handshake.userfaultfd)?,
                mappings: &handshake.mappings,
                backing: Backing::Anonymous,
                tracking: WriteTracking::Sync,
                pid: incoming.pid(),
            };
            let pager = start_pager(parent, served, ahead)?;
            Ok(Ready {
                incoming: Incoming::Firecracker(Box::new(incoming)),
                memory: Memory::Lazy(Arc::new(pager)),
                eager: None,
                vmm_started,
            })
        }
    }
}

/// Served on demand, or filled where that cannot be had.
async fn memory_of_qemu(
    host: &Host,
    parent: &Parent,
    incoming: &IncomingVm,
    ahead: Option<ReadAhead>,
    options: &ResumeOptions,
) -> Result<(Memory, Option<String>), StartError> {
    let guest_memory = incoming.memory()?;
    let why_eager = match lazy_tracking(host, options) {
        Err(why) => why,
        Ok(tracking) => match incoming.userfaultfd().await {
            Ok(fd) => {
                let uffd = Uffd::from_fd(fd)?;
                uffd.negotiate(tracking)?;
                let served = Served {
                    uffd,
                    mappings: &guest_memory.mappings,
                    backing: Backing::SharedMemfd(memfd_of(&guest_memory)?),
                    tracking,
                    pid: guest_memory.pid,
                };
                let pager = start_pager(parent, served, ahead)?;
                return Ok((Memory::Lazy(Arc::new(pager)), None));
            }
            // The VMM is not to be relied on after these; after a refusal it is as it was.
            Err(error) if !refused(&error) => return Err(error.into()),
            Err(error) => error.to_string(),
        },
    };
    // All of it is read now.
    drop(ahead);
    tracing::info!(why = %why_eager, "the guest's memory is filled before it starts");
    let image = Arc::clone(&parent.memory);
    let memory = memfd_of(&guest_memory)?;
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

/// Whose page faults a pager is to serve. The userfaultfd is negotiated.
struct Served<'a> {
    uffd: Uffd,
    mappings: &'a [MemoryMapping],
    backing: Backing,
    tracking: WriteTracking,
    pid: u32,
}

fn start_pager(
    parent: &Parent,
    served: Served<'_>,
    ahead: Option<ReadAhead>,
) -> Result<Pager, StartError> {
    let Served {
        uffd,
        mappings,
        backing,
        tracking,
        pid,
    } = served;
    let regions: Vec<Region> = mappings
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
    let source = Arc::new(ImageSource(Arc::clone(&parent.memory)));
    let mut config = PagerConfig::new(uffd, regions, source, backing);
    config.tracking = tracking;
    config.pagemap_pid = i32::try_from(pid).ok();
    config.read_ahead = ahead;
    Ok(Pager::start(config)?)
}

/// Begins to read the working set. It is a hint: not worth failing for.
fn read_ahead(parent: &Parent, options: &ResumeOptions) -> Option<ReadAhead> {
    if options.no_prefetch || options.eager {
        return None;
    }
    let runs = working_set_of(&parent.build)
        .iter()
        .map(pager_run)
        .collect();
    let source = Arc::new(ImageSource(Arc::clone(&parent.memory)));
    ReadAhead::start(source, runs)
        .inspect_err(|error| tracing::warn!(%error, "the working set is not read ahead"))
        .ok()
}

/// What a resume of this build will touch first: what an earlier one did, or, before there was
/// one, what the resume touched that led to the build (kernel and agent are the same).
fn working_set_of(build: &Build) -> Vec<PageRun> {
    build
        .recorded_working_set()
        .unwrap_or_else(|| build.manifest().info.working_set.clone())
}
