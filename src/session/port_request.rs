//! One scripted request over vsock: `--run` for guests that listen there instead of on the serial line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use super::console::Answer;
use crate::config::DeviceConfigs;
use crate::session::Error;
use crate::sys::output::ConsoleOutput;
use crate::sys::worker::Worker;

/// Pause before the guest, which may not listen yet, is asked again.
const AGAIN: Duration = Duration::from_millis(20);

/// Longest line of the device or the guest that is read.
const LINE_MAX: u64 = 4096;

/// A request for a guest's vsock port.
#[derive(Clone, Debug)]
pub struct PortRequest {
    pub port: u32,
    /// `run <id> <function> …` without its newline.
    pub line: String,
    /// The id in `line`.
    pub id: String,
    pub answer: Arc<Answer>,
}

/// A request under way. Given up when dropped.
pub struct Requesting {
    _worker: Worker,
}

/// The outcome of one attempt.
enum Attempt {
    Answered(String),
    /// The guest does not listen on the port (yet).
    Refused,
}

impl PortRequest {
    /// Begins to ask the machine with these devices; the guest's lines go to `output` as well.
    pub fn begin(&self, devices: &DeviceConfigs, output: Arc<ConsoleOutput>) -> Result<Requesting, Error> {
        let path = devices.vsock.as_ref().ok_or(Error::NoVsock)?.uds_path.clone();
        let (stop, stopped) = channel();
        let stream = Arc::new(Mutex::new(None));
        let request = self.clone();
        let shared = stream.clone();
        let work = move || match request.ask_until_answered(&path, &output, &stopped, &shared) {
            Ok(Some(line)) => request.answer.set(line),
            Ok(None) => {}
            Err(error) => request.answer.fail(format!("port {} over {}: {error}", request.port, path.display())),
        };
        let give_up = move || {
            // Nothing listens once the request has been answered.
            let _ = stop.send(());
            if let Some(stream) = stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
                // Ends the thread's wait; the stream may have ended already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        let worker = Worker::start(Builder::new().name("request".into()), give_up, work);
        Ok(Requesting { _worker: worker.map_err(Error::os("start the thread of the request"))? })
    }

    /// Returns the answer; `None` if stopped before.
    fn ask_until_answered(
        &self,
        path: &Path,
        output: &ConsoleOutput,
        stopped: &Receiver<()>,
        shared: &Mutex<Option<UnixStream>>,
    ) -> io::Result<Option<String>> {
        loop {
            let stream = UnixStream::connect(path)?;
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
            match self.ask(stream, output)? {
                Attempt::Answered(line) => return Ok(Some(line)),
                Attempt::Refused => match stopped.recv_timeout(AGAIN) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(None),
                },
            }
        }
    }

    fn ask(&self, mut stream: UnixStream, output: &ConsoleOutput) -> io::Result<Attempt> {
        stream.write_all(format!("CONNECT {}\n", self.port).as_bytes())?;
        let mut reader = BufReader::new(stream.try_clone()?);
        match read_line(&mut reader) {
            Ok(Some(line)) if line.starts_with("OK ") => {}
            Ok(Some(line)) => return Err(io::Error::other(format!("it says `{line}` instead of OK"))),
            Ok(None) => return Ok(Attempt::Refused),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Attempt::Refused),
            Err(error) => return Err(error),
        }
        stream.write_all(format!("{}\n", self.line).as_bytes())?;
        while let Some(line) = read_line(&mut reader)? {
            output.put(format!("{line}\n").as_bytes());
            let mut words = line.split(' ');
            if matches!(words.next(), Some("ok" | "err")) && words.next() == Some(&self.id) {
                return Ok(Attempt::Answered(line));
            }
        }
        Err(io::Error::other("the guest closed the connection before it answered"))
    }
}

/// Reads a line without its end; `None` at the end of the stream.
fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    reader.by_ref().take(LINE_MAX).read_until(b'\n', &mut bytes)?;
    match bytes.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_string())),
        Some(_) if bytes.len() as u64 + 1 == LINE_MAX => Err(io::Error::other("it sent a line of more than 4 KiB")),
        Some(_) => Ok(None),
    }
}
