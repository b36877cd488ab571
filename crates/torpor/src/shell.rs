//! `--shell`: a terminal in the guest, joined to the one that torpor runs in.
//!
//! Invariants:
//! - The host's terminal is in raw mode only while a [`RawTerminal`] lives; it is restored on every
//!   way out, a dropped future and a panic included.
//! - Input and output are independent: a guest that reads no input still shows its output.
//! - What is typed arrives, in order, or the shell ends with an error that says how much did not:
//!   input is held back while the guest does not take it, and nothing is sent twice.

use std::io::{self, Read as _};
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use torpor_guest::{Command, Exit, ProcessEvent, PtySize, Selector};
use torpor_sandbox::Sandbox;

use crate::error::CliError;
use crate::guest_command::{show, while_alive};

/// The best shell that the guest has, as a login shell.
const SHELL: &str = "if command -v bash >/dev/null; then exec bash -l; else exec sh -l; fi";
/// Where there is no terminal to ask.
const DEFAULT_SIZE: PtySize = PtySize { cols: 80, rows: 24 };
/// Bytes of input read at once: more than a person types, and a paste comes in few pieces.
const INPUT_BYTES: usize = 4096;
/// Pieces of input on their way to the guest; beyond that the host's terminal waits.
const INPUT_QUEUE: usize = 16;
/// How long a piece of input waits for a guest program that does not read: as long as a person would
/// look at it. A guest that does not answer at all is noticed much earlier, by its output's stream.
const INPUT_PATIENCE: Duration = Duration::from_secs(600);
/// After input was refused: how long the shell's end may take to be told, if that is the reason.
const END_TOLD_MAX: Duration = Duration::from_secs(10);
/// What a terminal sends for ctrl-D, which ends a shell's input.
const END_OF_INPUT: &[u8] = &[4];

/// The host's terminal in raw mode.
#[derive(Debug)]
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// `None` where standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &self.before) {
            // A terminal that has gone away needs no restoring.
            tracing::debug!(%error, "the terminal is not restored");
        }
    }
}

/// Runs a shell in the guest until it ends.
pub(crate) async fn run(sandbox: &Sandbox) -> Result<Exit, CliError> {
    let terminal = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
    let command = Command::shell(SHELL).pty(size()).env("TERM", terminal);
    let join = Box::pin(async {
        let mut shell = sandbox.envd().start(&command, None).await?;
        let process = Selector::Pid(shell.pid());
        let raw = RawTerminal::enter().map_err(CliError::system("use the terminal"))?;
        let output = async {
            while let Some(event) = shell.next().await? {
                match event {
                    ProcessEvent::Pty(bytes) | ProcessEvent::Stdout(bytes) => {
                        show(tokio::io::stdout(), &bytes).await?;
                    }
                    ProcessEvent::Stderr(bytes) => show(tokio::io::stderr(), &bytes).await?,
                    ProcessEvent::End(exit) => return Ok(exit),
                }
            }
            Err(CliError::Panicked(
                "a shell ended without an end".to_owned(),
            ))
        };
        let exit = tokio::select! {
            exit = output => exit,
            error = forward_input(sandbox, &process) => Err(error),
            error = forward_size(sandbox, &process) => Err(error),
        };
        drop(raw);
        exit
    });
    while_alive(sandbox, join).await
}

/// Brings what is typed to the guest, for ever: only an error ends it.
async fn forward_input(sandbox: &Sandbox, process: &Selector) -> CliError {
    let (sender, mut typed) = mpsc::channel(INPUT_QUEUE);
    // A thread of its own, not the runtime's: a read from a terminal cannot be called off, and the
    // runtime would wait for it at the end.
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = [0; INPUT_BYTES];
        while let Ok(bytes @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..bytes].to_vec()).is_err() {
                return;
            }
        }
        // Nobody left to tell that the input has ended: the shell has, too.
        drop(sender.blocking_send(END_OF_INPUT.to_vec()));
    });
    let envd = sandbox.envd().with_deadline(INPUT_PATIENCE);
    while let Some(bytes) = typed.recv().await {
        if let Err(error) = envd.send_pty(process, &bytes).await {
            tracing::debug!(%error, "input not taken");
            if !error.is_timeout() {
                // A shell that ends takes its terminal with it; then its end is told instead.
                tokio::time::sleep(END_TOLD_MAX).await;
            }
            return CliError::InputLost {
                bytes: bytes.len(),
                source: Box::new(error),
            };
        }
    }
    std::future::pending().await
}

/// Tells the guest each new size of the host's terminal, for ever.
async fn forward_size(sandbox: &Sandbox, process: &Selector) -> CliError {
    let mut changes = match signal(SignalKind::window_change()) {
        Ok(changes) => changes,
        Err(error) => return CliError::system("listen for signals")(error),
    };
    while changes.recv().await.is_some() {
        if let Err(error) = sandbox.envd().update(process, size()).await {
            tracing::debug!(%error, "the new size is not taken");
        }
    }
    std::future::pending().await
}

fn size() -> PtySize {
    tcgetwinsize(io::stdout())
        .ok()
        .filter(|size| size.ws_col > 0 && size.ws_row > 0)
        .map_or(DEFAULT_SIZE, |size| PtySize {
            cols: size.ws_col,
            rows: size.ws_row,
        })
}
