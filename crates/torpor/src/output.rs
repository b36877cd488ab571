//! The only place that speaks: results on standard output, progress and hints on standard error.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use torpor_sandbox::progress::{Progress, ProgressEvent};

/// How a command prints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Prints a command's result: as JSON, or as `text` renders it.
    pub(crate) fn result<T: Serialize>(
        self,
        result: &T,
        text: impl FnOnce(&T) -> String,
    ) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, result)?;
            writeln!(out)
        } else {
            writeln!(out, "{}", printable(text(result).trim_end()))
        }
    }

    /// A remark for a person, on standard error.
    #[expect(clippy::unused_self, reason = "whoever speaks holds an Output")]
    pub(crate) fn note(self, text: &str) {
        // A closed standard error is nobody to complain to.
        drop(writeln!(io::stderr(), "{}", printable(text)));
    }

    /// Progress of a long operation: a spinner with the step's name on a terminal, one line a step
    /// elsewhere (CI keeps a log, not a screen).
    pub(crate) fn progress(self) -> Progress {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        let on_terminal = io::stderr().is_terminal();
        let current: Mutex<Option<(&'static str, Instant)>> = Mutex::new(None);
        Progress::to(move |event| {
            let Ok(mut current) = current.lock() else {
                return;
            };
            match event {
                ProgressEvent::Started { step } => {
                    *current = Some((step, Instant::now()));
                    if on_terminal {
                        bar.reset();
                        bar.set_message(step);
                        bar.enable_steady_tick(SPINNER_TICK);
                    }
                }
                ProgressEvent::Finished => {
                    if let Some((step, since)) = current.take() {
                        bar.finish_and_clear();
                        let line = format!("  {step}: {}", ms(since.elapsed().as_secs_f64() * 1e3));
                        drop(writeln!(io::stderr(), "{line}"));
                    }
                }
            }
        })
    }
}

impl Output {
    /// Progress of a long step that knows how many bytes it has to go through: a bar on a terminal,
    /// one line at its end elsewhere.
    #[expect(clippy::unused_self, reason = "whoever speaks holds an Output")]
    pub(crate) fn bytes_bar(self, step: &'static str) -> BytesBar {
        // Draws nothing where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(step);
        let since = Instant::now();
        BytesBar { bar, step, since }
    }
}

/// A bar; its step ends when it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct BytesBar {
    bar: ProgressBar,
    step: &'static str,
    since: Instant,
}

impl BytesBar {
    pub(crate) fn set(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }
}

impl Drop for BytesBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        let took = ms(self.since.elapsed().as_secs_f64() * 1e3);
        drop(writeln!(io::stderr(), "  {}: {took}", self.step));
    }
}

/// How often the spinner turns.
const SPINNER_TICK: Duration = Duration::from_millis(100);

/// Text that may quote a guest, made harmless to the operator's terminal: whatever could move the
/// cursor, change colours or titles, or turn the direction of reading is shown escaped.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let harmless = |c: char| c == '\n' || c == '\t' || !(c.is_control() || turns_direction(c));
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let escape = |c: char| {
        if harmless(c) {
            c.to_string()
        } else {
            c.escape_default().to_string()
        }
    };
    Cow::Owned(text.chars().map(escape).collect())
}

/// Unicode's invisible marks that reorder the text around them.
fn turns_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `7.2 ms`, `1.35 s`.
pub(crate) fn ms(ms: f64) -> String {
    if ms < 1000.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// Writes a file whole or not at all: whoever looks sees it, or what was there before.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    std::fs::write(&beside, bytes)?;
    // Losing it in a power cut is no loss: it tells of processes that are gone then.
    Ok(rustix::fs::rename(Path::new(&beside), path)?)
}

/// `83.5 MiB`.
#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Rows under a heading. Columns of figures are aligned to the right, text to the left.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(heading);
    for row in rows {
        table.add_row(row);
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        if rows
            .iter()
            .filter_map(|row| row.get(at))
            .all(|cell| is_figure(cell))
        {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    table.to_string()
}

/// `7.2 ms`, `12`, and what stands for no figure.
fn is_figure(cell: &str) -> bool {
    let first = cell.split_whitespace().next().unwrap_or("-");
    first == "-" || first.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_write_to_the_operators_terminal_through_a_message() {
        let hostile = "exit \u{1b}]0;owned\u{7}\u{1b}[2J\r\u{9b}1m\u{202e}\nnext\tline ü";
        let shown = printable(hostile);
        assert_eq!(
            shown,
            "exit \\u{1b}]0;owned\\u{7}\\u{1b}[2J\\r\\u{9b}1m\\u{202e}\nnext\tline ü"
        );
    }

    #[test]
    fn figures_stand_right_and_text_stands_left() {
        let row = |name: &str, size: &str| vec![name.to_owned(), size.to_owned()];
        let text = table(&["name", "size"], &[row("a", "1.5 MiB"), row("long", "-")]);
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(
            lines,
            [" name     size", " a     1.5 MiB", " long        -"]
        );
    }
}
