//! A running sandbox: its VMM, its pager, its channel to the guest, and what it came from.
//!
//! Invariants:
//! - The sandbox owns its VMM: dropping the sandbox kills the VMM first, then ends the pager, then
//!   removes the run directory.
//! - A pager that gives up kills the VMM at once: a guest whose faults nobody serves hangs for ever.
//! - How the memory came to be ([`Memory`]) decides how it is captured; nothing else remembers
//!   whether a sandbox was booted or resumed.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use torpor_anatomy::NoteLocation;
use torpor_build::{
    BaseImage, Build, BuildId, BuildInfo, ImageReader, Name, PAGE_SIZE, PageRun, RunDir, Storage,
};
use torpor_guest::Envd;
use torpor_pager::{FailureSignal, PageSet, Pager, PagerFailure, PagerStats};
use torpor_vmm::firecracker;
use torpor_vmm::{ChangeTracker, DrainReport, GuestReader, Vmm};

use crate::answer::first_answer;
use crate::capture::{CapturePlan, CapturedMemory, Changes, page_run, present_pages};
use crate::error::{StartError, StepError};
use crate::host::Patience;
use crate::inspect::{LAYOUT_KEY, MemoryLayout, RunRecord, started_at};
use crate::metrics;
use crate::pause::report::PauseReport;
use crate::physical::{Content, StoppedMemory, Walked};
use crate::scan::{self, Permission, ScanReport};
use crate::spec::GuestSpec;

/// Name of the writable disk in a run directory.
pub(crate) const DISK_FILE: &str = "layer.img";
/// Name of the console's log in a run directory.
pub(crate) const CONSOLE_FILE: &str = "console.log";
/// Name of the directory in a run directory that a Firecracker has for itself.
const MACHINE_DIR: &str = "machine";
/// How often a guest whose pause failed is asked to thaw, and the wait in between.
const THAW_TRIES: u32 = 3;
const THAW_PAUSE: Duration = Duration::from_millis(200);
/// How much of the console an error message shows: a kernel's panic with its registers and its
/// call trace, whose first line is the one that counts, takes up to 3 KB.
const CONSOLE_SHOWN_BYTES: usize = 4000;

/// How a sandbox's memory came to be, and so what is known about it.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Written by the guest alone: what is present counts.
    Booted,
    /// Filled from the build before the guest started: what is present is compared.
    Eager,
    /// Served on demand: the pager knows what was written and removed.
    Lazy(Arc<Pager>),
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Self::Lazy(pager) = self {
            metrics::pager_ended(&pager.stats());
        }
    }
}

impl Memory {
    fn failure(&self) -> Option<FailureSignal> {
        match self {
            Self::Lazy(pager) => Some(pager.failure()),
            Self::Booted | Self::Eager => None,
        }
    }

    /// Does `work`, which waits for a guest or a VMM, unless the pager gives up: then whatever
    /// touched the page waits for ever, and the page is the reason to tell.
    pub(crate) async fn while_served<T>(
        &self,
        build: Option<BuildId>,
        work: impl Future<Output = Result<T, StartError>>,
    ) -> Result<T, StartError> {
        let Some(failure) = self.failure() else {
            return work.await;
        };
        let unserved = |source| StartError::Unserved { build, source };
        tokio::select! {
            done = work => done.map_err(|error| failure.get().map_or(error, unserved)),
            // A signal that cannot be watched leaves the work its own deadline.
            Ok(source) = raised(&failure) => Err(unserved(source)),
        }
    }
}

/// The build that a sandbox was resumed from, or that was taken of it last, with its images opened.
#[derive(Clone)]
pub(crate) struct Parent {
    pub(crate) build: Build,
    pub(crate) memory: Arc<ImageReader>,
    pub(crate) disk: Arc<ImageReader>,
}

impl Parent {
    pub(crate) fn open(build: Build) -> Result<Self, torpor_build::Error> {
        let (memory, disk) = (Arc::new(build.memory()?), Arc::new(build.disk()?));
        Ok(Self {
            build,
            memory,
            disk,
        })
    }
}

/// What a sandbox is made of, but for its agent.
pub(crate) struct Parts {
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) memory: Memory,
    /// Its guest's memory, to be read.
    pub(crate) reader: GuestReader,
    /// Held for as long as the sandbox lives, so that nobody deletes it.
    pub(crate) base_image: Arc<BaseImage>,
    pub(crate) parent: Option<Parent>,
    pub(crate) spec: GuestSpec,
    pub(crate) name: Name,
    pub(crate) run_dir: RunDir,
}

