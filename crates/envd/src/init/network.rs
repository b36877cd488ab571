//! The guest's network: loopback always, and one static card where the VMM gives one.
//!
//! QEMU's user-mode network is the same in every guest, so there is nothing to ask a DHCP server for:
//!
//! ```text
//! 10.0.2.15/24  the guest      10.0.2.2  gateway      10.0.2.3  name server
//! ```
//!
//! A guest that is resumed elsewhere finds the same network there; its old connections are gone, new
//! ones work. The kernel is told over rtnetlink (three short messages, acknowledged one by one): the
//! guest's root file system need not have any network tools.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

use super::{InStep, InitError};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const PREFIX_LEN_BITS: u8 = 24;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const RESOLV_CONF: &str = "nameserver 10.0.2.3\n";

/// The kernel answers within the system call; this only keeps a boot from hanging.
const ACK_WAIT_MAX_S: i64 = 5;
/// An acknowledgement repeats the request (at most 60 bytes here) behind 20 bytes of its own.
const ACK_LEN_MAX_BYTES: usize = 512;

/// Brings loopback up, and the virtio card where there is one.
pub(super) fn configure(sys_class_net: &Path) -> Result<(), InitError> {
    let link = Netlink::open().in_step(|| "open rtnetlink".to_owned())?;
    let loopback =
        index_of(&sys_class_net.join("lo")).in_step(|| "find the loopback device".to_owned())?;
    link.request(&link_up(loopback))
        .in_step(|| "bring loopback up".to_owned())?;

    let card = virtio_card(sys_class_net).in_step(|| "look for a network card".to_owned())?;
    let Some(card) = card else { return Ok(()) };
    link.request(&add_address(card))
        .in_step(|| format!("give the network card {ADDRESS}"))?;
    link.request(&link_up(card))
        .in_step(|| "bring the network card up".to_owned())?;
    link.request(&default_route(card))
        .in_step(|| format!("route through {GATEWAY}"))?;
    write_resolver(Path::new("/etc/resolv.conf")).in_step(|| "write /etc/resolv.conf".to_owned())
}

/// The first virtio network card's index, in the order in which the kernel found them.
fn virtio_card(sys_class_net: &Path) -> io::Result<Option<u32>> {
    let mut cards = Vec::new();
    for entry in std::fs::read_dir(sys_class_net)? {
        let device = entry?.path();
        let driver = std::fs::read_link(device.join("device/driver")).unwrap_or_default();
        if driver.file_name().is_some_and(|name| name == "virtio_net") {
            cards.push(index_of(&device)?);
        }
    }
    Ok(cards.into_iter().min())
}

fn index_of(device: &Path) -> io::Result<u32> {
    let text = std::fs::read_to_string(device.join("ifindex"))?;
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Names our name server, unless the root file system brought one of its own.
fn write_resolver(path: &Path) -> io::Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|text| text.contains("nameserver")) {
        return Ok(());
    }
    // It may be a link into /run that nothing will ever fill.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::fs::write(path, RESOLV_CONF),
    }
}

