//! The same guest through QEMU's own way: `migrate` of everything into a file, restored eagerly by
//! `-incoming`.
//!
//! ```text
//! boot ─▶ workload ─▶ stop ─ migrate fd: ─▶ file, fsync      pause
//! copy the disk ─▶ new QEMU -incoming fd: ─▶ cont ─▶ first answer of envd     resume, repeated
//! ```
//!
//! Kernel, initramfs, base image, devices and workload are the other arms'. What differs is what an
//! operator would do who has only QEMU: plain RAM, no page reporting, the migration's bandwidth
//! limit (made for networks, 128 MiB/s) lifted. The baseline's figures leave out what torpor's
//! include: the disk is not stored, and its copy for each resume is made before the clock starts.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{self, MigrationStatus, QmpCommand, RunState};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use tokio::io::WriteHalf;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use torpor_build::PAGE_SIZE;
use torpor_guest::{Channel, Envd};
use torpor_sandbox::assets::{Assets, DEFAULT_KERNEL};
use torpor_sandbox::host::Host;
use torpor_sandbox::run_times::RunTimes;
use torpor_sandbox::{initramfs, rootfs};
use torpor_vmm::{Accel, BootSource, MachineConfig, qemu};

use crate::guest_work::{self, Verification};
use crate::watch::Watch;
use crate::{GUEST_DISK_BYTES, GUEST_MEMORY_BYTES, elapsed_ms};

/// Bytes per second: more than any memory can, so that the limit is none.
const BANDWIDTH_UNLIMITED: u64 = 1 << 40;
/// Longest wait for one state of a QEMU: seconds at most, on a slow disk.
const STATE_MAX: Duration = Duration::from_secs(60);
/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_millis(1);
/// Longest wait for a booting guest.
const BOOT_MAX: Duration = Duration::from_secs(120);
/// How much of the console is shown when the guest does not come up.
const CONSOLE_SHOWN_BYTES: usize = 2000;
/// The numbers under which QEMU inherits our descriptors.
const STATE_FD: i32 = 3;
const QMP_FD: i32 = 4;
const AGENT_FD: i32 = 5;

/// What does not depend on the guest: torpor's machine and devices, on the same
/// buses (on the first ones a guest hangs; see torpor-vmm's command line).
const MACHINE: [&str; 12] = [
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-S",
    "-display",
    "none",
    "-machine",
    "microvm,acpi=on,auto-kernel-cmdline=off,memory-backend=ram",
    "-smp",
    "1",
    "-mon",
    "chardev=qmp,mode=control",
];
const DEVICES: [&str; 14] = [
    "-device",
    "virtio-blk-device,drive=base,serial=base,bus=virtio-mmio-bus.23",
    "-device",
    "virtio-blk-device,drive=layer,serial=layer,discard_granularity=4096,bus=virtio-mmio-bus.22",
    "-device",
    "virtio-serial-device,max_ports=2,bus=virtio-mmio-bus.21",
    "-device",
    "virtserialport,chardev=agent,name=torpor.agent",
    "-object",
    "rng-builtin,id=random",
    "-device",
    "virtio-rng-device,rng=random,bus=virtio-mmio-bus.20",
    "-device",
    "virtio-balloon-device,id=balloon,bus=virtio-mmio-bus.19",
];

/// The baseline's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Baseline {
    /// The file: memory and device state.
    pub file_bytes: u64,
    /// From the vCPUs' stop until the migration was complete.
    pub freeze_ms: f64,
    /// From the vCPUs' stop until the file was synced.
    pub durable_ms: f64,
    /// From starting QEMU to envd's first answer, the file in the page cache.
    pub resume: RunTimes,
    /// Each resume.
    pub resume_ms: Vec<f64>,
    /// The first resumed guest was verified like any other.
    pub verification: Verification,
}