/// A sandbox whose guest runs and has not answered yet. Its pager's failure ends it already.
pub(crate) struct Starting(Body);

/// Fields drop in this order, and the order matters: the VMM goes before its pager, and both
/// before the run directory.
struct Body {
    _guardian: Option<Guardian>,
    vmm: Arc<dyn Vmm>,
    memory: Memory,
    reader: Arc<GuestReader>,
    base_image: Arc<BaseImage>,
    parent: Option<Parent>,
    since_parent: Option<SharedTracker>,
    spec: GuestSpec,
    name: Name,
    run_dir: RunDir,
}

/// What has changed since a checkpoint, by the host kernel's word: fewer pages to look at than since
/// the resume. Only of memory that is private to its VMM.
pub(crate) type SharedTracker = Arc<Mutex<ChangeTracker>>;

/// A running sandbox. Dropping it kills the VMM and removes what it needed to run.
pub struct Sandbox {
    body: Body,
    envd: Envd,
    /// Where the guest's kernel says that its note is.
    note: Option<NoteLocation>,
    /// Which boot of a kernel said so.
    boot_id: String,
    working_set: Vec<PageRun>,
}

/// Who it is, not all that it holds: an index has a line for every run of pages.
impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("name", &self.body.name)
            .field("vmm_pid", &self.body.vmm.pid())
            .field("parent", &self.parent_id())
            .finish_non_exhaustive()
    }
}

impl Starting {
    pub(crate) fn new(parts: Parts) -> Self {
        let guardian = match &parts.memory {
            Memory::Lazy(pager) => Some(Guardian::of(pager, &parts.vmm)),
            Memory::Booted | Memory::Eager => None,
        };
        Self(Body {
            _guardian: guardian,
            vmm: parts.vmm,
            memory: parts.memory,
            reader: Arc::new(parts.reader),
            base_image: parts.base_image,
            parent: parts.parent,
            since_parent: None,
            spec: parts.spec,
            name: parts.name,
            run_dir: parts.run_dir,
        })
    }

    /// Waits for the agent's first answer: from then on it is a sandbox.
    pub(crate) async fn answered(self, patience: Patience) -> Result<Sandbox, StartError> {
        let body = self.0;
        let answer = first_answer(&*body.vmm, body.run_dir.path(), patience);
        let build = body.parent.as_ref().map(|parent| parent.build.id());
        let (envd, answer) = body.memory.while_served(build, answer).await?;
        // What was touched until now is what every resume of this build touches first.
        let working_set = match &body.memory {
            Memory::Lazy(pager) => pager.working_set().into_iter().map(build_run).collect(),
            Memory::Booted | Memory::Eager => Vec::new(),
        };
        let sandbox = Sandbox {
            body,
            envd,
            note: answer.vmcoreinfo.and_then(|text| text.parse().ok()),
            boot_id: answer.boot_id,
            working_set,
        };
        // For those who want to look into it: not worth failing for.
        if let Err(error) = sandbox.leave_record() {
            tracing::warn!(%error, "the sandbox cannot be inspected while it runs");
        }
        Ok(sandbox)
    }
}

