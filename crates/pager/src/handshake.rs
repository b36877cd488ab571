//! How a VMM hands its memory over: Firecracker's handshake on a Unix socket.
//!
//! The VMM connects and sends one message: the regions of its guest's memory as JSON, and its
//! userfaultfd, negotiated and registered, as a descriptor beside it.
//!
//! ```text
//! [{"base_host_virt_addr":140719327019008,"size":268435456,"offset":0,"page_size":4096}]
//! ```
//!
//! `page_size_kib` is the older name of `page_size`, and counts bytes despite it. Fields that are
//! not known are left alone.
//!
//! The peer is not trusted: the message, the number of regions and of descriptors, and the time
//! are bounded, and the descriptor must be a userfaultfd. It can do harm to itself only: all
//! that the pager writes goes to the memory behind that descriptor.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::slice;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, PidfdFlags};
use serde::Deserialize;

use crate::error::PagerError;
use crate::region::Region;

/// A message's length. A region takes some 150 bytes; Firecracker sends at most a handful.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Regions of one guest.
pub const REGIONS_MAX: usize = 256;

/// Descriptors that one message may bring; more than one is refused, and closed.
const FDS_MAX: usize = 4;

/// From the connection to the whole message. The VMM sends it at once.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// What a VMM handed over.
#[derive(Debug)]
pub struct Handshake {
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// Its guest's memory.
    pub regions: Vec<Region>,
    /// The process that connected.
    pub peer: Peer,
}

/// A process at the other end of a socket.
#[derive(Debug)]
pub struct Peer {
    /// Its id, in our namespace.
    pub pid: i32,
    pidfd: Option<OwnedFd>,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The socket failed.
    #[error("the VMM's connection: {0}")]
    Socket(#[from] io::Error),
    /// The peer closed the connection first.
    #[error("the VMM closed the connection before its message was whole ({0} bytes)")]
    Closed(usize),
    /// The message did not come.
    #[error("the VMM sent no whole message within {HANDSHAKE_MAX:?} ({0} bytes)")]
    Timeout(usize),
    /// The message is too long.
    #[error("the VMM's message is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// The message is not the JSON that it should be.
    #[error("the VMM's message is not a list of memory regions: {0}")]
    Json(#[from] serde_json::Error),
    /// More regions than any VMM has, or none.
    #[error("the VMM's message names {0} memory regions; 1 to {REGIONS_MAX} can be served")]
    Regions(usize),
    /// No descriptor, or too many.
    #[error("the VMM's message brought {0} descriptors; it must bring its userfaultfd")]
    Descriptors(usize),
    /// Another kind of descriptor.
    #[error("the VMM's descriptor is no userfaultfd but {0}")]
    NotUserfaultfd(String),
    /// A region that cannot be served.
    #[error(transparent)]
    Region(#[from] PagerError),
    /// One of the others, from a VMM whose userfaultfd came: it waits already, and for ever if it is
    /// not killed.
    #[error("{why}")]
    Unserved {
        /// The VMM.
        peer: Peer,
        /// What was wrong with its message.
        why: Box<HandshakeError>,
    },
}

#[derive(Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// The regions of a message, each of which can be served.
///
/// # Errors
/// What is wrong with the message.
pub fn parse(message: &[u8]) -> Result<Vec<Region>, HandshakeError> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(HandshakeError::TooLong);
    }
    let mappings: Vec<Mapping> = serde_json::from_slice(message)?;
    if mappings.is_empty() || mappings.len() > REGIONS_MAX {
        return Err(HandshakeError::Regions(mappings.len()));
    }
    mappings
        .into_iter()
        .map(|mapping| {
            let page_size = mapping.page_size.or(mapping.page_size_kib).unwrap_or(4096);
            let region = Region {
                host_addr: mapping.base_host_virt_addr,
                len_bytes: mapping.size,
                guest_offset_bytes: mapping.offset,
                // What does not fit is no page size, and is refused as such.
                page_size: u32::try_from(page_size).unwrap_or(u32::MAX),
            };
            region.check()?;
            Ok(region)
        })
        .collect()
}

/// Receives a VMM's handshake.
///
/// # Errors
/// The peer does not keep to it.
pub fn receive(stream: &UnixStream) -> Result<Handshake, HandshakeError> {
    let peer = Peer::of(stream)?;
    let mut fds = Vec::new();
    let received = receive_regions(stream, &mut fds)
        .and_then(|regions| userfaultfd_of(&fds).map(|()| regions));
    match (received, fds.pop()) {
        (Ok(regions), Some(uffd)) => Ok(Handshake {
            uffd,
            regions,
            peer,
        }),
        (Ok(_), None) => Err(HandshakeError::Descriptors(0)),
        (Err(why), last) => {
            fds.extend(last);
            if fds
                .iter()
                .any(|fd| userfaultfd_of(slice::from_ref(fd)).is_ok())
            {
                let why = Box::new(why);
                return Err(HandshakeError::Unserved { peer, why });
            }
            Err(why)
        }
    }
}

/// Reads the message, and what comes beside it.
fn receive_regions(
    stream: &UnixStream,
    fds: &mut Vec<OwnedFd>,
) -> Result<Vec<Region>, HandshakeError> {
    let started = Instant::now();
    let mut message = Vec::new();
    loop {
        let left = HANDSHAKE_MAX.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Err(HandshakeError::Timeout(message.len()));
        }
        stream.set_read_timeout(Some(left))?;
        match receive_some(stream, &mut message, fds) {
            Ok(0) => return Err(HandshakeError::Closed(message.len())),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => {
                return Err(HandshakeError::Timeout(message.len()));
            }
            Err(error) => return Err(HandshakeError::Socket(error.into())),
        }
        match parse(&message) {
            Err(HandshakeError::Json(error)) if error.is_eof() => {}
            regions => return regions,
        }
    }
}

