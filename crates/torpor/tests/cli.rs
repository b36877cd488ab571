//! How `torpor` behaves where no guest is needed: messages, exit codes, JSON, and what an interrupt
//! leaves behind.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests are documented by their names and fail by panicking, helpers included"
)]

mod support;

use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use torpor_build::{
    BuildId, BuildInfo, ImageKind, Name, PAGE_SIZE, PageContent, Storage, VmmRecord,
};
use torpor_vmm::Accel;
use torpor_vmm::qemu::QemuBinary;

/// Generous: the machine may be busy with other tests.
const DEADLINE: Duration = Duration::from_secs(60);
/// Less than torpor waits for what hangs if it is not interrupted again (30 s).
const CLEAN_UP_MAX: Duration = Duration::from_secs(25);
const MEMORY_PAGES: u64 = (64 << 20) / PAGE_SIZE as u64;

/// A storage of its own, and torpor in it.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn storage_dir(&self) -> PathBuf {
        self.dir.path().join("storage")
    }

    fn storage(&self) -> Storage {
        Storage::open(&self.storage_dir()).unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_torpor"));
        command
            .args(args)
            .env("TORPOR_STORAGE", self.storage_dir())
            .env_remove("TORPOR_QEMU")
            .env_remove("TORPOR_FIRECRACKER")
            .env_remove("TORPOR_VMM")
            .env_remove("TORPOR_FLAGS")
            .stdin(Stdio::null());
        command
    }

    fn torpor(&self, args: &[&str]) -> Done {
        Done::of(self.command(args).output().unwrap())
    }

    /// A build with three pages of memory on an optional parent, complete enough to be resumed if
    /// its VMM existed.
    fn build(&self, parent: Option<BuildId>, vmm: VmmRecord) -> BuildId {
        let storage = self.storage();
        let some_file = self.dir.path().join("some-file");
        fs::write(&some_file, [1; PAGE_SIZE]).unwrap();
        let below = parent.map(|id| storage.open_build(&id).unwrap());
        let id = BuildId::random();
        let staged = storage.begin_build(id).unwrap();
        for kind in [ImageKind::Memory, ImageKind::Disk] {
            let below = below
                .as_ref()
                .map(|build| build.image(kind).unwrap().into());
            let mut writer = staged.image_writer(kind, MEMORY_PAGES, below).unwrap();
            let data: Vec<u8> = (0..3 * PAGE_SIZE)
                .map(|i| (i / PAGE_SIZE) as u8 + 1)
                .collect();
            let first = if parent.is_some() { 8 } else { 0 };
            if first > 0 {
                writer.push(0, first, PageContent::Parent).unwrap();
            }
            writer.push(first, 3, PageContent::Data(&data)).unwrap();
            writer.push(first + 3, 5, PageContent::Removed).unwrap();
            let next = first + 8;
            writer
                .push(next, MEMORY_PAGES - next, PageContent::Parent)
                .unwrap();
            writer.finish().unwrap();
        }
        staged.write_vmstate(b"device state").unwrap();
        let info = BuildInfo {
            parent,
            memory_bytes: MEMORY_PAGES * PAGE_SIZE as u64,
            disk_bytes: MEMORY_PAGES * PAGE_SIZE as u64,
            vcpus: 1,
            vmm,
            kernel: Some(storage.import_kernel(&some_file, None).unwrap()),
            base_image: Some(storage.import_image(&some_file).unwrap()),
            ..BuildInfo::default()
        };
        staged.commit(info).unwrap();
        id
    }

    /// A QEMU that knows its version and never starts; it notes its process id.
    fn sleeping_qemu(&self) -> (PathBuf, PathBuf) {
        let (path, pid) = (
            self.dir.path().join("qemu"),
            self.dir.path().join("qemu.pid"),
        );
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'QEMU emulator version 7.2.22'; exit; fi\n\
             echo $$ > {0}.part && mv {0}.part {0}\nexec sleep 600\n",
            pid.display()
        );
        // Written by another process: what this one has open for writing, a child of another test may
        // have for a while, and nobody can run that.
        let text = self.dir.path().join("qemu.sh");
        fs::write(&text, script).unwrap();
        let install = Command::new("install").args([&text, &path]).status();
        assert!(install.unwrap().success());
        (path, pid)
    }
}

struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Done {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn fails(&self, code: i32, said: &str) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(
            self.stderr.contains(said),
            "{said:?} is not in: {}",
            self.stderr
        );
        assert_eq!(self.stdout, "", "a failure prints no result");
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }
}