impl Sandbox {
    /// The sandbox's name in the storage's run directory.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.body.name
    }

    /// What the guest is.
    #[must_use]
    pub fn spec(&self) -> &GuestSpec {
        &self.body.spec
    }

    /// The agent in the guest.
    #[must_use]
    pub fn envd(&self) -> &Envd {
        &self.envd
    }

    /// The VMM.
    #[must_use]
    pub fn vmm(&self) -> &dyn Vmm {
        &*self.body.vmm
    }

    /// The build that it was resumed from, or that was taken of it last.
    #[must_use]
    pub fn parent_id(&self) -> Option<BuildId> {
        self.body.parent.as_ref().map(|parent| parent.build.id())
    }

    /// The end of what its console said.
    #[must_use]
    pub fn console_tail(&self) -> String {
        console_tail(self.body.run_dir.path())
    }

    /// What the pager has done; `None` for a sandbox whose memory nobody serves.
    #[must_use]
    pub fn pager_stats(&self) -> Option<PagerStats> {
        match &self.body.memory {
            Memory::Lazy(pager) => Some(pager.stats()),
            Memory::Booted | Memory::Eager => None,
        }
    }

    /// Why the pager gave up, and so killed the VMM; `None` as long as it has not.
    #[must_use]
    pub fn pager_failure(&self) -> Option<PagerFailure> {
        self.body.memory.failure()?.get()
    }

    pub(crate) fn base_image(&self) -> &Arc<BaseImage> {
        &self.body.base_image
    }

    pub(crate) fn parent(&self) -> Option<Parent> {
        self.body.parent.clone()
    }

    pub(crate) fn disk_path(&self) -> PathBuf {
        self.body.run_dir.path().join(DISK_FILE)
    }

    /// What was touched from the start to the first answer.
    pub(crate) fn working_set(&self) -> &[PageRun] {
        &self.working_set
    }

    /// Gets the guest's free pages back, for at most `ceiling`.
    pub(crate) async fn drain(&self, ceiling: Duration) -> DrainReport {
        match &self.body.memory {
            Memory::Lazy(pager) => {
                let discarded = || pager.stats().pages_removed * PAGE_SIZE as u64;
                self.body.vmm.drain(ceiling, Some(&discarded)).await
            }
            Memory::Booted | Memory::Eager => self.body.vmm.drain(ceiling, None).await,
        }
    }

    /// What has become of a stopped guest's memory since its parent build. The pager settles first.
    pub(crate) async fn changes(&self, settle_max: Duration) -> Result<Changes, StepError> {
        let since_parent = self.body.since_parent.clone();
        let touched = move || since_parent.as_deref().map(touched_since).transpose();
        match &self.body.memory {
            Memory::Lazy(pager) => {
                let pager = Arc::clone(pager);
                background(move || {
                    pager.settle(settle_max)?;
                    let mut dirty = pager.dirty()?;
                    if let Some((touched, _)) = touched()? {
                        let mut since =
                            PageSet::with_capacity_pages(dirty.written.capacity_pages());
                        touched
                            .iter()
                            .for_each(|run| since.insert_run(pager_run(run)));
                        dirty.written.intersect(&since);
                    }
                    let runs = |set: &PageSet| set.runs().map(build_run).collect();
                    Ok(Changes::tracked(runs(&dirty.written), runs(&dirty.removed)))
                })
                .await
            }
            Memory::Booted | Memory::Eager => {
                let reader = Arc::clone(&self.body.reader);
                background(move || match touched()? {
                    Some((touched, gone)) => Ok(Changes::tracked(touched, gone)),
                    None => {
                        let present = present_pages(&reader).map_err(StepError::Memory)?;
                        Ok(Changes::present(present))
                    }
                })
                .await
            }
        }
    }

    /// Counts changes from here on, where the host's kernel can: for [`Sandbox::adopt`], once the build
    /// of this moment is durable. The vCPUs must stand still. Until then all that was known counts.
    pub(crate) async fn mark(&mut self) -> Option<SharedTracker> {
        let (before, vmm) = (self.body.since_parent.take(), Arc::clone(&self.body.vmm));
        let marked = background(move || {
            let Some(tracker) = before else {
                let tracker = ChangeTracker::start(&vmm.memory()?)?;
                return Ok(tracker.map(|tracker| Arc::new(Mutex::new(tracker))));
            };
            lock(&tracker).mark()?;
            Ok(Some(tracker))
        });
        marked.await.unwrap_or_else(|error| {
            tracing::info!(%error, "what changes from here on is not tracked");
            None
        })
    }

    /// What a pause would leave out if it scanned this guest now: for measuring and for tests. The
    /// vCPUs must stand still ([`Vmm::stop_vcpus`]).
    ///
    /// # Errors
    /// The pager does not settle within `settle_max`. A guest that cannot be scanned in that time is
    /// no error.
    pub async fn find_free_pages(
        &self,
        storage: &Storage,
        settle_max: Duration,
    ) -> Result<(ScanReport, Vec<PageRun>), StepError> {
        let permission = self.scan_permission(storage).await;
        let changes = self.changes(settle_max).await?;
        Ok(self.scan(&changes, permission, settle_max).await)
    }

    /// Whether the guest may be scanned, as its kernel was built and booted.
    pub(crate) async fn scan_permission(&self, storage: &Storage) -> Permission {
        let (storage, spec, note) = (storage.clone(), self.body.spec.clone(), self.note);
        let asked = background(move || Ok(scan::permission(&storage, &spec, note))).await;
        asked.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Whether the guest's agent speaks of another kernel than the one that was asked for its note: a
    /// guest may have booted another by itself (kexec), and the old one's note be there still.
    pub(crate) fn is_another_boot(&self, boot_id: &str) -> bool {
        // An agent from before it was told says nothing.
        !boot_id.is_empty() && boot_id != self.boot_id
    }

    /// Finds the stopped guest's free pages, in at most `max`. Never fails: the report says why
    /// there are none.
    pub(crate) async fn scan(
        &self,
        changes: &Changes,
        permission: Permission,
        max: Duration,
    ) -> (ScanReport, Vec<PageRun>) {
        let memory = self
            .stopped_memory(changes.removed.clone())
            .until(Instant::now() + max);
        // One that hangs in a read is left behind: nobody looks at what it finds.
        let scanning = background(move || Ok(scan::scan(&memory, &permission)));
        let why = match timeout(max * 2, scanning).await {
            Ok(Ok(scanned)) => return scanned,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("a read took longer than {} ms", max.as_millis()),
        };
        (ScanReport::not_scanned(why), Vec::new())
    }

    /// The stopped guest's memory by physical address.
    fn stopped_memory(&self, removed: Vec<PageRun>) -> StoppedMemory {
        let held = Arc::clone(&self.body.reader);
        let content = match (&self.body.memory, &self.body.parent) {
            (Memory::Lazy(_), Some(parent)) => Content::Lazy {
                held,
                parent: Walked::for_scan(Arc::clone(&parent.memory)),
                removed,
            },
            _ => Content::Held(held),
        };
        StoppedMemory::new(self.body.vmm.ram(), content)
    }

    /// Copies what the plan says out of the stopped guest's memory.
    pub(crate) async fn copy_memory(&self, plan: CapturePlan) -> Result<CapturedMemory, StepError> {
        let reader = Arc::clone(&self.body.reader);
        background(move || plan.copy_from(&reader).map_err(StepError::Memory)).await
    }

    /// Lets the vCPUs of a sandbox whose pause failed run again.
    pub(crate) async fn resume_vcpus(&self) -> Result<(), StepError> {
        Ok(self.body.vmm.resume_vcpus().await?)
    }

    /// Makes the guest what it would be had it never stood still: the clock is set, the user's
    /// processes go on. Tried more than once: a guest that has just been stopped is slow to answer.
    pub(crate) async fn thaw(&self, each_max: Duration) -> Result<(), StepError> {
        let envd = self.envd.with_deadline(each_max);
        let mut tries_left = THAW_TRIES;
        loop {
            tries_left -= 1;
            match envd.init().await {
                Ok(_) => return Ok(()),
                Err(error) if tries_left == 0 => return Err(error.into()),
                Err(error) => tracing::info!(%error, "the guest is not thawed yet"),
            }
            tokio::time::sleep(THAW_PAUSE).await;
        }
    }

    /// Makes a build that was taken of this sandbox at `mark` its parent.
    pub(crate) async fn adopt(
        &mut self,
        build: &Build,
        mark: Option<SharedTracker>,
    ) -> Result<(), StepError> {
        let build = build.clone();
        let parent = background(move || Ok(Parent::open(build)?));
        self.body.parent = Some(parent.await?);
        self.body.since_parent = mark;
        Ok(())
    }

    /// What the manifest of its next build says.
    pub(crate) fn build_info(&self, template: Option<Name>, report: &PauseReport) -> BuildInfo {
        let mut info = self.body.spec.build_info(self.body.vmm.identity());
        info.parent = self.parent_id();
        info.template = template.or(info.template);
        info.working_set = self.working_set.clone();
        // Plain numbers and text cannot fail to become JSON.
        info.pause_report = serde_json::to_value(report).unwrap_or_default();
        let layout = serde_json::to_value(self.memory_layout()).unwrap_or_default();
        info.extra.insert(LAYOUT_KEY.to_owned(), layout);
        info
    }

    fn memory_layout(&self) -> MemoryLayout {
        MemoryLayout {
            note: self.note,
            ram: self.body.vmm.ram(),
        }
    }

    fn leave_record(&self) -> std::io::Result<()> {
        let served_from = match &self.body.memory {
            Memory::Lazy(_) => self.parent_id(),
            Memory::Booted | Memory::Eager => None,
        };
        let record = RunRecord {
            vmm_pid: self.body.vmm.pid(),
            vmm_started: started_at(self.body.vmm.pid())?,
            private: self.body.reader.private().map(<[_]>::to_vec),
            served_from,
            layout: self.memory_layout(),
        };
        record.leave_in(self.body.run_dir.path())
    }

    /// Ends the sandbox without a build. Its VMM is gone when this returns; one that the kernel
    /// does not let go (it hangs in a system call) is logged, and goes when it can. Memory that was
    /// shared with it is freed a moment later, on another thread.
    pub async fn end(self) {
        if let Err(error) = self.body.vmm.kill().await {
            tracing::warn!(sandbox = %self.body.name, %error, "the VMM does not go");
        }
        // Whoever lets go of a memory's file last frees it.
        let memory = Arc::clone(&self.body.reader);
        drop(self);
        release(memory);
    }
}

