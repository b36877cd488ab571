//! userfaultfd: the descriptor, its set-up, and the few ioctls that the pager needs.
//!
//! Own definitions, because the crate `userfaultfd` knows neither COPY's MODE_WP nor WP_ASYNC and
//! hides a negative count in an unsigned one. They are in `uffd_abi`, with all unsafe code; here is
//! what each operation is for, and what its failure means.
//!
//! Set-up, in this order: [`Uffd::from_fd`] (or [`Uffd::create`] for one's own process),
//! [`Uffd::negotiate`], [`Uffd::register`] for each region, then `Pager::start`. Whoever gets a
//! descriptor that the VMM has negotiated and registered already (Firecracker) skips both.
//!
//! Write-protecting a fresh region first ([`Uffd::write_protect`]) is not needed: every page that
//! the pager installs is installed write-protected, and a page that nobody installed holds no
//! write. It costs a page table entry for each page of the guest.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::PagerError;
use crate::page_set::PAGE_SIZE_U64;
use crate::region::Region;
use crate::source::Content;
use crate::tracking::{WriteTracking, host_features};
use crate::uffd_abi::{
    self, CONTINUE_MODE_WP, COPY_MODE_WP, FEATURE_MINOR_SHMEM, FEATURE_MISSING_SHMEM,
    FEATURE_WP_HUGETLBFS_SHMEM, REGISTER_MODE_MINOR, REGISTER_MODE_MISSING, REGISTER_MODE_WP,
    RawEvent, UffdMsg, UffdioContinue, UffdioCopy, UffdioRange, UffdioRegister, UffdioWriteprotect,
    UffdioZeropage, WRITEPROTECT_MODE_WP, ioctl,
};

/// Events per read. A read costs a syscall whatever it brings; 64 of 32 bytes fill half a page.
const EVENTS_PER_READ: usize = 64;

/// A userfaultfd, of this process or (most often) of a VMM.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// The kernel can be told not to wait for events, whatever the descriptor's flags.
    reads_at_once: AtomicBool,
}

impl Uffd {
    /// Creates a userfaultfd for this process's own memory.
    ///
    /// # Errors
    /// The kernel has none, or forbids it (`vm.unprivileged_userfaultfd`).
    pub fn create() -> Result<Self, PagerError> {
        Ok(Self::of(uffd_abi::create(0)?))
    }

