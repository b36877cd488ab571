//! Flags: what an operator turns at run time, without a restart and without rebuilding a template.
//!
//! Flags are evaluated through OpenFeature's SDK, so that a host which runs flagd can plug its
//! provider in; the provider that ships with torpor is `FlagFile`, a JSON file:
//!
//! ```json
//! {
//!   "flags": { "reclaim-on-pause": true },
//!   "templates": { "python": { "free-page-hinting-timeout-ms": 2000 } },
//!   "sandboxes": { "7d3f…": { "guest-pause-reclaim": { "fstrim": 0 } } }
//! }
//! ```
//!
//! The nearest scope wins: sandbox, then template, then everything, then the built-in default.
//!
//! Invariants:
//! - Flags are read **once**, at the start of an operation, into a plain struct ([`PauseFlags`],
//!   [`TemplateFlags`]); below that nobody asks.
//! - The file is looked at whenever flags are read: what is written before a pause begins holds
//!   for that pause. (A watcher thread would only add a moment in which an edit is not seen yet.)
//! - A file that cannot be read or has a mistake never fails a pause: the last good contents hold,
//!   the mistake is logged once per change. Only *opening* a flag file reports it as an error,
//!   because then somebody is there to read it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use open_feature::provider::{FeatureProvider, ProviderMetadata, ResolutionDetails};
use open_feature::{
    Client, EvaluationContext, EvaluationError, EvaluationErrorCode, EvaluationResult, OpenFeature,
    StructValue, Value,
};
use serde::{Deserialize, Serialize};
use torpor_guest::ReclaimCaps;

/// Largest flag file that is read: a hundred bytes a scope, thousands of scopes.
const FLAG_FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest ceiling a flag may set for a drain or a reclaim step: ten minutes, the longest pause an
/// operator could mean.
const CEILING_MS_MAX: u64 = 600_000;

const REPORTING: &str = "free-page-reporting";
const DRAIN_CEILING: &str = "free-page-hinting-timeout-ms";
const RECLAIM: &str = "reclaim-on-pause";
const SCAN: &str = "free-page-scan";
const REFERENCES: &str = "disk-references";
const RECLAIM_CAPS: &str = "guest-pause-reclaim";

/// Why a flag file was refused.
#[derive(Debug, thiserror::Error)]
pub enum FlagError {
    /// The file could not be read.
    #[error("cannot read the flag file {path}: {source}")]
    Read {
        /// The flag file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than any flag file that makes sense.
    #[error(
        "the flag file {path} has {bytes} bytes, more than {FLAG_FILE_BYTES_MAX}: is it the right file?"
    )]
    TooLarge {
        /// The flag file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not what the module's documentation shows.
    #[error("the flag file {path} has a mistake: {source}")]
    Parse {
        /// The flag file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
}

/// The reclaim steps' caps as a flag file gives them: what is not named keeps its default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct CapsInFile {
    sync: u32,
    drop_caches: u32,
    compact_memory: u32,
    fstrim: u32,
}

impl Default for CapsInFile {
    fn default() -> Self {
        let caps = ReclaimCaps::default();
        Self {
            sync: caps.sync_ms,
            drop_caches: caps.drop_caches_ms,
            compact_memory: caps.compact_memory_ms,
            fstrim: caps.fstrim_ms,
        }
    }
}

/// One scope of a flag file. An unknown name is a mistake, not a flag that silently does nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Scope {
    #[serde(skip_serializing_if = "Option::is_none")]
    free_page_reporting: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_page_hinting_timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reclaim_on_pause: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_page_scan: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_references: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_pause_reclaim: Option<CapsInFile>,
}

impl Scope {
    fn value(&self, flag: &str) -> Option<Value> {
        match flag {
            REPORTING => self.free_page_reporting.map(Value::Bool),
            DRAIN_CEILING => self.free_page_hinting_timeout_ms.map(int),
            RECLAIM => self.reclaim_on_pause.map(Value::Bool),
            SCAN => self.free_page_scan.map(Value::Bool),
            REFERENCES => self.disk_references.map(Value::Bool),
            RECLAIM_CAPS => self.guest_pause_reclaim.map(|caps| {
                let mut fields = StructValue::default();
                for (name, ms) in [
                    ("sync", caps.sync),
                    ("drop_caches", caps.drop_caches),
                    ("compact_memory", caps.compact_memory),
                    ("fstrim", caps.fstrim),
                ] {
                    fields.add_field(name, int(u64::from(ms)));
                }
                Value::Struct(fields)
            }),
            _ => None,
        }
    }
}

