//! `torpor doctor`: what this host offers, and the next step where something is missing.
//!
//! It looks and leaves nothing changed: no guest is started. Whether cgroups can be made is tried.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statvfs};
use serde::Serialize;
use torpor_pager::{Uffd, WriteTracking};
use torpor_sandbox::assets::{self, AssetError, Assets, DEFAULT_KERNEL};
use torpor_sandbox::error::StartError;
use torpor_sandbox::vmm::{FirecrackerProgram, VmmBinary, VmmChoice, VmmKind, VmmOptions};
use torpor_vmm::KvmSupport;
use torpor_vmm::firecracker::{NoNetwork, check_network};
use torpor_vmm::qemu::QemuBinary;

use crate::cli::DoctorArgs;
use crate::context::{Context, blocking};
use crate::error::CliError;
use crate::output::mib;

/// Room on the disk below which a first template and a pause of it do not fit: base image and kernel
/// are copied (half a GiB), a guest of 512 MiB is stored.
const DISK_FREE_BYTES_MIN: u64 = 2 << 30;
/// Memory for a guest of the default size, and QEMU around it.
const MEMORY_FREE_BYTES_MIN: u64 = 640 << 20;
/// `CAP_SYS_PTRACE` in `/proc/self/status`.
const CAP_SYS_PTRACE_BIT: u32 = 19;

const WITHOUT_USERFAULTFD: &str =
    "a resume on QEMU reads all memory before it starts, and there is none on Firecracker";

#[derive(Debug, Serialize)]
struct Diagnosis {
    /// Whether the main job can run here.
    ok: bool,
    checks: Vec<Check>,
}

/// One line.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    /// Whether the main job needs it.
    required: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_step: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            ok: true,
            required: false,
            found: found.into(),
            next_step: None,
        }
    }

    fn bad(name: &'static str, found: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self {
            name,
            ok: false,
            required: true,
            found: found.into(),
            next_step: Some(next_step.into()),
        }
    }

    /// What is missing makes it slower, or is not used.
    fn not_required(self) -> Self {
        self.required_if(false)
    }

    fn required_if(mut self, required: bool) -> Self {
        self.required = required;
        self
    }
}

pub(crate) async fn run(context: &Context, args: DoctorArgs) -> Result<(), CliError> {
    let storage = context.storage_dir().clone();
    let checks = blocking(move || Ok(checks(&storage, &args.vmm.options()))).await?;
    let missing: Vec<_> = checks
        .iter()
        .filter(|check| check.required && !check.ok)
        .map(|check| check.name)
        .collect();
    let verdict = if missing.is_empty() {
        Ok(())
    } else {
        Err(CliError::HostNotReady(missing.join(", ")))
    };
    let diagnosis = Diagnosis {
        ok: verdict.is_ok(),
        checks,
    };
    let printed = context.output.result(&diagnosis, text);
    printed.map_err(CliError::system("print the result"))?;
    verdict
}

fn checks(storage: &Path, options: &VmmOptions) -> Vec<Check> {
    let choice = options.choose(storage);
    let firecracker_boots = choice
        .as_ref()
        .is_ok_and(|choice| choice.binary.kind() == VmmKind::Firecracker);
    let mut checks = vec![
        host_kernel(),
        kvm(KvmSupport::of_host()),
        userfaultfd(firecracker_boots),
        ptrace(),
        qemu(options.qemu.as_deref()),
        firecracker(options, storage),
        network(check_network()),
        vmm(choice),
        mke2fs(),
    ];
    checks.extend(assets_checks());
    checks.extend([storage_check(storage), disk_room(storage), memory_room()]);
    checks
}

fn host_kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Check::good("kernel", format!("Linux {}", release.trim()))
}

fn kvm(support: KvmSupport) -> Check {
    let slower = "guests are emulated";
    match support {
        KvmSupport::Usable => Check::good("KVM", "usable"),
        KvmSupport::WithoutHardware => Check::bad(
            "KVM",
            format!("/dev/kvm is present only, the processor shows no vmx or svm: {slower}"),
            "for speed, use a host with (nested) hardware virtualisation",
        ),
        KvmSupport::NotPermitted => Check::bad(
            "KVM",
            format!("/dev/kvm may not be opened: {slower}"),
            "add yourself to the group kvm, then log in again",
        ),
        KvmSupport::Absent => Check::bad(
            "KVM",
            format!("absent: {slower}"),
            "for speed, use a host with KVM (`modprobe kvm_intel` or `kvm_amd`)",
        ),
    }
    .not_required()
}

