//! Fuzz doors of the service (`docs/fuzzing.md`): bodies, headers and token files of clients, and the lines of guests.

use std::cell::{Cell, RefCell};
use std::io;
use std::path::Path;

use axum::http::{HeaderMap, HeaderValue, Uri};
use serde::de::DeserializeOwned;
use tokio::runtime::{Builder, Runtime};

use super::access::token_file;
use super::body::{check_line, check_name, query};
use super::forks::ForkBody;
use super::function::Function;
use super::invocations::InvocationBody;
use super::networks::NetworkBody;
use super::snapshots::{SnapshotBody, SnapshotPatch};
use super::traceparent;
use super::vm::line::{GuestRequest, Line, ask, drain};
use super::vms::VmBody;

fn read<T: DeserializeOwned>(body: &[u8]) {
    let _ = serde_json::from_slice::<T>(body);
}

/// A client of the service. The first byte says what it sends.
pub fn service(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let text = std::str::from_utf8(data).unwrap_or_default();
    match kind % 11 {
        0 => drop(serde_json::from_slice::<Function>(data).map(|function| function.check())),
        1 => read::<InvocationBody>(data),
        2 => read::<VmBody>(data),
        3 => read::<SnapshotBody>(data),
        4 => read::<SnapshotPatch>(data),
        5 => read::<ForkBody>(data),
        6 => read::<NetworkBody>(data),
        7 => drop(token_file::parse(Path::new("door"), text)),
        8 => {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_bytes(data) {
                headers.insert("traceparent", value);
            }
            if let Some(caller) = traceparent::caller(&headers) {
                assert_eq!((caller.trace_id.len(), caller.span_id.len()), (32, 16));
            }
        }
        9 => drop(text.parse::<Uri>().map(|uri| query(&uri, &["key", "other"]))),
        _ => {
            if check_name("function", text).is_ok() {
                assert!(!text.contains('/') && !text.starts_with('.'), "a name leaves its directory");
            }
            if check_line("A line", text).is_ok() {
                assert!(!text.contains('\n'), "a line has two lines");
            }
        }
    }
}

/// A guest that says the bytes of the input, some at a time.
struct Guest<'a> {
    left: RefCell<&'a [u8]>,
    piece: usize,
    waits: Cell<bool>,
}

impl Line for Guest<'_> {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // Every second time there is nothing yet.
        if self.waits.replace(!self.waits.get()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut left = self.left.borrow_mut();
        let count = self.piece.min(left.len()).min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        *left = &left[count..];
        Ok(count)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len().min(self.piece))
    }

    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send {
        std::future::ready(Ok(()))
    }

    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send {
        std::future::ready(Ok(()))
    }
}

thread_local! {
    static RUNTIME: Option<Runtime> = Builder::new_current_thread().build().ok();
}

/// The line of a guest: the first byte is the number of bytes that it says at once.
pub fn guest_line(data: &[u8]) {
    let Some((piece, said)) = data.split_first() else { return };
    let piece = usize::from(*piece).max(1) * 16;
    let guest = || Guest { left: RefCell::new(said), piece, waits: Cell::new(false) };
    drain(&guest());
    let request = GuestRequest { id: "7", function: "echo" };
    let budget = 1 << 16;
    RUNTIME.with(|runtime| {
        let Some(runtime) = runtime else { return };
        if let Ok(answer) = runtime.block_on(ask(&guest(), request, budget)) {
            assert!(!answer.text.contains('\n') && answer.text.len() <= 3 * said.len());
        }
    });
}
