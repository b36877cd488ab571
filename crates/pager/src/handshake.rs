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
//! The peer is not trusted: the message, how often it is parsed, the number of regions and of
//! descriptors, and the time are bounded, and the descriptor must be a userfaultfd. All that the
//! pager writes goes to the memory behind that descriptor.
//!
//! Nothing is left on a connection that is refused: no message can be sent any more, and what
//! had been sent is looked through. So it is known of each peer whether its userfaultfd came
//! ([`HandshakeError::Unserved`]): such a VMM waits already, and is to be killed. Any other one
//! learns of the refusal by its own error.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::slice;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use serde::Deserialize;

use crate::error::PagerError;
use crate::region::Region;

/// A message's length. A region takes some 150 bytes; Firecracker sends at most a handful.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Regions of one guest.
pub const REGIONS_MAX: usize = 256;

/// Descriptors that one message may bring; more than one is refused, and closed.
pub(crate) const FDS_MAX: usize = 4;

/// How often a message may look as if it were whole, and not be: a list inside it would have to
/// end just where a piece of it does, each time. Parsing then costs 4 MiB at most.
const PARSES_MAX: usize = 64;

/// Reads of what a refused peer had sent already. The kernel lets some 300 pieces wait on a socket.
const LEFT_READS_MAX: usize = 1024;

