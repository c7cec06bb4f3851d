//! Every path: its request, the VMM's command, and the client's answer.

use serde_json::json;

use super::*;
use crate::config::request::{CreateSnapshot, SnapshotPaths};
use crate::config::restore::{MemoryFrom, PlanFrom, PolicyChoice, RestoreRequest, Start};
use crate::config::{BootSource, CpuConfig, HugePages, LogLevel, LoggerConfig, MachineConfigPatch, MetricsConfig};
use crate::snapshot::{InPlaceMapping, Policy, SnapshotKind};

#[test]
fn get_paths_tell_the_reply() {
    let fixture = Fixture::new();
    let version = env!("CARGO_PKG_VERSION");
    let cases = [
        (
            "/",
            Command::InstanceInfo,
            json!({"id": "anonymous-instance", "state": "Not started", "vmm_version": version, "app_name": "tvmm"}),
        ),
        ("/version", Command::Version, json!({"firecracker_version": "1.2.3", "tvmm_version": "1.2.3"})),
        (
            "/machine-config",
            Command::GetMachineConfig,
            json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
                   "huge_pages": "None"}),
        ),
        ("/vm/config", Command::GetVmConfig, vm_config_json()),
    ];
    for (path, command, expected) in cases {
        assert_eq!(fixture.request("GET", path, None).unwrap(), (200, Some(expected)), "{path}");
        assert_eq!(fixture.seen(), [command]);
    }
}

#[test]
fn boot_sources_give_their_command() {
    let cases = [
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": "k", "boot_args": "a"}),
            Command::PutBootSource(BootSource {
                kernel_image_path: Some("k".into()),
                initrd_path: None,
                boot_args: Some("a".to_owned()),
            }),
        ),
        ("PUT", "/boot-source", json!({}), Command::PutBootSource(BootSource::default())),
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": "k", "initrd_path": "i"}),
            Command::PutBootSource(BootSource {
                kernel_image_path: Some("k".into()),
                initrd_path: Some("i".into()),
                boot_args: None,
            }),
        ),
    ];
    gives(cases);
}

fn gives<const N: usize>(cases: [(&str, &str, Value, Command); N]) {
    let fixture = Fixture::new();
    for (method, path, body, command) in cases {
        assert_eq!(fixture.request(method, path, Some(body)).unwrap(), (204, None), "{method} {path}");
        assert_eq!(fixture.seen(), [command]);
    }
}

#[test]
fn put_and_patch_paths_give_their_command() {
    let cases = [
        ("PUT", "/cpu-config", json!({}), Command::PutCpuConfig(CpuConfig::default())),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": true}),
            Command::PutMachineConfig(MachineConfig {
                vcpu_count: 2,
                mem_size_mib: 64,
                track_dirty_pages: true,
                ..MachineConfig::default()
            }),
        ),
        (
            "PATCH",
            "/machine-config",
            json!({"mem_size_mib": 64, "huge_pages": "None"}),
            Command::PatchMachineConfig(MachineConfigPatch {
                mem_size_mib: Some(64),
                huge_pages: Some(HugePages::None),
                ..MachineConfigPatch::default()
            }),
        ),
        (
            "PUT",
            "/logger",
            json!({"log_path": "l", "level": "Warning"}),
            Command::PutLogger(LoggerConfig {
                log_path: Some("l".into()),
                level: Some(LogLevel::Warning),
                ..LoggerConfig::default()
            }),
        ),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": "m"}),
            Command::PutMetrics(MetricsConfig { metrics_path: "m".into() }),
        ),
        ("PUT", "/actions", json!({"action_type": "InstanceStart"}), Command::InstanceStart),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"}), Command::SendCtrlAltDel),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"}), Command::FlushMetrics),
        ("PATCH", "/vm", json!({"state": "Paused"}), Command::Pause),
        ("PATCH", "/vm", json!({"state": "Resumed"}), Command::Resume),
    ];
    gives(cases);
}

fn two_files() -> SnapshotPaths {
    SnapshotPaths { snapshot: "s".into(), memory: Some("m".into()) }
}