fn flip_a_bit(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[at] ^= 4;
    fs::write(file, bytes).unwrap();
}

#[test]
fn help_shows_examples_and_exit_codes() {
    let place = Place::new();
    let help = place.torpor(&["--help"]);
    assert_eq!(help.code, 0);
    assert!(help.stdout.contains("Exit codes:"), "{}", help.stdout);
    let help = place.torpor(&["resume-build", "--help"]);
    assert!(help.stdout.contains("Examples:"), "{}", help.stdout);
}

#[test]
fn an_unknown_build_or_template_is_named_with_the_next_step() {
    let place = Place::new();
    let id = BuildId::random().to_string();
    for args in [
        ["inspect-build", &id],
        ["delete-build", &id],
        ["inspect-build", "nobody"],
        ["delete-build", "nobody"],
    ] {
        let done = place.torpor(&args);
        done.fails(3, args[1]);
        assert!(
            done.stderr.contains("torpor list-builds"),
            "{}",
            done.stderr
        );
    }
    place
        .torpor(&["resume-build", "--from-build", &id])
        .fails(3, &id);
}

#[test]
fn a_name_or_option_that_cannot_be_is_a_mistake_in_the_command_line() {
    let place = Place::new();
    place
        .torpor(&["create-build", "--template", "Not_A_Name"])
        .fails(2, "is not a name");
    place
        .torpor(&["inspect-build", "../etc"])
        .fails(2, "../etc");
    place
        .torpor(&[
            "resume-build",
            "--from-build",
            "x",
            "--signal-pause",
            "KILL",
        ])
        .fails(2, "USR1");
    place
        .torpor(&["resume-build", "--from-build", "x", "--fph-bench"])
        .fails(2, "--cmd");
    let id = BuildId::random().to_string();
    place
        .torpor(&["create-build", "--template", &id])
        .fails(2, "that is a build id");
    place
        .torpor(&["resume-build", "--from-build", "x", "--to-build", &id])
        .fails(2, "--to-build needs a pause");
}

#[test]
fn options_that_would_do_nothing_are_refused() {
    let place = Place::new();
    let resume = ["resume-build", "--from-build", "x"];
    for (more, said) in [
        (&["--shell", "--json"][..], "--shell"),
        (&["--reclaim"], "about a pause"),
        (&["--cmd", "true", "--fph-timeout-ms", "5"], "about a pause"),
        (&["--shell", "--reclaim"], "about a pause"),
        (
            &["--cmd", "true", "--fph-bench", "--fph-timeout-ms", "0"],
            "above 0",
        ),
    ] {
        place.torpor(&[&resume, more].concat()).fails(2, said);
    }
    // The global option stands before the subcommand: the parser does not see the two together.
    place
        .torpor(&[&["--json"], &resume[..], &["--shell"]].concat())
        .fails(2, "--shell");
}

#[test]
fn a_second_interrupt_ends_a_clean_up_that_hangs() {
    let place = Place::new();
    place.storage();
    // Storage that hangs: a name that is read for ever.
    let pipe = place.storage_dir().join("templates/stuck");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let mut command = place.command(&["inspect-build", "stuck"]);
    let torpor = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let torpor = Running(Some(torpor.spawn().unwrap()));
    let first = torpor.0.as_ref().unwrap().id().to_string();
    let status = PathBuf::from(format!("/proc/{first}/task"));
    let waits_for_the_pipe = || {
        // The first thread opens files of its own while it starts.
        let others = fs::read_dir(&status).unwrap().flatten();
        let mut others = others.filter(|task| task.file_name().to_str() != Some(&first));
        others.any(|task| {
            fs::read_to_string(task.path().join("wchan")).is_ok_and(|at| at == "wait_for_partner")
                || fs::read_to_string(task.path().join("syscall"))
                    .is_ok_and(|call| call.starts_with("257 "))
        })
    };
    until("it hangs", waits_for_the_pipe);
    let mut torpor = torpor;
    let began = Instant::now();
    torpor.kill(Signal::INT);
    // Two that come together are one: each of these is a second one.
    std::thread::sleep(Duration::from_secs(2));
    until("it ends", || {
        torpor.kill(Signal::INT);
        std::thread::sleep(Duration::from_millis(500));
        torpor.has_ended()
    });
    let took = began.elapsed();
    assert!(took < CLEAN_UP_MAX, "it waited for the clean-up's own end");
    torpor.done().fails(130, "files of the storage");
}

