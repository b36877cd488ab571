//! What a subscriber sees, as the wire's events.

use std::time::Duration;

use connectrpc::ConnectError;
use envd_api::proto::process as pb;
use futures::Stream;
use nix::sys::signal::Signal;
use pb::process_event::data_event::Output;
use pb::process_event::{DataEvent, EndEvent, Event, StartEvent};
use tokio::time::{Instant, sleep_until};

use super::fanout::{Piece, Seen, Subscription};
use crate::reaper::Ending;

/// A process's events for one subscriber.
pub(crate) struct Watch {
    pub(crate) pid: u32,
    pub(crate) subscription: Subscription,
    /// When the subscriber's time is up.
    pub(crate) deadline: Option<Instant>,
    /// How long it may be quiet.
    pub(crate) keepalive: Duration,
}

enum Next {
    Start,
    Output,
    Nothing,
}

/// Start, then data and keepalives, then the end; or an error.
pub(crate) fn events(
    watch: Watch,
) -> impl Stream<Item = Result<pb::ProcessEvent, ConnectError>> + Send + 'static {
    futures::stream::unfold((watch, Next::Start), |(mut watch, next)| async move {
        let (item, next) = match next {
            Next::Start => {
                let start = StartEvent {
                    pid: watch.pid,
                    ..Default::default()
                };
                (Ok(Event::Start(Box::new(start))), Next::Output)
            }
            Next::Output => output(&mut watch).await,
            Next::Nothing => return None,
        };
        let event = |event| pb::ProcessEvent {
            event: Some(event),
            ..Default::default()
        };
        Some((item.map(event), (watch, next)))
    })
}

async fn output(watch: &mut Watch) -> (Result<Event, ConnectError>, Next) {
    let quiet_until = Instant::now() + watch.keepalive;
    let wake = watch
        .deadline
        .map_or(quiet_until, |deadline| deadline.min(quiet_until));
    let seen = tokio::select! {
        seen = watch.subscription.next() => seen,
        () = sleep_until(wake) => {
            return if watch.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                (Err(ConnectError::deadline_exceeded("the call's timeout came")), Next::Nothing)
            } else {
                (Ok(Event::Keepalive(Box::default())), Next::Output)
            };
        }
    };
    match seen {
        Seen::Piece(piece) => (Ok(data(piece)), Next::Output),
        Seen::End(ending) => (Ok(Event::End(Box::new(end(ending)))), Next::Nothing),
        Seen::CutOff => (
            Err(ConnectError::resource_exhausted(
                "this reader was too slow for the process's output and was cut off; the process \
                 goes on: Connect again for what it prints from now on",
            )),
            Next::Nothing,
        ),
    }
}

fn data(piece: Piece) -> Event {
    let output = match piece {
        Piece::Stdout(bytes) => Output::Stdout(bytes.to_vec()),
        Piece::Stderr(bytes) => Output::Stderr(bytes.to_vec()),
        Piece::Pty(bytes) => Output::Pty(bytes.to_vec()),
    };
    Event::Data(Box::new(DataEvent {
        output: Some(output),
        ..Default::default()
    }))
}

fn end(ending: Ending) -> EndEvent {
    match ending {
        Ending::Exited(code) => EndEvent {
            exit_code: code,
            exited: true,
            status: format!("exit status {code}"),
            ..Default::default()
        },
        Ending::Killed(signal) => EndEvent {
            exit_code: -1,
            exited: false,
            status: format!("signal: {}", words(signal)),
            ..Default::default()
        },
    }
}

/// The words that Go has for the commonest signals: E2B's clients have seen no others.
fn words(signal: Signal) -> String {
    let words = match signal {
        Signal::SIGKILL => "killed",
        Signal::SIGTERM => "terminated",
        Signal::SIGINT => "interrupt",
        Signal::SIGHUP => "hangup",
        Signal::SIGQUIT => "quit",
        Signal::SIGABRT => "aborted",
        Signal::SIGSEGV => "segmentation fault",
        Signal::SIGBUS => "bus error",
        Signal::SIGFPE => "floating point exception",
        Signal::SIGILL => "illegal instruction",
        Signal::SIGPIPE => "broken pipe",
        Signal::SIGALRM => "alarm clock",
        other => return other.as_str().to_owned(),
    };
    words.to_owned()
}
