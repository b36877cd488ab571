//! Mounts: from an initramfs to the guest's root, and what programs expect to find there.
//!
//! ```text
//! /mnt/base   ext4, ro, the base image           moved to  /run/torpor/base
//! /mnt/layer  ext4, rw, the writable layer       moved to  /run/torpor/layer
//! /mnt/root   overlay of both                    becomes   /
//! /proc /sys /dev                                moved along
//! ```
//!
//! `/tmp` stays on the layer: what a user puts there belongs on disk, where it costs no memory.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::disks::Disks;
use super::{InStep, InitError, LAYER_DIR, SYSTEM_CGROUP_DIR, USER_CGROUP_DIR};

const BASE_AT: &str = "/mnt/base";
const LAYER_AT: &str = "/mnt/layer";
const ROOT_AT: &str = "/mnt/root";
const BASE_DIR: &str = "/run/torpor/base";

/// `noinit_itable`: a background thread that writes zeros for half an hour would make pages and blocks
/// dirty in every sandbox. `nodiscard`: `fstrim` does it once per pause.
const LAYER_OPTIONS: &str = "nodiscard,noinit_itable";
/// The layer of `/run`: small files only, and a process that fills it must not take all memory.
const RUN_OPTIONS: &str = "mode=0755,size=20%";
/// POSIX shared memory, as every distribution sizes it.
const SHM_OPTIONS: &str = "mode=1777,size=50%";
/// Group 5 is `tty` everywhere; terminals opened by a user belong to it.
const PTS_OPTIONS: &str = "mode=0620,ptmxmode=0666,gid=5";

/// Not for programs, devices or privileges: kernel interfaces.
const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// /proc, /sys and /dev of the initramfs: what loading modules and finding disks needs.
pub(super) fn kernel_file_systems() -> Result<(), InitError> {
    mount_new("proc", "/proc", "proc", PLAIN, "")?;
    mount_new("sysfs", "/sys", "sysfs", PLAIN, "")?;
    mount_new(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        "mode=0755",
    )
}

/// Mounts both disks and joins them at [`ROOT_AT`].
pub(super) fn new_root(disks: &Disks) -> Result<(), InitError> {
    let base = disks.base.to_string_lossy();
    let layer = disks.layer.to_string_lossy();
    mount_new(
        &base,
        BASE_AT,
        "ext4",
        MsFlags::MS_RDONLY | MsFlags::MS_NOATIME,
        "",
    )?;
    mount_new(&layer, LAYER_AT, "ext4", MsFlags::MS_NOATIME, LAYER_OPTIONS)?;
    let upper = format!("{LAYER_AT}/upper");
    let work = format!("{LAYER_AT}/work");
    make_dir(&upper, 0o755)?;
    make_dir(&work, 0o700)?;
    let options = format!("lowerdir={BASE_AT},upperdir={upper},workdir={work}");
    mount_new("overlay", ROOT_AT, "overlay", MsFlags::MS_NOATIME, &options)
}

/// Makes [`ROOT_AT`] the root: takes the mounts along, empties the initramfs, goes inside.
pub(super) fn switch_root() -> Result<(), InitError> {
    mount_new(
        "tmpfs",
        &inside("/run"),
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        RUN_OPTIONS,
    )?;
    // Only root may look behind the overlay.
    make_dir(&inside("/run/torpor"), 0o700)?;
    move_mount(BASE_AT, &inside(BASE_DIR))?;
    move_mount(LAYER_AT, &inside(LAYER_DIR))?;
    for dir in ["/dev", "/proc", "/sys"] {
        move_mount(dir, &inside(dir))?;
    }
    let initramfs =
        std::fs::symlink_metadata("/").in_step(|| "look at the initramfs".to_owned())?;
    empty(Path::new("/"), initramfs.dev()).in_step(|| "empty the initramfs".to_owned())?;

    nix::unistd::chdir(ROOT_AT).in_step(|| format!("enter {ROOT_AT}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .in_step(|| format!("move {ROOT_AT} to /"))?;
    nix::unistd::chroot(".").in_step(|| "make the overlay the root".to_owned())?;
    nix::unistd::chdir("/").in_step(|| "enter the new root".to_owned())
}

/// What programs expect of a running system, inside the new root.
pub(super) fn user_file_systems() -> Result<(), InitError> {
    let no_programs = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_new("devpts", "/dev/pts", "devpts", no_programs, PTS_OPTIONS)?;
    let no_devices = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_new("tmpfs", "/dev/shm", "tmpfs", no_devices, SHM_OPTIONS)?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).in_step(|| format!("make {link}"));
            }
            _ => {}
        }
    }
    mount_new("cgroup2", "/sys/fs/cgroup", "cgroup2", PLAIN, "")?;
    make_dir(USER_CGROUP_DIR, 0o755)?;
    make_dir(SYSTEM_CGROUP_DIR, 0o755)
}

/// `path` as it is called before the root is switched.
fn inside(path: &str) -> String {
    format!("{ROOT_AT}{path}")
}

/// Mounts something on a directory that is made if need be.
fn mount_new(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), InitError> {
    make_dir(target, 0o755)?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .in_step(|| format!("mount {kind} {source} on {target} with \"{options}\""))
}

fn move_mount(from: &str, to: &str) -> Result<(), InitError> {
    make_dir(to, 0o755)?;
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .in_step(|| format!("move mount {from} to {to}"))
}

/// A directory, with its parents. One that exists keeps its mode.
fn make_dir(path: &str, mode: u32) -> Result<(), InitError> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .in_step(|| format!("make directory {path}"))
}

/// Removes everything below `dir` that is on the device `device`: mounts are left alone, and so are
/// the directories that lead to them. Depth is bounded by the initramfs, which the host made.
fn empty(dir: &Path, device: u64) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let metadata = std::fs::symlink_metadata(&path)?;
        if metadata.dev() != device {
            continue;
        }
        if !metadata.is_dir() {
            std::fs::remove_file(&path)?;
            continue;
        }
        empty(&path, device)?;
        match std::fs::remove_dir(&path) {
            // A mount is in it.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            result => result?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emptying_removes_files_links_and_directories_of_one_device_only() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().symlink_metadata().unwrap().dev();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/file"), "x").unwrap();
        symlink("/proc", dir.path().join("a/link")).unwrap();

        empty(dir.path(), device + 1).unwrap();
        assert!(
            dir.path().join("a/b/file").exists(),
            "another device was touched"
        );
        empty(dir.path(), device).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Path::new("/proc/self").exists(), "a link was followed");
    }
}
