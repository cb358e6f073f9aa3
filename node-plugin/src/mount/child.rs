//! Programs that touch a volume, run so that they cannot take us with them.
//!
//! A file system on a device that does not answer puts whoever touches it to sleep in the kernel, and such a sleeper
//! cannot always be killed. A *thread* of ours sleeping there would be worse than a lost thread: this process answers the
//! volume's I/O, and a process with a sleeping thread never closes its descriptors, so the kernel would never fail the
//! I/O it waits for, and neither we nor our successor would get anywhere. Hence a separate program for each step, with
//! a deadline; it holds none of our descriptors (they are close-on-exec) and none of our memory (the standard library
//! starts it without copying the address space, which also keeps direct I/O in flight out of danger).
//!
//! One that survives its killing is remembered in [`HungChildren`] under its volume until the kernel lets it go, and
//! its caller is told who hangs where.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::MountError;

/// How long a killed program may take to be gone. A program that can be killed at all needs milliseconds.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// More than a tool says in its worst moment, little enough to put into an error.
const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// A program that was killed and did not go.
#[derive(Debug)]
struct Hung {
    what: String,
    pid: u32,
    since: Instant,
}

/// The programs that outlived their killing, by volume. Shared by everything that runs programs.
#[derive(Debug, Clone, Default)]
pub struct HungChildren(Arc<Mutex<HashMap<String, Vec<Hung>>>>);

impl HungChildren {
    /// The tools with which to work on `volume`.
    pub fn tools(&self, volume: &str) -> Tools {
        Tools {
            volume: volume.to_owned(),
            hung: self.clone(),
        }
    }

    /// What still hangs on this volume, as a sentence; `None` when nothing does.
    pub fn of(&self, volume: &str) -> Option<String> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = all.get(volume)?.first()?;
        Some(format!(
            "{} (process {}) has been hanging in the kernel for {} s and cannot be killed: the volume does not answer",
            first.what,
            first.pid,
            first.since.elapsed().as_secs()
        ))
    }

    /// How many hang, over all volumes: a metric.
    pub fn count(&self) -> usize {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Vec::len)
            .sum()
    }

    fn remember(&self, volume: &str, hung: Hung) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(volume.to_owned()).or_default().push(hung);
    }

    fn forget(&self, volume: &str, pid: u32) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = all.get_mut(volume) {
            list.retain(|hung| hung.pid != pid);
            if list.is_empty() {
                all.remove(volume);
            }
        }
    }
}

/// Runs programs on behalf of one volume.
#[derive(Debug, Clone)]
pub struct Tools {
    volume: String,
    hung: HungChildren,
}

/// How a program that ended by itself ended.
#[derive(Debug)]
pub struct Finished {
    what: String,
    /// The exit code; a program killed by somebody else counts as 128 + signal, as in a shell.
    pub code: i32,
    pub stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Finished {
    /// What it said, errors first, trimmed: the part of an error text that a person needs.
    pub fn said(&self) -> String {
        let text = [&self.stderr, &self.stdout]
            .map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned())
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("; ");
        if text.is_empty() {
            format!("exit code {}", self.code)
        } else {
            text.replace('\n', "; ")
        }
    }

    /// The output, or the refusal as an error.
    pub fn success(self) -> Result<Vec<u8>, MountError> {
        if self.code == 0 {
            Ok(self.stdout)
        } else {
            Err(self.failure())
        }
    }

    /// An error that tells which program failed and what it said.
    pub fn failure(&self) -> MountError {
        MountError::Failed(format!(
            "{} failed (exit code {}): {}",
            self.what,
            self.code,
            self.said()
        ))
    }
}

