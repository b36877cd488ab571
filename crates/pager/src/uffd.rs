//! userfaultfd: the descriptor, its set-up, and the few ioctls that the pager needs.
//!
//! Own definitions, because the crate `userfaultfd` knows neither COPY's MODE_WP nor WP_ASYNC and
//! hides a negative count in an unsigned one; it serves as the tests' second opinion. Layouts and
//! numbers are those of the kernel's `include/uapi/linux/userfaultfd.h`.
//!
//! Set-up, in this order: [`Uffd::from_fd`] (or [`Uffd::create`] for one's own process),
//! [`Uffd::negotiate`], [`Uffd::register`] for each region, then `Pager::start`. Whoever gets a
//! descriptor that the VMM has negotiated and registered already (Firecracker) skips both.
//!
//! Write-protecting a fresh region first ([`Uffd::write_protect`]) is not needed: every page that
//! the pager installs is installed write-protected, and a page that nobody installed holds no
//! write. It costs a page table entry for each page of the guest.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::error::PagerError;
use crate::page_set::{HUGE_PAGE_BYTES, PAGE_SIZE_U64};
use crate::source::Content;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;

const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 1 << 1;
const REGISTER_MODE_MINOR: u64 = 1 << 2;
const CONTINUE_MODE_WP: u64 = 1 << 1;
const COPY_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1;

const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// `UFFD_USER_MODE_ONLY`: a descriptor that anyone may create, good enough to ask for features.
const USER_MODE_ONLY: libc::c_int = 1;

