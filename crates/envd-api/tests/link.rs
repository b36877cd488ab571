//! The link's handshake, and what each side does when the other misbehaves.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

use std::time::Duration;

use envd_api::link::packet::{
    Decoder, Kind, LINK_VERSION, PAYLOAD_BYTES_MAX, encode, encode_fresh,
};
use envd_api::link::{Acceptor, LinkError, RawPort, connect};
use futures::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(600);

fn pipe() -> (DuplexStream, DuplexStream) {
    duplex(64 * 1024)
}

#[tokio::test]
async fn a_guest_that_says_nothing_is_reported_as_silent_and_a_closed_port_as_closed() {
    let (host, guest) = pipe();
    let error = connect(RawPort::over(host), 1, SHORT).await.unwrap_err();
    assert!(matches!(error, LinkError::Silent { .. }), "{error}");
    drop(guest);
    let (host, guest) = pipe();
    drop(guest);
    let error = connect(RawPort::over(host), 1, LONG).await.unwrap_err();
    assert!(matches!(error, LinkError::Closed), "{error}");
}

#[tokio::test]
async fn a_guest_of_another_version_is_named() {
    let (host, mut guest) = pipe();
    // What is left of somebody else's session comes first.
    guest
        .write_all(&encode(Kind::Data, 5, b"left over"))
        .await
        .unwrap();
    guest
        .write_all(&encode(Kind::Ready, 5, &[LINK_VERSION]))
        .await
        .unwrap();
    guest
        .write_all(&encode(Kind::Ready, 7, &[LINK_VERSION + 1]))
        .await
        .unwrap();
    let error = connect(RawPort::over(host), 7, LONG).await.unwrap_err();
    assert!(matches!(error, LinkError::Version { guest: 2 }), "{error}");
}

#[tokio::test]
async fn a_host_that_comes_before_the_guest_is_up_says_hello_until_it_is_heard() {
    let (host, mut guest) = pipe();
    let host = tokio::spawn(connect(RawPort::over(host), 3, LONG));
    // The guest loses the first one: it reads the port before it knows what to do with it.
    let mut lost = [0; 16];
    guest.read_exact(&mut lost).await.unwrap();
    let mut acceptor = Acceptor::new(RawPort::over(guest));
    let theirs = acceptor.next().await.unwrap();
    assert_eq!((theirs.id(), host.await.unwrap().unwrap().id()), (3, 3));
}

#[tokio::test]
async fn bytes_of_any_amount_come_through_in_order() {
    let (host, guest) = pipe();
    let host = tokio::spawn(connect(RawPort::over(host), 9, LONG));
    let mut acceptor = Acceptor::new(RawPort::over(guest));
    let mut session = acceptor.next().await.unwrap();
    tokio::spawn(async move { while acceptor.next().await.is_some() {} });
    let sent: Vec<u8> = (0..3 * PAYLOAD_BYTES_MAX + 17)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    let expected = sent.clone();
    let echo = tokio::spawn(async move {
        let mut buf = vec![0; sent.len()];
        session.read_exact(&mut buf).await.unwrap();
        session.write_all(&buf).await.unwrap();
        session.flush().await.unwrap();
        session
    });
    let mut host = host.await.unwrap().unwrap();
    host.write_all(&expected).await.unwrap();
    host.flush().await.unwrap();
    let mut got = vec![0; expected.len()];
    host.read_exact(&mut got).await.unwrap();
    assert!(got == expected);
    drop(echo.await.unwrap());
}

#[tokio::test]
async fn only_a_new_id_begins_a_new_session_and_ends_the_one_before() {
    let (mut host, guest) = pipe();
    let mut acceptor = Acceptor::new(RawPort::over(guest));
    let hello = |id| encode_fresh(Kind::Hello, id, &[LINK_VERSION]);
    host.write_all(&hello(1)).await.unwrap();
    let mut first = acceptor.next().await.unwrap();
    // The same host again (its first word was slow), then bytes, ours and a stranger's.
    host.write_all(&hello(1)).await.unwrap();
    host.write_all(&encode(Kind::Data, 2, b"stranger"))
        .await
        .unwrap();
    host.write_all(&encode(Kind::Data, 1, b"ours"))
        .await
        .unwrap();
    host.write_all(&hello(2)).await.unwrap();
    let second = acceptor.next().await.unwrap();
    assert_eq!((first.id(), second.id()), (1, 2));
    let mut heard = String::new();
    first.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "ours");
    // Each hello was answered, the repeated one too.
    let mut decoder = Decoder::new();
    let mut answers = Vec::new();
    while answers.len() < 3 {
        let mut buf = [0; 64];
        let len = host.read(&mut buf).await.unwrap();
        answers.extend(
            decoder
                .feed(&buf[..len])
                .into_iter()
                .map(|p| (p.kind, p.session)),
        );
    }
    assert_eq!(
        answers,
        [(Kind::Ready, 1), (Kind::Ready, 1), (Kind::Ready, 2)]
    );
}
