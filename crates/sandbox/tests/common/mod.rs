//! What the tests with real guests share: a storage with templates that are booted once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests"
)]
#![allow(dead_code, reason = "every test program uses a part of it")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use torpor_build::{BuildId, Digest, Name, Storage};
use torpor_pager::WriteTracking;
use torpor_sandbox::Sandbox;
use torpor_sandbox::assets::{Assets, DEFAULT_KERNEL};
use torpor_sandbox::boot::{BootRequest, boot};
use torpor_sandbox::flags::PauseFlags;
use torpor_sandbox::host::{Host, HostOptions};
use torpor_sandbox::pause::report::PauseStep;
use torpor_sandbox::pause::{PauseFailure, PauseRequest, Paused, pause};
use torpor_sandbox::progress::{Progress, ProgressEvent};
use torpor_sandbox::resume::{ResumeOptions, ResumeReport, resume};
use torpor_sandbox::vmm::{VmmKind, VmmOptions};

/// Memory of the tests' guests.
pub(crate) const GUEST_MEMORY_BYTES: u64 = 256 << 20;

/// Where the templates are, kept from one run to the next: a directory for each agent, kernel and
/// QEMU, so that what another one has changed is booted anew.
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
        let qemu = std::process::Command::new("qemu-system-x86_64")
            .arg("--version")
            .output();
        identity.extend(qemu.unwrap().stdout);
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

/// These tests look into QEMU's ways, also where Firecracker would be the default.
pub(crate) fn on_qemu() -> VmmOptions {
    VmmOptions {
        kind: Some(VmmKind::Qemu),
        ..VmmOptions::default()
    }
}

/// However busy this machine is: slowness is for benches to find.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) async fn host() -> Host {
    host_with(None).await
}

pub(crate) async fn host_with(tracking: Option<WriteTracking>) -> Host {
    let options = HostOptions {
        storage: storage_dir(),
        tracking,
        vmm: on_qemu(),
        patience: Some(PATIENCE),
        ..HostOptions::default()
    };
    Host::open(options).await.unwrap()
}

/// A template that reports its free pages, booted once.
pub(crate) async fn template(host: &Host) -> BuildId {
    named_template(host, "plain", false).await
}

/// A template with a network card, booted once by `host`, whose flags say whether it reports.
pub(crate) async fn network_template(host: &Host, name: &str) -> BuildId {
    named_template(host, name, true).await
}

async fn named_template(host: &Host, text: &str, network: bool) -> BuildId {
    let name: Name = text.parse().unwrap();
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
    let request = BootRequest {
        network,
        ..boot_request(text)
    };
    let sandbox = boot(host, request).await.unwrap();
    let paused = pause_into_new(sandbox, host, PauseFlags::default()).await;
    host.storage()
        .set_template(&name, &paused.build.id())
        .unwrap();
    drop(lock);
    paused.build.id()
}

/// Ends a guest's reporting. While it reports free pages, for some ten milliseconds at a time, it has up
/// to 32 blocks of them out of its lists: a look saw 22,528 pages fewer than the next one.
pub(crate) const UNBIND_BALLOON: &str =
    "cd /sys/bus/virtio/drivers/virtio_balloon && basename virtio* > unbind";

pub(crate) fn boot_request(template: &str) -> BootRequest {
    BootRequest {
        memory_bytes: GUEST_MEMORY_BYTES,
        disk_bytes: 1 << 30,
        vcpus: 1,
        network: false,
        kernel: DEFAULT_KERNEL.to_owned(),
        kernel_args: String::new(),
        rootfs: None,
        template: Some(template.parse().unwrap()),
        progress: Progress::silent(),
    }
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
    pause(sandbox, host, pause_request(flags, Progress::silent())).await
}

pub(crate) fn pause_request(flags: PauseFlags, progress: Progress) -> PauseRequest {
    PauseRequest {
        build: BuildId::random(),
        template: None,
        flags,
        progress,
    }
}

/// Does `act` once, when `step` of a pause begins.
pub(crate) fn at_step(step: PauseStep, act: impl FnOnce() + Send + 'static) -> Progress {
    let act: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(Some(Box::new(act)));
    Progress::to(move |event| {
        if event == (ProgressEvent::Started { step: step.doing() })
            && let Some(act) = act.lock().unwrap().take()
        {
            act();
        }
    })
}

/// A pause that must fail and leave the sandbox running: the sandbox, the step and the reason.
pub(crate) fn still_running(paused: Result<Paused, PauseFailure>) -> (Sandbox, PauseStep, String) {
    match paused {
        Err(PauseFailure::StillRunning {
            sandbox,
            step,
            source,
            not_thawed: None,
        }) => (*sandbox, step, source.to_string()),
        other => panic!("not still running: {other:?}"),
    }
}

/// A pause that must lose the sandbox: what is told.
pub(crate) fn lost(paused: Result<Paused, PauseFailure>) -> String {
    match paused {
        Err(failure @ PauseFailure::Lost { .. }) => failure.to_string(),
        other => panic!("not lost: {other:?}"),
    }
}

