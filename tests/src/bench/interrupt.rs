//! Ctrl-C in the middle of a run: the program that is being waited for ends, and the caller cleans up as after any
//! failure.
//!
//! The signals are blocked in every thread and taken by one that waits for nothing else, so no handler has to be
//! written. A second Ctrl-C changes nothing: cleaning up is short.

use std::io::{self, Read};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

#[derive(Debug, Default)]
struct State {
    caught: Option<Signal>,
    /// The program that is being waited for.
    running: Option<Pid>,
}

#[derive(Clone, Debug)]
pub struct Interrupt {
    state: Arc<Mutex<State>>,
}

impl Interrupt {
    /// To be called before any other thread is started: they inherit which signals are blocked.
    pub fn install() -> Result<Interrupt> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        signals.thread_block().context("block the signals that end a program")?;
        let interrupt = Interrupt { state: Arc::default() };
        let waiting = interrupt.clone();
        thread::spawn(move || {
            while let Ok(signal) = signals.wait() {
                let mut state = waiting.state();
                state.caught.get_or_insert(signal);
                if let Some(running) = state.running {
                    // It may have ended by itself, and nobody has reaped it yet.
                    let _ = kill(running, Signal::SIGKILL);
                }
            }
        });
        Ok(interrupt)
    }

    /// Fails if we have been told to end.
    pub fn check(&self) -> Result<()> {
        match self.state().caught {
            Some(signal) => bail!("ended by {signal}"),
            None => Ok(()),
        }
    }

    /// Runs a program to its end, or to ours. Its outputs are to be pipes, of which it fills at most the first.
    pub fn output(&self, mut command: Command) -> Result<Output> {
        let mut child = {
            let mut state = self.state();
            if let Some(signal) = state.caught {
                bail!("ended by {signal}");
            }
            let child = command.spawn()?;
            state.running = Some(Pid::from_raw(i32::try_from(child.id())?));
            child
        };
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let read = [
            child.stdout.take().map(|mut pipe| pipe.read_to_end(&mut stdout)),
            child.stderr.take().map(|mut pipe| pipe.read_to_end(&mut stderr)),
        ];
        let status = {
            // Reaped with the lock held, so that nobody signals its number when that is somebody else's already.
            let mut state = self.state();
            state.running = None;
            child.wait()?
        };
        self.check()?;
        read.into_iter().flatten().collect::<io::Result<Vec<_>>>()?;
        Ok(Output { status, stdout, stderr })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while holding it")
    }
}