/// One descriptor it must be, and a userfaultfd.
fn userfaultfd_of(fds: &[OwnedFd]) -> Result<(), HandshakeError> {
    let [fd] = fds else {
        return Err(HandshakeError::Descriptors(fds.len()));
    };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() == "anon_inode:[userfaultfd]" {
        return Ok(());
    }
    let found = link.to_string_lossy().into_owned();
    Err(HandshakeError::NotUserfaultfd(found))
}

fn receive_some(
    stream: &UnixStream,
    message: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> rustix::io::Result<usize> {
    // One byte past the limit, so that a message that is too long is seen to be.
    let mut piece = [0; 4096];
    let room = (MESSAGE_BYTES_MAX + 1 - message.len()).min(piece.len());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut piece[..room])];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(stream, &mut buffers, &mut beside, flags)?.bytes;
    for item in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = item {
            fds.extend(descriptors);
        }
    }
    fds.truncate(FDS_MAX);
    message.extend_from_slice(&piece[..got]);
    Ok(got)
}

impl Peer {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(stream)?;
        let pid = credentials.pid;
        // A process that has ended meanwhile has none; whoever waits for it learns so.
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Some(pidfd),
            Err(rustix::io::Errno::SRCH) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            pid: Pid::as_raw(Some(pid)),
            pidfd,
        })
    }

    /// Readable once the process has ended; `None` if it had ended by the time it was looked at.
    #[must_use]
    pub fn pidfd(&self) -> Option<&OwnedFd> {
        self.pidfd.as_ref()
    }

    /// Ends the process: a VMM that nobody serves hangs for ever.
    ///
    /// # Errors
    /// The host refuses: it is another user's.
    pub fn kill(&self) -> io::Result<()> {
        let Some(pidfd) = &self.pidfd else {
            return Ok(());
        };
        match rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn firecrackers_message_is_understood_in_both_spellings() {
        for page_size in [
            "\"page_size\":4096",
            "\"page_size_kib\":4096",
            "\"new\":[{}]",
        ] {
            let message = format!(
                "[{{\"base_host_virt_addr\":140719327019008,\"size\":268435456,\"offset\":0,{page_size}}}]"
            );
            let regions = parse(message.as_bytes()).unwrap();
            let expected = Region {
                host_addr: 140_719_327_019_008,
                len_bytes: 268_435_456,
                guest_offset_bytes: 0,
                page_size: 4096,
            };
            assert_eq!(regions, [expected]);
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        let region =
            |size: &str| format!("{{\"base_host_virt_addr\":4096,\"size\":{size},\"offset\":0}}");
        let refused = |message: &str| parse(message.as_bytes()).unwrap_err().to_string();
        assert!(refused("[]").contains("0 memory regions"));
        let many = vec![region("4096"); REGIONS_MAX + 1].join(",");
        assert!(refused(&format!("[{many}]")).contains("257 memory regions"));
        assert!(refused(&format!("[{}]", region("5000"))).contains("whole pages"));
        assert!(refused(&format!("[{}]", region("-1"))).contains("not a list"));
        let too_far = u64::MAX - 4095;
        assert!(refused(&format!("[{}]", region(&too_far.to_string()))).contains("beyond"));
        assert!(refused(&" ".repeat(MESSAGE_BYTES_MAX + 1)).contains("longer"));
    }

    proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(message in "[\\[\\]{}\",:a-z0-9_ -]{0,200}") {
            drop(parse(message.as_bytes()));
        }

        #[test]
        fn regions_that_are_let_through_can_be_added_up(
            addr in any::<u64>(), size in any::<u64>(), offset in any::<u64>(),
        ) {
            let message = format!(
                "[{{\"base_host_virt_addr\":{addr},\"size\":{size},\"offset\":{offset}}}]"
            );
            if let Ok(regions) = parse(message.as_bytes()) {
                prop_assert!(regions[0].host_addr.checked_add(regions[0].len_bytes).is_some());
                prop_assert!(offset.checked_add(size).is_some());
            }
        }
    }
}
