//! The process that serves the volume, and nothing else, so that its CPU time is what a node plugin would spend.
//!
//! ```text
//! bench ── starts ──► serve: format, attach ── "device /dev/loopN", the processes that take part ──► bench
//! bench ── closes its pipe, or dies ──► serve: detach, exit
//! ```
//!
//! The pipe's end comes also when the bench is killed, so no device is left behind. Only a volume of several replicas is told
//! something before it: see [`several::Led::obey`].

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use galleonfs_node_plugin::disk::{BlockSize, FormatSpec, format_replica};
use galleonfs_node_plugin::engine::{
    AttachSpec, Engine, EngineConfig, EngineError, ErrorKind, Network, Settings, VolumeKey,
};
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::scratch::Scratch;
use super::setup::Setup;
use super::several;

/// The name of the volume.
pub const VOLUME: &str = "bench";

/// What the node plugin takes when nobody says otherwise.
pub const MAP_BUDGET_BYTES: usize = 256 << 20;

/// How the serving process announces its device.
const DEVICE: &str = "device ";

/// How long whoever still uses the device may take to end: a killed fio, whose last I/O is out.
const DETACH_WAIT_MAX: Duration = Duration::from_secs(20);

/// What is served, and how.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    pub setup: Setup,
    pub size_bytes: u64,
    pub map_budget_bytes: usize,
}

/// The serving process, as the bench sees it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Held to keep it running.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    device: PathBuf,
    /// All that serve: the child, and those that it has started.
    pids: Vec<u32>,
}

impl Server {
    /// Starts `program`, which is `galleonfs-bench`, as the serving process, and waits until the device is there.
    pub fn start(program: &Path, scratch: &Scratch, serving: Serving) -> Result<Server> {
        let mut child = Command::new(program)
            .arg("--dir")
            .arg(scratch.dir())
            .arg("serve")
            .arg(serving.setup.name())
            .arg(serving.size_bytes.to_string())
            .arg(serving.map_budget_bytes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the serving process")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("the serving process has no output")?);
        let mut server = Server {
            child,
            stdin,
            stdout,
            device: PathBuf::new(),
            pids: Vec::new(),
        };
        let mut line = String::new();
        server.stdout.read_line(&mut line)?;
        match line.trim_end().strip_prefix(DEVICE) {
            Some(announced) => {
                let mut words = announced.split(' ');
                server.device = words.next().unwrap_or_default().into();
                server.pids = words.map(str::parse).collect::<Result<_, _>>()?;
            }
            // It has said why.
            None => bail!("the serving process made no device"),
        }
        Ok(server)
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The CPU time of its processes so far, of all their threads, in user mode and for them in the kernel.
    pub fn cpu(&self) -> Result<Duration> {
        let mut all = Duration::ZERO;
        for pid in &self.pids {
            let path = format!("/proc/{pid}/stat");
            let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
            let ticks = cpu_ticks(&stat).with_context(|| format!("{path} reads `{stat}`"))?;
            let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
            all += Duration::from_secs(ticks) / u32::try_from(per_second)?;
        }
        Ok(all)
    }

    /// Asks a volume of several replicas for something; see [`several::Led::obey`].
    pub fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.stdin.as_mut().context("it was told to end")?, "{line}")?;
        let mut answer = String::new();
        if self.stdout.read_line(&mut answer)? == 0 {
            bail!("the serving process did not answer `{line}`");
        }
        Ok(answer.trim_end().to_owned())
    }

