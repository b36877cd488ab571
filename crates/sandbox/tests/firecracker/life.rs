//! Many at once, killed at any step: what sandboxes live through.

use std::time::Instant;

use torpor_build::{Build, ValidateOptions};
use torpor_guest::Command;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::Host;
use torpor_sandbox::pause::report::PauseStep;
use torpor_sandbox::pause::{checkpoint, pause};

use crate::common::{
    Cleanup, PATIENCE, assert_gone, at_step, every_frame, flip, kill_for_good, lost, pause_request,
    sh, wait_until,
};
use crate::lab::{host, paused_exactly, resume_guest, template};

const CLONES: usize = 10;
const GREETING: &str = "hello";

/// Greets whoever connects to the host.
struct Greeter {
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Greeter {
    async fn start() -> Self {
        // No packet is sent: it says by which of its addresses the host would send one.
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        probe.connect("192.0.2.1:9").unwrap();
        let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            use tokio::io::AsyncWriteExt as _;
            loop {
                let (mut guest, _) = listener.accept().await.unwrap();
                // A guest that has gone is no failure of the server.
                drop(guest.write_all(GREETING.as_bytes()).await);
            }
        });
        Self {
            address: (probe.local_addr().unwrap().ip(), port).into(),
            server,
        }
    }

    /// What a guest's shell asks it by.
    fn ask(&self) -> String {
        self.ask_at(&self.address.ip().to_string())
    }

    fn ask_at(&self, host: &str) -> String {
        let port = self.address.port();
        format!("bash -c 'exec 3<>/dev/tcp/{host}/{port} && cat <&3' 2>/dev/null")
    }
}

impl Drop for Greeter {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_resumed_from_one_build_at_once_each_have_a_disk_of_their_own() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = resume_guest(&host, &template).await;
    sh(&sandbox, "head -c 1000000 /dev/urandom > /root/kept").await;
    let sum = sh(&sandbox, "sha256sum < /root/kept").await;
    let build = paused_exactly(sandbox, &host, PauseFlags::default())
        .await
        .build
        .id();
    cleanup.1.push(build);

    let began = Instant::now();
    let mut resuming = tokio::task::JoinSet::new();
    for _ in 0..CLONES {
        let host = host.clone();
        resuming.spawn(async move { resume_guest(&host, &build).await });
    }
    let clones = resuming.join_all().await;
    println!("{CLONES} resumed at once in {:?}", began.elapsed());
    let greeter = Greeter::start().await;
    for clone in &clones {
        assert!(clone.spec().network);
        assert_eq!(sh(clone, &greeter.ask()).await, GREETING);
    }
    // The gateway is not the host's loopback.
    let refused = format!("{} || echo refused", greeter.ask_at("10.0.2.2"));
    assert_eq!(sh(&clones[0], &refused).await, "refused");
    let write = |(number, clone)| async move {
        sh(
            clone,
            &format!("echo {number} | tee /dev/shm/mine > /root/mine; sync"),
        )
        .await;
    };
    for clone in clones.iter().enumerate() {
        write(clone).await;
    }
    for (number, clone) in clones.iter().enumerate() {
        let said = sh(
            clone,
            "echo 3 > /proc/sys/vm/drop_caches; cat /dev/shm/mine /root/mine; sha256sum < /root/kept",
        );
        assert_eq!(said.await, format!("{number}\n{number}\n{sum}"));
    }
    let pids: Vec<u32> = clones.iter().map(|clone| clone.vmm().pid()).collect();
    drop(clones);
    pids.into_iter().for_each(assert_gone);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_at_any_step_leaves_the_last_build_or_a_whole_new_one() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    // The count of its free memory has no beginning that shows.
    let before_the_copy = [
        PauseStep::Claim,
        PauseStep::FreezeUser,
        PauseStep::Reclaim,
        PauseStep::Drain,
        PauseStep::Stop,
        PauseStep::SaveState,
        PauseStep::Settle,
        PauseStep::Scan,
        PauseStep::CaptureMemory,
    ];
    for step in before_the_copy {
        println!("killed at {step}");
        let sandbox = resume_guest(&host, &template).await;
        let pid = sandbox.vmm().pid();
        let run = host.storage().run_path(sandbox.name());
        let progress = at_step(step, move || kill_for_good(pid));
        let flags = PauseFlags {
            reclaim: true,
            drain_ceiling_ms: 1000,
            ..PauseFlags::default()
        };
        let request = pause_request(flags, progress);
        let id = request.build;
        let told = lost(Box::pin(pause(sandbox, &host, request)).await);
        let last = format!("its last build {template} is intact");
        assert!(told.contains(&last), "{step}: {told}");
        assert_gone(pid);
        assert!(!run.exists(), "{step}");
        assert!(host.storage().open_build(&id).is_err(), "{step}");
    }
    for step in [
        PauseStep::WriteMemory,
        PauseStep::WriteDisk,
        PauseStep::Commit,
    ] {
        println!("killed at {step}, after the copy");
        let sandbox = resume_guest(&host, &template).await;
        sh(&sandbox, MARK).await;
        let pid = sandbox.vmm().pid();
        let progress = at_step(step, move || kill_for_good(pid));
        let request = pause_request(PauseFlags::default(), progress);
        let paused = Box::pin(pause(sandbox, &host, request)).await.unwrap();
        assert_gone(pid);
        cleanup.1.push(paused.build.id());
        holds_its_mark(&host, &paused.build, step).await;
    }
}