fn int(ms: u64) -> Value {
    Value::Int(i64::try_from(ms.min(CEILING_MS_MAX)).unwrap_or(i64::MAX))
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Contents {
    flags: Scope,
    templates: BTreeMap<String, Scope>,
    sandboxes: BTreeMap<String, Scope>,
}

/// What tells one state of the file from another: (modified, length).
type Stamp = (SystemTime, u64);

#[derive(Debug)]
struct Held {
    stamp: Option<Stamp>,
    contents: Contents,
}

/// The provider that reads a JSON file, anew whenever it has changed.
#[derive(Debug)]
struct FlagFile {
    path: Option<PathBuf>,
    held: Mutex<Held>,
    metadata: ProviderMetadata,
}

impl FlagFile {
    /// Opens the flag file; without a path every flag has its default.
    fn open(path: Option<&Path>) -> Result<Self, FlagError> {
        let held = match path {
            None => Held {
                stamp: None,
                contents: Contents::default(),
            },
            Some(path) => read(path)?,
        };
        Ok(Self {
            path: path.map(Path::to_path_buf),
            held: Mutex::new(held),
            metadata: ProviderMetadata::new("torpor flag file"),
        })
    }

    fn resolve(&self, flag: &str, context: &EvaluationContext) -> EvaluationResult<Value> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = &self.path {
            refresh(path, &mut held);
        }
        let contents = &held.contents;
        let template = context
            .custom_fields
            .get("template")
            .and_then(|field| field.as_str());
        let sandbox = context.targeting_key.as_deref();
        let scopes = [
            sandbox.and_then(|id| contents.sandboxes.get(id)),
            template.and_then(|name| contents.templates.get(name)),
            Some(&contents.flags),
        ];
        scopes
            .into_iter()
            .flatten()
            .find_map(|scope| scope.value(flag))
            .ok_or_else(|| {
                EvaluationError::builder()
                    .code(EvaluationErrorCode::FlagNotFound)
                    .message(format!("{flag} is not set"))
                    .build()
            })
    }
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    let meta = std::fs::metadata(path)?;
    Ok((meta.modified()?, meta.len()))
}

fn read(path: &Path) -> Result<Held, FlagError> {
    let failed = |source| FlagError::Read {
        path: path.to_path_buf(),
        source,
    };
    let stamp = stamp(path).map_err(failed)?;
    if stamp.1 > FLAG_FILE_BYTES_MAX {
        return Err(FlagError::TooLarge {
            path: path.to_path_buf(),
            bytes: stamp.1,
        });
    }
    let text = std::fs::read(path).map_err(failed)?;
    let contents = serde_json::from_slice(&text).map_err(|source| FlagError::Parse {
        path: path.to_path_buf(),
        source,
    })?;
    Ok(Held {
        stamp: Some(stamp),
        contents,
    })
}

/// Takes over the file's newest good contents.
fn refresh(path: &Path, held: &mut Held) {
    let now = stamp(path).ok();
    if now.is_some() && now == held.stamp {
        return;
    }
    match read(path) {
        Ok(newest) => *held = newest,
        Err(error) => {
            if held.stamp != now {
                tracing::warn!(%error, "the flags stay as they were");
            }
            held.stamp = now;
        }
    }
}

#[async_trait]
impl FeatureProvider for FlagFile {
    fn metadata(&self) -> &ProviderMetadata {
        &self.metadata
    }

    async fn resolve_bool_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> EvaluationResult<ResolutionDetails<bool>> {
        typed(self.resolve(flag, context)?, |value| value.as_bool())
    }

    async fn resolve_int_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> EvaluationResult<ResolutionDetails<i64>> {
        typed(self.resolve(flag, context)?, |value| value.as_i64())
    }

    async fn resolve_float_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> EvaluationResult<ResolutionDetails<f64>> {
        typed(self.resolve(flag, context)?, |value| value.as_f64())
    }

    async fn resolve_string_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> EvaluationResult<ResolutionDetails<String>> {
        typed(self.resolve(flag, context)?, |value| {
            value.as_str().map(str::to_owned)
        })
    }