#[test]
fn files_that_are_named_and_missing_are_said_so() {
    let place = Place::new();
    for (option, role) in [
        ("--qemu", "QEMU"),
        ("--firecracker", "Firecracker"),
        ("--flags", "flag file"),
        ("--metrics", "metrics' file"),
        ("--rootfs", "root file"),
    ] {
        place
            .torpor(&["create-build", "--template", "t", option, "/nonexistent/x"])
            .fails(3, role);
    }
}

#[test]
fn without_qemu_the_package_to_install_is_named() {
    let place = Place::new();
    let empty = place.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let output = place
        .command(&["create-build", "--template", "t"])
        .env("PATH", &empty)
        .output()
        .unwrap();
    Done::of(output).fails(1, "apt-get install qemu-system-x86");
}

#[test]
fn doctor_says_as_json_what_is_missing_and_what_to_do() {
    let place = Place::new();
    let empty = place.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let output = place
        .command(&["doctor", "--json"])
        .env("PATH", &empty)
        .env("TORPOR_ASSETS", &empty)
        .output()
        .unwrap();
    let done = Done::of(output);
    assert_eq!(done.code, 1);
    let diagnosis = done.json();
    assert_eq!(diagnosis["ok"], false);
    let checks = diagnosis["checks"].as_array().unwrap();
    let check = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap();
    assert_eq!(check("QEMU")["ok"], false);
    assert!(
        check("QEMU")["next_step"]
            .as_str()
            .unwrap()
            .contains("make setup")
    );
    assert_eq!(check("guest kernel")["next_step"], "`make setup`");
    assert_eq!(check("Firecracker")["required"], false);
    assert_eq!(check("VMM")["required"], true, "one of the two is needed");
    assert_eq!(check("VMM")["ok"], false);
    assert!(!place.storage_dir().exists(), "doctor changes nothing");
}

#[test]
fn a_build_with_children_is_not_deleted_and_keeps_its_name() {
    let place = Place::new();
    let parent = place.build(None, VmmRecord::default());
    let child = place.build(Some(parent), VmmRecord::default());
    let storage = place.storage();
    let name: Name = "base".parse().unwrap();
    storage.set_template(&name, &parent).unwrap();

    place
        .torpor(&["delete-build", "base"])
        .fails(4, &child.to_string());
    assert_eq!(
        storage.resolve("base").unwrap(),
        parent,
        "the name was given back"
    );
    place
        .torpor(&["delete-build", &parent.to_string()])
        .fails(4, "base");

    let done = place.torpor(&["delete-build", &child.to_string(), "--json"]);
    assert_eq!(done.json()["build"], child.to_string());
    assert_eq!(place.torpor(&["delete-build", "base"]).code, 0);
    assert!(storage.list_builds().unwrap().is_empty());
    assert!(storage.list_templates().unwrap().is_empty());
}

#[test]
fn builds_are_listed_with_their_names_and_broken_ones_with_their_error() {
    let place = Place::new();
    let done = place.torpor(&["list-builds"]);
    assert!(
        done.stdout.contains("torpor create-build"),
        "{}",
        done.stdout
    );

    let whole = place.build(None, VmmRecord::default());
    let broken = place.build(None, VmmRecord::default());
    let name: Name = "base".parse().unwrap();
    place.storage().set_template(&name, &whole).unwrap();
    let manifest = place
        .storage_dir()
        .join(format!("builds/{broken}/manifest.json"));
    flip_a_bit(&manifest, 200);

    let list = place.torpor(&["list-builds", "--json"]).json();
    let builds = list["builds"].as_array().unwrap();
    let of = |id: BuildId| {
        builds
            .iter()
            .find(|row| row["id"] == id.to_string())
            .unwrap()
    };
    assert_eq!(of(whole)["templates"][0], "base");
    assert_eq!(of(whole)["memory_bytes"], 64 << 20);
    assert!(
        of(broken)["error"]
            .as_str()
            .unwrap()
            .contains("manifest.json")
    );
    let text = place.torpor(&["list-builds"]).stdout;
    assert!(
        text.contains("broken") && text.contains("64.0 MiB"),
        "{text}"
    );
}

