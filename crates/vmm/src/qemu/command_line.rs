//! How a machine is spelled: QEMU's arguments and the guest kernel's command line. Pure.
//!
//! The machine is a **microvm**: no PCI, few devices, the shortest device state (68 KB against
//! 678 KB of a q35).
//!
//! ```text
//! virtio-mmio-bus.23  block, base image     /dev/vda  serial "base"   read-only
//! virtio-mmio-bus.22  block, writable disk  /dev/vdb  serial "layer"
//! virtio-mmio-bus.21  serial, one port named "torpor.agent"
//! virtio-mmio-bus.20  random numbers
//! virtio-mmio-bus.19  balloon: always there, reporting only where asked for
//! virtio-mmio-bus.18  network card, where asked for
//! ```
//!
//! The ACPI tables list the buses from the last to the first, and Linux probes them in that
//! order. So every device names its bus, counted down, and the guest can rely on the order of
//! its drives as well as on `/sys/block/vdX/serial`. (Measured: with the drives on buses 0 and 1
//! a guest waits for ever for its first read of bus 0.) The balloon without reporting costs a queue
//! or two and keeps the layout the same.
//!
//! The virtio transport stays the legacy one, QEMU's default: for the modern one QEMU saves 1024
//! queues of every device, used or not, and the device state grows from 76 to 279 KB (measured);
//! none of its features is needed here. The description of the state (17 KB of JSON for
//! debuggers, `vmdesc`) is left out.
//!
//! **Drives.** Both go through the host's page cache, by QEMU's threads: the base image is then
//! in memory once for all sandboxes, and a capture reads the writable one coherently and warm.
//! Flushes stop at QEMU (`no-flush`): the writable image dies with its sandbox, whose memory a
//! host crash loses anyway; what must be durable is the build, and the commit sees to that. Not
//! `aio=native`: it wants O_DIRECT. Not `io_uring`: containers often forbid it. Discards punch
//! holes; zeroes are not looked for (`detect-zeroes=off`), the capture does that better.

use std::ffi::OsString;
use std::path::Path;

use serde_json::json;

use crate::error::{Result, VmmError};
use crate::host::host_tsc_khz;
use crate::machine::{Accel, BootSource, GUEST_MAC, MachineConfig, join_command_line};
use crate::version::Version;

/// The machine as an identity records it: QEMU's type, and the revision of the layout above.
/// Raise the revision with every change of a device or of its options: a device state fits the
/// layout that made it.
pub(super) const MACHINE_IDENTITY: &str = "microvm/1";

/// The guest's name for the agent's port, found in `/sys/class/virtio-ports/*/name`.
const AGENT_PORT_NAME: &str = "torpor.agent";
/// QEMU's balloon, by the name that QMP uses.
pub(super) const BALLOON_PATH: &str = "/machine/peripheral/balloon";
/// The last of a microvm's virtio buses: it has 24 of them with a second I/O APIC.
const LAST_BUS: u32 = 23;
/// TCG's cache of translated code in MiB. QEMU's own default of 1 GiB could make a translator
/// larger than most of its guests; a Linux boot and a Python workload translate about 60 MiB.
const TRANSLATION_CACHE_MIB: u32 = 256;
/// The first version of which TCG may run a guest's processors in a thread each. Those before it
/// translate code while another processor writes it, and may keep what they read too early: a
/// kernel that patches its own code then meets the old code (`Oops: int3`, in 5 of 150 boots with
/// four processors). Upstream's deba78709ae8, "Always lock pages before translation".
const PROCESSORS_IN_THREADS_SINCE: Version = Version::new(8, 1, 0);
/// What a hijacked QEMU may not do: old system calls, more privileges, other programs, other
/// priorities.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The numbers under which QEMU inherits our descriptors.
pub(super) mod inherited {
    /// The guest's memory.
    pub(in crate::qemu) const MEMORY: i32 = 3;
    /// QMP.
    pub(in crate::qemu) const QMP: i32 = 4;
    /// The agent's channel.
    pub(in crate::qemu) const AGENT: i32 = 5;
    /// The serial console.
    pub(in crate::qemu) const CONSOLE: i32 = 6;
    /// `/dev/userfaultfd`, where there is one and we may open it.
    pub(in crate::qemu) const USERFAULTFD_DEVICE: i32 = 7;
    /// The padded initramfs, at a boot that has one.
    pub(in crate::qemu) const INITRAMFS: i32 = 8;
}

/// What the machine starts from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start<'a> {
    /// A kernel.
    Kernel(&'a BootSource),
    /// A device state that comes later.
    Incoming,
}

