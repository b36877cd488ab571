//! One system call in another process, by ptrace, and the descriptor that it made.
//!
//! A userfaultfd covers the memory of the process that creates it. QEMU cannot be asked to make
//! one, so we make its main thread do it: stop it, let it execute one `syscall` instruction of
//! its own vdso with our registers, and put everything back. About a millisecond.
//!
//! ```text
//! SEIZE ─▶ INTERRUPT ─▶ stopped ─▶ block signals ─▶ set registers ─▶ SINGLESTEP ─▶ read rax
//!                          ▲                                                          │
//!                          └── DETACH ◀─ restore registers ◀─ restore signals ◀────────┘
//! ```
//!
//! Invariants:
//! * Whatever happens after the stop, registers and signal mask are restored and the process is
//!   detached ([`Stopped`]'s drop): it goes on as if nothing had been.
//! * `orig_rax` is -1 while our registers are in place, so that the kernel does not take our call
//!   for the interrupted one and restart it; with the real registers back, it restarts that one.
//! * We never wait for the process's *end*: its exit status belongs to whoever spawned it.
//! * Every wait has a deadline.
//!
//! ptrace ties a tracee to a *thread*: all of this runs on the calling thread, without an await.
//! Permission: the target is our child, which is what Yama's `ptrace_scope` 1 demands.

use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use libc::user_regs_struct;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::InjectError;

/// How long the process may take to stop. It stops at its next return to user mode, which is at
/// once unless the host is overloaded or it sleeps in the kernel on a page that nobody serves.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// How long we sleep between looks at a process that is about to stop; it is woken by its exit.
const STOP_LOOK_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000,
};
/// How often a single step may be ended by something else (a SIGSTOP, which cannot be blocked)
/// before we give up.
const STEPS_MAX: usize = 16;
/// The vdso is two pages today; more than this is not one.
const VDSO_BYTES_MAX: u64 = 64 << 10;
/// The `syscall` instruction.
const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// `USERFAULTFD_IOC_NEW`, `_IO(0xAA, 0x00)` (include/uapi/linux/userfaultfd.h).
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;
/// What the descriptor is made with: it is never inherited, and never blocks a reader.
const USERFAULTFD_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// Makes a userfaultfd in the process and takes it over. `device` is the number of an open
/// `/dev/userfaultfd` in that process: the way for those who may not call `userfaultfd(2)`.
///
/// # Errors
/// The process cannot be traced, or the kernel gives it no userfaultfd.
pub(crate) fn userfaultfd_of(
    pid: u32,
    pidfd: BorrowedFd<'_>,
    device: Option<i32>,
) -> Result<OwnedFd, InjectError> {
    let call = Call::new(
        "userfaultfd",
        libc::SYS_userfaultfd,
        [unsigned(USERFAULTFD_FLAGS), 0, 0],
    );
    let fd = match (inject(pid, pidfd, &call), device) {
        (Err(InjectError::Call { source, .. }), Some(device)) if forbidden(&source) => {
            let args = [
                unsigned(device),
                USERFAULTFD_IOC_NEW,
                unsigned(USERFAULTFD_FLAGS),
            ];
            inject(
                pid,
                pidfd,
                &Call::new("ioctl of /dev/userfaultfd", libc::SYS_ioctl, args),
            )?
        }
        (result, _) => result?,
    };
    let fd = i32::try_from(fd).unwrap_or(-1);
    let taken = rustix::process::pidfd_getfd(pidfd, fd, rustix::process::PidfdGetfdFlags::empty());
    taken.map_err(|e| InjectError::Take {
        fd,
        pid,
        source: e.into(),
    })
}

/// Has the kernel kill the process when the thread that started it ends.
///
/// # Errors
/// The process cannot be traced.
pub(crate) fn set_parent_death_signal(pid: u32, pidfd: BorrowedFd<'_>) -> Result<(), InjectError> {
    let args = [unsigned(libc::PR_SET_PDEATHSIG), unsigned(libc::SIGKILL), 0];
    inject(pid, pidfd, &Call::new("prctl", libc::SYS_prctl, args)).map(drop)
}

fn forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
}

/// A small non-negative number as a register.
fn unsigned(value: i32) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A system call with up to three arguments.
#[derive(Debug)]
struct Call {
    name: &'static str,
    number: u64,
    args: [u64; 3],
}

impl Call {
    fn new(name: &'static str, number: libc::c_long, args: [u64; 3]) -> Self {
        Self {
            name,
            number: u64::try_from(number).unwrap_or(0),
            args,
        }
    }
}

