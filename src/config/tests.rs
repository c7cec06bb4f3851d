use super::restore::{MemoryFrom, PlanFrom, PolicyChoice, Start};
use super::*;
use crate::snapshot::{Cold, ColdCache, ColdSpec, Policy};

/// The whole error as a user sees it.
fn refusal(text: &str) -> String {
    VmConfig::from_json(text).expect_err(text).to_string()
}

#[test]
fn from_json_empty_object_gives_the_built_in_guest_on_the_default_machine() {
    let config = VmConfig::from_json("{}").unwrap();
    assert_eq!(config, VmConfig::default());
    assert_eq!((config.machine.vcpu_count, config.machine.mem_size_mib), (1, 128));
    assert_eq!(config.boot_source.boot_args_or_default(), DEFAULT_BOOT_ARGS);
    assert_eq!(config.machine.mem_size_bytes(), 128 << 20);
}

#[test]
fn from_json_full_firecracker_config_is_read() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0", "initrd_path": null},
        "machine-config": {"vcpu_count": 32, "mem_size_mib": 1048576, "smt": false, "cpu_template": "None",
                           "track_dirty_pages": true, "huge_pages": "None"},
        "logger": {"log_path": "l.log", "level": "Debug", "show_level": true, "show_log_origin": false, "module": "m"},
        "metrics": {"metrics_path": "m.fifo"},
        "drives": [], "network-interfaces": [], "pmem": [], "vsock": null, "balloon": null, "entropy": null,
        "memory-hotplug": null, "mmds-config": null, "cpu-config": null,
        "tvmm": {"boot_protocol": "pvh"}
    }"#;
    let config = VmConfig::from_json(text).unwrap();
    assert_eq!(config.boot_source.kernel_image_path.as_deref(), Some(Path::new("vmlinux")));
    assert_eq!(config.boot_source.boot_args_or_default(), "console=ttyS0");
    assert_eq!((config.machine.vcpu_count, config.machine.mem_size_mib), (32, MAX_MEM_SIZE_MIB));
    assert!(config.machine.track_dirty_pages);
    let logger = config.logger.as_ref().unwrap();
    assert_eq!((logger.level, logger.module.as_deref()), (Some(LogLevel::Debug), Some("m")));
    assert_eq!(config.metrics.as_ref().unwrap().metrics_path, Path::new("m.fifo"));
    assert_eq!(config.tvmm.boot_protocol, BootProtocol::Pvh);
}

#[test]
fn serialized_config_has_firecrackers_shape_and_can_be_read_back() {
    let expected = serde_json::json!({
        "boot-source": {"kernel_image_path": null, "initrd_path": null},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
                           "huge_pages": "None"},
        "logger": null, "metrics": null, "balloon": null, "cpu-config": null, "drives": [], "entropy": null,
        "memory-hotplug": null, "mmds-config": null, "network-interfaces": [], "pmem": [], "vsock": null,
    });
    assert_eq!(serde_json::to_value(VmConfig::default()).unwrap(), expected);

    let mut config = VmConfig::default();
    config.tvmm.boot_protocol = BootProtocol::Linux64;
    config.tvmm.acpi = false;
    config.cpu = Some(CpuConfig::default());
    config.boot_source.boot_args = Some("quiet".to_owned());
    config.metrics = Some(MetricsConfig { metrics_path: "m".into() });
    config.logger = Some(LoggerConfig { level: Some(LogLevel::Warning), ..LoggerConfig::default() });
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(VmConfig::from_json(&text).unwrap(), config);
}

#[test]
fn every_key_is_either_built_or_in_the_table() {
    let devices = ["balloon", "drives", "entropy", "network-interfaces", "pmem", "vsock"];
    let built = ["boot-source", "cpu-config", "logger", "machine-config", "metrics", "snapshot-load", "tvmm"];
    let mut keys: Vec<&str> = UNBUILT_SECTIONS.iter().map(|section| section.key).chain(built).chain(devices).collect();
    keys.sort_unstable();
    assert_eq!(keys, KEYS);
}

