//! The channel when things are torn apart: hosts that come and go, in the middle of anything.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests and their helpers"
)]

mod host;

use std::time::Duration;

use host::{Agent, LONG, output, sh};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use torpor_guest::{Channel, Command, Envd, ProcessEvent, Selector};

/// The VMM's part: it keeps the agent's port while hosts come and go. What a host leaves unread is
/// lost with it, whole packets or half ones.
struct Vmm {
    agent: Agent,
    wires: Option<[JoinHandle<()>; 2]>,
}

impl Vmm {
    fn start() -> Self {
        Self {
            agent: Agent::start(),
            wires: None,
        }
    }

    /// A new host takes over. Only the first `bytes` that it sends arrive.
    async fn plug(&mut self, bytes: usize) -> UnixStream {
        for wire in self.wires.take().into_iter().flatten() {
            wire.abort();
            wire.await.ok();
        }
        let (host, ours) = UnixStream::pair().unwrap();
        let (mut from_host, mut to_host) = ours.into_split();
        // split, not into_split: a dropped half must not shut the agent's port down.
        let (mut from_agent, mut to_agent) = tokio::io::split(self.agent.port());
        let up = tokio::spawn(async move {
            let mut head = (&mut from_host).take(bytes as u64);
            tokio::io::copy(&mut head, &mut to_agent).await.ok();
            // The rest goes nowhere.
            tokio::io::copy(&mut from_host, &mut tokio::io::sink())
                .await
                .ok();
            std::future::pending::<()>().await;
            drop(to_agent);
        });
        let down = tokio::spawn(async move {
            tokio::io::copy(&mut from_agent, &mut to_host).await.ok();
            std::future::pending::<()>().await;
        });
        self.wires = Some([up, down]);
        host
    }

    async fn host(&mut self) -> Envd {
        let stream = self.plug(usize::MAX).await;
        Envd::new(Channel::connect(stream, LONG).await.unwrap()).with_deadline(LONG)
    }
}

#[tokio::test]
async fn a_new_host_takes_over_and_processes_go_on() {
    let mut vmm = Vmm::start();
    let before = vmm.host().await;
    let command = Command::new("cat").stdin().tag("cat");
    let mut cat = before.start(&command, None).await.unwrap();
    let selector = Selector::Tag("cat".into());
    let after = vmm.host().await;
    let again = after.connect(&selector).await.unwrap();
    assert_eq!(again.pid(), cat.pid());
    after.send_input(&selector, b"still here").await.unwrap();
    after.close_stdin(&selector).await.unwrap();
    assert_eq!(again.output().await.unwrap().stdout, b"still here");
    // The old host hears nothing of it.
    let silence = tokio::time::timeout(Duration::from_millis(200), cat.next()).await;
    assert!(
        !matches!(silence, Ok(Ok(Some(ProcessEvent::Stdout(_))))),
        "{silence:?}"
    );
}