/// The descriptor that a resume needs serves faults of the kernel, too (KVM's, vhost's), which not
/// everyone may have; asking for features alone would not show that.
fn userfaultfd(firecracker_boots: bool) -> Check {
    let device = access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK).is_ok();
    let tracking = match Uffd::create() {
        Err(error) if !device => Err(format!("not permitted ({error})")),
        _ => WriteTracking::best_of_host().map_err(|error| format!("not to be had ({error})")),
    };
    userfaultfd_check(tracking, firecracker_boots)
}

/// Of what it tracks writes with, or why there is none. Nothing else fills a Firecracker's memory.
fn userfaultfd_check(tracking: Result<WriteTracking, String>, firecracker_boots: bool) -> Check {
    let name = "userfaultfd";
    match tracking {
        Ok(WriteTracking::Async) => Check::good(
            name,
            "with asynchronous write-protect (kernel 6.7 or newer), for guests on QEMU",
        ),
        Ok(WriteTracking::Sync) => Check::bad(
            name,
            "synchronous fallback: each first write of a resumed guest is a fault",
            "for speed, use kernel 6.7 or newer",
        )
        .not_required(),
        Ok(WriteTracking::Off) => Check::bad(
            name,
            "without write-protect",
            "use kernel 6.7 or newer (at least 5.19)",
        ),
        Err(why) => Check::bad(
            name,
            format!("{why}: {WITHOUT_USERFAULTFD}"),
            "run as root, or `sysctl vm.unprivileged_userfaultfd=1`, or give yourself read and write \
             access to /dev/userfaultfd; in a container allow the system call",
        )
        .required_if(firecracker_boots),
    }
}

fn ptrace() -> Check {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    ptrace_check(
        scope.as_deref().map(str::trim),
        may_ptrace_anything(&status),
    )
}

/// Without it a resume fills all memory eagerly, so it is not required.
fn ptrace_check(scope: Option<&str>, privileged: bool) -> Check {
    match scope {
        None => Check::good("ptrace", "not restricted"),
        // Scope 1 allows descendants, and a VMM is one.
        Some(scope @ ("0" | "1")) => Check::good("ptrace", format!("ptrace_scope {scope}")),
        Some("2") if privileged => Check::good("ptrace", "ptrace_scope 2, and we may"),
        Some(scope) => Check::bad(
            "ptrace",
            format!("ptrace_scope {scope} forbids it: a resume reads all memory before it starts"),
            if scope == "2" {
                "run as root, or `sysctl kernel.yama.ptrace_scope=1`"
            } else {
                "set kernel.yama.ptrace_scope=1 in /etc/sysctl.d and reboot: 3 cannot be lowered"
            },
        )
        .not_required(),
    }
}

fn may_ptrace_anything(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps >> CAP_SYS_PTRACE_BIT & 1 == 1)
}

fn qemu(explicit: Option<&Path>) -> Check {
    let name = "QEMU";
    match QemuBinary::find(explicit) {
        Ok(qemu) => {
            let (version, path) = (qemu.version, qemu.path.display());
            Check::good(
                name,
                format!("{version} at {path}; its balloon reports free pages"),
            )
        }
        Err(error) => Check::bad(
            name,
            error.to_string(),
            "`apt-get install qemu-system-x86` (`make setup` does it), or give --qemu PATH",
        )
        .not_required(),
    }
}

fn firecracker(options: &VmmOptions, storage: &Path) -> Check {
    let name = "Firecracker";
    match FirecrackerProgram::find(options, storage) {
        Ok(program) => {
            let (release, path) = (
                program.release().to_owned(),
                program.path().display().to_string(),
            );
            let jail = program.jailer().map_or_else(
                |why_not| format!("not jailed: {why_not}"),
                |jailer| format!("jailed by {}", jailer.display()),
            );
            let features = VmmBinary::Firecracker(program).free_pages();
            let free_pages = match (features.reporting, features.hinting) {
                (true, true) => "its balloon reports and hints free pages",
                _ => {
                    "its balloon knows no free pages, so a drain brings nothing (1.14 or newer do)"
                }
            };
            Check::good(name, format!("{release} at {path}; {free_pages}; {jail}"))
        }
        Err(error) => Check::bad(
            name,
            error.to_string(),
            "needed only with KVM, for speed: put it into PATH, or give --firecracker PATH",
        )
        .not_required(),
    }
}

