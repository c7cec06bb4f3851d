//! The line protocol of guests (`run <id> <function> …` → `ok <id> …` or `err <id> …`), on the serial line or a vsock
//! port. The guest is not trusted: lines are cut, and only so many bytes are read for one answer.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::net::unix::pipe;

/// Limit on a line; a longer one is no answer.
const MAX_LINE: usize = 64 << 10;
/// The most bytes thrown away before a request: as many as pipes and the VM's own backlog can hold.
const MAX_STALE: usize = 256 << 10;
/// Pause before a guest that does not listen on its port yet is asked again.
const AGAIN: Duration = Duration::from_millis(10);

/// The guest's answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestAnswer {
    /// True for `ok`.
    pub ok: bool,
    /// The text after the id.
    pub text: String,
}

/// The reason why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The other end is closed, or broken.
    #[error("the line to the guest is closed")]
    Closed(#[source] io::Error),
    /// Too many bytes came that are no answer.
    #[error("the guest sent {0} bytes without an answer")]
    Flooded(u64),
}

/// Both directions of a line.
pub trait Line {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send;
}

/// A VM's standard input and output: the serial line.
#[derive(Debug)]
pub struct Console {
    pub input: pipe::Sender,
    pub output: pipe::Receiver,
}

impl Line for Console {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.output.try_read(buffer)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.input.try_write(bytes)
    }

    async fn readable(&self) -> io::Result<()> {
        self.output.readable().await
    }

    async fn writable(&self) -> io::Result<()> {
        self.input.writable().await
    }
}

impl Line for UnixStream {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        UnixStream::try_read(self, buffer)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        UnixStream::try_write(self, bytes)
    }

    async fn readable(&self) -> io::Result<()> {
        UnixStream::readable(self).await
    }

    async fn writable(&self) -> io::Result<()> {
        UnixStream::writable(self).await
    }
}

/// Throws away what the guest said before the request: it answers no request.
pub fn drain(line: &impl Line) {
    let mut buffer = [0; 16 << 10];
    let mut left = MAX_STALE;
    while let Ok(count @ 1..) = line.try_read(&mut buffer) {
        left = left.saturating_sub(count);
        if left == 0 {
            return;
        }
    }
}

/// A request to a guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestRequest<'a> {
    /// The id that the answer repeats.
    pub id: &'a str,
    /// The function with its arguments.
    pub function: &'a str,
}

/// Sends `run <id> <function>` and waits for its answer, reading at most `budget` bytes.
pub async fn ask(line: &impl Line, request: GuestRequest<'_>, budget: u64) -> Result<GuestAnswer, LineError> {
    let GuestRequest { id, function } = request;
    write_all(line, format!("run {id} {function}\n").as_bytes()).await.map_err(LineError::Closed)?;
    let mut reader = Reader { line, budget, seen: 0, kept: Vec::new() };
    loop {
        let text = reader.next().await?;
        let mut words = text.splitn(3, ' ');
        let verdict = words.next();
        let whose = words.next();
        let rest = words.next().unwrap_or_default();
        if let (Some("ok" | "err"), Some(whose)) = (verdict, whose)
            && whose == id
        {
            return Ok(GuestAnswer { ok: verdict == Some("ok"), text: rest.to_string() });
        }
    }
}

/// Asks over a vsock port of the guest: Firecracker's convention, `CONNECT <port>` on the device's socket. A guest that
/// does not listen yet is asked again; the caller bounds the time.
pub async fn ask_port(
    socket: &Path,
    port: u32,
    request: GuestRequest<'_>,
    budget: u64,
) -> Result<GuestAnswer, LineError> {
    loop {
        let stream = UnixStream::connect(socket).await.map_err(LineError::Closed)?;
        write_all(&stream, format!("CONNECT {port}\n").as_bytes()).await.map_err(LineError::Closed)?;
        let mut reader = Reader { line: &stream, budget: 256, seen: 0, kept: Vec::new() };
        match reader.next().await {
            Ok(line) if line.starts_with("OK ") => return ask(&stream, request, budget).await,
            Ok(_) | Err(LineError::Closed(_)) => tokio::time::sleep(AGAIN).await,
            Err(error) => return Err(error),
        }
    }
}

