//! The processes that envd knows: those that run, and for a while those that have ended, so that
//! whoever comes late still learns how.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use envd_api::proto::process::ProcessConfig;
use tokio::net::unix::pipe;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use super::fanout::Fanout;
use super::output::Terminal;

/// Most processes that run at once. The guest's own limits come first, this one bounds our tasks.
const RUNNING_MAX: usize = 1024;

/// Ended processes that are remembered, and for how long.
const ENDED_MAX: usize = 64;
const ENDED_KEPT: Duration = Duration::from_secs(60);

/// A process that envd has started.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) config: ProcessConfig,
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) input: Input,
}

/// Where its input goes.
#[derive(Debug)]
pub(crate) enum Input {
    /// Nowhere any more, or never.
    Pipe(AsyncMutex<Option<pipe::Sender>>),
    Pty(Terminal),
}

/// Whom a call is about.
#[derive(Debug, Clone)]
pub(crate) enum Key {
    Pid(u32),
    Tag(String),
}

#[derive(Debug, Default)]
struct State {
    running: HashMap<u32, Arc<Entry>>,
    ended: VecDeque<(Instant, Arc<Entry>)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Table {
    state: Mutex<State>,
}

impl Table {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether one more may run.
    pub(crate) fn has_room(&self) -> bool {
        self.with(|state| state.running.len() < RUNNING_MAX)
    }

    pub(crate) fn insert(&self, entry: Arc<Entry>) {
        self.with(|state| {
            // The kernel may give an id again that we still remember.
            state.ended.retain(|(_, ended)| ended.pid != entry.pid);
            state.running.insert(entry.pid, entry);
        });
    }

    /// Moves a process to those that have ended, and forgets the oldest of them.
    ///
    /// Compared by identity: once a process is reaped, the kernel may have given its id to another
    /// one that runs already; that one keeps its place.
    pub(crate) fn end(&self, entry: &Arc<Entry>) {
        self.with(|state| {
            let now = Instant::now();
            let listed = state.running.get(&entry.pid);
            if listed.is_some_and(|listed| Arc::ptr_eq(listed, entry)) {
                state.running.remove(&entry.pid);
                state.ended.push_back((now, Arc::clone(entry)));
            }
            let old = |(at, _): &(Instant, Arc<Entry>)| now.duration_since(*at) > ENDED_KEPT;
            while state.ended.len() > ENDED_MAX || state.ended.front().is_some_and(old) {
                state.ended.pop_front();
            }
        });
    }

    pub(crate) fn running(&self) -> Vec<Arc<Entry>> {
        self.with(|state| state.running.values().cloned().collect())
    }

    /// A process that runs.
    pub(crate) fn find(&self, key: &Key) -> Option<Arc<Entry>> {
        self.with(|state| state.running.values().find(|entry| entry.is(key)).cloned())
    }

    /// A process that runs or has just ended; of several with one tag, the youngest.
    pub(crate) fn find_any(&self, key: &Key) -> Option<Arc<Entry>> {
        self.find(key).or_else(|| {
            self.with(|state| {
                let ended = state.ended.iter().rev().map(|(_, entry)| entry);
                ended.into_iter().find(|entry| entry.is(key)).cloned()
            })
        })
    }
}

impl Entry {
    fn is(&self, key: &Key) -> bool {
        match key {
            Key::Pid(pid) => self.pid == *pid,
            Key::Tag(tag) => self.tag.as_ref() == Some(tag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::fanout;

    fn entry(pid: u32, tag: &str) -> Arc<Entry> {
        Arc::new(Entry {
            pid,
            tag: Some(tag.to_owned()),
            config: ProcessConfig::default(),
            fanout: Fanout::new(fanout::LIMITS),
            input: Input::Pipe(AsyncMutex::new(None)),
        })
    }

    #[tokio::test]
    async fn a_process_whose_id_was_given_again_does_not_end_its_successor() {
        let table = Table::default();
        let (first, second) = (entry(7, "first"), entry(7, "second"));
        table.insert(Arc::clone(&first));
        table.insert(Arc::clone(&second));
        table.end(&first);
        let running = table.find(&Key::Pid(7)).unwrap();
        assert!(Arc::ptr_eq(&running, &second));
        table.end(&second);
        assert!(table.find(&Key::Pid(7)).is_none());
        assert!(Arc::ptr_eq(&table.find_any(&Key::Pid(7)).unwrap(), &second));
    }
}