/// Sends a signal to a VMM of ours.
pub(crate) fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// Kills a process and waits until it has nothing left: no memory, no descriptors. Its first thread may
/// be gone before the others, which still have both.
pub(crate) fn kill_for_good(pid: u32) {
    signal(pid, Signal::SIGKILL);
    wait_until("the process is a zombie of one thread at most", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        stat.map_or(true, |stat| stat.contains(") Z "))
            && threads.map_or(true, |threads| threads.count() <= 1)
    });
}

/// Waits until a process is no more (and has been reaped).
pub(crate) fn assert_gone(pid: u32) {
    wait_until("the process is gone", || {
        !Path::new(&format!("/proc/{pid}")).exists()
    });
}

/// Looks again and again, for a minute at most.
pub(crate) fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "it never came true: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Starts a process in the guest that counts in /dev/shm/count, ten times a second, a line each.
/// It forks nothing: that is what costs an emulated guest.
pub(crate) async fn start_counter(sandbox: &Sandbox) {
    let counter = "exec 3<> <(:); n=0; while :; do n=$((n+1)); echo $n >> /dev/shm/count; \
                   read -t 0.1 -u 3; done";
    sh(
        sandbox,
        &format!(
            "setsid bash -c '{counter}' > /dev/null 2>&1 < /dev/null & \
             until [ -s /dev/shm/count ]; do sleep 0.1; done"
        ),
    )
    .await;
}

async fn count_of(sandbox: &Sandbox) -> u64 {
    sh(sandbox, "tail -n 1 /dev/shm/count")
        .await
        .parse()
        .unwrap()
}

