//! A guest for tests: the set-up's kernel, an initramfs made here, two disks, and a way to talk.

#![allow(missing_docs, unreachable_pub, reason = "test support")]
#![allow(dead_code, reason = "each test file uses what it needs of this")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test guest that cannot be had ends the test"
)]

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use torpor_vmm::qemu::{self, IncomingVm, QemuBinary};
use torpor_vmm::{Accel, BootSource, MachineConfig, Vmm};

/// How long a guest may take for anything. Under TCG on a loaded host a boot takes 5 to 30 s.
pub const GUEST_DEADLINE: Duration = Duration::from_secs(180);
/// One question's, which a boot includes: longer, so that a boot can say what it saw.
const ANSWER_DEADLINE: Duration = Duration::from_secs(200);

pub fn binary() -> QemuBinary {
    QemuBinary::find(None).unwrap()
}

/// Kernel and modules as the set-up leaves them.
pub fn kernel_dir() -> PathBuf {
    let assets = env::var_os("TORPOR_ASSETS").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap()).join(".cache/torpor"),
        PathBuf::from,
    );
    let dir = assets.join("kernels/6.12");
    assert!(
        dir.join("vmlinux").is_file(),
        "no guest kernel in {}: run `make setup`, or set TORPOR_ASSETS",
        dir.display()
    );
    dir
}

/// A directory with two disks, for one machine at a time.
#[derive(Debug)]
pub struct Host {
    pub dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = File::create(dir.path().join("base.img")).unwrap();
        base.set_len(16 << 20).unwrap();
        let layer = File::create(dir.path().join("layer.img")).unwrap();
        layer.set_len(64 << 20).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn machine(&self) -> MachineConfig {
        MachineConfig {
            memory_bytes: 256 << 20,
            vcpus: 1,
            base_image: self.path("base.img"),
            writable_disk: self.path("layer.img"),
            network: false,
            free_page_reporting: true,
            accel: Accel::of_host(),
        }
    }

    pub fn boot_source(&self) -> BootSource {
        BootSource {
            kernel: kernel_dir().join("vmlinux"),
            initramfs: Some(initramfs().to_owned()),
            extra_cmdline: String::new(),
        }
    }

    pub fn console(&self) -> String {
        let log = fs::read(self.path("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Boots, and waits until the guest answers.
    pub async fn boot(&self, machine: &MachineConfig) -> Guest {
        let log = self.path("console.log");
        let vm = qemu::boot(&binary(), machine, &self.boot_source(), &log)
            .await
            .unwrap();
        let mut guest = Guest::new(vm);
        match timeout(GUEST_DEADLINE, guest.ask("count")).await {
            Ok(answer) if !answer.is_empty() => guest,
            Ok(_) => {
                let exit = guest.vm.wait_exit().await;
                panic!("the VMM {exit}; the guest's console:\n{}", self.console());
            }
            Err(_) => panic!(
                "the guest does not answer; its console:\n{}",
                self.console()
            ),
        }
    }

    pub async fn incoming(&self, machine: &MachineConfig) -> IncomingVm {
        qemu::prepare_resume(&binary(), machine, &self.path("console.log"))
            .await
            .unwrap()
    }
}

/// A guest that can be asked.
#[derive(Debug)]
pub struct Guest {
    pub vm: Box<dyn Vmm>,
    channel: BufReader<UnixStream>,
}

impl Guest {
    pub fn new(vm: Box<dyn Vmm>) -> Self {
        let channel = BufReader::new(vm.take_agent_channel().unwrap());
        assert!(vm.take_agent_channel().is_none(), "there is one channel");
        Self { vm, channel }
    }

    /// The guest's answer; empty if its machine ended over the question.
    pub async fn ask(&mut self, question: &str) -> String {
        let work = async {
            let mut answer = String::new();
            let line = format!("{question}\n");
            if self.channel.write_all(line.as_bytes()).await.is_ok() {
                // A machine that ends resets the connection, or just closes it.
                if self.channel.read_line(&mut answer).await.is_err() {
                    answer.clear();
                }
            }
            answer.trim().to_owned()
        };
        timeout(ANSWER_DEADLINE, work)
            .await
            .expect("the guest answers")
    }

    pub async fn count(&mut self) -> u64 {
        self.ask("count").await.parse().unwrap()
    }
}

/// Waits until a process is gone, or a zombie of somebody else.
pub async fn wait_until_gone(pid: u32) {
    let stat = format!("/proc/{pid}/stat");
    for _ in 0..1_000 {
        match fs::read_to_string(&stat) {
            Ok(text) if !text.contains(") Z ") => sleep(Duration::from_millis(20)).await,
            _ => return,
        }
    }
    panic!("process {pid} is still there");
}

/// The initramfs, made once per test process: `init` and the modules.
pub fn initramfs() -> &'static Path {
    static MADE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_dir, path) = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let init = dir.path().join("init");
        compile_init(&init);
        let path = pack(dir.path(), &init);
        (dir, path)
    });
    path
}

/// The lab has no compiler, and brings it along.
fn compile_init(init: &Path) {
    if let Some(made) = env::var_os("TORPOR_TEST_INIT") {
        fs::copy(made, init).unwrap();
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/assets/init.rs");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "-Copt-level=2",
            "-Ctarget-feature=+crt-static",
            "-o",
        ])
        .args([init, &source])
        .status()
        .unwrap();
    assert!(status.success(), "rustc cannot compile the test guest");
}

fn pack(dir: &Path, init: &Path) -> PathBuf {
    let path = dir.join("initramfs");
    let mut cpio = Cpio(File::create(&path).unwrap());
    for directory in ["dev", "proc", "sys", "modules"] {
        cpio.add(directory, 0o040_755, &[]);
    }
    // The kernel gives pid 1 its console only if this exists before devtmpfs does.
    cpio.add_device("dev/console", 5, 1);
    cpio.add("init", 0o100_755, &fs::read(init).unwrap());
    for entry in fs::read_dir(kernel_dir().join("modules")).unwrap() {
        let entry = entry.unwrap();
        let name = format!("modules/{}", entry.file_name().to_str().unwrap());
        cpio.add(&name, 0o100_644, &fs::read(entry.path()).unwrap());
    }
    cpio.add("TRAILER!!!", 0, &[]);
    // The worst size: at the end of guest memory it would lie over the ACPI tables.
    let len = cpio.0.metadata().unwrap().len();
    cpio.0.set_len(len.next_multiple_of(4096) + 4095).unwrap();
    path
}

/// The `newc` format (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
struct Cpio(File);

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, mode, (0, 0), content);
    }

    fn add_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let len = u32::try_from(content.len()).unwrap();
        let name_len = u32::try_from(name.len()).unwrap() + 1;
        let fields = [
            0, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.padded(format!("{header}{name}\0").as_bytes());
        self.padded(content);
    }

    fn padded(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
        self.0
            .write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
            .unwrap();
    }
}
