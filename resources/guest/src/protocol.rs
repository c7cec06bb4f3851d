//! The function protocol: a line in, a line out. README.md has the table.

use crate::clock;
use crate::functions::{self, Ctx};
use tvmm_guest::args::{Message, Request, short};
use tvmm_guest::line::LineReader;
use tvmm_guest::message;
use tvmm_guest::text::Text;

/// Longest answer.
pub type Answer = Text<1024>;

/// Answers a complete line; `None` if it is empty.
pub fn answer(reader: &LineReader, ctx: &mut Ctx) -> Option<Answer> {
    match reader.line() {
        Ok("") => None,
        Ok(line) => Some(run(line, ctx)),
        Err((fault, beginning)) => {
            let id = Request::id_of(beginning);
            Some(error(id, &message!("{}", fault.message())))
        }
    }
}

fn run(line: &str, ctx: &mut Ctx) -> Answer {
    let request = match Request::parse(line) {
        Ok(request) => request,
        Err((id, message)) => return error(id, &message),
    };
    let id = request.id;
    let Some(function) = functions::find(request.function) else {
        let message = message!("unknown function '{}'", short(request.function));
        return error(Some(id), &message);
    };
    if let Err(message) = request.args.check(function.name, function.keys) {
        return error(Some(id), &message);
    }
    let start_ns = clock::now_ns(0);
    let result = (function.run)(&request.args, ctx);
    let us = (clock::now_ns(0) - start_ns) / 1000;
    match result {
        Ok(reply) => {
            let space = if reply.keys.as_str().is_empty() { "" } else { " " };
            let keys = reply.keys;
            Text::of(format_args!("ok {id} {:016x} {us}{space}{keys}\n", reply.digest))
        }
        Err(message) => error(Some(id), &message),
    }
}

fn error(id: Option<&str>, message: &Message) -> Answer {
    Text::of(format_args!("err {} {message}\n", id.unwrap_or("-")))
}
