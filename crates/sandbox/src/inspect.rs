//! A look at what a guest's memory is made of, by the guest's own page metadata: of a build, or of
//! a sandbox that runs, perhaps in another process.
//!
//! A running sandbox is found by its run directory, where its owner has left a `RunRecord`. Its
//! VMM is held still for the look ([`HeldVmm`]), for at most `LOOK_MAX`: its owner's commands wait
//! meanwhile, and must not time out. Nothing of it is changed.
//!
//! Of what a lazily resumed guest has not touched only the page metadata is read, from its parent
//! build. Whether other absent pages are zero follows from the parent's index. The look cannot know
//! which of them the guest has given back since (only its pager does), so a page that is in use, was
//! given back, and was not touched again, counts as not zero if it was not. Metadata is never given
//! back, so the classes are exact.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use torpor_anatomy::{
    AnatomyError, GuestKernel, NoteLocation, PageClass, PfnRun, PhysicalMemory as _,
};
use torpor_build::{Build, BuildId, Name, PAGE_SIZE, PageRun, Storage};
use torpor_vmm::{HeldVmm, MemoryMapping, RamSegment};

use crate::physical::{Content, Known, StoppedMemory, Walked};

/// Under this name a manifest holds its guest's [`MemoryLayout`].
pub(crate) const LAYOUT_KEY: &str = "memory_layout";
/// What a running sandbox's owner leaves in its run directory.
pub(crate) const RECORD_FILE: &str = "sandbox.json";
/// The same while it is written.
const RECORD_PART: &str = "sandbox.json.part";
/// A record has a few hundred bytes.
const RECORD_BYTES_MAX: u64 = 64 << 10;
/// Pages looked at for zeros at once: 1 MiB.
const LOOK_PAGES: u64 = 256;
/// Longest look: well below what the owner's commands to its VMM may take. Memory is read at some
/// GiB a second.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Where a guest sees its memory, and where its kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    /// The kernel's crash note; absent where the kernel has none.
    pub note: Option<NoteLocation>,
    /// RAM by guest-physical address.
    pub ram: Vec<RamSegment>,
}

impl MemoryLayout {
    /// Whether it can be the layout of this much memory: it comes from a file.
    fn fits(&self, memory_bytes: u64) -> bool {
        let page = PAGE_SIZE as u64;
        let mut at = 0;
        self.ram.iter().all(|segment| {
            let aligned = [
                segment.guest_addr,
                segment.len_bytes,
                segment.guest_offset_bytes,
            ]
            .iter()
            .all(|value| value.is_multiple_of(page));
            let in_order = segment.guest_addr >= at;
            let end = segment.guest_addr.checked_add(segment.len_bytes);
            let end_in_image = segment.guest_offset_bytes.checked_add(segment.len_bytes);
            at = end.unwrap_or(u64::MAX);
            let in_image = end_in_image.is_some_and(|end| end <= memory_bytes);
            aligned && in_order && end.is_some() && in_image
        })
    }
}

/// What others need to look into a running sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    pub(crate) vmm_pid: u32,
    /// When the VMM started, by the kernel's clock: tells it from a later process of its number.
    pub(crate) vmm_started: u64,
    /// Where the VMM has its guest's memory, if that is private to it.
    #[serde(default)]
    pub(crate) private: Option<Vec<MemoryMapping>>,
    /// The build whose pages the sandbox gets on demand.
    pub(crate) served_from: Option<BuildId>,
    pub(crate) layout: MemoryLayout,
}

impl RunRecord {
    /// Leaves the record in a run directory, whole for whoever looks at any moment. Not synced: it is
    /// worth nothing after a crash, and a resume waits for it.
    #[expect(clippy::disallowed_methods, reason = "it need not be durable")]
    pub(crate) fn leave_in(&self, run_dir: &Path) -> std::io::Result<()> {
        let part = run_dir.join(RECORD_PART);
        std::fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(part, run_dir.join(RECORD_FILE))
    }
}

