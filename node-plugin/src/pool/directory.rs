//! Looking at a pool's directory, and labelling it. Blocking; called on threads for that.

use std::io::{ErrorKind, Write};
use std::path::Path;

use nix::sys::statvfs::{FsFlags, statvfs};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The label file.
const LABEL: &str = "pool.json";

/// The newest label that we understand.
pub const FORMAT: u32 = 1;

/// Left by mkfs in every new file system, and no data.
const LOST_AND_FOUND: &str = "lost+found";

/// Whose directory it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Label {
    pub format: u32,
    pub cluster_id: Uuid,
    pub pool_uid: Uuid,
}

/// What a label file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelFound {
    /// There is none; `empty` when there is nothing else either.
    None {
        empty: bool,
    },
    Label(Label),
    /// It is of a release newer than this one.
    Newer(u32),
    Unreadable(String),
}

/// Room on the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    pub available_bytes: u64,
    pub read_only: bool,
}

/// What stands at a pool's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    Missing,
    NotADirectory,
    Directory { label: LabelFound, space: Space },
}

/// Looks; changes nothing.
pub fn look(path: &Path) -> std::io::Result<Look> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Look::Missing),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return Ok(Look::NotADirectory),
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_dir() => return Ok(Look::NotADirectory),
        Ok(_) => {}
    }
    let stat = statvfs(path)?;
    let unit = stat.fragment_size();
    let space = Space {
        total_bytes: stat.blocks() * unit,
        available_bytes: stat.blocks_available() * unit,
        read_only: stat.flags().contains(FsFlags::ST_RDONLY),
    };
    Ok(Look::Directory {
        label: read_label(path)?,
        space,
    })
}

fn read_label(path: &Path) -> std::io::Result<LabelFound> {
    let text = match std::fs::read(path.join(LABEL)) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut empty = true;
            for entry in std::fs::read_dir(path)? {
                let name = entry?.file_name();
                // A label that was being written when the node died is no data either.
                empty &= name == LOST_AND_FOUND || name == "pool.json.new";
            }
            return Ok(LabelFound::None { empty });
        }
        Err(error) => return Ok(LabelFound::Unreadable(error.to_string())),
    };
    Ok(parse_label(&text))
}

/// Takes the text of a label file.
pub fn parse_label(text: &[u8]) -> LabelFound {
    // The format first: the other fields of a later one may be different.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let format = match serde_json::from_slice::<Format>(text) {
        Ok(found) => found.format,
        Err(error) => return LabelFound::Unreadable(error.to_string()),
    };
    if format > FORMAT {
        return LabelFound::Newer(format);
    }
    match serde_json::from_slice(text) {
        Ok(label) => LabelFound::Label(label),
        Err(error) => LabelFound::Unreadable(error.to_string()),
    }
}

/// Makes the directory of a pool that is allowed to be made.
pub fn make_directory(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(path)
}

/// Labels an empty directory. Durable when this returns.
pub fn write_label(path: &Path, label: &Label) -> std::io::Result<()> {
    let new = path.join("pool.json.new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(label)?)?;
    file.sync_all()?;
    std::fs::rename(&new, path.join(LABEL))?;
    std::fs::File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label_at(path: &Path) -> LabelFound {
        match look(path).unwrap() {
            Look::Directory { label, .. } => label,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_directory_tells_whose_it_is() {
        let dir = crate::testing::temp_dir("pool");
        let path = dir.path();
        std::fs::create_dir(path.join(LOST_AND_FOUND)).unwrap();
        assert_eq!(label_at(path), LabelFound::None { empty: true });
        std::fs::write(path.join("x"), b"").unwrap();
        assert_eq!(label_at(path), LabelFound::None { empty: false });
        let label = Label {
            format: FORMAT,
            cluster_id: Uuid::new_v4(),
            pool_uid: Uuid::new_v4(),
        };
        write_label(path, &label).unwrap();
        assert_eq!(label_at(path), LabelFound::Label(label));
        std::fs::write(path.join(LABEL), br#"{"format":9,"something":"else"}"#).unwrap();
        assert_eq!(label_at(path), LabelFound::Newer(9));
        std::fs::write(path.join(LABEL), b"torn").unwrap();
        assert!(matches!(label_at(path), LabelFound::Unreadable(_)));
    }

    #[test]
    fn files_and_missing_paths_are_told_apart() {
        let dir = crate::testing::temp_dir("pool");
        std::fs::write(dir.path().join("file"), b"").unwrap();
        assert_eq!(look(&dir.path().join("none")).unwrap(), Look::Missing);
        assert_eq!(look(&dir.path().join("file")).unwrap(), Look::NotADirectory);
        assert_eq!(look(&dir.path().join("file/x")).unwrap(), Look::NotADirectory);
    }
}
