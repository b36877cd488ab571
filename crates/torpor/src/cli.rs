//! The command line's shape: every option, its help, and the examples that `--help` shows.
//!
//! Nothing is done here; `main.rs` maps a parsed command to its file.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use torpor_build::{BuildId, Digest, Name};
use torpor_pager::WriteTracking;
use torpor_sandbox::vmm::{VmmKind, VmmOptions};

use crate::signal::PauseSignal;

/// Pause microVM sandboxes leanly, resume them instantly.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_CODES, propagate_version = true)]
pub(crate) struct Cli {
    /// Where builds, images and running sandboxes are kept
    /// [default: ~/.local/share/torpor]
    #[arg(long, global = true, env = "TORPOR_STORAGE", value_name = "DIR")]
    pub(crate) storage: Option<PathBuf>,

    /// Print the result as JSON on standard output (progress stays on standard error)
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Say more on standard error; twice for everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; the message says what and the next step
  2    the command line is not understood
  3    the build, template or file that was named does not exist
  4    refused: the id is taken, children exist, another VMM version made the build
  5    a command in the guest failed
  6    the sandbox was lost; the last build is intact
  130  interrupted; nothing is left behind";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what this host offers, and the next step where something is missing
    #[command(
        after_help = "Examples:\n  torpor doctor\n  torpor doctor --json | jq '.checks[] | select(.ok == false)'"
    )]
    Doctor(DoctorArgs),

    /// Boot a template, or put a layer on top of a build
    #[command(after_help = CREATE_EXAMPLES)]
    CreateBuild(CreateBuildArgs),

    /// Resume a build: measure it, run a command in it, pause it into a new build
    #[command(after_help = RESUME_EXAMPLES)]
    ResumeBuild(ResumeBuildArgs),

    /// Show a build's sizes, layers, checksums and pause report
    #[command(
        after_help = "Examples:\n  torpor inspect-build python\n  torpor inspect-build python --validate --recursive\n  torpor inspect-build 7d3f… --svg memory.svg"
    )]
    InspectBuild(InspectBuildArgs),

    /// Show what a guest's memory is made of, by the guest's own page metadata
    #[command(
        after_help = "Examples:\n  torpor inspect-memory --build python\n  torpor inspect-memory --build 7d3f… --svg memory.svg\n  torpor inspect-memory --sandbox s-7d3f… --json"
    )]
    InspectMemory(InspectMemoryArgs),

    /// List all builds and the templates that name them
    #[command(
        after_help = "Examples:\n  torpor list-builds\n  torpor list-builds --json | jq -r '.builds[].id'"
    )]
    ListBuilds,

    /// Delete a build that no other build stands on
    #[command(
        after_help = "Examples:\n  torpor delete-build 7d3f…\n  torpor delete-build 7d3f… --json"
    )]
    DeleteBuild(DeleteBuildArgs),

    /// List the base images and how many builds need each
    #[command(
        after_help = "Examples:\n  torpor list-images\n  torpor list-images --json | jq -r '.images[] | select(.builds == []) | .image'"
    )]
    ListImages,

    /// Delete a base image that no build needs
    #[command(
        after_help = "Examples:\n  torpor delete-image 6d0f…\n  torpor delete-image --unused"
    )]
    DeleteImage(DeleteImageArgs),

    /// Serve the page faults of any VMM that speaks Firecracker's handshake
    #[command(after_help = PAGER_EXAMPLES)]
    Pager(PagerArgs),
}

impl Command {
    /// The file that metrics go to at its end.
    pub(crate) fn metrics(&self) -> Option<&Path> {
        match self {
            Self::CreateBuild(args) => args.run.metrics.as_deref(),
            Self::ResumeBuild(args) => args.run.metrics.as_deref(),
            _ => None,
        }
    }
}

const PAGER_EXAMPLES: &str = "\
A VMM that connects sends its memory regions as JSON, and its userfaultfd beside them. It is served
until its process ends. One that cannot be served any more is killed, and so are all of them when
this command ends: a guest without its pager hangs for ever.

