//! One line in, one line out; the tiny guest's README.md has the grammar.

use std::time::Instant;

use tvmm_guest::args::Request;
use tvmm_guest::line::LineReader;

use crate::functions::{Failure, Functions};

/// Answers a complete line; `None` if it is empty.
pub fn answer(reader: &LineReader, functions: &Functions) -> Option<String> {
    match reader.line() {
        Ok("") => None,
        Ok(line) => Some(run(line, functions)),
        Err((fault, beginning)) => Some(error(Request::id_of(beginning), fault.message())),
    }
}

fn run(line: &str, functions: &Functions) -> String {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err((id, message)) => return error(id, message.as_str()),
    };
    let pairs: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).skip(3).collect();
    let start = Instant::now();
    let result = functions.run(request.function, &pairs);
    let us = start.elapsed().as_micros();
    match result {
        Ok(reply) => {
            let space = if reply.keys.is_empty() { "" } else { " " };
            format!("ok {} {:016x} {us}{space}{}\n", request.id, reply.digest, reply.keys)
        }
        Err(Failure(message)) => error(Some(request.id), &message),
    }
}

fn error(id: Option<&str>, message: &str) -> String {
    format!("err {} {}\n", id.unwrap_or("-"), one_line(message))
}

/// Longest message of an error.
const MESSAGE_MAX: usize = 200;

/// Cuts a message to what the protocol can carry: printable characters, and not too many.
fn one_line(message: &str) -> String {
    let printable = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
    message.chars().take(MESSAGE_MAX).map(printable).collect()
}
