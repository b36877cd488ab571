//! The whole program on a real guest, as a person types it: build, layer, resume, pause, shell,
//! inspect, delete, and what an interrupt or a kill leaves behind.
//!
//! One test in one storage, because the boot of the template is what costs; each step is a function.
//! Needs what `make setup` fetched, and the agent that `TORPOR_ENVD` names.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests are documented by their names and fail by panicking, helpers included"
)]

mod place;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::place::{Place, Running, id_of, is_gone, until};

#[test]
fn a_guest_is_built_resumed_paused_inspected_and_deleted() {
    let place = Place::new();
    templates_and_layers(&place);
    commands(&place);
    let paused = pauses(&place);
    memory(&place);
    exact_or_not(&place);
    a_shell(&place);
    a_bench(&place);
    what_was_made_is_whole(&place, &paused);
    interrupts(&place);
    a_killed_torpor(&place);
    deletion(&place, &paused);
    place.nothing_is_left();
}

fn templates_and_layers(place: &Place) {
    let made = place.json(&[
        "create-build",
        "--template",
        "base",
        "--memory",
        "256M",
        "--disk",
        "1G",
        "--setup-cmd",
        "echo installed > /root/setup; (sleep 1; touch /run/up) > /dev/null 2>&1 &",
        "--ready-cmd",
        "test -e /run/up",
        "--json",
    ]);
    let base = id_of(&made, "build");
    assert_eq!(made["parent"], Value::Null);
    let metrics = place.dir.path().join("torpor.prom");
    let metrics_arg = metrics.to_str().unwrap();
    let made = place.json(&[
        "--json",
        "create-build",
        "--template",
        "layer",
        "--from-build",
        "base",
        "--setup-cmd",
        "test -e /run/up && cat /root/setup > /root/copy",
        "--reclaim",
        "--fph-timeout-ms",
        "1500",
        "--metrics",
        metrics_arg,
    ]);
    assert_eq!(made["parent"], base.as_str());
    the_metrics_are_the_reports(&metrics, &made["pause"]);
    // A template whose set-up fails is none.
    let done = place.run(&[
        "create-build",
        "--template",
        "bad",
        "--from-build",
        "base",
        "--setup-cmd",
        "exit 9",
        "--metrics",
        metrics_arg,
    ]);
    assert_eq!(done.code, 5, "{}", done.stderr);
    let text = fs::read_to_string(&metrics).unwrap();
    has_line(&text, "torpor_resumes_total{outcome=\"resumed\"} 1");
    assert!(!text.contains("torpor_pauses_total{"), "{text}");
    assert!(done.stderr.contains("--setup-cmd") && done.stderr.contains("exit status 9"));
    assert_eq!(place.builds(), 2);
    place.nothing_is_left();
}

#[track_caller]
fn has_line(text: &str, line: &str) {
    assert!(text.lines().any(|one| one == line), "no {line} in:\n{text}");
}

fn the_metrics_are_the_reports(metrics: &Path, pause: &Value) {
    let text = fs::read_to_string(metrics).unwrap();
    let drained = match pause["drain"]["outcome"].as_str() {
        Some("ceiling_reached") => "timeout",
        outcome => outcome.unwrap(),
    };
    has_line(&text, "torpor_resumes_total{outcome=\"resumed\"} 1");
    has_line(
        &text,
        "torpor_pauses_total{kind=\"pause\",outcome=\"stored\"} 1",
    );
    has_line(
        &text,
        &format!("torpor_drains_total{{outcome=\"{drained}\"}} 1"),
    );
    let figures = [
        (
            "torpor_stored_bytes_total{image=\"memory\"}",
            &pause["memory"]["raw_bytes"],
        ),
        (
            "torpor_drain_released_bytes_total",
            &pause["drain"]["released_bytes"],
        ),
        (
            "torpor_drain_discarded_bytes_total",
            &pause["drain"]["discarded_bytes"],
        ),
        ("torpor_drain_remove_events_total", &pause["drain_removes"]),
    ];
    for (name, figure) in figures {
        has_line(&text, &format!("{name} {figure}"));
    }
    for step in pause["steps"].as_array().unwrap() {
        let step = step["step"].as_str().unwrap();
        has_line(
            &text,
            &format!("torpor_pause_step_seconds_count{{step=\"{step}\"}} 1"),
        );
    }
    let faults = text
        .lines()
        .find_map(|line| line.strip_prefix("torpor_pager_faults_total "));
    assert!(faults.unwrap().parse::<u64>().unwrap() > 0, "{text}");
    has_line(&text, "# TYPE torpor_pause_seconds histogram");
    assert!(!metrics.with_extension("prom.new").exists());
}

