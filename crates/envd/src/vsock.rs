//! The guest's end of the agent channel where the VMM has a vsock instead of a virtio-serial port
//! (Firecracker): the same bytes in the same two queues, over connections that come and go.
//!
//! Hosts connect, one at a time: the next is accepted when the one before is gone. A snapshot ends
//! the connection, in the guest's eyes too, and the listener survives it.
//!
//! A connection's end is not told to the link: the same host comes back when its snapshot was taken
//! and the machine goes on, and its session with it. Another host says so by its `Hello`.
//!
//! What is to be written while no host is there is dropped.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use envd_api::AGENT_VSOCK_PORT;
use envd_api::link::{PortEvent, READ_BYTES};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, listen, socket,
};
use tokio::sync::mpsc;

use crate::console::say;

/// Bound to a device, this driver's directory holds a link to it.
const DRIVER_DIR: &str = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";
/// Hosts that wait for the one before them.
const BACKLOG: i32 = 4;
/// Said to each host first, so that it knows that its connection lives: the guest's kernel ends some
/// of those that were asked for around a snapshot, and tells the host nothing. To the link it is an
/// empty packet.
const GREETING: [u8; 1] = [0];
/// How long a failed accept is slept over: it fails for want of memory or descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The host that is connected, if one is.
type Current = Arc<Mutex<Option<Arc<File>>>>;

/// Whether the machine has a vsock. The address family alone says nothing: it is there wherever its
/// module is.
pub(crate) fn is_there() -> bool {
    std::fs::read_dir(DRIVER_DIR).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
    })
}

/// A vsock that listens, and who is connected to it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    current: Current,
}

impl Listener {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Vsock,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let anyone = VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_VSOCK_PORT);
        bind(socket.as_raw_fd(), &anyone)?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(Self {
            socket,
            current: Current::default(),
        })
    }

    /// What writes to whoever is connected.
    pub(crate) fn writer(&self) -> Writer {
        Writer(Arc::clone(&self.current))
    }

    /// Reads from one host after the other, for as long as somebody takes it.
    pub(crate) fn read(self, incoming: &mpsc::Sender<PortEvent>) {
        loop {
            let host = match accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                // SAFETY: a descriptor that was made just now, and is nobody else's.
                Ok(fd) => Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(fd) })),
                Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
                Err(error) => {
                    say(&format!("envd: no host can connect: {error}"));
                    thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
            };
            // One that was cut off while it waited to be accepted.
            if (&*host).write_all(&GREETING).is_err() {
                continue;
            }
            self.set_current(Some(Arc::clone(&host)));
            let taken = read_host(&host, incoming);
            self.set_current(None);
            if !taken {
                return;
            }
        }
    }

    fn set_current(&self, host: Option<Arc<File>>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = host;
    }
}

/// Reads until the host is gone; false if nobody takes what it says.
fn read_host(mut host: &File, incoming: &mpsc::Sender<PortEvent>) -> bool {
    let mut buf = vec![0; READ_BYTES];
    loop {
        match host.read(&mut buf) {
            Ok(0) => return true,
            Ok(len) => {
                let bytes = Bytes::copy_from_slice(&buf[..len]);
                if incoming.blocking_send(PortEvent::Bytes(bytes)).is_err() {
                    return false;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A reset: how a snapshot ends a connection.
            Err(_) => return true,
        }
    }
}

/// Writes to whoever is connected.
#[derive(Debug)]
pub(crate) struct Writer(Current);

impl Writer {
    pub(crate) fn write(self, mut outgoing: mpsc::Receiver<Bytes>) {
        while let Some(bytes) = outgoing.blocking_recv() {
            let host = self
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(host) = host {
                // A host that is gone is the reader's to notice.
                (&*host).write_all(&bytes).ok();
            }
        }
    }
}
