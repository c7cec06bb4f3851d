//! The house stays tidy: imports point one way, files and functions stay readable, `unsafe` is argued.

use std::fs;
use std::path::{Path, PathBuf};

/// Each room and the rooms it may import, from the ground floor up (`docs/architecture.md`). A room imports only rooms
/// that stand before it.
const ROOMS: [(&str, &[&str]); 13] = [
    ("snapshot", &[]),
    ("sys", &["snapshot"]),
    ("devices", &["snapshot", "sys"]),
    ("tiering", &["snapshot", "sys"]),
    ("config", &["snapshot", "sys"]),
    ("backends", &["snapshot", "sys", "tiering"]),
    ("memory", &["snapshot", "sys", "tiering"]),
    ("vmm", &["snapshot", "sys", "devices", "config", "memory"]),
    ("session", &["snapshot", "sys", "tiering", "config", "backends", "memory", "vmm"]),
    ("api", &["snapshot", "sys", "config"]),
    ("bench", &["snapshot", "sys", "tiering"]),
    ("serve", &["snapshot", "sys", "tiering", "config"]),
    ("cli", &["snapshot", "sys", "tiering", "config", "backends", "session", "api", "bench", "serve"]),
];

/// The rooms that every other may know: what a snapshot is, and what a process needs from its host.
const GROUND_FLOOR: [&str; 2] = ["snapshot", "sys"];

pub fn sources(folder: &Path) -> Vec<PathBuf> {
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

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rooms that a line of code names: after `crate::`, and at the top of the braces of `use crate::{…}`.
fn rooms_named(text: &str) -> Vec<(usize, String)> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut named = Vec::new();
    for (at, found) in text.match_indices("crate::") {
        let line = text[..at].matches('\n').count() + 1;
        let rest = &text[at + found.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            named.push((line, word(rest)));
            continue;
        };
        let mut depth = 0;
        let mut is_first = true;
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => is_first = true,
                c if depth == 0 && is_first && !c.is_whitespace() => {
                    named.push((line, word(&group[index..])));
                    is_first = false;
                }
                _ => {}
            }
        }
    }
    named
}

#[test]
fn rooms_in_braces_are_seen() {
    let text = "use crate::{devices, snapshot::{self, Chain}};\nlet x = crate::sys::clock();";
    let expected = [(1, "devices"), (1, "snapshot"), (2, "sys")].map(|(line, room)| (line, room.to_string()));
    assert_eq!(rooms_named(text), expected);
}