/// Measures it.
///
/// # Errors
/// The guest does not boot, or QEMU does not do its part.
pub async fn run(host: &Host, dir: &Path, iterations: u32, watch: &Watch) -> Result<Baseline> {
    let dir = tempfile::tempdir_in(dir)?;
    let guest = Guest::prepare(host, dir.path()).await?;
    let (saved, before) = {
        let _stage = watch.stage("QEMU's own way: boot, workload, migrate to a file");
        let mut machine = Machine::start(&guest, &guest.disk, Start::Boot).await?;
        let answered = machine.answered(BOOT_MAX).await;
        let envd = answered.with_context(|| guest.console_tail())?;
        guest_work::install(&envd).await?;
        guest_work::work(&envd).await?;
        let before = guest_work::check(&envd).await?;
        (machine.save(&guest).await?, before)
    };
    let _stage = watch.stage(format!("QEMU's own way: {iterations} resumes"));
    let (mut resume_ms, mut verification) = (Vec::new(), None);
    for _ in 0..iterations {
        let disk = guest.copy_disk().await?;
        let since = Instant::now();
        let mut machine = Machine::start(&guest, &disk, Start::Incoming).await?;
        machine.until_paused().await?;
        machine.execute(qmp::cont {}).await?;
        let envd = machine.answered(STATE_MAX).await?;
        resume_ms.push(elapsed_ms(since));
        if verification.is_none() {
            verification = Some(guest_work::verify(&envd, &before).await?);
        }
        machine.end().await?;
    }
    Ok(Baseline {
        file_bytes: saved.file_bytes,
        freeze_ms: saved.freeze_ms,
        durable_ms: saved.durable_ms,
        resume: RunTimes::of(&resume_ms).context("no iterations")?,
        resume_ms,
        verification: verification.context("no iterations")?,
    })
}

/// The files of the guest.
struct Guest {
    program: PathBuf,
    machine: MachineConfig,
    boot: BootSource,
    cmdline: String,
    initramfs: PathBuf,
    disk: PathBuf,
    state: PathBuf,
    console: PathBuf,
}

impl Guest {
    async fn prepare(host: &Host, dir: &Path) -> Result<Self> {
        let assets = Assets::find(None, DEFAULT_KERNEL)?;
        let (disk, initramfs) = (dir.join("disk"), dir.join("initramfs.cpio"));
        rootfs::make_layer(&disk, GUEST_DISK_BYTES).await?;
        let mut archive = initramfs::assemble(&assets.envd, &assets.modules)?;
        // QEMU loads it to the end of guest memory, where the ACPI tables are as well: an archive
        // that ends inside the last page overwrites them, and the guest finds no device.
        archive.resize(archive.len().next_multiple_of(PAGE_SIZE), 0);
        std::fs::write(&initramfs, archive)?;
        let machine = MachineConfig {
            memory_bytes: GUEST_MEMORY_BYTES,
            vcpus: 1,
            base_image: assets.base_image.clone(),
            writable_disk: disk.clone(),
            network: false,
            free_page_reporting: false,
            accel: Accel::of_host(),
        };
        let boot = BootSource {
            kernel: assets.kernel.clone(),
            initramfs: Some(initramfs.clone()),
            extra_cmdline: String::new(),
        };
        let cmdline = qemu::kernel_command_line(&machine, &boot)?;
        let program = host.vmm().path().to_path_buf();
        Ok(Self {
            program,
            machine,
            boot,
            cmdline,
            initramfs,
            disk,
            state: dir.join("state"),
            console: dir.join("console.log"),
        })
    }

    /// What a guest that did not come up had to say.
    fn console_tail(&self) -> String {
        let log = std::fs::read(&self.console).unwrap_or_default();
        let tail = log.len().saturating_sub(CONSOLE_SHOWN_BYTES);
        format!(
            "the guest's console ended with:\n{}\n",
            String::from_utf8_lossy(&log[tail..])
        )
    }