fn commands(place: &Place) {
    let done = place.succeeds(&[
        "resume-build",
        "--from-build",
        "layer",
        "--cmd",
        "cat /root/copy",
    ]);
    assert!(done.stdout.starts_with("installed\n"), "{}", done.stdout);
    let failing = "printf '\\033[31mred' >&2; exit 3";
    let done = place.run(&["resume-build", "--from-build", "layer", "--cmd", failing]);
    assert_eq!(done.code, 5, "{}", done.stderr);
    assert!(done.stderr.contains("exit status 3"), "{}", done.stderr);
    assert_eq!(place.builds(), 2);

    let twice = place.json(&[
        "resume-build",
        "--from-build",
        "layer",
        "--iterations",
        "2",
        "--cold",
        "--json",
        "--cmd",
        "echo not for standard output",
    ]);
    assert_eq!(twice["iterations"].as_array().unwrap().len(), 2);
    assert!(twice["times"]["total"]["median_ms"].is_number(), "{twice}");
}

/// The build that `--cmd-pause` made.
fn pauses(place: &Place) -> String {
    let to = "0b2ad4a8-6a1e-4a7f-9d53-0f1c7d1a2b3c";
    let paused = place.json(&[
        "resume-build",
        "--from-build",
        "layer",
        "--cmd-pause",
        "echo kept > /root/kept",
        "--to-build",
        to,
        "--json",
    ]);
    assert_eq!(paused["to_build"], to);
    let again = place.json(&["resume-build", "--from-build", to, "--pause", "--json"]);
    let second = id_of(&again, "to_build");
    let done = place.succeeds(&[
        "resume-build",
        "--from-build",
        &second,
        "--cmd",
        "cat /root/kept",
    ]);
    assert!(done.stdout.starts_with("kept\n"), "{}", done.stdout);

    let args = [
        "resume-build",
        "--from-build",
        to,
        "--signal-pause",
        "USR1",
        "--json",
    ];
    let running = place.start(&args);
    running.vmm();
    running.signal(Signal::USR1);
    let done = running.done();
    assert_eq!(done.code, 0, "{}", done.stderr);
    let third: Value = serde_json::from_str(&done.stdout).unwrap();
    for id in [second, id_of(&third, "to_build")] {
        place.succeeds(&["delete-build", &id]);
    }
    in_place(place, to);
    to.to_owned()
}

/// Two builds of one VM that goes on, each on top of the one before.
fn in_place(place: &Place, from: &str) {
    let stored = place.json(&[
        "resume-build",
        "--from-build",
        from,
        "--cmd-pause",
        "echo again >> /root/in-place; head -c 8000000 /dev/urandom > /dev/shm/$(date +%s%N)",
        "--in-place",
        "--iterations",
        "2",
        "--json",
    ]);
    let checkpoints = stored["checkpoints"].as_array().unwrap();
    let ids: Vec<_> = checkpoints.iter().map(|one| id_of(one, "build")).collect();
    for (number, id) in ids.iter().enumerate() {
        let cmd = [
            "resume-build",
            "--from-build",
            id,
            "--cmd",
            "cat /root/in-place",
        ];
        let done = place.succeeds(&cmd);
        let said = "again\n".repeat(number + 1);
        assert!(done.stdout.starts_with(&said), "{}", done.stdout);
        assert_eq!(done.stdout.matches("again").count(), number + 1);
        let bytes = checkpoints[number]["pause"]["memory"]["raw_bytes"].as_u64();
        let bytes = bytes.unwrap();
        assert!(
            (8_000_000..16_000_000).contains(&bytes),
            "{bytes}: only what is new"
        );
    }
    let done = place.run(&["resume-build", "--from-build", from, "--in-place"]);
    assert_eq!(done.code, 2, "{}", done.stderr);
    for id in ids.iter().rev() {
        place.succeeds(&["delete-build", id]);
    }
}

