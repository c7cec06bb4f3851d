//! An OpenTelemetry collector under test: it takes OTLP over HTTP, and decodes what it got by itself ("Protocol Buffers
//! Encoding"; `opentelemetry/proto/trace/v1/trace.proto`).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::TIMEOUT;

/// A span, as it came.
#[derive(Clone, Debug, Default)]
pub struct Span {
    pub service: String,
    pub trace_id: String,
    pub span_id: String,
    /// Empty: it has none.
    pub parent_span_id: String,
    pub name: String,
    pub kind: u64,
    pub start_ns: u64,
    pub end_ns: u64,
    pub attributes: BTreeMap<String, String>,
    /// 0: unset, 1: ok, 2: error.
    pub status: u64,
    pub message: String,
}

impl Span {
    pub fn length_us(&self) -> f64 {
        (self.end_ns - self.start_ns) as f64 / 1000.0
    }
}

/// A collector of traces: the port that it listens on, and the spans that it got.
pub struct Collector {
    pub port: u16,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    pub fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
        let kept = spans.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let kept = kept.clone();
                std::thread::spawn(move || while serve(&stream, &kept).is_some() {});
            }
        });
        Collector { port, spans }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }

    /// The spans of a trace, once it has come.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let found: Vec<Span> = self.spans().into_iter().filter(|span| span.trace_id == trace_id).collect();
            if !found.is_empty() {
                return found;
            }
            assert!(Instant::now() < deadline, "trace {trace_id} does not come");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Takes one request. `None`: there are no more.
fn serve(stream: &TcpStream, kept: &Mutex<Vec<Span>>) -> Option<()> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim() {
            "" => break,
            line => lines.push(line.to_ascii_lowercase()),
        }
    }
    let header = |name: &str| lines.iter().find_map(|line| line.strip_prefix(&format!("{name}: ")).map(str::to_owned));
    let mut body = vec![0; header("content-length")?.parse().ok()?];
    reader.read_exact(&mut body).ok()?;
    let is_right =
        lines[0] == "post /v1/traces http/1.1" && header("content-type").as_deref() == Some("application/x-protobuf");
    let status = if is_right { "200 OK" } else { "400 Bad Request" };
    if is_right {
        kept.lock().unwrap().extend(request(&body));
    }
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n");
    (&*stream).write_all(head.as_bytes()).ok()
}

/// A field of a message: its bytes, or its number.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn bytes(&self) -> &'a [u8] {
        match self {
            Field::Bytes(bytes) => bytes,
            Field::Number(number) => panic!("{number} is no message"),
        }
    }

    fn number(&self) -> u64 {
        match self {
            Field::Number(number) => *number,
            Field::Bytes(_) => panic!("bytes are no number"),
        }
    }

    fn text(&self) -> String {
        String::from_utf8(self.bytes().to_vec()).unwrap()
    }

    fn hex(&self) -> String {
        self.bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A message's fields, by number, in order.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length))
            }
            5 => Field::Number(u64::from(u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap()))),
            other => panic!("wire type {other}"),
        };
        found.push((tag >> 3, field));
    }
    found
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    number
}

/// An ExportTraceServiceRequest.
fn request(bytes: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for (_, resource_spans) in fields(bytes) {
        let mut service = String::new();
        for (number, part) in fields(resource_spans.bytes()) {
            if number == 1 {
                let attributes = fields(part.bytes()).into_iter().filter(|(number, _)| *number == 1);
                let attributes: BTreeMap<String, String> =
                    attributes.map(|(_, pair)| attribute(pair.bytes())).collect();
                service = attributes["service.name"].clone();
            } else if number == 2 {
                let found = fields(part.bytes()).into_iter().filter(|(number, _)| *number == 2);
                spans.extend(found.map(|(_, found)| Span { service: service.clone(), ..span(found.bytes()) }));
            }
        }
    }
    spans
}

fn span(bytes: &[u8]) -> Span {
    let mut span = Span::default();
    for (number, field) in fields(bytes) {
        match number {
            1 => span.trace_id = field.hex(),
            2 => span.span_id = field.hex(),
            4 => span.parent_span_id = field.hex(),
            5 => span.name = field.text(),
            6 => span.kind = field.number(),
            7 => span.start_ns = field.number(),
            8 => span.end_ns = field.number(),
            9 => span.attributes.extend([attribute(field.bytes())]),
            15 => {
                for (number, field) in fields(field.bytes()) {
                    match number {
                        2 => span.message = field.text(),
                        3 => span.status = field.number(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    span
}

/// A KeyValue, its value as text.
fn attribute(bytes: &[u8]) -> (String, String) {
    let mut key = String::new();
    let mut value = String::new();
    for (number, field) in fields(bytes) {
        if number == 1 {
            key = field.text();
        } else if number == 2 {
            for (kind, field) in fields(field.bytes()) {
                value = match kind {
                    1 => field.text(),
                    2 => (field.number() != 0).to_string(),
                    3 => field.number().to_string(),
                    4 => f64::from_bits(field.number()).to_string(),
                    other => panic!("an attribute of kind {other}"),
                };
            }
        }
    }
    (key, value)
}