/// The counter goes on from at least `from`: what it has come to.
pub(crate) async fn counts_on(sandbox: &Sandbox, from: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(30);
    let first = count_of(sandbox).await;
    assert!(first >= from, "the counter fell from {from} to {first}");
    loop {
        let now = count_of(sandbox).await;
        if now > first {
            return now;
        }
        assert!(Instant::now() < deadline, "the counter stands at {now}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Puts a script where it can be run. Another process writes it: what this one has open for writing,
/// a child of another test may have for a while, and nobody can run that.
pub(crate) fn put_program(path: &Path, script: &str) {
    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(script.as_bytes()).unwrap();
    let install = std::process::Command::new("install")
        .args([text.path(), path])
        .status();
    assert!(install.unwrap().success());
}

/// The directory where a build would be staged.
pub(crate) fn staging_of(host: &Host, id: &BuildId) -> PathBuf {
    host.storage()
        .root()
        .join("staging")
        .join(format!("build-{id}"))
}

/// Builds copied into a storage of their own, to be damaged. Images and kernels are shared.
pub(crate) struct CopiedStorage {
    pub(crate) host: Host,
    pub(crate) dir: tempfile::TempDir,
}

impl CopiedStorage {
    pub(crate) async fn of(host: &Host, ids: &[BuildId]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let options = HostOptions {
            storage: dir.path().to_path_buf(),
            vmm: on_qemu(),
            patience: Some(PATIENCE),
            ..HostOptions::default()
        };
        let copied = Host::open(options).await.unwrap();
        for folder in ["images", "block-indexes", "kernels"] {
            for entry in std::fs::read_dir(host.storage().root().join(folder)).unwrap() {
                let entry = entry.unwrap();
                let to = dir.path().join(folder).join(entry.file_name());
                link_tree(&entry.path(), &to);
            }
        }
        for id in ids {
            let from = host.storage().open_build(id).unwrap().path().to_path_buf();
            copy_dir(&from, &dir.path().join("builds").join(id.to_string()));
        }
        Self { host: copied, dir }
    }

    pub(crate) fn file(&self, id: &BuildId, name: &str) -> PathBuf {
        self.dir
            .path()
            .join("builds")
            .join(id.to_string())
            .join(name)
    }
}

fn link_tree(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            link_tree(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        std::fs::hard_link(from, to).unwrap();
    }
}

pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Where a data file's frames begin, at the latest: everything before is its header.
const FRAMES_FROM: u64 = 4096;

/// Places in every frame of a data file, but not in its table at the end.
pub(crate) fn every_frame(path: &Path) -> impl Iterator<Item = u64> + use<> {
    let len = std::fs::metadata(path).unwrap().len();
    (FRAMES_FROM..len * 9 / 10).step_by(512)
}

/// Turns over a bit of every byte at `offsets`, in place.
pub(crate) fn flip(path: &Path, offsets: impl Iterator<Item = u64>) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    for offset in offsets {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    }
}

/// All that can be known of a guest that does not answer. Its VMM is ended for its own last words.
pub(crate) async fn last_words(sandbox: &Sandbox) -> String {
    let (vmm, console) = (sandbox.vmm(), sandbox.console_tail());
    let (pid, lived) = (vmm.pid(), vmm.is_alive());
    let exit = match vmm.kill().await {
        Ok(exit) => exit.to_string(),
        Err(error) => error.to_string(),
    };
    format!(
        "the VMM {pid} {}: it {exit}\nthe pager: {:?}, {:?}\nthe console's end:\n{console}",
        if lived { "lived" } else { "was dead" },
        sandbox.pager_failure(),
        sandbox.pager_stats(),
    )
}

/// Runs a shell line in the guest; it must succeed. What it printed.
pub(crate) async fn sh(sandbox: &Sandbox, line: &str) -> String {
    let command = torpor_guest::Command::shell(line);
    let run = sandbox.envd().run(&command, Duration::from_secs(240));
    let output = match run.await {
        Ok(output) => output,
        Err(error) => panic!("{line}: {error}\n{}", last_words(sandbox).await),
    };
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.exit.success(), "{line}: {:?} {stderr}", output.exit);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What a kernel says when its memory is not what it left there.
const KERNEL_COMPLAINTS: [&str; 15] = [
    "BUG",
    "Oops",
    "Bad page",
    "corrupt",
    "general protection",
    "WARNING",
    "poison",
    "Unable to handle",
    "double free",
    "list_add",
    "list_del",
    "inconsistency",
    "EXT4-fs error",
    "I/O error",
    "segfault",
];

/// What it says of a processor that is emulated in an emulation, at its boot.
const EMULATION_COMPLAINT: &str = "fpu__init_system_xstate";

/// The guest's kernel has nothing to say of its memory, in all that it has said since it booted.
pub(crate) async fn kernel_is_content(sandbox: &Sandbox, what: &str) {
    let said = sh(sandbox, "dmesg").await;
    assert!(
        said.contains("Linux version"),
        "{what}: the beginning of the kernel's log is lost"
    );
    let complains = |line: &&str| {
        KERNEL_COMPLAINTS.iter().any(|word| line.contains(word))
            && !line.contains(EMULATION_COMPLAINT)
    };
    let complaints: Vec<&str> = said.lines().filter(complains).collect();
    assert_eq!(complaints, [""; 0], "{what}: the guest's kernel complains");
}

/// The kernels that the set-up fetched: the default one, and the others that the distribution has.
pub(crate) fn kernels() -> Vec<String> {
    let dir = torpor_sandbox::assets::default_dir()
        .unwrap()
        .join("kernels");
    let mut kernels: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.'))
        .collect();
    kernels.sort();
    assert!(!kernels.is_empty(), "{}: run `make setup`", dir.display());
    if let [only] = kernels.as_slice() {
        println!("Linux {only} is the only kernel in {}", dir.display());
    }
    kernels
}

/// Pages of a guest's memory that are there: in a lazily resumed guest not all.
pub(crate) fn present_pages(memory: &std::fs::File) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    // `st_blocks` counts 512 bytes each, whatever the file system's blocks are.
    memory.metadata().unwrap().blocks() * 512 / torpor_build::PAGE_SIZE as u64
}

/// The demo's program for guests, which `make build` puts beside the agent.
pub(crate) fn workload() -> PathBuf {
    let assets = Assets::find(None, DEFAULT_KERNEL).unwrap();
    let program = assets.envd.with_file_name("torpor-workload");
    assert!(program.exists(), "{}: run `make build`", program.display());
    program
}

/// Brings a program into the guest.
pub(crate) async fn upload(sandbox: &Sandbox, program: &Path, to: &str) {
    let envd = sandbox.envd();
    let line = format!("cat > {to} && chmod 755 {to}");
    let command = torpor_guest::Command::shell(line).stdin();
    let receiver = envd.start(&command, Some(Duration::from_secs(60))).await;
    let receiver = receiver.unwrap();
    let selector = torpor_guest::Selector::Pid(receiver.pid());
    for chunk in std::fs::read(program).unwrap().chunks(256 << 10) {
        envd.send_input(&selector, chunk).await.unwrap();
    }
    envd.close_stdin(&selector).await.unwrap();
    assert!(receiver.output().await.unwrap().exit.success());
}

/// The next line of JSON that a process in the guest prints.
pub(crate) async fn line<T: serde::de::DeserializeOwned>(
    process: &mut torpor_guest::Process,
    patience: Duration,
) -> T {
    use torpor_guest::ProcessEvent::{Pty, Stderr, Stdout};
    let mut line = Vec::new();
    let read = async {
        while !line.contains(&b'\n') {
            match process.next().await.unwrap() {
                Some(Stdout(bytes) | Pty(bytes)) => line.extend(bytes),
                Some(Stderr(bytes)) => panic!("it says: {}", String::from_utf8_lossy(&bytes)),
                ended => panic!("it ended: {ended:?}"),
            }
        }
    };
    tokio::time::timeout(patience, read).await.unwrap();
    let end = line.iter().position(|&byte| byte == b'\n').unwrap();
    serde_json::from_slice(&line[..end]).unwrap()
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
