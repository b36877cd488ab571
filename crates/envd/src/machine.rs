//! What a resume leaves wrong in a guest, and envd sets right: the clock, which stood still, and the
//! kernel's random generator, whose state every guest resumed from the same build shares.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use envd_api::rest::{ENTROPY_BYTES_MAX, InitRequest, InitResponse};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("entropy of {0} bytes: at most {ENTROPY_BYTES_MAX} are taken")]
    Entropy(usize),
    #[error("{0} is not a time that the clock can show")]
    Time(u64),
    #[error("the clock cannot be set")]
    Clock(#[source] io::Error),
    #[error("the kernel's random generator cannot be reseeded")]
    Random(#[source] io::Error),
}

/// The machine that envd runs on.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Whether it is the guest's own: a developer's host keeps its clock.
    ours: bool,
}

impl Machine {
    pub(crate) fn ours() -> Self {
        Self { ours: true }
    }

    pub(crate) fn borrowed() -> Self {
        Self { ours: false }
    }

    /// Sets clock and random numbers, in this order; `thawed` is left to the caller.
    pub(crate) fn init(&self, request: &InitRequest) -> Result<InitResponse, MachineError> {
        if request.entropy.len() > ENTROPY_BYTES_MAX {
            return Err(MachineError::Entropy(request.entropy.len()));
        }
        let time = Duration::from_nanos(request.unix_time_ns);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if self.ours {
            set_clock(time, request.unix_time_ns)?;
            reseed(&request.entropy).map_err(MachineError::Random)?;
        }
        Ok(InitResponse {
            envd_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: line("/proc/sys/kernel/osrelease").unwrap_or_default(),
            boot_id: line("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            vmcoreinfo: line("/sys/kernel/vmcoreinfo"),
            clock_step_ms: step_ms(now, time),
            machine_set: self.ours,
            thawed: false,
        })
    }
}

/// What stands in a file of the kernel's.
pub(crate) fn line(path: &str) -> Option<String> {
    std::fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn step_ms(from: Duration, to: Duration) -> i64 {
    let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    millis(to).saturating_sub(millis(from))
}

fn set_clock(time: Duration, named: u64) -> Result<(), MachineError> {
    let seconds = i64::try_from(time.as_secs()).map_err(|_too_late| MachineError::Time(named))?;
    let spec = TimeSpec::new(seconds, i64::from(time.subsec_nanos()));
    clock_settime(ClockId::CLOCK_REALTIME, spec).map_err(|errno| MachineError::Clock(errno.into()))
}

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` of linux/random.h, with room for all that we take.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    buf_bytes: libc::c_int,
    buf: [u8; ENTROPY_BYTES_MAX],
}

/// Mixes `entropy` into the kernel's pool, credited in full, then makes the generator start afresh
/// from the pool: without the second, it would go on from the shared state for up to a minute.
fn reseed(entropy: &[u8]) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    if !entropy.is_empty() {
        add_entropy(&random, entropy)?;
    }
    // SAFETY: the request takes no argument; the descriptor is open.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    if reseeded < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn add_entropy(random: &File, entropy: &[u8]) -> io::Result<()> {
    let len = libc::c_int::try_from(entropy.len()).map_err(io::Error::other)?;
    let mut info = RandPoolInfo {
        entropy_bits: len * 8,
        buf_bytes: len,
        buf: [0; ENTROPY_BYTES_MAX],
    };
    info.buf[..entropy.len()].copy_from_slice(entropy);
    // SAFETY: the kernel reads the two numbers and then `buf_bytes` of `buf`, which `info` holds.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if added < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