    async fn resolve_struct_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> EvaluationResult<ResolutionDetails<StructValue>> {
        typed(self.resolve(flag, context)?, |value| {
            value.as_struct().cloned()
        })
    }
}

fn typed<T>(
    value: Value,
    convert: impl FnOnce(&Value) -> Option<T>,
) -> EvaluationResult<ResolutionDetails<T>> {
    convert(&value).map(ResolutionDetails::new).ok_or_else(|| {
        EvaluationError::builder()
            .code(EvaluationErrorCode::TypeMismatch)
            .message(format!("{value:?} is of another type"))
            .build()
    })
}

/// Whom a flag is asked for.
#[derive(Debug, Clone, Default)]
pub struct FlagSubject {
    /// The sandbox's id, once there is one.
    pub sandbox: Option<String>,
    /// The template that the sandbox descends from.
    pub template: Option<String>,
}

impl FlagSubject {
    fn context(&self) -> EvaluationContext {
        let mut context = EvaluationContext::default();
        if let Some(sandbox) = &self.sandbox {
            context = context.with_targeting_key(sandbox.clone());
        }
        if let Some(template) = &self.template {
            context = context.with_custom_field("template", template.clone());
        }
        context
    }
}

/// What a pause does beyond stopping and storing. Read once, when the pause begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseFlags {
    /// Ceiling of the drain, in milliseconds; 0 turns it off.
    pub drain_ceiling_ms: u64,
    /// Whether the guest is asked to give up what it does not need.
    pub reclaim: bool,
    /// Each reclaim step's cap.
    pub reclaim_caps: ReclaimCaps,
    /// Leave out the pages that the stopped guest's own metadata calls free.
    pub free_page_scan: bool,
    /// Store pages that are copies of the base image's blocks as references to them.
    pub disk_references: bool,
}

/// What touches a running guest is off; what only looks at a stopped one is on.
impl Default for PauseFlags {
    fn default() -> Self {
        Self {
            drain_ceiling_ms: 0,
            reclaim: false,
            reclaim_caps: ReclaimCaps::default(),
            free_page_scan: true,
            disk_references: true,
        }
    }
}

/// What is decided when a template is built. Read once, when it is booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TemplateFlags {
    /// Install the balloon with free page reporting.
    pub free_page_reporting: bool,
}

/// The flags of this process.
#[derive(Clone)]
pub struct Flags {
    client: Arc<Client>,
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flags").finish_non_exhaustive()
    }
}

impl Flags {
    /// Flags from a file, or the defaults without one.
    ///
    /// # Errors
    /// [`FlagError`] when the file cannot be read or has a mistake.
    pub async fn open(file: Option<&Path>) -> Result<Self, FlagError> {
        let provider = FlagFile::open(file)?;
        // An SDK of its own instead of the process-wide one: two hosts in one process (tests,
        // benches) keep their flags apart.
        let mut sdk = OpenFeature::default();
        sdk.set_provider(provider).await;
        Ok(Self {
            client: Arc::new(sdk.create_client()),
        })
    }

    /// What holds for a pause that begins now.
    pub async fn for_pause(&self, subject: &FlagSubject) -> PauseFlags {
        let context = subject.context();
        let defaults = PauseFlags::default();
        let (client, context) = (&self.client, Some(&context));
        let drain = client.get_int_value(DRAIN_CEILING, context, None).await;
        let reclaim = client.get_bool_value(RECLAIM, context, None).await;
        let caps = client
            .get_struct_value::<CapsValue>(RECLAIM_CAPS, context, None)
            .await;
        let scan = client.get_bool_value(SCAN, context, None).await;
        let references = client.get_bool_value(REFERENCES, context, None).await;
        PauseFlags {
            drain_ceiling_ms: drain
                .ok()
                .and_then(|ms| u64::try_from(ms).ok())
                .unwrap_or(defaults.drain_ceiling_ms),
            reclaim: reclaim.unwrap_or(defaults.reclaim),
            reclaim_caps: caps.map_or(defaults.reclaim_caps, |caps| caps.0),
            free_page_scan: scan.unwrap_or(defaults.free_page_scan),
            disk_references: references.unwrap_or(defaults.disk_references),
        }
    }

    /// What holds for a template that is booted now; `reporting` is its VMM's default.
    pub async fn for_template(&self, subject: &FlagSubject, reporting: bool) -> TemplateFlags {
        let context = subject.context();
        let asked = self
            .client
            .get_bool_value(REPORTING, Some(&context), None)
            .await;
        TemplateFlags {
            free_page_reporting: asked.unwrap_or(reporting),
        }
    }
}

