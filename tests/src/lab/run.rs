//! Running other programs, and saying what is going on while a person waits.
//!
//! Every program that fails is reported with its command line and the end of what it printed: a lab that only says
//! "exit status 1" sends its user to read source code.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

/// How much of a failed program's output an error message carries.
const ERROR_TAIL_LINES: usize = 25;

/// Long steps say that they are still alive this often.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Runs a program to its end and gives back what it wrote to its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let text = describe(command);
    let result = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not start `{text}`"))?;
    finish(&text, result)
}

/// As [`output`], with `input` on the program's standard input.
pub fn output_with_input(command: &mut Command, input: &[u8]) -> Result<String> {
    let text = describe(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not start `{text}`"))?;
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    // A program that ends early closes the pipe; its exit status tells more than our EPIPE would.
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let result = child.wait_with_output().with_context(|| format!("lost `{text}`"))?;
    let _ = writer.join();
    finish(&text, result)
}

/// Runs a program whose output belongs to the person at the terminal.
pub fn visible(command: &mut Command) -> Result<()> {
    let text = describe(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("could not start `{text}`"))?;
    if !status.success() {
        bail!("`{text}` ended with {status}");
    }
    Ok(())
}

/// For clean-up, where the thing to remove may be gone already.
pub fn ignore(command: &mut Command) {
    let _ = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

pub fn command<I, S>(program: impl AsRef<OsStr>, arguments: I) -> Command
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", search_path());
    command
}

/// A person's PATH often lacks the places where Debian keeps what only root runs.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Runs one line of words, e.g. `ip link set lo up`. For arguments without blanks.
pub fn words(line: &str) -> Result<String> {
    output(&mut words_command(line))
}

pub fn words_command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a command line has a program");
    command(program, words)
}

/// Where `program` is on the PATH, if it is.
pub fn which(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// An error that waiting longer will not cure.
#[derive(Debug)]
pub struct Final(pub String);

impl std::fmt::Display for Final {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Final {}

/// Calls `look` until it finds something, and says what was missing when the time is over. Errors
/// are tried again, except [`Final`] ones.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let last_error = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) if error.is::<Final>() => return Err(error.context(format!("while waiting for {what}"))),
            Err(error) => Some(error),
        };
        if start.elapsed() >= limit {
            let waited = format!("waited {} s for {what}", limit.as_secs());
            return match last_error {
                Some(error) => Err(error.context(waited)),
                None => bail!(waited),
            };
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// Does one step that a person may have to wait for: says when it began, what it is, that it goes on, and how long it
/// took. A log of it tells where the time went, and which step never ended.
pub fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    say(&format!("==> {} {title}", time_of_day()));
    let start = Instant::now();
    let (done, waiting) = mpsc::channel::<()>();
    let heartbeat = {
        let title = title.to_string();
        thread::spawn(move || {
            while let Err(mpsc::RecvTimeoutError::Timeout) = waiting.recv_timeout(HEARTBEAT) {
                say(&format!("    {title}: {} s so far", start.elapsed().as_secs()));
            }
        })
    };
    let result = work();
    drop(done);
    let _ = heartbeat.join();
    let verdict = if result.is_ok() { "done in" } else { "FAILED after" };
    say(&format!("    {verdict} {:.1} s", start.elapsed().as_secs_f64()));
    result.with_context(|| title.to_string())
}

/// As in `23:59:07`, UTC: logs of several machines can be laid side by side.
fn time_of_day() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    format!("{:02}:{:02}:{:02}", now / 3600 % 24, now / 60 % 60, now % 60)
}

/// A line for the person at the terminal. Standard output is left to what a command was asked for.
pub fn say(line: &str) {
    eprintln!("{line}");
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        let argument = argument.to_string_lossy();
        // Scripts are passed as one argument; the first line is enough to recognise them.
        let mut lines = argument.lines();
        text.push_str(lines.next().unwrap_or_default());
        if lines.next().is_some() {
            text.push('…');
        }
    }
    text
}

fn finish(text: &str, result: Output) -> Result<String> {
    if !result.status.success() {
        let mut said = String::from_utf8_lossy(&result.stderr).into_owned();
        if said.trim().is_empty() {
            said = String::from_utf8_lossy(&result.stdout).into_owned();
        }
        let lines: Vec<&str> = said.trim().lines().collect();
        let tail = lines[lines.len().saturating_sub(ERROR_TAIL_LINES)..].join("\n");
        bail!("`{text}` ended with {}: {tail}", result.status);
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}
