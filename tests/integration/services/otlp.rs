//! `--otlp`: spans for an OpenTelemetry collector, in builds with the feature `otel`.

use std::net::TcpListener;

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::collector::{Collector, Span};
use crate::support::service::{Service, wait_until};
use crate::support::{Vm, config, exchange, run_err, run_ok, scratch, text};

/// Returns true if this build can send spans; the calling test is skipped if it cannot.
fn has_otel() -> bool {
    let has = cfg!(feature = "otel");
    if !has {
        skip!("otel", "this build has no OpenTelemetry (--features otel)");
    }
    has
}

fn metrics(service: &Service) -> String {
    exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

fn counter(service: &Service, name: &str) -> u64 {
    let metrics = metrics(service);
    let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Sends an invocation by a client that has begun a trace.
fn invoke_as(service: &Service, traceparent: &str, body: &Value) -> Value {
    let body = body.to_string();
    let request = format!(
        "POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         traceparent: {traceparent}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer = exchange(service.socket(), request.as_bytes());
    serde_json::from_str(answer.split_once("\r\n\r\n").expect("an answer").1).expect("JSON")
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found = spans.iter().find(|span| span.name == name);
    found.unwrap_or_else(|| panic!("no {name} in {:?}", spans.iter().map(|span| &span.name).collect::<Vec<_>>()))
}

#[cfg(not(feature = "otel"))]
#[test]
fn build_without_opentelemetry_says_so() {
    let dir = scratch();
    let state = dir.path().join("state");
    let socket = dir.path().join("socket");
    for address in ["http://127.0.0.1:4318", "https://collector"] {
        let said = run_err(&["serve", "--dir", text(&state), "--listen-unix", text(&socket), "--otlp", address]);
        assert!(said.contains("--features otel") && said.contains(address), "{said}");
    }
}

#[test]
fn addresses_that_no_collector_can_have_are_refused() {
    for bad in [
        "",
        "127.0.0.1:4318",
        "ftp://x",
        "http://",
        "http://:1",
        "http://h:port",
        "http://h:70000",
        "http:///x",
        "http://a b:4318",
    ] {
        let said = run_err(&["restore", "--snapshot", "/nonexistent", "--otlp", bad]);
        assert!(said.contains("Traces cannot be sent to"), "{bad}: {said}");
    }
}

#[test]
fn invocations_of_one_callers_trace_are_told_apart() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.snapshot_touch("base");
    let trace_id = "0af7651916cd43dd8448eb211c80319c";
    let invoke = |pages: u32| {
        let body = json!({ "func_name": "touch", "ssId": "base", "params": format!("pages={pages}") });
        invoke_as(&service, &format!("00-{trace_id}-b7ad6b7169203331-01"), &body)
    };
    let answers = [invoke(1), invoke(2)];
    let summaries = service.get("/traces");
    for answer in &answers {
        assert_eq!(answer["traceId"], trace_id, "{answer}");
        let span_id = answer["spanId"].as_str().unwrap();
        assert!(summaries.as_array().unwrap().iter().any(|trace| trace["spanId"] == span_id), "{summaries}");
        let trace = service.get(&format!("/traces/{span_id}"));
        assert_eq!((&trace["traceId"], &trace["vmId"]), (&answer["traceId"], &answer["vmId"]));
    }
    assert_ne!(answers[0]["spanId"], answers[1]["spanId"]);
    assert_eq!(service.get(&format!("/traces/{trace_id}"))["spanId"], answers[1]["spanId"], "the newest");
}

#[test]
fn invocations_reach_a_collector_span_by_span() {
    if !has_otel() {
        return;
    }
    let collector = Collector::start();
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--otlp", &collector.url()]);
    service.snapshot_touch("base");
    let body = json!({ "func_name": "touch", "ssId": "base", "policy": "firecracker-uffd", "params": "pages=256" });
    let answer = service.invoke(body);
    let id = answer["traceId"].as_str().unwrap();
    let told = service.get(&format!("/traces/{id}"));
    let spans = collector.trace(id);

    // The same spans, in the same places, as long.
    let told_spans = told["spans"].as_array().unwrap();
    assert_eq!(spans.len(), told_spans.len());
    for (span, told_span) in spans.iter().zip(told_spans) {
        assert_eq!((span.service.as_str(), span.name.as_str()), ("tvmm", told_span["name"].as_str().unwrap()));
        let number = |key: &str| told_span[key].as_f64().unwrap();
        assert!((span.length_us() - number("length_us")).abs() < 0.01, "{span:?} {told_span}");
        let begun_ns = told["start_unix_us"].as_u64().unwrap() * 1000;
        let start_us = (span.start_ns as i64 - begun_ns as i64) as f64 / 1000.0;
        assert!((start_us - number("start_us")).abs() < 0.01, "{span:?} {told_span}");
        let parent = told_span["parent"].as_u64().map_or("", |parent| &spans[parent as usize].span_id);
        assert_eq!(span.parent_span_id, parent);
    }
    let root = &spans[0];
    assert_eq!((&told["spanId"], root.kind, root.status), (&json!(root.span_id), 2, 0));
    assert_eq!(root.attributes["http.response.status_code"], "200");
    assert_eq!(root.attributes["tvmm.vm_id"], answer["vmId"].as_str().unwrap());
    // From the request down to the page faults, each within what it is part of.
    let restore = named(&spans, "restore");
    let execute = named(&spans, "execute");
    assert_eq!(
        (restore.attributes["tvmm.policy"].as_str(), &restore.parent_span_id),
        ("firecracker-uffd", &root.span_id)
    );
    assert_eq!(named(&spans, "state_load").parent_span_id, restore.span_id);
    let batches: Vec<&Span> = spans.iter().filter(|span| span.name == "faults").collect();
    let faults: u64 = batches.iter().map(|batch| batch.attributes["tvmm.faults"].parse::<u64>().unwrap()).sum();
    assert!(faults >= 256, "{faults} faults in {} batches", batches.len());
    for batch in batches {
        let part_of = if batch.start_ns < execute.start_ns { restore } else { execute };
        assert!(batch.parent_span_id == part_of.span_id && batch.start_ns >= root.start_ns, "{batch:?}");
    }
    assert!(execute.attributes["tvmm.fault_ins.served.read"].parse::<u64>().unwrap() >= 1);
    let mut ids: Vec<&str> = spans.iter().map(|span| span.span_id.as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), spans.len());

    // An invocation that fails is exported as failed.
    let spin = json!({ "func_name": "touch", "ssId": "base", "params": "pages=1", "timeout_ms": 1 });
    service.refused(504, "POST", "/invocations", Some(spin));
    let id = service.get("/traces")[0]["traceId"].as_str().unwrap().to_string();
    let failed = collector.trace(&id);
    assert_eq!((failed[0].status, failed[0].attributes["http.response.status_code"].as_str()), (2, "504"));
    assert!(failed[0].message.contains("1 ms"), "{}", failed[0].message);
    assert!(counter(&service, "tvmm_otlp_traces_sent_total") >= 2);
    assert_eq!(counter(&service, "tvmm_otlp_traces_lost_total"), 0);
    assert!(service.terminate().success());
}

#[test]
fn a_callers_trace_goes_on_in_the_invocation() {
    if !has_otel() {
        return;
    }
    let collector = Collector::start();
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--otlp", &format!("{}/", collector.url())]);
    let vm = service.snapshot_touch("base");
    let body = json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" });
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let span = "b7ad6b7169203331";

    // One whose sender keeps no trace is answered alike, and goes to no collector.
    let unsampled = "1af7651916cd43dd8448eb211c80319c";
    assert_eq!(invoke_as(&service, &format!("00-{unsampled}-{span}-00"), &body)["traceId"], unsampled);
    for _ in 0..2 {
        let answer = invoke_as(&service, &format!("00-{trace}-{span}-01"), &body);
        assert_eq!(answer["traceId"], trace);
    }
    let not_valid = invoke_as(&service, &format!("00-{trace}-{}-01", "0".repeat(16)), &body);
    assert_ne!(not_valid["traceId"], trace);
    collector.trace(not_valid["traceId"].as_str().unwrap());
    let spans = collector.trace(trace);
    let roots: Vec<&Span> = spans.iter().filter(|span| span.name == "invocation").collect();
    assert_eq!(roots.len(), 2);
    assert!(roots.iter().all(|root| root.parent_span_id == span) && roots[0].span_id != roots[1].span_id);
    assert!(!collector.spans().iter().any(|span| span.trace_id == unsampled));
    let told = service.get(&format!("/traces/{trace}"));
    assert_eq!((&told["spanId"], &told["parentSpanId"]), (&json!(roots[1].span_id), &json!(span)));
}

#[test]
fn collector_that_does_not_answer_harms_nothing() {
    if !has_otel() {
        return;
    }
    // It is connected to, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [silent.local_addr().unwrap(), gone] {
        let dir = scratch();
        let service = Service::start(&dir.path().join("state"), &["--otlp", &format!("http://{address}/v1/traces")]);
        let vm = service.snapshot_touch("base");
        for _ in 0..20 {
            service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }));
        }
        if address == gone {
            wait_until("the traces are counted as lost", || counter(&service, "tvmm_otlp_traces_lost_total") == 20);
        }
        assert_eq!(counter(&service, "tvmm_otlp_traces_sent_total"), 0);
        assert!(service.terminate().success());
    }
}

