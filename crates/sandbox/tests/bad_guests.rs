//! Guests that do not come up, or misbehave once they run.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, and their helpers"
)]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{
    Cleanup, PATIENCE, assert_gone, boot_request, host, lost, on_qemu, resume_build, sh,
    storage_dir, template, try_pause,
};
use torpor_guest::{Command, GuestError};
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::error::StartError;
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};

/// A host of its own, whose run directories are nobody else's.
async fn own_host(dir: &Path) -> Host {
    let options = HostOptions {
        storage: dir.to_path_buf(),
        vmm: on_qemu(),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    Host::open(options).await.unwrap()
}

fn no_traces(host: &Host) {
    assert_eq!(host.storage().running_sandboxes().unwrap(), []);
    for folder in ["run", "staging", "builds"] {
        let dir = host.storage().root().join(folder);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0, "{folder}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_larger_than_the_host_is_refused_with_both_sizes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let host = own_host(dir.path()).await;
    let request = BootRequest {
        memory_bytes: host_memory_bytes() * 2,
        ..boot_request("large")
    };
    let needed = request.memory_bytes.to_string();
    let error = boot(&host, request).await.unwrap_err();
    assert!(
        matches!(error, StartError::Vmm(torpor_vmm::VmmError::NoRoom { .. })),
        "{error}"
    );
    let told = error.to_string();
    assert!(
        told.contains(&needed) && told.contains("less memory"),
        "{told}"
    );
    no_traces(&host);
}

fn host_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|line| line.split_whitespace().next())
        .unwrap()
        .parse()
        .unwrap();
    (kib << 10) & !((2 << 20) - 1)
}

/// A static program that does nothing for ever: `pause` in a loop.
fn silent_init() -> Vec<u8> {
    const LOAD_ADDRESS: u64 = 0x40_0000;
    const HEADERS_LEN: usize = 64 + 56;
    // mov eax, 34 (pause); syscall; jmp back
    let code = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
    let len = (HEADERS_LEN + code.len()) as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [LOAD_ADDRESS + HEADERS_LEN as u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        elf.extend(word.to_le_bytes());
    }
    for word in [0, LOAD_ADDRESS, LOAD_ADDRESS, len, len, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    assert_eq!(elf.len(), HEADERS_LEN);
    elf.extend(code);
    elf
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_never_answers_is_ended_with_its_consoles_last_words() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let agent = dir.path().join("init");
    std::fs::write(&agent, silent_init()).unwrap();
    let mut boot_max_s = 15;
    loop {
        let host = own_host(&dir.path().join("storage"))
            .await
            .with_agent(agent.clone())
            .with_boot_max(Duration::from_secs(boot_max_s));
        let error = boot(&host, boot_request("silent")).await.unwrap_err();
        assert!(matches!(error, StartError::NoAnswer { .. }), "{error}");
        no_traces(&host);
        let told = error.to_string();
        let (_, after) = told.split_once("does not answer after ").unwrap();
        let (waited_s, _) = after.split_once(" s").unwrap();
        assert!(waited_s.parse::<u64>().unwrap() >= boot_max_s, "{told}");
        if told.contains("Run /init as init process") {
            break;
        }
        // On a busy machine the kernel itself may need longer.
        boot_max_s *= 2;
        assert!(boot_max_s <= 120, "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_init_dies_is_ended_by_its_kernels_panic() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let agent = dir.path().join("init");
    let mut program = silent_init();
    // exit instead of pause
    let at = program.len() - 8;
    program[at] = 60;
    std::fs::write(&agent, program).unwrap();
    let host = own_host(&dir.path().join("storage"))
        .await
        .with_agent(agent);
    let error = boot(&host, boot_request("dead")).await.unwrap_err();
    assert!(matches!(error, StartError::Ended { .. }), "{error}");
    assert!(error.to_string().contains("Kernel panic"), "{error}");
    no_traces(&host);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_fails_says_how_and_the_sandbox_can_still_be_paused() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let minute = Duration::from_secs(60);
    let failed = Command::shell("echo 'no such thing' >&2; exit 3");
    let output = sandbox.envd().run(&failed, minute).await.unwrap();
    assert_eq!(output.exit.code, 3);
    assert_eq!(output.stderr, b"no such thing\n");
    let killed = Command::shell("kill -9 $$");
    let output = sandbox.envd().run(&killed, minute).await.unwrap();
    assert!(!output.exit.exited, "{:?}", output.exit);
    let missing = Command::new("/no/such/program");
    let error = sandbox.envd().run(&missing, minute).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/program"), "{error}");
    // Out of memory: the guest kills the workload, not its agent.
    let greedy = Command::shell("exec tail /dev/zero");
    let output = sandbox.envd().run(&greedy, 4 * minute).await.unwrap();
    assert!(!output.exit.success(), "{:?}", output.exit);
    // Never done: killed when its time has run out.
    let endless = Command::shell("sleep 1000");
    let error = sandbox
        .envd()
        .run(&endless, Duration::from_secs(1))
        .await
        .unwrap_err();
    assert!(error.is_timeout(), "{error}");

    let paused = try_pause(sandbox, &host, PauseFlags::default())
        .await
        .unwrap();
    let _cleanup = Cleanup(host.storage(), vec![paused.build.id()]);
    let (sandbox, _) = resume_build(&host, &paused.build.id()).await;
    assert_eq!(sh(&sandbox, "pgrep -c -x sleep || true").await, "0");
}

/// No signal reaches pid 1 from inside its machine, so its code is taken from under it.
const KILL_ENVD: &str = r#"
import re
with open("/proc/1/mem", "r+b", buffering=0) as memory:
    for line in open("/proc/1/maps"):
        start, end, access = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
        if access.startswith("r-x") and "[" not in line:
            memory.seek(int(start, 16))
            memory.write(b"\xcc" * (int(end, 16) - int(start, 16)))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_envd_is_killed_is_lost_and_its_last_build_is_intact() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let kill = Command::new("python3")
        .arg("-c")
        .arg(KILL_ENVD)
        .outside_freezer();
    drop(
        sandbox
            .envd()
            .run(&kill, Duration::from_secs(60))
            .await
            .unwrap_err(),
    );
    let exit = sandbox.vmm().wait_exit().await;
    assert!(exit.guest_ended(), "{exit}");
    let told = lost(try_pause(sandbox, &host, PauseFlags::default()).await);
    assert!(
        told.contains(&format!("its last build {template} is intact")),
        "{told}"
    );
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "true").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_kernel_panics_is_lost_and_its_last_build_is_named() {
    let host = host().await;
    let template = template(&host).await;
    let (sandbox, _) = resume_build(&host, &template).await;
    let panic = Command::shell("echo c > /proc/sysrq-trigger").outside_freezer();
    let error = sandbox
        .envd()
        .run(&panic, Duration::from_secs(60))
        .await
        .unwrap_err();
    assert!(!matches!(error, GuestError::Refused { .. }), "{error}");
    let exit = sandbox.vmm().wait_exit().await;
    assert!(exit.guest_ended(), "{exit}");
    let pid = sandbox.vmm().pid();
    let told = lost(try_pause(sandbox, &host, PauseFlags::default()).await);
    assert!(told.contains("ended with its guest"), "{told}");
    assert!(
        told.contains(&format!("its last build {template} is intact")),
        "{told}"
    );
    assert_gone(pid);
    assert!(
        storage_dir()
            .join("builds")
            .join(template.to_string())
            .exists()
    );
    let (sandbox, _) = resume_build(&host, &template).await;
    sh(&sandbox, "true").await;
}