/// Makes the main thread of a process make one system call, and returns its result.
fn inject(pid: u32, pidfd: BorrowedFd<'_>, call: &Call) -> Result<u64, InjectError> {
    let instruction = find_syscall_instruction(pid)?;
    let stopped = Stopped::stop(pid, pidfd)?;
    let mut regs = stopped.regs;
    regs.rip = instruction;
    regs.rax = call.number;
    regs.orig_rax = u64::MAX;
    [regs.rdi, regs.rsi, regs.rdx] = call.args;
    stopped.set_regs(regs)?;
    let result = stopped.step_over(instruction)?;
    drop(stopped);

    // The kernel answers -errno, and no errno is larger than 4095 (errno(3)).
    let errno = result.wrapping_neg();
    if (1..=4095).contains(&errno) {
        let source = io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(0));
        let hint = if forbidden(&source) {
            "; run as root, or let the user open /dev/userfaultfd, or set \
             vm.unprivileged_userfaultfd=1"
        } else {
            ""
        };
        return Err(InjectError::Call {
            call: call.name,
            pid,
            source,
            hint,
        });
    }
    Ok(result)
}

/// A process whose main thread is ours until this is dropped.
#[derive(Debug)]
struct Stopped<'a> {
    pid: u32,
    pidfd: BorrowedFd<'a>,
    /// Its registers at the stop.
    regs: user_regs_struct,
    /// Its blocked signals at the stop.
    mask: u64,
}

impl<'a> Stopped<'a> {
    fn stop(pid: u32, pidfd: BorrowedFd<'a>) -> Result<Self, InjectError> {
        let target = nix_pid(pid);
        let failed = |request| move |e: nix::Error| ptrace_failed(request, pid, e);
        ptrace::seize(target, ptrace::Options::empty()).map_err(failed("SEIZE"))?;
        // From here on every way out must detach.
        let prepared = (|| {
            ptrace::interrupt(target).map_err(failed("INTERRUPT"))?;
            wait_for_stop(pid, pidfd)?;
            let regs = ptrace::getregs(target).map_err(failed("GETREGS"))?;
            let mask = raw::signal_mask(pid).map_err(|e| ptrace_io("GETSIGMASK", pid, e))?;
            Ok((regs, mask))
        })();
        match prepared {
            Ok((regs, mask)) => {
                let stopped = Self {
                    pid,
                    pidfd,
                    regs,
                    mask,
                };
                // A signal that is delivered now would run a handler in the middle of our call.
                // SIGTRAP must get through: it is how a single step ends.
                let all_but_trap = !(1 << (Signal::SIGTRAP as u64 - 1));
                raw::set_signal_mask(pid, all_but_trap)
                    .map_err(|e| ptrace_io("SETSIGMASK", pid, e))?;
                Ok(stopped)
            }
            Err(error) => {
                // A process that is gone, or does not stop, cannot be detached: the kernel
                // does that when this thread or that process ends.
                if let Err(e) = ptrace::detach(target, None) {
                    tracing::debug!(pid, "cannot detach: {e}");
                }
                Err(error)
            }
        }
    }

    fn set_regs(&self, regs: user_regs_struct) -> Result<(), InjectError> {
        ptrace::setregs(nix_pid(self.pid), regs).map_err(|e| ptrace_failed("SETREGS", self.pid, e))
    }

    /// Executes the one instruction at `instruction`, and returns rax.
    fn step_over(&self, instruction: u64) -> Result<u64, InjectError> {
        let target = nix_pid(self.pid);
        for _ in 0..STEPS_MAX {
            ptrace::step(target, None).map_err(|e| ptrace_failed("SINGLESTEP", self.pid, e))?;
            wait_for_stop(self.pid, self.pidfd)?;
            let regs =
                ptrace::getregs(target).map_err(|e| ptrace_failed("GETREGS", self.pid, e))?;
            if regs.rip == instruction + SYSCALL_INSTRUCTION.len() as u64 {
                return Ok(regs.rax);
            }
        }
        Err(InjectError::Deadline {
            pid: self.pid,
            deadline_ms: STOP_DEADLINE.as_millis(),
        })
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        // Each can fail only if the process is gone, and then there is nothing to restore.
        let restored = self.set_regs(self.regs);
        let unmasked = raw::set_signal_mask(self.pid, self.mask);
        let detached = ptrace::detach(nix_pid(self.pid), None);
        if restored.is_err() || unmasked.is_err() || detached.is_err() {
            tracing::warn!(
                pid = self.pid,
                "the VMM ended while a system call was injected"
            );
        }
    }
}

fn nix_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

fn ptrace_failed(request: &'static str, pid: u32, error: nix::Error) -> InjectError {
    match error {
        nix::Error::ESRCH => InjectError::Gone { pid },
        other => ptrace_io(request, pid, other.into()),
    }
}