Examples:
  # memory of a Firecracker snapshot, for one VMM; its API is then told
  #   \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/pager.sock\"}
  torpor pager --socket /run/pager.sock --memfile snapshot.mem --connections 1

  # a build's memory, for as many as come
  torpor pager --socket /run/pager.sock --build python --report faults.json";

const CREATE_EXAMPLES: &str = "\
Examples:
  # boot the base image and store it as the template `base`
  torpor create-build --template base

  # a template with something installed, ready when its port answers
  torpor create-build --template python --memory 512M --vcpu 1 \\
      --setup-cmd 'pip install flask' --ready-cmd 'test -e /run/app.ready'

  # a layer on top of it; the pause reclaims and drains for at most 2 s
  torpor create-build --template python-warm --from-build python \\
      --setup-cmd 'python3 -c \"import json, re\"' --reclaim --fph-timeout-ms 2000";

const RESUME_EXAMPLES: &str = "\
Examples:
  # how long a resume takes, ten times, files not in the host's cache
  torpor resume-build --from-build base --iterations 10 --cold

  # run a command and pause into a new build when it succeeds
  torpor resume-build --from-build base --cmd-pause 'echo hello > /root/hello' --reclaim

  # what do the scan and the references save? compare the two reports
  torpor resume-build --from-build base --cmd-pause './job'
  torpor resume-build --from-build base --cmd-pause './job' --no-scan --no-refs

  # three checkpoints of one running VM, each on top of the one before
  torpor resume-build --from-build base --cmd-pause './step' --in-place --iterations 3

  # look around in it
  torpor resume-build --from-build base --shell

  # what does the drain bring, for this workload?
  torpor resume-build --from-build base --cmd './job' --fph-bench --fph-timeout-ms 5000";

/// Longest ceiling of a drain: ten minutes, as for the flag of that name.
const FPH_TIMEOUT_MS_MAX: u64 = 600_000;

/// Longest patience with a guest: an hour, beyond which nobody waits.
const GUEST_PATIENCE_S_MAX: u64 = 3600;

/// What holds for every command that runs a guest.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Reclaim in the guest before the pause (overrides the flag `reclaim-on-pause`)
    #[arg(long)]
    pub(crate) reclaim: bool,

    /// Drain before the pause for at most N milliseconds, 0 for not at all (overrides the flag
    /// `free-page-hinting-timeout-ms`)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=FPH_TIMEOUT_MS_MAX))]
    pub(crate) fph_timeout_ms: Option<u64>,

    /// Do not look for free pages in the stopped guest (overrides the flag `free-page-scan`)
    #[arg(long)]
    pub(crate) no_scan: bool,

    /// Store pages that are copies of the base image's blocks as data (overrides the flag
    /// `disk-references`)
    #[arg(long)]
    pub(crate) no_refs: bool,

    /// A JSON file of flags, looked at again at every pause
    #[arg(long, value_name = "FILE", env = "TORPOR_FLAGS")]
    pub(crate) flags: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) vmm: VmmArgs,

    /// How long a guest may take for each of its answers, in seconds, instead of what is usual: for
    /// hosts on which everything is slow. Beyond 30, the ceilings of a pause that no flag sets grow in
    /// proportion, up to eightfold
    #[arg(long, value_name = "S", env = "TORPOR_GUEST_PATIENCE", value_parser = clap::value_parser!(u64).range(1..=GUEST_PATIENCE_S_MAX))]
    pub(crate) guest_patience: Option<u64>,

    /// At the end, failure included, write what this command's sandboxes did as Prometheus text: for
    /// node_exporter's textfile collector, so name it *.prom
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics: Option<PathBuf>,

    /// How written pages are tracked in a guest that is resumed on QEMU; on Firecracker it is always a
    /// fault for each first write
    #[arg(long, value_enum, default_value_t = Tracking::Auto, env = "TORPOR_WRITE_TRACKING")]
    pub(crate) write_tracking: Tracking,
}

/// How written pages are tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tracking {
    /// The best that the host's kernel has
    Auto,
    /// Asynchronous write-protect (Linux 6.7 and newer)
    Async,
    /// A fault for each first write (older kernels)
    Sync,
}

