//! A guest that knows what it was promised: it writes files and syncs them, and notes since when each must be there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::Random;
use super::recorder::SharedLog;

const PAGE: usize = 4096;
/// Pages of the file that is overwritten in place.
const PAGES: usize = 64;

/// What a file, or a page of one, holds: nothing, or bytes that follow from a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Absent,
    Zeros(usize),
    Bytes { seed: u64, len: usize },
}

impl Content {
    fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Content::Absent => None,
            Content::Zeros(len) => Some(vec![0; len]),
            Content::Bytes { seed, len } => {
                let mut random = Random(seed);
                let words = (0..len.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
                Some(words.take(len).collect())
            }
        }
    }
}

/// What something was made to hold, one after the other, and the moment since which each must survive.
#[derive(Debug, Default)]
struct History(Vec<(Content, usize)>);

impl History {
    /// The last content that was synced by `moment`, and what came after it; none while nothing was.
    fn possible(&self, moment: usize) -> Option<&[(Content, usize)]> {
        let last = self.0.iter().rposition(|(_, synced)| *synced <= moment)?;
        Some(&self.0[last..])
    }

    fn explains(&self, moment: usize, found: Option<&[u8]>) -> Result<(), String> {
        let Some(possible) = self.possible(moment) else {
            return Ok(());
        };
        if possible.iter().any(|(content, _)| content.bytes().as_deref() == found) {
            return Ok(());
        }
        let found = found.map_or("nothing".to_owned(), |bytes| format!("{} bytes", bytes.len()));
        Err(format!("has {found} instead of one of {possible:?}"))
    }
}

/// One writer with a directory of its own, and what it was promised.
#[derive(Debug)]
pub struct Guest {
    name: String,
    random: Random,
    /// Path below the writer's directory.
    files: Vec<(String, History)>,
    pages: Vec<History>,
    /// Synced lengths of a file that only grows.
    lengths: Vec<(usize, usize)>,
    stamp: u64,
}

impl Guest {
    pub fn new(name: &str, seed: u64) -> Guest {
        Guest {
            name: name.to_owned(),
            random: Random(seed),
            files: Vec::new(),
            pages: (0..PAGES).map(|_| History::default()).collect(),
            lengths: Vec::new(),
            stamp: seed << 32,
        }
    }

    /// Does `count` things by chance in the file system at `root`.
    pub fn work(&mut self, root: &Path, log: &SharedLog, count: usize) -> io::Result<()> {
        let dir = root.join(&self.name);
        fs::create_dir(&dir)?;
        File::open(root)?.sync_all()?;
        let pages = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open(dir.join("pages"))?;
        pages.set_len((PAGES * PAGE) as u64)?;
        let mut grows = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(dir.join("grows"))?;
        sync_with_name(&pages, &dir)?;
        sync_with_name(&grows, &dir)?;
        let synced = log.moment();
        for page in &mut self.pages {
            page.0.push((Content::Zeros(PAGE), synced));
        }
        for _ in 0..count {
            match self.random.below(100) {
                0..25 => self.make(&dir, log)?,
                25..37 => self.replace(&dir, log)?,
                37..47 => self.remove(&dir, log)?,
                47..67 => self.overwrite(&pages, log)?,
                67..72 => self.punch(&pages, log)?,
                72..87 => self.grow(&mut grows, log)?,
                87..97 => self.scribble(&dir)?,
                _ => sync_all_of(root)?,
            }
        }
        Ok(())
    }

    fn fresh(&mut self, len: usize) -> Content {
        self.stamp += 1;
        Content::Bytes { seed: self.stamp, len }
    }

    fn some_len(&mut self) -> usize {
        let max = if self.random.below(8) == 0 { 300_000 } else { 30_000 };
        1 + self.random.below(max) as usize
    }

    fn make(&mut self, dir: &Path, log: &SharedLog) -> io::Result<()> {
        let (len, name) = (self.some_len(), format!("file{}", self.files.len()));
        let content = self.fresh(len);
        let mut file = File::create_new(dir.join(&name))?;
        file.write_all(&content.bytes().expect("it is not absent"))?;
        sync_with_name(&file, dir)?;
        self.files.push((name, History(vec![(content, log.moment())])));
        Ok(())
    }

    /// As careful programs do it: a new file under another name, synced, renamed over the old one.
    fn replace(&mut self, dir: &Path, log: &SharedLog) -> io::Result<()> {
        let Some(index) = self.some_file() else {
            return self.make(dir, log);
        };
        let len = self.some_len();
        let content = self.fresh(len);
        let mut file = File::create(dir.join("new"))?;
        file.write_all(&content.bytes().expect("it is not absent"))?;
        file.sync_all()?;
        fs::rename(dir.join("new"), dir.join(&self.files[index].0))?;
        File::open(dir)?.sync_all()?;
        self.files[index].1.0.push((content, log.moment()));
        Ok(())
    }

