//! How a Firecracker that resumes hands its page faults over.
//!
//! It connects to our socket and sends one message: where it has put the guest's memory, as JSON,
//! and its userfaultfd beside it. The descriptor is negotiated and the memory registered for missing
//! pages already. Firecracker never closes the connection and never reads from it.
//!
//! The socket lies in a directory of ours, and the peer must be the very process that we started:
//! whoever else connects is turned away.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg, sockopt,
};
use serde::Deserialize;
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use crate::error::{Result, VmmError};
use crate::memory::MemoryMapping;

/// The longest message. A region has some 150 bytes, a guest two or three regions.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The most regions of a guest.
const REGIONS_MAX: usize = 64;
/// How many strangers are turned away before we give up: the directory is ours alone.
const STRANGERS_MAX: usize = 8;
/// The only page size that is served.
const PAGE_BYTES: u64 = 4096;

/// What a resuming Firecracker hands over.
#[derive(Debug)]
pub struct Handshake {
    /// Its userfaultfd: non-blocking, negotiated for REMOVE events, all memory registered for
    /// missing pages.
    pub userfaultfd: OwnedFd,
    /// Where it has the guest's memory.
    pub mappings: Vec<MemoryMapping>,
}

/// A region as Firecracker words it. Fields that we do not know, and `page_size_kib`, which is in
/// bytes and deprecated, are passed over.
#[derive(Debug, Deserialize)]
struct WireRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    /// Since 1.11; before, only `page_size_kib` was there, with the same value.
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

/// A socket that waits for a Firecracker.
#[derive(Debug)]
pub(super) struct HandshakeSocket(UnixListener);

impl HandshakeSocket {
    pub(super) fn bind(path: &Path) -> Result<Self> {
        match UnixListener::bind(path) {
            Ok(listener) => Ok(Self(listener)),
            Err(source) => Err(VmmError::Host {
                what: "make the pager's socket",
                source,
            }),
        }
    }

    /// Waits for the message of the process `pid`, whose guest has `memory_bytes`.
    pub(super) async fn receive(
        &self,
        pid: u32,
        memory_bytes: u64,
        deadline: Duration,
    ) -> Result<Handshake> {
        let received = timeout(deadline, async {
            let stream = self.accept_from(pid).await?;
            receive_message(&stream).await
        });
        let failed = |detail: String| VmmError::Handshake { detail };
        let (text, userfaultfd) = received
            .await
            .map_err(|_| failed(format!("nothing came within {} ms", deadline.as_millis())))?
            .map_err(|error| failed(error.to_string()))?;
        let mappings = parse(&text, memory_bytes).map_err(failed)?;
        Ok(Handshake {
            userfaultfd,
            mappings,
        })
    }

    async fn accept_from(&self, pid: u32) -> io::Result<UnixStream> {
        for _ in 0..STRANGERS_MAX {
            let (stream, _) = self.0.accept().await?;
            let peer = sockopt::socket_peercred(&stream)?
                .pid
                .as_raw_nonzero()
                .get();
            if u32::try_from(peer) == Ok(pid) {
                return Ok(stream);
            }
            tracing::warn!(peer, "turned away from the pager's socket");
        }
        Err(io::Error::other("too many strangers at the pager's socket"))
    }
}

async fn receive_message(stream: &UnixStream) -> io::Result<(Vec<u8>, OwnedFd)> {
    let mut text = vec![0; MESSAGE_BYTES_MAX];
    let (len, userfaultfd) = stream
        .async_io(Interest::READABLE, || {
            receive_once(stream.as_fd(), &mut text)
        })
        .await?;
    text.truncate(len);
    Ok((text, userfaultfd))
}

/// The message comes whole: it is sent by one call, and is smaller than a socket's buffer.
fn receive_once(socket: BorrowedFd<'_>, text: &mut [u8]) -> io::Result<(usize, OwnedFd)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(text)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let mut descriptors = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let (first, second) = (descriptors.next(), descriptors.next());
    let cut = received
        .flags
        .intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC);
    match (first, second) {
        (Some(descriptor), None) if !cut && received.bytes < text.len() => {
            Ok((received.bytes, descriptor))
        }
        (None, _) => Err(io::Error::other(format!(
            "{} bytes without a descriptor",
            received.bytes
        ))),
        _ => Err(io::Error::other("more than one message's worth")),
    }
}