impl Tools {
    /// The volume these tools work on.
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// Runs one program to its end, or to the deadline. The program's own refusal is not an error here: several of
    /// them speak through exit codes.
    pub async fn run<I, S>(&self, program: &str, args: I, deadline: Duration) -> Result<Finished, MountError>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let what = args
            .iter()
            .fold(program.to_owned(), |line, arg| line + " " + &arg.to_string_lossy());
        let mut child = Command::new(program)
            .args(&args)
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that helpers which it starts are killed with it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| MountError::Io {
                doing: format!("starting {what}"),
                source,
            })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let ended = tokio::time::timeout(deadline, async {
            let (status, stdout, stderr) = tokio::join!(child.wait(), drain(stdout), drain(stderr));
            status.map(|status| (status, stdout, stderr))
        })
        .await;
        match ended {
            Ok(Ok((status, stdout, stderr))) => Ok(Finished {
                what,
                code: exit_code(status),
                stdout,
                stderr,
            }),
            Ok(Err(source)) => Err(MountError::Io {
                doing: format!("waiting for {what}"),
                source,
            }),
            Err(_) => Err(self.stop(child, what, deadline).await),
        }
    }

    /// Kills what is late. What cannot be killed stays in the care of a task that waits for the kernel.
    async fn stop(&self, mut child: Child, what: String, after: Duration) -> MountError {
        let Some(pid) = child.id() else {
            return MountError::TimedOut { what, after };
        };
        // An error means that the group is already gone, which is what we want.
        let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
        if tokio::time::timeout(KILL_GRACE, child.wait()).await.is_ok() {
            return MountError::TimedOut { what, after };
        }
        tracing::error!(volume = %self.volume, pid, %what, "a program hangs in the kernel and cannot be killed");
        self.hung.remember(
            &self.volume,
            Hung {
                what: what.clone(),
                pid,
                since: Instant::now(),
            },
        );
        let (hung, volume, name) = (self.hung.clone(), self.volume.clone(), what.clone());
        tokio::spawn(async move {
            let _ = child.wait().await;
            hung.forget(&volume, pid);
            tracing::info!(%volume, pid, what = %name, "a program that hung in the kernel is gone");
        });
        MountError::Hung { what, pid }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Reads to the end, keeps the beginning: a tool must not stall on a full pipe, nor fill our memory.
async fn drain(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut chunk).await {
        let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
        kept.extend_from_slice(&chunk[..count.min(room)]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Tools {
        HungChildren::default().tools("v")
    }

    #[tokio::test]
    async fn a_program_that_ends_gives_its_code_and_its_words() {
        let done = tools()
            .run("sh", ["-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(10))
            .await
            .unwrap();
        assert_eq!(done.code, 3);
        assert_eq!(done.stdout, b"out\n");
        assert_eq!(done.said(), "err; out");
        assert!(done.failure().text().contains("exit code 3"));
    }

    #[tokio::test]
    async fn a_late_program_is_killed_with_its_helpers() {
        let tools = tools();
        let started = Instant::now();
        let error = tools
            .run("sh", ["-c", "sleep 1000 & wait"], Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(error, MountError::TimedOut { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(tools.hung.of("v"), None);
    }

    #[tokio::test]
    async fn more_output_than_we_keep_does_not_stall_a_program() {
        let script = "head -c 1000000 /dev/zero";
        let done = tools()
            .run("sh", ["-c", script], Duration::from_secs(10))
            .await
            .unwrap();
        assert_eq!((done.code, done.stdout.len()), (0, OUTPUT_BYTES_MAX));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = tools()
            .run("no-such-program", ["x"], Duration::from_secs(1))
            .await
            .unwrap_err();
        assert!(error.text().contains("starting no-such-program x"), "{}", error.text());
    }

    /// A file system that takes every request and answers none but the first: who asks it sleeps in the kernel, and
    /// cannot be killed once the request was taken.
    struct Sim {
        path: std::path::PathBuf,
    }

    impl Sim {
        fn mount(path: &std::path::Path) -> Sim {
            use std::io::{Read, Write};
            use std::os::fd::AsRawFd;
            let mut device = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/fuse")
                .unwrap();
            let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("sim"), path, Some("fuse"), flags, Some(data.as_str())).unwrap();
            std::thread::spawn(move || {
                let mut request = vec![0; 1 << 20];
                assert!(device.read(&mut request).unwrap() >= 16, "INIT comes first");
                // The answer to INIT: length, no error, the request's id, version 7.31, and zeros.
                let mut answer = [0; 80];
                answer[0] = 80;
                answer[8..16].copy_from_slice(&request[8..16]);
                answer[16] = 7;
                answer[20] = 31;
                device.write_all(&answer).unwrap();
                // Until the connection is aborted.
                while device.read(&mut request).is_ok() {}
            });
            Sim { path: path.to_owned() }
        }

        fn abort(&self) {
            use nix::mount::MntFlags;
            let _ = nix::mount::umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        }
    }

    impl Drop for Sim {
        fn drop(&mut self) {
            self.abort();
        }
    }

    #[tokio::test]
    async fn what_hangs_in_the_kernel_is_named_holds_up_only_its_volume_and_is_forgotten_when_it_wakes() {
        let dir = crate::testing::temp_dir("hung");
        let sim = Sim::mount(dir.path());
        let guards = crate::served::Guards::new(HungChildren::default());
        let tools = guards.hung().tools("v");
        let error = tools
            .run(
                "stat",
                ["-f".as_ref(), dir.path().as_os_str()],
                Duration::from_millis(300),
            )
            .await;
        assert!(matches!(error, Err(MountError::Hung { .. })), "{error:?}");
        let busy = guards.enter("v", "staging").unwrap_err();
        assert!(busy.contains("stat -f") && busy.contains("cannot be killed"), "{busy}");
        assert_eq!(guards.hung().count(), 1);
        let _other = guards.enter("w", "staging").unwrap();

        sim.abort();
        let woken = async {
            while guards.enter("v", "staging").is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), woken).await.unwrap();
    }
}
