//! Small shapes that hide names: each room may have as many as it has now, and no more.

use std::fs;

use super::architecture::{root, sources};
use super::tokens::tokens;

/// The most of each shape that a folder may have.
struct Ceiling {
    folder: &'static str,
    /// Statements `let (a, b) = (x, y);`: two statements say the same.
    pairs: usize,
    /// A `match` on a bool: `if` says the same.
    bools: usize,
}

const fn ceiling(folder: &'static str, pairs: usize, bools: usize) -> Ceiling {
    Ceiling { folder, pairs, bools }
}

const CEILINGS: [Ceiling; 16] = [
    ceiling("src/api", 0, 0),
    ceiling("src/backends", 1, 0),
    ceiling("src/bench", 0, 0),
    ceiling("src/cli", 0, 0),
    ceiling("src/config", 0, 0),
    ceiling("src/devices", 0, 0),
    ceiling("src/memory", 2, 0),
    ceiling("src/serve", 0, 0),
    ceiling("src/session", 0, 0),
    ceiling("src/snapshot", 1, 0),
    ceiling("src/sys", 1, 0),
    ceiling("src/tiering", 1, 0),
    ceiling("src/vmm", 0, 0),
    ceiling("tests", 6, 2),
    ceiling("resources/guest/src", 58, 6),
    ceiling("resources/agent/src", 1, 0),
];

/// The number of statements `let (a, b) = (x, y);` in `code`.
fn pairs(code: &[&str]) -> usize {
    let is_pair = |at: usize| {
        let behind = code[at..].strip_prefix(&["let"])?;
        let behind = tuple(behind)?.strip_prefix(&["="])?;
        tuple(behind)?.strip_prefix(&[";"])
    };
    (0..code.len()).filter(|at| is_pair(*at).is_some()).count()
}

/// Returns the tokens behind the tuple at the start of `code`, if one is there.
fn tuple<'a, 'b>(code: &'a [&'b str]) -> Option<&'a [&'b str]> {
    code.strip_prefix(&["("])?;
    let mut depth = 0;
    let mut has_comma = false;
    for (at, token) in code.iter().enumerate() {
        match *token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            "," => has_comma |= depth == 1,
            _ => {}
        }
        if depth == 0 {
            return has_comma.then_some(&code[at + 1..]);
        }
    }
    None
}

/// The number of `match`es in `code` whose first arm is `true` or `false`.
fn bools(code: &[&str]) -> usize {
    let is_arm = |window: &&[&str]| {
        window[0] == "{" && ["true", "false"].contains(&window[1]) && window[2] == "=" && window[3] == ">"
    };
    code.windows(4).filter(is_arm).count()
}

#[test]
fn rooms_have_no_more_small_shapes_than_they_had() {
    let mut wrong = Vec::new();
    for Ceiling { folder, pairs: most_pairs, bools: most_bools } in CEILINGS {
        let texts: Vec<String> =
            sources(&root().join(folder)).iter().map(|path| fs::read_to_string(path).unwrap()).collect();
        let count = |count: fn(&[&str]) -> usize| texts.iter().map(|text| count(&tokens(text))).sum::<usize>();
        let has_pairs = count(pairs);
        let has_bools = count(bools);
        if has_pairs > most_pairs || has_bools > most_bools {
            wrong.push(format!("    ceiling(\"{folder}\", {has_pairs}, {has_bools}),"));
        }
    }
    assert!(
        wrong.is_empty(),
        "Write two statements, or `if`; these have more than their ceilings:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn small_shapes_are_found() {
    let code = "let (a, mut b) = (f(1, 2), [3]); let (c, d) = both(); let (e, g) = (h(), i()).into(); let (j) = (k);
        let (Some(l), m) = (n, o) else { return }; let ((p, q), r) = (s, t);";
    assert_eq!(pairs(&tokens(code)), 2);
    let code = "match a { true => 1, false => 2 } match b { Some(true) => 3, _ => 4 } match (c, d) { _ if e => true }
        match f { false => 5, true => { true } }";
    assert_eq!(bools(&tokens(code)), 2);
}