fn lock(tracker: &Mutex<ChangeTracker>) -> MutexGuard<'_, ChangeTracker> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages that were touched and that are gone since the mark.
fn touched_since(
    tracker: &Mutex<ChangeTracker>,
) -> Result<(Vec<PageRun>, Vec<PageRun>), StepError> {
    let changes = lock(tracker).changes()?;
    let pages = |runs: &[_]| runs.iter().map(page_run).collect();
    Ok((pages(&changes.touched), pages(&changes.gone)))
}

pub(crate) fn build_run(run: torpor_pager::PageRun) -> PageRun {
    PageRun {
        first_page: run.first_page,
        pages: run.pages,
    }
}

pub(crate) fn pager_run(run: &PageRun) -> torpor_pager::PageRun {
    torpor_pager::PageRun::new(run.first_page, run.pages)
}

/// The task that kills the VMM when the pager gives up; ends with this handle.
#[derive(Debug)]
struct Guardian(tokio::task::AbortHandle);

impl Guardian {
    fn of(pager: &Pager, vmm: &Arc<dyn Vmm>) -> Self {
        let failure = pager.failure();
        // Weak: the guardian must not keep the VMM alive when its sandbox is dropped.
        let vmm = Arc::downgrade(vmm);
        let watch = tokio::spawn(async move {
            let why = match raised(&failure).await {
                Ok(failure) => failure.to_string(),
                Err(error) => format!("its failure signal cannot be watched: {error}"),
            };
            let Some(vmm) = vmm.upgrade() else { return };
            tracing::error!(%why, pid = vmm.pid(), "the pager gave up; the VMM is killed");
            if let Err(error) = vmm.kill().await {
                tracing::error!(%error, "the VMM does not go");
            }
        });
        Self(watch.abort_handle())
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits until a failure has been raised.
async fn raised(failure: &FailureSignal) -> std::io::Result<PagerFailure> {
    let signal = failure.as_fd().try_clone_to_owned()?;
    // SAFETY: the AsyncFd owns the descriptor, so that it stays open and the same while it is
    // registered.
    let signal = unsafe { AsyncFd::register_with_interest(signal, Interest::READABLE) }?;
    loop {
        if let Some(failure) = failure.get() {
            return Ok(failure);
        }
        signal.readable().await?.clear_ready();
    }
}

/// Runs work that blocks.
pub(crate) async fn background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(StepError::Panicked(error.to_string())))
}