/// When a process started, in clock ticks since the host's boot (proc_pid_stat(5), field 22).
pub(crate) fn started_at(pid: u32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let started = fields.split_whitespace().nth(19);
    started
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Storage or build.
    #[error(transparent)]
    Build(#[from] torpor_build::Error),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] torpor_vmm::VmmError),
    /// No such sandbox runs.
    #[error("no sandbox {name} runs{}", running_text(running))]
    NotRunning {
        /// What was asked for.
        name: Name,
        /// What runs.
        running: Vec<Name>,
    },
    /// The run directory's record cannot be used.
    #[error("cannot use {path}: {source}", path = path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The build does not say where its guest's memory is described.
    #[error(
        "build {0} does not say where its guest's memory is described: its kernel has no crash note, or an older torpor made it; pause it again with this one"
    )]
    NoNote(BuildId),
    /// The sandbox's kernel has no note.
    #[error("the kernel of sandbox {0} has no crash note (/sys/kernel/vmcoreinfo)")]
    NoNoteRunning(Name),
    /// The owner has ended it, or is about to.
    #[error("sandbox {0} has just ended")]
    Ended(Name),
    /// What is recorded of the memory's layout cannot be.
    #[error("the layout of the guest's memory that is recorded for {0} makes no sense")]
    Layout(String),
    /// The sandbox was let go before the look was complete.
    #[error(
        "looking took longer than {} ms, and the sandbox was let go; try again when the host is less busy",
        LOOK_MAX.as_millis()
    )]
    TooSlow,
    /// The guest's metadata.
    #[error("the guest's memory cannot be read: {0}")]
    Anatomy(#[from] AnatomyError),
    /// The guest's memory.
    #[error("the guest's memory cannot be read: {0}")]
    Memory(#[from] std::io::Error),
}

fn running_text(running: &[Name]) -> String {
    if running.is_empty() {
        return "; none does in this storage".to_owned();
    }
    let names: Vec<_> = running.iter().map(ToString::to_string).collect();
    format!("; these do: {}", names.join(", "))
}

/// Pages of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ClassPages {
    /// What they are used for.
    pub class: PageClass,
    /// How many.
    pub pages: u64,
    /// How many of them hold nothing but zeros; free pages are not looked at.
    pub zero_pages: u64,
}

/// Neighbouring pages of one kind, by their place in the memory image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookRun {
    /// Which pages.
    pub run: PageRun,
    /// What they are used for.
    pub class: PageClass,
    /// Whether they hold nothing but zeros.
    pub zero: bool,
}

/// What a guest's memory is made of.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryLook {
    /// The guest's kernel.
    pub kernel_release: String,
    /// The guest's RAM.
    pub ram_bytes: u64,
    /// Every class, with how much of the RAM it has.
    pub classes: Vec<ClassPages>,
    /// All RAM in the order of the memory image.
    #[serde(skip)]
    pub runs: Vec<LookRun>,
}

/// Looks into a build's memory.
///
/// # Errors
/// [`InspectError`].
pub fn look_into_build(build: &Build) -> Result<MemoryLook, InspectError> {
    let info = &build.manifest().info;
    let layout: MemoryLayout = match info.extra.get(LAYOUT_KEY).cloned() {
        Some(recorded) => serde_json::from_value(recorded)
            .ok()
            .filter(|layout: &MemoryLayout| layout.fits(info.memory_bytes))
            .ok_or_else(|| InspectError::Layout(format!("build {}", build.id())))?,
        None => MemoryLayout::default(),
    };
    let note = layout.note.ok_or(InspectError::NoNote(build.id()))?;
    let image = Arc::new(build.memory()?);
    let memory = StoppedMemory::new(layout.ram, Content::Image(Walked::new(image)));
    look(&memory, note)
}

