//! What every command has: where to print, where the storage is, and which builds are to be deleted
//! at the end.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use torpor_build::{Build, BuildId, Error as BuildError, Name, Storage};
use torpor_sandbox::host::{Host, HostOptions};

use crate::cli::RunArgs;
use crate::error::{CliError, named_file};
use crate::output::Output;

/// What every command has.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) output: Output,
    storage: PathBuf,
    /// Builds that this command makes and has not yet told anyone about. Their ids are random, so
    /// nobody else can have made them.
    provisional: Mutex<BTreeSet<BuildId>>,
    /// The build whose id the user chose. It is never deleted.
    named: Mutex<Option<BuildId>>,
}

/// What an interrupted command has made nevertheless.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Build(BuildId),
    Template { name: Name, id: BuildId },
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Build(id) => write!(f, "build {id}"),
            Self::Template { name, id } => write!(f, "template {name} (build {id})"),
        }
    }
}

impl Context {
    pub(crate) fn new(output: Output, storage: Option<PathBuf>) -> Result<Self, CliError> {
        Ok(Self {
            output,
            storage: storage.map_or_else(default_storage, Ok)?,
            provisional: Mutex::default(),
            named: Mutex::default(),
        })
    }

    /// The storage's directory, which need not exist yet.
    pub(crate) fn storage_dir(&self) -> &PathBuf {
        &self.storage
    }

    /// Opens the storage, for what needs no VMM.
    pub(crate) async fn open_storage(&self) -> Result<Storage, CliError> {
        let dir = self.storage.clone();
        blocking(move || Ok(Storage::open(&dir)?)).await
    }

    /// Opens all that running a guest needs.
    pub(crate) async fn open_host(&self, run: &RunArgs) -> Result<Host, CliError> {
        named_file("QEMU", run.vmm.qemu.as_deref())?;
        named_file("Firecracker", run.vmm.firecracker.as_deref())?;
        named_file("flag file", run.flags.as_deref())?;
        let options = HostOptions {
            storage: self.storage.clone(),
            vmm: run.vmm.options(),
            flags: run.flags.clone(),
            tracking: run.write_tracking.forced(),
            patience: run.guest_patience.map(Duration::from_secs),
        };
        Ok(Host::open(options).await?)
    }

    /// A new build's id. The build is deleted when this command ends, unless it is announced.
    pub(crate) fn new_build_id(&self) -> BuildId {
        let id = BuildId::random();
        lock(&self.provisional).insert(id);
        id
    }

    /// The build stays: the user is told of it.
    pub(crate) fn announce(&self, id: &BuildId) {
        lock(&self.provisional).remove(id);
    }

    /// Deletes a build that nobody was told of, now rather than at the end.
    pub(crate) async fn discard(&self, build: Build) -> Result<(), CliError> {
        let (storage, id) = (build.storage().clone(), build.id());
        drop(build);
        blocking(move || Ok(storage.delete_build(&id)?)).await?;
        self.announce(&id);
        Ok(())
    }

    /// The command line names the id of the build to make, which was free a moment ago.
    pub(crate) fn will_make(&self, id: BuildId) {
        *lock(&self.named) = Some(id);
    }

    /// Deletes what was not announced, and tells what of the command's builds is there to stay: a
    /// step that was interrupted may have come to its end in the background. Called when nothing of
    /// the command runs any more.
    pub(crate) fn clean_up(&self) -> Vec<Kept> {
        let ids = std::mem::take(&mut *lock(&self.provisional));
        let named = lock(&self.named).take();
        if ids.is_empty() && named.is_none() {
            return Vec::new();
        }
        let storage = match Storage::open(&self.storage) {
            Ok(storage) => storage,
            Err(error) => {
                tracing::warn!(%error, "left-over builds are not looked for");
                return Vec::new();
            }
        };
        let named = named.filter(|id| storage.resolve(&id.to_string()).is_ok());
        let mut kept: Vec<_> = named.map(Kept::Build).into_iter().collect();
        for id in ids {
            match storage.delete_build(&id) {
                Ok(()) | Err(BuildError::UnknownBuild { .. }) => {}
                // Its name was given to it before the interrupt: all is done.
                Err(BuildError::NamedByTemplate { templates, .. }) => {
                    kept.extend(
                        templates
                            .into_iter()
                            .map(|name| Kept::Template { name, id }),
                    );
                }
                Err(error) => tracing::warn!(%id, %error, "an unfinished command's build stays"),
            }
        }
        kept
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn default_storage() -> Result<PathBuf, CliError> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    home.map(|home| PathBuf::from(home).join(".local/share/torpor"))
        .ok_or_else(|| CliError::Usage("HOME is not set: give --storage DIR".to_owned()))
}

/// The build that the user means, looked up without blocking the runtime.
pub(crate) async fn resolve(host: &Host, text: &str) -> Result<BuildId, CliError> {
    let (storage, text) = (host.storage().clone(), text.to_owned());
    blocking(move || Ok(storage.resolve(&text)?)).await
}

/// Runs work that blocks on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(CliError::Panicked(error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use torpor_build::BuildInfo;

    #[test]
    fn builds_that_were_not_announced_go_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::new(Output::new(false), Some(dir.path().to_owned())).unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        let commit = |id| {
            drop(
                storage
                    .begin_build(id)
                    .unwrap()
                    .commit(BuildInfo::default()),
            )
        };
        let (kept, dropped) = (context.new_build_id(), context.new_build_id());
        commit(kept);
        commit(dropped);
        context.new_build_id();
        context.announce(&kept);
        assert_eq!(context.clean_up(), []);
        let left: Vec<_> = storage
            .list_builds()
            .unwrap()
            .iter()
            .map(|b| b.id)
            .collect();
        assert_eq!(left, [kept]);
    }

    #[test]
    fn what_was_complete_when_the_interrupt_came_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::new(Output::new(false), Some(dir.path().to_owned())).unwrap();
        let storage = Storage::open(dir.path()).unwrap();
        let commit = |id| {
            drop(
                storage
                    .begin_build(id)
                    .unwrap()
                    .commit(BuildInfo::default()),
            )
        };
        // Not there: nothing to tell.
        let chosen = BuildId::random();
        context.will_make(chosen);
        assert_eq!(context.clean_up(), []);
        context.will_make(chosen);
        let named = context.new_build_id();
        commit(chosen);
        commit(named);
        let name: Name = "python".parse().unwrap();
        storage.set_template(&name, &named).unwrap();
        let expected = [Kept::Build(chosen), Kept::Template { name, id: named }];
        assert_eq!(context.clean_up(), expected);
        assert_eq!(storage.list_builds().unwrap().len(), 2);
    }
}
