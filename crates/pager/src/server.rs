//! A page-fault handler of its own: serves any number of VMMs that speak the handshake.
//!
//! One thread waits for connections, for VMMs that end and for pagers that give up; each VMM has
//! its [`Pager`], and each handshake a thread for as long as it takes, so that a peer that stalls
//! keeps nobody waiting.
//!
//! A VMM that cannot be served any more is killed, and so are all of them when the server is
//! stopped: a guest whose userfaultfd nobody serves hangs for ever, and its VMM with it.
//!
//! Memory comes as the VMM registered it: private, without write tracking.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use serde::Serialize;

use crate::error::PagerError;
use crate::handshake::{HANDSHAKE_MAX, Handshake, HandshakeError, Peer, receive};
use crate::kernel::Backing;
use crate::page_set::{PAGE_SIZE_U64, PageRun};
use crate::pager::{Pager, PagerConfig};
use crate::source::PageSource;
use crate::stats::{Latencies, PagerStats};
use crate::uffd::Uffd;

/// VMMs and handshakes at once. Each takes two threads and a few descriptors.
pub const VMMS_MAX: usize = 4096;

/// VMMs whose figures a report tells one by one, the last ones; all are in its sums.
const REPORTED_MAX: usize = 1024;

/// How long a VMM that was killed may take to go.
const KILL_MAX: Duration = Duration::from_secs(5);

/// What a server serves.
pub struct ServerConfig {
    /// The content, for every VMM.
    pub source: Arc<dyn PageSource>,
    /// The content's length: a guest that is larger is refused.
    pub len_pages: u64,
    /// What to bring in at once.
    pub prefetch: Vec<PageRun>,
    /// After so many VMMs the server ends; `None`: when it is stopped.
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

/// The figures of one VMM, or of all of them together.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Page faults answered.
    pub faults: u64,
    /// Pages installed with content.
    pub pages_copied: u64,
    /// Pages installed as zeros.
    pub pages_zeroed: u64,
    /// Pages that were brought in ahead.
    pub pages_prefetched: u64,
    /// Discards.
    pub removes: u64,
    /// Pages that they covered.
    pub pages_removed: u64,
    /// Times that the kernel put an operation off because of a discard under way.
    pub eagain: u64,
    /// Half of the faults were answered within this time.
    pub p50_us: u64,
    /// 99 of 100 were.
    pub p99_us: u64,
    /// All were.
    pub max_us: u64,
    /// Bytes installed, over the time from the handshake to the last of them.
    pub bytes_per_s: u64,
}

/// How one VMM was served.
#[derive(Clone, Debug, Serialize)]
pub struct VmmReport {
    /// Its process.
    pub pid: i32,
    /// Why it had to be given up, if it had.
    pub error: Option<String>,
    /// What was done for it.
    #[serde(flatten)]
    pub figures: Figures,
}

/// What a server has done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ServerReport {
    /// All VMMs together.
    #[serde(flatten)]
    pub figures: Figures,
    /// VMMs that were served and have gone.
    pub vmms_served: u64,
    /// Those of them that had to be given up.
    pub vmms_failed: u64,
    /// Connections whose handshake was refused.
    pub refused: u64,
    /// The last of the VMMs.
    pub vmms: VecDeque<VmmReport>,
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
    config: ServerConfig,
    listener: UnixListener,
    stop: Arc<OwnedFd>,
    arrived: Arc<Arrivals>,
    vmms: Vec<Vmm>,
    /// Connections whose handshake is under way, by their number.
    handshakes: HashMap<u64, UnixStream>,
    accepted: u64,
    /// No descriptors were left for a connection; until one of ours ends, none is taken.
    exhausted: bool,
    latencies: Latencies,
    busy: Duration,
    report: ServerReport,
}

/// Where handshake threads leave what they got.
#[derive(Debug)]
struct Arrivals {
    queue: Mutex<Vec<(u64, Result<Vmm, String>)>>,
    event: OwnedFd,
}