#[test]
fn from_json_bad_json_says_where_and_at_which_key() {
    let cases = [
        ("", "Config is not valid at the top level, line 1, column 0: EOF while parsing a value."),
        ("kernel=vmlinux", "Config is not valid at the top level, line 1, column 1: expected value."),
        (
            "[]",
            "Config is not valid at the top level, line 1, column 0: invalid type: sequence, expected a config (a JSON \
             object).",
        ),
        (
            "{\n \"machine-config\": {\"vcpu_count\": 1,\n  \"mem_size_mib\": \"x\"}}",
            "Config is not valid at machine-config.mem_size_mib, line 3, column 21: invalid type: string \"x\", \
             expected u64.",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1}}"#,
            "Config is not valid at machine-config, line 1, column 36: missing field `mem_size_mib`.",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 300, "mem_size_mib": 1}}"#,
            "Config is not valid at machine-config.vcpu_count, line 1, column 37: invalid value: integer `300`, \
             expected u8.",
        ),
        (r#"{"metrics": {}}"#, "Config is not valid at metrics, line 1, column 14: missing field `metrics_path`."),
        (
            r#"{"boot-source": {}} trailing"#,
            "Config is not valid at the top level, line 1, column 21: trailing characters.",
        ),
        (
            r#"{"logger": {}, "logger": {}}"#,
            "Config is not valid at logger, line 1, column 23: duplicate field `logger`.",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(refusal(text), expected, "{text}");
    }
}