async fn write_all(line: &impl Line, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match line.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => line.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Cuts the input into lines.
struct Reader<'a, L> {
    line: &'a L,
    budget: u64,
    seen: u64,
    kept: Vec<u8>,
}

impl<L: Line> Reader<'_, L> {
    /// The next whole line, cut at [`MAX_LINE`].
    async fn next(&mut self) -> Result<String, LineError> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(end) = self.kept.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.kept.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line[..end.min(MAX_LINE)]);
                return Ok(text.trim_end_matches('\r').to_string());
            }
            if self.seen >= self.budget {
                return Err(LineError::Flooded(self.seen));
            }
            match self.line.try_read(&mut buffer) {
                Ok(0) => return Err(LineError::Closed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    self.seen += count as u64;
                    self.kept.extend(&buffer[..count]);
                    // The beginning of a line that is too long stays, so that it is cut and not taken for another line.
                    if self.kept.len() > 2 * MAX_LINE && !self.kept.contains(&b'\n') {
                        self.kept.truncate(MAX_LINE + 1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.line.readable().await.map_err(LineError::Closed)?;
                }
                Err(error) => return Err(LineError::Closed(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks a guest whose output is `said`, whatever the request.
    fn asked(said: &'static [u8], budget: u64) -> Result<GuestAnswer, LineError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let guest = tokio::spawn(async move {
                let _ = write_all(&theirs, said).await;
            });
            let answer = ask(&ours, GuestRequest { id: "7", function: "hello" }, budget).await;
            guest.abort();
            answer
        })
    }

    #[test]
    fn answer_is_found_among_garbage() {
        let said = b"\xff\xfe\0junk\nok 70 not me\nerr - bad line\nok 7 00ff 12 a=b\r\nok 7 late\n";
        assert_eq!(asked(said, 1 << 20).unwrap(), GuestAnswer { ok: true, text: "00ff 12 a=b".into() });
        assert_eq!(asked(b"err 7 no such function\n", 1 << 20).unwrap().text, "no such function");
        assert_eq!(asked(b"ok 7\n", 1 << 20).unwrap(), GuestAnswer { ok: true, text: String::new() });
    }

    #[test]
    fn a_port_is_asked_again_until_the_guest_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            let listener = tokio::net::UnixListener::bind(&path).unwrap();
            let guest = tokio::spawn(async move {
                // No process listens on the port: the device closes the connection. Then the agent listens.
                drop(listener.accept().await.unwrap());
                let (stream, _) = listener.accept().await.unwrap();
                let mut reader = Reader { line: &stream, budget: 4096, seen: 0, kept: Vec::new() };
                assert_eq!(reader.next().await.unwrap(), "CONNECT 52");
                write_all(&stream, b"OK 1073741824\n").await.unwrap();
                assert_eq!(reader.next().await.unwrap(), "run 3 hello a=b");
                write_all(&stream, b"ok 3 done\n").await.unwrap();
            });
            let answer = ask_port(&path, 52, GuestRequest { id: "3", function: "hello a=b" }, 4096).await.unwrap();
            guest.await.unwrap();
            answer
        });
        assert_eq!(answer, GuestAnswer { ok: true, text: "done".into() });
    }

    #[test]
    fn endless_lines_and_silence_are_no_answers() {
        static FLOOD: [u8; 1 << 20] = [b'x'; 1 << 20];
        assert!(matches!(asked(&FLOOD, 512 << 10), Err(LineError::Flooded(_))));
        assert!(matches!(asked(b"ok 7 cut", 1 << 20), Err(LineError::Closed(_))));
        assert!(matches!(asked(b"", 1 << 20), Err(LineError::Closed(_))));
    }
}
