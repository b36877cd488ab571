//! envd and the kernel's own machinery: the freezer, and pid 1's duty to reap.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod host;

use std::path::{Path, PathBuf};
use std::time::Duration;

use connectrpc::ErrorCode;
use host::{Agent, LONG, output, sh};
use torpor_guest::{Command, GuestError, ReclaimCaps, Selector, Signal, reclaim};

/// A cgroup v2 of our own with the two places; gone when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let dir = fields.nth(1)?;
            (fields.next()? == "cgroup2").then(|| PathBuf::from(dir))
        })?;
        let dir = mount.join(format!("envd-test-{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).ok()?;
        for place in ["user", "system"] {
            std::fs::create_dir(dir.join(place)).unwrap();
        }
        Some(Self(dir))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        std::fs::write(self.0.join("cgroup.kill"), "1").unwrap();
        for dir in [self.0.join("user"), self.0.join("system"), self.0.clone()] {
            // Whoever was killed leaves in his own time.
            let gone = |dir: &Path| std::fs::remove_dir(dir).is_ok();
            for _ in 0..1000 {
                if gone(&dir) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Set to 1 on a machine that refuses us cgroups (a container), where the freezer cannot be tested.
const SKIP: &str = "ENVD_TEST_SKIP_CGROUP";

/// A test that did not run says so, or fails: it never just passes.
macro_rules! cgroup {
    ($name:expr) => {
        match Cgroup::new($name) {
            Some(cgroup) => cgroup,
            None if std::env::var_os(SKIP).is_some_and(|set| set == "1") => {
                println!("skipped, because {SKIP}=1");
                return;
            }
            None => panic!(
                "no cgroup v2 may be made here, so the freezer is not tested: run as root with a \
                 writable cgroup2 mount, or set {SKIP}=1"
            ),
        }
    };
}

async fn count(file: &Path) -> u64 {
    std::fs::metadata(file)
        .map(|file| file.len())
        .unwrap_or_default()
}

#[tokio::test]
async fn frozen_user_processes_stand_still_while_the_hosts_errands_run() {
    let cgroup = cgroup!("freeze");
    let agent = Agent::with(Some(&cgroup.0));
    let envd = agent.envd().await;
    let dir = tempfile::tempdir().unwrap();
    let ticks = dir.path().join("ticks");
    let line = format!(
        "while :; do echo -n x >>{}; sleep 0.01; done",
        ticks.display()
    );
    let counter = envd.start(&sh(&line), None).await.unwrap();
    host::eventually("it counts", || {
        std::fs::metadata(&ticks).is_ok_and(|f| f.len() > 3)
    })
    .await;

    assert!(envd.freeze().await.unwrap().frozen);
    let stopped_at = count(&ticks).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(
        count(&ticks).await,
        stopped_at,
        "it counts while it is frozen"
    );
    let refused = envd.start(&sh("true"), Some(LONG)).await.unwrap_err();
    assert_eq!(
        refused.code(),
        Some(ErrorCode::FailedPrecondition),
        "{refused}"
    );
    assert_eq!(
        output(&envd, &sh("echo errand").outside_freezer()).await,
        "errand\n"
    );
    // Freezing twice is freezing.
    assert!(envd.freeze().await.unwrap().frozen);

    assert!(!envd.unfreeze().await.unwrap().frozen);
    let ticks_on = || std::fs::metadata(&ticks).is_ok_and(|file| file.len() > stopped_at);
    host::eventually("it counts again", ticks_on).await;

    // What a resume does thaws too.
    envd.freeze().await.unwrap();
    assert!(envd.init().await.unwrap().thawed);
    assert_eq!(output(&envd, &sh("echo on")).await, "on\n");
    // And a frozen process can be killed.
    envd.freeze().await.unwrap();
    envd.send_signal(&Selector::from(counter.pid()), Signal::Kill)
        .await
        .unwrap();
    assert_eq!(
        counter.output().await.unwrap().exit.status,
        "signal: killed"
    );
}

#[tokio::test]
async fn a_machine_without_cgroups_says_that_it_cannot_freeze() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    for refused in [
        envd.freeze().await.unwrap_err(),
        envd.unfreeze().await.unwrap_err(),
    ] {
        let GuestError::Refused {
            status, message, ..
        } = refused
        else {
            panic!("{refused}")
        };
        assert_eq!(status, 501);
        assert!(message.contains("no cgroup v2"), "{message}");
    }
    assert!(!envd.init().await.unwrap().thawed);
}

#[tokio::test]
async fn reclaim_reports_every_step_and_fails_nothing() {
    let agent = Agent::start();
    let envd = agent.envd().await;
    // The developer's own caches are not ours to drop.
    let caps = ReclaimCaps {
        // It writes whatever this host has to write, what has just been built included.
        sync_ms: 600_000,
        drop_caches_ms: 0,
        compact_memory_ms: 0,
        fstrim_ms: 100,
    };
    let report = reclaim(&envd, caps, 10 * LONG).await;
    let outcomes: Vec<_> = report
        .steps
        .iter()
        .map(|step| (step.step.as_str(), step.outcome))
        .collect();
    use torpor_guest::reclaim::StepOutcome::{Done, Skipped, Unsupported};
    assert_eq!(
        outcomes,
        [
            ("sync", Done),
            ("drop_caches", Skipped),
            ("compact_memory", Skipped),
            ("fstrim", Unsupported)
        ],
        "{report:?}"
    );
    assert_eq!((report.error, report.budget_exhausted), (None, false));
    drop(agent);
    let report = reclaim(&envd, caps, LONG).await;
    assert!(report.error.is_some(), "{report:?}");
    assert_eq!(report.steps.len(), 4);
}

#[tokio::test]
async fn as_pid_1_it_reaps_orphans_and_loses_no_status() {
    let agent = Agent::as_pid_1();
    let envd = agent.envd().await;
    let orphans = "for n in 1 2 3 4 5; do (sleep 0.05 & exec true) & done; exit 5";
    let runs: Vec<_> = (0..30)
        .map(|_| {
            let envd = envd.clone();
            tokio::spawn(async move { envd.run(&sh(orphans), LONG).await.unwrap().exit.code })
        })
        .collect();
    for run in runs {
        assert_eq!(run.await.unwrap(), 5, "a status was lost");
    }
    // One that cannot exec is waited for by the library itself: it must not be robbed of it.
    for _ in 0..20 {
        assert!(
            envd.start(&Command::new("no-such-command"), None)
                .await
                .is_err()
        );
    }
    let census = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true";
    host::eventually_ok(|| async {
        match output(&envd, &sh(census)).await.trim() {
            "0" => Ok(()),
            zombies => Err(format!("{zombies} zombies")),
        }
    })
    .await;
    assert_eq!(output(&envd, &sh("cat /proc/1/comm")).await, "envd\n");
}
