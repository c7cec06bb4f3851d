//! Source text to words.

use alloc::vec::Vec;

use crate::args::Message;
use crate::message;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word<'a> {
    Number(i64),
    Name(&'a str),
    /// One or two characters.
    Sign(&'a str),
}

/// The words of `source`; `#` begins a comment.
pub(super) fn words(source: &str) -> Result<Vec<Word<'_>>, Message> {
    let mut words = Vec::new();
    let mut rest = source.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            c if c.is_ascii_alphanumeric() || c == '_' => {
                rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len())
            }
            _ if ["<<", ">>", "=="].iter().any(|sign| rest.starts_with(sign)) => 2,
            c if c.is_ascii_punctuation() => 1,
            c => return Err(message!("program: bad character {}", c.escape_unicode())),
        };
        let (word, after) = rest.split_at(end);
        match first {
            '#' => {}
            '0'..='9' => words.push(Word::Number(word.parse().map_err(|_| message!("program: {word} is no number"))?)),
            c if c.is_ascii_alphabetic() || c == '_' => words.push(Word::Name(word)),
            _ => words.push(Word::Sign(word)),
        }
        rest = after.trim_start();
    }
    Ok(words)
}