#[test]
fn one_vm_sends_its_slices_at_its_end() {
    if !has_otel() {
        return;
    }
    let collector = Collector::start();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=512 seed=1");
    vm.api("PATCH", "/vm", Some(json!({ "state": "Paused" })));
    vm.capture(&snapshot, "Full");
    vm.kill();
    let args = [
        "restore",
        "--snapshot",
        text(&snapshot),
        "--policy",
        "firecracker-uffd",
        "--run",
        "touch pages=256",
        "--otlp",
    ];
    run_ok(&[&args[..], &[&collector.url()]].concat());
    let spans = collector.spans();
    let root = named(&spans, "restore");
    assert_eq!((root.parent_span_id.as_str(), root.attributes["tvmm.policy"].as_str()), ("", "firecracker-uffd"));
    for name in ["spawn", "setup", "state_load", "map", "vm_create", "resume", "first_response", "execute", "stop"] {
        let span = named(&spans, name);
        assert_eq!((&span.parent_span_id, &span.trace_id), (&root.span_id, &root.trace_id), "{name}");
        assert!(span.start_ns >= root.start_ns && span.end_ns <= root.end_ns, "{name}");
    }
    let execute = &named(&spans, "execute").span_id;
    assert!(spans.iter().any(|span| span.name == "faults" && span.parent_span_id == *execute));

    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = crate::support::run(&[&args[..], &[&format!("http://{gone}")]].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("has not taken the spans"), "{said}");
}
