//! Which VMM runs a guest: chosen for a guest that is booted, given for one that is resumed (by the
//! VMM that made its build, since device states are no VMM's but its own).
//!
//! Firecracker is the choice where it can run: KVM usable, a binary of 1.10 or newer there. QEMU runs
//! anywhere. Whoever names a VMM gets that one or an error, never the other.
//!
//! The two differ in three things, all of them here and in `incoming`: how they are found, how a
//! machine is booted, and how one is made ready for a device state.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use nix::unistd::geteuid;
use torpor_build::BalloonRecord;
use torpor_vmm::firecracker::{self, FirecrackerBinary, InstalledBalloon, Jail};
use torpor_vmm::qemu::{self, QemuBinary};
use torpor_vmm::{Accel, BootSource, KvmSupport, MachineConfig, Vmm, VmmError, VmmIdentity};

use uuid::Uuid;

use crate::error::StartError;
use crate::sandbox::{CONSOLE_FILE, machine_dir};

/// Users of jailed machines have numbers from here on, above all that hosts give out, …
const JAIL_USER_FIRST: u32 = 1_000_000_000;
/// … and so many of them that two machines hardly meet in one.
const JAIL_USERS: u64 = 1_000_000_000;

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
    jailer: Option<PathBuf>,
}

impl FirecrackerProgram {
    /// Looks at this host, whether it has KVM or not.
    ///
    /// # Errors
    /// There is no usable Firecracker, or it cannot be jailed and is to be.
    pub fn find(options: &VmmOptions) -> Result<Self, StartError> {
        let binary = FirecrackerBinary::find(options.firecracker.as_deref())?;
        let jailer = match (options.jailed, jailer_of(&binary)) {
            (Some(false), _) => None,
            (None, jailer) => jailer.ok(),
            (Some(true), Ok(jailer)) => Some(jailer),
            (Some(true), Err(why_not)) => return Err(StartError::NoJail { why_not }),
        };
        Ok(Self { binary, jailer })
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

    /// The jailer that locks it up, if one does.
    #[must_use]
    pub fn jailer(&self) -> Option<&Path> {
        self.jailer.as_deref()
    }

    /// The binary for one machine. A jailed one has a user of its own, so that no machine can touch
    /// what is another's.
    pub(crate) fn for_machine(&self) -> FirecrackerBinary {
        let mut binary = self.binary.clone();
        binary.jail = self.jailer.clone().map(|jailer| {
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

/// The jailer that this host can use for a Firecracker, or why it cannot.
fn jailer_of(binary: &FirecrackerBinary) -> Result<PathBuf, &'static str> {
    if !geteuid().is_root() {
        return Err("only root may lock a process up");
    }
    if !Jail::has_cgroups() {
        return Err("there is no cgroup2 in which groups can be made");
    }
    if !Jail::can_hold(&binary.path).unwrap_or(false) {
        return Err("it is linked dynamically, and a jail has no loader");
    }
    Jail::find_jailer(None, &binary.path).ok_or("there is no jailer beside it, nor in PATH")
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
    /// Chooses the VMM that boots guests here. Blocks for some milliseconds.
    ///
    /// # Errors
    /// The one that was asked for cannot be had, or none can.
    pub fn choose(&self) -> Result<VmmChoice, StartError> {
        if let Some(kind) = self.kind {
            return Ok(VmmChoice {
                binary: self.find(kind)?,
                why: "it was asked for".to_owned(),
            });
        }
        let why = match self.find(VmmKind::Firecracker) {
            // Who names a QEMU and no Firecracker wants that QEMU.
            Ok(_) if self.qemu.is_some() && self.firecracker.is_none() => {
                "a QEMU was named, and no Firecracker".to_owned()
            }
            Ok(binary) => {
                return Ok(VmmChoice {
                    binary,
                    why: "KVM is usable and Firecracker is there".to_owned(),
                });
            }
            Err(error) => format!("Firecracker cannot run here: {error}"),
        };
        Ok(VmmChoice {
            binary: self.find(VmmKind::Qemu)?,
            why,
        })
    }

    /// Finds one VMM. Blocks for some milliseconds.
    ///
    /// # Errors
    /// It is not there, too old, or has no KVM where it needs that.
    pub fn find(&self, kind: VmmKind) -> Result<VmmBinary, StartError> {
        match kind {
            VmmKind::Qemu => Ok(VmmBinary::Qemu(QemuBinary::find(self.qemu.as_deref())?)),
            VmmKind::Firecracker => {
                let why_not = match KvmSupport::of_host() {
                    KvmSupport::Usable => {
                        return Ok(VmmBinary::Firecracker(FirecrackerProgram::find(self)?));
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
    pub fn version(&self) -> &str {
        match self {
            Self::Qemu(binary) => &binary.version,
            Self::Firecracker(program) => program.release(),
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
            Self::Firecracker(_) => firecracker::kernel_command_line(machine, source),
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
    fn a_vmm_is_named_as_manifests_name_it() {
        for kind in [VmmKind::Qemu, VmmKind::Firecracker] {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("xen".parse::<VmmKind>().is_err());
    }

    #[test]
    fn without_firecracker_it_is_qemu_and_the_reason_is_told() {
        let options = VmmOptions {
            firecracker: Some("/nonexistent/firecracker".into()),
            ..VmmOptions::default()
        };
        let choice = options.choose().unwrap();
        assert_eq!(choice.binary.kind(), VmmKind::Qemu);
        assert!(
            choice.why.contains("Firecracker cannot run here"),
            "{}",
            choice.why
        );
        let asked = VmmOptions {
            kind: Some(VmmKind::Firecracker),
            ..options
        };
        assert!(asked.choose().is_err(), "never the other one");
    }
}
