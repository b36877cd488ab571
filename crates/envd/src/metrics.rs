//! The guest's figures, from /proc, at the price of three small files.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use envd_api::rest::Metrics;

use crate::machine::line;

/// Time that all processors together spent, in the kernel's ticks, since boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CpuTime {
    busy: u64,
    total: u64,
}

/// Remembers the last look at the processors, for the share since then.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    last: Mutex<Option<CpuTime>>,
}

impl Meter {
    pub(crate) fn read(&self) -> std::io::Result<Metrics> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let disk = nix::sys::statvfs::statvfs("/")?;
        let (cpu_count, now) = cpu(&stat);
        let last = self
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(now);
        let mem = |name: &str| mem_bytes(&meminfo, name);
        let block_bytes = disk.fragment_size();
        Ok(Metrics {
            ts: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            cpu_count,
            cpu_used_pct: last.map_or(0.0, |last| share_pct(last, now)),
            mem_total: mem("MemTotal"),
            mem_free: mem("MemFree"),
            mem_available: mem("MemAvailable"),
            mem_cached: mem("Cached"),
            mem_used: mem("MemTotal").saturating_sub(mem("MemAvailable")),
            disk_total: disk.blocks() * block_bytes,
            disk_used: disk.blocks().saturating_sub(disk.blocks_free()) * block_bytes,
            boot_id: line("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        })
    }
}

fn cpu(stat: &str) -> (u32, CpuTime) {
    let mut count = 0;
    let mut time = CpuTime::default();
    for line in stat.lines() {
        let Some((name, ticks)) = line.split_once(' ') else {
            continue;
        };
        if name == "cpu" {
            // user nice system idle iowait irq softirq steal; guest times are within user's.
            let ticks: Vec<u64> = ticks
                .split_ascii_whitespace()
                .take(8)
                .filter_map(|word| word.parse().ok())
                .collect();
            let idle: u64 = ticks.iter().skip(3).take(2).sum();
            time.total = ticks.iter().sum();
            time.busy = time.total.saturating_sub(idle);
        } else if name.starts_with("cpu") {
            count += 1;
        }
    }
    (count, time)
}

#[expect(clippy::cast_precision_loss, reason = "a share, rounded anyway")]
fn share_pct(last: CpuTime, now: CpuTime) -> f32 {
    let total = now.total.saturating_sub(last.total);
    let busy = now.busy.saturating_sub(last.busy);
    if total == 0 {
        0.0
    } else {
        busy as f32 * 100.0 / total as f32
    }
}

fn mem_bytes(meminfo: &str, name: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|value| value.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_and_their_idle_time_is_not_busy() {
        let (count, time) = cpu("cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n");
        assert_eq!(count, 2);
        assert_eq!(
            time,
            CpuTime {
                busy: 20,
                total: 100
            }
        );
        let later = CpuTime {
            busy: 70,
            total: 200,
        };
        assert!((share_pct(time, later) - 50.0).abs() < 0.01);
        assert!(share_pct(later, later).abs() < 0.01);
    }

    #[test]
    fn a_field_is_not_taken_for_one_whose_name_it_begins() {
        let meminfo = "MemTotal:  100 kB\nSwapCached: 7 kB\nCached:   3 kB\nCachedX: 9 kB\n";
        assert_eq!(mem_bytes(meminfo, "Cached"), 3 * 1024);
        assert_eq!(mem_bytes(meminfo, "MemFree"), 0);
    }
}