#[test]
fn inspect_shows_the_layers_and_draws_the_map() {
    let place = Place::new();
    let parent = place.build(None, VmmRecord::default());
    let child = place.build(Some(parent), VmmRecord::default());
    let svg = place.dir.path().join("map.svg");
    let args = [
        "inspect-build",
        &child.to_string(),
        "--svg",
        svg.to_str().unwrap(),
    ];
    let done = place.torpor(&args);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(
        done.stdout.contains(&format!("{child} (this build)")),
        "{}",
        done.stdout
    );
    assert!(
        fs::read_to_string(&svg)
            .unwrap()
            .contains(&format!("layer {parent}"))
    );

    let chain = place.torpor(&["inspect-build", &child.to_string(), "--recursive", "--json"]);
    let chain = chain.json();
    assert_eq!(chain["builds"][1]["id"], parent.to_string());
    assert_eq!(
        chain["builds"][0]["stats"]["memory"]["pages"]["removed"],
        10
    );
}

#[test]
fn validation_names_the_damaged_file_and_the_place_in_it() {
    let place = Place::new();
    let parent = place.build(None, VmmRecord::default());
    let child = place.build(Some(parent), VmmRecord::default());
    let child = child.to_string();
    let done = place.torpor(&["inspect-build", &child, "--validate", "--recursive"]);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(done.stdout.contains("whole: 2 build(s)"), "{}", done.stdout);

    let vmstate = place.storage_dir().join(format!("builds/{parent}/vmstate"));
    flip_a_bit(&vmstate, 5);
    let done = place.torpor(&["inspect-build", &child, "--validate", "--recursive"]);
    assert_eq!(done.code, 1);
    assert!(
        done.stderr.contains("vmstate is damaged at byte"),
        "{}",
        done.stderr
    );
    assert!(done.stdout.contains("DAMAGED"), "{}", done.stdout);
}

#[test]
fn a_build_of_another_qemu_is_refused_before_anything_starts() {
    let place = Place::new();
    let (qemu, pid) = place.sleeping_qemu();
    let vmm = VmmRecord {
        version: "6.0.0".to_owned(),
        ..record(&qemu)
    };
    let id = place.build(None, vmm).to_string();
    place
        .torpor(&[
            "resume-build",
            "--from-build",
            &id,
            "--qemu",
            qemu.to_str().unwrap(),
        ])
        .fails(4, "6.0.0");
    assert!(!pid.exists());
}

#[test]
fn a_taken_id_is_refused_before_anything_starts() {
    let place = Place::new();
    let (qemu, pid) = place.sleeping_qemu();
    let id = place.build(None, record(&qemu)).to_string();
    let qemu = qemu.to_str().unwrap();
    place
        .torpor(&[
            "resume-build",
            "--from-build",
            &id,
            "--to-build",
            &id,
            "--pause",
            "--qemu",
            qemu,
        ])
        .fails(4, "exists already");
    assert!(!pid.exists());
    place.storage().open_build(&id.parse().unwrap()).unwrap();
}

#[test]
fn an_interrupt_kills_the_vmm_and_leaves_nothing() {
    for (signal, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM")] {
        let place = Place::new();
        let (qemu, pid_file) = place.sleeping_qemu();
        let id = place.build(None, record(&qemu)).to_string();
        let args = ["resume-build", "--from-build", &id, "--pause", "--qemu"];
        let torpor = place
            .command(&args)
            .arg(&qemu)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let torpor = Running(Some(torpor));
        until("QEMU was started", || pid_file.exists());
        let qemu_pid = fs::read_to_string(&pid_file).unwrap();
        torpor.kill(signal);
        let done = torpor.done();
        assert_eq!(done.code, 130, "{}", done.stderr);
        assert!(done.stderr.contains(name), "{}", done.stderr);
        let proc = PathBuf::from("/proc").join(qemu_pid.trim());
        until("QEMU is gone", || !proc.exists());
        for dir in ["run", "staging"] {
            let left: Vec<_> = fs::read_dir(place.storage_dir().join(dir))
                .unwrap()
                .collect();
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
        assert_eq!(place.storage().list_builds().unwrap().len(), 1);
    }
}

fn record(qemu: &Path) -> VmmRecord {
    let identity = QemuBinary::find(Some(qemu)).unwrap().identity(Accel::Tcg);
    VmmRecord {
        name: identity.name,
        version: identity.version,
        machine: identity.machine,
        accel: identity.accel.to_string(),
    }
}

/// A torpor that must not outlive its test, however the test ends.
struct Running(Option<Child>);

impl Running {
    fn kill(&self, signal: Signal) {
        assert!(support::signal(self.0.as_ref().unwrap().id(), signal));
    }

    fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    fn done(mut self) -> Done {
        until("torpor ends", || self.has_ended());
        Done::of(self.0.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(
            began.elapsed() < DEADLINE,
            "{what}: not within {DEADLINE:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
