//! A page-fault handler of its own: serves any number of VMMs that speak the handshake.
//!
//! One thread accepts connections, gathers what came of them and tells it. All else is done by a
//! thread that each connection has (`connection`), from its handshake to the end of its VMM and
//! of its [`Pager`](crate::Pager): the server's own thread never waits for a peer, for a process's
//! end, or for a pager and its locks.
//!
//! A VMM that cannot be served any more is killed, and so are all of them when the server is
//! stopped: a guest whose userfaultfd nobody serves hangs for ever, and its VMM with it. That goes
//! for connections that are refused, too, and for those that nobody has accepted when the server
//! ends: a VMM whose userfaultfd came is killed, any other one can send it no more and learns so.
//! The exception is a VMM whose process cannot be told (see [`Peer`]): it is refused, with the
//! reason in the report, and left to whoever started it.
//!
//! A connection is accepted when there are descriptors for all that it will need. Until there are,
//! it waits, unharmed.
//!
//! Memory comes as the VMM registered it: private, without write tracking.

mod connection;
mod report;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use self::connection::{Connection, Mailbox, Note, Outcome, Slot, refused};
use self::report::Tally;
use crate::handshake::{FDS_MAX, HandshakeError, turn_away};
use crate::page_set::PageRun;
use crate::peer::Peer;
use crate::source::PageSource;
use crate::stats::Latencies;

pub use self::report::{Figures, Refusal, ServerReport, VmmReport};

/// Connections at once, from the handshake to the end of the VMM and of its pager's last thread.
/// Each takes three threads and a few descriptors.
pub const VMMS_MAX: usize = 4096;

/// Descriptors that must be free before a connection is accepted: its own, its process's, those
/// that its message brings, two of its pager's.
const FREE_FDS: usize = 8;

/// Those of them that are kept for the connection until its message is there; its pager's two have
/// room where the message's had.
const ROOM_FDS: usize = 6;

const _: () = assert!(ROOM_FDS >= FDS_MAX && FREE_FDS >= ROOM_FDS + 2);

/// How long no connection is accepted after one could not be, unless one ends earlier.
const BACK_OFF: Duration = Duration::from_secs(1);

/// How long the end of all VMMs and their pagers may take: a kill and a pager's stop take five
/// seconds each at most, unless a pager's lock is held by storage that hangs.
const ENDING_MAX: Duration = Duration::from_secs(12);

/// Connections that are turned away in one go. The kernel lets no more wait (`somaxconn`) unless
/// it is told to.
const BACKLOG_MAX: usize = 4096;

/// What a server serves.
pub struct ServerConfig {
    /// The content, for every VMM.
    pub source: Arc<dyn PageSource>,
    /// The content's length: a guest that is larger is refused.
    pub len_pages: u64,
    /// What to bring in at once.
    pub prefetch: Vec<PageRun>,
    /// After so many connections, refused ones among them, the server takes no more, and ends with
    /// the last of them; `None`: when it is stopped.
    pub connections: Option<u64>,
}

impl std::fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerConfig")
            .field("len_pages", &self.len_pages)
            .field("connections", &self.connections)
            .finish_non_exhaustive()
    }
}

/// Ends a server, from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle(Arc<OwnedFd>);