/// What a guest's memory is made of: of a build, and of a sandbox that runs in another process.
fn memory(place: &Place) {
    let svg = place.dir.path().join("memory.svg");
    let svg_arg = svg.to_str().unwrap();
    let look = place.json(&[
        "inspect-memory",
        "--build",
        "base",
        "--svg",
        svg_arg,
        "--json",
    ]);
    let all: u64 = [
        "free",
        "page_cache",
        "anonymous",
        "slab",
        "balloon",
        "kernel",
    ]
    .iter()
    .map(|class| pages(&look, class))
    .sum();
    assert_eq!(all * 4096, look["ram_bytes"].as_u64().unwrap());
    assert!(fs::read_to_string(svg).unwrap().contains("page cache"));
    let text = place
        .succeeds(&["inspect-memory", "--build", "base"])
        .stdout;
    assert!(
        text.contains("anonymous") && text.contains("Linux 6."),
        "{text}"
    );
    of_a_running_sandbox(place, &look);
}

fn pages(look: &Value, class: &str) -> u64 {
    let classes = look["classes"].as_array().unwrap();
    let row = classes.iter().find(|row| row["class"] == class).unwrap();
    row["pages"].as_u64().unwrap()
}

fn of_a_running_sandbox(place: &Place, in_the_build: &Value) {
    let running = place.start(&[
        "resume-build",
        "--from-build",
        "base",
        "--signal-pause",
        "USR1",
    ]);
    running.vmm();
    let mut sandbox = String::new();
    until("the sandbox has left its record", || {
        sandbox = place
            .left_in("run")
            .into_iter()
            .find(|dir| dir.join("sandbox.json").exists())
            .map(|dir| dir.file_name().unwrap().to_str().unwrap().to_owned())
            .unwrap_or_default();
        !sandbox.is_empty()
    });
    // The same guest, a moment later: most of its memory is what it was. A look that met a round of
    // reporting, whose pages are on no list, or that took too long, is taken again.
    until("a running guest's memory is found", || {
        let look = place.run(&["inspect-memory", "--sandbox", &sandbox, "--json"]);
        if look.code != 0 {
            assert!(look.stderr.contains("took longer than"), "{}", look.stderr);
            return false;
        }
        let now = serde_json::from_str(&look.stdout).unwrap();
        let (then_cached, cached) = (pages(in_the_build, "page_cache"), pages(&now, "page_cache"));
        assert!(
            then_cached.abs_diff(cached) * 10 < then_cached,
            "{then_cached} pages of files, then {cached}"
        );
        let (then, now) = (pages(in_the_build, "free"), pages(&now, "free"));
        then.abs_diff(now) * 10 < then
    });
    let strange = place.run(&["inspect-memory", "--sandbox", "no-such-one"]);
    assert_eq!(strange.code, 3, "{}", strange.stderr);
    assert!(
        strange.stderr.contains(&sandbox),
        "it names those that run: {}",
        strange.stderr
    );
    // It was let go: it still pauses.
    running.signal(Signal::USR1);
    let done = running.done();
    assert_eq!(done.code, 0, "{}", done.stderr);
    place.succeeds(&["delete-build", &done.build_made()]);
    let gone = place.run(&["inspect-memory", "--sandbox", &sandbox]);
    assert_eq!(gone.code, 3, "{}", gone.stderr);
}

/// The scan and the references, by switch and by flag file.
fn exact_or_not(place: &Place) {
    let flags = place.dir.path().join("exact.json");
    let flags_arg = flags.to_str().unwrap();
    let pause = |more: &[&str]| {
        let mut args = vec!["resume-build", "--from-build", "base", "--pause", "--json"];
        args.extend(more);
        let made = place.json(&args);
        place.succeeds(&["delete-build", &id_of(&made, "to_build")]);
        made["pause"].clone()
    };
    let exact = pause(&[]);
    assert_eq!(exact["scan"]["outcome"], "scanned", "{exact}");
    assert!(exact["memory"]["pages"]["free"].as_u64().unwrap() > 10_000);
    let without = pause(&["--no-scan", "--no-refs"]);
    assert_eq!(without["scan"], Value::Null);
    fs::write(
        &flags,
        r#"{"templates": {"base": {"free-page-scan": false}}}"#,
    )
    .unwrap();
    assert_eq!(pause(&["--flags", flags_arg])["scan"], Value::Null);
    let done = place.run(&["resume-build", "--from-build", "base", "--no-scan"]);
    assert_eq!(
        done.code, 2,
        "without a pause it says nothing: {}",
        done.stderr
    );
}