const MARK: &str = "echo last | tee /dev/shm/step > /root/step";

async fn holds_its_mark(host: &Host, build: &Build, step: PauseStep) {
    let whole = build.validate(ValidateOptions::default());
    assert!(whole.is_whole(), "{step}: {whole:?}");
    let sandbox = resume_guest(host, &build.id()).await;
    let kept = sh(&sandbox, "cat /dev/shm/step /root/step").await;
    assert_eq!(kept, "last\nlast", "{step}");
    sandbox.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_killed_as_it_goes_on_leaves_the_build_that_was_just_made() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    for step in [PauseStep::GoOn, PauseStep::Commit] {
        println!("killed at {step} of a checkpoint");
        let sandbox = resume_guest(&host, &template).await;
        sh(&sandbox, MARK).await;
        let pid = sandbox.vmm().pid();
        let progress = at_step(step, move || kill_for_good(pid));
        let request = pause_request(PauseFlags::default(), progress);
        let id = request.build;
        match Box::pin(checkpoint(sandbox, &host, request)).await {
            // It was told to go on, and did: that it died later shows when it is used.
            Ok(stored) => {
                assert_eq!(step, PauseStep::Commit);
                let vmm = stored.sandbox.vmm();
                wait_until("its end is known", || !vmm.is_alive());
            }
            Err(failure) => {
                assert_eq!(step, PauseStep::GoOn);
                let told = failure.to_string();
                let last = format!("its last build {id} is intact");
                assert!(told.contains(&last) && told.contains("go_on"), "{told}");
            }
        }
        assert_gone(pid);
        cleanup.1.push(id);
        let build = host.storage().open_build(&id).unwrap();
        holds_its_mark(&host, &build, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_cannot_be_had_kills_the_vmm_and_is_named() {
    let Some(host) = host().await else { return };
    let template = template(&host).await;
    let mut cleanup = Cleanup(host.storage(), Vec::new());
    let sandbox = resume_guest(&host, &template).await;
    sh(&sandbox, "head -c 4000000 /dev/urandom > /dev/shm/kept").await;
    let build = paused_exactly(sandbox, &host, PauseFlags::default()).await;
    let build = build.build;
    cleanup.1.push(build.id());
    let sandbox = resume_guest(&host, &build.id()).await;
    let path = build.path().join("memory.data");
    flip(&path, every_frame(&path));

    let reading = Command::shell("cat /dev/shm/kept > /dev/null");
    let read = sandbox.envd().run(&reading, PATIENCE).await;
    read.unwrap_err();
    let (pid, exit) = (sandbox.vmm().pid(), sandbox.vmm().wait_exit().await);
    assert_eq!(exit.signal, Some(9), "{exit}");
    let failure = sandbox.pager_failure().unwrap().to_string();
    println!("{failure}");
    assert!(failure.contains(path.to_str().unwrap()), "{failure}");
    drop(sandbox);
    assert_gone(pid);
}
