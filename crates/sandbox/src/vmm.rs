//! Which VMM runs a guest: chosen for a guest that is booted, given for one that is resumed (by the
//! VMM that made its build, since device states are no VMM's but its own).
//!
//! Firecracker is the choice where it can run: KVM usable, a binary of 1.10 or newer there. QEMU runs
//! anywhere. Whoever names a VMM gets that one or an error, never the other.
//!
//! The two differ in three things, all of them here and in `incoming`: how they are found, how a
//! machine is booted, and how one is made ready for a device state.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::geteuid;
use torpor_build::BalloonRecord;
use torpor_vmm::firecracker::{self, FirecrackerBinary, InstalledBalloon, Jail};
use torpor_vmm::qemu::{self, QemuBinary};
use torpor_vmm::{Accel, BootSource, KvmSupport, MachineConfig, Vmm, VmmError, VmmIdentity};
use uuid::Uuid;

use crate::error::StartError;
use crate::sandbox::{CONSOLE_FILE, machine_dir};

/// Users of jailed machines have numbers from here on: what gives numbers to people or containers
/// (directories by sssd, systemd-nspawn) keeps below, since they do not fit a signed 32 bit number, …
const JAIL_USER_FIRST: u32 = 1 << 31;
/// … and so many of them that two machines hardly meet in one. If they do, each still has a directory,
/// a process-id and a mount namespace of its own.
const JAIL_USERS: u64 = 1 << 30;

/// A VMM that torpor drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmmKind {
    /// Runs anywhere.
    Qemu,
    /// Needs KVM.
    Firecracker,
}

impl VmmKind {
    /// As a manifest and the command line spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for VmmKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Qemu, Self::Firecracker]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| format!("`{text}` is no VMM that torpor drives: qemu or firecracker"))
    }
}

/// What is forced of the choice.
#[derive(Debug, Clone, Default)]
pub struct VmmOptions {
    /// The VMM to take, and no other.
    pub kind: Option<VmmKind>,
    /// The QEMU to use instead of the one from PATH.
    pub qemu: Option<PathBuf>,
    /// The Firecracker to use instead of the one from PATH.
    pub firecracker: Option<PathBuf>,
    /// Whether Firecracker is locked up by its jailer: asked for, refused, or, if neither, where that
    /// is possible.
    pub jailed: Option<bool>,
}

/// A VMM's program, found on this host.
#[derive(Debug, Clone)]
pub enum VmmBinary {
    /// QEMU.
    Qemu(QemuBinary),
    /// Firecracker, on a host with KVM.
    Firecracker(FirecrackerProgram),
}

/// A Firecracker, and how it is started.
#[derive(Debug, Clone)]
pub struct FirecrackerProgram {
    binary: FirecrackerBinary,
    jailer: Result<PathBuf, &'static str>,
    /// Why it has no jail, where that should be told: see [`missed_jail`].
    missed_jail: Option<&'static str>,
}

impl FirecrackerProgram {
    /// Looks at this host, whether it has KVM or not. Jails are made in `storage`, which need not be
    /// there yet.
    ///
    /// # Errors
    /// There is no usable Firecracker, or it cannot be jailed and is to be.
    pub fn find(options: &VmmOptions, storage: &Path) -> Result<Self, StartError> {
        let binary = FirecrackerBinary::find(options.firecracker.as_deref())?;
        let jailer = match (options.jailed, jailer_of(&binary, storage)) {
            (Some(false), _) => Err("--no-jailer"),
            (Some(true), Err(why_not)) => return Err(StartError::NoJail { why_not }),
            (_, jailer) => jailer,
        };
        let is_there = Jail::find_jailer(&binary.path).is_some();
        let missed_jail = missed_jail(
            options.jailed,
            geteuid().is_root() && is_there,
            jailer.as_ref().err().copied(),
        );
        Ok(Self {
            binary,
            jailer,
            missed_jail,
        })
    }