/// The regions, if together they are the guest's whole memory, once and in order.
fn parse(text: &[u8], memory_bytes: u64) -> std::result::Result<Vec<MemoryMapping>, String> {
    let regions: Vec<WireRegion> = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if regions.len() > REGIONS_MAX {
        return Err(format!("{} regions", regions.len()));
    }
    let mut mappings = Vec::with_capacity(regions.len());
    for region in &regions {
        let page_bytes = region.page_size.or(region.page_size_kib);
        if page_bytes.is_some_and(|bytes| bytes != PAGE_BYTES) {
            return Err(format!("pages of {page_bytes:?} bytes are not served"));
        }
        let whole = [region.base_host_virt_addr, region.size, region.offset]
            .iter()
            .all(|value| value.is_multiple_of(PAGE_BYTES));
        let fits = region
            .base_host_virt_addr
            .checked_add(region.size)
            .is_some();
        if !whole || !fits || region.size == 0 {
            return Err(format!("a region that is none: {region:?}"));
        }
        mappings.push(MemoryMapping {
            host_addr: region.base_host_virt_addr,
            len_bytes: region.size,
            guest_offset_bytes: region.offset,
        });
    }
    mappings.sort_by_key(|mapping| mapping.guest_offset_bytes);
    let mut covered = 0_u64;
    for mapping in &mappings {
        if mapping.guest_offset_bytes != covered {
            return Err(format!(
                "offset {covered:#x} is followed by {:#x}",
                mapping.guest_offset_bytes
            ));
        }
        covered = covered
            .checked_add(mapping.len_bytes)
            .ok_or("regions without end")?;
    }
    if covered != memory_bytes {
        return Err(format!(
            "{covered:#x} of {memory_bytes:#x} bytes are mapped"
        ));
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::IoSlice;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    const DEADLINE: Duration = Duration::from_secs(20);

    fn message(regions: &[(u64, u64, u64)]) -> String {
        let regions: Vec<_> = regions
            .iter()
            .map(|(addr, size, offset)| {
                serde_json::json!({
                    "base_host_virt_addr": addr, "size": size, "offset": offset,
                    "page_size": 4096, "page_size_kib": 4096, "from_the_future": [1],
                })
            })
            .collect();
        serde_json::Value::from(regions).to_string()
    }

    fn send(path: &Path, text: &str, descriptors: usize) -> std::os::unix::net::UnixStream {
        let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); descriptors];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if descriptors > 0 {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let bytes = [IoSlice::new(text.as_bytes())];
        sendmsg(&stream, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
        stream
    }

    async fn receive(text: &str, descriptors: usize, memory_bytes: u64) -> Result<Handshake> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pager.sock");
        let socket = HandshakeSocket::bind(&path).unwrap();
        let _stays_open = send(&path, text, descriptors);
        socket
            .receive(std::process::id(), memory_bytes, DEADLINE)
            .await
    }

    #[tokio::test]
    async fn several_regions_come_in_one_message_with_one_descriptor() {
        let text = message(&[
            (0x7f00_0000_0000, 0xc000_0000, 0),
            (0x7e00_0000_0000, 0x4000_0000, 0xc000_0000),
        ]);
        let handshake = receive(&text, 1, 4 << 30).await.unwrap();
        assert_eq!(handshake.mappings.len(), 2);
        assert_eq!(handshake.mappings[1].host_addr, 0x7e00_0000_0000);
    }

    #[tokio::test]
    async fn a_message_that_is_not_the_whole_memory_is_refused() {
        let half = message(&[(0x7f00_0000_0000, 1 << 20, 0)]);
        let twice = message(&[
            (0x7f00_0000_0000, 1 << 20, 0),
            (0x7e00_0000_0000, 1 << 20, 0),
        ]);
        let odd = message(&[(0x7f00_0000_0001, 2 << 20, 0)]);
        let endless = message(&[(u64::MAX - 4095, 2 << 20, 0)]);
        for text in [half, twice, odd, endless, "[]".into(), "{".into()] {
            let error = receive(&text, 1, 2 << 20).await.unwrap_err();
            assert!(matches!(error, VmmError::Handshake { .. }), "{text}");
        }
    }

    #[tokio::test]
    async fn a_message_without_its_descriptor_or_with_two_is_refused() {
        let text = message(&[(0x7f00_0000_0000, 2 << 20, 0)]);
        for descriptors in [0, 2] {
            let error = receive(&text, descriptors, 2 << 20).await.unwrap_err();
            assert!(matches!(error, VmmError::Handshake { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn whoever_is_not_the_vmm_is_turned_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pager.sock");
        let socket = HandshakeSocket::bind(&path).unwrap();
        let text = message(&[(0x7f00_0000_0000, 2 << 20, 0)]);
        let _stays_open = send(&path, &text, 1);
        let error = socket
            .receive(1, 2 << 20, Duration::from_millis(200))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("nothing came"), "{error}");
    }
}
