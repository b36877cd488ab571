//! Boots a guest from nothing: kernel, initramfs, base image, empty writable layer.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use torpor_build::{BalloonRecord, BaseImage, Name};
use torpor_vmm::BootSource;

use crate::assets::Assets;
use crate::error::StartError;
use crate::flags::FlagSubject;
use crate::host::Host;
use crate::initramfs;
use crate::metrics;
use crate::progress::Progress;
use crate::rootfs::{self, RootImage};
use crate::sandbox::{DISK_FILE, Memory, Parts, Sandbox, Starting};
use crate::spec::GuestSpec;
use crate::vmm::VmmKind;

/// Read by all, whatever the umask.
const INITRAMFS_MODE: u32 = 0o444;

/// A guest to boot.
#[derive(Debug)]
pub struct BootRequest {
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Size of the writable disk, in bytes.
    pub disk_bytes: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Whether it gets a network card.
    pub network: bool,
    /// The kernel series.
    pub kernel: String,
    /// More words for the kernel's command line.
    pub kernel_args: String,
    /// The root file system instead of the set-up's: a directory, a tar archive or an ext4 image.
    pub rootfs: Option<PathBuf>,
    /// The template that it becomes; flags are asked for it.
    pub template: Option<Name>,
    /// Who watches.
    pub progress: Progress,
}

/// Boots a guest and waits until its agent answers.
///
/// # Errors
/// [`StartError`] names what is missing or went wrong, with the console's last lines where the
/// guest did not come up.
pub async fn boot(host: &Host, request: BootRequest) -> Result<Sandbox, StartError> {
    let booted = Box::pin(try_boot(host, request)).await;
    metrics::booted(&booted);
    booted
}

async fn try_boot(host: &Host, request: BootRequest) -> Result<Sandbox, StartError> {
    let mut assets = Assets::find(None, &request.kernel)?;
    if let Some(agent) = host.agent() {
        assets.envd = agent.to_path_buf();
    }
    let storage = host.storage();
    let name = crate::sandbox::new_name()?;
    let run_dir = storage.run_dir(&name)?;
    let (mut spec, base_image) = import(host, &request, &assets, run_dir.path()).await?;
    let disk = run_dir.path().join(DISK_FILE);
    rootfs::make_layer(&disk, spec.disk_bytes).await?;
    let initramfs = write_initramfs(&assets, run_dir.path())?;

    let step = request.progress.step("boot the guest");
    let binary = host.vmm();
    let machine = spec.machine(storage, disk, binary.accel())?;
    let source = BootSource {
        kernel: storage.kernel_path(&spec.kernel)?,
        initramfs: Some(initramfs.clone()),
        extra_cmdline: request.kernel_args.clone(),
    };
    spec.cmdline = binary.command_line(&machine, &source)?;
    let vmm;
    (vmm, spec.balloon) = binary.boot(&machine, &source, run_dir.path()).await?;
    let reader = vmm.memory()?.reader()?;
    let starting = Starting::new(Parts {
        vmm,
        memory: Memory::Booted,
        reader,
        base_image,
        parent: None,
        spec,
        name,
        run_dir,
    });
    let sandbox = starting.answered(host.boot_patience()).await?;
    drop(step);
    // The kernel has unpacked it; nothing reads it again.
    drop(std::fs::remove_file(&initramfs));
    Ok(sandbox)
}

/// Puts kernel and base image into the storage and decides what the guest is.
async fn import(
    host: &Host,
    request: &BootRequest,
    assets: &Assets,
    scratch: &Path,
) -> Result<(GuestSpec, Arc<BaseImage>), StartError> {
    let subject = FlagSubject {
        sandbox: None,
        template: request.template.as_ref().map(ToString::to_string),
    };
    let reporting = host.vmm().kind() == VmmKind::Qemu;
    let flags = host.flags().for_template(&subject, reporting).await;
    let step = request.progress.step("import kernel and base image");
    let source = request.rootfs.as_deref().unwrap_or(&assets.base_image);
    let image = RootImage::from_source(source, scratch).await?;
    let (storage, assets) = (host.storage().clone(), assets.clone());
    let imported = tokio::task::spawn_blocking(move || -> Result<_, StartError> {
        let digest = storage.import_image(image.path())?;
        let base_image = storage.base_image(&digest)?;
        let kernel = storage.import_kernel(&assets.kernel, Some(&assets.kernel_config))?;
        Ok((kernel, base_image))
    });
    let (kernel, base_image) = imported
        .await
        .unwrap_or_else(|error| Err(StartError::Panicked(error.to_string())))?;
    drop(step);
    let spec = GuestSpec {
        memory_bytes: request.memory_bytes,
        disk_bytes: request.disk_bytes,
        vcpus: request.vcpus,
        network: request.network,
        // What is asked for; what is installed is known after the boot.
        balloon: BalloonRecord {
            reporting: flags.free_page_reporting,
            hinting: false,
        },
        kernel,
        base_image: base_image.digest(),
        cmdline: String::new(),
        template: request.template.clone(),
    };
    Ok((spec, base_image))
}

fn write_initramfs(assets: &Assets, run_dir: &Path) -> Result<PathBuf, StartError> {
    let path = run_dir.join("initramfs.cpio");
    let bytes = initramfs::assemble(&assets.envd, &assets.modules)?;
    let written = std::fs::write(&path, bytes);
    // A jailed VMM reads it as another user; the directory is ours alone.
    written
        .and_then(|()| std::fs::set_permissions(&path, Permissions::from_mode(INITRAMFS_MODE)))
        .map_err(|source| StartError::Io {
            path: path.clone(),
            source,
        })?;
    Ok(path)
}