#[derive(Debug)]
struct Vmm {
    peer: Peer,
    pager: Pager,
    failure: crate::FailureSignal,
    since: Instant,
}

/// Who the server's wait was ended by.
struct Ready {
    stop: bool,
    connection: bool,
    /// Indices of VMMs that have gone or failed, the last first.
    vmms: Vec<usize>,
}

impl Server {
    /// A server on this socket.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(listener: UnixListener, config: ServerConfig) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            config,
            listener,
            stop: Arc::new(event()?),
            arrived: Arc::new(Arrivals {
                queue: Mutex::default(),
                event: event()?,
            }),
            vmms: Vec::new(),
            handshakes: HashMap::new(),
            accepted: 0,
            exhausted: false,
            latencies: Latencies::default(),
            busy: Duration::ZERO,
            report: ServerReport::default(),
        })
    }

    /// What ends it.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// Serves until the last of the connections has ended, or the server is stopped. `gone` is
    /// called with what has been done so far whenever a VMM has gone.
    ///
    /// # Errors
    /// The socket fails. VMMs that were served have been killed.
    pub fn run(mut self, gone: &mut dyn FnMut(&ServerReport)) -> io::Result<ServerReport> {
        let served = self.serve(gone);
        self.end_handshakes();
        let vmms = std::mem::take(&mut self.vmms);
        // All at once: a large memory takes a while to go.
        for vmm in &vmms {
            if let Err(error) = vmm.peer.kill() {
                tracing::error!(pid = vmm.peer.pid, %error, "a VMM that hangs cannot be killed");
            }
        }
        for vmm in vmms {
            self.end(vmm, Some("the pager was stopped".to_owned()));
            gone(&self.report);
        }
        served.map(|()| self.report)
    }

    fn serve(&mut self, gone: &mut dyn FnMut(&ServerReport)) -> io::Result<()> {
        while !self.is_done() {
            let ready = self.wait()?;
            if ready.stop {
                return Ok(());
            }
            if ready.connection {
                self.accept()?;
            }
            self.take_arrivals();
            for index in ready.vmms {
                let vmm = self.vmms.swap_remove(index);
                let why = vmm.failure.get().map(|failure| failure.to_string());
                self.end(vmm, why);
                gone(&self.report);
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let all = self
            .config
            .connections
            .is_some_and(|all| self.accepted >= all);
        all && self.vmms.is_empty() && self.handshakes.is_empty()
    }

    fn wants_connections(&self) -> bool {
        let more = self
            .config
            .connections
            .is_none_or(|all| self.accepted < all);
        more && !self.exhausted && self.vmms.len() + self.handshakes.len() < VMMS_MAX
    }

    fn wait(&self) -> io::Result<Ready> {
        let listener = self.wants_connections().then(|| self.listener.as_fd());
        let fixed = [
            Some(self.stop.as_fd()),
            Some(self.arrived.event.as_fd()),
            listener,
        ];
        let of_vmms = self.vmms.iter().flat_map(|vmm| {
            let pidfd = vmm.peer.pidfd().map(OwnedFd::as_fd);
            [pidfd, Some(vmm.failure.as_fd())]
        });
        let watched: Vec<Option<BorrowedFd<'_>>> = fixed.into_iter().chain(of_vmms).collect();
        let mut fds: Vec<PollFd<'_>> = watched
            .iter()
            .flatten()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut answers = fds.iter().map(|fd| !fd.revents().is_empty());
        // A VMM without a pidfd had ended when it was asked for: ready at once.
        let said: Vec<bool> = watched
            .iter()
            .map(|fd| fd.is_none_or(|_| answers.next().unwrap_or(false)))
            .collect();
        let (fixed, of_vmms) = said.split_at(fixed.len());
        let ended = of_vmms.chunks(2).enumerate();
        Ok(Ready {
            stop: fixed[0],
            connection: fixed[2] && listener.is_some(),
            vmms: ended
                .rev()
                .filter(|(_, said)| said.iter().any(|said| *said))
                .map(|(index, _)| index)
                .collect(),
        })
    }

    fn accept(&mut self) -> io::Result<()> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // The peer's doing, or over in a moment.
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => return Ok(()),
            Err(error) => return self.out_of_descriptors(error),
        };
        match self.begin_handshake(stream) {
            Ok(()) => Ok(()),
            Err(error) => self.out_of_descriptors(error),
        }
    }

    /// A connection could not be taken in. Those that are served must not suffer for it.
    fn out_of_descriptors(&mut self, error: io::Error) -> io::Result<()> {
        let passes = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EAGAIN];
        let ours = self.vmms.len() + self.handshakes.len();
        if ours == 0 || !error.raw_os_error().is_some_and(|e| passes.contains(&e)) {
            return Err(error);
        }
        tracing::warn!(%error, served = ours, "no more VMMs are taken until one has gone");
        self.exhausted = true;
        Ok(())
    }

    fn begin_handshake(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let (source, arrived) = (Arc::clone(&self.config.source), Arc::clone(&self.arrived));
        let (len_pages, prefetch) = (self.config.len_pages, self.config.prefetch.clone());
        let number = self.accepted;
        let kept = stream.try_clone()?;
        std::thread::Builder::new()
            .name("pager-greets".to_owned())
            .spawn(move || {
                let vmm = greet(&stream, source, len_pages, prefetch);
                let mut queue = arrived.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.push((number, vmm));
                if let Err(error) = rustix::io::write(&arrived.event, &1_u64.to_ne_bytes()) {
                    tracing::error!(%error, "the server cannot be told of a VMM");
                }
            })?;
        self.handshakes.insert(number, kept);
        self.accepted += 1;
        Ok(())
    }

    fn take_arrivals(&mut self) {
        let mut count = [0; 8];
        if rustix::io::read(&self.arrived.event, &mut count).is_err() {
            return;
        }
        let arrived = {
            let queue = self.arrived.queue.lock();
            std::mem::take(&mut *queue.unwrap_or_else(PoisonError::into_inner))
        };
        for (number, vmm) in arrived {
            self.handshakes.remove(&number);
            self.exhausted = false;
            match vmm {
                Ok(vmm) => self.vmms.push(vmm),
                Err(why) => {
                    tracing::warn!(why, "a VMM was refused");
                    self.report.refused += 1;
                }
            }
        }
    }

    /// Lets no VMM slip away whose handshake is just being done: it would hang for ever.
    fn end_handshakes(&mut self) {
        for stream in self.handshakes.values() {
            // One that has ended by itself needs no end.
            drop(stream.shutdown(std::net::Shutdown::Read));
        }
        let deadline = Instant::now() + HANDSHAKE_MAX;
        while !self.handshakes.is_empty() && Instant::now() < deadline {
            let mut fds = [PollFd::new(&self.arrived.event, PollFlags::IN)];
            let timeout = rustix::event::Timespec::try_from(HANDSHAKE_MAX).ok();
            if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref()) {
                tracing::warn!(%error, "handshakes were not waited for");
            }
            self.take_arrivals();
        }
    }

    /// The VMM has gone, or has to go.
    fn end(&mut self, vmm: Vmm, why: Option<String>) {
        if let Some(why) = &why {
            tracing::error!(pid = vmm.peer.pid, why, "the VMM is killed");
            kill(&vmm.peer);
        }
        let stats = vmm.pager.stats();
        let latencies = vmm.pager.latencies();
        let busy = vmm.pager.last_install().map_or(Duration::ZERO, |last| {
            last.saturating_duration_since(vmm.since)
        });
        if let Err(error) = vmm.pager.shutdown() {
            tracing::error!(%error, "a VMM's pager");
        }
        self.exhausted = false;
        let report = VmmReport {
            pid: vmm.peer.pid,
            error: why,
            figures: Figures::of(&stats, &latencies, busy),
        };
        self.add(report, &latencies, busy);
    }

    fn add(&mut self, report: VmmReport, latencies: &Latencies, busy: Duration) {
        self.latencies.add(latencies);
        self.busy += busy;
        self.report.vmms_served += 1;
        self.report.vmms_failed += u64::from(report.error.is_some());
        let (all, one) = (&mut self.report.figures, &report.figures);
        all.faults += one.faults;
        all.pages_copied += one.pages_copied;
        all.pages_zeroed += one.pages_zeroed;
        all.pages_prefetched += one.pages_prefetched;
        all.removes += one.removes;
        all.pages_removed += one.pages_removed;
        all.eagain += one.eagain;
        all.set_times(&self.latencies, self.busy);
        if self.report.vmms.len() >= REPORTED_MAX {
            self.report.vmms.pop_front();
        }
        self.report.vmms.push_back(report);
    }
}

