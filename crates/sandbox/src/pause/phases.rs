//! The phases of a pause: one struct each, with exactly one way on.
//!
//! What every phase carries is a [`Course`]: the sandbox and what is known so far. A phase that
//! fails hands its course to [`Course::roll_back`], the only place where a sandbox is brought back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use torpor_build::{BaseImage, BuildInfo, ImageKind, LayerSummary, PageRun, StagedBuild};
use torpor_guest::{GuestError, ReclaimCaps, reclaim};

use super::course::{Ceilings, Course, ms};
use super::report::{PauseReport, PauseStep, StepTime};
use super::{Checkpointed, PauseFailure, PauseRequest, Paused};
use crate::capture::{CapturedMemory, Changes};
use crate::disk;
use crate::error::StepError;
use crate::host::Host;
use crate::metrics;
use crate::progress::StepGuard;
use crate::sandbox::{Parent, Sandbox, SharedTracker, background, release};

/// What all reclaim steps may take together.
fn sum_of(caps: ReclaimCaps) -> Duration {
    let caps_ms = [
        caps.sync_ms,
        caps.drop_caches_ms,
        caps.compact_memory_ms,
        caps.fstrim_ms,
    ];
    Duration::from_millis(caps_ms.into_iter().map(u64::from).sum())
}

fn begin_step(request: &PauseRequest, step: PauseStep) -> (StepGuard<'_>, Instant) {
    (request.progress.step(step.doing()), Instant::now())
}

/// Begins a pause by claiming the build's id.
pub(super) async fn begin(
    sandbox: Sandbox,
    host: &Host,
    request: PauseRequest,
) -> Result<Running, PauseFailure> {
    let started = Instant::now();
    let guard = request.progress.step(PauseStep::Claim.doing());
    let (storage, id) = (host.storage().clone(), request.build);
    let staged = background(move || Ok(storage.begin_build(id)?)).await;
    drop(guard);
    let staged = match staged {
        Ok(staged) => staged,
        // Nothing has been done to the guest, so there is nothing to undo.
        Err(source) => {
            return Err(PauseFailure::StillRunning {
                sandbox: Box::new(sandbox),
                step: PauseStep::Claim,
                source,
                not_thawed: None,
            });
        }
    };
    let mut course = Course::new(sandbox, request, Ceilings::on(host), started);
    if course.request.flags.free_page_scan {
        let permission = course.sandbox.scan_permission(host.storage()).await;
        course.scan_permission = Some(permission);
    }
    course.note(PauseStep::Claim, started, None);
    Ok(Running(course, staged))
}

/// Nothing has been done to the guest.
pub(super) struct Running(Course, StagedBuild);

impl Running {
    /// Freezes the user's processes and lets the guest give up what it does not need.
    pub(super) async fn reclaim(self) -> Reclaimed {
        let Self(mut course, staged) = self;
        let (guard, since) = begin_step(&course.request, PauseStep::FreezeUser);
        let frozen = course
            .sandbox
            .envd()
            .with_deadline(course.ceilings.freeze_user)
            .freeze()
            .await;
        drop(guard);
        // One that did not answer in time may well have frozen them.
        if frozen.as_ref().err().is_none_or(GuestError::is_timeout) {
            course.frozen_at = Some(since);
        }
        course.agent_answers = frozen.is_ok();
        course.note(
            PauseStep::FreezeUser,
            since,
            frozen.err().map(|error| error.to_string()),
        );
        if course.request.flags.reclaim {
            let caps = course.request.flags.reclaim_caps;
            let (guard, since) = begin_step(&course.request, PauseStep::Reclaim);
            let budget = sum_of(caps) + course.ceilings.reclaim_overhead;
            let report = reclaim(course.sandbox.envd(), caps, budget).await;
            drop(guard);
            course.note(PauseStep::Reclaim, since, report.error.clone());
            course.reclaim = Some(report);
        }
        Reclaimed(course, staged)
    }
}

/// The guest has given up what it would.
pub(super) struct Reclaimed(Course, StagedBuild);

