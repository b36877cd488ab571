//! The script that runs in the guest, run here by every shell that a guest may have, with steps
//! that are put in place of the real ones.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests and their helpers")]

use std::path::Path;
use std::process::Command;

const SCRIPT: &str = include_str!("../src/reclaim.sh");

fn put(dir: &Path, name: &str, body: &str) {
    let (text, path) = (dir.join("text"), dir.join(name));
    std::fs::write(&text, format!("#!/bin/sh\n{body}\n")).unwrap();
    // By another process: a child of another test may hold for a while what we write, and what
    // somebody may write to nobody can run.
    let install = Command::new("install").args([&text, &path]).status();
    assert!(install.unwrap().success());
}

/// Runs the script with `sync` and `fstrim` as given and the two kernel writes left out; returns
/// each step's last line without its numbers.
fn run(shell: &[&str], sync: &str, fstrim: &str, caps: [&str; 2]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "sync", sync);
    put(dir.path(), "fstrim", fstrim);
    let output = Command::new(shell[0])
        .args(&shell[1..])
        .args(["-c", SCRIPT, "torpor-reclaim", caps[0], "0", "0", caps[1]])
        .arg(dir.path())
        .env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.ends_with(" begin"));
    lines
        .map(|line| {
            let words: Vec<_> = line.splitn(7, ' ').collect();
            assert_eq!((words.len(), words[0]), (7, "torpor-reclaim"), "{line}");
            for number in &words[3..6] {
                number.parse::<u64>().unwrap();
            }
            format!("{} {} {}", words[1], words[2], words[6])
                .trim_end()
                .to_owned()
        })
        .collect()
}

fn shells() -> Vec<Vec<&'static str>> {
    let all = [
        vec!["/bin/sh"],
        vec!["/bin/bash"],
        vec!["/bin/busybox", "sh"],
    ];
    all.into_iter()
        .filter(|shell| Path::new(shell[0]).exists())
        .collect()
}

#[test]
fn each_step_says_what_became_of_it() {
    for shell in shells() {
        let done = run(
            &shell,
            "exit 0",
            "echo '/x: 5 MiB trimmed'",
            ["60000", "60000"],
        );
        let skipped = ["drop_caches skipped", "compact_memory skipped"];
        assert_eq!(
            done,
            [
                "sync done",
                skipped[0],
                skipped[1],
                "fstrim done /x: 5 MiB trimmed"
            ]
        );
        let refused =
            "echo first; echo 'fstrim: the discard operation is not supported' >&2; exit 1";
        let bad = run(&shell, "echo broken; exit 3", refused, ["60000", "60000"]);
        let unsupported = "fstrim unsupported fstrim: the discard operation is not supported";
        assert_eq!(
            bad,
            ["sync failed broken", skipped[0], skipped[1], unsupported]
        );
    }
}

#[test]
fn a_step_that_takes_too_long_is_killed_and_the_next_one_runs() {
    for shell in shells() {
        let late = run(&shell, "exec sleep 100", "exit 0", ["150", "60000"]);
        assert_eq!(late[0], "sync timeout", "{shell:?}");
        assert_eq!(late[3], "fstrim done", "{shell:?}");
    }
}
