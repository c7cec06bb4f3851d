//! Parses and checks one request: `run <id> <function> <key=value>...`.

use crate::text::Text;

/// Longest request id.
pub const ID_MAX: usize = 32;
const PAIRS_MAX: usize = 16;

/// An error message for the host.
pub type Message = Text<96>;

/// Formats an error message.
#[macro_export]
macro_rules! message {
    ($($arg:tt)*) => { $crate::text::Text::of(format_args!($($arg)*)) };
}

/// A key that a function knows.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub name: &'static str,
    pub required: bool,
}

/// A key that must be given.
pub const fn required(name: &'static str) -> Key {
    Key { name, required: true }
}

/// A key that has a default.
pub const fn optional(name: &'static str) -> Key {
    Key { name, required: false }
}

/// A request whose words are well formed; its keys are not checked against a function yet.
#[derive(Debug)]
pub struct Request<'a> {
    pub id: &'a str,
    pub function: &'a str,
    pub args: Args<'a>,
}

impl<'a> Request<'a> {
    /// Parses a line without control characters. The error carries the id if there is one.
    pub fn parse(line: &'a str) -> Result<Self, (Option<&'a str>, Message)> {
        let mut words = line.split(' ').filter(|w| !w.is_empty());
        match words.next() {
            Some("run") => {}
            Some(other) => {
                return Err((None, message!("unknown command '{}' (expected run)", short(other))));
            }
            None => return Err((None, message!("empty command"))),
        }
        let id = words.next().ok_or((None, message!("run needs an id and a function")))?;
        if !is_id(id) {
            let text = message!("bad id '{}' (up to 32 of A-Z a-z 0-9 _ . -)", short(id));
            return Err((None, text));
        }
        let function = words.next().ok_or((Some(id), message!("run needs a function")))?;
        let args = Args::parse(words).map_err(|e| (Some(id), e))?;
        Ok(Self { id, function, args })
    }