    /// Its version, as it spells it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.binary.release
    }

    /// The program.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.binary.path
    }

    /// The jailer that locks it up, or why none does.
    ///
    /// # Errors
    /// The reason, as half a sentence.
    pub fn jailer(&self) -> Result<&Path, &'static str> {
        self.jailer.as_deref().map_err(|why_not| *why_not)
    }

    /// The binary for one machine that is about to start; if it misses its jail, that is told. A jailed
    /// one has a user of its own, so that no machine can touch what is another's.
    pub(crate) fn for_machine(&self) -> FirecrackerBinary {
        if let Some(why_not) = self.missed_jail {
            tracing::warn!(
                "Firecracker runs as root, unjailed: {why_not} (--no-jailer: without this line)"
            );
        }
        let mut binary = self.binary.clone();
        binary.jail = self.jailer.clone().ok().map(|jailer| {
            let (random, _) = Uuid::new_v4().as_u64_pair();
            let uid = JAIL_USER_FIRST + u32::try_from(random % JAIL_USERS).unwrap_or(0);
            Jail {
                jailer,
                uid,
                gid: uid,
            }
        });
        binary
    }
}

/// Why a Firecracker has no jail, if root has a jailer `at_hand` that nobody refused.
fn missed_jail(
    asked_for: Option<bool>,
    at_hand: bool,
    why_not: Option<&'static str>,
) -> Option<&'static str> {
    why_not.filter(|_| asked_for.is_none() && at_hand)
}

/// The jailer that this host can use for a Firecracker whose jails are in `storage`, or why it cannot.
fn jailer_of(binary: &FirecrackerBinary, storage: &Path) -> Result<PathBuf, &'static str> {
    if !geteuid().is_root() {
        return Err("only root may lock a process up");
    }
    let users = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if !has_all_users(&users) {
        return Err("this is a user namespace, whose root may make no devices");
    }
    if !Jail::has_cgroups() {
        return Err("there is no cgroup2 in which groups can be made");
    }
    if !Jail::can_hold(&binary.path).unwrap_or(false) {
        return Err("it is linked dynamically, and a jail has no loader");
    }
    can_hold_jails(storage)?;
    Jail::find_jailer(&binary.path).ok_or("there is no jailer beside it, nor in PATH")
}

/// Whether the file system lets the jailer make devices in a jail, and start a copy of Firecracker there.
fn can_hold_jails(storage: &Path) -> Result<(), &'static str> {
    let storage = std::path::absolute(storage).unwrap_or_default();
    let mounted = storage.ancestors().find_map(|dir| statvfs(dir).ok());
    let flags = mounted.map_or(FsFlags::empty(), |mounted| mounted.flags());
    if flags.contains(FsFlags::ST_NODEV) {
        return Err("the storage is on a file system without devices (mounted nodev)");
    }
    if flags.contains(FsFlags::ST_NOEXEC) {
        return Err("the storage is on a file system without programs (mounted noexec)");
    }
    Ok(())
}

/// Whether a process with this map of users (user_namespaces(7)) is in no namespace of its own.
fn has_all_users(uid_map: &str) -> bool {
    let words: Vec<&str> = uid_map.split_whitespace().collect();
    words == ["0", "0", "4294967295"]
}

/// The VMM of a host, and why this one.
#[derive(Debug, Clone)]
pub struct VmmChoice {
    /// The VMM.
    pub binary: VmmBinary,
    /// The reason, as half a sentence.
    pub why: String,
}

impl VmmOptions {
    /// Chooses the VMM that boots guests here, by a storage that need not be there yet. Blocks for some
    /// milliseconds.
    ///
    /// # Errors
    /// The one that was asked for cannot be had, or none can.
    pub fn choose(&self, storage: &Path) -> Result<VmmChoice, StartError> {
        if let Some(kind) = self.kind {
            return Ok(VmmChoice {
                binary: self.find(kind, storage)?,
                why: "it was asked for".to_owned(),
            });
        }
        let why = match self.find(VmmKind::Firecracker, storage) {
            // Who names a QEMU and no Firecracker wants that QEMU.
            Ok(_) if self.qemu.is_some() && self.firecracker.is_none() && !self.wants_jail() => {
                "a QEMU was named, and no Firecracker".to_owned()
            }
            Ok(binary) => {
                return Ok(VmmChoice {
                    binary,
                    why: "KVM is usable and Firecracker is there".to_owned(),
                });
            }
            // Whoever insists on a jail, or names a Firecracker that is of no use, is given no guest
            // without. (One may be named for times when there is KVM.)
            Err(error) if self.wants_jail() => return Err(error),
            Err(error)
                if self.firecracker.is_some() && !matches!(error, StartError::NoKvm { .. }) =>
            {
                return Err(error);
            }
            Err(error) => format!("Firecracker cannot run here: {error}"),
        };
        Ok(VmmChoice {
            binary: self.find(VmmKind::Qemu, storage)?,
            why,
        })
    }

