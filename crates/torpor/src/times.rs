//! Times and counts over iterations, in the order in which they first came.

use std::collections::BTreeMap;

use torpor_sandbox::pause::report::PauseReport;
use torpor_sandbox::resume::ResumeReport;
use torpor_sandbox::run_times::RunTimes;

use crate::output::{ms, table};
use crate::report::windows;

/// Named series.
#[derive(Debug, Default)]
pub(crate) struct Times {
    series: Vec<(String, Vec<f64>)>,
}

impl Times {
    /// Adds one iteration's time to a series.
    pub(crate) fn add(&mut self, name: &str, time_ms: f64) {
        match self.series.iter_mut().find(|(known, _)| known == name) {
            Some((_, series)) => series.push(time_ms),
            None => self.series.push((name.to_owned(), vec![time_ms])),
        }
    }

    /// A resume and its steps.
    pub(crate) fn add_resume(&mut self, report: &ResumeReport) {
        self.add("resume", report.total_ms);
        for (step, time_ms) in [
            ("open", report.open_ms),
            ("vmm", report.vmm_ms),
            ("memory", report.memory_ms),
            ("disk", report.disk_ms),
            ("load", report.load_ms),
            ("answer", report.answer_ms),
        ] {
            self.add(&format!("resume.{step}"), time_ms);
        }
    }

    /// A pause and its steps.
    pub(crate) fn add_pause(&mut self, report: &PauseReport) {
        self.add("pause", report.total_ms);
        for time in &report.steps {
            self.add(&format!("pause.{}", time.step), time.ms);
        }
        for (name, time_ms) in windows(report).into_iter().take(3) {
            self.add(&format!("pause.{}", name.replace(' ', "_")), time_ms);
        }
    }

    /// Min, median and p95 by name.
    pub(crate) fn summary(&self) -> BTreeMap<String, RunTimes> {
        let of = |(name, series): &(String, Vec<f64>)| Some((name.clone(), RunTimes::of(series)?));
        self.series.iter().filter_map(of).collect()
    }

    /// The table. A step stands under its whole, indented.
    pub(crate) fn text(&self) -> String {
        let rows = self.series.iter().filter_map(|(name, series)| {
            let times = RunTimes::of(series)?;
            let name = match name.split_once('.') {
                Some((_, step)) => format!("  {step}"),
                None => name.clone(),
            };
            Some(vec![
                name,
                ms(times.min_ms),
                ms(times.median_ms),
                ms(times.p95_ms),
            ])
        });
        table(&["time", "min", "median", "p95"], &rows.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_keep_their_order_and_steps_are_indented() {
        let mut times = Times::default();
        for value in [3.0, 1.0, 2.0] {
            times.add("resume", value);
            times.add("resume.load", value * 2.0);
        }
        assert!((times.summary()["resume.load"].median_ms - 4.0).abs() < f64::EPSILON);
        let text = times.text();
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        assert!(lines[1].trim_start().starts_with("resume"), "{text}");
        assert!(lines[2].trim_start().starts_with("load"), "{text}");
        assert!(
            lines[1].contains("1.0 ms") && lines[1].contains("3.0 ms"),
            "{text}"
        );
    }
}
