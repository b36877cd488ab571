//! What can go wrong in a sandbox's life, with the lower crates' errors as they are: they name the
//! thing and the next step.

use std::path::PathBuf;

use torpor_build::BuildId;

/// Why one step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The build that is read or written.
    #[error(transparent)]
    Build(#[from] torpor_build::Error),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] torpor_vmm::VmmError),
    /// The pager.
    #[error(transparent)]
    Pager(#[from] torpor_pager::PagerError),
    /// The agent in the guest.
    #[error(transparent)]
    Guest(#[from] torpor_guest::GuestError),
    /// The writable disk.
    #[error(transparent)]
    Disk(#[from] crate::disk::DiskError),
    /// The guest's memory file.
    #[error("the guest's memory cannot be read: {0}")]
    Memory(#[source] std::io::Error),
    /// Work in the background panicked: a bug.
    #[error("torpor has a bug: {0}; please report it")]
    Panicked(String),
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Storage, build, image or name.
    #[error(transparent)]
    Build(#[from] torpor_build::Error),
    /// The kernel, the base image or the agent is missing.
    #[error(transparent)]
    Assets(#[from] crate::assets::AssetError),
    /// The root file system.
    #[error(transparent)]
    Rootfs(#[from] crate::rootfs::RootfsError),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] crate::initramfs::InitramfsError),
    /// The flag file.
    #[error(transparent)]
    Flags(#[from] crate::flags::FlagError),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] torpor_vmm::VmmError),
    /// Another VMM made the build.
    #[error("build {build} cannot be resumed here: {source}")]
    Identity {
        /// The build.
        build: BuildId,
        /// What differs, and the next step.
        source: torpor_vmm::IdentityMismatch,
    },
    /// Another VMM was asked for than the one that made the build.
    #[error(
        "build {build} was made by {recorded}, and --vmm {asked} was asked for: leave that out, or say --vmm {kind}"
    )]
    OtherVmm {
        /// The build.
        build: BuildId,
        /// Who made it.
        recorded: String,
        /// Which VMM that is.
        kind: crate::vmm::VmmKind,
        /// Which one was asked for.
        asked: crate::vmm::VmmKind,
    },
    /// The VMM that made the build cannot run here.
    #[error(
        "build {build} was made by {recorded}, which is needed to resume it; install it: {source}"
    )]
    VmmMissing {
        /// The build.
        build: BuildId,
        /// Who made it.
        recorded: String,
        /// Why it cannot be had.
        source: Box<StartError>,
    },
    /// A VMM that torpor does not drive made the build.
    #[error(
        "build {build} was made by {recorded}, which this torpor does not drive; use a newer one"
    )]
    UnknownVmm {
        /// The build.
        build: BuildId,
        /// Who made it.
        recorded: String,
    },
    /// Firecracker without KVM.
    #[error("Firecracker needs KVM, and {why_not}; QEMU runs without: --vmm qemu")]
    NoKvm {
        /// What is the matter with KVM.
        why_not: &'static str,
    },
    /// A jail that was asked for.
    #[error("the VMM cannot be jailed: {why_not}; without --jailer it runs as it is")]
    NoJail {
        /// What is missing.
        why_not: &'static str,
    },
    /// Firecracker's memory cannot be filled before it starts.
    #[error("a guest under Firecracker gets its memory page by page only: leave --eager out")]
    NotEager,
    /// The pager.
    #[error(transparent)]
    Pager(#[from] torpor_pager::PagerError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] crate::disk::DiskError),
    /// The guest's memory.
    #[error(transparent)]
    Fill(#[from] crate::fill::FillError),
    /// A file of the running sandbox.
    #[error("cannot use {path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The build lacks something that a resume needs.
    #[error("build {build} cannot be resumed: its manifest names no {what}")]
    Incomplete {
        /// The build.
        build: BuildId,
        /// What is not there.
        what: &'static str,
    },
    /// A page that the starting guest needs cannot be delivered.
    #[error("the guest cannot run: {source}{}", and_validate(*build))]
    Unserved {
        /// The build that it is resumed from.
        build: Option<BuildId>,
        /// Which page, file and offset.
        source: torpor_pager::PagerFailure,
    },
    /// Somebody else talks to the agent already: a bug.
    #[error("torpor has a bug: the agent's channel was taken twice; please report it")]
    ChannelTaken,
    /// The agent did not answer.
    #[error("the guest does not answer after {waited_s} s: {source}{console}", console = console_text(console))]
    NoAnswer {
        /// How long torpor waited.
        waited_s: u64,
        /// The last failure.
        source: torpor_guest::GuestError,
        /// The console's last lines.
        console: String,
    },
    /// The VMM ended while the guest was waited for.
    #[error("the VMM ended before the guest answered: it {exit}{console}", console = console_text(console))]
    Ended {
        /// How.
        exit: Box<torpor_vmm::VmmExit>,
        /// The console's last lines.
        console: String,
    },
    /// Work in the background panicked: a bug.
    #[error("torpor has a bug: {0}; please report it")]
    Panicked(String),
}

fn and_validate(build: Option<BuildId>) -> String {
    build.map_or_else(String::new, |id| {
        format!("; `torpor inspect-build {id} --validate --recursive` shows what is damaged")
    })
}

fn console_text(console: &str) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("\nthe guest's console ended with:\n{console}")
    }
}
