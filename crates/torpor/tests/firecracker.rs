//! The program on a real guest under a real Firecracker, as a person types it: doctor, build, resume,
//! pause, shell, inspect, and what a drain brings.
//!
//! Needs a Firecracker (`TORPOR_FIRECRACKER`) and KVM: `make test-firecracker` gives both. Without them
//! nothing is run here, which the test says. One test, because the boot of the template is what costs;
//! the template `fc` stays in the storage for the tests that come after. Where the program is not where
//! it was built, `TORPOR_PROGRAM` names it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests are documented by their names and fail by panicking, helpers included"
)]

mod support;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::Value;

fn storage_dir() -> PathBuf {
    std::env::var_os("TORPOR_TEST_STORAGE").map_or_else(
        || std::env::temp_dir().join("torpor-firecracker"),
        PathBuf::from,
    )
}

/// The program, with patience for guests that are emulated in an emulation.
fn torpor(args: &[&str]) -> Command {
    let program = std::env::var_os("TORPOR_PROGRAM");
    let program = program.map_or_else(|| env!("CARGO_BIN_EXE_torpor").into(), PathBuf::from);
    let mut command = Command::new(program);
    command
        .args(args)
        .env("TORPOR_STORAGE", storage_dir())
        .env("TORPOR_GUEST_PATIENCE", "240")
        .env_remove("TORPOR_VMM")
        .env_remove("TORPOR_FLAGS")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Exit code, standard output and standard error.
fn run(args: &[&str]) -> (i32, String, String) {
    let began = Instant::now();
    let output = torpor(args).output().unwrap();
    println!("{:?}: torpor {}", began.elapsed(), args.join(" "));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[track_caller]
fn succeeds(args: &[&str]) -> String {
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    stdout
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&succeeds(args)).unwrap()
}

#[test]
fn every_command_of_the_main_job_runs_on_firecracker() {
    if std::env::var_os("TORPOR_FIRECRACKER").is_none() {
        println!("not run: TORPOR_FIRECRACKER names no Firecracker (make test-firecracker)");
        return;
    }
    doctor_takes_it();
    let built = build();
    resume(&built);
    shell();
    let paused = signal_pause();
    look(&paused);
    a_build_is_resumed_by_the_vmm_that_made_it();
    in_place();
    fph_bench();
    succeeds(&["delete-build", &paused]);
}

/// By itself: nobody says --vmm.
fn doctor_takes_it() {
    let diagnosis = json(&["doctor", "--json"]);
    let checks = diagnosis["checks"].as_array().unwrap();
    let found = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["ok"], true, "{check}");
        check["found"].as_str().unwrap().to_owned()
    };
    assert!(found("VMM").starts_with("firecracker "), "{}", found("VMM"));
    let firecracker = found("Firecracker");
    println!("{firecracker}");
    let jailed = std::env::var_os("TORPOR_TEST_JAILED").is_some();
    assert_eq!(firecracker.contains("; jailed by "), jailed);
}

fn build() -> String {
    let built = json(&[
        "create-build",
        "--template",
        "fc",
        "--memory",
        "256M",
        "--disk",
        "256M",
        "--network",
        "--setup-cmd",
        "echo made > /root/made",
        "--ready-cmd",
        "test -e /root/made",
        "--json",
    ]);
    let id = built["build"].as_str().unwrap().to_owned();
    let inspected = json(&["inspect-build", "fc", "--validate", "--json"]);
    assert!(inspected.to_string().contains("firecracker"), "{inspected}");
    id
}

/// Whether this Firecracker's balloon has hinting: those before 1.14 have none.
fn can_drain() -> bool {
    let inspected = json(&["inspect-build", "fc", "--json"]);
    let build = &inspected["builds"][0];
    // By its number: what was installed is to be found out.
    let vmm = build["vmm"].as_str().unwrap();
    let version = vmm.split([' ', '.']).skip(1).take(2);
    let version: Vec<u32> = version.map(|part| part.parse().unwrap()).collect();
    let known = version >= vec![1, 14];
    assert_eq!(build["free_page_hinting"], known, "{vmm}");
    known
}

fn resume(built: &str) {
    let said = succeeds(&[
        "resume-build",
        "--from-build",
        "fc",
        "--cmd",
        "cat /root/made",
    ]);
    assert!(said.starts_with("made\n"), "{said}");
    let line = "echo kept | tee /dev/shm/kept > /root/kept";
    let metrics = storage_dir().with_extension("prom");
    let paused = json(&[
        "resume-build",
        "--from-build",
        built,
        "--cmd-pause",
        line,
        "--reclaim",
        "--fph-timeout-ms",
        "60000",
        "--metrics",
        metrics.to_str().unwrap(),
        "--json",
    ]);
    let pause = &paused["pause"];
    let outcome = if can_drain() { "done" } else { "unsupported" };
    assert_eq!(pause["drain"]["outcome"], outcome, "{pause}");
    assert_eq!(
        pause["drain_removes"].as_u64().unwrap() > 0,
        can_drain(),
        "{pause}"
    );
    let text = std::fs::read_to_string(&metrics).unwrap();
    std::fs::remove_file(&metrics).unwrap();
    for line in [
        format!("torpor_drains_total{{outcome=\"{outcome}\"}} 1"),
        format!(
            "torpor_drain_remove_events_total {}",
            pause["drain_removes"]
        ),
    ] {
        assert!(text.lines().any(|one| one == line), "no {line} in:\n{text}");
    }
    let id = paused["to_build"].as_str().unwrap();
    let line = "cat /dev/shm/kept /root/kept";
    let said = succeeds(&["resume-build", "--from-build", id, "--cmd", line]);
    assert!(said.starts_with("kept\nkept\n"), "{said}");
    succeeds(&["delete-build", id]);
}

