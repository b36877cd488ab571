//! Why a command failed, and the exit code that says so to a script.
//!
//! The lower crates' errors name the thing and the next step; here they are only sorted.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use torpor_build::{BuildId, Error as BuildError, Name};
use torpor_guest::GuestError;
use torpor_sandbox::error::{StartError, StepError};
use torpor_sandbox::inspect::InspectError;
use torpor_sandbox::pause::report::PauseStep;
use torpor_vmm::VmmExit;

use crate::context::Kept;

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NOT_FOUND: u8 = 3;
const REFUSED: u8 = 4;
const COMMAND_FAILED: u8 = 5;
const LOST: u8 = 6;
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error("{0}; `torpor help` shows what there is")]
    Usage(String),
    #[error("the {role} {} does not exist", path.display())]
    NoFile { role: &'static str, path: PathBuf },
    #[error(transparent)]
    Build(Box<BuildError>),
    #[error(transparent)]
    Start(Box<StartError>),
    #[error(transparent)]
    Inspect(Box<InspectError>),
    #[error("the guest fails: {0}")]
    Guest(#[source] Box<GuestError>),
    #[error(
        "the pause failed at `{step}`: {source}; the sandbox ran on as before and has been ended \
         with this command"
    )]
    NotPaused {
        step: PauseStep,
        source: Box<StepError>,
    },
    #[error(
        "build {build} is stored, and the sandbox could not go on after it: {source}; resume that build"
    )]
    NotThawed {
        build: BuildId,
        source: Box<StepError>,
    },
    #[error(
        "the shell was ended because the guest did not take the last {bytes} bytes that were typed \
         (or took only a part of them): {source}"
    )]
    InputLost {
        bytes: usize,
        source: Box<GuestError>,
    },
    /// A pause that lost the sandbox; the failure says what is intact.
    #[error("{0}")]
    PauseLost(String),
    #[error("the sandbox is lost: its VMM {exit}{}; {}", because(why.as_ref()), last_build(*parent))]
    Lost {
        exit: Box<VmmExit>,
        why: Option<String>,
        parent: Option<BuildId>,
    },
    #[error("the command of {option} failed in the guest: {status}; the sandbox was discarded")]
    Command {
        option: &'static str,
        status: String,
    },
    #[error(
        "the command of --ready-cmd did not succeed within {waited_s} s ({last}); the sandbox was \
         discarded"
    )]
    NotReady { waited_s: u64, last: String },
    #[error("template {name} was not given the new build: {source}; that build was deleted again")]
    NotNamed { name: Name, source: Box<BuildError> },
    #[error("{problems} problem(s) found in build {build}; the first: {first}")]
    Damaged {
        build: BuildId,
        problems: usize,
        first: Box<BuildError>,
    },
    #[error("this host cannot run the main job yet: {0}")]
    HostNotReady(String),
    #[error("cannot {what}: {source}")]
    System {
        what: &'static str,
        source: io::Error,
    },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("torpor has a bug: {0}; please report it")]
    Panicked(String),
    #[error("interrupted by {signal}; {}", outcome(kept))]
    Interrupted {
        signal: &'static str,
        /// What was complete all the same.
        kept: Vec<Kept>,
    },
}

fn outcome(kept: &[Kept]) -> String {
    if kept.is_empty() {
        return "what was under way is undone".to_owned();
    }
    let kept: Vec<_> = kept.iter().map(ToString::to_string).collect();
    format!("but {} was complete already and stays", kept.join(", "))
}

fn because(why: Option<&String>) -> String {
    why.map_or_else(String::new, |why| format!(", because {why}"))
}

fn last_build(parent: Option<BuildId>) -> String {
    parent.map_or_else(
        || "it had no build yet".to_owned(),
        |id| format!("its last build {id} is intact, resume that"),
    )
}

