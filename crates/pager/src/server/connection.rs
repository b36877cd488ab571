//! One connection's thread: the handshake, then the wait for its VMM's end, then that end.
//!
//! ```text
//! greet ─▶ wait (VMM gone, pager gives up, server stopped) ─▶ kill, figures, stop the pager
//!   └─▶ refused; killed if its userfaultfd came
//! ```
//!
//! Whatever here takes long (a peer that stalls, a pager whose storage hangs) takes this thread's
//! time only. It needs nothing from the server to see an end through, least of all a new thread.
//! It tells the server that the end has begun, and what came of it: two notes, then no more.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{io, mem};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::io::Errno;

use super::ServerConfig;
use super::report::{Figures, VmmReport};
use crate::error::PagerError;
use crate::failure::FailureSignal;
use crate::handshake::{Handshake, HandshakeError, receive};
use crate::kernel::Backing;
use crate::page_set::{PAGE_SIZE_U64, PageRun};
use crate::pager::{Pager, PagerConfig};
use crate::peer::Peer;
use crate::region::Region;
use crate::source::{Content, PageSource, SourceRun};
use crate::stats::Latencies;
use crate::threads::STACK_BYTES;
use crate::uffd::Uffd;

/// What a connection's thread tells the server.
#[derive(Debug)]
pub(super) enum Note {
    /// Its VMM's end has begun.
    Ending(u64),
    /// It is over.
    Over(u64, Outcome),
}

/// What came of a connection.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It was not served, and why.
    Refused(String),
    /// Its VMM was served and has gone.
    Served(Box<Served>),
}

/// How a VMM was served.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) report: VmmReport,
    pub(super) latencies: Latencies,
    /// From the handshake to the last page that was installed.
    pub(super) busy: Duration,
}

/// Where connections' threads leave their notes: two for each slot at most.
#[derive(Debug)]
pub(super) struct Mailbox {
    notes: Mutex<Vec<Note>>,
    slots: AtomicUsize,
    /// Readable when there is news: a note, or a slot that has become free.
    pub(super) event: OwnedFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            notes: Mutex::default(),
            slots: AtomicUsize::new(0),
            event: rustix::event::eventfd(0, flags)?,
        })
    }

    fn post(&self, note: Note) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push(note);
        self.ring();
    }

    fn ring(&self) {
        if let Err(error) = rustix::io::write(&self.event, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "the server cannot be told of a VMM");
        }
    }

    /// What has been left since the last call.
    pub(super) fn take(&self) -> Vec<Note> {
        match rustix::io::read(&self.event, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "news of VMMs cannot be read"),
        }
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        mem::take(&mut *notes)
    }

    /// Connections whose thread, or one of whose pager's, is there.
    pub(super) fn slots_taken(&self) -> usize {
        self.slots.load(Ordering::Acquire)
    }
}

/// A connection's place among those that a server may have. Threads that a pager had to leave
/// behind, stuck in its storage, keep it: there is no bound on them otherwise.
#[derive(Debug)]
pub(super) struct Slot(Arc<Mailbox>);

impl Slot {
    pub(super) fn take(mailbox: &Arc<Mailbox>) -> Self {
        mailbox.slots.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(mailbox))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.slots.fetch_sub(1, Ordering::AcqRel);
        self.0.ring();
    }
}

/// What is served, as one pager sees it: gone when the last of its threads has.
struct SlottedSource {
    source: Arc<dyn PageSource>,
    _slot: Slot,
}

impl PageSource for SlottedSource {
    fn run_at(&self, page: u64) -> SourceRun {
        self.source.run_at(page)
    }

    fn read(&self, first_page: u64, buf: &mut [u8]) -> io::Result<()> {
        self.source.read(first_page, buf)
    }

    fn at_hand<'a>(&'a self, run: PageRun, buf: &'a mut [u8]) -> Option<Content<'a>> {
        self.source.at_hand(run, buf)
    }

    fn block_pages(&self) -> u64 {
        self.source.block_pages()
    }
}

/// A connection that has been accepted.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) number: u64,
    pub(super) stream: Arc<UnixStream>,
    pub(super) peer: Arc<Peer>,
    pub(super) config: Arc<ServerConfig>,
    /// Readable once the server is stopped.
    pub(super) stop: Arc<OwnedFd>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) slot: Slot,
    /// Descriptors that make room for those that the connection will need.
    pub(super) room: Vec<OwnedFd>,
}

/// A VMM that is being served.
struct Vmm {
    pager: Pager,
    failure: FailureSignal,
    since: Instant,
}

impl Connection {
    /// Sees the connection through on a thread of its own.
    pub(super) fn start(self) -> io::Result<()> {
        let (number, mailbox) = (self.number, Arc::clone(&self.mailbox));
        let body = move || {
            let peer = Arc::clone(&self.peer);
            let outcome = or_killed(&peer, || self.attend());
            mailbox.post(Note::Over(number, outcome));
        };
        let thread = std::thread::Builder::new().name("pager-vmm".to_owned());
        thread.stack_size(STACK_BYTES).spawn(body).map(drop)
    }

    fn attend(self) -> Outcome {
        let Self {
            number,
            stream,
            peer,
            config,
            stop,
            mailbox,
            slot,
            room,
        } = self;
        let handshake = receive(&stream, stop.as_fd(), room);
        drop(stream);
        let handshake = match handshake {
            Ok(handshake) => handshake,
            Err(why) => return Outcome::Refused(refused(&peer, &why)),
        };
        let source = SlottedSource {
            source: Arc::clone(&config.source),
            _slot: slot,
        };
        let vmm = match serve(handshake, Arc::new(source), &config) {
            Ok(vmm) => vmm,
            Err(why) => return Outcome::Refused(killed(&peer, &why)),
        };
        let stopped = vmm.wait(&peer, &stop);
        mailbox.post(Note::Ending(number));
        let failure = vmm.failure.get().map(|failure| failure.to_string());
        Outcome::Served(Box::new(vmm.end(&peer, failure.or(stopped))))
    }
}

