//! `json`: parse a document and print it with four blanks of indentation, as FunctionBench's `json_dumps_loads`.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write;

use serde_json::Value;

use super::random::Random;
use crate::args::Message;
use crate::message;

/// Bytes of the inputs of FaaSnap's `test-2inputs.json`.
pub const BYTES_A: u64 = 12_629;
pub const BYTES_B: u64 = 151_318;
/// No shorter document is made.
pub const BYTES_MIN: u64 = 1000;

const WORDS: &[&str] = &[
    "amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island", "juniper", "kettle", "lagoon",
    "meadow", "nimbus", "orchard", "prairie", "quarry", "ridge", "summit", "timber", "upland", "valley", "willow",
    "yonder", "zephyr", "anchor", "beacon", "cobalt", "drift", "estuary",
];

/// A document of exactly `bytes` bytes, at least [`BYTES_MIN`]: an array of records.
pub fn document(bytes: u64, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let bytes = bytes.max(BYTES_MIN) as usize;
    let mut text = String::from("{\"records\":[");
    let mut id = 0;
    loop {
        let before = text.len();
        if id > 0 {
            text.push(',');
        }
        record(&mut text, id, &mut random);
        if text.len() + END.len() > bytes {
            text.truncate(before);
            break;
        }
        id += 1;
    }
    text.push_str("],\"rest\":\"");
    while text.len() + 2 < bytes {
        text.push(char::from(b'a' + random.below(26) as u8));
    }
    text.push_str("\"}");
    text.into_bytes()
}

const END: &str = "],\"rest\":\"\"}";

fn record(text: &mut String, id: u64, random: &mut Random) {
    let mut word = || *random.pick(WORDS);
    let (first, last, city, street) = (word(), word(), word(), word());
    let tags = [word(), word(), word()];
    let (score, cents) = (random.below(1000), random.below(1000));
    let (lat, lon) = (random.below(180_000) as i64 - 90_000, random.below(360_000) as i64 - 180_000);
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "{{\"id\":{id},\"name\":\"{first} {last}\",\"mail\":\"{first}.{last}{id}@example.org\",\
         \"score\":{score}.{cents:03},\
         \"active\":{},\"address\":{{\"street\":\"{} {street} road\",\"city\":\"{city}\",\"geo\":[{}.{:03},{}.{:03}]}},\
         \"tags\":[\"{}\",\"{}\",\"{}\"],\"note\":null}}",
        score % 2 == 0,
        1 + score % 200,
        lat / 1000,
        lat.abs() % 1000,
        lon / 1000,
        lon.abs() % 1000,
        tags[0],
        tags[1],
        tags[2],
    );
}

/// The document, parsed and printed again.
pub fn pretty(document: &[u8]) -> Result<Vec<u8>, Message> {
    let value: Value = serde_json::from_slice(document).map_err(|error| message!("json: {error}"))?;
    let mut out = String::new();
    print(&value, 1, &mut out);
    Ok(out.into_bytes())
}

/// As Python's `json.dumps(value, indent=4)`. The parser has limited how deep it goes.
fn print(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                new_line(index > 0, depth, out);
                print(item, depth + 1, out);
            }
            new_line(false, depth - 1, out);
            out.push(']');
        }
        Value::Object(members) if !members.is_empty() => {
            out.push('{');
            for (index, (key, item)) in members.iter().enumerate() {
                new_line(index > 0, depth, out);
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push_str(": ");
                print(item, depth + 1, out);
            }
            new_line(false, depth - 1, out);
            out.push('}');
        }
        // Numbers, strings with their escapes, and empty lists and objects.
        other => out.push_str(&other.to_string()),
    }
}

fn new_line(comma: bool, depth: usize, out: &mut String) {
    out.push_str(if comma { ",\n" } else { "\n" });
    (0..depth).for_each(|_| out.push_str("    "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_has_the_asked_length_and_is_valid_at_any() {
        for bytes in [1000, 1001, 1234, BYTES_A, BYTES_B] {
            let document = document(bytes, bytes);
            assert_eq!(document.len() as u64, bytes);
            let value: Value = serde_json::from_slice(&document).unwrap();
            assert!(value["records"].as_array().is_some_and(|records| !records.is_empty()));
        }
        assert_ne!(document(5000, 1), document(5000, 2));
    }

    #[test]
    fn pretty_printed_document_means_the_same() {
        let document = document(20_000, 3);
        let printed = pretty(&document).unwrap();
        assert!(printed.len() > document.len());
        let (before, after): (Value, Value) =
            (serde_json::from_slice(&document).unwrap(), serde_json::from_slice(&printed).unwrap());
        assert_eq!(before, after);
    }

    #[test]
    fn pretty_prints_as_python_does() {
        let printed = pretty(br#"{"b": [1, 2.5, {}], "a": "x\ny"}"#).unwrap();
        let expected = "{\n    \"a\": \"x\\ny\",\n    \"b\": [\n        1,\n        2.5,\n        {}\n    ]\n}";
        assert_eq!(String::from_utf8(printed).unwrap(), expected);
        assert!(pretty(b"{\"a\":").is_err());
    }
}
