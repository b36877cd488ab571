//! The guest's end of the agent channel as two queues.
//!
//! Two threads that block, not epoll: a virtio-serial port without a host says POLLHUP for ever,
//! which no event loop can sleep on. Blocking, the kernel does what is wanted: a read sleeps until
//! bytes come, a write until a host is there to take them. Only a read without a host returns at
//! once (as end of file): then the reader looks again every [`NO_HOST_PAUSE`].
//!
//! A VMM without virtio-serial has a vsock instead ([`vsock`]).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use envd_api::AGENT_PORT_NAME;
use envd_api::link::{PortEvent, QUEUE_PACKETS, READ_BYTES, RawPort};
use tokio::sync::mpsc;

use crate::console::say;
use crate::vsock;

/// How long the reader sleeps while no host is connected. Part of the latency of a new host's first
/// answer, where the VMM did not keep the port connected.
const NO_HOST_PAUSE: Duration = Duration::from_millis(5);

/// How long the port may take to appear: its driver has just been loaded.
const PORT_DEADLINE: Duration = Duration::from_secs(20);

const PORT_POLL: Duration = Duration::from_millis(5);

/// Stack of a thread that copies bytes, beside its buffer on the heap.
const STACK_BYTES: usize = 64 * 1024;

/// Where the host is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    /// Behind the virtio-serial port of that name, or else the machine's vsock: hosts come and go,
    /// the port stays.
    Agent,
    /// Behind a socket that we inherited: its end is the end.
    Inherited(i32),
}

/// Opens the port and serves it with two threads.
pub(crate) fn open(source: Source) -> io::Result<RawPort> {
    let (incoming_tx, incoming) = mpsc::channel(QUEUE_PACKETS);
    let (outgoing, outgoing_rx) = mpsc::channel(QUEUE_PACKETS);
    let (file, stays) = match source {
        Source::Agent => match open_agent()? {
            Agent::Port(file) => (file, true),
            Agent::Vsock(listener) => {
                let writer = listener.writer();
                spawn("port-read", move || listener.read(&incoming_tx))?;
                spawn("port-write", move || writer.write(outgoing_rx))?;
                return Ok(RawPort { incoming, outgoing });
            }
        },
        Source::Inherited(fd) => (inherited(fd)?, false),
    };
    let writer = file.try_clone()?;
    spawn("port-read", move || read(file, stays, &incoming_tx))?;
    spawn("port-write", move || write(writer, stays, outgoing_rx))?;
    Ok(RawPort { incoming, outgoing })
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES);
    builder.spawn(body).map(|_detached| ())
}

fn inherited(fd: i32) -> io::Result<File> {
    nix::fcntl::fcntl(
        // SAFETY: borrowed for this call alone, which fails with EBADF if nothing is open there.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )?;
    // SAFETY: open, as the call above has shown, and named on our command line as ours to own.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Where this machine has its agent's channel.
enum Agent {
    Port(File),
    Vsock(vsock::Listener),
}

fn open_agent() -> io::Result<Agent> {
    let began = Instant::now();
    loop {
        if let Some(device) = find_agent() {
            let port = OpenOptions::new().read(true).write(true).open(device);
            return port.map(Agent::Port);
        }
        if vsock::is_there() {
            return vsock::Listener::open().map(Agent::Vsock);
        }
        if began.elapsed() > PORT_DEADLINE {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "no virtio-serial port named {AGENT_PORT_NAME} below /sys/class/virtio-ports and \
                     no vsock: the VMM gives none, or the kernel lacks virtio_console or \
                     vmw_vsock_virtio_transport"
                ),
            ));
        }
        thread::sleep(PORT_POLL);
    }
}

/// Without udev the port's name is only in sysfs: `/sys/class/virtio-ports/vport1p1/name`.
fn find_agent() -> Option<PathBuf> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|port| {
        let name = std::fs::read_to_string(port.path().join("name")).ok()?;
        let device = PathBuf::from("/dev").join(port.file_name());
        (name.trim() == AGENT_PORT_NAME && device.exists()).then_some(device)
    })
}

fn read(mut port: File, stays: bool, incoming: &mpsc::Sender<PortEvent>) {
    let mut buf = vec![0; READ_BYTES];
    let mut connected = false;
    loop {
        let event = match port.read(&mut buf) {
            Ok(0) if !stays => return,
            Ok(0) if !connected => {
                thread::sleep(NO_HOST_PAUSE);
                continue;
            }
            Ok(0) => PortEvent::PeerGone,
            Ok(len) => PortEvent::Bytes(Bytes::copy_from_slice(&buf[..len])),
            Err(error) if passes(&error) => {
                thread::sleep(NO_HOST_PAUSE);
                continue;
            }
            Err(error) => {
                say(&format!("envd: the agent port cannot be read: {error}"));
                return;
            }
        };
        connected = matches!(event, PortEvent::Bytes(_));
        if incoming.blocking_send(event).is_err() {
            return;
        }
    }
}

fn write(mut port: File, stays: bool, mut outgoing: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = outgoing.blocking_recv() {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match port.write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if passes(&error) => thread::sleep(NO_HOST_PAUSE),
                Err(error) => {
                    if stays {
                        say(&format!("envd: the agent port cannot be written: {error}"));
                    }
                    return;
                }
            }
        }
    }
}

fn passes(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}
