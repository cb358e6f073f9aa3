//! What the kernel sends: requests of FUSE.

use std::fs::File;
use std::io::{IoSlice, Read};

use galleonfs_node_plugin::frontend::{Buffers, Export, FuseSession, Received, Session};
use galleonfs_storage_engine::request::{Piece, Reply, Request, RequestError};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

const HEADER_BYTES: usize = 40;
const SIZE_BYTES: u64 = 64 << 20;

/// Messages, each behind its length in two bytes. Bit 15 of the length lets the length in the message itself fit.
/// Every one is answered once, by the session itself or by us as an engine would.
pub fn fuse_request(data: &[u8]) {
    let (kernel, device) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
    )
    .expect("make a pair of sockets");
    let (mut kernel, device) = (File::from(kernel), File::from(device));
    let (flags, mut rest) = data.split_first().unwrap_or((&0, &[]));
    let sector_bytes = if flags & 4 == 0 { 4096 } else { 512 };
    let export = Export {
        volume: "volume".to_owned(),
        size_bytes: SIZE_BYTES,
        sector_bytes,
        read_only: flags & 1 != 0,
    };
    let mut session = FuseSession::new(device, "volume".to_owned(), &export);
    if flags & 2 != 0 {
        session.refuse();
    }
    let whole = |offset: u64, len: u64| {
        let sector = u64::from(sector_bytes);
        offset.is_multiple_of(sector)
            && len.is_multiple_of(sector)
            && offset.checked_add(len).is_some_and(|end| end <= SIZE_BYTES)
    };
    let mut buffers = Buffers::default();
    while let Some((len, after)) = rest.split_first_chunk() {
        let len = u16::from_le_bytes(*len);
        let (message, after) = after.split_at(after.len().min(usize::from(len & 0x7fff)));
        rest = after;
        if message.is_empty() {
            continue; // nothing to read would be the end of the device
        }
        let mut message = message.to_vec();
        if len & 0x8000 != 0 && message.len() >= 4 {
            let all = message.len() as u32;
            message[..4].copy_from_slice(&all.to_le_bytes());
        }
        let sent = nix::sys::uio::writev(&kernel, &[IoSlice::new(&message)]);
        assert_eq!(sent, Ok(message.len()), "the socket takes a message");
        session.readable();
        match session.receive(&mut buffers) {
            Received::Request(ticket, request) => {
                let answer = match &request {
                    Request::Read { len, .. } => {
                        let half = len / 2;
                        let pieces = vec![Piece::Zeros(half as usize), Piece::Zeros((len - half) as usize)];
                        // The kernel asks for a megabyte at most, and gives us memory for no more.
                        if *len <= 64 << 10 {
                            Ok(Reply::Data(pieces))
                        } else {
                            Err(RequestError::NoSpace)
                        }
                    }
                    Request::Write { offset, data, .. } => {
                        assert!(data.len() > 0 && data.len() + HEADER_BYTES + 40 == message.len());
                        assert_eq!(
                            data.as_ref(),
                            &message[HEADER_BYTES + 40..],
                            "the payload arrives as it was sent"
                        );
                        assert!(whole(*offset, data.len() as u64));
                        Ok(Reply::Done)
                    }
                    Request::Zero { offset, len, .. } => {
                        assert!(whole(*offset, *len));
                        Ok(Reply::Done)
                    }
                    Request::Flush => Ok(Reply::Done),
                    Request::Grow { .. } => panic!("a guest does not grow its device"),
                };
                if let Request::Read { offset, len } = &request {
                    assert!(*len > 0 && whole(*offset, *len));
                }
                drop(request);
                session.answer(ticket, answer);
                answered(&mut kernel, &message);
            }
            Received::Read(..) => panic!("nothing is answered in place without slots"),
            Received::Served => {
                let silent = matches!(opcode(&message), 2 | 36 | 42);
                if !silent {
                    answered(&mut kernel, &message);
                }
            }
            Received::Empty => panic!("there was a message"),
            Received::Ended(why) => {
                assert!(!why.is_empty());
                return;
            }
        }
        let mut more = [0; 16];
        assert!(kernel.read(&mut more).is_err(), "one answer is all");
    }
}

fn opcode(message: &[u8]) -> u32 {
    u32::from_le_bytes(message[4..8].try_into().expect("four bytes"))
}

/// One answer to `message` is there, and is well formed.
fn answered(kernel: &mut File, message: &[u8]) {
    let mut answer = vec![0; 128 << 10];
    let len = kernel.read(&mut answer).expect("there is an answer");
    let u32_at = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().expect("four bytes"));
    assert!(len >= 16 && u32_at(0) as usize == len, "it says its length");
    assert_eq!(answer[8..16], message[8..16], "it is the answer to this request");
    let error = u32_at(4).cast_signed();
    assert!((-4095..=0).contains(&error), "error {error}");
    assert!(error == 0 || len == 16, "an error has nothing behind it");
    if opcode(message) == 20 {
        assert_ne!(error, -38, "a sync that is not known is never sent again");
    }
}
