//! The long-running programs of a lab: started apart from the terminal, recorded, and ended by exactly that record.
//!
//! A record is a process id together with the time the process was born, so that an id which the kernel has given to
//! somebody else since is never signalled. Every program also carries the lab's directory in its environment; what it
//! starts inherits that, and [`Processes::descendants`] finds helpers whose parent is gone (containerd's shims).

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::layout::{Layout, write_file};
use super::run::Final;

/// The environment variable by which a lab knows its own.
const MARK: &str = "GALLEONFS_LAB";

#[derive(Clone, Debug)]
pub struct Processes {
    records: PathBuf,
    logs: PathBuf,
    mark: PathBuf,
}

/// A program that was ended, and how it had been started.
#[derive(Clone, Debug)]
pub struct Ended {
    name: String,
    words: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

/// A process that cannot be confused with a later one of the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    born: u64,
}

impl Process {
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The program's name may hold blanks and brackets; what follows the last bracket is regular.
        let mut fields = stat[stat.rfind(')')? + 2..].split(' ');
        let state = fields.next()?;
        let born = fields.nth(18)?.parse().ok()?;
        (state != "Z").then_some(Self { pid, born })
    }

    pub fn alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    pub fn signal(self, signal: Signal) {
        if self.alive() {
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Waits until the process is gone. Where it is our own child it is reaped as well.
    pub fn wait_gone(self, limit: Duration) -> bool {
        let start = Instant::now();
        while self.alive() {
            let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
            if start.elapsed() >= limit {
                return false;
            }
            thread::sleep(Duration::from_millis(10));
        }
        true
    }
}

impl Processes {
    pub fn new(layout: &Layout) -> Self {
        Self {
            records: layout.pids(),
            logs: layout.logs(),
            mark: layout.dir(),
        }
    }

    /// Starts `command` in a session of its own, with its output in `logs/<name>.log`.
    pub fn start(&self, name: &str, command: &mut Command) -> Result<Process> {
        let log = self.log(name);
        fs::create_dir_all(&self.logs)?;
        let output = OpenOptions::new().create(true).append(true).open(&log)?;
        let errors = output.try_clone()?;
        command
            .env(MARK, &self.mark)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        // SAFETY: setsid is async-signal-safe and touches nothing that the parent shares.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("could not start {name}"))?;
        let pid = i32::try_from(child.id())?;
        let process = Process::of(pid).with_context(|| format!("{name} ended at once, see {}", log.display()))?;
        write_file(&self.records.join(name), format!("{} {}\n", process.pid, process.born))?;
        Ok(process)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    pub fn find(&self, name: &str) -> Option<Process> {
        let record = fs::read_to_string(self.records.join(name)).ok()?;
        let (pid, born) = record.trim().split_once(' ')?;
        let process = Process {
            pid: pid.parse().ok()?,
            born: born.parse().ok()?,
        };
        process.alive().then_some(process)
    }

    /// Fails with the end of its log if the program is not running.
    pub fn check(&self, name: &str) -> Result<()> {
        if self.find(name).is_some() {
            return Ok(());
        }
        let log = self.log(name);
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("\n");
        Err(Final(format!("{name} is not running; the end of {}:\n{tail}", log.display())).into())
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.records).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Asks a program to end, and insists when it does not within `patience`.
    pub fn stop(&self, name: &str, patience: Duration) {
        self.stop_all(&[name.to_string()], patience);
    }

    /// Ends a program that will be started again, see [`Processes::start_again`].
    pub fn end(&self, name: &str, patience: Duration) -> Result<Ended> {
        self.check(name)?;
        let process = self.find(name).with_context(|| format!("{name} is not running"))?;
        let strings = |file: &str| -> Result<Vec<OsString>> {
            let bytes = fs::read(format!("/proc/{}/{file}", process.pid))?;
            let strings = bytes
                .split(|byte| *byte == 0)
                .map(|bytes| OsStr::from_bytes(bytes).to_owned());
            Ok(strings.filter(|string| !string.is_empty()).collect())
        };
        let variable = |text: OsString| {
            let at = text.as_bytes().iter().position(|byte| *byte == b'=')?;
            let (name, value) = (&text.as_bytes()[..at], &text.as_bytes()[at + 1..]);
            Some((OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value).to_owned()))
        };
        let ended = Ended {
            name: name.to_string(),
            words: strings("cmdline")?,
            environment: strings("environ")?.into_iter().filter_map(variable).collect(),
        };
        self.stop(name, patience);
        Ok(ended)
    }

    /// Starts a program as it was started before.
    pub fn start_again(&self, ended: &Ended) -> Result<Process> {
        let (program, arguments) = ended.words.split_first().context("it had no command line")?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(ended.environment.iter().cloned());
        self.start(&ended.name, &mut command)
    }

    /// As [`Processes::stop`], for several at once.
    pub fn stop_all(&self, names: &[String], patience: Duration) {
        let processes: Vec<Process> = names.iter().filter_map(|name| self.find(name)).collect();
        end(&processes, patience);
        for name in names {
            let _ = fs::remove_file(self.records.join(name));
        }
    }

    /// Every living process that was started by this lab's programs and kept their environment.
    pub fn descendants(&self) -> Vec<Process> {
        let mark = [MARK.as_bytes(), b"=", self.mark.as_os_str().as_encoded_bytes()].concat();
        let marked = |pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark)
        };
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        all_pids()
            .into_iter()
            .filter(|pid| *pid != own)
            .filter(marked)
            .filter_map(Process::of)
            .collect()
    }
}

pub fn all_pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Ends processes: a request, patience, then SIGKILL.
pub fn end(processes: &[Process], patience: Duration) {
    for process in processes {
        process.signal(Signal::SIGTERM);
    }
    let deadline = Instant::now() + patience;
    for process in processes {
        if !process.wait_gone(deadline.saturating_duration_since(Instant::now())) {
            process.signal(Signal::SIGKILL);
        }
    }
    for process in processes {
        process.wait_gone(Duration::from_secs(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_birth_and_not_by_its_number_alone() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.alive());
        assert!(
            !Process {
                born: own.born + 1,
                ..own
            }
            .alive()
        );
    }
}