/// QEMU's arguments. It starts with its vCPUs stopped in any case.
pub(super) fn arguments(
    version: Version,
    machine: &MachineConfig,
    start: Start<'_>,
) -> Result<Vec<OsString>> {
    let mut args = Arguments::default();
    args.flag("-nodefaults")
        .flag("-no-user-config")
        .flag("-no-reboot")
        .flag("-S");
    args.pair("-display", "none").pair("-sandbox", SANDBOX);
    add_processors_and_memory(&mut args, version, machine);
    add_devices(&mut args, machine)?;
    match start {
        Start::Kernel(boot) => {
            args.path("-kernel", &boot.kernel)?;
            if boot.initramfs.is_some() {
                args.pair(
                    "-initrd",
                    &format!("/proc/self/fd/{}", inherited::INITRAMFS),
                );
            }
            args.pair("-append", &kernel_command_line(machine, boot)?);
        }
        // No kernel: what a guest booted from is long in its memory.
        Start::Incoming => {
            args.pair("-incoming", "defer");
        }
    }
    Ok(args.0)
}

fn add_processors_and_memory(args: &mut Arguments, version: Version, machine: &MachineConfig) {
    args.pair(
        "-machine",
        "microvm,acpi=on,ioapic2=on,auto-kernel-cmdline=off,memory-backend=ram",
    );
    match machine.accel {
        Accel::Kvm => args.pair("-accel", "kvm").pair("-cpu", "host"),
        Accel::Tcg => {
            let in_threads = machine.vcpus == 1 || version >= PROCESSORS_IN_THREADS_SINCE;
            let thread = if in_threads { "multi" } else { "single" };
            let tcg = format!("tcg,thread={thread},tb-size={TRANSLATION_CACHE_MIB}");
            args.pair("-accel", &tcg).pair("-cpu", "max")
        }
    };
    args.pair("-smp", &machine.vcpus.to_string());
    // A file backend on an inherited memfd: QEMU 10 would not leave memory-backend-memfd out of
    // the device state.
    let mib = machine.memory_bytes >> 20;
    let memory = inherited::MEMORY;
    args.pair("-m", &format!("{mib}M"));
    args.pair(
        "-object",
        &format!("memory-backend-file,id=ram,mem-path=/proc/self/fd/{memory},share=on,size={mib}M"),
    );
}

fn add_devices(args: &mut Arguments, machine: &MachineConfig) -> Result<()> {
    args.socket("qmp", inherited::QMP)
        .pair("-mon", "chardev=qmp,mode=control");
    args.socket("console", inherited::CONSOLE)
        .pair("-serial", "chardev:console");

    args.pair("-blockdev", &base_image(&machine.base_image)?);
    args.device(0, "virtio-blk-device,drive=base,serial=base");
    args.pair("-blockdev", &writable_disk(&machine.writable_disk)?);
    // A full host disk is the guest's write error: QEMU's own way is to stop the guest, silently.
    args.device(
        1,
        "virtio-blk-device,drive=layer,serial=layer,discard_granularity=4096,werror=report",
    );
    args.socket("agent", inherited::AGENT)
        .device(2, "virtio-serial-device,max_ports=2");
    args.pair(
        "-device",
        &format!("virtserialport,chardev=agent,name={AGENT_PORT_NAME}"),
    );
    args.pair("-object", "rng-builtin,id=random")
        .device(3, "virtio-rng-device,rng=random");
    let reporting = if machine.free_page_reporting {
        "on"
    } else {
        "off"
    };
    args.device(
        4,
        &format!("virtio-balloon-device,id=balloon,free-page-reporting={reporting}"),
    );
    if machine.network {
        args.pair("-netdev", "user,id=network,ipv6=off");
        args.device(
            5,
            &format!("virtio-net-device,netdev=network,mac={GUEST_MAC}"),
        );
    }
    Ok(())
}

/// The guest kernel's whole command line, as a manifest records it.
///
/// # Errors
/// It is longer than the kernel reads, or holds a line break.
pub fn kernel_command_line(machine: &MachineConfig, boot: &BootSource) -> Result<String> {
    let mut words = vec![
        "console=ttyS0".to_owned(),
        // A guest that panics reboots at once, by triple fault; -no-reboot ends QEMU instead.
        "panic=-1".to_owned(),
        "reboot=t".to_owned(),
        // Free pages are reported down to single ones (the default is 2 MiB), …
        "page_reporting.page_reporting_order=0".to_owned(),
        // … and the guest does not touch pages just to hand them out.
        "init_on_alloc=0".to_owned(),
    ];
    if machine.accel == Accel::Tcg {
        // A microvm has no clock to calibrate against; without these most boots hang early.
        words.push("no_timer_check".to_owned());
        words.push(format!("tsc_early_khz={}", host_tsc_khz()));
        // The only clock to check the counter against would be timer ticks, which a busy host
        // loses: the guest would give up its good clock for them.
        words.push("tsc=reliable".to_owned());
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    join_command_line(&words, &boot.extra_cmdline)
}

/// As JSON, because QEMU's own option syntax splits paths at commas.
fn base_image(path: &Path) -> Result<String> {
    let file = json!({
        "driver": "file", "filename": absolute("base image", path)?,
        "aio": "threads", "read-only": true, "auto-read-only": false,
    });
    Ok(
        json!({ "driver": "raw", "node-name": "base", "read-only": true, "file": file })
            .to_string(),
    )
}

fn writable_disk(path: &Path) -> Result<String> {
    let cache = json!({ "direct": false, "no-flush": true });
    let file = json!({
        "driver": "file", "filename": absolute("writable disk", path)?,
        "aio": "threads", "auto-read-only": false, "discard": "unmap", "cache": cache,
    });
    let drive = json!({
        "driver": "raw", "node-name": "layer", "discard": "unmap", "detect-zeroes": "off",
        "cache": cache, "file": file,
    });
    Ok(drive.to_string())
}

/// QEMU starts in `/`.
fn absolute(role: &'static str, path: &Path) -> Result<String> {
    let absolute = std::path::absolute(path).map_err(|source| VmmError::File {
        role,
        path: path.to_owned(),
        source,
    })?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|path| VmmError::InvalidMachine {
            what: format!("{role} {}: its path must be UTF-8", path.display()),
        })
}

