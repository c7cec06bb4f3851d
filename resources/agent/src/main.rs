//! Answers tvmm's function protocol inside a Linux guest, on a vsock port or on the console: a line in, a line out, as
//! the tiny guest does. README.md tells how to add functions.

mod functions;
mod protocol;
mod python;
mod vsock;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use functions::Functions;
use tvmm_guest::line::LineReader;

const USAGE: &str = "usage: tvmm-agent [--port N] [--functions DIR] [--console]";

/// Connections served at a time; more are closed at once.
const CONNECTIONS_MAX: usize = 64;

struct Options {
    port: u32,
    functions: PathBuf,
    console: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options { port: 52, functions: "/srv/functions".into(), console: false };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value; {USAGE}"));
        match arg.as_str() {
            "--port" => {
                let text = value()?;
                let port = text.parse().ok().filter(|port| *port != u32::MAX);
                options.port = port.ok_or(format!("{text} is no vsock port; {USAGE}"))?;
            }
            "--functions" => options.functions = value()?.into(),
            "--console" => options.console = true,
            _ => return Err(format!("unknown argument {arg}; {USAGE}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options).map_err(|error| error.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tvmm-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    let functions = Arc::new(Functions::load(&options.functions)?);
    if options.console {
        let mut out = io::stdout();
        writeln!(out, "ready {} {}", env!("CARGO_PKG_VERSION"), functions::machine())?;
        return serve(io::stdin().lock(), out, &functions);
    }
    let listener = vsock::Listener::bind(options.port)?;
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok(stream) => stream,
            // The other end went away, or a snapshot was restored.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR)) => continue,
            Err(error) => return Err(error),
        };
        if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (functions, guard) = (functions.clone(), Guard(open.clone()));
        let work = move || {
            let _guard = guard;
            // The other end went away, or a snapshot was restored: an error has no receiver.
            let _ = converse(stream, &functions);
        };
        // Without a thread the connection is closed, which the other end notices.
        let _ = std::thread::Builder::new().spawn(work);
    }
}

/// Counts a connection while it lives.
struct Guard(Arc<AtomicUsize>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn converse(stream: File, functions: &Functions) -> io::Result<()> {
    serve(stream.try_clone()?, stream, functions)
}

/// Answers lines until the other end is done.
fn serve(mut input: impl Read, mut output: impl Write, functions: &Functions) -> io::Result<()> {
    let mut reader = LineReader::new();
    let mut buffer = [0; 4096];
    loop {
        let count = match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for byte in &buffer[..count] {
            if reader.push(*byte)
                && let Some(answer) = protocol::answer(&reader, functions)
            {
                output.write_all(answer.as_bytes())?;
                output.flush()?;
            }
        }
    }
}
