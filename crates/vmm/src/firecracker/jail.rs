//! A Firecracker that is locked up by the `jailer` of its release.
//!
//! ```text
//! machine's directory / firecracker / vm / root     the only directory that it sees
//!                                           ├ firecracker      the jailer's copy
//!                                           ├ base.img …       bind mounts, in its own namespace
//!                                           ├ log              a pipe to us
//!                                           └ api.sock …       sockets, as without a jail
//! ```
//!
//! It runs as a user of its own, in process-id, mount and network namespaces and a cgroup of its own,
//! sees one directory, and has devices for KVM, userfaultfd and taps.
//!
//! The jailer becomes Firecracker, so that its process is our child all the way; that is why the
//! process-id namespace is ours and not by its `--new-pid-ns`, which would leave us with a process that
//! has ended and one that is somebody else's child. When the jailer changes its user, the kernel forgets
//! that the process is to die with us. So it is reminded, by a system call that we make it do, before it
//! is given a machine. Until then, some milliseconds, a torpor that is killed leaves an idle Firecracker;
//! it ends, as does its cgroup, when what is left of its sandbox is swept ([`end_left_over`]).
//!
//! Root is needed. The writable disk is given to the jail's user; base image, kernel and initramfs stay
//! whose they are, and must be readable by that user.

use std::env;
use std::ffi::{CString, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use uuid::Uuid;

use crate::confinement::{BindMount, Cgroup, Confinement, end_cgroup};
use crate::error::{Result, VmmError};
use crate::firecracker::binary::FirecrackerBinary;
use crate::firecracker::config::{self, names};
use crate::firecracker::instance::file_error;

/// The program's name in Firecracker's releases, once unpacked.
const JAILER_NAME: &str = "jailer";
/// What the jailer calls the machine: its directory has no other.
const MACHINE_ID: &str = "vm";
/// Under this name stand the cgroups of all jails.
const CGROUP_PARENT: &str = "torpor";

/// In a machine's directory: which cgroup it has.
const CGROUP_RECORD: &str = "cgroup";
/// A name and two numbers.
const RECORD_BYTES_MAX: u64 = 128;

/// The next step for who cannot have one.
const WITHOUT_JAIL: &str = "--no-jailer runs Firecracker without a jail";

/// The first bytes of an ELF file of 64 bits, little endian.
const ELF64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01";
/// How much of a program is looked at. Its program headers come right after the file's own.
const ELF_HEAD_BYTES: u64 = 4096;
/// The program header that names a loader.
const PT_INTERP: usize = 3;
/// Where the kernel says what is mounted (proc_pid_mounts(5)).
const MOUNTS: &str = "/proc/self/mounts";

/// How a Firecracker is locked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jail {
    /// The `jailer` of the same release.
    pub jailer: PathBuf,
    /// The user that it runs as. Each machine should have one of its own.
    pub uid: u32,
    /// The group that it runs as.
    pub gid: u32,
}

impl Jail {
    /// Finds the jailer: beside the Firecracker, or in `PATH`. `None`: there is none.
    #[must_use]
    pub fn find_jailer(firecracker: &Path) -> Option<PathBuf> {
        let beside = firecracker.with_file_name(JAILER_NAME);
        let search = env::var_os("PATH").unwrap_or_default();
        let in_path = env::split_paths(&search).map(|dir| dir.join(JAILER_NAME));
        std::iter::once(beside)
            .chain(in_path)
            .find(|path| path.is_file())
    }

    /// Whether a program can run in a jail: one that is linked dynamically finds no loader there.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn can_hold(program: &Path) -> io::Result<bool> {
        let mut head = Vec::new();
        File::open(program)?
            .take(ELF_HEAD_BYTES)
            .read_to_end(&mut head)?;
        Ok(names_no_loader(&head))
    }

    /// Whether this host has the cgroups that a jail needs (version 2), and one can be made, which is
    /// tried: in a container they are often mounted, and cannot be written to.
    #[must_use]
    pub fn has_cgroups() -> bool {
        let mounts = fs::read_to_string(MOUNTS).unwrap_or_default();
        cgroup2_of(&mounts).is_some_and(|hierarchy| can_make_dirs_in(&hierarchy))
    }
}

/// A jail that is being furnished.
#[derive(Debug)]
pub(super) struct Furnishing<'a> {
    jail: &'a Jail,
    /// Firecracker's own file, not a link to it: the jailer follows links, and names the directory by
    /// what it comes to.
    program: PathBuf,
    root: PathBuf,
    mounts: Vec<BindMount>,
}