/// Which VMM, and where it is.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct VmmArgs {
    /// The VMM that boots guests: firecracker or qemu. A build is always resumed by the one that made
    /// it [default: firecracker where KVM is usable and it is there, else qemu]
    #[arg(long, value_name = "VMM", env = "TORPOR_VMM")]
    pub(crate) vmm: Option<VmmKind>,

    /// The QEMU to use [default: qemu-system-x86_64 from PATH]
    #[arg(long, value_name = "PATH", env = "TORPOR_QEMU")]
    pub(crate) qemu: Option<PathBuf>,

    /// The Firecracker to use, 1.10 or newer [default: firecracker from PATH]
    #[arg(long, value_name = "PATH", env = "TORPOR_FIRECRACKER")]
    pub(crate) firecracker: Option<PathBuf>,

    /// Lock Firecracker up with its jailer: a user, cgroup and namespaces of its own [default: where
    /// torpor is root and a jailer is beside it or in PATH]
    #[arg(long)]
    pub(crate) jailer: bool,

    /// Do not lock it up
    #[arg(long, conflicts_with = "jailer")]
    pub(crate) no_jailer: bool,
}

impl VmmArgs {
    /// What they force.
    pub(crate) fn options(&self) -> VmmOptions {
        VmmOptions {
            kind: self.vmm,
            qemu: self.qemu.clone(),
            firecracker: self.firecracker.clone(),
            jailed: (self.jailer || self.no_jailer).then_some(self.jailer),
        }
    }
}

impl Tracking {
    /// What is forced; `None` leaves the choice to the host.
    pub(crate) fn forced(self) -> Option<WriteTracking> {
        match self {
            Self::Auto => None,
            Self::Async => Some(WriteTracking::Async),
            Self::Sync => Some(WriteTracking::Sync),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) vmm: VmmArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CreateBuildArgs {
    /// The name under which the build can be resumed: a-z, 0-9 and -
    #[arg(long, value_name = "NAME")]
    pub(crate) template: Name,

    /// Put a layer on top of this build (an id or a template's name) instead of booting
    #[arg(long, value_name = "ID", conflicts_with_all = ["memory", "vcpu", "disk", "rootfs", "kernel", "kernel_args", "network"])]
    pub(crate) from_build: Option<String>,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) memory: u64,

    /// The guest's processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub(crate) vcpu: u32,

    /// Size of the guest's writable disk (sparse: only what is written costs)
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    pub(crate) disk: u64,

    /// The base root file system: a directory, a tar archive or an ext4 image
    /// [default: the one that `make setup` made]
    #[arg(long, value_name = "DIR|TAR|EXT4")]
    pub(crate) rootfs: Option<PathBuf>,

    /// The guest kernel's series, as `make setup` keeps it
    /// [default: the one that `make setup` chose]
    #[arg(long, value_name = "SERIES", default_value = torpor_sandbox::assets::DEFAULT_KERNEL, hide_default_value = true)]
    pub(crate) kernel: String,

    /// More words for the guest kernel's command line; torpor's own come first
    #[arg(
        long,
        value_name = "ARGS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub(crate) kernel_args: String,

    /// Give the guest a network: connections out, none in
    #[arg(long)]
    pub(crate) network: bool,

    /// A shell command to run in the guest before it is stored; it must succeed
    #[arg(long, value_name = "CMD")]
    pub(crate) setup_cmd: Option<String>,

    /// A shell command that is repeated until it succeeds; only then is the guest stored
    #[arg(long, value_name = "CMD")]
    pub(crate) ready_cmd: Option<String>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").multiple(false).args(["cmd", "pause", "cmd_pause", "signal_pause", "shell"]))]
pub(crate) struct ResumeBuildArgs {
    /// The build to resume: an id or a template's name
    #[arg(long, value_name = "ID")]
    pub(crate) from_build: String,

    /// The id of the build that a pause makes [default: a new one]
    #[arg(long, value_name = "ID", conflicts_with_all = ["cmd", "fph_bench"])]
    pub(crate) to_build: Option<BuildId>,

    /// Run a shell command in the guest, then discard the sandbox
    #[arg(long, value_name = "CMD")]
    pub(crate) cmd: Option<String>,

    /// Pause at once
    #[arg(long)]
    pub(crate) pause: bool,

    /// Run a shell command in the guest and pause when it succeeds
    #[arg(long, value_name = "CMD")]
    pub(crate) cmd_pause: Option<String>,

    /// Pause when torpor gets this signal: USR1, USR2, HUP, TERM or INT
    #[arg(long, value_name = "SIG")]
    pub(crate) signal_pause: Option<PauseSignal>,

    /// A shell in the guest; with --to-build what is left is stored when it ends
    #[arg(long, conflicts_with = "iterations")]
    pub(crate) shell: bool,

    /// Do it N times and print min, median and p95; of the builds that pauses make only the last
    /// one is kept
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) iterations: u32,

    /// Do not end the VM for a pause: store it as a build and go on with it. The next iteration works
    /// in the same VM, and its build stores what has changed since; all builds are kept
    #[arg(long, conflicts_with_all = ["cmd", "shell", "cold", "fph_bench"])]
    pub(crate) in_place: bool,

    /// Drop the host's cache of the build before each iteration
    #[arg(long)]
    pub(crate) cold: bool,

    /// Do not bring in the recorded working set; every page waits for its fault
    #[arg(long)]
    pub(crate) no_prefetch: bool,

    /// Fill the guest's memory before it starts instead of serving page faults
    #[arg(long)]
    pub(crate) eager: bool,

    /// Pause twice from the same build after --cmd, with and without the drain, and compare. Both
    /// without the scan and the references, which would leave out what a drain gives back; of use
    /// for a template whose balloon hints (Firecracker 1.14 or newer) or reports free pages
    #[arg(long, requires = "cmd", conflicts_with = "iterations")]
    pub(crate) fph_bench: bool,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectBuildArgs {
    /// An id or a template's name
    #[arg(value_name = "ID")]
    pub(crate) build: String,

    /// Read everything and verify every checksum
    #[arg(long)]
    pub(crate) validate: bool,

    /// The builds below it too
    #[arg(long)]
    pub(crate) recursive: bool,

    /// Draw the guest's memory as a map: which layer, zero, removed
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).args(["build", "sandbox"]))]
pub(crate) struct InspectMemoryArgs {
    /// A build: an id or a template's name
    #[arg(long, value_name = "ID")]
    pub(crate) build: Option<String>,