impl Reclaimed {
    /// Gets the guest's free pages back.
    pub(super) async fn drain(self) -> Drained {
        let Self(mut course, staged) = self;
        let ceiling = Duration::from_millis(course.request.flags.drain_ceiling_ms);
        if !ceiling.is_zero() {
            let (guard, since) = begin_step(&course.request, PauseStep::Drain);
            let removes = |course: &Course| Some(course.sandbox.pager_stats()?.removes);
            let before = removes(&course);
            let report = course.sandbox.drain(ceiling).await;
            drop(guard);
            course.drain_removes =
                (removes(&course).zip(before)).map(|(now, before)| now.saturating_sub(before));
            let incomplete = !report.outcome.is_complete();
            let why = incomplete.then(|| report.outcome.to_string());
            course.note(PauseStep::Drain, since, why);
            metrics::drained(&report, course.drain_removes);
            course.drain = Some(report);
        }
        let since = Instant::now();
        let envd = course.sandbox.envd();
        let metrics = envd
            .with_deadline(course.ceilings.count_free)
            .metrics()
            .await;
        let ram_bytes = course.sandbox.spec().memory_bytes;
        course.guest_nonfree_bytes =
            (metrics.as_ref().ok()).map(|metrics| ram_bytes.saturating_sub(metrics.mem_free));
        if let Some(permission) = &mut course.scan_permission {
            let why_not = match &metrics {
                Ok(metrics) if course.sandbox.is_another_boot(&metrics.boot_id) => {
                    Some("another kernel runs in the guest than at its start")
                }
                // One that has just frozen the guest is the one that was there all along.
                Err(_) if !course.agent_answers => Some(
                    "the agent does not answer, so nobody knows which kernel runs in the guest",
                ),
                _ => None,
            };
            if let Some(why_not) = why_not {
                *permission = Err(why_not.to_owned());
            }
        }
        let skipped = metrics.err().map(|error| error.to_string());
        course.note(PauseStep::CountFree, since, skipped);
        Drained(course, staged)
    }
}

/// The host has got back what it could.
pub(super) struct Drained(Course, StagedBuild);

impl Drained {
    /// Stops the vCPUs.
    pub(super) async fn stop(self) -> Result<Stopped, PauseFailure> {
        let Self(mut course, staged) = self;
        let (guard, since) = begin_step(&course.request, PauseStep::Stop);
        let stopped = course.sandbox.vmm().stop_vcpus().await;
        drop(guard);
        if let Err(error) = stopped {
            return Err(course.roll_back(PauseStep::Stop, error.into()).await);
        }
        course.note(PauseStep::Stop, since, None);
        course.user_frozen = course
            .frozen_at
            .map_or(Duration::ZERO, |frozen| frozen.elapsed());
        Ok(Stopped {
            course,
            staged,
            stopped_at: since,
        })
    }
}

/// The vCPUs stand still.
pub(super) struct Stopped {
    course: Course,
    staged: StagedBuild,
    stopped_at: Instant,
}

impl Stopped {
    /// Takes the device state. Before the memory is looked at: a VMM may write to guest memory to
    /// take it (Firecracker does), and an old page beside a new state is a broken guest.
    pub(super) async fn save_state(self) -> Result<Saved, PauseFailure> {
        let Self {
            mut course,
            staged,
            stopped_at,
        } = self;
        let (guard, since) = begin_step(&course.request, PauseStep::SaveState);
        let state = course.sandbox.vmm().save_state().await;
        drop(guard);
        course.note(PauseStep::SaveState, since, None);
        match state {
            Ok(state) => Ok(Saved {
                course,
                staged,
                stopped_at,
                state,
            }),
            Err(error) => Err(course.roll_back(PauseStep::SaveState, error.into()).await),
        }
    }
}

/// The device state is taken: nothing writes to the guest's memory any more.
pub(super) struct Saved {
    course: Course,
    staged: StagedBuild,
    stopped_at: Instant,
    state: Vec<u8>,
}

impl Saved {
    /// Waits until the pager has seen all that has happened.
    pub(super) async fn settle(self) -> Result<Settled, PauseFailure> {
        let Self {
            mut course,
            staged,
            stopped_at,
            state,
        } = self;
        let (guard, since) = begin_step(&course.request, PauseStep::Settle);
        let changes = course.sandbox.changes(course.ceilings.settle).await;
        drop(guard);
        course.note(PauseStep::Settle, since, None);
        match changes {
            Ok(changes) => Ok(Settled {
                course,
                staged,
                stopped_at,
                state,
                changes,
            }),
            Err(error) => Err(course.roll_back(PauseStep::Settle, error).await),
        }
    }
}

/// What has changed is known.
pub(super) struct Settled {
    course: Course,
    staged: StagedBuild,
    stopped_at: Instant,
    state: Vec<u8>,
    changes: Changes,
}

impl Settled {
    /// Finds the pages that are nobody's. Best effort, as everything before the stop is.
    pub(super) async fn scan(self) -> Scanned {
        let Self {
            mut course,
            staged,
            stopped_at,
            state,
            changes,
        } = self;
        let mut free = Vec::new();
        if let Some(permission) = course.scan_permission.take() {
            let (guard, since) = begin_step(&course.request, PauseStep::Scan);
            let ceiling = course.ceilings.scan;
            let (report, found) = course.sandbox.scan(&changes, permission, ceiling).await;
            drop(guard);
            course.note(PauseStep::Scan, since, report.why_not().map(str::to_owned));
            (course.scan, free) = (Some(report), found);
        }
        Scanned {
            course,
            staged,
            stopped_at,
            state,
            changes,
            free,
        }
    }
}