/// Events per read. A read costs a syscall whatever it brings; 64 of 32 bytes fill half a page.
const EVENTS_PER_READ: usize = 64;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct uffd_msg`: the union's three words, which every event that we ask for consists of.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    arg: [u64; 3],
}

impl UffdMsg {
    /// What it says; `None` for an event that was not asked for.
    fn event(&self) -> Option<RawEvent> {
        let [first, second, _] = self.arg;
        match self.event {
            EVENT_PAGEFAULT => Some(RawEvent::Fault {
                host_addr: second,
                write: first & PAGEFAULT_FLAG_WRITE != 0,
                protected: first & PAGEFAULT_FLAG_WP != 0,
                unmapped: first & PAGEFAULT_FLAG_MINOR != 0,
            }),
            EVENT_REMOVE => Some(RawEvent::Remove {
                start: first,
                end: second,
            }),
            _ => None,
        }
    }
}

/// An event from its bytes as they are read.
#[cfg(any(test, feature = "fuzz"))]
#[cfg(not(feature = "shuttle"))]
pub(crate) fn event_of(bytes: &[u8; 32]) -> Option<RawEvent> {
    let word = |at: usize| {
        let word = bytes[at..].first_chunk::<8>();
        word.map_or(0, |word| u64::from_ne_bytes(*word))
    };
    let message = UffdMsg {
        event: bytes[0],
        arg: [word(8), word(16), word(24)],
        ..UffdMsg::default()
    };
    message.event()
}

const _: () = assert!(size_of::<UffdMsg>() == 32, "struct uffd_msg is 32 bytes");
const _: () = assert!(
    size_of::<UffdioCopy>() == 0x28,
    "the ioctl number holds the size"
);
const _: () = assert!(
    size_of::<UffdioRegister>() == 0x20,
    "the ioctl number holds the size"
);

/// How the pager learns which pages the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteTracking {
    /// The kernel lifts the protection of a written page by itself, and PAGEMAP_SCAN finds the
    /// written ones. Costs the guest nothing it notices. Kernel 6.7 or newer.
    Async,
    /// Each first write to a page is a fault that the pager answers. For older kernels
    /// (5.7 for anonymous memory, 5.19 for shared).
    Sync,
    /// No tracking: there is no dirty set.
    Off,
}

impl WriteTracking {
    /// The best that this host's kernel offers.
    ///
    /// # Errors
    /// The host has no userfaultfd, or its features cannot be asked for.
    pub fn best_of_host() -> Result<Self, PagerError> {
        let features = host_features()?;
        let offers = |wanted: u64| features & wanted == wanted;
        Ok(if offers(FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED) {
            Self::Async
        } else if offers(FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM) {
            Self::Sync
        } else {
            Self::Off
        })
    }

    /// Features without which this tracking cannot be right, with their kernel names.
    fn required(self) -> &'static [(u64, &'static str)] {
        const REMOVE: (u64, &str) = (FEATURE_EVENT_REMOVE, "UFFD_FEATURE_EVENT_REMOVE");
        const WP: (u64, &str) = (FEATURE_PAGEFAULT_FLAG_WP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP");
        const ASYNC: (u64, &str) = (FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC");
        const UNPOPULATED: (u64, &str) = (FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED");
        match self {
            Self::Async => &[REMOVE, WP, UNPOPULATED, ASYNC],
            Self::Sync => &[REMOVE, WP],
            Self::Off => &[REMOVE],
        }
    }

    /// Whether pages are installed write-protected.
    pub(crate) fn protects(self) -> bool {
        self != Self::Off
    }
}

/// A piece of guest memory in the VMM's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the VMM has it mapped.
    pub host_addr: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Its offset in the guest's memory file.
    pub guest_offset_bytes: u64,
    /// The size of the pages that back it: 4096, or 2 MiB for anonymous memory of huge pages
    /// (`MAP_HUGETLB`). Transparent huge pages are 4096: the kernel splits them by itself.
    pub page_size: u32,
}

impl Region {
    /// Checks what cannot be served.
    pub(crate) fn check(&self) -> Result<(), PagerError> {
        let refuse = |why| {
            Err(PagerError::Region {
                host_addr: self.host_addr,
                len_bytes: self.len_bytes,
                guest_offset_bytes: self.guest_offset_bytes,
                why,
            })
        };
        let page_bytes = u64::from(self.page_size);
        if ![PAGE_SIZE_U64, HUGE_PAGE_BYTES].contains(&page_bytes) {
            return refuse("only memory of 4 KiB or 2 MiB pages is served");
        }
        let values = [self.host_addr, self.len_bytes, self.guest_offset_bytes];
        if values.iter().any(|value| value % page_bytes != 0) || self.len_bytes == 0 {
            return refuse("address, length and offset must be whole pages, the length not zero");
        }
        if self.host_addr.checked_add(self.len_bytes).is_none()
            || self
                .guest_offset_bytes
                .checked_add(self.len_bytes)
                .is_none()
        {
            return refuse("it ends beyond the address space");
        }
        Ok(())
    }

    pub(crate) fn host_end(&self) -> u64 {
        self.host_addr + self.len_bytes
    }

    fn range(&self) -> UffdioRange {
        UffdioRange {
            start: self.host_addr,
            len: self.len_bytes,
        }
    }
}

/// A userfaultfd, of this process or (most often) of a VMM.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Creates a userfaultfd for this process's own memory.
    ///
    /// # Errors
    /// The kernel has none, or forbids it (`vm.unprivileged_userfaultfd`).
    pub fn create() -> Result<Self, PagerError> {
        create_with(0)
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
        Ok(Self { fd })
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
        api(&self.fd, needed | (offered & welcome))
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
                range: region.range(),
                mode,
                ioctls: 0,
            };
            ioctl(&self.fd, UFFDIO_REGISTER, &mut arg)
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
        self.set_protection(region.range(), true)
            .map_err(|source| PagerError::Setup {
                step: "write-protect the guest's memory (UFFDIO_WRITEPROTECT)",
                next_step: "register the region with write tracking first",
                source,
            })
    }

    fn set_protection(&self, range: UffdioRange, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut arg = UffdioWriteprotect { range, mode };
        ioctl(&self.fd, UFFDIO_WRITEPROTECT, &mut arg)
    }

    /// Lifts the protection of a range and wakes whoever waits there.
    pub(crate) fn unprotect(&self, host_addr: u64, len_bytes: u64) -> Result<Filled, io::Error> {
        let range = UffdioRange {
            start: host_addr,
            len: len_bytes,
        };
        match self.set_protection(range, false) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, 0),
        }
    }

    /// Wakes every thread that waits in the range.
    pub(crate) fn wake(&self, host_addr: u64, len_bytes: u64) -> io::Result<()> {
        let mut arg = UffdioRange {
            start: host_addr,
            len: len_bytes,
        };
        ioctl(&self.fd, UFFDIO_WAKE, &mut arg)
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
        match ioctl(&self.fd, UFFDIO_COPY, &mut arg) {
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
        let range = UffdioRange {
            start: host_addr,
            len: len_bytes,
        };
        let mode = if protect { CONTINUE_MODE_WP } else { 0 };
        let mut arg = UffdioContinue {
            range,
            mode,
            mapped: 0,
        };
        match ioctl(&self.fd, UFFDIO_CONTINUE, &mut arg) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, arg.mapped),
        }
    }

    /// Maps the kernel's zero page over an absent anonymous range and wakes whoever waits there.
    /// Never used where writes are tracked: the mapping is not write-protected, and protecting it
    /// afterwards can lose a write that came between.
    pub(crate) fn zero(&self, host_addr: u64, len_bytes: u64) -> Result<Filled, io::Error> {
        let range = UffdioRange {
            start: host_addr,
            len: len_bytes,
        };
        let mut arg = UffdioZeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        match ioctl(&self.fd, UFFDIO_ZEROPAGE, &mut arg) {
            Ok(()) => Ok(Filled::Bytes(len_bytes)),
            Err(error) => Filled::from_failure(error, arg.zeropage),
        }
    }

    /// Reads the events that are queued, at most [`EVENTS_PER_READ`]. Returns whether there may be
    /// more: a read that was not filled has found the queues empty.
    pub(crate) fn read_events(&self, sink: &mut dyn FnMut(RawEvent)) -> io::Result<bool> {
        let mut messages = [UffdMsg::default(); EVENTS_PER_READ];
        let len_bytes = size_of_val(&messages);
        // SAFETY: the buffer is ours, `len_bytes` long, and every bit pattern is a valid UffdMsg.
        let got =
            unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), len_bytes) };
        let Ok(got_bytes) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(false),
                Some(libc::EINTR) => Ok(true),
                _ => Err(error),
            };
        };
        let count = got_bytes / size_of::<UffdMsg>();
        for message in &messages[..count] {
            match message.event() {
                Some(event) => sink(event),
                None => tracing::warn!(
                    event = message.event,
                    "userfaultfd event that was not asked for"
                ),
            }
        }
        Ok(count == EVENTS_PER_READ)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An event as the kernel words it, in host addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RawEvent {
    Fault {
        host_addr: u64,
        write: bool,
        protected: bool,
        unmapped: bool,
    },
    Remove {
        start: u64,
        end: u64,
    },
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

fn create_with(flags: libc::c_int) -> Result<Uffd, PagerError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    // SAFETY: userfaultfd takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Ok(Uffd { fd })
        }
        _ => Err(PagerError::Setup {
            step: "create a userfaultfd",
            next_step: "the kernel needs CONFIG_USERFAULTFD; as a plain user set \
                        vm.unprivileged_userfaultfd=1",
            source: io::Error::last_os_error(),
        }),
    }
}

/// The features of this host's kernel, asked of a descriptor that is then thrown away: asking
/// settles a descriptor's features for good.
fn host_features() -> Result<u64, PagerError> {
    let probe = create_with(USER_MODE_ONLY).or_else(|_| create_with(0))?;
    api(&probe.fd, 0).map_err(|source| PagerError::Setup {
        step: "ask for the kernel's features (UFFDIO_API)",
        next_step: "the kernel speaks another userfaultfd than 0xAA",
        source,
    })
}

fn api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut arg = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    ioctl(fd, UFFDIO_API, &mut arg)?;
    Ok(arg.features)
}

/// All of this module's ioctls take a pointer to a struct of the size that their number names.
fn ioctl<T>(fd: &OwnedFd, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
    // SAFETY: `arg` is an exclusive reference to the `repr(C)` struct that this request reads and
    // writes; addresses inside it are the other process's, or (COPY's source) a live slice.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(arg)) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_raw_sys::{general, ioctl};

    /// A second opinion on every number in this module.
    #[test]
    fn numbers_and_layouts_are_those_of_the_kernels_headers() {
        let ours = [
            UFFDIO_API,
            UFFDIO_REGISTER,
            UFFDIO_WAKE,
            UFFDIO_COPY,
            UFFDIO_ZEROPAGE,
            UFFDIO_WRITEPROTECT,
            UFFDIO_CONTINUE,
        ];
        let theirs = [
            ioctl::UFFDIO_API,
            ioctl::UFFDIO_REGISTER,
            ioctl::UFFDIO_WAKE,
            ioctl::UFFDIO_COPY,
            ioctl::UFFDIO_ZEROPAGE,
            ioctl::UFFDIO_WRITEPROTECT,
            ioctl::UFFDIO_CONTINUE,
        ];
        assert_eq!(ours, theirs.map(libc::c_ulong::from));
        let ours = [
            FEATURE_PAGEFAULT_FLAG_WP,
            FEATURE_EVENT_REMOVE,
            FEATURE_MISSING_SHMEM,
            FEATURE_MINOR_SHMEM,
            FEATURE_WP_HUGETLBFS_SHMEM,
            FEATURE_WP_UNPOPULATED,
            FEATURE_WP_ASYNC,
            PAGEFAULT_FLAG_WRITE,
            PAGEFAULT_FLAG_WP,
            PAGEFAULT_FLAG_MINOR,
            COPY_MODE_WP,
            REGISTER_MODE_MISSING,
            REGISTER_MODE_WP,
            REGISTER_MODE_MINOR,
            u64::from(EVENT_PAGEFAULT),
            u64::from(EVENT_REMOVE),
        ];
        let theirs = [
            general::UFFD_FEATURE_PAGEFAULT_FLAG_WP,
            general::UFFD_FEATURE_EVENT_REMOVE,
            general::UFFD_FEATURE_MISSING_SHMEM,
            general::UFFD_FEATURE_MINOR_SHMEM,
            general::UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
            general::UFFD_FEATURE_WP_UNPOPULATED,
            general::UFFD_FEATURE_WP_ASYNC,
            general::UFFD_PAGEFAULT_FLAG_WRITE,
            general::UFFD_PAGEFAULT_FLAG_WP,
            general::UFFD_PAGEFAULT_FLAG_MINOR,
            general::UFFDIO_COPY_MODE_WP,
            general::UFFDIO_REGISTER_MODE_MISSING,
            general::UFFDIO_REGISTER_MODE_WP,
            general::UFFDIO_REGISTER_MODE_MINOR,
            general::UFFD_EVENT_PAGEFAULT,
            general::UFFD_EVENT_REMOVE,
        ];
        assert_eq!(ours, theirs.map(u64::from));
        assert_eq!(size_of::<UffdMsg>(), size_of::<general::uffd_msg>());
        assert_eq!(size_of::<UffdioCopy>(), size_of::<general::uffdio_copy>());
        assert_eq!(
            size_of::<UffdioZeropage>(),
            size_of::<general::uffdio_zeropage>()
        );
        assert_eq!(
            size_of::<UffdioContinue>(),
            size_of::<general::uffdio_continue>()
        );
        assert_eq!(
            size_of::<UffdioWriteprotect>(),
            size_of::<general::uffdio_writeprotect>()
        );
    }

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

    #[test]
    fn a_descriptor_is_negotiated_once() {
        let uffd = Uffd::create().unwrap();
        let tracking = WriteTracking::best_of_host().unwrap();
        uffd.negotiate(tracking).unwrap();
        let again = uffd.negotiate(tracking).unwrap_err().to_string();
        assert!(again.contains("can be negotiated only once"), "{again}");
    }

    #[test]
    fn a_region_that_cannot_be_served_is_refused_with_its_reason() {
        let region = |host_addr, len_bytes, page_size| Region {
            host_addr,
            len_bytes,
            guest_offset_bytes: 0,
            page_size,
        };
        assert!(region(4096, 8192, 4096).check().is_ok());
        assert!(region(2 << 20, 4 << 20, 2 << 20).check().is_ok());
        for (bad, why) in [
            (region(4096, 8192, 1 << 30), "4 KiB or 2 MiB"),
            (region(4096, 8192, u32::MAX), "4 KiB or 2 MiB"),
            (region(2 << 20, 3 << 20, 2 << 20), "whole pages"),
            (region(1 << 20, 2 << 20, 2 << 20), "whole pages"),
            (region(4097, 8192, 4096), "whole pages"),
            (region(4096, 0, 4096), "not zero"),
            (
                region(u64::MAX - 4095, 8192, 4096),
                "beyond the address space",
            ),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
