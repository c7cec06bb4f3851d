//! The page of `tvmm serve`, in a real browser without a screen.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::skip::skip;
use crate::support::service::Service;
use crate::support::{TIMEOUT, scratch};

const BROWSERS: [&str; 3] = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];

/// Returns the DOM of a page after its scripts have run for a while.
fn rendered(browser: &str, url: &str) -> String {
    let profile = scratch();
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--virtual-time-budget=4000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(url)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let page = std::thread::spawn(move || {
        let mut page = String::new();
        let _ = std::io::Read::read_to_string(&mut stdout, &mut page);
        page
    });
    let deadline = Instant::now() + TIMEOUT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{browser} hangs");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    page.join().unwrap()
}

#[test]
fn page_shows_functions_vms_their_memory_and_traces() {
    let Some(browser) = BROWSERS.into_iter().find(|path| std::path::Path::new(path).exists()) else {
        skip!("chromium", "there is no Chromium");
        return;
    };
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--listen", "127.0.0.1:0"]);
    let vm = service.snapshot_touch("base");
    // Names are text, whatever is in them.
    let function = json!({ "func_name": "shown", "mem_size": 64, "boot_args": "x", "image": "/<b>img</b>" });
    service.ok("POST", "/functions", Some(function));
    let cold = service.invoke(json!({ "func_name": "touch", "params": "pages=100 write=50", "ssId": "base" }));
    let url = format!("{}/ui", service.url.as_deref().unwrap());
    let page = rendered(browser, &url);
    assert!(page.contains("data-ready=\"yes\""), "the page's script did not run: {page}");
    let trace = &cold["traceId"].as_str().unwrap()[..12];
    for shown in [&vm, cold["vmId"].as_str().unwrap(), trace, "shown", "base by firecracker", "data-tier=\"dram\""] {
        assert!(page.contains(shown), "no {shown:?} in {page}");
    }
    assert!(page.contains("local DRAM") && page.contains("page cache, shared"), "{page}");
    assert!(page.contains("/&lt;b&gt;img&lt;/b&gt;") && !page.contains("<b>img</b>"), "{page}");
    // Nothing is fetched from anywhere else.
    let source = include_str!("../../../src/serve/ui.html");
    assert!(!source.contains("http://") && !source.contains("https://"));
}