fn ptrace_io(request: &'static str, pid: u32, source: io::Error) -> InjectError {
    InjectError::Ptrace {
        request,
        pid,
        source,
    }
}

/// Waits for the next ptrace stop. Only stops are waited for, never the exit: the exit status is
/// for the thread that spawned the process.
fn wait_for_stop(pid: u32, pidfd: BorrowedFd<'_>) -> Result<(), InjectError> {
    let deadline = Instant::now() + STOP_DEADLINE;
    loop {
        match waitid(
            Id::Pid(nix_pid(pid)),
            WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(nix::Error::ECHILD) => return Err(InjectError::Gone { pid }),
            Err(e) => return Err(ptrace_failed("WAIT", pid, e)),
        }
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if matches!(poll(&mut fds, Some(&STOP_LOOK_INTERVAL)), Ok(1..)) {
            return Err(InjectError::Gone { pid });
        }
        if Instant::now() >= deadline {
            return Err(InjectError::Deadline {
                pid,
                deadline_ms: STOP_DEADLINE.as_millis(),
            });
        }
    }
}

/// The address of a `syscall` instruction in the process's vdso: the kernel maps it executable
/// into every process, and its fallbacks make real calls.
fn find_syscall_instruction(pid: u32) -> Result<u64, InjectError> {
    let look = |path: &str| {
        let path = path.to_owned();
        move |source| InjectError::Look { path, source }
    };
    let none = InjectError::NoSyscallInstruction { pid };
    let maps_path = format!("/proc/{pid}/maps");
    let maps = fs::read_to_string(&maps_path).map_err(look(&maps_path))?;
    let Some((start, len)) = maps.lines().find_map(vdso_range) else {
        return Err(none);
    };

    let mem_path = format!("/proc/{pid}/mem");
    let mut code = vec![0; len];
    let mem = File::open(&mem_path).map_err(look(&mem_path))?;
    mem.read_exact_at(&mut code, start)
        .map_err(look(&mem_path))?;
    let at = code
        .windows(2)
        .position(|bytes| bytes == SYSCALL_INSTRUCTION)
        .ok_or(none)?;
    Ok(start + at as u64)
}

fn vdso_range(line: &str) -> Option<(u64, usize)> {
    let (start, end) = line
        .strip_suffix("[vdso]")?
        .split_whitespace()
        .next()?
        .split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let len = u64::from_str_radix(end, 16).ok()?.checked_sub(start)?;
    (len <= VDSO_BYTES_MAX).then_some(())?;
    Some((start, usize::try_from(len).ok()?))
}

/// The two ptrace requests that `nix` does not have.
mod raw {
    use std::io;

    /// The kernel's `sigset_t` is 64 bits on x86-64; glibc's is not.
    const KERNEL_SIGSET_BYTES: usize = size_of::<u64>();

    pub(super) fn signal_mask(pid: u32) -> io::Result<u64> {
        let mut mask = 0_u64;
        // SAFETY: with PTRACE_GETSIGMASK the kernel writes `addr` = 8 bytes to `data`, which is
        // a valid, aligned u64 that outlives the call; any other process state is untouched.
        let answer = unsafe {
            libc::ptrace(
                libc::PTRACE_GETSIGMASK,
                pid,
                KERNEL_SIGSET_BYTES,
                &raw mut mask,
            )
        };
        if answer == -1 {
            Err(io::Error::last_os_error())
        } else {
            Ok(mask)
        }
    }

    pub(super) fn set_signal_mask(pid: u32, mask: u64) -> io::Result<()> {
        // SAFETY: with PTRACE_SETSIGMASK the kernel reads `addr` = 8 bytes from `data`, which is
        // a valid, aligned u64 that outlives the call.
        let answer = unsafe {
            libc::ptrace(
                libc::PTRACE_SETSIGMASK,
                pid,
                KERNEL_SIGSET_BYTES,
                &raw const mask,
            )
        };
        if answer == -1 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

/// Opens a process for [`userfaultfd_of`].
pub(crate) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::fd::{AsFd, AsRawFd};
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Mutex, PoisonError};

    use nix::sys::wait::waitpid;
    use nix::unistd::{ForkResult, fork};

    const INJECTIONS: usize = 200;

    static ALARMS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn count_alarm(_: libc::c_int) {
        ALARMS.fetch_add(1, Ordering::Relaxed);
    }