    /// Has the process that was killed started again.
    pub fn start_again(&mut self) -> Result<()> {
        let answer = self.ask("start")?;
        self.pids = answer.split(' ').map(str::parse).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Waits until it has stopped working by itself: what a job leaves to the background is not to slow the next one.
    pub fn settle(&self, limit: Duration) -> Result<()> {
        const LOOK: Duration = Duration::from_millis(200);
        let start = Instant::now();
        let mut before = self.cpu()?;
        while start.elapsed() < limit {
            thread::sleep(LOOK);
            let now = self.cpu()?;
            if now == before {
                break;
            }
            before = now;
        }
        Ok(())
    }

    /// Ends it, which takes the device down.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if self.stdin.take().is_none() {
            return Ok(());
        }
        let status = self.child.wait().context("wait for the serving process")?;
        if !status.success() {
            bail!("the serving process ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("galleonfs-bench: {error:#}");
        }
    }
}

/// User and system time from the line of `/proc/<pid>/stat`.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The program's name may hold blanks and brackets; what follows the last bracket is regular.
    let mut fields = stat[stat.rfind(')')? + 2..].split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The serving process itself: until its standard input ends.
pub fn serve(scratch: &Scratch, serving: Serving) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start a runtime")?;
    runtime.block_on(Engine::remove_stale(&scratch.mounts(serving.setup)))?;
    let key = match serving.setup {
        Setup::OneReplica => None,
        Setup::Sealed => Some(VolumeKey::new(1, &[0x5a; 32])?),
        Setup::ThreeReplicas | Setup::ThreeReplicasPlain => {
            let mut led = several::Led::start(&runtime, scratch, serving)?;
            announce(&led.device().path, &led.pids())?;
            let obeyed = obey(&mut led);
            return obeyed.and(take_down(&runtime, led.engine()));
        }
    };
    let engine = Engine::start(serving.engine(scratch, Network::default()))?;
    let replica_dir = scratch.replica(serving.setup);
    let format = serving.format(key.clone());
    format_replica(&replica_dir, &format)?;
    let spec = AttachSpec {
        volume: VOLUME.to_owned(),
        volume_uid: format.volume_uid,
        replica_uid: format.replica_uid,
        cluster_id: format.cluster_id,
        replica_dir,
        epoch: 1,
        size_bytes: serving.size_bytes,
        read_only: false,
        settings: Settings::default(),
        key,
    };
    let device = runtime.block_on(engine.attach(spec))?;
    until_told(&runtime, &engine, &device.path, &[std::process::id()])
}

impl Serving {
    /// How the engine is set up.
    pub fn engine(self, scratch: &Scratch, network: Network) -> EngineConfig {
        EngineConfig {
            shards: 0,
            map_budget_bytes: self.map_budget_bytes,
            scrub: None,
            runtime_dir: scratch.mounts(self.setup),
            network,
        }
    }

    /// A new replica of a new volume.
    pub fn format(self, key: Option<VolumeKey>) -> FormatSpec {
        FormatSpec {
            volume_uid: Uuid::new_v4(),
            replica_uid: Uuid::new_v4(),
            cluster_id: Uuid::new_v4(),
            block_size: BlockSize::default(),
            size_bytes: self.size_bytes,
            salt: Uuid::new_v4().as_u64_pair().0,
            key,
        }
    }
}

/// Says where the device is, and takes it down when the input ends.
fn until_told(runtime: &Runtime, engine: &Engine, device: &Path, pids: &[u32]) -> Result<()> {
    let announced = announce(device, pids);
    // The end of the input, or of the bench: both mean the same.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    announced.and(take_down(runtime, engine))
}

/// Does what the bench asks for, until the input ends.
fn obey(led: &mut several::Led) -> Result<()> {
    for line in std::io::stdin().lines() {
        let answer = led.obey(&line?)?;
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{answer}")?;
        stdout.flush()?;
    }
    Ok(())
}

fn take_down(runtime: &Runtime, engine: &Engine) -> Result<()> {
    let start = Instant::now();
    let detached = loop {
        match runtime.block_on(engine.detach(VOLUME)) {
            Err(error) if is_in_use(&error) && start.elapsed() < DETACH_WAIT_MAX => {}
            outcome => break outcome,
        }
    };
    detached.context("take the device down")
}

fn is_in_use(error: &EngineError) -> bool {
    error.kind() == ErrorKind::Retry
}

fn announce(device: &Path, pids: &[u32]) -> Result<()> {
    let mut stdout = std::io::stdout();
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    writeln!(stdout, "{DEVICE}{} {}", device.display(), pids.join(" "))?;
    Ok(stdout.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_time_is_found_behind_any_name() {
        let stat = "17 (a (b) c) S 1 17 17 0 -1 4194304 900 0 0 0 120 34 5 6 20 0 4 0 99 1 2";
        assert_eq!(cpu_ticks(stat), Some(154));
    }
}