/// Does the handshake and starts the pager. A peer that spoke wrongly is told by the end of its
/// connection; one whose memory cannot be served is killed, since it waits already.
fn greet(
    stream: &UnixStream,
    source: Arc<dyn PageSource>,
    len_pages: u64,
    prefetch: Vec<PageRun>,
) -> Result<Vmm, String> {
    let Handshake {
        uffd,
        regions,
        peer,
    } = match receive(stream) {
        Ok(handshake) => handshake,
        Err(HandshakeError::Unserved { peer, why }) => return Err(kill_unserved(&peer, &*why)),
        Err(error) => return Err(error.to_string()),
    };
    let since = Instant::now();
    let end = |region: &crate::Region| region.guest_offset_bytes + region.len_bytes;
    let guest_bytes = regions.iter().map(end).max().unwrap_or(0);
    let started = if guest_bytes.div_ceil(PAGE_SIZE_U64) > len_pages {
        Err(PagerError::Config(
            "the guest's memory is larger than what it is to be served from",
        ))
    } else {
        Uffd::from_fd(uffd).and_then(|uffd| {
            let mut config = PagerConfig::new(uffd, regions, source, Backing::Anonymous);
            config.prefetch = prefetch;
            Pager::start(config)
        })
    };
    match started {
        Ok(pager) => Ok(Vmm {
            failure: pager.failure(),
            peer,
            pager,
            since,
        }),
        Err(error) => Err(kill_unserved(&peer, &error)),
    }
}

