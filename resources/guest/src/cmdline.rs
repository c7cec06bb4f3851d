//! Boot parameters. As in Linux, unknown words are ignored and the last one wins.

use crate::text::Text;

/// Size of the mapping granules of the identity map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageTables {
    TwoMib,
    FourKib,
}

impl PageTables {
    pub fn name(self) -> &'static str {
        match self {
            Self::TwoMib => "2m",
            Self::FourKib => "4k",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// `pt=2m|4k`
    pub page_tables: PageTables,
    /// `init_on_free=0|1` (also on, off, y, n: Linux's kstrtobool)
    pub init_on_free: bool,
}

impl Config {
    pub const DEFAULT: Self = Self { page_tables: PageTables::TwoMib, init_on_free: false };

    /// Parses a command line; the error names the parameter and its bad value.
    pub fn parse(line: &[u8]) -> Result<Self, Text<96>> {
        let mut config = Self::DEFAULT;
        for word in line.split(u8::is_ascii_whitespace) {
            let at = word.iter().position(|&b| b == b'=').unwrap_or(word.len());
            let value = word.get(at + 1..).unwrap_or_default();
            match (&word[..at], value) {
                (b"pt", b"2m") => config.page_tables = PageTables::TwoMib,
                (b"pt", b"4k") => config.page_tables = PageTables::FourKib,
                (b"pt", _) => return Err(bad("pt", value, "2m or 4k")),
                (b"init_on_free", b"1" | b"on" | b"y") => config.init_on_free = true,
                (b"init_on_free", b"0" | b"off" | b"n") => config.init_on_free = false,
                (b"init_on_free", _) => return Err(bad("init_on_free", value, "0 or 1")),
                _ => {}
            }
        }
        Ok(config)
    }
}

fn bad(name: &str, value: &[u8], expected: &str) -> Text<96> {
    let shown = &value[..value.len().min(32)];
    Text::of(format_args!("boot parameter {name}={} is not {expected}", shown.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_parameters_are_ignored() {
        let config = Config::parse(b"console=ttyS0 reboot=k panic=1 pci=off nomodules x= =y pt2=1");
        assert_eq!(config, Ok(Config::DEFAULT));
        assert_eq!(Config::parse(b""), Ok(Config::DEFAULT));
    }

    #[test]
    fn known_parameters_are_set_and_the_last_one_wins() {
        let config = Config::parse(b" pt=4k  init_on_free=1\tpt=2m pt=4k").unwrap();
        assert_eq!(config.page_tables, PageTables::FourKib);
        assert!(config.init_on_free);
    }

    #[test]
    fn bad_value_of_a_known_parameter_is_an_error() {
        let message = Config::parse(b"pt=8k").unwrap_err();
        assert_eq!(message.as_str(), "boot parameter pt=8k is not 2m or 4k");
        for line in [&b"pt"[..], b"pt=", b"init_on_free=2", b"init_on_free", b"pt=\xff\x01"] {
            assert!(Config::parse(line).is_err(), "{line:?}");
        }
    }
}
