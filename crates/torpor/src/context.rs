//! What every command has: where to print, where the storage is, and which builds are to be deleted
//! at the end.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use torpor_build::{Build, BuildId, Error as BuildError, Storage};
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
}

impl Context {
    pub(crate) fn new(output: Output, storage: Option<PathBuf>) -> Result<Self, CliError> {
        Ok(Self {
            output,
            storage: storage.map_or_else(default_storage, Ok)?,
            provisional: Mutex::default(),
        })
    }

    /// The storage's directory, which need not exist yet.
    pub(crate) fn storage_dir(&self) -> &PathBuf {
        &self.storage
    }

    /// Opens the storage, for what needs no VMM.
    pub(crate) fn open_storage(&self) -> Result<Storage, CliError> {
        Ok(Storage::open(&self.storage)?)
    }

    /// Opens all that running a guest needs.
    pub(crate) async fn open_host(&self, run: &RunArgs) -> Result<Host, CliError> {
        named_file("QEMU", run.qemu.as_deref())?;
        named_file("flag file", run.flags.as_deref())?;
        let options = HostOptions {
            storage: self.storage.clone(),
            qemu: run.qemu.clone(),
            flags: run.flags.clone(),
            tracking: run.write_tracking.forced(),
        };
        Ok(Host::open(options).await?)
    }

    /// A new build's id. The build is deleted when this command ends, unless it is announced.
    pub(crate) fn new_build_id(&self) -> BuildId {
        let id = BuildId::random();
        self.with_provisional(|ids| ids.insert(id));
        id
    }

    /// The build stays: the user is told of it.
    pub(crate) fn announce(&self, id: &BuildId) {
        self.with_provisional(|ids| ids.remove(id));
    }

    /// Deletes a build that nobody was told of, now rather than at the end.
    pub(crate) async fn discard(&self, build: Build) -> Result<(), CliError> {
        let (storage, id) = (build.storage().clone(), build.id());
        drop(build);
        blocking(move || Ok(storage.delete_build(&id)?)).await?;
        self.announce(&id);
        Ok(())
    }

    /// Deletes what was not announced. Called when nothing of the command runs any more.
    pub(crate) fn clean_up(&self) {
        let ids = self.with_provisional(std::mem::take);
        if ids.is_empty() {
            return;
        }
        let storage = match Storage::open(&self.storage) {
            Ok(storage) => storage,
            Err(error) => return tracing::warn!(%error, "left-over builds are not looked for"),
        };
        for id in ids {
            match storage.delete_build(&id) {
                Ok(()) | Err(BuildError::UnknownBuild { .. }) => {}
                Err(error) => tracing::warn!(%id, %error, "an unfinished command's build stays"),
            }
        }
    }

    fn with_provisional<T>(&self, action: impl FnOnce(&mut BTreeSet<BuildId>) -> T) -> T {
        action(
            &mut self
                .provisional
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

fn default_storage() -> Result<PathBuf, CliError> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    home.map(|home| PathBuf::from(home).join(".local/share/torpor"))
        .ok_or_else(|| CliError::Usage("HOME is not set: give --storage DIR".to_owned()))
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
        let storage = context.open_storage().unwrap();
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
        context.clean_up();
        let left: Vec<_> = storage
            .list_builds()
            .unwrap()
            .iter()
            .map(|b| b.id)
            .collect();
        assert_eq!(left, [kept]);
    }
}
