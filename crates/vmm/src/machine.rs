//! What a machine is made of, and who runs it: plain values, checked here, used below.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{IdentityMismatch, Result, VmmError};
use crate::host::KvmSupport;

/// The smallest guest memory, in bytes. Debian's kernel and its initramfs unpack in about
/// 100 MiB; below this the guest dies in ways that explain nothing.
pub(crate) const MEMORY_BYTES_MIN: u64 = 64 << 20;
/// The largest guest memory, in bytes: 1 TiB, the physical address space that QEMU's TCG gives
/// every guest without further options.
pub(crate) const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Guest memory comes in multiples of this, so that it divides into huge pages and any host page.
pub(crate) const MEMORY_BYTES_STEP: u64 = 2 << 20;
/// The most vCPUs of one guest. A sandbox is small; each vCPU is a host thread under TCG.
pub(crate) const VCPUS_MAX: u32 = 64;
/// The longest kernel command line, in bytes: x86 Linux cuts what is longer than
/// `COMMAND_LINE_SIZE` (2048, its final zero included) without a word.
const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the processor, through `/dev/kvm`.
    Kvm,
    /// By QEMU's translator. Works anywhere.
    Tcg,
}

impl Accel {
    /// What this host is good for: KVM only where the hardware has it *and* `/dev/kvm` can be
    /// opened (a host may offer a `/dev/kvm` that runs no stock kernel), else TCG.
    #[must_use]
    pub fn of_host() -> Self {
        match KvmSupport::of_host() {
            KvmSupport::Usable => Self::Kvm,
            KvmSupport::WithoutHardware | KvmSupport::NotPermitted | KvmSupport::Absent => {
                Self::Tcg
            }
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A guest's network address on its card: each is alone on its network.
pub(crate) const GUEST_MAC: &str = "52:54:00:74:6f:72";

/// A machine. A resume must be given the same values as the boot that made the snapshot, but for
/// the paths: the device state fits no other machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual processors, at least one.
    pub vcpus: u32,
    /// The base image: raw, opened read-only, shared by any number of machines. The guest sees it
    /// as `/dev/vda`, serial `base`.
    pub base_image: PathBuf,
    /// This machine's own image: raw, sparse; discards punch holes into it. The guest sees it as
    /// `/dev/vdb`, serial `layer`.
    pub writable_disk: PathBuf,
    /// A network card on a user-mode network: egress, nothing comes in. The guest is 10.0.2.15/24,
    /// its gateway 10.0.2.2, its name server 10.0.2.3. Beware: QEMU forwards connections to the
    /// gateway to the *host's loopback*, and has no option against it; Firecracker's network does not.
    pub network: bool,
    /// The balloon reports free pages by itself. Without it the balloon is there, and silent.
    pub free_page_reporting: bool,
    /// How guest code is executed.
    pub accel: Accel,
}

impl MachineConfig {
    pub(crate) fn check(&self) -> Result<()> {
        let bytes = self.memory_bytes;
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes)
            || !bytes.is_multiple_of(MEMORY_BYTES_STEP)
        {
            return Err(VmmError::InvalidMachine {
                what: format!(
                    "memory of {bytes} bytes: it must be a multiple of 2 MiB, from 64 MiB to 1 TiB"
                ),
            });
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(VmmError::InvalidMachine {
                what: format!("{} vCPUs: 1 to {VCPUS_MAX} can be had", self.vcpus),
            });
        }
        Ok(())
    }
}

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// An uncompressed `vmlinux` with a PVH entry.
    pub kernel: PathBuf,
    /// Its first root file system.
    pub initramfs: Option<PathBuf>,
    /// What is appended to the kernel command line that the VMM needs.
    pub extra_cmdline: String,
}

/// Joins the words that a VMM needs and those that a user adds to a kernel command line.
pub(crate) fn join_command_line(words: &[&str], extra: &str) -> Result<String> {
    let mut line = words.join(" ");
    let extra = extra.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.len() > COMMAND_LINE_BYTES_MAX {
        return Err(VmmError::InvalidMachine {
            what: format!(
                "a kernel command line of {} bytes: Linux reads {COMMAND_LINE_BYTES_MAX}",
                line.len()
            ),
        });
    }
    if line.contains(['\n', '\r', '\0']) {
        return Err(VmmError::InvalidMachine {
            what: "a kernel command line with a line break".to_owned(),
        });
    }
    Ok(line)
}

/// Who made a device state, and who alone can read it again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmmIdentity {
    /// The program: `qemu` or `firecracker`.
    pub name: String,
    /// Its upstream version, as in `7.2.22`. A distribution's package revision is not part of it.
    pub version: String,
    /// The machine type.
    pub machine: String,
    /// How guest code is executed.
    pub accel: Accel,
}

impl VmmIdentity {
    /// Whether this VMM may load a state that `recorded` made. The machine type carries no
    /// version, so that the layout of a state is promised between equal versions only.
    ///
    /// # Errors
    /// The first thing that differs, and what to do about it.
    pub fn can_resume(&self, recorded: &Self) -> std::result::Result<(), IdentityMismatch> {
        let accel = (self.accel.to_string(), recorded.accel.to_string());
        let pairs = [
            ("VMM", &self.name, &recorded.name),
            ("VMM version", &self.version, &recorded.version),
            ("machine type", &self.machine, &recorded.machine),
            ("accelerator", &accel.0, &accel.1),
        ];
        for (what, here, there) in pairs {
            if here != there {
                return Err(IdentityMismatch {
                    what,
                    here: here.clone(),
                    recorded: there.clone(),
                    recorded_by: recorded.to_string(),
                });
            }
        }
        Ok(())
    }
}

impl fmt::Display for VmmIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} ({}, {})",
            self.name, self.version, self.machine, self.accel
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> VmmIdentity {
        VmmIdentity {
            name: "qemu".into(),
            version: "7.2.22".into(),
            machine: "microvm".into(),
            accel: Accel::Tcg,
        }
    }

    #[test]
    fn a_state_is_resumed_by_the_same_vmm_only() {
        let recorded = identity();
        identity().can_resume(&recorded).unwrap();

        let newer = VmmIdentity {
            version: "10.0.2".into(),
            ..identity()
        };
        let error = newer.can_resume(&recorded).unwrap_err().to_string();
        assert_eq!(
            error,
            "this build was made by qemu 7.2.22 (microvm, tcg): VMM version there is 7.2.22, here \
             10.0.2; install the recorded one, or build the template again with this one"
        );

        let other = VmmIdentity {
            accel: Accel::Kvm,
            ..identity()
        };
        assert!(
            other
                .can_resume(&recorded)
                .unwrap_err()
                .to_string()
                .contains("accelerator")
        );
    }

    #[test]
    fn a_machine_that_no_guest_could_use_is_refused() {
        let good = MachineConfig {
            memory_bytes: 512 << 20,
            vcpus: 1,
            base_image: "/base".into(),
            writable_disk: "/layer".into(),
            network: false,
            free_page_reporting: true,
            accel: Accel::Tcg,
        };
        good.check().unwrap();
        for bytes in [0, 1 << 20, (512 << 20) + 4096, u64::MAX] {
            let bad = MachineConfig {
                memory_bytes: bytes,
                ..good.clone()
            };
            assert!(
                bad.check()
                    .unwrap_err()
                    .to_string()
                    .contains(&bytes.to_string())
            );
        }
        for vcpus in [0, 65] {
            assert!(
                MachineConfig {
                    vcpus,
                    ..good.clone()
                }
                .check()
                .is_err()
            );
        }
    }
}
