//! Stops a VMM that another process owns, for the moment of a look at its guest's memory.
//!
//! By ptrace, because its hold ends with the holder: if we are killed in the middle, the kernel
//! lets the VMM go on. A SIGSTOP would stay. The owner does not notice but for the time; no
//! register and no memory of the VMM is touched.
//!
//! A thread's stop falls between two of its instructions, so the guest is not stopped as cleanly as
//! by [`Vmm::stop_vcpus`](crate::Vmm::stop_vcpus): each word of its memory is whole, and what the
//! guest was about to write is not there. Good enough to be looked at, not to be captured.
//!
//! ptrace ties a tracee to the *thread* that holds it: a [`HeldVmm`] stays on its thread.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::error::{Result, VmmError};
use crate::memory::{MemoryMapping, is_our_memfd};
use crate::reader::GuestReader;

/// How long all threads may take to stop. Each stops at its next return to user mode.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// How long those are waited for that had not stopped when all are let go.
const LET_GO_DEADLINE: Duration = Duration::from_secs(1);
const STOP_LOOK_INTERVAL: Duration = Duration::from_micros(50);
/// Threads may be born while we stop the others: looked for again this many times at most.
const ROUNDS_MAX: usize = 16;
/// The most threads of a VMM that are held: a vCPU has one, and a few do the devices' work.
const THREADS_MAX: usize = 1024;
/// The most descriptors of a VMM that are looked through for its memory.
const DESCRIPTORS_MAX: usize = 4096;

/// A VMM whose threads stand still until this is dropped.
#[derive(Debug)]
pub struct HeldVmm {
    memory: Arc<GuestReader>,
    held: Held,
}

impl HeldVmm {
    /// Stops every thread of the VMM with this process id and opens its guest's memory: at these
    /// places where it is private to the VMM, else the memfd that it has.
    ///
    /// # Errors
    /// It is gone, is no VMM of ours, may not be traced, or does not stop in time; it then runs as
    /// before.
    pub fn hold(pid: u32, private: Option<Vec<MemoryMapping>>) -> Result<Self> {
        let failed = |source| VmmError::Hold { pid, source };
        let memory = match private {
            Some(mappings) => GuestReader::of_process(pid, mappings).map_err(failed)?,
            None => GuestReader::Memfd(open_memory(pid).map_err(failed)?),
        };
        let mut held = Held::nothing();
        held.all_threads(pid).map_err(failed)?;
        Ok(Self {
            memory: Arc::new(memory),
            held,
        })
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestReader> {
        &self.memory
    }

    /// How many threads stand still.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.held.threads.len()
    }
}

/// Threads that are ours until this is dropped.
#[derive(Debug)]
struct Held {
    /// Each with the signal that was about to be delivered to it, if that is why it stopped.
    threads: BTreeMap<i32, Option<Signal>>,
    /// Not to be sent to another thread.
    _bound: PhantomData<*const ()>,
}

impl Held {
    fn nothing() -> Self {
        Self {
            threads: BTreeMap::new(),
            _bound: PhantomData,
        }
    }

