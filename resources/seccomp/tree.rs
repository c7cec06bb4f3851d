//! Compiles a filter in JSON to a program that finds the rules of a call by binary search.
//!
//! seccompiler compares the number of a call with one rule after the other. When a program is installed, the kernel runs
//! it for each system call there is, to note those that are always allowed: 100 rules in a row take 350 µs, a tree 75 µs.
//! Each rule is compiled by seccompiler; only the search among them is made here.

use std::collections::BTreeMap;

use seccompiler::{TargetArch, compile_from_json, sock_filter};
use serde_json::{Value, json};

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
/// Offset of the number of the call in `struct seccomp_data`, and of the architecture (seccomp(2)).
const CALL: u32 = 0;
const ARCHITECTURE: u32 = 4;
const X86_64: u32 = 0xc000_003e;
const KILL_PROCESS: u32 = 0x8000_0000;

/// Calls in a row that have the same rules.
struct Calls {
    first: u32,
    last: u32,
    /// Decides on a call of these numbers, with its number in the accumulator.
    program: Vec<sock_filter>,
}

fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Compiles one filter: an object with `mismatch_action`, `match_action` and `filter`.
pub fn compile(filter: &Value) -> Result<Vec<sock_filter>, String> {
    let rules = filter["filter"].as_array().ok_or("it has no list `filter`")?;
    let mut by_call: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for rule in rules {
        by_call.entry(rule["syscall"].as_str().ok_or("a rule has no `syscall`")?).or_default().push(rule);
    }
    let mut calls = Vec::new();
    let mut otherwise = None;
    for rules in by_call.into_values() {
        let (number, program, mismatch) = compile_one(filter, &rules)?;
        calls.push(Calls { first: number, last: number, program });
        otherwise = Some(mismatch);
    }
    let otherwise = otherwise.ok_or("it has no rules")?;
    calls.sort_by_key(|calls| calls.first);
    calls.dedup_by(|next, before| {
        let joins = next.first == before.last + 1 && next.program.len() == 1 && next.program == before.program;
        if joins {
            before.last = next.last;
        }
        joins
    });
    let mut program = vec![
        step(LOAD, 0, 0, ARCHITECTURE),
        step(IF_EQUAL, 1, 0, X86_64),
        step(RETURN, 0, 0, KILL_PROCESS),
        step(LOAD, 0, 0, CALL),
    ];
    program.extend(search(&calls, &otherwise));
    Ok(program)
}

/// Compiles the rules of one call. Returns its number, the program that decides on it, and the last step of a program
/// for calls without rules.
fn compile_one(filter: &Value, rules: &[&Value]) -> Result<(u32, Vec<sock_filter>, sock_filter), String> {
    let mut one = filter.clone();
    one["filter"] = json!(rules);
    let text = json!({ "one": one }).to_string();
    let mut compiled = compile_from_json(text.as_bytes(), TargetArch::x86_64).map_err(|error| error.to_string())?;
    let program = compiled.remove("one").unwrap_or_default();
    // The check of the architecture, the load of the call's number, and the comparison with it.
    let [_, _, _, load, compare, rest @ ..] = &program[..] else { return Err("its program is too short".into()) };
    let otherwise = program.last().cloned().ok_or("its program is empty")?;
    if *load != step(LOAD, 0, 0, CALL) || compare.code != IF_EQUAL || otherwise.code != RETURN {
        return Err("seccompiler makes programs of another shape".into());
    }
    // Rules without arguments: two jumps to a `RETURN`.
    let program = match rest {
        [first, _, matched, ..] if first.code == JUMP && rules.iter().all(|rule| rule["args"].is_null()) => {
            vec![matched.clone()]
        }
        rest => rest.to_vec(),
    };
    Ok((compare.k, program, otherwise))
}

/// A program that finds the number of a call, in the accumulator, among `calls`.
fn search(calls: &[Calls], otherwise: &sock_filter) -> Vec<sock_filter> {
    if let [only] = calls {
        let mut program = if only.first == only.last {
            vec![step(IF_EQUAL, 1, 0, only.first)]
        } else {
            vec![step(IF_AT_LEAST, 0, 1, only.first), step(IF_GREATER, 0, 1, only.last)]
        };
        program.push(otherwise.clone());
        program.extend(only.program.iter().cloned());
        return program;
    }
    let (lower, upper) = calls.split_at(calls.len() / 2);
    let first = upper[0].first;
    let below = search(lower, otherwise);
    let mut program = match u8::try_from(below.len()) {
        Ok(len) => vec![step(IF_AT_LEAST, len, 0, first)],
        Err(_) => vec![step(IF_AT_LEAST, 0, 1, first), step(JUMP, 0, 0, below.len() as u32)],
    };
    program.extend(below);
    program.extend(search(upper, otherwise));
    program
}