    /// Takes over a userfaultfd that was created in another process.
    ///
    /// # Errors
    /// The descriptor cannot be made non-blocking.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, PagerError> {
        let setup = |source: rustix::io::Errno| PagerError::Setup {
            step: "make the descriptor non-blocking",
            next_step: "the descriptor that was handed over is no userfaultfd",
            source: source.into(),
        };
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(setup)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(setup)?;
        Ok(Self::of(fd))
    }

    fn of(fd: OwnedFd) -> Self {
        Self {
            fd,
            reads_at_once: AtomicBool::new(true),
        }
    }

    /// Agrees with the kernel on the features that `tracking` needs. Once for each descriptor.
    ///
    /// # Errors
    /// [`PagerError::Unsupported`] names the feature that this kernel lacks.
    pub fn negotiate(&self, tracking: WriteTracking) -> Result<(), PagerError> {
        let offered = host_features()?;
        for (feature, missing) in tracking.required() {
            if offered & feature == 0 {
                return Err(PagerError::Unsupported {
                    tracking,
                    missing,
                    next_step: "use synchronous write tracking, or a newer kernel (Async: 6.7)",
                });
            }
        }
        let needed = tracking
            .required()
            .iter()
            .fold(0, |all, (feature, _)| all | feature);
        // Named where the kernel has them, so that shared memory can be registered: older kernels
        // refuse to hear of them, newer ones need not be told.
        let welcome = match tracking {
            WriteTracking::Off => FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM,
            _ => FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM | FEATURE_WP_HUGETLBFS_SHMEM,
        };
        uffd_abi::api(&self.fd, needed | (offered & welcome))
            .map(|_| ())
            .map_err(|source| PagerError::Setup {
                step: "agree on the features (UFFDIO_API)",
                next_step: "a descriptor can be negotiated only once; hand over a fresh one",
                source,
            })
    }

    /// Registers a region for missing pages, and for write-protection where writes are tracked;
    /// shared memory also for pages that are in the file and not mapped (see `service`), where
    /// the kernel can (5.14).
    ///
    /// # Errors
    /// The region is malformed, or the kernel refuses it.
    pub fn register(&self, region: &Region, tracking: WriteTracking) -> Result<(), PagerError> {
        region.check()?;
        let wp = if tracking.protects() {
            REGISTER_MODE_WP
        } else {
            0
        };
        let mode = REGISTER_MODE_MISSING | wp;
        let register = |mode| {
            let mut arg = UffdioRegister {
                range: range_of(region),
                mode,
                ioctls: 0,
            };
            ioctl(&self.fd, &mut arg)
        };
        let small = u64::from(region.page_size) == PAGE_SIZE_U64;
        let minor = if small { REGISTER_MODE_MINOR } else { 0 };
        let registered = match register(mode | minor) {
            // Not shared memory, or an older kernel.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => register(mode),
            registered => registered,
        };
        registered.map_err(|source| PagerError::Setup {
            step: "register the guest's memory (UFFDIO_REGISTER)",
            next_step: "shared memory with write tracking needs kernel 5.19 or newer",
            source,
        })
    }

    /// Write-protects everything in a region, present or not.
    ///
    /// # Errors
    /// The region is not registered for write-protection.
    pub fn write_protect(&self, region: &Region) -> Result<(), PagerError> {
        self.set_protection(range_of(region), true)
            .map_err(|source| PagerError::Setup {
                step: "write-protect the guest's memory (UFFDIO_WRITEPROTECT)",
                next_step: "register the region with write tracking first",
                source,
            })
    }

    fn set_protection(&self, range: UffdioRange, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut arg = UffdioWriteprotect { range, mode };
        ioctl(&self.fd, &mut arg)
    }

    /// Lifts the protection of a range and wakes whoever waits there.
    pub(crate) fn unprotect(&self, host_addr: u64, len_bytes: u64) -> Result<Filled, io::Error> {
        let range = UffdioRange::new(host_addr, len_bytes);
        match self.set_protection(range, false) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, 0),
        }
    }

    /// Wakes every thread that waits in the range.
    pub(crate) fn wake(&self, host_addr: u64, len_bytes: u64) -> io::Result<()> {
        let mut arg = UffdioRange::new(host_addr, len_bytes);
        ioctl(&self.fd, &mut arg)
    }

    /// Copies whole pages to an absent range and wakes whoever waits there.
    pub(crate) fn copy(
        &self,
        host_addr: u64,
        content: Content<'_>,
        protect: bool,
    ) -> Result<Filled, io::Error> {
        let (src, len) = content.range();
        debug_assert!(len.is_multiple_of(PAGE_SIZE_U64) && len > 0);
        let mode = if protect { COPY_MODE_WP } else { 0 };
        // `copy` stays 0 on paths of older kernels that do not write it back.
        let mut arg = UffdioCopy {
            dst: host_addr,
            src,
            len,
            mode,
            copy: 0,
        };
        match ioctl(&self.fd, &mut arg) {
            Ok(()) => Ok(Filled::Bytes(len)),
            Err(error) => Filled::from_failure(error, arg.copy),
        }
    }

    /// Maps what the memory's file holds, and wakes whoever waits there. Shared memory, or a
    /// private mapping of it, registered for this.
    pub(crate) fn map(
        &self,
        host_addr: u64,
        len_bytes: u64,
        protect: bool,
    ) -> Result<Filled, io::Error> {
        let range = UffdioRange::new(host_addr, len_bytes);
        let mode = if protect { CONTINUE_MODE_WP } else { 0 };
        let mut arg = UffdioContinue {
            range,
            mode,
            mapped: 0,
        };
        match ioctl(&self.fd, &mut arg) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, arg.mapped),
        }
    }

    /// Maps the kernel's zero page over an absent anonymous range and wakes whoever waits there.
    /// Never used where writes are tracked: the mapping is not write-protected, and protecting it
    /// afterwards can lose a write that came between.
    pub(crate) fn zero(&self, host_addr: u64, len_bytes: u64) -> Result<Filled, io::Error> {
        let range = UffdioRange::new(host_addr, len_bytes);
        let mut arg = UffdioZeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        match ioctl(&self.fd, &mut arg) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, arg.zeropage),
        }
    }

    /// Reads the events that are queued, at most [`EVENTS_PER_READ`]. Returns whether there may be
    /// more: a read that was not filled has found the queues empty.
    pub(crate) fn read_events(&self, sink: &mut dyn FnMut(RawEvent)) -> io::Result<bool> {
        let mut messages = [UffdMsg::default(); EVENTS_PER_READ];
        let count = match self.read_at_once(&mut messages) {
            Ok(count) => count,
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => return Ok(true),
            Err(error) => return Err(error),
        };
        messages[..count]
            .iter()
            .for_each(|message| sink(message.event()));
        Ok(count == EVENTS_PER_READ)
    }

    /// A VMM that clears the descriptor's O_NONBLOCK must not make us wait: its events are read with
    /// the page states locked.
    fn read_at_once(&self, messages: &mut [UffdMsg]) -> io::Result<usize> {
        if self.reads_at_once.load(Ordering::Relaxed) {
            match uffd_abi::read(&self.fd, messages) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    self.reads_at_once.store(false, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        // Without O_NONBLOCK the kernel answers with an error here, and nobody waits.
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec::default()))?;
        match fds[0].revents() {
            PollFlags::IN => uffd_abi::read_as_flags_say(&self.fd, messages),
            none if none.is_empty() => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            _ => Err(io::Error::other("the descriptor is no longer usable")),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How an operation on a range ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// So many bytes from the start are done. Less than asked for: ask again for the rest, whose
    /// first page has the reason.
    Bytes(u64),
    /// The first page is there already. Nobody was woken.
    Exists,
    /// The address space is changing: read events, then try again. Nothing was done.
    Again,
    /// The process has gone.
    Gone,
    /// There is nothing to install: a mapped source cannot be read, or the memory's file has no
    /// such page.
    Missing,
}

impl Filled {
    /// Sorts a failure out. `done` is the kernel's count, negative where it repeats the error.
    fn from_failure(error: io::Error, done: i64) -> io::Result<Self> {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(match u64::try_from(done) {
                Ok(bytes) if bytes >= PAGE_SIZE_U64 => Self::Bytes(bytes),
                _ => Self::Again,
            }),
            Some(libc::EEXIST) => Ok(Self::Exists),
            Some(libc::ESRCH) => Ok(Self::Gone),
            Some(libc::EFAULT) => Ok(Self::Missing),
            _ => Err(error),
        }
    }
}

