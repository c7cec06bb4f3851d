//! Files form no circles: a reader who begins at the file that names no other meets nothing unknown on the way up.

use std::collections::BTreeMap;
use std::fs;

use super::architecture::{root, sources};
use super::arrows::{Arrows, Module, arrows, module};

/// The text of every module of the library that is a file of its own. `main.rs` is a crate of its own above it.
fn files() -> BTreeMap<Module, String> {
    let source = root().join("src");
    let mut files = BTreeMap::new();
    for path in sources(&source) {
        let inside = path.strip_prefix(&source).unwrap().with_extension("");
        let mut module: Module = inside.iter().map(|name| name.to_str().unwrap().to_string()).collect();
        if module.last().is_some_and(|name| name == "mod") || module == ["lib"] {
            module.pop();
        }
        if module != ["main"] {
            files.insert(module, fs::read_to_string(&path).unwrap());
        }
    }
    files
}

/// The circles among `arrows`: the largest sets of files each of which leads to each other one.
fn circles(arrows: &Arrows) -> Vec<Vec<&Module>> {
    let modules: Vec<&Module> = arrows.keys().collect();
    let next = |module: &Module| arrows[module].keys().filter_map(|to| modules.binary_search(&to).ok()).collect();
    let next: Vec<Vec<usize>> = modules.iter().map(|module| next(module)).collect();
    let reached: Vec<Vec<bool>> = (0..modules.len()).map(|from| reached(&next, from)).collect();
    let mut circles: Vec<Vec<&Module>> = Vec::new();
    for (first, from_first) in reached.iter().enumerate() {
        let is_mutual = |other: &usize| from_first[*other] && reached[*other][first];
        let circle: Vec<usize> = (0..modules.len()).filter(is_mutual).collect();
        // A circle is listed with the first of its files.
        if circle.len() > 1 && circle[0] == first {
            circles.push(circle.into_iter().map(|index| modules[index]).collect());
        }
    }
    circles
}

/// True for every file that the arrows lead to from `from`, by index.
fn reached(next: &[Vec<usize>], from: usize) -> Vec<bool> {
    let mut reached = vec![false; next.len()];
    let mut open = vec![from];
    while let Some(at) = open.pop() {
        for to in &next[at] {
            if !reached[*to] {
                reached[*to] = true;
                open.push(*to);
            }
        }
    }
    reached
}

/// The arrows within a circle, one a line.
fn shown(circle: &[&Module], arrows: &Arrows) -> String {
    let mut lines = vec![format!("{} files are a circle:", circle.len())];
    for from in circle {
        for (to, items) in arrows[*from].iter().filter(|(to, _)| circle.contains(to)) {
            let items: Vec<&str> = items.iter().map(String::as_str).collect();
            lines.push(format!("    {} -> {}: {}", from.join("::"), to.join("::"), items.join(", ")));
        }
    }
    lines.join("\n")
}

#[test]
fn files_form_no_circles() {
    let arrows = arrows(&files());
    let found: Vec<String> = circles(&arrows).iter().map(|circle| shown(circle, &arrows)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn circles_are_found_with_their_arrows() {
    let files = [
        ("", "use a::X;"),
        ("a", "use crate::b::Y;"),
        ("b", "use crate::c::Z; use crate::d::W;"),
        ("c", "use crate::{a::X, d::W};"),
        ("d", "fn f() { crate::e::g() }"),
        ("e", "use super::d::f;"),
    ];
    let arrows = arrows(&files.map(|(path, text)| (module(path), text.to_string())).into());
    let found: Vec<String> = circles(&arrows).iter().map(|circle| shown(circle, &arrows)).collect();
    let expected = [
        "3 files are a circle:\n    a -> b: Y\n    b -> c: Z\n    c -> a: X",
        "2 files are a circle:\n    d -> e: g\n    e -> d: f",
    ];
    assert_eq!(found, expected);
}
