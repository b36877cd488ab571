//! userfaultfd as the kernel defines it: its numbers, its structs, and the three calls: create, read,
//! ioctl.
//!
//! All of userfaultfd's unsafe code is here. A request's number belongs to its struct
//! ([`Argument`]), so that no caller can bring the wrong two together. Numbers and layouts are those
//! of the kernel's `include/uapi/linux/userfaultfd.h`; a test holds them against the header's own.
//!
//! What an operation is for, and what its failure means, is `uffd`'s business.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use crate::error::PagerError;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;

pub(crate) const REGISTER_MODE_MISSING: u64 = 1;
pub(crate) const REGISTER_MODE_WP: u64 = 1 << 1;
pub(crate) const REGISTER_MODE_MINOR: u64 = 1 << 2;
pub(crate) const CONTINUE_MODE_WP: u64 = 1 << 1;
pub(crate) const COPY_MODE_WP: u64 = 1 << 1;
pub(crate) const WRITEPROTECT_MODE_WP: u64 = 1;

pub(crate) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
pub(crate) const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(crate) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub(crate) const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_FORK: u8 = 0x13;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// `UFFD_USER_MODE_ONLY`: a descriptor that anyone may create, good enough to ask for features.
pub(crate) const USER_MODE_ONLY: libc::c_int = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Also the whole argument of a wake.
#[repr(C)]
pub(crate) struct UffdioRange {
    start: u64,
    len: u64,
}

impl UffdioRange {
    pub(crate) fn new(start: u64, len: u64) -> Self {
        Self { start, len }
    }
}

#[repr(C)]
pub(crate) struct UffdioRegister {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}

#[repr(C)]
pub(crate) struct UffdioCopy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    pub(crate) copy: i64,
}

#[repr(C)]
pub(crate) struct UffdioZeropage {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) zeropage: i64,
}

#[repr(C)]
pub(crate) struct UffdioContinue {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) mapped: i64,
}

#[repr(C)]
pub(crate) struct UffdioWriteprotect {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
}

/// What one request reads and writes: a `repr(C)` struct of the kernel's.
pub(crate) trait Argument {
    /// The request's number.
    const REQUEST: libc::c_ulong;
}

impl Argument for UffdioApi {
    const REQUEST: libc::c_ulong = UFFDIO_API;
}

impl Argument for UffdioRange {
    const REQUEST: libc::c_ulong = UFFDIO_WAKE;
}

impl Argument for UffdioRegister {
    const REQUEST: libc::c_ulong = UFFDIO_REGISTER;
}

impl Argument for UffdioCopy {
    const REQUEST: libc::c_ulong = UFFDIO_COPY;
}

impl Argument for UffdioZeropage {
    const REQUEST: libc::c_ulong = UFFDIO_ZEROPAGE;
}

impl Argument for UffdioContinue {
    const REQUEST: libc::c_ulong = UFFDIO_CONTINUE;
}

impl Argument for UffdioWriteprotect {
    const REQUEST: libc::c_ulong = UFFDIO_WRITEPROTECT;
}

/// `struct uffd_msg`: the union's three words, which every event that we ask for consists of.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct UffdMsg {
    pub(crate) event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    arg: [u64; 3],
}

impl UffdMsg {
    /// What it says.
    pub(crate) fn event(&self) -> RawEvent {
        let [first, second, _] = self.arg;
        match self.event {
            EVENT_PAGEFAULT => RawEvent::Fault {
                host_addr: second,
                write: first & PAGEFAULT_FLAG_WRITE != 0,
                protected: first & PAGEFAULT_FLAG_WP != 0,
                unmapped: first & PAGEFAULT_FLAG_MINOR != 0,
            },
            EVENT_REMOVE => RawEvent::Remove {
                start: first,
                end: second,
            },
            event => RawEvent::Unasked { event },
        }
    }

