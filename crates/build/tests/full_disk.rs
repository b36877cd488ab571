//! A disk that is full: one clear error, nothing left, everything before it intact.
#![allow(missing_docs, clippy::unwrap_used, reason = "test code")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Push, info, names_in, write_image};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, Rlimit, setrlimit};
use torpor_build::{BuildId, Error, ImageKind, Result, Storage, ValidateOptions};

const SMALL_BYTES: u64 = 2 << 20;

/// Twice as much random data as there is room for.
fn too_much() -> Vec<Push> {
    vec![Push::Data(
        (0..2 * SMALL_BYTES / 4096).map(|n| 2 * n + 1).collect(),
    )]
}

fn try_to_fill(storage: &Storage) -> Result<()> {
    let staged = storage.begin_build(BuildId::random())?;
    write_image(&staged, ImageKind::Memory, None, &too_much())?;
    staged.commit(info(None)).map(drop)
}

fn is_refused_and_harmless(root: &Path) {
    let storage = Storage::open(root).unwrap();
    let staged = storage.begin_build(BuildId::random()).unwrap();
    write_image(&staged, ImageKind::Memory, None, &[Push::Data(vec![1])]).unwrap();
    let good = staged.commit(info(None)).unwrap();
    for _ in 0..3 {
        let error = try_to_fill(&storage).unwrap_err();
        assert!(matches!(error, Error::Full { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("memory.data") && text.contains("free space"),
            "{text}"
        );
        assert_eq!(names_in(&storage, "builds"), [good.id().to_string()]);
        assert!(names_in(&storage, "staging").is_empty());
    }
    assert!(good.validate(ValidateOptions::default()).is_whole());
}

#[test]
fn a_full_file_system_is_an_error_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let options = format!("size={SMALL_BYTES}");
    let options = std::ffi::CString::new(options).unwrap();
    if let Err(error) = mount(
        "none",
        dir.path(),
        "tmpfs",
        MountFlags::empty(),
        options.as_c_str(),
    ) {
        println!("not tried: mounting needs root ({error})");
        return;
    }
    let result = std::panic::catch_unwind(|| is_refused_and_harmless(&dir.path().join("storage")));
    unmount(dir.path(), UnmountFlags::DETACH).unwrap();
    result.unwrap();
}

/// Works without root. The limit is the whole process's, so that a process of its own has it.
#[test]
fn a_limit_on_file_sizes_is_an_error_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "limited_process", "--nocapture"])
        .env("TORPOR_TEST_LIMITED", dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What the limited process does: not a test by itself.
#[test]
fn limited_process() {
    let Some(dir) = std::env::var_os("TORPOR_TEST_LIMITED") else {
        return;
    };
    // SAFETY: ignoring a signal runs no handler; without it, the limit would kill the process.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let limit = Rlimit {
        current: Some(SMALL_BYTES),
        maximum: Some(SMALL_BYTES),
    };
    setrlimit(Resource::Fsize, limit).unwrap();
    is_refused_and_harmless(&Path::new(&dir).join("storage"));
}
