//! How a machine is spelled: Firecracker's arguments, the bodies of its requests and the guest
//! kernel's command line. Pure.
//!
//! ```text
//! drive "base"   first   /dev/vda   read-only
//! drive "layer"  second  /dev/vdb
//! vsock          the agent's channel
//! entropy        random numbers
//! network        where asked for; see `network`
//! balloon        always there: hinting where the version knows it, reporting where asked for
//! ```
//!
//! All paths that a device state remembers are names in the machine's own directory: any number of
//! machines may be resumed from one state, and each finds its own disk and makes its own sockets.
//!
//! Drives go through the host's page cache, as on QEMU, and flushes stop at Firecracker
//! (`cache_type` Unsafe): the writable image dies with its sandbox; what must be durable is the
//! build. Firecracker's drives have no serial of our choice and take no discards.

use std::ffi::OsString;

use serde_json::{Value, json};

use crate::error::{Result, VmmError};
use crate::firecracker::network::CARD;
use crate::machine::{BootSource, GUEST_MAC, MachineConfig, join_command_line};
use crate::memory::RamSegment;
use crate::version::Version;

/// Names in a machine's directory.
pub(super) mod names {
    pub(in crate::firecracker) const API_SOCKET: &str = "api.sock";
    pub(in crate::firecracker) const VSOCK: &str = "vsock.sock";
    pub(in crate::firecracker) const BASE_IMAGE: &str = "base.img";
    pub(in crate::firecracker) const WRITABLE_DISK: &str = "layer.img";
    pub(in crate::firecracker) const KERNEL: &str = "kernel";
    pub(in crate::firecracker) const INITRAMFS: &str = "initramfs";
    pub(in crate::firecracker) const STATE: &str = "vmstate";
    pub(in crate::firecracker) const LOG: &str = "log";
    pub(in crate::firecracker) const PAGER_SOCKET: &str = "pager.sock";
}

/// The vsock port that the agent listens on in the guest.
pub const AGENT_VSOCK_PORT: u32 = 1024;
/// The guest's address on its vsock; 0 to 2 are reserved. Each Firecracker has a vsock of its own,
/// so that all guests may have the same.
const GUEST_CID: u32 = 3;
/// RAM below 4 GiB ends here (`MMIO32_MEM_START`, arch/x86_64/layout.rs), …
const BELOW_4G_END: u64 = 3 << 30;
/// … before 1.13 here (`MMIO_MEM_START`, arch/x86_64/mod.rs).
const BELOW_4G_END_BEFORE_1_13: u64 = 3328 << 20;
const ABOVE_4G_START: u64 = 4 << 30;
/// The next hole begins here (`MMIO64_MEM_START`, since 1.12): a guest does not reach it.
const NEXT_HOLE_START: u64 = 256 << 30;
/// The most vCPUs (`MAX_SUPPORTED_VCPUS`).
const VCPUS_MAX: u32 = 32;

/// What parts the kernel's words from those of the first process, more or less.
const FOR_INIT: &str = " --";

/// Standard error, where there is a /proc.
pub(super) const STANDARD_ERROR: &str = "/proc/self/fd/2";

/// Firecracker's arguments. Its log must not go to standard output, which is the guest's.
pub(super) fn arguments(log_path: &str) -> Vec<OsString> {
    let words = [
        "--api-sock",
        names::API_SOCKET,
        "--log-path",
        log_path,
        "--level",
        "Warn",
    ];
    words.into_iter().map(OsString::from).collect()
}

/// The requests that make a machine, in order, but for its balloon.
pub(super) fn requests(
    machine: &MachineConfig,
    boot: &BootSource,
) -> Result<Vec<(&'static str, Value)>> {
    let mut source = json!({
        "kernel_image_path": names::KERNEL,
        "boot_args": kernel_command_line(boot)?,
    });
    if boot.initramfs.is_some() {
        source["initrd_path"] = names::INITRAMFS.into();
    }
    let config = json!({
        "vcpu_count": machine.vcpus,
        "mem_size_mib": machine.memory_bytes >> 20,
    });
    let mut requests = vec![
        ("/machine-config", config),
        ("/boot-source", source),
        ("/drives/base", drive("base", names::BASE_IMAGE, true)),
        ("/drives/layer", drive("layer", names::WRITABLE_DISK, false)),
        (
            "/vsock",
            json!({ "guest_cid": GUEST_CID, "uds_path": names::VSOCK }),
        ),
        ("/entropy", json!({})),
    ];
    if machine.network {
        let card = json!({ "iface_id": CARD, "host_dev_name": CARD, "guest_mac": GUEST_MAC });
        requests.push(("/network-interfaces/card", card));
    }
    Ok(requests)
}

/// No root device: Firecracker would add words to the command line for it.
fn drive(id: &str, path: &str, read_only: bool) -> Value {
    json!({
        "drive_id": id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": read_only,
        "cache_type": "Unsafe",
    })
}

