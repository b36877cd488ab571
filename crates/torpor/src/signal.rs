//! Signals: those that interrupt a command, and the one that `--signal-pause` waits for.

use std::io;
use std::str::FromStr;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal at which torpor can be told to pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PauseSignal {
    Usr1,
    Usr2,
    Hup,
    Term,
    Int,
}

impl PauseSignal {
    /// Its name, without `SIG`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Usr1 => "USR1",
            Self::Usr2 => "USR2",
            Self::Hup => "HUP",
            Self::Term => "TERM",
            Self::Int => "INT",
        }
    }

    /// Listens for it from now on.
    pub(crate) fn listen(self) -> io::Result<Signal> {
        signal(match self {
            Self::Usr1 => SignalKind::user_defined1(),
            Self::Usr2 => SignalKind::user_defined2(),
            Self::Hup => SignalKind::hangup(),
            Self::Term => SignalKind::terminate(),
            Self::Int => SignalKind::interrupt(),
        })
    }
}

impl FromStr for PauseSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_ascii_uppercase();
        let name = name.strip_prefix("SIG").unwrap_or(&name);
        [Self::Usr1, Self::Usr2, Self::Hup, Self::Term, Self::Int]
            .into_iter()
            .find(|signal| signal.name() == name)
            .ok_or_else(|| "use one of USR1, USR2, HUP, TERM, INT".to_owned())
    }
}

/// The signals that end a command: ctrl-C, a polite kill, a terminal that closes.
#[derive(Debug)]
pub(crate) struct Interrupts {
    int: Option<Signal>,
    term: Option<Signal>,
    hup: Option<Signal>,
}

impl Interrupts {
    /// Listens for all of them but the one that means something else to this command.
    pub(crate) fn all_but(other_meaning: Option<PauseSignal>) -> io::Result<Self> {
        let listen = |signal: PauseSignal| {
            (other_meaning != Some(signal))
                .then(|| signal.listen())
                .transpose()
        };
        Ok(Self {
            int: listen(PauseSignal::Int)?,
            term: listen(PauseSignal::Term)?,
            hup: listen(PauseSignal::Hup)?,
        })
    }

    /// Waits for the next one and gives its name. Cancel safe.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            () = received(self.int.as_mut()) => "SIGINT",
            () = received(self.term.as_mut()) => "SIGTERM",
            () = received(self.hup.as_mut()) => "SIGHUP",
        }
    }
}

async fn received(signal: Option<&mut Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_may_be_written_as_kill_takes_it() {
        assert_eq!("USR1".parse(), Ok(PauseSignal::Usr1));
        assert_eq!("sighup".parse(), Ok(PauseSignal::Hup));
        assert!("KILL".parse::<PauseSignal>().is_err());
    }
}