    /// A disk for one resume: the guest goes on writing.
    async fn copy_disk(&self) -> Result<PathBuf> {
        let copy = self.disk.with_extension("copy");
        let copied = Command::new("cp")
            .arg("--sparse=always")
            .args([&self.disk, &copy])
            .status();
        ensure!(
            copied.await?.success(),
            "cp cannot copy {}",
            self.disk.display()
        );
        Ok(copy)
    }

    fn arguments(&self, disk: &Path, start: Start) -> Result<Vec<String>> {
        let text = |path: &Path| {
            path.to_str()
                .map(str::to_owned)
                .context("a path that is not UTF-8")
        };
        let accel = match self.machine.accel {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"],
        };
        let memory = format!(
            "memory-backend-ram,id=ram,size={}",
            self.machine.memory_bytes
        );
        let console = format!("file:{}", text(&self.console)?);
        let memory_mib = format!("{}M", self.machine.memory_bytes >> 20);
        let base = drive("base", &text(&self.machine.base_image)?, true);
        let layer = drive("layer", &text(disk)?, false);
        let (qmp, agent) = (
            format!("socket,id=qmp,fd={QMP_FD}"),
            format!("socket,id=agent,fd={AGENT_FD}"),
        );
        let words = [
            &["-m", &memory_mib, "-object", &memory][..],
            &["-blockdev", &base, "-blockdev", &layer],
            &["-chardev", &qmp, "-chardev", &agent, "-serial", &console],
            &accel,
            &MACHINE,
            &DEVICES,
        ];
        let mut args: Vec<String> = words.concat().into_iter().map(str::to_owned).collect();
        let kernel = text(&self.boot.kernel)?;
        let (incoming, initramfs) = (format!("fd:{STATE_FD}"), text(&self.initramfs)?);
        let last: &[&str] = match start {
            Start::Boot => &[
                "-kernel",
                &kernel,
                "-initrd",
                &initramfs,
                "-append",
                &self.cmdline,
            ],
            Start::Incoming => &["-incoming", &incoming],
        };
        args.extend(last.iter().map(|&word| word.to_owned()));
        Ok(args)
    }
}

/// A drive as torpor's machine has it.
fn drive(name: &str, path: &str, read_only: bool) -> String {
    let cache = serde_json::json!({ "direct": false, "no-flush": !read_only });
    let file = serde_json::json!({
        "driver": "file", "filename": path, "aio": "threads", "auto-read-only": false,
        "read-only": read_only, "discard": "unmap", "cache": cache,
    });
    serde_json::json!({
        "driver": "raw", "node-name": name, "read-only": read_only, "discard": "unmap", "file": file,
        "cache": cache,
    })
    .to_string()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Boot,
    Incoming,
}

struct Saved {
    file_bytes: u64,
    freeze_ms: f64,
    durable_ms: f64,
}

/// A QEMU of our own. Killed when dropped.
struct Machine {
    process: Child,
    qmp: QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>,
    /// The same socket, for a byte that carries a descriptor.
    socket: OwnedFd,
    agent: Option<UnixStream>,
}

impl Machine {
    async fn start(guest: &Guest, disk: &Path, start: Start) -> Result<Self> {
        let (qmp, qmp_theirs) = UnixStream::pair()?;
        let (agent, agent_theirs) = UnixStream::pair()?;
        let state = match start {
            // It gets its file when it is saved.
            Start::Boot => File::open("/dev/null")?,
            Start::Incoming => File::open(&guest.state)?,
        };
        let blocking = |stream: UnixStream| -> std::io::Result<OwnedFd> {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            Ok(stream.into())
        };
        let mut command = Command::new(&guest.program);
        command
            .args(guest.arguments(disk, start)?)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command.fd_mappings(vec![
            FdMapping {
                parent_fd: state.into(),
                child_fd: STATE_FD,
            },
            FdMapping {
                parent_fd: blocking(qmp_theirs)?,
                child_fd: QMP_FD,
            },
            FdMapping {
                parent_fd: blocking(agent_theirs)?,
                child_fd: AGENT_FD,
            },
        ])?;
        let process = command.spawn().context("QEMU does not start")?;
        // Our copies of QEMU's ends go with it: a QEMU that ends closes the connection.
        drop(command);
        let socket = qmp.as_fd().try_clone_to_owned()?;
        let greeting = async { QmpStreamTokio::open(qmp).await?.negotiate().await };
        let stream = tokio::time::timeout(STATE_MAX, greeting)
            .await
            .context("QEMU is silent")??;
        let (qmp, _reader) = stream.spawn_tokio();
        Ok(Self {
            process,
            qmp,
            socket,
            agent: Some(agent),
        })
    }

