//! Histories as text, one item a line.
//!
//! ```text
//! 1 write 7 100       op 1 asks for a write of id 100 to block 7
//! 2 fua 7 101         the same with FUA
//! 3 discard 7
//! 4 read 7
//! 5 flush
//! 6 snapshot 1        of that name
//! 7 snapshot-read 1 7
//! 1 ok                op 1 is done
//! 4 ok 100            a read saw write 100; or `zero`, or `garbage`
//! 2 fail
//! 3 info
//! epoch
//! crash
//! power-loss
//! damaged 7
//! mended 7
//! copy 2 7 3.15 100   replica 2 holds block 7 in version (3, 15): write 100
//! # a remark; empty lines are skipped, too
//! ```

use std::fmt;
use std::str::FromStr;

use super::{Call, History, Item, Value};

/// A line that says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// From 1.
    pub line: usize,
    pub why: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for Malformed {}

impl History {
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let lines = text.lines().enumerate().map(|(at, line)| (at + 1, line.trim()));
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let items = lines.map(|(line, text)| item(text).map_err(|why| Malformed { line, why }));
        Ok(Self {
            items: items.collect::<Result<_, _>>()?,
        })
    }
}

fn item(text: &str) -> Result<Item, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    match words[..] {
        ["epoch"] => Ok(Item::Epoch),
        ["crash"] => Ok(Item::Crash),
        ["power-loss"] => Ok(Item::PowerLoss),
        ["damaged", block] => Ok(Item::Damaged { block: number(block)? }),
        ["mended", block] => Ok(Item::Mended { block: number(block)? }),
        ["copy", replica, block, version, seen] => {
            let (epoch, seq) = version
                .split_once('.')
                .ok_or_else(|| format!("`{version}` is no epoch.seq"))?;
            let version = (number(epoch)?, number(seq)?);
            Ok(Item::Copy {
                replica: number(replica)?,
                block: number(block)?,
                version,
                value: value(seen)?,
            })
        }
        [op, ref rest @ ..] => of(number(op)?, rest, text),
        [] => unreachable!("empty lines are skipped"),
    }
}

fn of(op: u64, words: &[&str], text: &str) -> Result<Item, String> {
    let call = match *words {
        ["ok"] => return Ok(Item::Ok { op, value: None }),
        ["ok", seen] => {
            return Ok(Item::Ok {
                op,
                value: Some(value(seen)?),
            });
        }
        ["fail"] => return Ok(Item::Fail { op }),
        ["info"] => return Ok(Item::Info { op }),
        ["read", block] => Call::Read { block: number(block)? },
        ["write", block, id] => Call::Write {
            block: number(block)?,
            id: number(id)?,
            fua: false,
        },
        ["fua", block, id] => Call::Write {
            block: number(block)?,
            id: number(id)?,
            fua: true,
        },
        ["discard", block] => Call::Discard { block: number(block)? },
        ["flush"] => Call::Flush,
        ["snapshot", name] => Call::Snapshot { name: number(name)? },
        ["snapshot-read", name, block] => Call::SnapshotRead {
            name: number(name)?,
            block: number(block)?,
        },
        _ => return Err(format!("`{text}` is nothing that happens")),
    };
    Ok(Item::Invoke { op, call })
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("`{word}` is no number, or too large"))
}

fn value(word: &str) -> Result<Value, String> {
    match word {
        "zero" => Ok(Value::Zero),
        "garbage" => Ok(Value::Garbage),
        id => Ok(Value::Write(number(id)?)),
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.items.iter().try_for_each(|item| writeln!(f, "{item}"))
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Item::Invoke { op, call } => write!(f, "{op} {call}"),
            Item::Ok { op, value: None } => write!(f, "{op} ok"),
            Item::Ok { op, value: Some(value) } => write!(f, "{op} ok {value}"),
            Item::Fail { op } => write!(f, "{op} fail"),
            Item::Info { op } => write!(f, "{op} info"),
            Item::Epoch => write!(f, "epoch"),
            Item::Crash => write!(f, "crash"),
            Item::PowerLoss => write!(f, "power-loss"),
            Item::Damaged { block } => write!(f, "damaged {block}"),
            Item::Mended { block } => write!(f, "mended {block}"),
            Item::Copy {
                replica,
                block,
                version: (epoch, seq),
                value,
            } => {
                write!(f, "copy {replica} {block} {epoch}.{seq} {value}")
            }
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::Read { block } => write!(f, "read {block}"),
            Call::Write { block, id, fua: false } => write!(f, "write {block} {id}"),
            Call::Write { block, id, fua: true } => write!(f, "fua {block} {id}"),
            Call::Discard { block } => write!(f, "discard {block}"),
            Call::Flush => write!(f, "flush"),
            Call::Snapshot { name } => write!(f, "snapshot {name}"),
            Call::SnapshotRead { name, block } => write!(f, "snapshot-read {name} {block}"),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Zero => write!(f, "zero"),
            Value::Write(id) => write!(f, "{id}"),
            Value::Garbage => write!(f, "garbage"),
        }
    }
}
