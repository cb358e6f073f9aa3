//! The pages for probes and for Prometheus: a few lines of HTTP/1.1, one answer per connection.
//!
//! ```text
//! /healthz   200 while the engine runs (restarting us would help otherwise)
//! /readyz    200 once the API server was seen as well
//! /metrics   Prometheus text
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// A request line and headers of a probe or a scraper are far below this.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// Who sends or reads more slowly is no probe of ours.
const PATIENCE: Duration = Duration::from_secs(5);
/// Two probes and a few scrapers; beyond that somebody is playing.
const CONNECTIONS_MAX: usize = 32;

/// An answer: status code and text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub status: u16,
    pub text: String,
}

/// Serves pages for ever. `page` is asked with a path.
pub async fn serve_pages(listener: TcpListener, page: impl Fn(&str) -> Option<Page> + Send + Sync + 'static) {
    let (page, room) = (Arc::new(page), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
    loop {
        let permit = room
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let page = page.clone();
                tokio::spawn(async move {
                    // A caller that went away needs no answer.
                    let _ = tokio::time::timeout(PATIENCE, answer(stream, page.as_ref())).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to the health pages was not accepted");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, page: &impl Fn(&str) -> Option<Page>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < REQUEST_BYTES_MAX {
        if stream.read_buf(&mut request).await? == 0 {
            break;
        }
    }
    let line = String::from_utf8_lossy(request.split(|&b| b == b'\r').next().unwrap_or_default()).into_owned();
    let found = match line.split(' ').collect::<Vec<_>>()[..] {
        ["GET", path, "HTTP/1.0" | "HTTP/1.1"] => {
            let path = path.split('?').next().unwrap_or_default();
            page(path).unwrap_or(Page {
                status: 404,
                text: "there are: /healthz, /readyz, /metrics\n".into(),
            })
        }
        _ => Page {
            status: 400,
            text: "GET only\n".into(),
        },
    };
    let reason = match found.status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        _ => "Service Unavailable",
    };
    let head = format!(
        "HTTP/1.1 {} {reason}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        found.status,
        found.text.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(found.text.as_bytes()).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve_pages(listener, |path| match path {
            "/healthz" => Some(Page {
                status: 200,
                text: "ok\n".into(),
            }),
            "/readyz" => Some(Page {
                status: 503,
                text: "not yet\n".into(),
            }),
            _ => None,
        }));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn pages_are_served_and_nonsense_is_refused() {
        let good = ask(b"GET /healthz?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(
            good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nok\n"),
            "{good}"
        );
        assert!(ask(b"GET /readyz HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 503 "));
        assert!(
            ask(b"GET /etc/passwd HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 404 ")
        );
        assert!(
            ask(b"POST /healthz HTTP/1.1\r\n\r\n")
                .await
                .starts_with("HTTP/1.1 400 ")
        );
        assert!(ask(b"\x16\x03\x01\x00").await.starts_with("HTTP/1.1 400 "));
        assert!(ask(&vec![b'a'; REQUEST_BYTES_MAX]).await.starts_with("HTTP/1.1 400 "));
    }
}