struct CapsValue(ReclaimCaps);

impl TryFrom<StructValue> for CapsValue {
    type Error = String;

    fn try_from(value: StructValue) -> Result<Self, String> {
        let cap = |name: &str| {
            value
                .fields
                .get(name)
                .and_then(Value::as_i64)
                .and_then(|ms| u32::try_from(ms).ok())
                .ok_or_else(|| format!("{RECLAIM_CAPS} lacks {name}"))
        };
        Ok(Self(ReclaimCaps {
            sync_ms: cap("sync")?,
            drop_caches_ms: cap("drop_caches")?,
            compact_memory_ms: cap("compact_memory")?,
            fstrim_ms: cap("fstrim")?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        // A file system may keep times in coarse ticks; a length that differs tells them apart.
        std::fs::write(path, text).unwrap();
    }

    #[tokio::test]
    async fn without_a_file_nothing_touches_a_running_guest() {
        let flags = Flags::open(None).await.unwrap();
        let pause = flags.for_pause(&FlagSubject::default()).await;
        assert_eq!(pause, PauseFlags::default());
        assert!(!pause.reclaim);
        assert_eq!(pause.drain_ceiling_ms, 0);
        assert!(pause.free_page_scan && pause.disk_references);
    }

    #[tokio::test]
    async fn the_nearest_scope_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags.json");
        write(
            &path,
            r#"{"flags": {"free-page-hinting-timeout-ms": 1, "reclaim-on-pause": true},
                "templates": {"python": {"free-page-hinting-timeout-ms": 2}},
                "sandboxes": {"s1": {"free-page-hinting-timeout-ms": 3,
                                     "guest-pause-reclaim": {"fstrim": 0}}}}"#,
        );
        let flags = Flags::open(Some(&path)).await.unwrap();
        let ask = |sandbox: Option<&str>, template: Option<&str>| FlagSubject {
            sandbox: sandbox.map(str::to_owned),
            template: template.map(str::to_owned),
        };
        assert_eq!(flags.for_pause(&ask(None, None)).await.drain_ceiling_ms, 1);
        assert_eq!(
            flags
                .for_pause(&ask(Some("s2"), Some("python")))
                .await
                .drain_ceiling_ms,
            2
        );
        let nearest = flags.for_pause(&ask(Some("s1"), Some("python"))).await;
        assert_eq!(nearest.drain_ceiling_ms, 3);
        assert!(
            nearest.reclaim,
            "what a nearer scope does not name comes from the wider one"
        );
        assert_eq!(nearest.reclaim_caps.fstrim_ms, 0);
        assert_eq!(nearest.reclaim_caps.sync_ms, ReclaimCaps::default().sync_ms);
    }

    #[tokio::test]
    async fn an_edit_holds_for_the_next_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags.json");
        write(&path, r#"{"flags": {}}"#);
        let flags = Flags::open(Some(&path)).await.unwrap();
        assert!(!flags.for_pause(&FlagSubject::default()).await.reclaim);
        write(
            &path,
            r#"{"flags": {"reclaim-on-pause": true, "free-page-reporting": false}}"#,
        );
        assert!(flags.for_pause(&FlagSubject::default()).await.reclaim);
        assert!(
            !flags
                .for_template(&FlagSubject::default(), true)
                .await
                .free_page_reporting
        );
    }

    #[tokio::test]
    async fn a_mistake_later_on_leaves_the_last_good_flags() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags.json");
        write(&path, r#"{"flags": {"reclaim-on-pause": true}}"#);
        let flags = Flags::open(Some(&path)).await.unwrap();
        write(&path, "{ not json");
        assert!(flags.for_pause(&FlagSubject::default()).await.reclaim);
        std::fs::remove_file(&path).unwrap();
        assert!(flags.for_pause(&FlagSubject::default()).await.reclaim);
    }

    #[tokio::test]
    async fn an_unknown_flag_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags.json");
        write(&path, r#"{"flags": {"reclaim-on-pauze": true}}"#);
        let error = Flags::open(Some(&path)).await.unwrap_err().to_string();
        assert!(error.contains("flags.json"), "{error}");
        assert!(error.contains("reclaim-on-pauze"), "{error}");
    }
}