    /// The id in the beginning of a line that is not otherwise readable.
    pub fn id_of(line: &'a str) -> Option<&'a str> {
        let (id, _) = line.strip_prefix("run ")?.trim_start_matches(' ').split_once(' ')?;
        is_id(id).then_some(id)
    }
}

fn is_id(id: &str) -> bool {
    id.len() <= ID_MAX && !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// At most 32 characters of a word of the host's, for a message.
pub fn short(word: &str) -> &str {
    word.get(..32).unwrap_or(word)
}

/// The `key=value` pairs of a request.
#[derive(Debug)]
pub struct Args<'a> {
    pairs: [(&'a str, &'a str); PAIRS_MAX],
    len: usize,
}

impl<'a> Args<'a> {
    fn parse(words: impl Iterator<Item = &'a str>) -> Result<Self, Message> {
        let mut args = Self { pairs: [("", ""); PAIRS_MAX], len: 0 };
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| message!("'{}' is not key=value", short(word)))?;
            if args.get(key).is_some() {
                return Err(message!("key '{}' is given twice", short(key)));
            }
            if args.len == PAIRS_MAX {
                return Err(message!("more than {PAIRS_MAX} keys"));
            }
            args.pairs[args.len] = (key, value);
            args.len += 1;
        }
        Ok(args)
    }

    /// Checks that every key is one of `keys`, and that the required ones are there.
    pub fn check(&self, function: &str, keys: &[Key]) -> Result<(), Message> {
        for (name, _) in &self.pairs[..self.len] {
            if !keys.iter().any(|k| k.name == *name) {
                return Err(message!("{function} has no key '{}'", short(name)));
            }
        }
        match keys.iter().find(|k| k.required && self.get(k.name).is_none()) {
            Some(key) => Err(message!("{function} needs {}=", key.name)),
            None => Ok(()),
        }
    }

    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.pairs[..self.len].iter().find(|p| p.0 == key).map(|p| p.1)
    }

    /// A number, decimal or 0x hexadecimal.
    pub fn number(&self, key: &str) -> Result<Option<u64>, Message> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let parsed = match value.strip_prefix("0x") {
            Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16),
            None if !value.starts_with('+') => value.parse(),
            _ => "".parse(),
        };
        let bad = |_| message!("{key}={} is not a number below 2^64", short(value));
        parsed.map(Some).map_err(bad)
    }

    /// A number within `range`, or `default` when the key is not given.
    pub fn number_in(&self, key: &str, range: core::ops::RangeInclusive<u64>, default: u64) -> Result<u64, Message> {
        let n = self.number(key)?.unwrap_or(default);
        if range.contains(&n) {
            return Ok(n);
        }
        Err(message!("{key}={n} is not in {}..={}", range.start(), range.end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: &[Key] = &[required("pages"), optional("seed")];

    fn error(line: &str) -> (Option<&str>, String) {
        let (id, message) = Request::parse(line).unwrap_err();
        (id, message.as_str().to_string())
    }

    #[test]
    fn good_request_is_taken_apart() {
        let r = Request::parse("run  a.B-9_ fill pages=16 seed=0xff").unwrap();
        assert_eq!((r.id, r.function), ("a.B-9_", "fill"));
        assert_eq!(r.args.number("pages"), Ok(Some(16)));
        assert_eq!(r.args.number("seed"), Ok(Some(255)));
        assert_eq!(r.args.number("none"), Ok(None));
        assert!(r.args.check("fill", KEYS).is_ok());
    }

    #[test]
    fn bad_requests_are_told_apart_and_keep_their_id() {
        assert_eq!(error("   "), (None, "empty command".into()));
        assert_eq!(error("halt").1, "unknown command 'halt' (expected run)");
        assert_eq!(error("run").1, "run needs an id and a function");
        assert_eq!(error("run 7").0, Some("7"));
        assert_eq!(error("run 7 f x"), (Some("7"), "'x' is not key=value".into()));
        assert_eq!(error("run 7 f x=1 x=2"), (Some("7"), "key 'x' is given twice".into()));
        assert_eq!(error(&format!("run {} f", "i".repeat(33))).0, None);
        assert!(error("run a/b f").1.starts_with("bad id 'a/b'"));
        let many: String = (0..17).map(|i| format!(" k{i}=1")).collect();
        assert_eq!(error(&format!("run 7 f{many}")).1, "more than 16 keys");
    }

    #[test]
    fn unknown_and_missing_keys_are_errors() {
        let check = |line| Request::parse(line).unwrap().args.check("fill", KEYS);
        assert_eq!(check("run 1 fill").unwrap_err().as_str(), "fill needs pages=");
        let unknown = check("run 1 fill pages=1 page=2").unwrap_err();
        assert_eq!(unknown.as_str(), "fill has no key 'page'");
        assert!(check("run 1 fill pages=1 =").is_err());
    }

    #[test]
    fn numbers_beyond_u64_signs_and_empties_are_errors() {
        for value in ["18446744073709551616", "-1", "+1", "", "0x", "0x+1", "1e3", "0xg", "0x-1"] {
            let line = format!("run 1 f n={value}");
            assert!(Request::parse(&line).unwrap().args.number("n").is_err(), "{value}");
        }
        let r = Request::parse("run 1 f n=18446744073709551615").unwrap();
        assert_eq!(r.args.number("n"), Ok(Some(u64::MAX)));
        assert!(r.args.number_in("n", 0..=9, 1).is_err());
        assert_eq!(r.args.number_in("m", 0..=9, 1), Ok(1));
    }

    #[test]
    fn id_of_unreadable_lines() {
        assert_eq!(Request::id_of("run a7 fill xxx"), Some("a7"));
        assert_eq!(Request::id_of("run a7"), None);
        assert_eq!(Request::id_of("walk a7 fill"), None);
    }
}