#[test]
fn imports_point_one_way() {
    let mut wrong = Vec::new();
    for (index, (room, allowed)) in ROOMS.iter().enumerate() {
        for lower in *allowed {
            let is_lower = ROOMS[..index].iter().any(|(other, _)| other == lower);
            assert!(is_lower, "{room} may not import {lower}, which does not stand before it");
        }
        for path in sources(&root().join("src").join(room)) {
            let text = fs::read_to_string(&path).unwrap();
            for (line, target) in rooms_named(&text) {
                let is_room = ROOMS.iter().any(|(other, _)| *other == target);
                if is_room && target != *room && !allowed.contains(&target.as_str()) {
                    wrong.push(format!("{}:{line}: {room} imports {target}", path.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// An arrow that no file uses any more is taken off the list, so that the list is the map.
#[test]
fn every_allowed_arrow_is_used() {
    for (room, allowed) in ROOMS {
        let files = sources(&root().join("src").join(room));
        let named: Vec<String> = files
            .iter()
            .flat_map(|path| rooms_named(&fs::read_to_string(path).unwrap()))
            .map(|(_, target)| target)
            .collect();
        let unused: Vec<&&str> = allowed.iter().filter(|lower| !named.iter().any(|name| name == **lower)).collect();
        assert!(unused.is_empty(), "{room} no longer imports {unused:?}");
    }
}

/// Doors matter more than sizes: fewer than two of five pairs of rooms above the ground floor know each other.
#[test]
fn few_rooms_know_each_other() {
    let is_above = |room: &&&str| !GROUND_FLOOR.contains(room);
    let above = ROOMS.iter().filter(|(room, _)| !GROUND_FLOOR.contains(room)).count();
    let tied: usize = ROOMS.iter().map(|(_, lower)| lower.iter().filter(is_above).count()).sum();
    let pairs = above * (above - 1) / 2;
    assert!(tied * 5 < pairs * 2, "{tied} of {pairs} pairs of rooms are tied");
}

/// No room holds more than its share of the house.
#[test]
fn no_room_is_the_whole_house() {
    let lines = |path: &PathBuf| fs::read_to_string(path).unwrap().lines().count();
    let sizes: Vec<(&str, usize)> = ROOMS
        .iter()
        .map(|(room, _)| (*room, sources(&root().join("src").join(room)).iter().map(lines).sum()))
        .collect();
    let all: usize = sizes.iter().map(|(_, lines)| lines).sum();
    for (room, lines) in sizes {
        assert!(lines * 100 <= all * 18, "{room} has {lines} of {all} lines");
    }
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
        "src/sys/",
        "src/bench/page_fault_handler.rs",
        "src/backends/verbs/",
        "src/devices/virtio/block/",
        "src/memory/guest_ram.rs",
        "src/vmm/machine.rs",
        "src/vmm/state.rs",
        "src/vmm/capture/mod.rs",
        "src/memory/promote/",
        "src/memory/engine.rs",
        "src/memory/against_plan.rs",
        "src/memory/rewind.rs",
        "src/memory/spill/mod.rs",
        "src/memory/trim.rs",
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
/// `std::thread::spawn` and `Scope::spawn` end it at a limit of threads; `Builder` returns an error, `worker::share`
/// does with fewer.
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

/// Returns true if a line of code looks for words in a text: `contains`, `starts_with` or `ends_with`, and a literal
/// with a blank between two words. Markers of protocols and files, such as `"OK "` or `"numa:"`, have no such blank.
fn looks_for_words(code: &str) -> bool {
    ["contains(\"", "starts_with(\"", "ends_with(\""].iter().any(|call| {
        let literals = code.match_indices(call).map(|(at, _)| code[at + call.len()..].split('"').next().unwrap_or(""));
        literals.into_iter().any(|literal| literal.trim().contains(' '))
    })
}

/// Messages are for people: no status and no branch depends on their words. Errors have types, and codes if they cross
/// a process (`config/refusal.rs`).
#[test]
fn nothing_is_decided_by_the_words_of_a_message() {
    assert!(looks_for_words(r#"if text.contains("did not answer") {"#));
    assert!(!looks_for_words(r#"if line.starts_with("OK ") && line.ends_with(")") {"#));
    let mut wrong = Vec::new();
    for path in sources(&root().join("src")) {
        if path.components().any(|part| part.as_os_str().to_string_lossy().contains("tests")) {
            continue;
        }
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.contains("#[cfg(test)]") {
                break;
            }
            if looks_for_words(line.split("//").next().unwrap_or("")) {
                wrong.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The doors of fuzz targets see what is private. They are in no build that is used, and only `fuzzing.rs`, other doors
/// and the declarations of their rooms name them.
#[test]
fn doors_are_closed_but_for_fuzzing() {
    const GATE: &str = "#[cfg(any(test, feature = \"fuzzing\"))]";
    let mut wrong = Vec::new();
    for path in sources(&root().join("src")) {
        let is_door = path.ends_with("doors.rs") || path.ends_with("src/fuzzing.rs");
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (index, line) in lines.iter().enumerate() {
            let declares = line.ends_with("mod doors;") || line.ends_with("mod fuzzing;");
            let is_gated = index > 0 && lines[index - 1] == GATE;
            let names = line.contains("doors::") || line.contains("crate::fuzzing");
            if declares && !is_gated || names && !is_door {
                wrong.push(format!("{}:{}: {line}", path.display(), index + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
