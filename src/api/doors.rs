//! Fuzz door of the API (`docs/fuzzing.md`): a request whose first line is `METHOD PATH`, and whose body is the rest,
//! goes through the real routes to a machine that answers everything.

use std::cell::RefCell;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::runtime::{Builder, Runtime};

use super::routes::router;
use crate::config::control::{ControlReceiver, Reply, channel};

/// The machine looks for requests so often; a request that is not answered by then hangs.
const POLLS: u32 = 1000;

/// The routes, and the machine behind them.
struct Api {
    runtime: Runtime,
    router: Router,
    machine: ControlReceiver,
}

impl Api {
    fn new() -> Option<Api> {
        let runtime = Builder::new_current_thread().enable_all().build().ok()?;
        let (control, machine) = channel().ok()?;
        Some(Api { runtime, router: router(control), machine })
    }
}

thread_local! {
    static API: RefCell<Option<Api>> = RefCell::new(Api::new());
}

/// A request to the API of a VM.
pub fn request(data: &[u8]) {
    let Some(end) = data.iter().position(|byte| *byte == b'\n') else { return };
    let line = String::from_utf8_lossy(&data[..end]);
    let Some((method, path)) = line.split_once(' ') else { return };
    let body = Body::from(data[end + 1..].to_vec());
    let Ok(request) = Request::builder().method(method).uri(path).body(body) else { return };
    API.with_borrow_mut(|api| {
        let Some(api) = api else { return };
        let call = TowerToHyperService::new(api.router.clone()).call(request);
        let answer = async {
            for _ in 0..POLLS {
                for asked in api.machine.drain() {
                    (asked.respond)(Ok(Reply::Empty));
                }
                tokio::task::yield_now().await;
            }
        };
        let status = api.runtime.block_on(async {
            tokio::select! {
                biased;
                answered = call => answered.ok().map(|response| response.status()),
                () = answer => None,
            }
        });
        assert!(status.is_some_and(|status| !status.is_server_error()), "a request is answered by {status:?}");
    });
}