/// Starts the pager.
fn serve(
    handshake: Handshake,
    source: Arc<dyn PageSource>,
    config: &ServerConfig,
) -> Result<Vmm, PagerError> {
    let since = Instant::now();
    let Handshake { uffd, regions } = handshake;
    let end = |region: &Region| region.guest_offset_bytes + region.len_bytes;
    let guest_bytes = regions.iter().map(end).max().unwrap_or(0);
    if guest_bytes.div_ceil(PAGE_SIZE_U64) > config.len_pages {
        return Err(PagerError::Config(
            "the guest's memory is larger than what it is to be served from",
        ));
    }
    let mut pager = PagerConfig::new(Uffd::from_fd(uffd)?, regions, source, Backing::Anonymous);
    pager.prefetch.clone_from(&config.prefetch);
    let pager = Pager::start(pager)?;
    Ok(Vmm {
        failure: pager.failure(),
        pager,
        since,
    })
}

impl Vmm {
    /// Waits until the VMM has gone or has to go. Returns why, where it is not its own doing or
    /// its pager's.
    fn wait(&self, peer: &Peer, stop: &OwnedFd) -> Option<String> {
        // It had gone before it was looked at.
        let gone = peer.pidfd()?;
        let watched = [gone.as_fd(), self.failure.as_fd(), stop.as_fd()];
        let mut fds = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        loop {
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Some(format!("the VMM could not be watched: {error}")),
            }
        }
        let [gone, failed, stopped] = fds.each_ref().map(|fd| !fd.revents().is_empty());
        (stopped && !gone && !failed).then(|| HandshakeError::Stopped.to_string())
    }

    fn end(self, peer: &Peer, why: Option<String>) -> Served {
        if let Some(why) = &why {
            tracing::error!(pid = peer.pid, why, "the VMM is killed");
            peer.kill_and_wait();
        }
        let stats = self.pager.stats();
        let latencies = self.pager.latencies();
        let busy = self.pager.last_install().map_or(Duration::ZERO, |last| {
            last.saturating_duration_since(self.since)
        });
        if let Err(error) = self.pager.shutdown() {
            tracing::error!(%error, pid = peer.pid, "a VMM's pager");
        }
        let report = VmmReport {
            pid: peer.pid,
            error: why,
            figures: Figures::of(&stats, &latencies, busy),
        };
        Served {
            report,
            latencies,
            busy,
        }
    }
}

/// Kills the VMM if what sees to it panics: nobody would serve it.
fn or_killed(peer: &Peer, body: impl FnOnce() -> Outcome) -> Outcome {
    std::panic::catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|_| Outcome::Refused(killed(peer, &"the thread that saw to it panicked")))
}

/// What to tell of a connection that is refused. A VMM whose userfaultfd came is killed: it waits
/// already. Any other one learns of it by the connection's end. Waits for neither.
pub(super) fn refused(peer: &Peer, why: &HandshakeError) -> String {
    match why {
        HandshakeError::Unserved(_) => killed(peer, why),
        _ => why.to_string(),
    }
}

/// Ends a VMM that was taken in too far to go on by itself. Returns what to tell of it.
fn killed(peer: &Peer, why: &dyn std::fmt::Display) -> String {
    let pid = peer.pid;
    match peer.kill() {
        Ok(()) => format!("{why}; its process {pid} was killed"),
        Err(error) => format!("{why}; its process {pid} hangs and cannot be killed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::SourceKind;
    use std::os::unix::net::UnixListener;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};

    const ROLE: &str = "TORPOR_TEST_CONNECTION_ROLE";

    struct Zeros;

    impl PageSource for Zeros {
        fn run_at(&self, _page: u64) -> SourceRun {
            SourceRun {
                pages: 1,
                kind: SourceKind::Zero,
            }
        }

        fn read(&self, _first_page: u64, _buf: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slot_is_taken_until_the_last_thread_has_let_go_of_the_source() {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let source = Arc::new(SlottedSource {
            source: Arc::new(Zeros),
            _slot: Slot::take(&mailbox),
        });
        let left_behind = Arc::clone(&source);
        drop(source);
        assert_eq!(mailbox.slots_taken(), 1);
        drop(left_behind);
        assert_eq!(mailbox.slots_taken(), 0);
        // And the server learns of it.
        let mut fds = [PollFd::new(&mailbox.event, PollFlags::IN)];
        let at_once = rustix::event::Timespec::default();
        assert_eq!(rustix::event::poll(&mut fds, Some(&at_once)), Ok(1));
        assert!(mailbox.take().is_empty());
    }

    /// Not a test: a process that connects and stays.
    #[test]
    fn connected_role() {
        if let Ok(path) = std::env::var(ROLE) {
            let _stream = UnixStream::connect(path).unwrap();
            std::io::stdin().lines().for_each(drop);
        }
    }

    #[test]
    fn a_vmm_whose_thread_panics_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let role = "server::connection::tests::connected_role";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", role, "--nocapture"])
            .env(ROLE, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let peer = Peer::of(&listener.accept().unwrap().0).unwrap();
        let Outcome::Refused(why) = or_killed(&peer, || panic!("on purpose")) else {
            panic!("it was served");
        };
        assert!(
            why.contains("panicked") && why.contains("was killed"),
            "{why}"
        );
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
