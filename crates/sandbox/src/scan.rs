//! The free-page scan: which pages of a stopped guest are nobody's, by its kernel's own metadata.
//!
//! Best effort: a guest that may not or cannot be scanned is captured without it, and the report
//! says why. What the guest's memory says is the guest's word; `torpor_anatomy` bounds all work on
//! it. Why the answer is exact, and where it would not be, is in docs/capture.md.

use serde::{Deserialize, Serialize};
use torpor_anatomy::{GuestKernel, NoteLocation, refusal};
use torpor_build::{PageRun, Storage};

use crate::physical::StoppedMemory;
use crate::spec::GuestSpec;

/// How a scan ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScanOutcome {
    /// The free pages are known, each of them.
    Scanned,
    /// No page was taken as free, and why.
    NotScanned(String),
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanReport {
    /// How it ended.
    pub outcome: ScanOutcome,
    /// The guest's kernel, as its own note names it.
    pub kernel_release: Option<String>,
    /// Pages on the kernel's free lists.
    pub free_pages: u64,
    /// Pages that the balloon holds.
    pub balloon_pages: u64,
}

impl ScanReport {
    pub(crate) fn not_scanned(why: String) -> Self {
        tracing::info!(%why, "the guest is not scanned");
        Self {
            outcome: ScanOutcome::NotScanned(why),
            kernel_release: None,
            free_pages: 0,
            balloon_pages: 0,
        }
    }

    /// Why no page was taken as free, if none was.
    #[must_use]
    pub fn why_not(&self) -> Option<&str> {
        match &self.outcome {
            ScanOutcome::Scanned => None,
            ScanOutcome::NotScanned(why) => Some(why),
        }
    }
}

/// Whether a guest may be scanned, decided before it is stopped: where its kernel says that its
/// note is, or why it may not be.
pub(crate) type Permission = Result<NoteLocation, String>;

/// Asks configuration and command line whether the guest's free pages are without meaning.
pub(crate) fn permission(
    storage: &Storage,
    spec: &GuestSpec,
    note: Option<NoteLocation>,
) -> Permission {
    let config = storage.read_kernel_config(&spec.kernel);
    if let Some(refusal) = refusal(config.as_deref(), &spec.cmdline) {
        return Err(refusal.to_string());
    }
    note.ok_or_else(|| "the guest tells of no crash note (/sys/kernel/vmcoreinfo)".to_owned())
}

/// Finds the free pages, by their place in the memory image and in page order.
pub(crate) fn scan(memory: &StoppedMemory, permission: &Permission) -> (ScanReport, Vec<PageRun>) {
    let note = match permission {
        Ok(note) => *note,
        Err(why) => return (ScanReport::not_scanned(why.clone()), Vec::new()),
    };
    let found =
        GuestKernel::find(memory, note).and_then(|kernel| Ok((kernel.free_pages(memory)?, kernel)));
    let (free, kernel) = match found {
        Ok(found) => found,
        Err(error) => return (ScanReport::not_scanned(error.to_string()), Vec::new()),
    };
    let runs = (free.runs.iter())
        .flat_map(|run| memory.image_pages(*run))
        .collect();
    let report = ScanReport {
        outcome: ScanOutcome::Scanned,
        kernel_release: Some(kernel.release().to_owned()),
        free_pages: free.buddy_pages,
        balloon_pages: free.balloon_pages,
    };
    (report, runs)
}