impl<'a> Furnishing<'a> {
    /// Makes the directory that the jailed one will see.
    pub(super) fn begin(jail: &'a Jail, binary: &FirecrackerBinary, dir: &Path) -> Result<Self> {
        let program = fs::canonicalize(&binary.path)
            .map_err(|e| file_error("firecracker binary", &binary.path, e))?;
        let name = program.file_name().unwrap_or_default();
        let root = dir.join(name).join(MACHINE_ID).join("root");
        fs::create_dir_all(&root).map_err(|e| file_error("jail", &root, e))?;
        Ok(Self {
            jail,
            program,
            root,
            mounts: Vec::new(),
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Gives it `source` under `name`.
    pub(super) fn give(&mut self, role: &'static str, source: &Path, name: &str) -> Result<()> {
        let given = self.try_give(source, name);
        let mount = given.map_err(|error| file_error(role, source, error))?;
        self.mounts.push(mount);
        Ok(())
    }

    fn try_give(&self, source: &Path, name: &str) -> io::Result<BindMount> {
        let source = fs::canonicalize(source)?;
        let writable = name == names::WRITABLE_DISK;
        if writable {
            chown(&source, Some(self.jail.uid), Some(self.jail.gid))?;
        } else {
            self.check_readable(&source)?;
        }
        let target = self.root.join(name);
        File::create_new(&target)?;
        Ok(BindMount {
            source: CString::new(source.as_os_str().as_bytes())?,
            target: CString::new(target.as_os_str().as_bytes())?,
            read_only: !writable,
        })
    }

    /// Firecracker's own message would name neither the file nor the reason.
    fn check_readable(&self, source: &Path) -> io::Result<()> {
        let file = fs::metadata(source)?;
        let needed = match (file.uid() == self.jail.uid, file.gid() == self.jail.gid) {
            (true, _) => 0o400,
            (false, true) => 0o040,
            (false, false) => 0o004,
        };
        if file.mode() & needed == 0 {
            let (uid, mode) = (self.jail.uid, file.mode() & 0o777);
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("its mode {mode:o} keeps it from the jail's user {uid}; chmod o+r it"),
            ));
        }
        Ok(())
    }

    /// The jailer's arguments, and what it is to be started in.
    pub(super) fn finish(self, dir: &Path) -> Result<(Vec<OsString>, Confinement)> {
        let log = self.root.join(names::LOG);
        let stderr = make_log(&log, self.jail).map_err(|e| file_error("jail's log", &log, e))?;
        let (name, cgroup) = make_cgroup(dir)?;
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |option: &str, value: OsString| arguments.extend([option.into(), value]);
        add("--id", MACHINE_ID.into());
        add("--exec-file", self.program.into());
        add("--uid", self.jail.uid.to_string().into());
        add("--gid", self.jail.gid.to_string().into());
        add("--chroot-base-dir", dir.into());
        add("--cgroup-version", "2".into());
        add("--parent-cgroup", name.into());
        arguments.push("--".into());
        arguments.extend(config::arguments(names::LOG));
        let confinement = Confinement {
            mounts: self.mounts,
            stderr,
            cgroup,
        };
        Ok((arguments, confinement))
    }
}

/// A pipe with a name: the jailed one has no /proc by which to find its standard error. Opened for
/// both directions on our side, it never ends, and opening it never waits.
fn make_log(path: &Path, jail: &Jail) -> io::Result<(OwnedFd, OwnedFd)> {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    chown(path, Some(jail.uid), Some(jail.gid))?;
    let ours = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let theirs = OpenOptions::new().write(true).open(path)?;
    Ok((ours.into(), theirs.into()))
}

/// A name that nobody has given to anything.
fn new_name() -> String {
    Uuid::new_v4().to_string()
}

/// Ends what a torpor that was killed has left of a jail in a machine's directory: its cgroup, and
/// whatever still runs in it. The caller must be sure that nobody owns that machine any more. A
/// directory without a record, of a machine that was not jailed, is none of ours.
///
/// # Errors
/// The record is damaged, or something lives on after the deadline.
pub fn end_left_over(dir: &Path, deadline: Instant) -> io::Result<()> {
    let Some(name) = recorded(dir)? else {
        return Ok(());
    };
    match cgroup2_of(&fs::read_to_string(MOUNTS)?) {
        Some(hierarchy) => end_cgroup(&hierarchy.join(CGROUP_PARENT).join(name), deadline),
        None => Err(io::Error::other("no cgroup2 is mounted")),
    }
}

/// What is recorded of a machine in `dir` whose cgroup has this name. The directory's own identity
/// belongs to it: a copy of a storage speaks of machines that are not its own.
fn record(dir: &Path, name: &str) -> io::Result<String> {
    let its = fs::metadata(dir)?;
    Ok(format!("{name} {} {}", its.dev(), its.ino()))
}

/// The cgroup's name; `None` where there is no record, or another directory's.
fn recorded(dir: &Path) -> io::Result<Option<String>> {
    // A pipe is not waited for, a link not followed.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(dir.join(CGROUP_RECORD));
    let mut text = String::new();
    match opened {
        Ok(file) => file.take(RECORD_BYTES_MAX).read_to_string(&mut text)?,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // Written before there was a cgroup: whoever was killed over that made none.
    if text.is_empty() {
        return Ok(None);
    }
    let name = text
        .split(' ')
        .next()
        .and_then(|name| Uuid::try_parse(name).ok());
    let name = name.ok_or_else(|| io::Error::other(format!("{text:?} names no cgroup")))?;
    let name = name.to_string();
    Ok((text == record(dir, &name)?).then_some(name))
}

/// Makes a directory and removes it.
fn can_make_dirs_in(dir: &Path) -> bool {
    let tried = dir.join(format!("{CGROUP_PARENT}-{}", new_name()));
    let made = fs::create_dir(&tried).and_then(|()| fs::remove_dir(&tried));
    if let Err(error) = &made {
        tracing::debug!("cannot make {}: {error}", tried.display());
    }
    made.is_ok()
}

/// A cgroup of its own, and its name below the hierarchy's root. Where it is stands in the machine's
/// directory from before it is made: see [`end_left_over`].
fn make_cgroup(dir: &Path) -> Result<(PathBuf, Cgroup)> {
    let name = new_name();
    let mounts = fs::read_to_string(MOUNTS).map_err(|source| VmmError::Host {
        what: "look for the cgroups",
        source,
    })?;
    let Some(hierarchy) = cgroup2_of(&mounts) else {
        return Err(VmmError::Host {
            what: "make a cgroup for the jail",
            source: io::Error::new(
                io::ErrorKind::NotFound,
                format!("no cgroup2 is mounted; {WITHOUT_JAIL}"),
            ),
        });
    };
    let path = dir.join(CGROUP_RECORD);
    record(dir, &name)
        .and_then(|record| fs::write(&path, record))
        .map_err(|error| file_error("jail's record", &path, error))?;
    let name = Path::new(CGROUP_PARENT).join(name);
    let path = hierarchy.join(&name);
    let cgroup = Cgroup::create(path.clone()).map_err(|error| {
        let told = io::Error::new(error.kind(), format!("{error}; {WITHOUT_JAIL}"));
        file_error("jail's cgroup", &path, told)
    })?;
    Ok((name, cgroup))
}

/// Whether the beginning of a 64-bit ELF file shows all its program headers, and none of them names a
/// loader (elf(5)).
fn names_no_loader(head: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = head.get(at..at.checked_add(bytes)?)?;
        let mut wide = [0; 8];
        wide[..bytes].copy_from_slice(field);
        usize::try_from(u64::from_le_bytes(wide)).ok()
    };
    if !head.starts_with(ELF64_LITTLE_ENDIAN) {
        return false;
    }
    let (Some(first), Some(size), Some(count)) = (number(32, 8), number(54, 2), number(56, 2))
    else {
        return false;
    };
    (0..count).all(|header| {
        let kind = first
            .checked_add(header * size)
            .and_then(|at| number(at, 4));
        kind.is_some_and(|kind| kind != PT_INTERP)
    })
}

/// Where /proc/mounts has the version 2 hierarchy: the first, as the jailer takes it.
fn cgroup2_of(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let place = words.next()?;
        (words.next()? == "cgroup2").then(|| place.into())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::firecracker::binary::Deadlines;
    use crate::version::Version;

    #[test]
    fn the_version_2_hierarchy_is_found_wherever_it_is_mounted() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            cgroup2_of(hybrid).as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        assert_eq!(cgroup2_of("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn a_hierarchy_that_cannot_be_written_to_is_found_out_and_nothing_is_left_of_the_try() {
        let dir = tempfile::tempdir().unwrap();
        assert!(can_make_dirs_in(dir.path()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // Not even root makes directories there.
        assert!(!can_make_dirs_in(Path::new("/proc/self")));
    }

    #[test]
    #[allow(clippy::disallowed_methods, reason = "it need not be durable")]
    fn a_record_speaks_of_the_directory_that_it_was_made_in_and_of_a_name_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let [machine, moved, copy] = ["machine", "moved", "copy"].map(|name| dir.path().join(name));
        fs::create_dir(&machine).unwrap();
        assert_eq!(recorded(&machine).unwrap(), None);
        assert_eq!(recorded(&dir.path().join("none")).unwrap(), None);
        let name = new_name();
        fs::write(
            machine.join(CGROUP_RECORD),
            record(&machine, &name).unwrap(),
        )
        .unwrap();
        fs::rename(&machine, &moved).unwrap();
        assert_eq!(recorded(&moved).unwrap(), Some(name));
        fs::create_dir(&copy).unwrap();
        fs::copy(moved.join(CGROUP_RECORD), copy.join(CGROUP_RECORD)).unwrap();
        assert_eq!(recorded(&copy).unwrap(), None);
        fs::write(copy.join(CGROUP_RECORD), "").unwrap();
        assert_eq!(recorded(&copy).unwrap(), None);
        for damaged in ["..", "../other 1 2", "a 1 2"] {
            fs::write(moved.join(CGROUP_RECORD), damaged).unwrap();
            recorded(&moved).unwrap_err();
        }
    }

    #[test]
    fn a_file_that_the_jails_user_cannot_read_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("base");
        fs::write(&image, "").unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
        let owner = fs::metadata(&image).unwrap().uid();
        let jail = Jail {
            jailer: "/usr/bin/jailer".into(),
            uid: owner + 1,
            gid: u32::MAX - 1,
        };
        let mut furnishing = Furnishing {
            jail: &jail,
            program: PathBuf::new(),
            root: dir.path().to_owned(),
            mounts: Vec::new(),
        };
        let error = furnishing.give("base image", &image, names::BASE_IMAGE);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("base image") && error.contains("chmod o+r"),
            "{error}"
        );
    }

    /// As releases are installed: `firecracker` is a link to `firecracker-v1.16.1-x86_64`.
    #[test]
    fn the_jail_of_a_firecracker_that_is_reached_by_a_link_is_named_as_the_jailer_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let release = dir.path().join("firecracker-v1.16.1-x86_64");
        File::create(&release).unwrap();
        let link = dir.path().join("firecracker");
        std::os::unix::fs::symlink(&release, &link).unwrap();
        let jail = Jail {
            jailer: "/usr/bin/jailer".into(),
            uid: 1,
            gid: 1,
        };
        let binary = FirecrackerBinary {
            path: link,
            version: Version::new(1, 16, 1),
            release: "1.16.1".to_owned(),
            jail: None,
            deadlines: Deadlines::default(),
        };
        let machine = dir.path().join("machine");
        let furnishing = Furnishing::begin(&jail, &binary, &machine).unwrap();
        let root = machine.join("firecracker-v1.16.1-x86_64/vm/root");
        assert_eq!(furnishing.root(), root);
        assert_eq!(furnishing.program, release.canonicalize().unwrap());
    }

    #[test]
    fn a_program_that_needs_a_loader_is_told_from_one_that_does_not() {
        // This one is linked as Rust does by default.
        let dynamic = !cfg!(target_feature = "crt-static");
        assert_eq!(
            Jail::can_hold(&env::current_exe().unwrap()).unwrap(),
            !dynamic
        );
        let header = |kind: u32| {
            let mut head = vec![0; 64 + 56];
            head[..6].copy_from_slice(ELF64_LITTLE_ENDIAN);
            (head[32], head[54], head[56]) = (64, 56, 1);
            head[64..68].copy_from_slice(&kind.to_le_bytes());
            head
        };
        assert!(names_no_loader(&header(1)));
        assert!(!names_no_loader(&header(3)));
        assert!(!names_no_loader(&header(1)[..66]), "cut short");
        assert!(!names_no_loader(b"#!/bin/sh\n"));
    }

    #[test]
    fn a_jailer_is_looked_for_beside_its_firecracker() {
        let dir = tempfile::tempdir().unwrap();
        let jailer = dir.path().join(JAILER_NAME);
        File::create(&jailer).unwrap();
        let firecracker = dir.path().join("firecracker");
        assert_eq!(Jail::find_jailer(&firecracker), Some(jailer));
    }
}