    /// Closes the descriptor that the kernel has put into our table along with this message.
    fn close_forked(&self) {
        if self.event != EVENT_FORK {
            return;
        }
        if let Ok(fd) = RawFd::try_from(self.arg[0] & u64::from(u32::MAX)) {
            // SAFETY: reading this message installed the descriptor for us; nobody else knows of it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}

/// An event from its bytes as they are read.
#[cfg(any(test, feature = "fuzz"))]
#[cfg(not(feature = "shuttle"))]
pub(crate) fn event_of(bytes: &[u8; 32]) -> RawEvent {
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
    /// An event that was not asked for: the VMM has forked, or moved its guest's memory.
    Unasked {
        event: u8,
    },
}

/// A new userfaultfd, non-blocking, for this process's own memory.
pub(crate) fn create(flags: libc::c_int) -> Result<OwnedFd, PagerError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    // SAFETY: userfaultfd takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        }
        _ => Err(PagerError::Setup {
            step: "create a userfaultfd",
            next_step: "the kernel needs CONFIG_USERFAULTFD; as a plain user set \
                        vm.unprivileged_userfaultfd=1",
            source: io::Error::last_os_error(),
        }),
    }
}

/// Reads messages that are queued. Returns how many, from the first on, have come. Never waits for
/// one, whatever has become of the descriptor's flags: whoever handed it over shares them.
///
/// # Errors
/// `EAGAIN`: there are none. `EOPNOTSUPP`: this kernel reads userfaultfds as the flags say only.
pub(crate) fn read(fd: &OwnedFd, messages: &mut [UffdMsg]) -> io::Result<usize> {
    let buffer = libc::iovec {
        iov_base: messages.as_mut_ptr().cast(),
        iov_len: size_of_val(messages),
    };
    // The offset is that of a file without one.
    // SAFETY: `buffer` names the messages, all of them and exclusively ours, and every bit pattern is a
    // valid UffdMsg.
    let got = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const buffer, 1, -1, libc::RWF_NOWAIT) };
    received(messages, got)
}

/// The same where the kernel cannot be told not to wait: only if there are messages, or the flags say
/// so.
pub(crate) fn read_as_flags_say(fd: &OwnedFd, messages: &mut [UffdMsg]) -> io::Result<usize> {
    let len_bytes = size_of_val(messages);
    // SAFETY: the buffer is ours, `len_bytes` long, and every bit pattern is a valid UffdMsg.
    let got = unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), len_bytes) };
    received(messages, got)
}

fn received(messages: &[UffdMsg], got_bytes: libc::ssize_t) -> io::Result<usize> {
    let got_bytes = usize::try_from(got_bytes).map_err(|_| io::Error::last_os_error())?;
    let count = got_bytes / size_of::<UffdMsg>();
    messages[..count].iter().for_each(UffdMsg::close_forked);
    Ok(count)
}

/// Agrees on features. Returns those that the kernel offers.
pub(crate) fn api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut arg = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    ioctl(fd, &mut arg)?;
    Ok(arg.features)
}

/// Makes the request that this argument is for.
pub(crate) fn ioctl<T: Argument>(fd: &OwnedFd, arg: &mut T) -> io::Result<()> {
    const {
        let named_bytes = T::REQUEST >> 16 & 0x3fff;
        assert!(
            size_of::<T>() as libc::c_ulong == named_bytes,
            "the ioctl number holds the size"
        );
    }
    // SAFETY: `arg` is an exclusive reference to the `repr(C)` struct that this request reads and
    // writes; addresses inside it are the other process's, or (COPY's source) a live slice.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), T::REQUEST, std::ptr::from_mut(arg)) };
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
    fn numbers_are_those_of_the_kernels_headers() {
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
            u64::from(EVENT_FORK),
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
            general::UFFD_EVENT_FORK,
        ];
        assert_eq!(ours, theirs.map(u64::from));
    }

    #[test]
    fn layouts_are_those_of_the_kernels_headers() {
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
}