    /// A running sandbox, of this or of another process; it stands still for the look
    #[arg(long, value_name = "ID")]
    pub(crate) sandbox: Option<Name>,

    /// Draw the guest's memory as a map
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteBuildArgs {
    /// An id, or the name of a template (the name goes with its build)
    #[arg(value_name = "ID")]
    pub(crate) build: String,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["image", "unused"]))]
pub(crate) struct DeleteImageArgs {
    /// The image's whole digest, as `torpor list-images` shows it
    #[arg(value_name = "DIGEST")]
    pub(crate) image: Option<Digest>,

    /// Every image that no build needs
    #[arg(long)]
    pub(crate) unused: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("content").required(true).args(["build", "memfile"]))]
pub(crate) struct PagerArgs {
    /// The Unix socket to listen on; its directory and permissions say who may connect
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// Serve a build's memory: an id or a template's name
    #[arg(long, value_name = "ID")]
    pub(crate) build: Option<String>,

    /// Serve a raw memory file, which must not change meanwhile
    #[arg(long, value_name = "FILE")]
    pub(crate) memfile: Option<PathBuf>,

    /// Take so many connections, refused ones included, and end with the last of their VMMs
    /// [default: end when interrupted]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) connections: Option<u64>,

    /// Write what was done, as JSON, whenever a VMM has gone or was refused
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
}

/// `512M`, `4G`, `1048576`: bytes, with an optional K, M, G or T (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size: write for example 512M or 4G");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Examples:"), "{}", command.get_name());
        }
    }

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("123"), Ok(123));
        assert!(parse_size("lots").is_err());
        assert!(parse_size("99999999T").is_err());
        assert!(parse_size("5X").is_err());
    }
}
