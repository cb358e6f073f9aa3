//! Where log lines go and which are wanted. Lines go to standard error: standard output belongs to what a command
//! was asked to print.

use std::io;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

#[derive(Args, Clone, Debug)]
pub struct LogArguments {
    /// Which log lines are written: error, warn, info, debug, trace, or per module ("info,galleonfs_node_plugin=debug").
    #[arg(
        long = "log",
        global = true,
        env = "GALLEONFS_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub filter: String,
    /// How log lines look.
    #[arg(long = "log-format", global = true, env = "GALLEONFS_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line, for programs.
    Json,
    /// For eyes.
    Text,
}

impl LogArguments {
    /// Starts writing log lines. Called once, by the long-running commands only.
    pub(crate) fn install(&self) -> Result<()> {
        let filter = EnvFilter::try_new(&self.filter).with_context(|| {
            format!(
                "the log filter {:?} is not valid: use a level such as `info`, or `info,module=debug`",
                self.filter
            )
        })?;
        let lines = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(io::stderr);
        let installed = match self.format {
            LogFormat::Json => lines.json().flatten_event(true).try_init(),
            LogFormat::Text => lines.with_ansi(false).try_init(),
        };
        installed.map_err(anyhow::Error::from_boxed).context("starting the log")
    }
}