#[tokio::test]
async fn a_host_that_is_cut_off_in_the_middle_of_a_packet_hurts_nobody_after_it() {
    let mut vmm = Vmm::start();
    // Hello takes 16 bytes with its marks; the rest cuts through everything that follows.
    for bytes in [
        0, 1, 7, 15, 16, 17, 20, 40, 64, 100, 200, 500, 1000, 5000, 20_000, 70_000,
    ] {
        let stream = vmm.plug(bytes).await;
        let patience = Duration::from_millis(300);
        if let Ok(channel) = Channel::connect(stream, patience).await {
            let envd = Envd::new(channel).with_deadline(patience);
            let input = vec![b'x'; 100_000];
            if let Ok(mut cat) = envd.start(&Command::new("cat").stdin(), None).await {
                let selector = Selector::from(cat.pid());
                let feed = envd.send_input(&selector, &input);
                let watch = async { while let Ok(Some(_)) = cat.next().await {} };
                tokio::time::timeout(patience, async { tokio::join!(feed, watch) })
                    .await
                    .ok();
            }
        }
        let envd = vmm.host().await;
        assert_eq!(
            output(&envd, &sh("echo fine")).await,
            "fine\n",
            "after {bytes} bytes"
        );
        for left in envd.list().await.unwrap() {
            let selector = Selector::from(left.pid);
            envd.send_signal(&selector, torpor_guest::Signal::Kill)
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn a_host_that_does_not_read_is_replaced_all_the_same() {
    let mut vmm = Vmm::start();
    let deaf = vmm.host().await;
    let process = deaf.start(&Command::new("yes"), None).await.unwrap();
    // Nobody reads `process`: windows and queues fill up.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let envd = vmm.host().await;
    assert_eq!(output(&envd, &sh("echo fine")).await, "fine\n");
    let selector = Selector::from(process.pid());
    envd.send_signal(&selector, torpor_guest::Signal::Kill)
        .await
        .unwrap();
}

#[tokio::test]
async fn hosts_without_number_leave_nothing_behind() {
    let mut vmm = Vmm::start();
    let envd = vmm.host().await;
    let _watched = envd
        .start(&Command::new("sleep").arg("300").tag("s"), None)
        .await
        .unwrap();
    let fds = format!("/proc/{}/fd", vmm.agent.child.id());
    let count = || std::fs::read_dir(&fds).unwrap().count();
    let before = count();
    for _ in 0..60 {
        let envd = vmm.host().await;
        let _watch = envd.connect(&Selector::Tag("s".into())).await.unwrap();
        assert_eq!(output(&envd, &sh("echo fine")).await, "fine\n");
    }
    host::eventually("files are closed", || count() <= before).await;
    let selector = Selector::Tag("s".into());
    vmm.host()
        .await
        .send_signal(&selector, torpor_guest::Signal::Kill)
        .await
        .unwrap();
}

#[tokio::test]
async fn when_the_port_is_gone_every_call_says_so() {
    let mut vmm = Vmm::start();
    let envd = vmm.host().await;
    let mut process = envd.start(&sh("sleep 300"), None).await.unwrap();
    let pid = process.pid();
    for wire in vmm.wires.take().into_iter().flatten() {
        wire.abort();
    }
    drop(vmm);
    assert!(process.next().await.is_err());
    envd.channel().closed().await;
    assert!(envd.health().await.is_err());
    host::eventually("it went with its agent", || !host::alive(pid)).await;
}

#[tokio::test]
async fn a_reader_who_sleeps_costs_the_agent_no_memory() {
    let mut vmm = Vmm::start();
    let envd = vmm.host().await;
    let mut unread = Vec::new();
    for _ in 0..5 {
        unread.push(envd.start(&Command::new("yes"), None).await.unwrap());
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(output(&envd, &sh("echo fine")).await, "fine\n");
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.agent.child.id())).unwrap();
    let rss = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let rss_kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(rss_kib < 48 * 1024, "{rss_kib} KiB");
    for process in &unread {
        let selector = Selector::from(process.pid());
        envd.send_signal(&selector, torpor_guest::Signal::Kill)
            .await
            .unwrap();
    }
}

/// A stream to envd's HTTP, by hand.
async fn http(envd: &Envd, request: &str) -> String {
    let mut stream = envd.channel().open(envd_api::ENVD_PORT).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn the_wire_is_what_the_public_sdks_speak() {
    let mut vmm = Vmm::start();
    let envd = vmm.host().await;
    let start =
        r#"{"process":{"cmd":"/bin/sh","args":["-c","sleep 6; echo hi; exit 7"]},"stdin":false}"#;
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(start.len()).unwrap().to_be_bytes());
    body.extend_from_slice(start.as_bytes());
    // As python sends a stream: lower-case headers, chunked.
    let request = format!(
        "POST /process.Process/Start HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\
         content-type: application/connect+json\r\nconnect-protocol-version: 1\r\n\
         connect-timeout-ms: 60000\r\nkeepalive-ping-interval: 1\r\n\
         transfer-encoding: chunked\r\n\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        body.len(),
        String::from_utf8(body).unwrap(),
    );
    let answer = http(&envd, &request).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let positions: Vec<_> = [
        r#"{"event":{"start":{"pid":"#,
        r#"{"event":{"keepalive":{}}}"#,
        r#"{"event":{"data":{"stdout":"aGkK"}}}"#,
        r#"{"event":{"end":{"exitCode":7,"exited":true,"status":"exit status 7"}}}"#,
    ]
    .iter()
    .map(|event| {
        answer
            .find(event)
            .unwrap_or_else(|| panic!("{event} in {answer}"))
    })
    .collect();
    assert!(positions.is_sorted(), "{answer}");

    let unary = |method: &str, body: &str| {
        format!(
            "POST /process.Process/{method} HTTP/1.1\r\nHost: e\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len(),
        )
    };
    let answer = http(&envd, &unary("List", "{}")).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("\r\n{}\r\n"),
        "{answer}"
    );
    let signal = r#"{"process":{"pid":4000000},"signal":"SIGNAL_SIGKILL"}"#;
    let answer = http(&envd, &unary("SendSignal", signal)).await;
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains(r#""code":"not_found""#), "{answer}");
}

#[tokio::test]
async fn a_plain_route_that_is_misused_says_so() {
    let mut vmm = Vmm::start();
    let envd = vmm.host().await;
    let head = "HTTP/1.1\r\nHost: e\r\nConnection: close\r\n";
    let answer = http(&envd, &format!("GET /init {head}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    let answer = http(
        &envd,
        &format!("POST /init {head}Content-Length: 3\r\n\r\n{{x}}"),
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = http(&envd, &format!("GET /nothing {head}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
}
