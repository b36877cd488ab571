//! A process's output, to everybody who watches.
//!
//! Who subscribes gets everything from then on, in order, and then the end. A queue holds
//! [`Limits::queue_events`] pieces of at most [`crate::process::output::PIECE_BYTES`]. When a
//! subscriber's queue is full the output waits for him: that is how a slow reader slows a process
//! down instead of losing bytes. But not for ever: a subscriber who takes nothing for
//! [`Limits::stall`] is cut off, and told so, and the process goes on. Nobody watching means that
//! output is thrown away.
//!
//! So memory is bounded by subscribers × queue, and no reader can hold a process up for longer than
//! the stall, or make it lose bytes for the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::reaper::Ending;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Pieces that may wait for a subscriber.
    pub(crate) queue_events: usize,
    /// Subscribers of one process.
    pub(crate) subscribers: usize,
    /// How long output waits for a subscriber who takes nothing.
    pub(crate) stall: Duration,
}

/// 16 pieces of 32 KiB: half a MiB for each who watches. 30 s is longer than a host that is busy
/// with a pause, and shorter than what anybody would call hanging for ever.
pub(crate) const LIMITS: Limits = Limits {
    queue_events: 16,
    subscribers: 16,
    stall: Duration::from_secs(30),
};

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    Stdout(Bytes),
    Stderr(Bytes),
    Pty(Bytes),
}

/// What a subscriber sees.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Piece(Piece),
    End(Ending),
    /// He was too slow; nothing follows.
    CutOff,
}

#[derive(Debug, Default)]
struct State {
    subscribers: Vec<Subscriber>,
    end: Option<Ending>,
}

#[derive(Debug, Clone)]
struct Subscriber {
    queue: mpsc::Sender<Piece>,
    cut_off: Arc<AtomicBool>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Fanout {
    limits: Limits,
    state: Mutex<State>,
}

/// One who watches. Dropping it stops watching.
#[derive(Debug)]
pub(crate) struct Subscription {
    fanout: Arc<Fanout>,
    queue: mpsc::Receiver<Piece>,
    cut_off: Arc<AtomicBool>,
}

impl Fanout {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches from now on; `None` if too many do. After the end, only the end is seen.
    pub(crate) fn subscribe(self: &Arc<Self>) -> Option<Subscription> {
        let (sender, queue) = mpsc::channel(self.limits.queue_events);
        let cut_off = Arc::new(AtomicBool::new(false));
        let mut state = self.state();
        state
            .subscribers
            .retain(|subscriber| !subscriber.queue.is_closed());
        if state.end.is_none() {
            if state.subscribers.len() >= self.limits.subscribers {
                return None;
            }
            let subscriber = Subscriber {
                queue: sender,
                cut_off: Arc::clone(&cut_off),
            };
            state.subscribers.push(subscriber);
        }
        Some(Subscription {
            fanout: Arc::clone(self),
            queue,
            cut_off,
        })
    }

    /// Gives a piece to everybody; waits at most [`Limits::stall`] for the slow.
    pub(crate) async fn publish(&self, piece: &Piece) {
        let subscribers = self.state().subscribers.clone();
        let deadline = Instant::now() + self.limits.stall;
        let mut changed = false;
        for subscriber in &subscribers {
            match timeout_at(deadline, subscriber.queue.send(piece.clone())).await {
                Ok(Ok(())) => {}
                Ok(Err(_he_left)) => changed = true,
                Err(_elapsed) => {
                    subscriber.cut_off.store(true, Ordering::Release);
                    changed = true;
                }
            }
        }
        if changed {
            self.state().subscribers.retain(|subscriber| {
                !subscriber.queue.is_closed() && !subscriber.cut_off.load(Ordering::Acquire)
            });
        }
    }

    /// The end: whoever watches sees it after what is in his queue.
    pub(crate) fn end(&self, ending: Ending) {
        let mut state = self.state();
        state.end = Some(ending);
        state.subscribers.clear();
    }
}

impl Subscription {
    /// The next piece, or how it ended; after that it repeats itself. Cancel safe.
    pub(crate) async fn next(&mut self) -> Seen {
        if let Some(piece) = self.queue.recv().await {
            return Seen::Piece(piece);
        }
        match self.fanout.state().end {
            Some(ending) if !self.cut_off.load(Ordering::Acquire) => Seen::End(ending),
            _ => Seen::CutOff,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Limits = Limits {
        queue_events: 2,
        subscribers: 2,
        stall: Duration::from_millis(50),
    };

    fn piece(byte: u8) -> Piece {
        Piece::Stdout(Bytes::from(vec![byte]))
    }

    #[tokio::test]
    async fn everybody_sees_all_from_his_attach_on_and_then_the_end() {
        let fanout = Fanout::new(SHORT);
        let mut early = fanout.subscribe().unwrap();
        fanout.publish(&piece(1)).await;
        let mut late = fanout.subscribe().unwrap();
        fanout.publish(&piece(2)).await;
        fanout.end(Ending::Exited(3));
        assert_eq!(early.next().await, Seen::Piece(piece(1)));
        assert_eq!(early.next().await, Seen::Piece(piece(2)));
        assert_eq!(early.next().await, Seen::End(Ending::Exited(3)));
        assert_eq!(late.next().await, Seen::Piece(piece(2)));
        assert_eq!(late.next().await, Seen::End(Ending::Exited(3)));
        let mut too_late = fanout.subscribe().unwrap();
        assert_eq!(too_late.next().await, Seen::End(Ending::Exited(3)));
    }

    #[tokio::test]
    async fn who_does_not_read_is_cut_off_and_the_output_goes_on() {
        let fanout = Fanout::new(SHORT);
        let mut asleep = fanout.subscribe().unwrap();
        for byte in 0..10 {
            fanout.publish(&piece(byte)).await;
        }
        let mut awake = fanout.subscribe().unwrap();
        fanout.publish(&piece(99)).await;
        fanout.end(Ending::Exited(0));
        assert_eq!(awake.next().await, Seen::Piece(piece(99)));
        assert_eq!(asleep.next().await, Seen::Piece(piece(0)));
        assert_eq!(asleep.next().await, Seen::Piece(piece(1)));
        assert_eq!(asleep.next().await, Seen::CutOff);
    }

    #[tokio::test]
    async fn a_slow_reader_loses_nothing() {
        let fanout = Fanout::new(Limits {
            stall: Duration::from_secs(60),
            ..SHORT
        });
        let mut slow = fanout.subscribe().unwrap();
        let reader = tokio::spawn(async move {
            let mut seen = Vec::new();
            while let Seen::Piece(piece) = slow.next().await {
                tokio::time::sleep(Duration::from_millis(2)).await;
                seen.push(piece);
            }
            seen
        });
        for byte in 0..50 {
            fanout.publish(&piece(byte)).await;
        }
        fanout.end(Ending::Exited(0));
        assert_eq!(
            reader.await.unwrap(),
            (0..50).map(piece).collect::<Vec<_>>()
        );
    }

    #[tokio::test]
    async fn only_so_many_may_watch_and_who_leaves_makes_room() {
        let fanout = Fanout::new(SHORT);
        let first = fanout.subscribe().unwrap();
        let _second = fanout.subscribe().unwrap();
        assert!(fanout.subscribe().is_none());
        drop(first);
        assert!(fanout.subscribe().is_some());
    }
}
