//! The code reads as docs/architecture.md and CONTRIBUTING.md promise: short functions, short lines, sentences with a
//! subject.

use std::fs;
use std::path::{Path, PathBuf};

use super::architecture::{root, sources};
use super::tokens::comments;

const FUNCTION_MAX: usize = 70;
const LINE_MAX: usize = 120;

/// Words that begin a sentence without a subject, and words for people and things that have a name.
const HEADLESS: [&str; 7] = ["What", "Who", "Whoever", "Where", "How", "Whether", "Why"];
const NAMELESS: [&str; 5] = ["somebody", "nobody", "whoever", "everybody", "anybody"];

/// Sentences that read well although they begin so.
const ARGUED: [&str; 0] = [];

fn all_sources() -> Vec<PathBuf> {
    let folders = ["src", "tests", "resources/guest/src", "resources/agent/src"];
    folders.iter().flat_map(|folder| sources(&root().join(folder))).collect()
}

fn shown(path: &Path, line: usize, what: &str) -> String {
    format!("{}:{line}: {what}", path.strip_prefix(root()).unwrap().display())
}

/// The name of the function whose signature begins in `line`, and its indentation.
fn function_in(line: &str) -> Option<(&str, usize)> {
    let mut rest = line.trim_start();
    let indentation = line.len() - rest.len();
    if let Some(public) = rest.strip_prefix("pub") {
        rest = public.strip_prefix('(').map_or(public, |inner| inner.split_once(')').map_or(inner, |(_, rest)| rest));
        rest = rest.trim_start();
    }
    for qualifier in ["const ", "async ", "unsafe ", "extern \"C\" "] {
        rest = rest.strip_prefix(qualifier).unwrap_or(rest);
    }
    let name = rest.strip_prefix("fn ")?;
    let end = name.find(|c: char| !c.is_alphanumeric() && c != '_')?;
    Some((&name[..end], indentation))
}

/// Functions of `text` that are longer than `FUNCTION_MAX`: first line, name, length.
fn long_functions(text: &str) -> Vec<(usize, &str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut long = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let Some((name, indentation)) = function_in(line) else { continue };
        let has_body = lines[first..].iter().find(|line| line.ends_with('{') || line.ends_with(';'));
        if has_body.is_none_or(|line| line.ends_with(';')) {
            continue;
        }
        let length = lines[first..].iter().position(|line| {
            let at = line.len() - line.trim_start().len();
            at == indentation && line[at..].starts_with('}')
        });
        if let Some(length) = length.map(|length| length + 1).filter(|length| *length > FUNCTION_MAX) {
            long.push((first + 1, name, length));
        }
    }
    long
}

#[test]
fn functions_fit_one_screen() {
    let mut long = Vec::new();
    for path in all_sources() {
        let text = fs::read_to_string(&path).unwrap();
        for (line, name, length) in long_functions(&text) {
            long.push(shown(&path, line, &format!("{name} has {length} lines")));
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn long_functions_are_found() {
    let body = "        work();\n".repeat(FUNCTION_MAX);
    let text = format!(
        "impl A {{\n    pub(crate) async fn b(\n        &self,\n    ) {{\n{body}    }}\n    fn c(&self);\n}}\n"
    );
    assert_eq!(long_functions(&text), [(2, "b", FUNCTION_MAX + 4)]);
}

#[test]
fn lines_fit_the_width_with_comments_and_strings() {
    let mut long = Vec::new();
    for path in all_sources() {
        for (index, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let width = line.chars().count();
            if width > LINE_MAX {
                long.push(shown(&path, index + 1, &format!("{width} characters")));
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// The sentences of the comments of a Rust file, each with the line in which it begins. Comments in successive lines
/// are one text; a comment behind code is a text of its own.
fn sentences(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut is_open = false;
    let mut counted = 0;
    let mut index = 0;
    // The line behind a comment that had its line for itself.
    let mut next_line = None;
    for (at, comment) in comments(text) {
        index += text[counted..at].matches('\n').count();
        counted = at;
        let has_code = text[..at].rsplit('\n').next().is_some_and(|before| !before.trim().is_empty());
        is_open &= !has_code && next_line == Some(index);
        next_line = (!has_code).then_some(index + 1);
        let comment = comment.trim_start_matches(['/', '!']).trim();
        let is_item = comment.starts_with(['*', '-', '#', '|']) || comment.is_empty();
        is_open &= !is_item;
        let comment = comment.trim_start_matches(['*', '-', '#', '|', ' ']);
        for part in comment.split_inclusive(". ") {
            match found.last_mut().filter(|_| is_open) {
                Some((_, sentence)) => *sentence += &format!(" {}", part.trim_end()),
                None => found.push((index + 1, part.trim_end().to_string())),
            }
            is_open = !part.trim_end().ends_with(['.', '!', '?', ':']);
        }
    }
    found
}

/// The complaint about a sentence that is not plain.
fn complaint(sentence: &str) -> Option<String> {
    if ARGUED.iter().any(|argued| sentence.starts_with(argued)) {
        return None;
    }
    let is_separator = |c: char| !c.is_alphanumeric() && c != '\'';
    let first = sentence.split(is_separator).find(|word| !word.is_empty())?;
    if HEADLESS.contains(&first) && !sentence.ends_with('?') {
        return Some(format!("begins with {first}: {sentence}"));
    }
    // A word in backquotes is a name: the user `nobody`.
    let mut words = sentence.split('`').step_by(2).flat_map(|prose| prose.split(is_separator));
    words.find(|word| NAMELESS.contains(&word.to_lowercase().as_str())).map(|word| format!("says {word}: {sentence}"))
}

#[test]
fn comments_are_sentences_with_a_subject_that_has_a_name() {
    let mut wrong = Vec::new();
    for path in all_sources() {
        let text = fs::read_to_string(&path).unwrap();
        for (line, sentence) in sentences(&text) {
            wrong.extend(complaint(&sentence).map(|complaint| shown(&path, line, &complaint)));
        }
    }
    assert!(wrong.is_empty(), "{} sentences:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn sentences_without_a_subject_are_found() {
    let text = "/// Returns it. What came of\n/// it. Fine.\nfn a() {} // Whether\n// they\
                \n    // * Where pools live\n\n// nobody\n\n// The user `nobody`.\n";
    let found: Vec<String> = sentences(text).iter().filter_map(|(_, sentence)| complaint(sentence)).collect();
    let expected = [
        "begins with What: What came of it.",
        "begins with Whether: Whether",
        "begins with Where: Where pools live",
        "says nobody: nobody",
    ];
    assert_eq!(found, expected);
}