impl StopHandle {
    /// Stops the server, which kills the VMMs that it serves.
    pub fn stop(&self) {
        if let Err(error) = rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            tracing::debug!(%error, "the server was stopped already");
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Server {
    config: Arc<ServerConfig>,
    listener: UnixListener,
    /// Readable, and staying so, once the server is stopped: its own thread and those of all
    /// connections watch it.
    stop: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
    /// Connections that have a thread, by their number.
    open: HashMap<u64, Open>,
    accepted: u64,
    /// A connection could not be taken in: none is until then, or until one of ours ends.
    not_before: Option<Instant>,
    tally: Tally,
}

#[derive(Debug)]
struct Open {
    peer: Arc<Peer>,
    /// Its VMM has gone, or is being ended.
    ending: bool,
}

impl Server {
    /// A server on this socket.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(listener: UnixListener, config: ServerConfig) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            config: Arc::new(config),
            listener,
            stop: Arc::new(rustix::event::eventfd(0, flags)?),
            mailbox: Arc::new(Mailbox::new()?),
            open: HashMap::new(),
            accepted: 0,
            not_before: None,
            tally: Tally::default(),
        })
    }

    /// What ends it.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// Serves until the last of the connections has ended, or the server is stopped. `changed` is
    /// called with what has been done so far whenever VMMs have gone or were refused; what it
    /// takes long for, new connections wait for, and no VMM that is served.
    ///
    /// # Errors
    /// The socket fails while nobody is served, or the host's `poll` does. VMMs that were served
    /// have been killed.
    pub fn run(mut self, changed: &mut dyn FnMut(&ServerReport)) -> io::Result<ServerReport> {
        let served = self.serve(changed);
        self.end(changed);
        served.map(|()| self.tally.report)
    }

    fn serve(&mut self, changed: &mut dyn FnMut(&ServerReport)) -> io::Result<()> {
        while !self.is_done() {
            let ready = self.wait()?;
            if ready.stop {
                return Ok(());
            }
            let told = self.told();
            if ready.connection {
                self.accept()?;
            }
            self.take_notes();
            if self.is_full() {
                self.turn_away_waiting(|| HandshakeError::NoMore);
            }
            if self.told() != told {
                changed(&self.tally.report);
            }
        }
        Ok(())
    }

    /// How many connections the report tells of.
    fn told(&self) -> u64 {
        self.tally.report.vmms_served + self.tally.report.refused
    }

    fn is_full(&self) -> bool {
        let all = self.config.connections;
        all.is_some_and(|all| self.accepted >= all)
    }

    /// Those whose end takes long are waited for by [`Server::end`], which has a deadline.
    fn is_done(&self) -> bool {
        self.is_full() && self.open.values().all(|open| open.ending)
    }

    fn wait(&self) -> io::Result<Ready> {
        let now = Instant::now();
        let room = !self.is_full() && self.mailbox.slots_taken() < VMMS_MAX;
        let back_off = self
            .not_before
            .map(|then| then.saturating_duration_since(now))
            .filter(|left| room && !left.is_zero());
        let accepts = room && back_off.is_none();
        let mut fds = vec![
            PollFd::new(&*self.stop, PollFlags::IN),
            PollFd::new(&self.mailbox.event, PollFlags::IN),
        ];
        if accepts {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let timeout = back_off.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let said = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            stop: said(0),
            connection: said(2),
        })
    }

    /// Takes a connection in. One that cannot be waits; those that are served must not suffer for
    /// it.
    fn accept(&mut self) -> io::Result<()> {
        let Err(error) = self.take_in() else {
            return Ok(());
        };
        let over = [io::ErrorKind::WouldBlock, io::ErrorKind::ConnectionAborted];
        if over.contains(&error.kind()) {
            return Ok(());
        }
        if self.open.is_empty() {
            return Err(error);
        }
        let served = self.open.len();
        tracing::warn!(%error, served, "no more VMMs are taken for a moment");
        self.not_before = Some(Instant::now() + BACK_OFF);
        Ok(())
    }

    fn take_in(&mut self) -> io::Result<()> {
        let mut room = free_descriptors(self.stop.as_fd())?;
        room.truncate(ROOM_FDS);
        let (stream, _) = self.listener.accept()?;
        let number = self.accepted;
        self.accepted += 1;
        let peer = Peer::of(&stream).or_else(|_| {
            room.clear();
            Peer::of(&stream)
        });
        let peer = match peer {
            Ok(peer) => Arc::new(peer),
            Err(error) => {
                self.refuse_unknown(&stream, error);
                return Ok(());
            }
        };
        let stream = Arc::new(stream);
        let connection = Connection {
            number,
            stream: Arc::clone(&stream),
            peer: Arc::clone(&peer),
            config: Arc::clone(&self.config),
            stop: Arc::clone(&self.stop),
            mailbox: Arc::clone(&self.mailbox),
            slot: Slot::take(&self.mailbox),
            room,
        };
        match connection.start() {
            Ok(()) => {
                let ending = false;
                self.open.insert(number, Open { peer, ending });
            }
            Err(error) => {
                let why = turn_away(&stream, HandshakeError::Thread(error));
                self.tally.refuse(Some(peer.pid), refused(&peer, &why));
            }
        }
        Ok(())
    }

    /// Nobody can connect any more, and nobody who has connected is left waiting.
    fn turn_away_waiting(&mut self, why: impl Fn() -> HandshakeError) {
        if let Err(error) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Read) {
            tracing::warn!(%error, "the socket cannot be closed to new VMMs");
        }
        for _ in 0..BACKLOG_MAX {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                // Which of the two it is where nobody waits, the kernel's versions do not agree on.
                Err(error)
                    if [io::ErrorKind::WouldBlock, io::ErrorKind::InvalidInput]
                        .contains(&error.kind()) =>
                {
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "VMMs that came too late wait still");
                    return;
                }
            };
            match Peer::of(&stream) {
                Ok(peer) => {
                    let why = turn_away(&stream, why());
                    self.tally.refuse(Some(peer.pid), refused(&peer, &why));
                }
                Err(error) => self.refuse_unknown(&stream, error),
            }
        }
    }

    /// Refuses a peer whose process cannot be told.
    fn refuse_unknown(&mut self, stream: &UnixStream, error: io::Error) {
        let text = match turn_away(stream, HandshakeError::Socket(error)) {
            why @ HandshakeError::Unserved(_) => {
                format!("{why}; it hangs and cannot be killed: end it by hand")
            }
            why => why.to_string(),
        };
        self.tally.refuse(None, text);
    }

    fn take_notes(&mut self) {
        for note in self.mailbox.take() {
            self.not_before = None;
            match note {
                Note::Ending(number) => {
                    if let Some(open) = self.open.get_mut(&number) {
                        open.ending = true;
                    }
                }
                Note::Over(number, outcome) => {
                    let open = self.open.remove(&number);
                    match outcome {
                        Outcome::Refused(why) => {
                            self.tally.refuse(open.map(|open| open.peer.pid), why);
                        }
                        Outcome::Served(served) => {
                            self.tally
                                .add(served.report, &served.latencies, served.busy);
                        }
                    }
                }
            }
        }
    }

    /// Lets no VMM slip away. The connections' threads end theirs, all at once.
    fn end(&mut self, changed: &mut dyn FnMut(&ServerReport)) {
        self.stop_handle().stop();
        self.turn_away_waiting(|| HandshakeError::Stopped);
        let deadline = Instant::now() + ENDING_MAX;
        while !self.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(&self.mailbox.event, PollFlags::IN)];
            let timeout = Timespec::try_from(left).ok();
            if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref())
                && error != rustix::io::Errno::INTR
            {
                tracing::warn!(%error, "the VMMs' ends were not waited for");
                break;
            }
            self.take_notes();
        }
        for open in std::mem::take(&mut self.open).into_values() {
            self.give_up(&open.peer);
        }
        // There may have been too few descriptors for it before.
        self.turn_away_waiting(|| HandshakeError::Stopped);
        changed(&self.tally.report);
    }

    /// Its thread is stuck behind its pager's lock, and the figures with it.
    fn give_up(&mut self, peer: &Peer) {
        if let Err(error) = peer.kill() {
            tracing::error!(pid = peer.pid, %error, "a VMM that hangs cannot be killed");
        }
        let error = format!("its pager did not end within {ENDING_MAX:?}: its figures are lost");
        let report = VmmReport {
            pid: peer.pid,
            error: Some(error),
            figures: Figures::default(),
        };
        self.tally
            .add(report, &Latencies::default(), Duration::ZERO);
    }
}

/// What the server's wait was ended by.
struct Ready {
    stop: bool,
    connection: bool,
}

/// As many descriptors as a connection needs at most. They are there as long as these are held.
fn free_descriptors(of: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let descriptor = |_| rustix::io::fcntl_dupfd_cloexec(of, 0).map_err(io::Error::from);
    (0..FREE_FDS).map(descriptor).collect()
}