/// From the connection to the whole message. The VMM sends it at once.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// What a VMM handed over.
#[derive(Debug)]
pub struct Handshake {
    /// Its userfaultfd.
    pub uffd: OwnedFd,
    /// Its guest's memory.
    pub regions: Vec<Region>,
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
    /// Too many descriptors, or no room for them here.
    #[error("not all descriptors that the VMM's message brought could be taken")]
    LostDescriptors,
    /// Another kind of descriptor.
    #[error("the VMM's descriptor is no userfaultfd but {0}")]
    NotUserfaultfd(String),
    /// A region that cannot be served.
    #[error(transparent)]
    Region(#[from] PagerError),
    /// The pager ends.
    #[error("the pager was stopped")]
    Stopped,
    /// It serves as many VMMs as it was to.
    #[error("the pager takes no more VMMs")]
    NoMore,
    /// The host has no thread left.
    #[error("no thread could be started for the VMM: {0}")]
    Thread(io::Error),
    /// One of the others, from a VMM whose userfaultfd came (or may have): it waits already, and
    /// for ever if it is not killed.
    #[error("{0}")]
    Unserved(Box<HandshakeError>),
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

/// What has come on a connection so far.
#[derive(Debug, Default)]
struct Received {
    message: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// Some descriptor was not taken: it may have been the userfaultfd.
    lost: bool,
}

/// Receives a VMM's handshake. Gives up when `stop` can be read. `room` is let go of when the
/// message is there: descriptors for which those that it brings have room then.
///
/// # Errors
/// The peer does not keep to it. It can send nothing any more.
pub fn receive(
    stream: &UnixStream,
    stop: BorrowedFd<'_>,
    room: Vec<OwnedFd>,
) -> Result<Handshake, HandshakeError> {
    let mut received = Received::default();
    let handshake = received.whole(stream, stop, room).and_then(|regions| {
        received
            .userfaultfd()
            .map(|uffd| Handshake { uffd, regions })
    });
    handshake.map_err(|why| received.refuse(stream, why))
}

/// Refuses a connection of which nothing has been read yet. Does not wait.
pub(crate) fn turn_away(stream: &UnixStream, why: HandshakeError) -> HandshakeError {
    Received::default().refuse(stream, why)
}

impl Received {
    /// Reads until the message is whole.
    fn whole(
        &mut self,
        stream: &UnixStream,
        stop: BorrowedFd<'_>,
        mut room: Vec<OwnedFd>,
    ) -> Result<Vec<Region>, HandshakeError> {
        let started = Instant::now();
        let mut parses = 0;
        loop {
            let left = HANDSHAKE_MAX.saturating_sub(started.elapsed());
            if left.is_zero() || !wait(stream, stop, left)? {
                return Err(HandshakeError::Timeout(self.message.len()));
            }
            room.clear();
            let got = match self.read(stream) {
                Ok(0) => return Err(HandshakeError::Closed(self.message.len())),
                Ok(got) => got,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(error) => return Err(HandshakeError::Socket(error.into())),
            };
            if self.lost {
                return Err(HandshakeError::LostDescriptors);
            }
            // Nonsense is told at its first piece; any other one is parsed where it may be whole.
            let piece = &self.message[self.message.len() - got..];
            let may_be_whole = piece.trim_ascii_end().last() == Some(&b']');
            if parses > 0 && !may_be_whole && self.message.len() <= MESSAGE_BYTES_MAX {
                continue;
            }
            parses += 1;
            match parse(&self.message) {
                Err(HandshakeError::Json(error)) if error.is_eof() && parses < PARSES_MAX => {}
                regions => return regions,
            }
        }
    }

    /// Takes what is there, without waiting.
    fn read(&mut self, stream: &UnixStream) -> rustix::io::Result<usize> {
        // One byte past the limit, so that a message that is too long is seen to be.
        let mut piece = [0; 4096];
        let room = (MESSAGE_BYTES_MAX + 1).saturating_sub(self.message.len());
        let room = room.min(piece.len());
        let (got, lost) = read_some(stream, &mut piece[..room], &mut self.fds)?;
        self.lost |= lost || self.fds.len() > FDS_MAX;
        self.fds.truncate(FDS_MAX);
        self.message.extend_from_slice(&piece[..got]);
        Ok(got)
    }

    /// The descriptor, if it is one and a userfaultfd.
    fn userfaultfd(&mut self) -> Result<OwnedFd, HandshakeError> {
        userfaultfd_of(&self.fds)?;
        self.fds.pop().ok_or(HandshakeError::Descriptors(0))
    }

    /// Lets the peer send no more, and looks through what it had sent. From then on a peer whose
    /// userfaultfd has not come learns of its refusal from its own next call.
    fn refuse(mut self, stream: &UnixStream, why: HandshakeError) -> HandshakeError {
        // What fails has ended by itself.
        drop(stream.shutdown(Shutdown::Read));
        for _ in 0..LEFT_READS_MAX {
            let is_uffd = |fd| userfaultfd_of(slice::from_ref(fd)).is_ok();
            if self.lost || self.fds.iter().any(is_uffd) {
                return HandshakeError::Unserved(Box::new(why));
            }
            self.fds.clear();
            match read_some(stream, &mut [0; 4096], &mut self.fds) {
                Ok((0, false)) if self.fds.is_empty() => break,
                Ok((_, lost)) => self.lost |= lost,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        why
    }
}

/// Whether there is something to read in time.
fn wait(
    stream: &UnixStream,
    stop: BorrowedFd<'_>,
    timeout: Duration,
) -> Result<bool, HandshakeError> {
    let mut fds = [
        PollFd::new(stream, PollFlags::IN),
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
    ];
    let timeout = Timespec::try_from(timeout).ok();
    let ready = match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(ready) => ready > 0,
        Err(Errno::INTR) => true,
        Err(error) => return Err(HandshakeError::Socket(error.into())),
    };
    if !fds[1].revents().is_empty() {
        return Err(HandshakeError::Stopped);
    }
    Ok(ready)
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

/// How many bytes came, and whether a descriptor that came with them was lost: the kernel drops
/// those for which there is no room.
fn read_some(
    stream: &UnixStream,
    piece: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> rustix::io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(piece)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(stream, &mut buffers, &mut beside, flags)?;
    for item in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = item {
            fds.extend(descriptors);
        }
    }
    Ok((got.bytes, got.flags.contains(ReturnFlags::CTRUNC)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uffd::Uffd;
    use proptest::prelude::*;
    use rustix::event::EventfdFlags;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    use std::io::{IoSlice, Write as _};
    use std::os::fd::AsFd as _;
    use std::thread::JoinHandle;

    const REGION: &str = "{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0}";

    /// Sends these bytes, and these descriptors beside them.
    fn send(stream: &UnixStream, bytes: &str, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        assert!(beside.push(SendAncillaryMessage::ScmRights(fds)));
        let bytes = [IoSlice::new(bytes.as_bytes())];
        rustix::net::sendmsg(stream, &bytes, &mut beside, SendFlags::empty()).unwrap();
    }

    /// What comes of a connection on which this is sent.
    fn received(
        sends: impl FnOnce(&mut UnixStream) + Send + 'static,
    ) -> Result<Handshake, HandshakeError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // A thread, and a stream that stays: what is sent is not read while it is being sent.
        let sender: JoinHandle<UnixStream> = std::thread::spawn(move || {
            sends(&mut theirs);
            theirs
        });
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let received = receive(&ours, stop.as_fd(), Vec::new());
        drop(sender.join().unwrap());
        received
    }

    fn is_unserved(received: &Result<Handshake, HandshakeError>) -> bool {
        matches!(received, Err(HandshakeError::Unserved(_)))
    }

    #[test]
    fn a_userfaultfd_that_is_lost_among_too_many_descriptors_is_not_overlooked() {
        let at_once = received(|stream| {
            let (null, uffd) = (std::fs::File::open("/dev/null").unwrap(), Uffd::create());
            let (null, uffd) = (null.as_fd(), uffd.unwrap());
            let fds = [null, null, null, null, uffd.as_fd()];
            send(stream, &format!("[{REGION}]"), &fds);
        });
        assert!(is_unserved(&at_once), "{at_once:?}");
        let one_by_one = received(|stream| {
            let (null, uffd) = (std::fs::File::open("/dev/null").unwrap(), Uffd::create());
            for _ in 0..4 {
                send(stream, " ", &[null.as_fd()]);
            }
            send(stream, &format!("[{REGION}]"), &[uffd.unwrap().as_fd()]);
        });
        assert!(is_unserved(&one_by_one), "{one_by_one:?}");
    }

    #[test]
    fn a_userfaultfd_behind_what_cannot_be_understood_is_not_overlooked() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(b"no list").unwrap();
        send(&theirs, "[]", &[Uffd::create().unwrap().as_fd()]);
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let received = receive(&ours, stop.as_fd(), Vec::new());
        assert!(is_unserved(&received), "{received:?}");
    }

    #[test]
    fn a_peer_that_is_turned_away_can_send_no_more_and_what_it_had_sent_counts() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let refused = turn_away(&ours, HandshakeError::NoMore);
        assert!(matches!(refused, HandshakeError::NoMore));
        assert!((&theirs).write_all(b"[").is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let uffd = Uffd::create().unwrap();
        send(&theirs, &format!("[{REGION}]"), &[uffd.as_fd()]);
        let refused = turn_away(&ours, HandshakeError::NoMore);
        assert!(matches!(refused, HandshakeError::Unserved(_)));
    }

    #[test]
    fn a_handshake_under_way_ends_when_the_pager_is_stopped() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let stop = rustix::event::eventfd(1, EventfdFlags::CLOEXEC).unwrap();
        let received = receive(&ours, stop.as_fd(), Vec::new());
        assert!(matches!(received, Err(HandshakeError::Stopped)));
    }

    #[test]
    fn a_message_that_might_be_whole_at_each_of_its_pieces_is_parsed_a_few_times_only() {
        // More than enough, for a receiver that finds several at once.
        let lists = PARSES_MAX * 100;
        let refused = received(move |stream| {
            drop(stream.write_all(b"[{\"new\":[[]"));
            for _ in 0..lists {
                // Until it is refused; each piece by itself, as a write may find the last one unread.
                std::thread::sleep(Duration::from_millis(1));
                if stream.write_all(b",[]").is_err() {
                    return;
                }
            }
            drop(stream.write_all(b"]}]"));
        });
        let Err(HandshakeError::Json(error)) = refused else {
            panic!("{refused:?}");
        };
        assert!(error.is_eof());
    }

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

    /// Or one VMM could end the pager of all.
    #[test]
    fn a_message_nested_as_deep_as_it_can_be_fits_a_threads_stack() {
        for nested in ["[{\"new\":", "", "[{\"size\":"] {
            let mut message = nested.to_owned();
            message.extend(std::iter::repeat_n('[', MESSAGE_BYTES_MAX - nested.len()));
            let parsed = std::thread::Builder::new()
                .stack_size(crate::threads::STACK_BYTES)
                .spawn(move || parse(message.as_bytes()).is_err())
                .unwrap();
            assert!(parsed.join().unwrap());
        }
    }

    proptest! {
        #[test]
        fn a_message_means_the_same_in_pieces(
            lists in 0_usize..4, spaces in 0_usize..4, piece_bytes in 1_usize..80,
        ) {
            let new = vec!["[ ]"; lists].join(",");
            let spaces = " ".repeat(spaces);
            let region = REGION.replace('}', &format!(",\"new\":[{new}]}}"));
            let message = format!("[{region}, {REGION}]{spaces}");
            let (ours, theirs) = UnixStream::pair().unwrap();
            let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let expected = parse(message.as_bytes()).unwrap();
            let sender = std::thread::spawn(move || {
                for piece in message.as_bytes().chunks(piece_bytes) {
                    // Spaces behind the message find nobody who reads them.
                    drop((&theirs).write_all(piece));
                }
                theirs
            });
            let found = Received::default().whole(&ours, stop.as_fd(), Vec::new()).unwrap();
            prop_assert_eq!(found, expected);
            drop(ours);
            drop(sender.join().unwrap());
        }

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
