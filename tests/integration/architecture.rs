//! The house stays tidy: imports point one way, files and functions stay readable, `unsafe` is argued.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room and the rooms it may import (`docs/architecture.md`).
const ROOMS: [(&str, &[&str]); 7] = [
    ("snapshot", &[]),
    ("devices", &["snapshot"]),
    ("tiering", &["snapshot"]),
    ("vmm", &["snapshot", "devices", "tiering"]),
    ("api", &["vmm"]),
    ("serve", &["snapshot", "tiering", "vmm", "api"]),
    ("cli", &["snapshot", "devices", "tiering", "vmm", "api", "serve"]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn imports_point_one_way() {
    let mut wrong = Vec::new();
    for (room, allowed) in ROOMS {
        for path in sources(&root().join("src").join(room)) {
            let text = fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                for part in line.split("crate::").skip(1) {
                    let target: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    let is_room = ROOMS.iter().any(|(other, _)| *other == target);
                    if is_room && target != room && !allowed.contains(&target.as_str()) {
                        wrong.push(format!("{}:{}: {room} imports {target}", path.display(), number + 1));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The service has no machine in its process: of `vmm` it uses small system calls, how reports are written, and
/// where spans go.
#[test]
fn the_service_knows_no_machine() {
    let mut wrong = Vec::new();
    for path in sources(&root().join("src/serve")) {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let uses = line.split("crate::vmm::").skip(1);
            let is_allowed =
                |rest: &str| ["sys::", "report::chrome_event", "otlp"].iter().any(|used| rest.starts_with(used));
            if !uses.into_iter().all(is_allowed) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_room_is_listed() {
    for entry in fs::read_dir(root().join("src")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        assert!(!path.is_dir() || ROOMS.iter().any(|(room, _)| *room == name), "{name} has no place in the map");
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    let long: Vec<String> = sources(&root().join("src"))
        .into_iter()
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            (lines > 800).then(|| format!("{} has {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn unsafe_is_rare_and_argued() {
    let allowed = [
        "src/devices/virtio/net/tap.rs",
        "src/vmm/sys/",
        "src/devices/virtio/block/",
        "src/vmm/memory.rs",
        "src/vmm/machine.rs",
        "src/vmm/state.rs",
        "src/vmm/capture.rs",
        "src/vmm/promote/",
        "src/vmm/restore/engine.rs",
    ];
    let mut wrong = Vec::new();
    for path in sources(&root().join("src")) {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            if !code.contains("unsafe {") && !code.contains("unsafe impl") {
                continue;
            }
            let argued = lines[index.saturating_sub(6)..index].iter().any(|before| before.contains("SAFETY:"));
            if !allowed.iter().any(|place| name.starts_with(place)) || !argued {
                wrong.push(format!("{name}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// `println!` and its kin end the process when their reader is gone; `out!` and `say!` of the command line do not.
/// `std::thread::spawn` and `Scope::spawn` end it at a limit of threads; `Builder` returns an error, `worker::share` does
/// with fewer.
#[test]
fn nothing_is_printed_or_spawned_by_what_panics() {
    let mut wrong = Vec::new();
    for path in sources(&root().join("src")) {
        if path.components().any(|part| part.as_os_str().to_string_lossy().contains("tests")) {
            continue;
        }
        // A test of its folder, declared as one there.
        if path.ends_with("policy/speed.rs") {
            continue;
        }
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.contains("#[cfg(test)]") {
                break;
            }
            let code = line.split("//").next().unwrap_or("");
            let panics = ["println!", "print!", "dbg!", "std::thread::spawn(", "scope.spawn("];
            if panics.iter().any(|name| code.contains(name)) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
