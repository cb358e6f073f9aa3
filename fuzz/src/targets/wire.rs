//! What another node sends: frames.

use galleonfs_node_plugin::transport::frame::{Decoder, Expect, HEADER_BYTES, Kinds, make_check_fit};
use uuid::Uuid;

/// The cluster of the session that frames are for.
pub const CLUSTER: Uuid = Uuid::from_u128(0xc1);
/// And its version.
pub const VERSION: u16 = 1;

/// A stream of bytes behind two: what is expected and how the stream is cut. Bit 0 lets the check of the first frame fit,
/// bit 1 expects a hello. What is let through must be what a sender would have made these bytes of.
pub fn wire_frame(data: &[u8]) {
    let [flags, cut, rest @ ..] = data else { return };
    let mut stream = rest.to_vec();
    if flags & 1 != 0 {
        make_check_fit(&mut stream);
    }
    let expect = match flags & 2 {
        0 => Expect {
            version: VERSION,
            cluster: Some(CLUSTER),
            kinds: Kinds::Session,
        },
        _ => Expect::OPENING,
    };
    let mut decoder = Decoder::new(expect);
    // Where the frame that is under way began, and where we are.
    let (mut began, mut at) = (0, 0);
    while at < stream.len() {
        let end = stream.len().min(at + 1 + usize::from(*cut) * 16);
        match decoder.take(&stream[at..end]) {
            Ok((taken, frame)) => {
                assert!(taken > 0 && at + taken <= end, "it takes of what there is");
                at += taken;
                let Some(frame) = frame else { continue };
                assert_eq!(frame.len_on_wire(), at - began, "all of its bytes and no others");
                let bytes = &stream[began..at];
                let cluster = Uuid::from_slice(&bytes[16..32]).expect("sixteen bytes");
                assert!(expect.cluster.is_none_or(|expected| expected == cluster));
                let version = u16::from_le_bytes([bytes[4], bytes[5]]);
                let again = frame.header(version, cluster);
                // What is zeros is not looked at, and covered by the check.
                assert_eq!(again[..80], bytes[..80], "what is let through is what was sent");
                assert_eq!(&bytes[HEADER_BYTES..][..frame.body.len()], &frame.body[..]);
                let payload: Vec<u8> = frame.payload.iter().flat_map(|part| part.as_ref().to_vec()).collect();
                assert_eq!(&bytes[HEADER_BYTES + frame.body.len()..], &payload[..]);
                began = at;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return;
            }
        }
    }
}