fn range_of(region: &Region) -> UffdioRange {
    UffdioRange::new(region.host_addr, region.len_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::PAGE_SIZE;

    #[test]
    fn a_short_count_is_progress_and_a_negative_one_is_not() {
        let failed = |errno| io::Error::from_raw_os_error(errno);
        let sorted = |errno, done| Filled::from_failure(failed(errno), done).ok();
        assert_eq!(sorted(libc::EAGAIN, 8192), Some(Filled::Bytes(8192)));
        assert_eq!(sorted(libc::EAGAIN, 0), Some(Filled::Again));
        assert_eq!(
            sorted(libc::EAGAIN, -i64::from(libc::EAGAIN)),
            Some(Filled::Again)
        );
        assert_eq!(
            sorted(libc::EEXIST, -i64::from(libc::EEXIST)),
            Some(Filled::Exists)
        );
        assert_eq!(sorted(libc::ESRCH, 0), Some(Filled::Gone));
        assert_eq!(sorted(libc::ENOENT, 0), None);
    }

    /// A VMM that forks hands a descriptor over with each event: none of them is kept.
    #[test]
    fn an_event_that_was_not_asked_for_is_told_and_leaves_no_descriptor() {
        const FEATURE_EVENT_FORK: u64 = 1 << 1;
        const FORKS: usize = 64;
        let uffd = Uffd::create().unwrap();
        // Who may not have it cannot hand it over either.
        if let Err(error) = uffd_abi::api(&uffd.fd, FEATURE_EVENT_FORK) {
            assert_eq!(error.raw_os_error(), Some(libc::EPERM));
            return;
        }
        let memory = memmap2::MmapMut::map_anon(PAGE_SIZE).unwrap();
        let region = Region {
            host_addr: memory.as_ptr().expose_provenance() as u64,
            len_bytes: memory.len() as u64,
            guest_offset_bytes: 0,
            page_size: 4096,
        };
        uffd.register(&region, WriteTracking::Off).unwrap();
        let userfaultfds = || {
            let fds = std::fs::read_dir("/proc/self/fd").unwrap();
            let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
            links
                .filter(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
                .count()
        };
        let before = userfaultfds();
        for _ in 0..FORKS {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    // SAFETY: the child does nothing but end.
                    let child = unsafe { libc::fork() };
                    if child == 0 {
                        // SAFETY: it ends at once, without running anything of its parent's.
                        unsafe { libc::_exit(0) };
                    }
                    // SAFETY: our own child, whose status is not wanted.
                    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
                });
                let mut events = Vec::new();
                while events.is_empty() {
                    uffd.read_events(&mut |event| events.push(event)).unwrap();
                    std::thread::yield_now();
                }
                assert!(matches!(events[..], [RawEvent::Unasked { event: 0x13 }]));
            });
        }
        // Those of other tests come and go.
        assert!(userfaultfds() < before + FORKS / 2);
    }

    #[test]
    fn a_descriptor_is_negotiated_once() {
        let uffd = Uffd::create().unwrap();
        let tracking = WriteTracking::best_of_host().unwrap();
        uffd.negotiate(tracking).unwrap();
        let again = uffd.negotiate(tracking).unwrap_err().to_string();
        assert!(again.contains("can be negotiated only once"), "{again}");
    }
}