/// QEMU brings its own, Firecracker's is made of the host's.
fn network(firecrackers: Result<(), NoNetwork>) -> Check {
    let name = "network";
    match firecrackers {
        Ok(()) => Check::good(name, "guests on Firecracker and on QEMU can have one"),
        Err(NoNetwork { missing, next_step }) => Check::bad(
            name,
            format!("guests on QEMU can have one, those on Firecracker only with {missing}"),
            next_step,
        )
        .not_required(),
    }
}

/// The one that would boot a guest here.
fn vmm(choice: Result<VmmChoice, StartError>) -> Check {
    let name = "VMM";
    match choice {
        Ok(VmmChoice { binary, why }) => {
            let identity = binary.identity();
            Check::good(name, format!("{identity} would be taken: {why}"))
        }
        Err(error) => Check::bad(
            name,
            format!("none would run a guest: {error}"),
            "leave --jailer and --firecracker out if the reason names them, or name another VMM by --vmm; \
             for QEMU `apt-get install qemu-system-x86` (`make setup` does it)",
        ),
    }
}

fn mke2fs() -> Check {
    if Path::new("/sbin/mke2fs").is_file() {
        Check::good("mke2fs", "/sbin/mke2fs")
    } else {
        let next_step = "`apt-get install e2fsprogs` (`make setup` does it)";
        Check::bad(
            "mke2fs",
            "missing: it makes the guest's writable disk",
            next_step,
        )
    }
}

/// Kernel, base image and agent, each looked for by itself.
fn assets_checks() -> Vec<Check> {
    let dir = match assets::default_dir() {
        Ok(dir) => dir,
        Err(error) => {
            let next_step = "set TORPOR_ASSETS, or HOME";
            return vec![Check::bad("guest kernel", error.to_string(), next_step)];
        }
    };
    let all = Assets::find(None, DEFAULT_KERNEL);
    let problem_with = |names: &[&str]| match &all {
        Err(AssetError::Missing { what, path, .. }) if names.contains(what) => {
            Some(format!("{what} is missing: {}", path.display()))
        }
        Err(AssetError::Read { path, source }) if names.contains(&"a kernel module") => {
            Some(format!("cannot read {}: {source}", path.display()))
        }
        _ => None,
    };
    let of_kernel = [
        "the guest kernel",
        "the kernel's configuration",
        "the list of kernel modules",
        "a kernel module",
    ];
    let kernel = match problem_with(&of_kernel) {
        Some(problem) => Check::bad("guest kernel", problem, "`make setup`"),
        None => Check::good(
            "guest kernel",
            dir.join("kernels")
                .join(DEFAULT_KERNEL)
                .display()
                .to_string(),
        ),
    };
    let image = dir.join("base.ext4");
    let image = if image.is_file() {
        Check::good("base image", image.display().to_string())
    } else {
        Check::bad(
            "base image",
            format!("{} is missing", image.display()),
            "`make setup`",
        )
    };
    vec![kernel, image, agent(problem_with(&["the agent"]), &all)]
}

fn agent(problem: Option<String>, all: &Result<Assets, AssetError>) -> Check {
    if let Some(problem) = problem {
        return Check::bad("agent (envd)", problem, "`make build`, or set TORPOR_ENVD");
    }
    let found = match all {
        Ok(assets) => assets.envd.clone(),
        // It is looked for last, so that nothing is known of it yet.
        Err(_) => match std::env::var_os("TORPOR_ENVD")
            .map(PathBuf::from)
            .or_else(beside_us)
        {
            Some(path) if path.is_file() => path,
            _ => {
                let next_step = "`make build`, or set TORPOR_ENVD";
                return Check::bad("agent (envd)", "not beside torpor", next_step);
            }
        },
    };
    Check::good("agent (envd)", found.display().to_string())
}

fn beside_us() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.join("envd"))
}

/// The directory, or the nearest one above it that exists.
fn nearest_existing(path: &Path) -> Option<&Path> {
    path.ancestors().find_map(|dir| {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        dir.exists().then_some(dir)
    })
}

