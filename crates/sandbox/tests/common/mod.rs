//! What the tests with real guests share: a storage with templates that are booted once.

use std::path::PathBuf;
use std::sync::OnceLock;

use nix::fcntl::{Flock, FlockArg};
use torpor_build::{BuildId, Digest, Name, Storage};
use torpor_pager::WriteTracking;
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::{Assets, DEFAULT_KERNEL};
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::pause::{PauseFailure, PauseRequest, Paused, pause};
use torpor_sandbox::progress::Progress;
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};

/// Memory of the tests' guests.
pub(crate) const GUEST_MEMORY_BYTES: u64 = 256 << 20;

/// Where the templates are, kept from one run to the next: a directory for each agent and kernel,
/// so that a changed agent is booted anew.
pub(crate) fn storage_dir() -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let assets = Assets::find(None, DEFAULT_KERNEL).unwrap();
        let mut identity = std::fs::read(&assets.envd).unwrap();
        identity.extend(
            Digest::of(&std::fs::read(&assets.kernel).unwrap())
                .to_string()
                .bytes(),
        );
        let key = Digest::of(&identity).to_string();
        let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("guests");
        std::fs::create_dir_all(&root).unwrap();
        for old in std::fs::read_dir(&root).unwrap().flatten() {
            if old.file_name().to_string_lossy() != key[..16] {
                std::fs::remove_dir_all(old.path()).unwrap();
            }
        }
        root.join(&key[..16])
    })
    .clone()
}

pub(crate) async fn host() -> Host {
    host_with(None).await
}

pub(crate) async fn host_with(tracking: Option<WriteTracking>) -> Host {
    let options = HostOptions {
        storage: storage_dir(),
        tracking,
        ..HostOptions::default()
    };
    Host::open(options).await.unwrap()
}

/// A template that reports its free pages, booted once.
pub(crate) async fn template(host: &Host) -> BuildId {
    let name: Name = "plain".parse().unwrap();
    // Several test programs may want it at once.
    let lock = std::fs::File::create(storage_dir().join("template.lock")).unwrap();
    let lock = tokio::task::spawn_blocking(move || {
        Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .unwrap()
    })
    .await
    .unwrap();
    if let Ok(id) = host.storage().resolve(name.as_str()) {
        return id;
    }
    let sandbox = boot_guest(host, "plain").await;
    let paused = pause_into_new(sandbox, host, PauseFlags::default()).await;
    host.storage()
        .set_template(&name, &paused.build.id())
        .unwrap();
    drop(lock);
    paused.build.id()
}

pub(crate) async fn boot_guest(host: &Host, template: &str) -> Sandbox {
    let request = BootRequest {
        memory_bytes: GUEST_MEMORY_BYTES,
        disk_bytes: 1 << 30,
        vcpus: 1,
        network: false,
        kernel: DEFAULT_KERNEL.to_owned(),
        rootfs: None,
        template: Some(template.parse().unwrap()),
        progress: Progress::silent(),
    };
    boot(host, request).await.unwrap()
}

pub(crate) async fn resume_build(host: &Host, id: &BuildId) -> (Sandbox, ResumeReport) {
    resume(host, id, &ResumeOptions::default()).await.unwrap()
}

pub(crate) async fn pause_into_new(sandbox: Sandbox, host: &Host, flags: PauseFlags) -> Paused {
    try_pause(sandbox, host, flags).await.unwrap()
}

pub(crate) async fn try_pause(
    sandbox: Sandbox,
    host: &Host,
    flags: PauseFlags,
) -> Result<Paused, PauseFailure> {
    let request = PauseRequest {
        build: BuildId::random(),
        template: None,
        flags,
        progress: Progress::silent(),
    };
    pause(sandbox, host, request).await
}

/// Runs a shell line in the guest; it must succeed. What it printed.
pub(crate) async fn sh(sandbox: &Sandbox, line: &str) -> String {
    let command = torpor_guest::Command::shell(line);
    let output = sandbox
        .envd()
        .run(&command, std::time::Duration::from_secs(60))
        .await
        .unwrap_or_else(|error| panic!("{line}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.exit.success(), "{line}: {:?} {stderr}", output.exit);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A build that a test made, deleted at its end (children before parents).
pub(crate) struct Cleanup<'a>(pub(crate) &'a Storage, pub(crate) Vec<BuildId>);

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        for id in self.1.iter().rev() {
            drop(self.0.delete_build(id));
        }
    }
}