/// What Firecracker, beyond what every VMM asks, cannot do.
pub(super) fn check(machine: &MachineConfig) -> Result<()> {
    let impossible = |what: String| Err(VmmError::InvalidMachine { what });
    if machine.vcpus > VCPUS_MAX {
        return impossible(format!(
            "{} vCPUs: Firecracker has 1 to {VCPUS_MAX}",
            machine.vcpus
        ));
    }
    let ram_max = BELOW_4G_END + (NEXT_HOLE_START - ABOVE_4G_START);
    if machine.memory_bytes > ram_max {
        return impossible(format!(
            "memory of {} bytes: on Firecracker up to {ram_max} are supported",
            machine.memory_bytes
        ));
    }
    Ok(())
}

/// The guest kernel's whole command line, as a manifest records it.
///
/// # Errors
/// It is longer than the kernel reads, or holds a line break.
pub fn kernel_command_line(boot: &BootSource) -> Result<String> {
    let words = [
        "console=ttyS0",
        // A guest that panics reboots at once, by the keyboard controller, which ends Firecracker.
        "panic=-1",
        "reboot=k",
        // There is a keyboard controller, and nothing behind it: probing takes half a second.
        "i8042.noaux",
        "i8042.nomux",
        "i8042.dumbkbd",
        // A resume sets its clocks one after the other. Whoever compares them takes the time between for
        // a counter that drifts, says so at length, and may give up a good clock for another.
        "tsc=nowatchdog",
        // Each character is an exit. What is wrong is told; the rest is in the guest's own log.
        "loglevel=5",
        // Free pages are reported down to single ones (the default is 2 MiB), …
        "page_reporting.page_reporting_order=0",
        // … and the guest does not touch pages just to hand them out: hinting allocates each.
        "init_on_alloc=0",
    ];
    join_command_line(&words, &boot.extra_cmdline)
}

/// The beginning of a command line that stands in the guest's memory in one piece: Firecracker puts words
/// of its own (`virtio_mmio.device=…`) before those that are for the first process.
pub(super) fn unbroken(command_line: &str) -> &str {
    let kernels = command_line.split_once(FOR_INIT);
    kernels.map_or(command_line, |(kernels, _)| kernels.trim_end())
}

/// The RAM of a machine with this much memory, by address.
pub(super) fn ram_layout(version: Version, memory_bytes: u64) -> Vec<RamSegment> {
    let below_4g_end = if version < Version::new(1, 13, 0) {
        BELOW_4G_END_BEFORE_1_13
    } else {
        BELOW_4G_END
    };
    let mut segments = vec![RamSegment {
        guest_addr: 0,
        len_bytes: memory_bytes.min(below_4g_end),
        guest_offset_bytes: 0,
    }];
    if memory_bytes > below_4g_end {
        segments.push(RamSegment {
            guest_addr: ABOVE_4G_START,
            len_bytes: memory_bytes - below_4g_end,
            guest_offset_bytes: below_4g_end,
        });
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Accel;

    fn machine() -> MachineConfig {
        MachineConfig {
            memory_bytes: 4 << 30,
            vcpus: 2,
            base_image: "/images/base".into(),
            writable_disk: "/run/one/layer.img".into(),
            network: false,
            free_page_reporting: false,
            accel: Accel::Kvm,
        }
    }

    fn boot() -> BootSource {
        BootSource {
            kernel: "/vmlinux".into(),
            initramfs: None,
            extra_cmdline: "quiet".into(),
        }
    }

    #[test]
    fn what_is_for_the_first_process_is_not_looked_for_where_firecracker_breaks_the_line() {
        for broken in ["a b -- sh -c", "a b --", "a b   -- c", "a b --c"] {
            assert_eq!(unbroken(broken), "a b");
        }
        assert_eq!(unbroken("a=--b c"), "a=--b c");
    }

    #[test]
    fn a_state_remembers_no_path_outside_the_machines_directory() {
        for (path, body) in requests(&machine(), &boot()).unwrap() {
            assert!(!body.to_string().contains("\"/"), "{path} {body}");
        }
    }

    #[test]
    fn a_network_card_is_there_only_when_asked_for() {
        let has_card = |network| {
            let machine = MachineConfig {
                network,
                ..machine()
            };
            let requests = requests(&machine, &boot()).unwrap();
            requests.iter().any(|(path, _)| path.contains("network"))
        };
        assert!(has_card(true) && !has_card(false));
    }

    #[test]
    fn memory_above_the_hole_goes_on_at_4_gib() {
        let expected = [
            RamSegment {
                guest_addr: 0,
                len_bytes: 3 << 30,
                guest_offset_bytes: 0,
            },
            RamSegment {
                guest_addr: 4 << 30,
                len_bytes: 1 << 30,
                guest_offset_bytes: 3 << 30,
            },
        ];
        let newest = Version::new(1, 16, 1);
        assert_eq!(ram_layout(newest, 4 << 30), expected);
        assert_eq!(ram_layout(newest, 256 << 20).len(), 1);
        let [below, above] = &ram_layout(Version::new(1, 12, 1), 4 << 30)[..] else {
            panic!("two regions");
        };
        assert_eq!(below.len_bytes, 3328 << 20);
        assert_eq!((above.guest_addr, above.len_bytes), (4 << 30, 768 << 20));
    }

    #[test]
    fn what_firecracker_cannot_do_is_refused_before_it_is_started() {
        check(&machine()).unwrap();
        let large = MachineConfig {
            memory_bytes: 256 << 30,
            ..machine()
        };
        assert!(check(&large).is_err());
    }
}