    fn remove(&mut self, dir: &Path, log: &SharedLog) -> io::Result<()> {
        let Some(index) = self.some_file() else {
            return self.make(dir, log);
        };
        fs::remove_file(dir.join(&self.files[index].0))?;
        File::open(dir)?.sync_all()?;
        self.files[index].1.0.push((Content::Absent, log.moment()));
        Ok(())
    }

    fn overwrite(&mut self, file: &File, log: &SharedLog) -> io::Result<()> {
        let count = 1 + self.random.below(8) as usize;
        let mut written = Vec::new();
        for _ in 0..count {
            let page = self.random.below(PAGES as u64) as usize;
            let content = self.fresh(PAGE);
            file.write_all_at(&content.bytes().expect("it is not absent"), (page * PAGE) as u64)?;
            written.push((page, content));
        }
        if self.random.below(2) == 0 {
            send_out(file)?;
        }
        file.sync_data()?;
        let synced = log.moment();
        // One that was written twice: a crash in between may show the first.
        for (page, content) in written {
            self.pages[page].0.push((content, synced));
        }
        Ok(())
    }

    fn punch(&mut self, file: &File, log: &SharedLog) -> io::Result<()> {
        let first = self.random.below(PAGES as u64 - 8) as usize;
        let count = 1 + self.random.below(8) as usize;
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, flags, (first * PAGE) as i64, (count * PAGE) as i64)?;
        file.sync_data()?;
        let synced = log.moment();
        for page in &mut self.pages[first..first + count] {
            page.0.push((Content::Zeros(PAGE), synced));
        }
        Ok(())
    }

    fn grow(&mut self, file: &mut File, log: &SharedLog) -> io::Result<()> {
        let before = self.lengths.last().map_or(0, |(len, _)| *len);
        let len = before + 1 + self.random.below(9000) as usize;
        file.write_all(&self.growing(len)[before..])?;
        file.sync_data()?;
        self.lengths.push((len, log.moment()));
        Ok(())
    }

    fn growing(&self, len: usize) -> Vec<u8> {
        let seed = !(self.stamp >> 32);
        Content::Bytes { seed, len }.bytes().expect("it is not absent")
    }

    /// Writes that nobody syncs, and that are on their way to the disk all the same.
    fn scribble(&mut self, dir: &Path) -> io::Result<()> {
        let len = self.some_len();
        let content = self.fresh(len);
        let mut file = File::create(dir.join(format!("scribbled{}", self.random.below(4))))?;
        file.write_all(&content.bytes().expect("it is not absent"))?;
        send_out(&file)
    }

    /// One that is there now.
    fn some_file(&mut self) -> Option<usize> {
        let there: Vec<usize> = (0..self.files.len())
            .filter(|index| !matches!(self.files[*index].1.0.last(), Some((Content::Absent, _))))
            .collect();
        let count = there.len() as u64;
        (count > 0).then(|| there[self.random.below(count) as usize])
    }

    /// Whether the file system at `root` holds all that was promised by `moment`.
    pub fn check(&self, root: &Path, moment: usize) -> Result<(), String> {
        let dir = root.join(&self.name);
        let about = |path: PathBuf, why: String| format!("{} {why}", path.display());
        for (name, history) in &self.files {
            let path = dir.join(name);
            let found = read(&path)?;
            history
                .explains(moment, found.as_deref())
                .map_err(|why| about(path, why))?;
        }
        if self.pages.iter().any(|page| page.possible(moment).is_some()) {
            let path = dir.join("pages");
            let found = read(&path)?.filter(|found| found.len() == PAGES * PAGE);
            let Some(found) = found else {
                return Err(about(path, "is not there with its length".to_owned()));
            };
            for (page, (history, bytes)) in self.pages.iter().zip(found.chunks(PAGE)).enumerate() {
                history
                    .explains(moment, Some(bytes))
                    .map_err(|why| about(path.clone(), format!("page {page}: {why}")))?;
            }
        }
        if let Some((len, _)) = self.lengths.iter().rev().find(|(_, synced)| *synced <= moment) {
            let path = dir.join("grows");
            let found = read(&path)?.unwrap_or_default();
            if found.get(..*len) != Some(&*self.growing(*len)) {
                return Err(about(
                    path,
                    format!("of {} bytes lost some of the first {len}", found.len()),
                ));
            }
        }
        // What nobody synced may be there or not; a file system that gives it back wholly is whole.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            read(&entry.path())?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("read {}: {error}", path.display())),
    }
}

fn sync_with_name(file: &File, dir: &Path) -> io::Result<()> {
    file.sync_all()?;
    File::open(dir)?.sync_all()
}

fn sync_all_of(root: &Path) -> io::Result<()> {
    let root = File::open(root)?;
    // SAFETY: the call takes a descriptor, which is open.
    match unsafe { libc::syncfs(root.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the kernel write the pages of a file now, without a flush.
fn send_out(file: &File) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes a descriptor, which is open, and numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