/// Looks into the memory of a running sandbox, whose vCPUs stand still meanwhile.
///
/// Blocks, and must stay on one thread.
///
/// # Errors
/// [`InspectError`]; the sandbox runs on in any case.
pub fn look_into_sandbox(storage: &Storage, name: &Name) -> Result<MemoryLook, InspectError> {
    let running = storage.running_sandboxes()?;
    let not_running = || InspectError::NotRunning {
        name: name.clone(),
        running: running.clone(),
    };
    if !running.contains(name) {
        return Err(not_running());
    }
    let path = storage.run_path(name).join(RECORD_FILE);
    let record = read_record(&path).map_err(|source| InspectError::Record { path, source })?;
    let no_note = || InspectError::NoNoteRunning(name.clone());
    let note = record.layout.note.ok_or_else(no_note)?;
    let parent = match record.served_from {
        Some(id) => Some(Arc::new(storage.open_build(&id)?.memory()?)),
        None => None,
    };
    let held = HeldVmm::hold(record.vmm_pid, record.private)?;
    // While it is held its number cannot come to mean another process.
    if started_at(record.vmm_pid).ok() != Some(record.vmm_started) {
        return Err(InspectError::Ended(name.clone()));
    }
    let until = Instant::now() + LOOK_MAX;
    let memory = Arc::clone(held.memory());
    if !record.layout.fits(memory.len_bytes()?) {
        return Err(InspectError::Layout(format!("sandbox {name}")));
    }
    let content = match parent {
        None => Content::Held(memory),
        Some(parent) => Content::Lazy {
            held: memory,
            parent: Walked::new(parent),
            removed: Vec::new(),
        },
    };
    look(
        &StoppedMemory::new(record.layout.ram, content).until(until),
        note,
    )
}

fn read_record(path: &Path) -> std::io::Result<RunRecord> {
    let mut text = String::new();
    let file = File::open(path)?;
    file.take(RECORD_BYTES_MAX).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

/// Looks at all of a memory.
fn look(memory: &StoppedMemory, note: NoteLocation) -> Result<MemoryLook, InspectError> {
    let too_slow = |error| match memory.check_time() {
        Ok(()) => InspectError::from(error),
        Err(_) => InspectError::TooSlow,
    };
    let kernel = GuestKernel::find(memory, note).map_err(too_slow)?;
    let census = kernel.census(memory).map_err(too_slow)?;
    let mut runs = Vec::new();
    let mut buffer = vec![0; usize::try_from(LOOK_PAGES).unwrap_or(1) * PAGE_SIZE];
    for found in &census.runs {
        let pfns = PfnRun {
            first_pfn: found.first_pfn,
            pages: found.pages,
        };
        for run in memory.image_pages(pfns) {
            match found.class {
                // Nobody's content is nobody's business.
                PageClass::Free | PageClass::Balloon => push(&mut runs, run, found.class, false),
                class => split_by_zero(&mut runs, memory, run, class, &mut buffer)?,
            }
        }
    }
    let classes = PageClass::ALL.map(|class| {
        let of_class = || runs.iter().filter(move |run| run.class == class);
        ClassPages {
            class,
            pages: of_class().map(|run| run.run.pages).sum(),
            zero_pages: of_class()
                .filter(|run| run.zero)
                .map(|run| run.run.pages)
                .sum(),
        }
    });
    Ok(MemoryLook {
        kernel_release: kernel.release().to_owned(),
        ram_bytes: memory.ram().iter().map(|range| range.len_bytes).sum(),
        classes: classes.to_vec(),
        runs,
    })
}

fn split_by_zero(
    runs: &mut Vec<LookRun>,
    memory: &StoppedMemory,
    run: PageRun,
    class: PageClass,
    buffer: &mut [u8],
) -> Result<(), InspectError> {
    let (mut page, end) = (run.first_page, run.first_page + run.pages);
    while page < end {
        memory.check_time().map_err(|_| InspectError::TooSlow)?;
        let (pages, known) = memory.content().known(page, (end - page).min(LOOK_PAGES))?;
        let part = PageRun {
            first_page: page,
            pages,
        };
        match known {
            Known::Zero => push(runs, part, class, true),
            Known::NotZero => push(runs, part, class, false),
            Known::Present => {
                let bytes = &mut buffer[..usize::try_from(pages).unwrap_or(0) * PAGE_SIZE];
                memory.content().read_at(page * PAGE_SIZE as u64, bytes)?;
                for (first_page, bytes) in (page..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                    let one = PageRun {
                        first_page,
                        pages: 1,
                    };
                    push(runs, one, class, bytes.iter().all(|byte| *byte == 0));
                }
            }
        }
        page += pages;
    }
    Ok(())
}

fn push(runs: &mut Vec<LookRun>, run: PageRun, class: PageClass, zero: bool) {
    match runs.last_mut() {
        Some(last)
            if (last.class, last.zero) == (class, zero)
                && last.run.first_page + last.run.pages == run.first_page =>
        {
            last.run.pages += run.pages;
        }
        _ => runs.push(LookRun { run, class, zero }),
    }
}