#[derive(Debug, Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn pair(&mut self, option: &str, value: &str) -> &mut Self {
        self.flag(option).flag(value)
    }

    fn path(&mut self, option: &str, path: &Path) -> Result<&mut Self> {
        let path = absolute("boot file", path)?;
        Ok(self.pair(option, &path))
    }

    fn socket(&mut self, id: &str, fd: i32) -> &mut Self {
        self.pair("-chardev", &format!("socket,id={id},fd={fd}"))
    }

    /// The guest finds the devices in the order of their slots.
    fn device(&mut self, slot: u32, device: &str) -> &mut Self {
        let bus = LAST_BUS - slot;
        self.pair("-device", &format!("{device},bus=virtio-mmio-bus.{bus}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEWEST: Version = Version::new(10, 0, 2);

    fn machine() -> MachineConfig {
        MachineConfig {
            memory_bytes: 512 << 20,
            vcpus: 2,
            base_image: "/images/with, comma and \"quote\"".into(),
            writable_disk: "/run/layer.img".into(),
            network: false,
            free_page_reporting: true,
            accel: Accel::Tcg,
        }
    }

    fn boot() -> BootSource {
        BootSource {
            kernel: "/kernels/vmlinux".into(),
            initramfs: None,
            extra_cmdline: " quiet ".into(),
        }
    }

    fn joined(machine: &MachineConfig, start: Start<'_>) -> String {
        let args = arguments(NEWEST, machine, start).unwrap();
        args.iter()
            .map(|arg| arg.to_str().unwrap())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_drives_stand_on_named_buses_in_the_order_that_the_guest_relies_on() {
        let line = joined(&machine(), Start::Kernel(&boot()));
        assert!(
            line.contains("drive=base,serial=base,bus=virtio-mmio-bus.23"),
            "{line}"
        );
        assert!(line.contains(
            "drive=layer,serial=layer,discard_granularity=4096,werror=report,bus=virtio-mmio-bus.22"
        ));
        assert!(
            line.contains(r#"/images/with, comma and \"quote\""#),
            "{line}"
        );
    }

    #[test]
    fn a_resumed_machine_is_the_booted_one_but_for_its_kernel() {
        let booted = arguments(NEWEST, &machine(), Start::Kernel(&boot())).unwrap();
        let resumed = arguments(NEWEST, &machine(), Start::Incoming).unwrap();
        let common = resumed.len() - 2;
        assert_eq!(booted[..common], resumed[..common]);
        assert_eq!(resumed[common..], ["-incoming", "defer"]);
    }

    #[test]
    fn reporting_and_network_are_there_only_when_asked_for() {
        let line = joined(&machine(), Start::Incoming);
        assert!(line.contains("free-page-reporting=on") && !line.contains("netdev"));
        let other = MachineConfig {
            free_page_reporting: false,
            network: true,
            ..machine()
        };
        let line = joined(&other, Start::Incoming);
        assert!(line.contains("free-page-reporting=off") && line.contains("-netdev user"));
    }

    #[test]
    fn an_old_qemu_runs_several_processors_in_one_thread() {
        let accel = |version, vcpus| {
            let machine = MachineConfig { vcpus, ..machine() };
            let args = arguments(version, &machine, Start::Incoming).unwrap();
            let at = args.iter().position(|arg| arg == "-accel").unwrap();
            args[at + 1].to_str().unwrap().to_owned()
        };
        let (old, new) = (Version::new(8, 0, 5), Version::new(8, 1, 0));
        assert!(accel(old, 2).starts_with("tcg,thread=single,"));
        assert!(accel(old, 1).starts_with("tcg,thread=multi,"));
        assert!(accel(new, 2).starts_with("tcg,thread=multi,"));
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let line = kernel_command_line(&machine(), &boot()).unwrap();
        assert!(
            line.ends_with(" quiet") && line.contains(" tsc_early_khz="),
            "{line}"
        );

        let long = BootSource {
            extra_cmdline: "x".repeat(2048),
            ..boot()
        };
        assert!(kernel_command_line(&machine(), &long).is_err());
        let broken = BootSource {
            extra_cmdline: "a\nb".into(),
            ..boot()
        };
        assert!(kernel_command_line(&machine(), &broken).is_err());
    }
}
