//! Progress on standard error: a bar on a terminal, a line for each finished step elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use torpor_sandbox::progress::{Progress, ProgressEvent};

/// How often the bar's clock moves.
const TICK: Duration = Duration::from_millis(100);
/// Steps within a stage that took less are not worth a line.
const LINE_FROM: Duration = Duration::from_millis(100);

/// Who watches a run. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Watch {
    bar: Option<ProgressBar>,
}

impl Watch {
    /// A run of `stages` stages.
    #[must_use]
    pub fn new(stages: u64) -> Self {
        if !io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let bar = ProgressBar::with_draw_target(Some(stages), ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{spinner} [{bar:24}] {pos}/{len} {msg} {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(TICK);
        Self { bar: Some(bar) }
    }

    /// Begins a stage; it ends when the guard is dropped.
    #[must_use]
    pub fn stage(&self, what: impl Into<String>) -> Stage<'_> {
        let what = what.into();
        self.show(&what);
        Stage {
            watch: self,
            what,
            since: Instant::now(),
        }
    }

    /// For the library's operations within a stage.
    #[must_use]
    pub fn progress(&self, prefix: impl Into<String>) -> Progress {
        let (watch, prefix) = (self.clone(), prefix.into());
        let running: Arc<Mutex<Vec<(&'static str, Instant)>>> = Arc::default();
        Progress::to(move |event| {
            let Ok(mut running) = running.lock() else {
                return;
            };
            match event {
                ProgressEvent::Started { step } => {
                    watch.show(&format!("{prefix}: {step}"));
                    running.push((step, Instant::now()));
                }
                ProgressEvent::Finished => {
                    if let Some((step, since)) = running.pop()
                        && since.elapsed() >= LINE_FROM
                    {
                        watch.line(&format!("      {prefix}: {step} {}", seconds(since)));
                    }
                }
            }
        })
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // A closed standard error is nobody to complain to.
            None => drop(writeln!(io::stderr(), "{text}")),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn show(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f64())
}

/// Ends its stage when dropped.
#[derive(Debug)]
pub struct Stage<'a> {
    watch: &'a Watch,
    what: String,
    since: Instant,
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        self.watch
            .line(&format!("  {} {}", self.what, seconds(self.since)));
        if let Some(bar) = &self.watch.bar {
            bar.inc(1);
        }
    }
}