fn storage_check(storage: &Path) -> Check {
    let name = "storage";
    let shown = storage.display();
    match nearest_existing(storage) {
        Some(dir) if access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok() && dir.is_dir() => {
            let to_be_made = if dir == storage {
                ""
            } else {
                ", made when needed"
            };
            Check::good(name, format!("{shown}{to_be_made}"))
        }
        _ => Check::bad(
            name,
            format!("{shown} cannot be written"),
            "give --storage DIR or set TORPOR_STORAGE",
        ),
    }
}

fn disk_room(storage: &Path) -> Check {
    let free = nearest_existing(storage)
        .and_then(|dir| statvfs(dir).ok())
        .map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    room(
        "disk",
        free,
        DISK_FREE_BYTES_MIN,
        "free space there, or use another --storage",
    )
}

fn memory_room() -> Check {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    room(
        "memory",
        available_bytes(&meminfo),
        MEMORY_FREE_BYTES_MIN,
        "end other programs, or give guests less with --memory",
    )
}

fn room(name: &'static str, free: Option<u64>, min: u64, next_step: &str) -> Check {
    match free {
        Some(free) if free >= min => Check::good(name, format!("{} free", mib(free))),
        Some(free) => {
            let found = format!("{} free, a first guest needs {}", mib(free), mib(min));
            Check::bad(name, found, next_step)
        }
        None => Check::bad(name, "free room is not to be told", next_step).not_required(),
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn text(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    for check in &diagnosis.checks {
        let verdict = match (check.ok, check.required) {
            (true, _) => "ok",
            (false, true) => "NOT OK",
            (false, false) => "not ok (works without)",
        };
        text += &format!("{:<13} {verdict}: {}\n", check.name, check.found);
        if let Some(next_step) = &check.next_step {
            text += &format!("{:<13} next step: {next_step}\n", "");
        }
    }
    text + if diagnosis.ok {
        "\nthis host can run torpor"
    } else {
        "\nthis host is not ready yet"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_still_does_the_main_job() {
        for support in [
            KvmSupport::Absent,
            KvmSupport::WithoutHardware,
            KvmSupport::NotPermitted,
        ] {
            let check = kvm(support);
            assert!(!check.ok && !check.required && check.next_step.is_some());
        }
        assert!(kvm(KvmSupport::Usable).ok);
    }

    #[test]
    fn a_network_that_only_qemu_can_give_is_told_with_what_is_missing() {
        assert!(network(Ok(())).ok);
        let check = network(Err(NoNetwork {
            missing: "slirp4netns".to_owned(),
            next_step: "apt-get install slirp4netns".to_owned(),
        }));
        assert!(!check.ok && !check.required);
        assert!(check.found.contains("slirp4netns"), "{}", check.found);
    }

    #[test]
    fn without_userfaultfd_a_host_is_ready_only_if_it_is_not_firecracker_that_boots() {
        for firecracker_boots in [true, false] {
            let check = userfaultfd_check(Err("not permitted".to_owned()), firecracker_boots);
            assert_eq!((check.ok, check.required), (false, firecracker_boots));
            let slower = userfaultfd_check(Ok(WriteTracking::Sync), firecracker_boots);
            assert_eq!((slower.ok, slower.required), (false, false));
        }
    }

    #[test]
    fn ptrace_scope_2_is_good_enough_for_the_privileged_only() {
        assert!(ptrace_check(Some("2"), true).ok);
        assert!(!ptrace_check(Some("2"), false).ok);
        assert!(!ptrace_check(Some("3"), true).ok);
        assert!(ptrace_check(Some("1"), false).ok);
        assert!(ptrace_check(None, false).ok);
        assert!(may_ptrace_anything("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_ptrace_anything("CapEff:\t0000000000000000\n"));
    }

    #[test]
    fn a_disk_that_is_nearly_full_is_not_ok() {
        assert!(!room("disk", Some(1 << 20), DISK_FREE_BYTES_MIN, "x").ok);
        assert!(room("disk", Some(1 << 40), DISK_FREE_BYTES_MIN, "x").ok);
        assert_eq!(available_bytes("MemAvailable:   10 kB\n"), Some(10 * 1024));
    }

    #[test]
    fn a_storage_that_does_not_exist_yet_is_looked_for_above() {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("a/b");
        assert_eq!(nearest_existing(&storage), Some(dir.path()));
        assert!(storage_check(&storage).ok);
        assert!(!storage.exists());
    }
}
