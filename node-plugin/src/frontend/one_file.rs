//! A file system of one file, as it looks: names, attributes, sizes. What is in the file is not told here.

use bytemuck::Pod;

use super::{BLOCK_BYTES, abi};

/// Node of the file; the root is [`abi::ROOT_ID`].
pub const FILE_ID: u64 = 2;

/// The file, and how big it is.
#[derive(Debug)]
pub struct OneFile {
    pub name: String,
    pub size_bytes: u64,
    pub read_only: bool,
}

/// How a request that needs no engine ends.
#[derive(Debug)]
pub enum Local {
    Reply(Vec<u8>),
    Error(i32),
    /// The protocol has no answer to this one.
    Silent,
}

impl OneFile {
    /// Answers what does not concern the engine. `body` is what follows the header.
    pub fn answer(&self, header: &abi::InHeader, body: &[u8]) -> Local {
        match header.opcode {
            abi::LOOKUP => {
                let name = body.strip_suffix(&[0]).unwrap_or(body);
                if header.nodeid != abi::ROOT_ID || name != self.name.as_bytes() {
                    return Local::Error(libc::ENOENT);
                }
                // No attribute is cached, so that a `stat` after a change of size tells the new one.
                reply(&abi::EntryOut {
                    nodeid: FILE_ID,
                    generation: 0,
                    entry_valid: 3600,
                    attr_valid: 0,
                    entry_valid_nsec: 0,
                    attr_valid_nsec: 0,
                    attr: self.attr(FILE_ID),
                })
            }
            abi::GETATTR => match header.nodeid {
                abi::ROOT_ID | FILE_ID => self.attr_reply(header.nodeid),
                _ => Local::Error(libc::ENOENT),
            },
            abi::SETATTR => {
                let Some(start) = body.get(..size_of::<abi::SetattrInStart>()) else {
                    return Local::Error(libc::EINVAL);
                };
                let start: abi::SetattrInStart = bytemuck::pod_read_unaligned(start);
                // The size of a volume is changed by its owner only; times and modes are not kept.
                if start.valid & abi::FATTR_SIZE != 0 {
                    return Local::Error(libc::EPERM);
                }
                self.attr_reply(header.nodeid)
            }
            abi::OPEN => {
                let open_flags = abi::FOPEN_DIRECT_IO | abi::FOPEN_PARALLEL_DIRECT_WRITES | abi::FOPEN_NOFLUSH;
                reply(&abi::OpenOut {
                    fh: 0,
                    open_flags,
                    padding: 0,
                })
            }
            abi::OPENDIR => reply(&abi::OpenOut {
                fh: 0,
                open_flags: 0,
                padding: 0,
            }),
            abi::READDIR => self.read_dir(body),
            abi::STATFS => reply(&abi::StatfsOut {
                blocks: self.size_bytes / BLOCK_BYTES,
                bfree: 0,
                bavail: 0,
                files: 1,
                ffree: 0,
                // The loop device takes its discard granularity from here.
                bsize: BLOCK_BYTES as u32,
                namelen: 255,
                frsize: BLOCK_BYTES as u32,
                padding: 0,
                spare: [0; 6],
            }),
            abi::RELEASE | abi::RELEASEDIR | abi::FLUSH | abi::FSYNCDIR | abi::ACCESS | abi::DESTROY => {
                Local::Reply(Vec::new())
            }
            // Every request ends by itself; an interrupted one is just waited for.
            abi::FORGET | abi::BATCH_FORGET | abi::INTERRUPT => Local::Silent,
            // A sync of the whole file system has to go somewhere it means something; only the file's own sync does.
            abi::SYNCFS => Local::Error(libc::EOPNOTSUPP),
            // The kernel remembers this answer and does not ask again: extended attributes, locks, and the like.
            _ => Local::Error(libc::ENOSYS),
        }
    }

    fn read_dir(&self, body: &[u8]) -> Local {
        let from = size_of::<abi::ReadIn>();
        let Some(read) = body.get(..from) else {
            return Local::Error(libc::EINVAL);
        };
        let read: abi::ReadIn = bytemuck::pod_read_unaligned(read);
        let mut entries = Vec::new();
        let names = [(".", abi::ROOT_ID, libc::DT_DIR), ("..", abi::ROOT_ID, libc::DT_DIR)];
        let file = (self.name.as_str(), FILE_ID, libc::DT_REG);
        for (index, (name, ino, kind)) in names.into_iter().chain([file]).enumerate().skip(read.offset as usize) {
            let start = abi::DirentStart {
                ino,
                off: index as u64 + 1,
                namelen: name.len() as u32,
                kind: u32::from(kind),
            };
            let len = (size_of::<abi::DirentStart>() + name.len()).next_multiple_of(8);
            if entries.len() + len > read.size as usize {
                break;
            }
            let end = entries.len() + len;
            entries.extend_from_slice(bytemuck::bytes_of(&start));
            entries.extend_from_slice(name.as_bytes());
            entries.resize(end, 0);
        }
        Local::Reply(entries)
    }

    fn attr_reply(&self, nodeid: u64) -> Local {
        reply(&abi::AttrOut {
            attr_valid: 0,
            attr_valid_nsec: 0,
            dummy: 0,
            attr: self.attr(nodeid),
        })
    }

    fn attr(&self, nodeid: u64) -> abi::Attr {
        let (size, mode, nlink) = match nodeid {
            abi::ROOT_ID => (0, libc::S_IFDIR | 0o500, 2),
            _ => (
                self.size_bytes,
                libc::S_IFREG | if self.read_only { 0o400 } else { 0o600 },
                1,
            ),
        };
        abi::Attr {
            ino: nodeid,
            size,
            blocks: size / 512,
            atime: 0,
            mtime: 0,
            ctime: 0,
            atimensec: 0,
            mtimensec: 0,
            ctimensec: 0,
            mode,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }
}

pub fn reply<T: Pod>(body: &T) -> Local {
    Local::Reply(bytemuck::bytes_of(body).to_vec())
}