/// Lets go of memory where nobody waits for it: freeing it takes the kernel some 0.3 ms for a MiB.
pub(crate) fn release<T: Send + 'static>(memory: T) {
    drop(spawn_blocking(move || drop(memory)));
}

/// The end of a console's log, for an error message.
pub(crate) fn console_tail(run_dir: &Path) -> String {
    let log = std::fs::read(run_dir.join(CONSOLE_FILE)).unwrap_or_default();
    let mut tail = &log[log.len().saturating_sub(CONSOLE_SHOWN_BYTES)..];
    // Whole lines only, where there are any.
    if tail.len() < log.len()
        && let Some(end) = tail.iter().position(|byte| *byte == b'\n')
    {
        tail = &tail[end..];
    }
    String::from_utf8_lossy(tail).trim().to_owned()
}

/// Makes the directory in a run directory that a Firecracker has for itself.
pub(crate) fn machine_dir(run_dir: &Path) -> Result<PathBuf, StartError> {
    let path = run_dir.join(MACHINE_DIR);
    let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
    match made {
        Ok(()) => Ok(path),
        Err(source) => Err(StartError::Io { path, source }),
    }
}

/// Ends what a sandbox without an owner has left running, by what is left of its run directory.
pub(crate) fn end_left_over(run_dir: &Path, deadline: Instant) -> io::Result<()> {
    firecracker::end_left_over(&run_dir.join(MACHINE_DIR), deadline)
}

/// A name for a sandbox that nobody named.
pub(crate) fn new_name() -> Result<Name, StartError> {
    let name = format!("s-{}", BuildId::random());
    name.parse()
        .map_err(|error| StartError::Build(torpor_build::Error::Id(error)))
}