fn a_shell(place: &Place) {
    let mut command = place.command(&["resume-build", "--from-build", "layer", "--shell"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut typed = child.stdin.take().unwrap();
    typed.write_all(b"echo sum $((40 + 2))\nexit\n").unwrap();
    let done = Running(Some(child)).done();
    drop(typed);
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(done.stdout.contains("sum 42"), "{}", done.stdout);
    assert!(done.stderr.contains("the shell ended"), "{}", done.stderr);
}

fn a_bench(place: &Place) {
    let before = place.builds();
    let compared = place.json(&[
        "resume-build",
        "--from-build",
        "layer",
        "--cmd",
        "head -c 8000000 /dev/urandom > /dev/shm/f; rm /dev/shm/f",
        "--fph-bench",
        "--fph-timeout-ms",
        "1500",
        "--json",
    ]);
    assert_eq!(compared["drain_ceiling_ms"], 1500);
    assert!(compared["stored_ratio"].is_number(), "{compared}");
    assert_eq!(place.builds(), before, "both builds are deleted again");
}

fn what_was_made_is_whole(place: &Place, paused: &str) {
    let svg = place.dir.path().join("map.svg");
    let done = place.succeeds(&[
        "inspect-build",
        paused,
        "--validate",
        "--recursive",
        "--svg",
        svg.to_str().unwrap(),
    ]);
    assert!(done.stdout.contains("whole: 3 build(s)"), "{}", done.stdout);
    assert!(fs::read_to_string(&svg).unwrap().contains("<svg"));
    let list = place.succeeds(&["list-builds"]).stdout;
    assert!(list.contains("base") && list.contains(paused), "{list}");
}

fn interrupts(place: &Place) {
    let before = place.builds();
    let sleeping = [
        "resume-build",
        "--from-build",
        "layer",
        "--cmd",
        "echo up; sleep 600",
    ];
    // Enough to write that the pause is still at it when the signal comes.
    let fill = "head -c 60000000 /dev/urandom > /dev/shm/f";
    let pausing = ["resume-build", "--from-build", "layer", "--cmd-pause", fill];
    for (args, moment) in [(&sleeping[..], "run"), (&pausing[..], "staging")] {
        let interrupted = || {
            let mut running = place.start(args);
            let vmm = running.vmm();
            // For the pause: when it has begun to write.
            until("it is under way", || {
                !place.left_in(moment).is_empty() || running.has_ended()
            });
            if !running.has_ended() {
                running.signal(Signal::INT);
            }
            (running.done(), vmm)
        };
        let (mut done, mut vmm) = interrupted();
        for _ in 0..5 {
            if done.code != 0 {
                break;
            }
            // The pause was over before the signal came.
            place.succeeds(&["delete-build", &done.build_made()]);
            (done, vmm) = interrupted();
        }
        assert_eq!(done.code, 130, "{}", done.stderr);
        assert!(done.stderr.contains("is undone"), "{}", done.stderr);
        is_gone(vmm);
        place.nothing_is_left();
        assert_eq!(place.builds(), before);
    }
}

fn a_killed_torpor(place: &Place) {
    let before = place.builds();
    let running = place.start(&[
        "resume-build",
        "--from-build",
        "layer",
        "--cmd",
        "sleep 600",
    ]);
    let vmm = running.vmm();
    running.signal(Signal::KILL);
    assert_eq!(running.done().code, -1);
    is_gone(vmm);
    assert!(
        !place.left_in("run").is_empty(),
        "a killed program cleans nothing"
    );
    place.succeeds(&["resume-build", "--from-build", "layer"]);
    place.nothing_is_left();
    assert_eq!(place.builds(), before);
}

fn deletion(place: &Place, paused: &str) {
    let images = place.json(&["list-images", "--json"]);
    let image = images["images"][0]["image"].as_str().unwrap().to_owned();
    let refused = place.run(&["delete-image", &image]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(
        refused.stderr.contains(paused),
        "it names the builds: {}",
        refused.stderr
    );
    assert_eq!(
        place.json(&["delete-image", "--unused", "--json"])["deleted"],
        Value::Array(vec![])
    );
    for (build, because) in [("base", "layer"), ("layer", paused)] {
        let done = place.run(&["delete-build", build]);
        assert_eq!(done.code, 4, "{}: {}", because, done.stderr);
    }
    for build in [paused, "layer", "base"] {
        place.succeeds(&["delete-build", build]);
    }
    assert_eq!(place.builds(), 0);
    let builds: &Path = &place.storage().join("builds");
    assert_eq!(fs::read_dir(builds).unwrap().count(), 0);
    let deleted = place.json(&["delete-image", "--unused", "--json"]);
    assert_eq!(deleted["deleted"], Value::Array(vec![image.into()]));
    assert!(place.left_in("images").is_empty() && place.left_in("block-indexes").is_empty());
}
