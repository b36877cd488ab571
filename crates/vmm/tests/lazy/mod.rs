//! The smallest page fault service that a resume can live on: one thread, one page a fault.

#![allow(missing_docs, unreachable_pub, reason = "test support")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot serve pages is over"
)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use torpor_vmm::{GuestMemory, MemoryMapping};

const PAGE: u64 = 4096;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

fn ioctl<const LEN: usize>(fd: &impl AsRawFd, request: u64, arg: &mut [u64; LEN]) {
    // SAFETY: each request's argument is a struct of u64 fields, as long as its array here.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, arg.as_mut_ptr()) };
    // EEXIST: another fault brought the page. ESRCH: the guest is gone.
    let error = std::io::Error::last_os_error();
    let benign = matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ESRCH));
    assert!(answer == 0 || benign, "{request:#x}: {error}");
}

/// Handshake and registration: from here on an absent page is a page fault.
pub fn register(uffd: &OwnedFd, memory: &GuestMemory) {
    ioctl(uffd, UFFDIO_API, &mut [UFFD_API, 0, 0]);
    for mapping in &memory.mappings {
        let MemoryMapping {
            host_addr,
            len_bytes,
            ..
        } = *mapping;
        ioctl(
            uffd,
            UFFDIO_REGISTER,
            &mut [host_addr, len_bytes, REGISTER_MODE_MISSING, 0],
        );
    }
}

pub struct LazyMemory {
    faults: Arc<AtomicU64>,
}

impl LazyMemory {
    /// Serves until the process that faults is gone.
    pub fn serve(uffd: OwnedFd, memory: &GuestMemory, source: OwnedFd) -> Self {
        register(&uffd, memory);
        let faults = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&faults);
        let mappings = memory.mappings.clone();
        thread::spawn(move || serve(File::from(uffd), &mappings, &File::from(source), &counted));
        Self { faults }
    }

    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }
}

fn serve(mut uffd: File, mappings: &[MemoryMapping], source: &File, faults: &AtomicU64) {
    let mut page = vec![0; 4096];
    loop {
        let mut fds = [PollFd::new(&uffd, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        if fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) {
            return;
        }
        let mut event = [0; 32];
        if uffd.read(&mut event).is_err() {
            continue;
        }
        assert_eq!(event[0], EVENT_PAGEFAULT);
        let address = u64::from_ne_bytes(event[16..24].try_into().unwrap()) & !(PAGE - 1);
        let mapping = mappings
            .iter()
            .find(|m| (m.host_addr..m.host_addr + m.len_bytes).contains(&address))
            .unwrap();
        let offset = mapping.guest_offset_bytes + (address - mapping.host_addr);
        source.read_exact_at(&mut page, offset).unwrap();
        let from = page.as_ptr().addr() as u64;
        // Counted first: who sees the page has seen the fault.
        faults.fetch_add(1, Ordering::Relaxed);
        ioctl(&uffd, UFFDIO_COPY, &mut [address, from, PAGE, 0, 0]);
    }
}
