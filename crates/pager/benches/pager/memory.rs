//! Guest memory in this process, a userfaultfd for it, and the raw kernel calls that the limits
//! are measured with.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::{general, ioctl};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use torpor_pager::Region;

pub(crate) const PAGE: usize = 4096;

/// Anonymous memory (as Firecracker's), or a shared memfd (as QEMU's).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    SharedMemfd,
}

pub(crate) struct Memory {
    pub(crate) addr: usize,
    pub(crate) pages: usize,
    pub(crate) memfd: Option<OwnedFd>,
    page_size: u32,
}

impl Memory {
    /// Anonymous memory of 2 MiB pages, if the host has that many.
    pub(crate) fn huge(pages: usize) -> Option<Self> {
        let (null, rw) = (std::ptr::null_mut(), ProtFlags::READ | ProtFlags::WRITE);
        let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        // SAFETY: as in `new`.
        let mapped = unsafe { rustix::mm::mmap_anonymous(null, pages * PAGE, rw, flags) };
        Some(Self {
            addr: mapped.ok()?.expose_provenance(),
            pages,
            memfd: None,
            page_size: 2 << 20,
        })
    }

    pub(crate) fn new(kind: Kind, pages: usize) -> Self {
        let memfd = (kind == Kind::SharedMemfd).then(|| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let memfd = rustix::fs::memfd_create("bench-guest", flags).unwrap();
            rustix::fs::ftruncate(&memfd, (pages * PAGE) as u64).unwrap();
            memfd
        });
        let rw = ProtFlags::READ | ProtFlags::WRITE;
        let null = std::ptr::null_mut();
        // SAFETY: new mappings at addresses of the kernel's choice touch nothing.
        let mapped = unsafe {
            match &memfd {
                None => rustix::mm::mmap_anonymous(null, pages * PAGE, rw, MapFlags::PRIVATE),
                Some(fd) => rustix::mm::mmap(null, pages * PAGE, rw, MapFlags::SHARED, fd, 0),
            }
        };
        let memory = Self {
            addr: mapped.unwrap().expose_provenance(),
            pages,
            memfd,
            page_size: 4096,
        };
        memory.advise(0, pages, Advice::LinuxNoHugepage);
        memory
    }

    /// A file, mapped for reading and in the page tables already if `populate`.
    pub(crate) fn of_file(file: &File, pages: usize, populate: bool) -> Self {
        let mut flags = MapFlags::SHARED;
        flags.set(MapFlags::POPULATE, populate);
        let null = std::ptr::null_mut();
        // SAFETY: as in `new`.
        let mapped =
            unsafe { rustix::mm::mmap(null, pages * PAGE, ProtFlags::READ, flags, file, 0) };
        Self {
            addr: mapped.unwrap().expose_provenance(),
            pages,
            memfd: None,
            page_size: 4096,
        }
    }

    /// A file, mapped as a VMM maps it that is to share its pages until they are written.
    pub(crate) fn of_private_file(file: &File, pages: usize) -> Self {
        let (null, rw) = (std::ptr::null_mut(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: as in `new`.
        let mapped =
            unsafe { rustix::mm::mmap(null, pages * PAGE, rw, MapFlags::PRIVATE, file, 0) };
        Self {
            addr: mapped.unwrap().expose_provenance(),
            pages,
            memfd: None,
            page_size: 4096,
        }
    }

    fn at(&self, page: usize) -> *mut u64 {
        assert!(page < self.pages);
        std::ptr::with_exposed_provenance_mut(self.addr + page * PAGE)
    }

    /// Touches a page as a guest does.
    pub(crate) fn read(&self, page: usize) -> u64 {
        // SAFETY: inside the mapping and aligned; volatile, since the kernel fills it meanwhile.
        unsafe { self.at(page).read_volatile() }
    }

    pub(crate) fn write(&self, page: usize, value: u64) {
        // SAFETY: as in `read`.
        unsafe { self.at(page).write_volatile(value) };
    }

    pub(crate) fn advise(&self, page: usize, pages: usize, advice: Advice) {
        assert!(page + pages <= self.pages);
        // SAFETY: inside the mapping, to which no Rust reference exists.
        unsafe { rustix::mm::madvise(self.at(page).cast(), pages * PAGE, advice) }.unwrap();
    }

    pub(crate) fn region(&self) -> Region {
        Region {
            host_addr: self.addr as u64,
            len_bytes: (self.pages * PAGE) as u64,
            guest_offset_bytes: 0,
            page_size: self.page_size,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever used it has ended.
        unsafe { rustix::mm::munmap(self.at(0).cast(), self.pages * PAGE) }.unwrap();
    }
}

/// A userfaultfd as bare as it gets.
pub(crate) struct RawUffd {
    fd: OwnedFd,
    /// Whether pages are copied write-protected, for the kernel to lift.
    tracked: bool,
}

impl RawUffd {
    pub(crate) fn new(memory: &Memory, tracked: bool) -> Self {
        // SAFETY: takes an integer, touches no memory of ours.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(fd).unwrap();
        assert!(fd >= 0, "no userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just given it to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let uffd = Self { fd, tracked };
        let mut features = general::UFFD_FEATURE_EVENT_REMOVE | general::UFFD_FEATURE_MISSING_SHMEM;
        let mut mode = general::UFFDIO_REGISTER_MODE_MISSING;
        if tracked {
            features |= general::UFFD_FEATURE_PAGEFAULT_FLAG_WP
                | general::UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                | general::UFFD_FEATURE_WP_UNPOPULATED
                | general::UFFD_FEATURE_WP_ASYNC;
            mode |= general::UFFDIO_REGISTER_MODE_WP;
        }
        uffd.ioctl(ioctl::UFFDIO_API, &mut [0xAA, u64::from(features), 0])
            .unwrap();
        let len = (memory.pages * PAGE) as u64;
        uffd.ioctl(
            ioctl::UFFDIO_REGISTER,
            &mut [memory.addr as u64, len, mode.into(), 0],
        )
        .unwrap();
        uffd
    }

    fn ioctl<const N: usize>(&self, request: u32, arg: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: `arg` has the words of the struct that the request names; addresses in it are of
        // live mappings.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), request.into(), arg.as_mut_ptr()) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    pub(crate) fn copy(&self, to: usize, from: usize, len: usize) -> io::Result<()> {
        let mode = if self.tracked {
            general::UFFDIO_COPY_MODE_WP
        } else {
            0
        };
        let mut arg = [to as u64, from as u64, len as u64, mode.into(), 0];
        self.ioctl(ioctl::UFFDIO_COPY, &mut arg)
    }

    pub(crate) fn wake(&self, addr: usize) {
        self.ioctl(ioctl::UFFDIO_WAKE, &mut [addr as u64, PAGE as u64])
            .unwrap();
    }

    /// One event: its kind and its address.
    pub(crate) fn read_one(&self) -> Option<(u8, usize)> {
        let mut message = [0_u8; 32];
        let got = rustix::io::read(&self.fd, &mut message).ok()?;
        assert_eq!(got, 32);
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap()) as usize;
        Some((message[0], word(16)))
    }
}

impl AsFd for RawUffd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
