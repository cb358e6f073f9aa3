//! An API server that is not there for a while.

use std::time::Duration;

use anyhow::Result;

use super::Lab;
use super::processes::Ended;
use super::run::{say, wait_for};

const PROGRAM: &str = "kube-apiserver";

/// It ends in order when it is asked to; whether it does is not what is tried.
const PATIENCE: Duration = Duration::from_secs(1);
const BACK: Duration = Duration::from_secs(120);

/// While this lives nobody reaches the API server: connections are refused.
#[derive(Debug)]
pub struct Outage<'a> {
    lab: &'a Lab,
    ended: Option<Ended>,
}

impl Lab {
    pub fn stop_api_server(&self) -> Result<Outage<'_>> {
        let ended = self.processes.end(PROGRAM, PATIENCE)?;
        Ok(Outage {
            lab: self,
            ended: Some(ended),
        })
    }
}

impl Outage<'_> {
    /// Starts it again and waits until it answers.
    pub fn end(mut self) -> Result<()> {
        self.start()?;
        let lab = self.lab;
        wait_for("the API server to be back", BACK, || {
            lab.processes.check(PROGRAM)?;
            lab.kubectl().run(&["get", "--raw", "/readyz"]).map(Some)
        })?;
        lab.wait_nodes_ready(BACK)
    }

    fn start(&mut self) -> Result<()> {
        match self.ended.take() {
            Some(ended) => self.lab.processes.start_again(&ended).map(drop),
            None => Ok(()),
        }
    }
}

/// A test that failed must not take the API server from the next one.
impl Drop for Outage<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.start() {
            say(&format!("    the API server could not be started again: {error:#}"));
        }
    }
}
