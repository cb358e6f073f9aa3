//! Lets the kubelet in, although it introduces itself badly.
//!
//! The kubelet's plugin manager connects to the registration socket without naming an authority, so its HTTP/2 library
//! sends the path of the socket as `:authority`. That is no valid authority, and the HTTP/2 library here answers every
//! such request with PROTOCOL_ERROR (as its standard asks). Between the two stands this: it passes all frames on as they
//! are, but for the headers of requests, in which it writes `localhost`. The CSI socket needs none of it: there the
//! kubelet says `localhost` itself.

use anyhow::{Result, bail, ensure};
use loona_hpack::{Decoder, Encoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, copy, duplex, split};
use tokio::net::UnixStream;

const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
/// What a peer that was told nothing else may send (RFC 9113, SETTINGS_MAX_FRAME_SIZE).
const FRAME_BYTES_MAX: usize = 16 << 10;
/// A registration request has a handful of short headers.
const HEADER_BLOCK_BYTES_MAX: usize = 64 << 10;
const PIPE_BYTES: usize = 64 << 10;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The connection as the server shall see it.
pub fn with_plain_authority(client: UnixStream) -> DuplexStream {
    let (ours, servers) = duplex(PIPE_BYTES);
    tokio::spawn(async move {
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = split(ours);
        let requests = async {
            if let Err(error) = rewrite(&mut from_client, &mut to_server).await {
                tracing::debug!(%error, "a connection to the registration socket ended");
            }
            let _ = to_server.shutdown().await;
        };
        let answers = async {
            let _ = copy(&mut from_server, &mut to_client).await;
            let _ = to_client.shutdown().await;
        };
        tokio::join!(requests, answers);
    });
    servers
}

async fn rewrite(from: &mut (impl AsyncReadExt + Unpin), to: &mut (impl AsyncWriteExt + Unpin)) -> Result<()> {
    let mut preface = [0; PREFACE_BYTES];
    from.read_exact(&mut preface).await?;
    to.write_all(&preface).await?;
    let (mut decoder, mut encoder) = (Decoder::new(), Encoder::new());
    // A header block under way: its first frame's flags, its stream, its bytes so far.
    let mut block: Option<(u8, [u8; 4], Vec<u8>)> = None;
    loop {
        let mut head = [0; FRAME_HEADER_BYTES];
        if from.read(&mut head[..1]).await? == 0 {
            return Ok(());
        }
        from.read_exact(&mut head[1..]).await?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags, stream) = (head[3], head[4], [head[5], head[6], head[7], head[8]]);
        ensure!(len <= FRAME_BYTES_MAX, "a frame of {len} bytes");
        let mut payload = vec![0; len];
        from.read_exact(&mut payload).await?;
        match (kind, &mut block) {
            (HEADERS, None) => block = Some((flags, stream, fragment(flags, &payload)?.to_vec())),
            (CONTINUATION, Some((_, _, bytes))) => bytes.extend_from_slice(&payload),
            (_, None) => {
                to.write_all(&head).await?;
                to.write_all(&payload).await?;
            }
            (_, Some(_)) => bail!("frame type {kind} inside a header block"),
        }
        if let Some((first_flags, stream, bytes)) = block.take_if(|_| flags & END_HEADERS != 0) {
            let headers = decoder
                .decode(&bytes)
                .map_err(|error| anyhow::anyhow!("headers: {error:?}"))?;
            let plain = headers.iter().map(|(name, value)| match name.as_slice() {
                b":authority" => (name.as_slice(), b"localhost".as_slice()),
                _ => (name.as_slice(), value.as_slice()),
            });
            let bytes = encoder.encode(plain);
            let [_, a, b, c] = u32::try_from(bytes.len())?.to_be_bytes();
            let frame_head = [a, b, c, HEADERS, first_flags & END_STREAM | END_HEADERS];
            to.write_all(&frame_head).await?;
            to.write_all(&stream).await?;
            to.write_all(&bytes).await?;
        } else if let Some((_, _, bytes)) = &block {
            ensure!(
                bytes.len() <= HEADER_BLOCK_BYTES_MAX,
                "headers of more than {HEADER_BLOCK_BYTES_MAX} bytes"
            );
        }
        to.flush().await?;
    }
}

/// The part of a HEADERS frame that belongs to the header block.
fn fragment(flags: u8, payload: &[u8]) -> Result<&[u8]> {
    let padding = if flags & PADDED != 0 {
        usize::from(*payload.first().unwrap_or(&0))
    } else {
        0
    };
    let start = usize::from(flags & PADDED != 0) + if flags & PRIORITY != 0 { 5 } else { 0 };
    ensure!(start + padding <= payload.len(), "padding longer than its frame");
    Ok(&payload[start..payload.len() - padding])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_path_that_the_kubelet_sends_as_authority_becomes_localhost_and_all_else_stays() {
        let fields: [(&[u8], &[u8]); 3] = [
            (b":path", b"/x"),
            (b":authority", b"%2Fvar%2Flib%2Fkubelet%2Fx.sock"),
            (b"te", b"trailers"),
        ];
        let block = Encoder::new().encode(fields);
        let (first, rest) = block.split_at(5);
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        sent.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]); // SETTINGS
        sent.extend([0, 0, first.len() as u8, HEADERS, END_STREAM, 0, 0, 0, 1]);
        sent.extend(first);
        sent.extend([0, 0, rest.len() as u8, CONTINUATION, END_HEADERS, 0, 0, 0, 1]);
        sent.extend(rest);
        let mut passed = Vec::new();
        rewrite(&mut sent.as_slice(), &mut passed).await.unwrap();

        let (unchanged, headers) = passed.split_at(PREFACE_BYTES + FRAME_HEADER_BYTES);
        assert_eq!(unchanged, &sent[..unchanged.len()]);
        assert_eq!(headers[3..9], [HEADERS, END_STREAM | END_HEADERS, 0, 0, 0, 1]);
        let got = Decoder::new().decode(&headers[FRAME_HEADER_BYTES..]).unwrap();
        let expected = [
            (b":path".to_vec(), b"/x".to_vec()),
            (b":authority".to_vec(), b"localhost".to_vec()),
            (b"te".to_vec(), b"trailers".to_vec()),
        ];
        assert_eq!(
            got.iter().map(|(n, v)| (n.to_vec(), v.to_vec())).collect::<Vec<_>>(),
            expected
        );
    }
}