    /// Stops threads until there is none that runs.
    fn all_threads(&mut self, pid: u32) -> io::Result<()> {
        let deadline = Instant::now() + STOP_DEADLINE;
        for _ in 0..ROUNDS_MAX {
            let new: Vec<i32> = numbers_in(&format!("/proc/{pid}/task"), THREADS_MAX)?
                .into_iter()
                .filter(|thread| !self.threads.contains_key(thread))
                .collect();
            if new.is_empty() {
                return Ok(());
            }
            for thread in &new {
                match ptrace::seize(Pid::from_raw(*thread), ptrace::Options::empty()) {
                    Ok(()) => {}
                    // It ended meanwhile.
                    Err(nix::Error::ESRCH) => continue,
                    Err(error) => return Err(error.into()),
                }
                self.threads.insert(*thread, None);
                match ptrace::interrupt(Pid::from_raw(*thread)) {
                    Ok(()) | Err(nix::Error::ESRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            for thread in new {
                if !self.threads.contains_key(&thread) {
                    continue;
                }
                match stopped(thread, deadline)? {
                    Some(signal) => drop(self.threads.insert(thread, signal)),
                    None => drop(self.threads.remove(&thread)),
                }
            }
        }
        Err(io::Error::other("it makes threads without end"))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let deadline = Instant::now() + LET_GO_DEADLINE;
        for (thread, signal) in &self.threads {
            let pid = Pid::from_raw(*thread);
            let mut let_go = ptrace::detach(pid, *signal);
            // One that has not stopped yet cannot be let go before it has.
            if let_go == Err(nix::Error::ESRCH)
                && let Ok(Some(signal)) = stopped(*thread, deadline)
            {
                let_go = ptrace::detach(pid, signal);
            }
            if let Err(error) = let_go {
                tracing::debug!(thread, %error, "ended while it was held");
            }
        }
    }
}

/// Waits for a thread's stop, and gives the signal that must be delivered when it is let go, if one
/// stopped it before we did; `None` if the thread ended instead.
fn stopped(thread: i32, deadline: Instant) -> io::Result<Option<Option<Signal>>> {
    loop {
        match waitid(
            Id::Pid(Pid::from_raw(thread)),
            WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG,
        ) {
            Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => {}
            Ok(WaitStatus::Stopped(_, signal)) => return Ok(Some(Some(signal))),
            Ok(_) => return Ok(Some(None)),
            Err(nix::Error::ECHILD) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(STOP_LOOK_INTERVAL);
    }
}

/// Opens the memfd that is a guest's memory, by way of the process that has it.
fn open_memory(pid: u32) -> io::Result<File> {
    let dir = format!("/proc/{pid}/fd");
    for fd in numbers_in(&dir, DESCRIPTORS_MAX)? {
        let path = PathBuf::from(format!("{dir}/{fd}"));
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        if target.to_str().is_some_and(is_our_memfd) {
            return File::open(path);
        }
    }
    Err(io::Error::other("it has no guest memory of torpor's"))
}

/// The entries of a directory in /proc whose names are numbers.
fn numbers_in(dir: &str, max: usize) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
        if numbers.len() > max {
            return Err(io::Error::other(format!(
                "{dir} has more than {max} entries"
            )));
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::Read as _;
    use std::process::{Command, Stdio};

    /// Counts without end: a shell that prints numbers.
    fn counter() -> std::process::Child {
        Command::new("sh")
            .args(["-c", "n=0; while :; do n=$((n+1)); echo $n; done"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[test]
    fn a_held_process_stands_still_and_goes_on_when_it_is_let_go() {
        let mut child = counter();
        let pid = child.id();
        let mut out = child.stdout.take().unwrap();
        let mut some = [0; 64];
        out.read_exact(&mut some).unwrap();
        let state = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(')')
                .next()
                .unwrap()
                .trim()
                .chars()
                .next()
                .unwrap()
        };
        {
            let mut held = Held::nothing();
            held.all_threads(pid).unwrap();
            assert_eq!(held.threads.len(), 1);
            assert_eq!(state(pid), 't', "stopped by a tracer");
        }
        // More than a pipe holds: it must be running to deliver that.
        let mut much = vec![0; 1 << 20];
        out.read_exact(&mut much).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_holder_that_dies_lets_go() {
        let mut child = counter();
        let pid = child.id();
        let mut out = child.stdout.take().unwrap();
        // ptrace binds to the thread: one that ends without letting go is a holder that dies.
        std::thread::spawn(move || {
            let mut held = Held::nothing();
            held.all_threads(pid).unwrap();
            std::mem::forget(held);
        })
        .join()
        .unwrap();
        let mut much = vec![0; 1 << 20];
        out.read_exact(&mut much).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_is_no_vmm_of_ours_is_left_alone() {
        let mut child = counter();
        let error = HeldVmm::hold(child.id(), None).unwrap_err().to_string();
        assert!(error.contains("no guest memory of torpor's"), "{error}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