fn directory() -> SnapshotPaths {
    SnapshotPaths { snapshot: "s".into(), memory: None }
}

#[test]
fn put_snapshot_create_firecracker_form_gives_no_body() {
    let fixture = Fixture::new();
    for (snapshot_type, kind) in [("Full", SnapshotKind::Full), ("Diff", SnapshotKind::Diff)] {
        let body = json!({"snapshot_path": "s", "mem_file_path": "m", "snapshot_type": snapshot_type});
        assert_eq!(fixture.request("PUT", "/snapshot/create", Some(body)).unwrap(), (204, None));
        let expected = CreateSnapshot {
            location: two_files(),
            kind,
            resume: false,
            copy_drives: false,
            verify: false,
            live: false,
            profile: false,
        };
        assert_eq!(fixture.seen(), [Command::CreateSnapshot(expected)]);
    }
}

#[test]
fn put_snapshot_create_directory_form_tells_the_snapshot() {
    let fixture = Fixture::new();
    let body = json!({"snapshot_path": "s", "tvmm": {"resume": true, "copy_drives": true, "verify": true}});
    let expected = json!({"id": "abc", "path": "s", "memory_bytes": 4096, "capture_us": 7});
    assert_eq!(fixture.request("PUT", "/snapshot/create", Some(body)).unwrap(), (200, Some(expected)));
    let location = directory();
    let kind = SnapshotKind::Full;
    let expected =
        CreateSnapshot { location, kind, resume: true, copy_drives: true, verify: true, live: false, profile: false };
    assert_eq!(fixture.seen(), [Command::CreateSnapshot(expected)]);
}

#[test]
fn put_snapshot_load_forms_give_their_command() {
    let fixture = Fixture::new();
    let load = |memory_file: Option<&str>, track_dirty_pages, resume| RestoreRequest {
        snapshot: "s".into(),
        memory: MemoryFrom::Files { memory_file: memory_file.map(Into::into), trusted_keys: Vec::new() },
        track_dirty_pages,
        start: if resume { Start::Running } else { Start::Paused },
        ..RestoreRequest::default()
    };
    let by = |policy| PlanFrom::Policy(PolicyChoice { requested: Some(policy), ..PolicyChoice::default() });
    assert_eq!(PolicyChoice::default().policy(), Policy::Firecracker);
    let file = json!({"backend_type": "File", "backend_path": "m"});
    let cases = [
        (json!({"snapshot_path": "s", "mem_backend": file}), load(Some("m"), false, false)),
        (json!({"snapshot_path": "s", "mem_file_path": "m"}), load(Some("m"), false, false)),
        (
            json!({"snapshot_path": "s", "mem_file_path": "m", "enable_diff_snapshots": true}),
            load(Some("m"), true, false),
        ),
        (json!({"snapshot_path": "s", "track_dirty_pages": true, "resume_vm": true}), load(None, true, true)),
        (
            json!({"snapshot_path": "s", "network_overrides": [], "vsock_override": null, "clock_realtime": false}),
            load(None, false, false),
        ),
        (
            json!({"snapshot_path": "s", "mem_backend": {"backend_type": "Uffd", "backend_path": "u"}}),
            RestoreRequest { memory: MemoryFrom::Handler("u".into()), ..load(None, false, false) },
        ),
        (
            json!({"snapshot_path": "s", "tvmm": {"policy": "eager"}}),
            RestoreRequest { plan: by(Policy::Eager), ..load(None, false, false) },
        ),
        (
            json!({"snapshot_path": "s", "tvmm": {"policy": "trenv", "in_place_mapping": "shared"}}),
            RestoreRequest {
                plan: by(Policy::Trenv),
                in_place_mapping: InPlaceMapping::Shared,
                ..load(None, false, false)
            },
        ),
        (
            json!({"snapshot_path": "s", "clock_realtime": true}),
            RestoreRequest { clock_realtime: true, ..load(None, false, false) },
        ),
    ];
    for (body, expected) in cases {
        assert_eq!(fixture.request("PUT", "/snapshot/load", Some(body)).unwrap(), (204, None));
        assert_eq!(fixture.seen(), [Command::LoadSnapshot(Box::new(expected))]);
    }
}