/// Ends a VMM that was taken in too far to go on by itself. Returns what to tell of it.
fn kill_unserved(peer: &Peer, why: &dyn std::error::Error) -> String {
    kill(peer);
    format!("{why}; its process {} was killed", peer.pid)
}

/// Kills a process and waits until its memory has gone.
fn kill(peer: &Peer) {
    if let Err(error) = peer.kill() {
        tracing::error!(pid = peer.pid, %error, "a VMM that hangs cannot be killed");
        return;
    }
    let Some(pidfd) = peer.pidfd() else { return };
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(KILL_MAX).ok();
    if let Err(error) = rustix::event::poll(&mut fds, timeout.as_ref()) {
        tracing::warn!(pid = peer.pid, %error, "a VMM's end was not waited for");
    }
}

impl Figures {
    fn of(stats: &PagerStats, latencies: &Latencies, busy: Duration) -> Self {
        let mut figures = Self {
            faults: stats.faults,
            pages_copied: stats.pages_copied,
            pages_zeroed: stats.pages_zeroed,
            pages_prefetched: stats.pages_prefetched,
            removes: stats.removes,
            pages_removed: stats.pages_removed,
            eagain: stats.eagain,
            ..Self::default()
        };
        figures.set_times(latencies, busy);
        figures
    }

    fn set_times(&mut self, latencies: &Latencies, busy: Duration) {
        (self.p50_us, self.p99_us, self.max_us) = latencies.quantiles();
        let bytes = u128::from(self.pages_copied + self.pages_zeroed) * u128::from(PAGE_SIZE_U64);
        let per_s = bytes * 1_000_000 / busy.as_micros().max(1);
        self.bytes_per_s = u64::try_from(per_s).unwrap_or(u64::MAX);
    }
}