/// What nobody needs is known.
pub(super) struct Scanned {
    course: Course,
    staged: StagedBuild,
    stopped_at: Instant,
    state: Vec<u8>,
    changes: Changes,
    free: Vec<PageRun>,
}

impl Scanned {
    /// Copies the memory.
    pub(super) async fn capture(self) -> Result<Captured, PauseFailure> {
        let Self {
            mut course,
            staged,
            stopped_at,
            state,
            changes,
            free,
        } = self;
        let (guard, since) = begin_step(&course.request, PauseStep::CaptureMemory);
        let plan = changes.plan(course.sandbox.spec().memory_pages(), &free);
        let memory = course.sandbox.copy_memory(plan).await;
        drop(guard);
        course.note(PauseStep::CaptureMemory, since, None);
        match memory {
            Ok(memory) => {
                let freeze = stopped_at.elapsed();
                Ok(Captured {
                    course,
                    staged,
                    stopped_at,
                    freeze,
                    state,
                    memory,
                })
            }
            Err(error) => Err(course.roll_back(PauseStep::CaptureMemory, error).await),
        }
    }
}

/// The guest could go on: everything that a build needs of it but its disk is in our hands.
pub(super) struct Captured {
    course: Course,
    staged: StagedBuild,
    stopped_at: Instant,
    freeze: Duration,
    state: Vec<u8>,
    memory: CapturedMemory,
}

impl Captured {
    /// Writes the build's files; it is not visible yet.
    pub(super) async fn write(self) -> Result<Written, PauseFailure> {
        let Self {
            mut course,
            staged,
            stopped_at,
            freeze,
            state,
            memory,
        } = self;
        let parent = course.sandbox.parent();
        let (guard, since) = begin_step(&course.request, PauseStep::WriteMemory);
        let total_pages = course.sandbox.spec().memory_pages();
        let references = course.request.flags.disk_references;
        let base_image = references.then(|| Arc::clone(course.sandbox.base_image()));
        let written = background({
            let parent = parent.clone();
            move || write_memory(staged, parent.as_ref(), base_image, total_pages, memory)
        })
        .await;
        drop(guard);
        course.note(PauseStep::WriteMemory, since, None);
        let (staged, memory) = match written {
            Ok(written) => written,
            Err(error) => return Err(course.roll_back(PauseStep::WriteMemory, error).await),
        };
        let (guard, since) = begin_step(&course.request, PauseStep::WriteDisk);
        let (path, total_pages) = (
            course.sandbox.disk_path(),
            course.sandbox.spec().disk_pages(),
        );
        let vmstate_bytes = state.len() as u64;
        let written =
            background(move || write_disk(staged, parent.as_ref(), total_pages, &path, &state))
                .await;
        drop(guard);
        course.note(PauseStep::WriteDisk, since, None);
        let (staged, disk) = match written {
            Ok(written) => written,
            Err(error) => return Err(course.roll_back(PauseStep::WriteDisk, error).await),
        };
        Ok(Written {
            course,
            stopped_at,
            freeze,
            staged,
            memory,
            disk,
            vmstate_bytes,
        })
    }
}

fn write_memory(
    staged: StagedBuild,
    parent: Option<&Parent>,
    base_image: Option<Arc<BaseImage>>,
    total_pages: u64,
    memory: CapturedMemory,
) -> Result<(StagedBuild, LayerSummary), StepError> {
    let image = parent.map(|parent| Arc::clone(&parent.memory));
    let mut writer = staged.image_writer(ImageKind::Memory, total_pages, image)?;
    if let Some(base_image) = base_image {
        writer.refer_to(base_image)?;
    }
    memory.write_to(&mut writer)?;
    release(memory);
    let summary = writer.finish()?;
    Ok((staged, summary))
}

fn write_disk(
    staged: StagedBuild,
    parent: Option<&Parent>,
    total_pages: u64,
    path: &Path,
    state: &[u8],
) -> Result<(StagedBuild, LayerSummary), StepError> {
    staged.write_vmstate(state)?;
    let image = parent.map(|parent| Arc::clone(&parent.disk));
    let mut writer = staged.image_writer(ImageKind::Disk, total_pages, image)?;
    disk::store(path, total_pages, &mut writer)?;
    let summary = writer.finish()?;
    Ok((staged, summary))
}

