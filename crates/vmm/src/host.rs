//! What the host offers: KVM, room for a guest, and the rate of its time stamp counter.

use std::arch::x86_64::_rdtsc;
use std::fs::{self, OpenOptions};
use std::io;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::error::{Result, VmmError};

/// How long the time stamp counter is watched to find its rate. Reading both clocks takes well
/// under a microsecond, so that 20 ms give the rate to about 50 parts in a million, the accuracy
/// of a cheap quartz.
const TSC_WATCH: Duration = Duration::from_millis(20);
/// Each end of the watch is the tightest of this many readings, so that being scheduled away
/// between the two clocks does not count.
const TSC_READINGS: usize = 16;

/// What is to be had of KVM on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmSupport {
    /// The hardware has it and `/dev/kvm` can be opened.
    Usable,
    /// There is a `/dev/kvm`, but no vmx or svm in `/proc/cpuinfo`: it may not run stock kernels.
    WithoutHardware,
    /// There is one, and we may not open it.
    NotPermitted,
    /// There is none.
    Absent,
}

impl KvmSupport {
    /// Looks at this host.
    #[must_use]
    pub fn of_host() -> Self {
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) if hardware_virtualises() => Self::Usable,
            Ok(_) => Self::WithoutHardware,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Self::NotPermitted,
            Err(_) => Self::Absent,
        }
    }
}

fn hardware_virtualises() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| {
                line.split_whitespace()
                    .any(|flag| flag == "vmx" || flag == "svm")
            })
    })
}

/// Refuses a guest that could not fill its memory now. A guest takes its memory page by page: a
/// host without room would find out in the middle of the guest's life, by killing something.
pub(crate) fn check_room(needed_bytes: u64) -> Result<()> {
    let available = memory_available().map_err(|source| VmmError::Host {
        what: "read /proc/meminfo",
        source,
    })?;
    match available {
        Some(available_bytes) if available_bytes < needed_bytes => Err(VmmError::NoRoom {
            needed_bytes,
            available_bytes,
        }),
        _ => Ok(()),
    }
}

/// Bytes that the host's kernel can still hand out, free swap included; `None` if it does not say.
///
/// # Errors
/// /proc/meminfo cannot be read.
pub fn memory_available() -> std::io::Result<Option<u64>> {
    Ok(available_bytes(&fs::read_to_string("/proc/meminfo")?))
}

/// `MemAvailable` and free swap of a `/proc/meminfo`: what the kernel can still hand out.
fn available_bytes(meminfo: &str) -> Option<u64> {
    let field = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find(|line| line.starts_with(name))?;
        let kib: u64 = line[name.len()..]
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()?;
        kib.checked_mul(1024)
    };
    Some(field("MemAvailable:")? + field("SwapFree:").unwrap_or(0))
}

/// The rate of this host's time stamp counter in kHz, measured once per process against the
/// monotonic clock. QEMU's TCG shows the guest the host's counter, and a microvm has no clock by
/// which the guest could find its rate.
#[must_use]
pub fn host_tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (ticks_before, before) = read_both_clocks();
        std::thread::sleep(TSC_WATCH);
        let (ticks_after, after) = read_both_clocks();
        let ns = after.duration_since(before).as_nanos().max(1);
        let ticks = u128::from(ticks_after.wrapping_sub(ticks_before));
        u64::try_from(ticks * 1_000_000 / ns).unwrap_or(u64::MAX)
    })
}

fn read_both_clocks() -> (u64, Instant) {
    let mut best: Option<(u64, u64, Instant)> = None;
    for _ in 0..TSC_READINGS {
        let before = tsc();
        let now = Instant::now();
        let width = tsc().wrapping_sub(before);
        if best.is_none_or(|(tightest, ..)| width < tightest) {
            best = Some((width, before.wrapping_add(width / 2), now));
        }
    }
    best.map_or_else(|| (tsc(), Instant::now()), |(_, ticks, now)| (ticks, now))
}

fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and touches no memory; every x86-64 processor has it.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_counts_free_swap() {
        let text = "MemTotal:  100 kB\nMemAvailable:      64 kB\nSwapFree:  4 kB\n";
        assert_eq!(available_bytes(text), Some(68 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn a_guest_larger_than_the_host_is_refused_with_both_figures() {
        let error = check_room(1 << 50).unwrap_err().to_string();
        assert!(error.contains("1125899906842624"), "{error}");
        check_room(1).unwrap();
    }

    #[test]
    fn the_time_stamp_counter_has_a_plausible_rate() {
        let khz = host_tsc_khz();
        assert!((500_000..10_000_000).contains(&khz), "{khz} kHz");
        assert_eq!(khz, host_tsc_khz());
    }
}
