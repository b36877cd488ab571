//! `--metrics`: what a command's sandboxes did, as text for Prometheus, for node_exporter's textfile
//! collector.
//!
//! The figures are of one command: they are gathered while it runs and written once, at its end,
//! whether it succeeded or not. Nothing listens.

use std::path::{Path, PathBuf};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use torpor_sandbox::metrics::{SECONDS_BUCKETS, describe};

use crate::error::CliError;
use crate::output::write_whole;

/// A file that is written when the command has ended.
pub(crate) struct MetricsFile {
    path: PathBuf,
    recorder: PrometheusHandle,
}

impl MetricsFile {
    /// Gathers from here on, for the whole process: once.
    pub(crate) fn begin(path: &Path) -> Result<Self, CliError> {
        // Found out before the work is done, not after it.
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        if let Some(dir) = dir
            && !dir.is_dir()
        {
            return Err(CliError::NoFile {
                role: "directory of the metrics' file",
                path: dir.to_owned(),
            });
        }
        let installed = PrometheusBuilder::new()
            .set_buckets(&SECONDS_BUCKETS)
            .and_then(PrometheusBuilder::install_recorder);
        let recorder = installed.map_err(|error| CliError::Panicked(error.to_string()))?;
        describe();
        Ok(Self {
            path: path.to_owned(),
            recorder,
        })
    }

    /// Writes what there is, so that the collector sees all of it or what was there before.
    pub(crate) fn write(&self) -> Result<(), CliError> {
        let text = self.recorder.render();
        write_whole(&self.path, text.as_bytes()).map_err(|source| CliError::Write {
            path: self.path.clone(),
            source,
        })
    }
}
