//! A peer that speaks HTTP as Firecracker's API does, and answers what it was told to.

#![allow(missing_docs, unreachable_pub, reason = "test support")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a peer that cannot be had ends the test"
)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// A listening peer; gone when it is dropped.
#[derive(Debug)]
pub struct Peer {
    dir: TempDir,
    seen: Seen,
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
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let seen = Seen::default();
        let (answers, record) = (answers.into_iter().collect(), Arc::clone(&seen));
        let serving = tokio::spawn(serve(listener, answers, last, record));
        Self { dir, seen, serving }
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

async fn serve(listener: UnixListener, mut answers: VecDeque<Answer>, last: Answer, seen: Seen) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let Some(request) = read_request(&mut stream).await else {
            continue;
        };
        seen.lock().unwrap().push(request);
        let answer = answers.pop_front().unwrap_or_else(|| last.clone());
        // Like the real one it takes the next connection while a client waits for its answer.
        tokio::spawn(give(stream, answer));
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

async fn give(mut stream: UnixStream, mut answer: Answer) {
    while let Answer::After(pause, later) = answer {
        tokio::time::sleep(pause).await;
        answer = *later;
    }
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
        Answer::CloseAtOnce | Answer::After(..) => String::new(),
    };
    // A client that is gone is part of the test.
    stream.write_all(text.as_bytes()).await.ok();
}
