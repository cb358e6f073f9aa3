//! The volume's object: one value that is changed by compare-and-swap, behind a socket that every node reaches, whatever
//! becomes of the network between them.
//!
//! One line of JSON asks, one answers. While the server is *away* it does not answer, and what it was asked may have been
//! done all the same.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use galleonfs_node_plugin::engine::{Configs, Leader, Leaders, Leadership, LookUpDone, ProposeDone, ReadDone};
use galleonfs_storage_engine::replication::primary::Decision;
use galleonfs_storage_engine::replication::{Change, Config, Incarnation, ReplicaId, Stamp};
use galleonfs_storage_engine::types::{Epoch, Seq, Version};
use serde_json::{Value, json};
use uuid::Uuid;

/// How long a node waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whoever asks who leads would ask again at once.
const BAD_NEWS_AFTER: Duration = Duration::from_millis(500);

/// Owned by the test.
#[derive(Clone)]
pub struct Object(Arc<Mutex<State>>);

struct State {
    stamp: u64,
    config: Config,
    /// The node that claimed the epoch.
    leader: Uuid,
    away: bool,
}

impl Object {
    /// Of a new volume. Listens at `at` as long as the process lives.
    pub fn listen(at: &Path, replicas: &[Uuid]) -> Result<Self> {
        let _ = fs::remove_file(at);
        let listener = UnixListener::bind(at).with_context(|| format!("listening at {}", at.display()))?;
        let config = Config::new(replicas.iter().map(|replica| ReplicaId(replica.into_bytes())));
        let object = Self(Arc::new(Mutex::new(State {
            stamp: 1,
            config,
            leader: Uuid::nil(),
            away: false,
        })));
        let served = object.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let object = served.clone();
                // Whoever hangs up has lost the answer.
                thread::spawn(move || object.serve(stream));
            }
        });
        Ok(object)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn config(&self) -> Config {
        self.state().config.clone()
    }

    /// Nobody gets an answer until it is back.
    pub fn set_away(&self, away: bool) {
        self.state().away = away;
    }

    /// As the registry does before a node leads.
    pub fn claim(&self, node: Uuid) -> (u64, Uuid) {
        let incarnation = Uuid::new_v4();
        let mut state = self.state();
        state.leader = node;
        state.config = state.config.with(&Change::Claim(Incarnation(incarnation.into_bytes())));
        state.stamp += 1;
        (u64::from(state.config.epoch.0), incarnation)
    }

    /// As nobody may: to look at one replica alone, in the end.
    pub fn leave_only(&self, replica: Uuid) {
        let mut state = self.state();
        state.config.in_sync = [ReplicaId(replica.into_bytes())].into();
        state.stamp += 1;
    }

    fn serve(&self, stream: UnixStream) -> Result<()> {
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        let asked: Value = serde_json::from_str(&line)?;
        let mut state = self.state();
        let answer = if asked["propose"].is_null() {
            json!({"stamp": state.stamp, "config": to_json(&state.config), "leader": state.leader})
        } else {
            let config = from_json(&asked["propose"])?;
            if asked["expected"] == state.stamp {
                config.follows(&state.config)?;
                state.config = config;
                state.stamp += 1;
                json!({"made": state.stamp})
            } else {
                json!({"conflict": true})
            }
        };
        if state.away {
            bail!("away");
        }
        drop(state);
        writeln!(&stream, "{answer}")?;
        Ok(())
    }
}

/// The object as a node reaches it.
#[derive(Debug)]
pub struct Remote(pub PathBuf);

impl Remote {
    fn ask(at: &Path, question: &Value) -> Result<Value> {
        let stream = UnixStream::connect(at)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        writeln!(&stream, "{question}")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        ensure!(!line.is_empty(), "no answer");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Remote {
    /// Which state of the object it is.
    pub fn stamp(at: &Path) -> Result<u64> {
        Self::ask(at, &json!({}))?["stamp"].as_u64().context("no stamp")
    }
}

impl Configs for Remote {
    fn read(&self, done: ReadDone) {
        let at = self.0.clone();
        thread::spawn(move || {
            let found = Self::ask(&at, &json!({})).and_then(|answer| {
                let stamp = answer["stamp"].as_u64().context("no stamp")?;
                Ok((Stamp(stamp), from_json(&answer["config"])?))
            });
            done(found.ok());
        });
    }

    fn propose(&self, expected: Stamp, config: Config, done: ProposeDone) {
        let at = self.0.clone();
        thread::spawn(move || {
            let question = json!({"expected": expected.0, "propose": to_json(&config)});
            done(match Self::ask(&at, &question) {
                Ok(answer) if answer["conflict"] == true => Decision::Conflict,
                Ok(answer) => answer["made"]
                    .as_u64()
                    .map_or(Decision::Unknown, |stamp| Decision::Made(Stamp(stamp))),
                Err(_) => Decision::Unknown,
            });
        });
    }
}

impl Leaders for Remote {
    fn look_up(&self, _: Uuid, done: LookUpDone) {
        let at = self.0.clone();
        thread::spawn(move || {
            let found = Self::ask(&at, &json!({})).and_then(|answer| {
                let config = from_json(&answer["config"])?;
                let node: Uuid = answer["leader"].as_str().context("no leader")?.parse()?;
                let leader = config.incarnation.map(|incarnation| Leader {
                    incarnation,
                    name: node.to_string(),
                    node: Some(node),
                });
                let epoch = config.epoch;
                Ok(Leadership { epoch, leader })
            });
            if found.is_err() {
                thread::sleep(BAD_NEWS_AFTER);
            }
            done(found.ok());
        });
    }
}

fn to_json(config: &Config) -> Value {
    let name = |id: &ReplicaId| Uuid::from_bytes(id.0).to_string();
    let out = config
        .out
        .iter()
        .map(|(id, Version { epoch, seq })| json!([name(id), epoch.0, seq.0]));
    json!({
        "epoch": config.epoch.0,
        "incarnation": config.incarnation.map(|it| Uuid::from_bytes(it.0).to_string()),
        "inSync": config.in_sync.iter().map(name).collect::<Vec<_>>(),
        "syncing": config.syncing.iter().map(name).collect::<Vec<_>>(),
        "out": out.collect::<Vec<_>>(),
    })
}

fn from_json(value: &Value) -> Result<Config> {
    let uuid = |value: &Value| Ok::<_, anyhow::Error>(value.as_str().context("no name")?.parse::<Uuid>()?.into_bytes());
    let number = |value: &Value| value.as_u64().context("no number");
    let list = |value: &Value| value.as_array().cloned().context("no list");
    let ids = |value: &Value| -> Result<_> { list(value)?.iter().map(|id| uuid(id).map(ReplicaId)).collect() };
    let out = |row: &Value| -> Result<_> {
        let version = Version {
            epoch: Epoch(u32::try_from(number(&row[1])?)?),
            seq: Seq(number(&row[2])?),
        };
        Ok((ReplicaId(uuid(&row[0])?), version))
    };
    Ok(Config {
        epoch: Epoch(u32::try_from(number(&value["epoch"])?)?),
        incarnation: match &value["incarnation"] {
            Value::Null => None,
            some => Some(Incarnation(uuid(some)?)),
        },
        in_sync: ids(&value["inSync"])?,
        syncing: ids(&value["syncing"])?,
        out: list(&value["out"])?.iter().map(out).collect::<Result<_>>()?,
    })
}
