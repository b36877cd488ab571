//! A peer that speaks HTTP as Firecracker's API does, and answers what it was told to.

#![allow(missing_docs, unreachable_pub, reason = "test support")]
#![allow(dead_code, reason = "each test file uses what it needs of this")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a peer that cannot be had ends the test"
)]

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::WriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use torpor_vmm::firecracker::Api;

/// What the peer does with a request.
#[derive(Debug, Clone)]
pub enum Answer {
    Empty(u16),
    Json(u16, Value),
    Raw(String),
    /// After that long, and only then.
    After(Duration, Box<Answer>),
    /// Half of a head.
    CloseInTheMiddle,
    CloseAtOnce,
    /// A body that is longer than anything that should be read.
    Endless,
    /// A body that comes slowly and never ends.
    Dripping,
    Never,
}

pub fn refusal(words: &str) -> Answer {
    Answer::Json(400, serde_json::json!({ "fault_message": words }))
}

impl Answer {
    pub fn is_no_content(&self) -> bool {
        match self {
            Self::Empty(status) => *status == 204,
            Self::After(_, answer) => answer.is_no_content(),
            _ => false,
        }
    }

    pub fn host_cmd(&self) -> Option<u64> {
        match self {
            Self::Json(200, body) => body["host_cmd"].as_u64(),
            _ => None,
        }
    }
}

type Seen = Arc<Mutex<Vec<(String, Value)>>>;

/// How a peer answers: a request (`PUT /vm`) and its body.
pub trait Answers: FnMut(&str, &Value) -> Answer + Send + 'static {}
impl<F: FnMut(&str, &Value) -> Answer + Send + 'static> Answers for F {}

/// A listening peer; gone when it is dropped.
#[derive(Debug)]
pub struct Peer {
    dir: TempDir,
    seen: Seen,
    open: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Peer {
    /// One answer a request, in this order; more requests than that end the connection.
    pub fn script(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self::always(answers, Answer::CloseAtOnce)
    }

    /// These answers first, then always the last.
    pub fn always(answers: impl IntoIterator<Item = Answer>, last: Answer) -> Self {
        let mut answers: VecDeque<Answer> = answers.into_iter().collect();
        let answer = move |_: &str, _: &Value| answers.pop_front().unwrap_or_else(|| last.clone());
        Self::answering(tempfile::tempdir().unwrap(), answer)
    }

    /// Behind `api.sock` in this directory.
    pub fn answering(dir: TempDir, answers: impl Answers) -> Self {
        let listener = UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let (seen, open) = (Seen::default(), Arc::default());
        let serving = serve(listener, answers, Arc::clone(&seen), Arc::clone(&open));
        Self {
            dir,
            seen,
            open,
            serving: tokio::spawn(serving),
        }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Connections that their client has not closed.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    pub fn api(&self) -> Api {
        Api::at(&self.dir.path().join("api.sock"))
    }

    /// Requests and their bodies, as they came.
    pub fn seen(&self) -> Vec<(String, Value)> {
        self.seen.lock().unwrap().clone()
    }

    pub fn paths(&self) -> Vec<String> {
        self.seen().into_iter().map(|(path, _)| path).collect()
    }
}

async fn serve(
    listener: UnixListener,
    mut answers: impl Answers,
    seen: Seen,
    open: Arc<AtomicUsize>,
) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let Some((request, body)) = read_request(&mut stream).await else {
            continue;
        };
        seen.lock().unwrap().push((request.clone(), body.clone()));
        let answer = answers(&request, &body);
        open.fetch_add(1, Ordering::SeqCst);
        let open = Arc::clone(&open);
        // Like the real one it takes the next connection while a client waits for its answer.
        tokio::spawn(async move {
            let (mut from_client, to_client) = stream.split();
            tokio::select! {
                () = give(to_client, answer) => {}
                // Whoever has its answer, or waits no longer, closes the connection.
                _ = from_client.read_u8() => {}
            }
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

async fn read_request(stream: &mut UnixStream) -> Option<(String, Value)> {
    let mut bytes = Vec::new();
    let head_len = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..head_len].to_vec()).unwrap();
    let len = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.parse().unwrap());
    while bytes.len() < head_len + len {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let line: Vec<_> = head.lines().next()?.split(' ').collect();
    assert_eq!(line[2], "HTTP/1.1");
    let body = serde_json::from_slice(&bytes[head_len..]).unwrap_or(Value::Null);
    Some((format!("{} {}", line[0], line[1]), body))
}

/// Ends when the peer is to close the connection.
async fn give(mut stream: WriteHalf<'_>, mut answer: Answer) {
    while let Answer::After(pause, later) = answer {
        tokio::time::sleep(pause).await;
        answer = *later;
    }
    let closes = matches!(
        answer,
        Answer::CloseInTheMiddle | Answer::CloseAtOnce | Answer::Raw(_)
    );
    let drips = matches!(answer, Answer::Dripping);
    let text = match answer {
        Answer::Empty(status) => {
            format!(
                "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
            )
        }
        Answer::Json(status, body) => {
            let body = body.to_string();
            format!(
                "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                 Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        }
        Answer::Raw(text) => text,
        Answer::CloseInTheMiddle => "HTTP/1.1 204 \r\nServer: Firecr".to_owned(),
        Answer::Endless => format!(
            "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{}",
            8 << 20,
            " ".repeat(8 << 20)
        ),
        Answer::Dripping => "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
        Answer::CloseAtOnce | Answer::Never | Answer::After(..) => String::new(),
    };
    // A client that is gone is part of the test.
    stream.write_all(text.as_bytes()).await.ok();
    while drips && stream.write_all(b"1\r\n \r\n").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if !closes {
        std::future::pending().await
    }
}