    /// What a process does that must not notice: sleeps, polls, computes, takes signals. Only
    /// what is allowed after a fork. Ends when `stop` is closed: 0 if all was as it should be.
    fn be_busy(stop: BorrowedFd<'_>) -> i32 {
        // SAFETY: the handler touches one atomic, which a signal handler may.
        unsafe {
            libc::signal(
                libc::SIGALRM,
                count_alarm as *const () as libc::sighandler_t,
            )
        };
        let every = libc::timeval {
            tv_sec: 0,
            tv_usec: 700,
        };
        let timer = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        // SAFETY: the timer is a valid struct that outlives the call; the old one is not asked for.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
        let parent = std::os::unix::process::parent_id();
        loop {
            // Integer and floating point registers in use throughout.
            let mut number = 1_u64;
            let mut sum = 0.0_f64;
            for step in 1..=20_000_u32 {
                number = number
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                sum += f64::from(step) * 0.5;
            }
            if number != LCG_AFTER_20000 || sum.to_bits() != 100_005_000.0_f64.to_bits() {
                return 2;
            }
            if std::os::unix::process::parent_id() != parent {
                return 3;
            }
            let nap = libc::timespec {
                tv_sec: 0,
                tv_nsec: 200_000,
            };
            // SAFETY: `nap` is valid; the remaining time is not asked for.
            let slept = unsafe { libc::nanosleep(&raw const nap, std::ptr::null_mut()) };
            if slept != 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                return 4;
            }
            let wait = Timespec {
                tv_sec: 0,
                tv_nsec: 300_000,
            };
            let mut fds = [PollFd::new(&stop, PollFlags::IN)];
            match poll(&mut fds, Some(&wait)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) if ALARMS.load(Ordering::Relaxed) > 0 => return 0,
                // Asked to end before the first alarm: it will come.
                Ok(_) => {}
                Err(_) => return 5,
            }
        }
    }

    /// What the loop above must come to, computed another way: x → a·x + 1, composed by squaring.
    const LCG_AFTER_20000: u64 = {
        let (mut a, mut c) = (6_364_136_223_846_793_005_u64, 1_u64);
        let (mut total_a, mut total_c, mut steps) = (1_u64, 0_u64, 20_000_u32);
        while steps > 0 {
            if steps % 2 == 1 {
                total_c = a.wrapping_mul(total_c).wrapping_add(c);
                total_a = a.wrapping_mul(total_a);
            }
            c = a.wrapping_mul(c).wrapping_add(c);
            a = a.wrapping_mul(a);
            steps /= 2;
        }
        total_a.wrapping_add(total_c)
    };

    /// Forks a busy child, works on it, and sees that it has noticed nothing.
    fn with_busy_child(work: impl FnOnce(u32, BorrowedFd<'_>)) {
        // One at a time: a child inherits the other tests' pipes, and would hold them open.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (stop, hold) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        // SAFETY: the child only makes system calls and computes, and leaves by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                drop(hold);
                let code = be_busy(stop.as_fd());
                // SAFETY: ends the child without running anything of the test harness.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                let pid = u32::try_from(child.as_raw()).unwrap();
                let pidfd = open_pidfd(pid).unwrap();
                work(pid, pidfd.as_fd());
                drop(hold);
                assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0)));
            }
        }
    }

    fn assert_userfaultfd(fd: &OwnedFd) {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    }

    #[test]
    fn a_busy_process_notices_none_of_200_injections() {
        with_busy_child(|pid, pidfd| {
            let started = Instant::now();
            for _ in 0..INJECTIONS {
                assert_userfaultfd(&userfaultfd_of(pid, pidfd, None).unwrap());
            }
            println!("{INJECTIONS} injections in {:?}", started.elapsed());
        });
    }

    #[test]
    fn a_userfaultfd_comes_from_the_device_as_well() {
        // Inherited by the fork under the same number.
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .unwrap();
        with_busy_child(|pid, pidfd| {
            let args = [
                unsigned(device.as_raw_fd()),
                USERFAULTFD_IOC_NEW,
                unsigned(USERFAULTFD_FLAGS),
            ];
            let call = Call::new("ioctl of /dev/userfaultfd", libc::SYS_ioctl, args);
            let fd = i32::try_from(inject(pid, pidfd, &call).unwrap()).unwrap();
            let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
            assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
        });
    }

    #[test]
    fn a_call_that_fails_is_its_errno_and_the_process_goes_on() {
        with_busy_child(|pid, pidfd| {
            let call = Call::new("ioctl", libc::SYS_ioctl, [u64::MAX, 0, 0]);
            let error = inject(pid, pidfd, &call).unwrap_err();
            let InjectError::Call { source, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(source.raw_os_error(), Some(libc::EBADF));
        });
    }

    #[test]
    fn a_process_that_has_ended_is_gone_and_its_status_is_still_its_parents() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pidfd = open_pidfd(child.id()).unwrap();
        drop(child.stdin.take());
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
        let error = userfaultfd_of(child.id(), pidfd.as_fd(), None).unwrap_err();
        println!("{error}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
}