    fn wants_jail(&self) -> bool {
        self.jailed == Some(true)
    }

    /// Finds one VMM for the machines of a storage. Blocks for some milliseconds.
    ///
    /// # Errors
    /// It is not there, too old, has no KVM where it needs that, or no jail that was asked for.
    pub fn find(&self, kind: VmmKind, storage: &Path) -> Result<VmmBinary, StartError> {
        match kind {
            VmmKind::Qemu if self.wants_jail() => Err(StartError::NoJail {
                why_not: "QEMU has no jailer",
            }),
            VmmKind::Qemu => Ok(VmmBinary::Qemu(QemuBinary::find(self.qemu.as_deref())?)),
            VmmKind::Firecracker => {
                let why_not = match KvmSupport::of_host() {
                    KvmSupport::Usable => {
                        let program = FirecrackerProgram::find(self, storage)?;
                        return Ok(VmmBinary::Firecracker(program));
                    }
                    KvmSupport::WithoutHardware => {
                        "the processor shows no vmx or svm, whatever /dev/kvm is there"
                    }
                    KvmSupport::NotPermitted => "/dev/kvm may not be opened",
                    KvmSupport::Absent => "there is no /dev/kvm",
                };
                Err(StartError::NoKvm { why_not })
            }
        }
    }
}

impl VmmBinary {
    /// Which of the two.
    #[must_use]
    pub fn kind(&self) -> VmmKind {
        match self {
            Self::Qemu(_) => VmmKind::Qemu,
            Self::Firecracker(_) => VmmKind::Firecracker,
        }
    }

    /// The program.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Qemu(binary) => &binary.path,
            Self::Firecracker(program) => program.path(),
        }
    }

    /// The version as the program spells it.
    #[must_use]
    pub fn version(&self) -> String {
        match self {
            Self::Qemu(binary) => binary.version.to_string(),
            Self::Firecracker(program) => program.release().to_owned(),
        }
    }

    /// What its balloon can do about free pages.
    #[must_use]
    pub fn free_pages(&self) -> BalloonRecord {
        match self {
            Self::Qemu(_) => BalloonRecord {
                reporting: true,
                hinting: false,
            },
            Self::Firecracker(program) => {
                record(InstalledBalloon::plan(program.binary.version, true))
            }
        }
    }

    /// How guest code is executed here.
    #[must_use]
    pub fn accel(&self) -> Accel {
        match self {
            Self::Qemu(_) => Accel::of_host(),
            Self::Firecracker(_) => Accel::Kvm,
        }
    }

    /// Who a machine under it would be.
    #[must_use]
    pub fn identity(&self) -> VmmIdentity {
        self.identity_as(self.accel())
    }

    /// The same with another accelerator, where the VMM has more than one.
    pub(crate) fn identity_as(&self, accel: Accel) -> VmmIdentity {
        match self {
            Self::Qemu(binary) => binary.identity(accel),
            Self::Firecracker(program) => program.binary.identity(),
        }
    }

    /// The guest kernel's whole command line.
    pub(crate) fn command_line(
        &self,
        machine: &MachineConfig,
        source: &BootSource,
    ) -> Result<String, VmmError> {
        match self {
            Self::Qemu(_) => qemu::kernel_command_line(machine, source),
            Self::Firecracker(_) => firecracker::kernel_command_line(source),
        }
    }

    /// Boots a machine whose files are in `run_dir`. Says what its balloon does about free pages.
    pub(crate) async fn boot(
        &self,
        machine: &MachineConfig,
        source: &BootSource,
        run_dir: &Path,
    ) -> Result<(Arc<dyn Vmm>, BalloonRecord), StartError> {
        let console = run_dir.join(CONSOLE_FILE);
        match self {
            Self::Qemu(binary) => {
                let vmm = qemu::boot(binary, machine, source, &console).await?;
                let balloon = BalloonRecord {
                    reporting: machine.free_page_reporting,
                    hinting: false,
                };
                Ok((Arc::from(vmm), balloon))
            }
            Self::Firecracker(program) => {
                let (dir, binary) = (machine_dir(run_dir)?, program.for_machine());
                let booted = firecracker::boot(&binary, machine, source, &dir, &console);
                let (vmm, balloon) = booted.await?;
                Ok((Arc::from(vmm), record(balloon)))
            }
        }
    }
}