impl CliError {
    /// For `map_err` on a system call.
    pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }

    /// The message, with those of its causes that it does not contain.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let said = error.to_string();
            if !text.contains(&said) {
                text = format!("{text}: {said}");
            }
            cause = error.source();
        }
        text
    }

    /// The exit code that the command line documents.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::NoFile { .. } => NOT_FOUND,
            Self::Build(error) => of_build(error),
            Self::NotNamed { source, .. } => of_build(source),
            Self::Start(error) => of_start(error),
            Self::Inspect(error) => of_inspection(error),
            Self::NotPaused { source, .. } => match &**source {
                StepError::Build(error) => of_build(error),
                _ => FAILED,
            },
            Self::PauseLost(_) | Self::NotThawed { .. } | Self::Lost { .. } => LOST,
            Self::Command { .. } | Self::NotReady { .. } => COMMAND_FAILED,
            Self::Interrupted { .. } => INTERRUPTED,
            Self::Guest(_)
            | Self::InputLost { .. }
            | Self::Damaged { .. }
            | Self::HostNotReady(_)
            | Self::System { .. }
            | Self::Write { .. }
            | Self::Panicked(_) => FAILED,
        }
    }
}

fn of_build(error: &BuildError) -> u8 {
    match error {
        BuildError::UnknownBuild { .. }
        | BuildError::UnknownTemplate { .. }
        | BuildError::UnknownImage { .. } => NOT_FOUND,
        BuildError::Id(_) | BuildError::NameIsAnId { .. } => USAGE,
        BuildError::BuildExists { .. }
        | BuildError::BuildBusy { .. }
        | BuildError::BuildInUse { .. }
        | BuildError::HasChildren { .. }
        | BuildError::MayHaveChildren { .. }
        | BuildError::NamedByTemplate { .. }
        | BuildError::ParentGone { .. }
        | BuildError::ImageNeeded { .. }
        | BuildError::ImageMayBeNeeded { .. }
        | BuildError::ImageInUse { .. } => REFUSED,
        _ => FAILED,
    }
}

fn of_inspection(error: &InspectError) -> u8 {
    match error {
        InspectError::Build(error) => of_build(error),
        InspectError::NotRunning { .. } => NOT_FOUND,
        _ => FAILED,
    }
}

fn of_start(error: &StartError) -> u8 {
    match error {
        StartError::Build(error) => of_build(error),
        StartError::Identity { .. }
        | StartError::OtherVmm { .. }
        | StartError::VmmMissing { .. }
        | StartError::UnknownVmm { .. } => REFUSED,
        _ => FAILED,
    }
}

/// A file that was named on the command line exists.
pub(crate) fn named_file(role: &'static str, path: Option<&Path>) -> Result<(), CliError> {
    match path {
        Some(path) if !path.exists() => Err(CliError::NoFile {
            role,
            path: path.to_owned(),
        }),
        _ => Ok(()),
    }
}

impl From<BuildError> for CliError {
    fn from(error: BuildError) -> Self {
        Self::Build(Box::new(error))
    }
}

impl From<InspectError> for CliError {
    fn from(error: InspectError) -> Self {
        Self::Inspect(Box::new(error))
    }
}

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        Self::Start(Box::new(error))
    }
}

impl From<GuestError> for CliError {
    fn from(error: GuestError) -> Self {
        Self::Guest(Box::new(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_into_a_taken_id_is_a_refusal_and_a_full_disk_a_failure() {
        let id = BuildId::random();
        let not_paused = |source: BuildError| CliError::NotPaused {
            step: PauseStep::Commit,
            source: Box::new(StepError::Build(source)),
        };
        assert_eq!(
            not_paused(BuildError::BuildExists { id }).exit_code(),
            REFUSED
        );
        let full = BuildError::Full {
            action: "write",
            path: PathBuf::from("memory.data"),
            source: io::ErrorKind::StorageFull.into(),
        };
        assert_eq!(not_paused(full).exit_code(), FAILED);
    }

    #[test]
    fn a_cause_is_told_once() {
        let source = io::Error::other("the pipe burst");
        let error = CliError::System {
            what: "listen",
            source,
        };
        assert_eq!(error.with_causes(), "cannot listen: the pipe burst");
    }
}