fn shell() {
    let mut torpor = torpor(&["resume-build", "--from-build", "fc", "--shell"]);
    let mut torpor = torpor.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = torpor.stdin.take().unwrap();
    stdin.write_all(b"echo $((6 * 7))\nexit\n").unwrap();
    let mut said = String::new();
    let mut stdout = torpor.stdout.take().unwrap();
    stdout.read_to_string(&mut said).unwrap();
    drop(stdin);
    assert!(torpor.wait().unwrap().success());
    assert!(said.contains("42"), "{said}");
}

fn signal_pause() -> String {
    let args = [
        "resume-build",
        "--from-build",
        "fc",
        "--signal-pause",
        "USR1",
        "--json",
    ];
    let mut torpor = torpor(&args).spawn().unwrap();
    let mut said = BufReader::new(torpor.stderr.take().unwrap()).lines();
    let sandbox = said.find_map(|line| {
        let line = line.unwrap();
        let (_, name) = line.split_once("sandbox s-")?;
        Some(format!("s-{}", name.split(' ').next()?))
    });
    let sandbox = sandbox.expect("it never ran");
    // Of another process, whose VMM has its guest's memory for itself.
    let look = json(&["inspect-memory", "--sandbox", &sandbox, "--json"]);
    assert!(look.to_string().contains("page_cache"), "{look}");
    assert!(support::signal(torpor.id(), Signal::USR1));
    let mut stdout = String::new();
    let mut out = torpor.stdout.take().unwrap();
    // Its standard error is read to the end, or it would wait for us.
    let rest = std::thread::spawn(move || said.map_while(Result::ok).collect::<Vec<_>>());
    out.read_to_string(&mut stdout).unwrap();
    assert!(torpor.wait().unwrap().success(), "{:?}", rest.join());
    let paused: Value = serde_json::from_str(&stdout).unwrap();
    paused["to_build"].as_str().unwrap().to_owned()
}

fn look(build: &str) {
    let look = json(&["inspect-memory", "--build", build, "--json"]);
    assert!(look.to_string().contains("page_cache"), "{look}");
}

fn a_build_is_resumed_by_the_vmm_that_made_it() {
    let args = ["resume-build", "--from-build", "fc", "--vmm", "qemu"];
    let (code, _, said) = run(&args);
    // Where there is a QEMU it is the wrong one, and where there is none it is missing.
    assert!(
        (code == 4 && said.contains("--vmm firecracker")) || said.contains("qemu-system"),
        "{code}: {said}"
    );
}

/// Two builds of one VM that goes on, each on top of the one before.
fn in_place() {
    let stored = json(&[
        "resume-build",
        "--from-build",
        "fc",
        "--cmd-pause",
        "echo again >> /root/in-place; head -c 4000000 /dev/urandom > /dev/shm/$(date +%s%N)",
        "--in-place",
        "--iterations",
        "2",
        "--json",
    ]);
    let checkpoints = stored["checkpoints"].as_array().unwrap();
    let id = |number: usize| checkpoints[number]["build"].as_str().unwrap();
    let stored_bytes = &checkpoints[1]["pause"]["memory"]["raw_bytes"];
    assert!(
        stored_bytes.as_u64().unwrap() < 32 << 20,
        "only what is new: {stored_bytes}"
    );
    let (code, _, said) = run(&["delete-build", id(0)]);
    assert!(
        code != 0 && said.contains(id(1)),
        "the one stands on the other: {said}"
    );
    let listed = json(&["list-builds", "--json"]).to_string();
    assert!(listed.contains(id(0)) && listed.contains(id(1)), "{listed}");
    let line = "cat /root/in-place";
    let said = succeeds(&["resume-build", "--from-build", id(1), "--cmd", line]);
    assert!(said.starts_with("again\nagain\n"), "{said}");
    for number in [1, 0] {
        succeeds(&["delete-build", id(number)]);
    }
}

/// Hints come in blocks of 4 MiB: of much less than this no block may be free as a whole.
fn fph_bench() {
    let line = "head -c 60000000 /dev/urandom > /dev/shm/x; rm /dev/shm/x";
    let compared = json(&[
        "resume-build",
        "--from-build",
        "fc",
        "--cmd",
        line,
        "--fph-bench",
        "--fph-timeout-ms",
        "60000",
        "--json",
    ]);
    let with = &compared["with_drain"];
    println!(
        "FIGURE --fph-bench: {} of what is stored without the drain; {} REMOVE events, {} ms",
        compared["stored_ratio"], with["drain_removes"], with["drain"]["ms"]
    );
    if can_drain() {
        assert_eq!(with["drain"]["outcome"], "done");
        assert!(compared["stored_ratio"].as_f64().unwrap() < 0.9);
    } else {
        assert_eq!(with["drain"]["outcome"], "unsupported");
    }
}