const JSON: &str = "An error occurred when deserializing the json body of a request: ";

fn refuses<const N: usize>(cases: [(&str, &str, Value, String); N]) {
    let fixture = Fixture::new();
    for (method, path, body, expected) in cases {
        let (status, message) = fixture.fault(method, path, Some(body.clone()));
        assert_eq!(status, 400);
        assert!(message.starts_with(&expected), "{method} {path} {body}: {message}");
    }
    assert_eq!(fixture.seen(), []);
}

#[test]
fn bad_bodies_are_refused_and_never_reach_the_vmm() {
    let cases = [
        ("PUT", "/boot-source", json!({"kernel": "k"}), format!("{JSON}unknown field `kernel`")),
        (
            "PUT",
            "/boot-source",
            json!({"initrd_path": "i"}),
            "Boot source's initrd_path needs a kernel_image_path: the built-in guest takes no initrd.".into(),
        ),
        ("PUT", "/machine-config", json!({"vcpu_count": 1}), format!("{JSON}missing field `mem_size_mib`")),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 33, "mem_size_mib": 1}),
            "Machine config's vcpu_count is 33, but must be from 1 to 32.".into(),
        ),
        ("PATCH", "/machine-config", json!({}), "Empty PATCH request.".into()),
        (
            "PATCH",
            "/machine-config",
            json!({"mem_size_mib": 0}),
            "Machine config's mem_size_mib is 0, but must be from 1 to 1048576 (1 TiB).".into(),
        ),
        ("PATCH", "/machine-config", json!({"smt": true}), "Hyper-threads (smt) are not supported yet.".into()),
        ("PUT", "/logger", json!({"level": "Loud"}), format!("{JSON}unknown variant `Loud`")),
        ("PUT", "/metrics", json!({}), format!("{JSON}missing field `metrics_path`")),
        ("PUT", "/actions", json!({"action_type": "Explode"}), format!("{JSON}unknown variant `Explode`")),
        ("PUT", "/actions", json!([]), format!("{JSON}invalid length 0")),
        ("PATCH", "/vm", json!({"state": "Running"}), format!("{JSON}unknown variant `Running`")),
    ];
    refuses(cases);
}

#[test]
fn bad_bodies_of_snapshots_and_devices_are_refused_and_never_reach_the_vmm() {
    let cases = [
        ("PUT", "/snapshot/create", json!({"mem_file_path": "m"}), format!("{JSON}missing field `snapshot_path`")),
        ("PUT", "/snapshot/create", json!({"snapshot_path": ""}), "Snapshot's snapshot_path is empty.".into()),
        (
            "PUT",
            "/snapshot/create",
            json!({"snapshot_path": "s", "tvmm": {"resume_vm": true}}),
            format!("{JSON}unknown field `resume_vm`"),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": ""}}),
            "Snapshot's backend_path is empty.".into(),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "s", "mem_file_path": "m",
                   "mem_backend": {"backend_type": "File", "backend_path": "m"}}),
            format!("{JSON}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "s", "network_overrides": [{"iface_id": "a"}]}),
            format!("{JSON}missing field `host_dev_name`"),
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"snapshot_path": "s", "tvmm": {"mac_overrides": [{"iface_id": "a", "guest_mac": "06:0"}]}}),
            "`06:0` is no MAC address.".into(),
        ),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "b", "is_root_device": false, "path_on_host": "f"}),
            "The drive id from the path [a] does not match the id from the body [b]!".into(),
        ),
        (
            "PUT",
            "/vsock",
            json!({"guest_cid": 2, "uds_path": "v"}),
            "Vsock `guest_cid` is refused: it must be from 3 to 4294967294.".into(),
        ),
        ("PUT", "/cpu-config", json!({"reg_modifiers": []}), format!("{JSON}unknown field `reg_modifiers`")),
        (
            "PUT",
            "/cpu-config",
            json!({"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b2"}]}),
            format!("{JSON}invalid value: string \"0b2\""),
        ),
    ];
    refuses(cases);
}