#[test]
fn from_json_unknown_key_is_refused_by_name() {
    let cases = [
        (r#"{"machine_config": {}}"#, "at machine_config", "unknown field `machine_config`"),
        (r#"{"boot-source": {"kernel": "x"}}"#, "at boot-source.kernel", "unknown field `kernel`"),
        (r#"{"machine-config": {"vcpus": 1}}"#, "at machine-config.vcpus", "unknown field `vcpus`"),
        (r#"{"logger": {"path": "x"}}"#, "at logger.path", "unknown field `path`"),
        (r#"{"metrics": {"path": "x"}}"#, "at metrics.path", "unknown field `path`"),
        (r#"{"tvmm": {"tier": "x"}}"#, "at tvmm.tier", "unknown field `tier`"),
        (r#"{"tvmm": {"boot_protocol": "efi"}}"#, "at tvmm.boot_protocol", "unknown variant `efi`"),
        (r#"{"logger": {"level": "Loud"}}"#, "at logger.level", "unknown variant `Loud`"),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 1, "huge_pages": "7M"}}"#,
            "at machine-config.huge_pages",
            "unknown variant `7M`",
        ),
    ];
    for (text, place, reason) in cases {
        let refusal = refusal(text);
        assert!(refusal.contains(place) && refusal.contains(reason), "{text}: {refusal}");
    }
}

#[test]
fn from_json_wrong_types_are_refused() {
    for value in ["1", "\"x\"", "[1]", "true"] {
        for key in ["boot-source", "machine-config", "logger", "metrics", "tvmm"] {
            let refusal = refusal(&format!("{{\"{key}\": {value}}}"));
            assert!(refusal.starts_with(&format!("Config is not valid at {key},")), "{refusal}");
        }
    }
    assert!(refusal(r#"{"boot-source": {"kernel_image_path": 7}}"#).contains("boot-source.kernel_image_path"));
}

#[test]
fn from_json_unsupported_section_is_named() {
    let cases = [
        ("memory-hotplug", "{}", "Memory hotplug is not supported yet."),
        ("mmds-config", "{}", "MMDS is not supported yet."),
    ];
    assert_eq!(cases.len(), UNBUILT_SECTIONS.len());
    for (key, value, expected) in cases {
        assert_eq!(refusal(&format!("{{\"{key}\": {value}}}")), expected);
        for nothing in ["null", "[]"] {
            VmConfig::from_json(&format!("{{\"{key}\": {nothing}}}")).unwrap();
        }
        assert_eq!(unbuilt_section_error(key).unwrap().to_string(), expected);
    }
    assert!(unbuilt_section_error("logger").is_none());
}

#[test]
fn from_json_machine_that_cannot_be_built_is_refused() {
    let cases = [
        (r#""vcpu_count": 0, "mem_size_mib": 1"#, "Machine config's vcpu_count is 0, but must be from 1 to 32."),
        (r#""vcpu_count": 33, "mem_size_mib": 1"#, "Machine config's vcpu_count is 33, but must be from 1 to 32."),
        (
            r#""vcpu_count": 1, "mem_size_mib": 0"#,
            "Machine config's mem_size_mib is 0, but must be from 1 to 1048576 (1 TiB).",
        ),
        (
            r#""vcpu_count": 1, "mem_size_mib": 1048577"#,
            "Machine config's mem_size_mib is 1048577, but must be from 1 to 1048576 (1 TiB).",
        ),
        (r#""vcpu_count": 2, "mem_size_mib": 1, "smt": true"#, "Hyper-threads (smt) are not supported yet."),
        (
            r#""vcpu_count": 1, "mem_size_mib": 2, "huge_pages": "2M""#,
            "Memory on 2M pages (huge_pages) is not supported yet.",
        ),
        (
            r#""vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "T2CL""#,
            "CPU template T2CL (cpu_template) is not supported yet.",
        ),
    ];
    for (fields, expected) in cases {
        assert_eq!(refusal(&format!("{{\"machine-config\": {{{fields}}}}}")), expected);
    }
}

#[test]
fn from_json_boot_source_that_cannot_be_booted_is_refused() {
    let cases = [
        (
            r#""initrd_path": "i""#,
            "Boot source's initrd_path needs a kernel_image_path: the built-in guest takes no initrd.",
        ),
        (r#""kernel_image_path": """#, "Boot source's kernel_image_path is empty; leave it out if there is none."),
        (r#""boot_args": "a\u0000b""#, "Boot source's boot_args contain a NUL byte."),
    ];
    for (fields, expected) in cases {
        assert_eq!(refusal(&format!("{{\"boot-source\": {{{fields}}}}}")), expected);
    }
    let two = r#"{"boot-source": {"kernel_image_path": "k"}, "tvmm": {"guest": "functions"}}"#;
    assert_eq!(refusal(two), "There is both a kernel_image_path and tvmm.guest, a built-in guest; leave one out.");
    assert!(refusal(r#"{"tvmm": {"guest": "large"}}"#).contains("unknown variant `large`"));
}

#[test]
fn patched_changes_what_is_named_and_refuses_the_whole_patch() {
    let machine = MachineConfig::default();
    let patch = MachineConfigPatch { mem_size_mib: Some(64), ..MachineConfigPatch::default() };
    assert!(!patch.is_empty() && MachineConfigPatch::default().is_empty());
    assert_eq!(machine.patched(&patch).unwrap(), MachineConfig { mem_size_mib: 64, ..machine.clone() });
    let patch = MachineConfigPatch { vcpu_count: Some(0), ..patch };
    assert!(matches!(machine.patched(&patch), Err(ConfigError::VcpuCount { vcpu_count: 0 })));
}

#[test]
fn log_levels_have_firecrackers_spellings() {
    for (spelling, level) in [
        ("Off", LogLevel::Off),
        ("Error", LogLevel::Error),
        ("Warning", LogLevel::Warning),
        ("Warn", LogLevel::Warning),
        ("WARN", LogLevel::Warning),
        ("INFO", LogLevel::Info),
        ("Debug", LogLevel::Debug),
        ("TRACE", LogLevel::Trace),
    ] {
        assert_eq!(serde_json::from_value::<LogLevel>(spelling.into()).unwrap(), level);
    }
}

#[test]
fn from_file_errors_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.json");
    let missing = VmConfig::from_file(&path).unwrap_err();
    assert_eq!(missing.to_string(), format!("Config file {} cannot be read.", path.display()));
    assert!(std::error::Error::source(&missing).is_some());

    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(matches!(VmConfig::from_file(&path), Err(ConfigError::Read { .. })), "not UTF-8");

    std::fs::write(&path, r#"{"mmds-config": {"version": "V2"}}"#).unwrap();
    let refused = VmConfig::from_file(&path).unwrap_err();
    assert_eq!(refused.to_string(), format!("Config file {} is refused.", path.display()));
    assert_eq!(std::error::Error::source(&refused).unwrap().to_string(), "MMDS is not supported yet.");

    assert!(matches!(VmConfig::from_file(Path::new("/dev/zero")), Err(ConfigError::TooLarge { .. })));
    assert!(matches!(VmConfig::from_file(dir.path()), Err(ConfigError::Read { .. })), "a directory");
}

#[test]
fn the_example_config_is_valid() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/vm.json");
    VmConfig::from_file(&path).unwrap();
}

#[test]
fn from_json_never_panics() {
    use proptest::prelude::*;
    let token = prop_oneof![
        Just("{"),
        Just("}"),
        Just("["),
        Just("]"),
        Just(":"),
        Just(","),
        Just("\""),
        Just("\\"),
        Just("\n"),
        Just("é"),
        Just("\"machine-config\""),
        Just("\"vcpu_count\""),
        Just("\"drives\""),
        Just("null"),
        Just("-1e99"),
        Just("\\ud800"),
    ];
    let text = proptest::collection::vec(token, 0..24).prop_map(|tokens| tokens.concat());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    proptest::test_runner::TestRunner::new(config)
        .run(&text, |text| {
            if let Err(error) = VmConfig::from_json(&format!("{{{text}")) {
                let _ = error.to_string();
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn from_json_cpu_config_may_be_a_template_or_name_its_file() {
    let template = r#"{"kvm_capabilities": ["!56"]}"#;
    let here = VmConfig::from_json(&format!(r#"{{"cpu-config": {template}}}"#)).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), template).unwrap();
    let named = VmConfig::from_json(&serde_json::json!({ "cpu-config": file.path() }).to_string()).unwrap();
    assert_eq!(here.cpu.as_ref().map(|cpu| cpu.kvm_capabilities.len()), Some(1));
    assert_eq!(named, here);
    assert!(refusal(r#"{"cpu-config": "/nonexistent/t.json"}"#).contains("/nonexistent/t.json cannot be read"));
    assert!(refusal(r#"{"cpu-config": {"kvm_capabilities": [56]}}"#).contains("at cpu-config.kvm_capabilities"));
    std::fs::write(file.path(), "{").unwrap();
    let broken = serde_json::json!({ "cpu-config": file.path() }).to_string();
    assert!(refusal(&broken).contains(&format!("{} is refused", file.path().display())));
}

#[test]
fn snapshot_load_is_read_and_shuts_out_what_shapes_a_machine() {
    let text = r#"{"logger": {"level": "Info"}, "metrics": {"metrics_path": "m"}, "drives": [], "vsock": null,
        "snapshot-load": {"snapshot_path": "s", "resume_vm": true, "tvmm": {"policy": "tiered", "pools": ["a", "b"],
            "cold_pools": ["c"], "cold_cache": "d", "cold_cache_mib": 7, "dram_price": 3, "costs": "e",
            "plan_dir": "f"}}}"#;
    let config = VmConfig::from_json(text).unwrap();
    let load = config.snapshot_load.as_deref().unwrap();
    assert_eq!((load.snapshot.as_path(), load.start), (Path::new("s"), Start::Running));
    let cache = Some(ColdCache { dir: "d".into(), limit_mib: Some(7) });
    let fallback = Some(Cold { pools: vec![ColdSpec::Dir("c".into())], cache, key: None });
    assert_eq!(load.memory, MemoryFrom::Pools { pools: vec!["a".into(), "b".into()], fallback });
    let choice = PolicyChoice { dram_price_us: 3, costs: Some("e".into()), ..PolicyChoice::default() };
    assert_eq!(load.plan, PlanFrom::Policy(PolicyChoice { requested: Some(Policy::Tiered), ..choice }));
    assert_eq!(load.plan_dir.as_deref(), Some(Path::new("f")));
    assert_eq!(VmConfig::from_json(r#"{"snapshot-load": null}"#).unwrap(), VmConfig::default());
    let load = r#""snapshot-load": {"snapshot_path": "s"}"#;
    for (key, value) in [
        ("boot-source", "{}"),
        ("machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 1}"#),
        ("cpu-config", "{}"),
        ("tvmm", "{}"),
        ("drives", r#"[{"drive_id": "a", "is_root_device": false, "path_on_host": "f"}]"#),
        ("vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#),
        ("entropy", "{}"),
    ] {
        let said = refusal(&format!(r#"{{"{key}": {value}, {load}}}"#));
        assert!(said.starts_with(&format!("Config has both snapshot-load and {key}:")), "{said}");
    }
}

#[test]
fn snapshot_load_that_makes_no_sense_is_refused() {
    for (fields, said) in [
        (r#""snapshot_path": """#, "Snapshot's snapshot_path is empty."),
        (
            r#""snapshot_path": "s", "tvmm": {"plan": "p", "policy": "eager"}"#,
            "Snapshot load has both tvmm.plan and tvmm.policy; leave one out.",
        ),
        (
            r#""snapshot_path": "s", "mem_file_path": "m", "tvmm": {"cold_pools": ["c"]}"#,
            "Snapshot load has both a pool and mem_file_path; leave one out.",
        ),
        (
            r#""snapshot_path": "s", "tvmm": {"cold_cache": "c"}"#,
            "Snapshot load has tvmm.cold_cache, which needs tvmm.cold_pools.",
        ),
        (
            r#""snapshot_path": "s", "tvmm": {"cold_pools": ["c"], "cold_cache_mib": 1}"#,
            "Snapshot load has tvmm.cold_cache_mib, which needs tvmm.cold_cache.",
        ),
        (
            r#""snapshot_path": "s", "tvmm": {"cold_pools": ["c"], "cold_cache": "c", "cold_cache_mib": 0}"#,
            "Snapshot load's tvmm.cold_cache_mib must be 1 or more.",
        ),
    ] {
        assert_eq!(refusal(&format!(r#"{{"snapshot-load": {{{fields}}}}}"#)), said);
    }
    for (fields, place, reason) in [
        (r#""snapshot_path": "s", "pools": []"#, "at snapshot-load.pools", "unknown field `pools`"),
        (r#""snapshot_path": "s", "tvmm": {"pool": []}"#, "at snapshot-load.tvmm.pool", "unknown field `pool`"),
        (r#""snapshot_path": "s", "tvmm": {"pools": "p"}"#, "at snapshot-load.tvmm.pools", "invalid type"),
        (r#""snapshot_path": "s", "tvmm": {"dram_price": -1}"#, "at snapshot-load.tvmm.dram_price", "invalid value"),
        (r#""resume_vm": true"#, "at snapshot-load", "missing field `snapshot_path`"),
        (
            r#""snapshot_path": "s", "mem_file_path": "m", "mem_backend": {
                "backend_type": "File", "backend_path": "m"}"#,
            "line 2",
            "too many fields",
        ),
    ] {
        let said = refusal(&format!(r#"{{"snapshot-load": {{{fields}}}}}"#));
        assert!(said.contains(place) && said.contains(reason), "{fields}: {said}");
    }
}