/// A socket to the kernel's network configuration.
struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(ACK_WAIT_MAX_S, 0))?;
        Ok(Self(socket))
    }

    /// Sends one request and returns what the kernel thinks of it.
    fn request(&self, message: &[u8]) -> io::Result<()> {
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.0.as_raw_fd(), message, &kernel, MsgFlags::empty())?;
        let mut ack = [0; ACK_LEN_MAX_BYTES];
        let len = recv(self.0.as_raw_fd(), &mut ack, MsgFlags::empty())?;
        match ack_error(ack.get(..len).unwrap_or_default())? {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

// Numbers of linux/netlink.h, linux/rtnetlink.h and linux/if_link.h.
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
/// NLM_F_REQUEST | NLM_F_ACK
const CHANGE: u16 = 0x1 | 0x4;
/// CHANGE | NLM_F_REPLACE | NLM_F_CREATE
const CREATE: u16 = CHANGE | 0x100 | 0x400;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;

/// struct nlmsghdr: length, type, flags, sequence number, port.
const HEADER_LEN_BYTES: usize = 16;

/// A message: its header, then `body` (which is a multiple of four bytes long).
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER_LEN_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_LEN_BYTES + body.len());
    bytes.extend(len.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// An attribute of four bytes, as all of ours are.
fn attribute(kind: u16, value: [u8; 4]) -> [u8; 8] {
    let [len_0, len_1] = 8_u16.to_ne_bytes();
    let [kind_0, kind_1] = kind.to_ne_bytes();
    let [a, b, c, d] = value;
    [len_0, len_1, kind_0, kind_1, a, b, c, d]
}

/// struct ifinfomsg: family, pad, type (2), index (4), flags (4), flags to change (4).
fn link_up(index: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    message(RTM_NEWLINK, CHANGE, &body)
}

/// struct ifaddrmsg: family, prefix length, flags, scope, index (4).
fn add_address(index: u32) -> Vec<u8> {
    let mut body = vec![AF_INET, PREFIX_LEN_BITS, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(attribute(IFA_LOCAL, ADDRESS.octets()));
    body.extend(attribute(IFA_ADDRESS, ADDRESS.octets()));
    message(RTM_NEWADDR, CREATE, &body)
}

/// struct rtmsg: family, destination and source prefix lengths, tos, table, protocol, scope, type,
/// flags (4).
fn default_route(index: u32) -> Vec<u8> {
    let mut body = vec![
        AF_INET,
        0,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_BOOT,
        0,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    body.extend(attribute(RTA_GATEWAY, GATEWAY.octets()));
    body.extend(attribute(RTA_OIF, index.to_ne_bytes()));
    message(RTM_NEWROUTE, CREATE, &body)
}

/// The errno of an acknowledgement, 0 for none (struct nlmsgerr: a negative errno behind the header).
fn ack_error(ack: &[u8]) -> io::Result<i32> {
    let kind = ack
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    let error = ack
        .get(16..20)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(error)) => Ok(error.saturating_neg()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "rtnetlink sent no acknowledgement",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_understands_the_requests_and_refuses_a_card_that_is_not_there() {
        let link = Netlink::open().unwrap();
        // Nothing is changed: an index of which no host has a device.
        let absent = 0x7fff_fff0;
        for request in [link_up(absent), add_address(absent), default_route(absent)] {
            let error = link.request(&request).unwrap_err();
            // Without privileges it is refused before it is read.
            let expected = [libc::ENODEV, libc::EPERM, libc::ENETUNREACH];
            assert!(
                error
                    .raw_os_error()
                    .is_some_and(|errno| expected.contains(&errno)),
                "{error}"
            );
        }
    }

    #[test]
    fn an_answer_that_is_no_acknowledgement_is_an_error() {
        for ack in [
            &[][..],
            &[0; 3],
            &[0; 20],
            &message(RTM_NEWLINK, CHANGE, &[0; 16]),
        ] {
            assert!(ack_error(ack).is_err(), "{ack:?}");
        }
        let mut refused = message(NLMSG_ERROR, 0, &[0; 4]);
        refused.truncate(HEADER_LEN_BYTES);
        refused.extend((-libc::EPERM).to_ne_bytes());
        assert_eq!(ack_error(&refused).unwrap(), libc::EPERM);
    }

    #[test]
    fn a_resolver_of_the_root_file_system_is_kept_and_a_dangling_link_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::os::unix::fs::symlink("/run/nobody/resolv.conf", &path).unwrap();
        write_resolver(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), RESOLV_CONF);

        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        write_resolver(&path).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "nameserver 192.0.2.1\n"
        );
    }

    #[test]
    fn only_a_virtio_card_is_configured() {
        let dir = tempfile::tempdir().unwrap();
        for (name, index, driver) in [
            ("lo", "1", None),
            ("eth1", "3", Some("virtio_net")),
            ("eth0", "2", Some("e1000")),
        ] {
            let device = dir.path().join(name);
            std::fs::create_dir_all(device.join("device")).unwrap();
            std::fs::write(device.join("ifindex"), format!("{index}\n")).unwrap();
            if let Some(driver) = driver {
                std::os::unix::fs::symlink(
                    format!("/drivers/{driver}"),
                    device.join("device/driver"),
                )
                .unwrap();
            }
        }
        assert_eq!(virtio_card(dir.path()).unwrap(), Some(3));
    }
}
