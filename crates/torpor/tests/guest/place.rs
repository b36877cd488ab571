//! Where a test's torpor runs: a storage of its own, and processes that do not outlive the test.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support;

/// Generous: guests are emulated, and the machine may be busy with other tests.
const DEADLINE: Duration = Duration::from_secs(180);

pub(crate) struct Place {
    pub(crate) dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn storage(&self) -> PathBuf {
        self.dir.path().join("storage")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_torpor"));
        command
            .arg("--storage")
            .arg(self.storage())
            .args(args)
            .env("TORPOR_VMM", "qemu")
            // However busy this machine is: slowness is for benches to find.
            .env("TORPOR_GUEST_PATIENCE", "240")
            .env_remove("TORPOR_STORAGE")
            .env_remove("TORPOR_FLAGS")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn start(&self, args: &[&str]) -> Running {
        Running(Some(self.command(args).spawn().unwrap()))
    }

    pub(crate) fn run(&self, args: &[&str]) -> Done {
        self.start(args).done()
    }

    #[track_caller]
    pub(crate) fn succeeds(&self, args: &[&str]) -> Done {
        let done = self.run(args);
        assert_eq!(done.code, 0, "{args:?}: {}", done.stderr);
        done
    }

    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let done = self.succeeds(args);
        serde_json::from_str(&done.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", done.stdout, done.stderr))
    }

    pub(crate) fn builds(&self) -> usize {
        let list = self.json(&["list-builds", "--json"]);
        list["builds"].as_array().unwrap().len()
    }

    pub(crate) fn left_in(&self, dir: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.storage().join(dir)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[track_caller]
    pub(crate) fn nothing_is_left(&self) {
        for dir in ["run", "staging"] {
            let left = self.left_in(dir);
            assert!(left.is_empty(), "{dir}: {left:?}");
        }
    }
}

pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A torpor that does not outlive its test.
pub(crate) struct Running(pub(crate) Option<Child>);

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        assert!(support::signal(self.pid(), signal));
    }

    /// Its VMM: the only child that it keeps.
    pub(crate) fn vmm(&self) -> u32 {
        let mut found = None;
        until("the VMM runs", || {
            found = children(self.pid()).into_iter().find(|pid| {
                fs::read_to_string(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.contains("memory-backend"))
            });
            found.is_some()
        });
        found.unwrap()
    }

    /// Reads both ends while it waits, so that much output cannot stop it.
    pub(crate) fn done(mut self) -> Done {
        let child = self.0.take().unwrap();
        let pid = child.id();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || drop(sender.send(child.wait_with_output())));
        let Ok(output) = receiver.recv_timeout(DEADLINE) else {
            support::signal(pid, Signal::KILL);
            panic!("torpor does not end");
        };
        let Output {
            status,
            stdout,
            stderr,
        } = output.unwrap();
        Done {
            code: status.code().unwrap_or(-1),
            stdout: String::from_utf8(stdout).unwrap(),
            stderr: String::from_utf8(stderr).unwrap(),
        }
    }
}

impl Done {
    /// The build that a command says it has paused into.
    pub(crate) fn build_made(&self) -> String {
        let mut words = self.stdout.split_whitespace();
        words.find(|word| *word == "into");
        words.nth(1).unwrap().to_owned()
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

pub(crate) fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after_name.split_ascii_whitespace().nth(1) == Some(&parent.to_string())
    })
    .collect()
}

#[track_caller]
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < DEADLINE, "it never came true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ended and reaped, or at least a zombie of whoever adopted it.
#[track_caller]
pub(crate) fn is_gone(pid: u32) {
    until("the VMM is gone", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
}

pub(crate) fn id_of(json: &Value, key: &str) -> String {
    json[key]
        .as_str()
        .unwrap_or_else(|| panic!("no {key}: {json}"))
        .to_owned()
}
