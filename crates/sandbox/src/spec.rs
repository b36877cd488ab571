//! What a guest is: the values that stay the same for its whole life and every build of it.

use torpor_build::{
    BalloonRecord, BuildInfo, Digest, Manifest, Name, PAGE_SIZE, Storage, VmmRecord,
};
use torpor_vmm::{Accel, MachineConfig, VmmIdentity};

use crate::error::StartError;

/// A guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestSpec {
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Size of the writable disk, in bytes.
    pub disk_bytes: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Whether it has a network card.
    pub network: bool,
    /// What its balloon does about free pages.
    pub balloon: BalloonRecord,
    /// The kernel that it runs.
    pub kernel: Digest,
    /// Its base root file system.
    pub base_image: Digest,
    /// The kernel's command line that it was booted with.
    pub cmdline: String,
    /// The template that it descends from.
    pub template: Option<Name>,
}

impl GuestSpec {
    /// The guest of a build.
    ///
    /// # Errors
    /// [`StartError::Incomplete`] when the manifest lacks what a resume needs.
    pub fn of(manifest: &Manifest) -> Result<Self, StartError> {
        let info = &manifest.info;
        let lacks = |what| StartError::Incomplete {
            build: manifest.id,
            what,
        };
        Ok(Self {
            memory_bytes: info.memory_bytes,
            disk_bytes: info.disk_bytes,
            vcpus: info.vcpus,
            network: info.network,
            balloon: info.balloon,
            kernel: info.kernel.ok_or_else(|| lacks("kernel"))?,
            base_image: info.base_image.ok_or_else(|| lacks("base image"))?,
            cmdline: info.cmdline.clone(),
            template: info.template.clone(),
        })
    }

    /// Pages of memory.
    #[must_use]
    pub fn memory_pages(&self) -> u64 {
        self.memory_bytes / PAGE_SIZE as u64
    }

    /// Blocks of the writable disk.
    #[must_use]
    pub fn disk_pages(&self) -> u64 {
        self.disk_bytes / PAGE_SIZE as u64
    }

    /// The machine that runs it, with its writable disk at `writable_disk`.
    ///
    /// # Errors
    /// The base image is not in the storage.
    pub(crate) fn machine(
        &self,
        storage: &Storage,
        writable_disk: std::path::PathBuf,
        accel: Accel,
    ) -> Result<MachineConfig, StartError> {
        Ok(MachineConfig {
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            base_image: storage.image_path(&self.base_image)?,
            writable_disk,
            network: self.network,
            free_page_reporting: self.balloon.reporting,
            accel,
        })
    }

    /// What a manifest says of it.
    pub(crate) fn build_info(&self, vmm: &VmmIdentity) -> BuildInfo {
        BuildInfo {
            template: self.template.clone(),
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disk_bytes,
            vcpus: self.vcpus,
            network: self.network,
            vmm: record(vmm),
            balloon: self.balloon,
            kernel: Some(self.kernel),
            base_image: Some(self.base_image),
            cmdline: self.cmdline.clone(),
            ..BuildInfo::default()
        }
    }
}

fn record(identity: &VmmIdentity) -> VmmRecord {
    VmmRecord {
        name: identity.name.clone(),
        version: identity.version.clone(),
        machine: identity.machine.clone(),
        accel: identity.accel.to_string(),
    }
}

/// The VMM that made a build; an accelerator of unknown name is no VMM of ours.
pub(crate) fn identity_of(manifest: &Manifest) -> Result<VmmIdentity, StartError> {
    let vmm = &manifest.info.vmm;
    let accel = match vmm.accel.as_str() {
        "kvm" => Accel::Kvm,
        "tcg" => Accel::Tcg,
        _ => {
            return Err(StartError::Incomplete {
                build: manifest.id,
                what: "known accelerator",
            });
        }
    };
    Ok(VmmIdentity {
        name: vmm.name.clone(),
        version: vmm.version.clone(),
        machine: vmm.machine.clone(),
        accel,
    })
}