fn record(balloon: InstalledBalloon) -> BalloonRecord {
    BalloonRecord {
        reporting: balloon.reporting,
        hinting: balloon.hinting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jail_is_missed_where_it_could_be_expected_and_nobody_refused_it() {
        let why = Some("no cgroup2");
        assert_eq!(missed_jail(None, true, why), why);
        assert_eq!(missed_jail(Some(false), true, why), None, "--no-jailer");
        assert_eq!(missed_jail(None, false, why), None, "no root, or no jailer");
        assert_eq!(missed_jail(None, true, None), None, "it has one");
    }

    #[test]
    fn a_vmm_is_named_as_manifests_name_it() {
        for kind in [VmmKind::Qemu, VmmKind::Firecracker] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("xen".parse::<VmmKind>().is_err());
    }

    #[test]
    fn without_kvm_it_is_qemu_and_the_reason_is_told() {
        let options = VmmOptions {
            firecracker: Some("/nonexistent/firecracker".into()),
            ..VmmOptions::default()
        };
        match (options.choose(Path::new("/")), KvmSupport::of_host()) {
            (choice, KvmSupport::Usable) => {
                choice.expect_err("one was named that is not there");
            }
            (choice, _) => {
                let VmmChoice { binary, why } = choice.unwrap();
                assert_eq!(binary.kind(), VmmKind::Qemu);
                assert!(why.contains("Firecracker cannot run here"), "{why}");
            }
        }
        let asked = VmmOptions {
            kind: Some(VmmKind::Firecracker),
            ..options
        };
        assert!(asked.choose(Path::new("/")).is_err(), "never the other one");
    }

    #[test]
    fn whoever_insists_on_a_jail_is_not_given_a_guest_without() {
        let jailed = VmmOptions {
            firecracker: Some("/nonexistent/firecracker".into()),
            jailed: Some(true),
            ..VmmOptions::default()
        };
        jailed.choose(Path::new("/")).unwrap_err();
        let on_qemu = VmmOptions {
            kind: Some(VmmKind::Qemu),
            ..jailed
        };
        let error = on_qemu.choose(Path::new("/")).unwrap_err().to_string();
        assert!(
            error.contains("QEMU has no jailer") && error.contains("--jailer"),
            "{error}"
        );
    }

    #[test]
    fn a_user_namespace_is_told_from_the_host() {
        assert!(has_all_users("         0          0 4294967295\n"));
        assert!(!has_all_users("         0     100000      65536\n"));
        assert!(!has_all_users("0 0 1\n1 100000 65536\n"));
    }

    #[test]
    fn a_storage_without_devices_or_programs_holds_no_jails() {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        if !geteuid().is_root() {
            println!("not run: only root may mount");
            return;
        }
        // A thread of its own, since its mounts are its alone.
        let looked = std::thread::spawn(|| {
            let dir = tempfile::tempdir().unwrap();
            let none = None::<&str>;
            if unshare(CloneFlags::CLONE_NEWNS) == Err(nix::Error::EPERM) {
                println!("not run: this root may not mount");
                return;
            }
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).unwrap();
            let tries = [
                (MsFlags::empty(), None),
                (MsFlags::MS_NODEV, Some("nodev")),
                (MsFlags::MS_NOEXEC, Some("noexec")),
            ];
            for (flags, reason) in tries {
                mount(none, dir.path(), Some("tmpfs"), flags, none).unwrap();
                let to_be_made = dir.path().join("a/storage");
                let held = can_hold_jails(&to_be_made);
                nix::mount::umount(dir.path()).unwrap();
                match reason {
                    None => held.unwrap(),
                    Some(reason) => assert!(held.unwrap_err().contains(reason)),
                }
            }
        });
        looked.join().unwrap();
    }
}
