//! Interrupts: the first one ends the command and is cleaned up after, the second one ends torpor.
//!
//! They are listened for on a thread of their own from beginning to end, because the clean-up runs
//! where no runtime is polled any more, and it may hang with the storage.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use crate::error::INTERRUPTED;
use crate::output::Output;
use crate::signal::{Interrupts, PauseSignal};

/// What a clean-up waits for at the moment.
#[derive(Debug, Clone)]
pub(crate) struct Awaited(Arc<Mutex<&'static str>>);

impl Default for Awaited {
    fn default() -> Self {
        Self(Arc::new(Mutex::new("the end of what was under way")))
    }
}

impl Awaited {
    pub(crate) fn set(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    fn get(&self) -> &'static str {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens from now on. The receiver gets the name of the first interrupt; at the second one torpor
/// says what it waited for and ends at once.
#[expect(
    clippy::exit,
    reason = "whoever interrupts a second time does not want to wait for destructors"
)]
pub(crate) fn listen(
    other_meaning: Option<PauseSignal>,
    output: Output,
    awaited: Awaited,
) -> io::Result<oneshot::Receiver<&'static str>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let mut interrupts = {
        let _entered = runtime.enter();
        Interrupts::all_but(other_meaning)?
    };
    let (first, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("interrupts".to_owned());
    thread.spawn(move || {
        let signal = runtime.block_on(interrupts.next());
        // A command that has just ended does not listen any more; it cleans up as well.
        first.send(signal).ok();
        let again = runtime.block_on(interrupts.next());
        output.note(&format!(
            "torpor: {again} while waiting for {}; not waiting any longer: the next command sweeps \
             what is left",
            awaited.get()
        ));
        std::process::exit(i32::from(INTERRUPTED));
    })?;
    Ok(receiver)
}