#[test]
fn missing_and_superfluous_bodies_are_refused() {
    let fixture = Fixture::new();
    for path in ["/boot-source", "/machine-config", "/logger", "/metrics", "/actions", "/snapshot/create"] {
        assert_eq!(fixture.fault("PUT", path, None), (400, "Empty PUT request.".to_owned()));
    }
    for path in ["/machine-config", "/vm"] {
        assert_eq!(fixture.fault("PATCH", path, None), (400, "Empty PATCH request.".to_owned()));
    }
    let expected = (400, "GET request cannot have a body.".to_owned());
    assert_eq!(fixture.fault("GET", "/version", Some(json!({}))), expected);
    assert_eq!(fixture.seen(), []);
}

#[test]
fn unknown_methods_and_paths_are_refused() {
    let fixture = Fixture::new();
    for (method, path) in [
        ("GET", "/foo"),
        ("PUT", "/version"),
        ("DELETE", "/machine-config"),
        ("GET", "/vm"),
        ("GET", "/actions"),
        ("PATCH", "/boot-source"),
        ("PUT", "/snapshot/rename"),
        ("PUT", "/drives"),
    ] {
        let expected = format!("Invalid request method and/or path: {method} {}.", &path[1..]);
        assert_eq!(fixture.fault(method, path, None), (400, expected));
    }
    let head = fixture.raw(b"HEAD /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    assert_eq!(fixture.seen(), []);
}

#[test]
fn device_paths_are_refused_by_name() {
    let fixture = Fixture::new();
    let cases = [
        ("GET", "/mmds", "MMDS is"),
        ("PUT", "/mmds/config", "MMDS is"),
        ("PUT", "/serial", "Setting up serial output is"),
        ("PATCH", "/hotplug/memory", "Memory hotplug is"),
    ];
    for (method, path, subject) in cases {
        let body = (method != "GET").then(|| json!({"id": 1}));
        assert_eq!(fixture.fault(method, path, body), (400, format!("{subject} not supported yet.")), "{path}");
    }
}

#[test]
fn refusals_of_the_vmm_are_told_with_their_status() {
    let fixture = Fixture::answering(|command| match command {
        Command::Pause => Err(Refused::before_start()),
        _ => Err(Refused::internal("KVM is on fire.")),
    });
    let expected = "The requested operation is not supported before starting the microVM.";
    assert_eq!(fixture.fault("PATCH", "/vm", Some(json!({"state": "Paused"}))), (400, expected.to_owned()));
    assert_eq!(fixture.fault("GET", "/", None), (500, "KVM is on fire.".to_owned()));
}

#[test]
fn answers_have_firecrackers_headers() {
    let fixture = Fixture::new();
    let answer = fixture.raw(
        b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n\
          GET /foo HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    );
    let (first, second) = answer.split_at(answer.rfind("HTTP/1.1").unwrap());
    for (answer, status, connection) in [(first, "200 OK", "keep-alive"), (second, "400 Bad Request", "close")] {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
        for header in ["server: tvmm API", "content-type: application/json"] {
            assert!(answer.contains(&format!("\r\n{header}\r\n")), "{answer}");
        }
        assert_eq!(answer.matches("connection:").count(), 1);
        assert!(answer.contains(&format!("\r\nconnection: {connection}\r\n")), "{answer}");
    }
}

#[test]
fn deprecated_fields_are_answered_with_a_header() {
    let fixture = Fixture::new();
    for (path, body, is_deprecated) in [
        ("/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#, true),
        ("/snapshot/load", r#"{"snapshot_path":"s","enable_diff_snapshots":true}"#, true),
        ("/snapshot/load", r#"{"snapshot_path":"s"}"#, false),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"None"}"#, true),
    ] {
        let request = format!(
            "PUT {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = fixture.raw(request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 204 No Content\r\n"), "{answer}");
        assert_eq!(answer.contains("\r\ndeprecation: true\r\n"), is_deprecated, "{body}");
    }
}