/// Every file of the build but its manifest is written.
pub(super) struct Written {
    course: Course,
    stopped_at: Instant,
    freeze: Duration,
    staged: StagedBuild,
    memory: LayerSummary,
    disk: LayerSummary,
    vmstate_bytes: u64,
}

impl Written {
    /// Lets the sandbox go on, for a checkpoint: all that the build needs is copied. That the guest
    /// cannot go on is no reason to lose what was copied, so it is told after the commit.
    pub(super) async fn go_on(mut self) -> GoneOn {
        let (guard, since) = begin_step(&self.course.request, PauseStep::GoOn);
        let mark = self.course.sandbox.mark().await;
        let resumed = self.course.sandbox.resume_vcpus().await;
        self.freeze = self.stopped_at.elapsed();
        let thawed = match &resumed {
            Ok(()) => self.course.sandbox.thaw(self.course.ceilings.thaw).await,
            Err(_) => Ok(()),
        };
        drop(guard);
        if let Some(frozen_at) = self.course.frozen_at {
            self.course.user_frozen = frozen_at.elapsed();
        }
        let failed = resumed.as_ref().err().or(thawed.as_ref().err());
        let why = failed.map(ToString::to_string);
        self.course.note(PauseStep::GoOn, since, why);
        GoneOn {
            written: self,
            mark,
            resumed,
            not_thawed: thawed.err(),
        }
    }

    /// Makes the build durable and visible.
    pub(super) async fn commit(self) -> Result<Committed, PauseFailure> {
        let since = Instant::now();
        let mut report = self.report();
        let Self {
            course,
            stopped_at,
            staged,
            ..
        } = self;
        let info = course
            .sandbox
            .build_info(course.request.template.clone(), &report);
        let guard = course.request.progress.step(PauseStep::Commit.doing());
        let committed = background(move || commit(staged, info)).await;
        drop(guard);
        match committed {
            Ok(build) => {
                let took = ms(since.elapsed());
                metrics::paused_step(PauseStep::Commit, took);
                report.steps.push(StepTime {
                    step: PauseStep::Commit,
                    ms: took,
                    skipped: None,
                });
                report.durable_ms = ms(stopped_at.elapsed());
                report.total_ms = ms(course.started.elapsed());
                Ok(Committed {
                    sandbox: course.sandbox,
                    build,
                    report,
                })
            }
            Err(error) => Err(course.roll_back(PauseStep::Commit, error).await),
        }
    }

    /// The report as the manifest holds it: the commit's own time cannot be in it.
    fn report(&self) -> PauseReport {
        PauseReport {
            ram_bytes: self.course.sandbox.spec().memory_bytes,
            guest_nonfree_bytes: self.course.guest_nonfree_bytes,
            steps: self.course.steps.clone(),
            reclaim: self.course.reclaim.clone(),
            drain: self.course.drain.clone(),
            drain_removes: self.course.drain_removes,
            scan: self.course.scan.clone(),
            user_frozen_ms: ms(self.course.user_frozen),
            freeze_ms: ms(self.freeze),
            durable_ms: ms(self.stopped_at.elapsed()),
            total_ms: ms(self.course.started.elapsed()),
            memory: self.memory,
            disk: self.disk,
            vmstate_bytes: self.vmstate_bytes,
        }
    }
}

fn commit(staged: StagedBuild, info: BuildInfo) -> Result<torpor_build::Build, StepError> {
    Ok(staged.commit(info)?)
}

/// The guest goes on, or cannot; its build is not durable yet.
pub(super) struct GoneOn {
    written: Written,
    mark: Option<SharedTracker>,
    resumed: Result<(), StepError>,
    not_thawed: Option<StepError>,
}

impl GoneOn {
    /// Makes the build durable and visible, and the sandbox's parent.
    pub(super) async fn commit(self) -> Result<Checkpointed, PauseFailure> {
        let Committed {
            mut sandbox,
            build,
            report,
        } = self.written.commit().await?;
        if let Err(source) = self.resumed {
            return Err(PauseFailure::Lost {
                step: PauseStep::GoOn,
                source,
                rollback: None,
                last_build: Some(build.id()),
            });
        }
        // Without it the next pause stores more, and no less right.
        if let Err(error) = sandbox.adopt(&build, self.mark).await {
            tracing::warn!(%error, "the next build is not made on top of this one");
        }
        Ok(Checkpointed {
            sandbox,
            build,
            report,
            not_thawed: self.not_thawed,
        })
    }
}

/// The build is durable.
pub(super) struct Committed {
    sandbox: Sandbox,
    build: torpor_build::Build,
    report: PauseReport,
}

impl Committed {
    /// Lets the VMM go.
    pub(super) async fn end(self) -> Paused {
        self.sandbox.end().await;
        Paused {
            build: self.build,
            report: self.report,
        }
    }
}