    async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok> {
        tokio::time::timeout(STATE_MAX, self.qmp.execute(command))
            .await
            .with_context(|| format!("QEMU does not answer {}", C::NAME))?
            .map_err(|error| anyhow::anyhow!("QEMU refuses {}: {error}", C::NAME))
    }

    /// Gives QEMU a descriptor under a name: with a space, which means nothing in JSON.
    async fn send_descriptor(&self, name: &str, fd: BorrowedFd<'_>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        ensure!(
            ancillary.push(SendAncillaryMessage::ScmRights(&fds)),
            "no room for a descriptor"
        );
        sendmsg(
            &self.socket,
            &[IoSlice::new(b" ")],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        let fdname = name.to_owned();
        self.execute(qmp::getfd { fdname }).await?;
        Ok(())
    }

    /// Lets a booted machine run, and waits for envd.
    async fn answered(&mut self, patience: Duration) -> Result<Envd> {
        if self.execute(qmp::query_status {}).await?.status != RunState::running {
            self.execute(qmp::cont {}).await?;
        }
        let agent = self.agent.take().context("the agent's channel was taken")?;
        let envd = Envd::new(Channel::connect(agent, patience).await?);
        envd.init().await?;
        Ok(envd)
    }

    /// Waits until an incoming state is loaded.
    async fn until_paused(&self) -> Result<()> {
        let since = Instant::now();
        while self.execute(qmp::query_status {}).await?.status == RunState::inmigrate {
            ensure!(since.elapsed() < STATE_MAX, "QEMU does not load its state");
            tokio::time::sleep(ASK_EVERY).await;
        }
        Ok(())
    }

    /// Stops the machine and writes everything to the file.
    async fn save(self, guest: &Guest) -> Result<Saved> {
        let parameters = qmp::MigrateSetParameters {
            max_bandwidth: Some(BANDWIDTH_UNLIMITED),
            ..qmp::MigrateSetParameters::default()
        };
        self.execute(qmp::migrate_set_parameters(parameters))
            .await?;
        let file = File::create(&guest.state)?;
        self.send_descriptor("state", file.as_fd()).await?;
        let since = Instant::now();
        self.execute(qmp::stop {}).await?;
        let uri = Some("fd:state".to_owned());
        self.execute(qmp::migrate {
            uri,
            channels: None,
            detach: None,
            resume: None,
        })
        .await?;
        loop {
            let info = self.execute(qmp::query_migrate {}).await?;
            match info.status {
                Some(MigrationStatus::completed) => break,
                Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                    bail!(
                        "QEMU's migration failed: {}",
                        info.error_desc.unwrap_or_default()
                    )
                }
                _ => ensure!(since.elapsed() < STATE_MAX, "QEMU's migration does not end"),
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
        let freeze_ms = elapsed_ms(since);
        file.sync_all()?;
        let durable_ms = elapsed_ms(since);
        self.end().await?;
        Ok(Saved {
            file_bytes: file.metadata()?.len(),
            freeze_ms,
            durable_ms,
        })
    }

    async fn end(mut self) -> Result<()> {
        Ok(self.process.kill().await?)
    }
}
