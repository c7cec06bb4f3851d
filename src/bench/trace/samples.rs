//! Times of actions: how long each took, and how much of that was work.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The time of an action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Work {
    /// From its begin to its end.
    pub(super) ms: f64,
    /// The part of it that one CPU worked. For the rest it waited: for a disk, or for other programs.
    pub(super) cpu_ms: f64,
}

impl Work {
    /// A part of the work.
    pub(super) fn part(self, part: f64) -> Work {
        Work { ms: self.ms * part, cpu_ms: self.cpu_ms * part }
    }

    /// The work without that of `other`, which is part of it.
    pub(super) fn without(self, other: Work) -> Work {
        let cpu_ms = (self.cpu_ms - other.cpu_ms).max(0.0);
        Work { ms: (self.ms - other.ms).max(cpu_ms), cpu_ms }
    }

    /// Work of which a part is that of `other`, and the rest its own.
    pub(super) fn towards(self, other: Work, part: f64) -> Work {
        self.part(1.0 - part) + other.part(part)
    }
}

impl std::ops::Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work { ms: self.ms + other.ms, cpu_ms: self.cpu_ms + other.cpu_ms }
    }
}

/// The times of an action that was measured more than once, the shortest first; at least one.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub(super) struct Samples(Vec<Work>);

impl Samples {
    /// `None`: there are no times.
    pub(super) fn of(mut times: Vec<Work>) -> Option<Samples> {
        times.sort_by(|one, other| one.ms.total_cmp(&other.ms));
        (!times.is_empty()).then_some(Samples(times))
    }

    /// The time which a share of all is shorter than; `share`: from 0 up to, but not including, 1.
    pub(super) fn at(&self, share: f64) -> Work {
        let last = self.0.len().saturating_sub(1);
        let index = (share * self.0.len() as f64) as usize;
        self.0.get(index.min(last)).copied().unwrap_or_default()
    }

    /// Gives each time the mean of the parts that were work: CPU time of processes which have ended is counted in
    /// coarse ticks.
    pub(super) fn with_even_work(self) -> Samples {
        let sum = |number: fn(&Work) -> f64| self.0.iter().map(number).sum::<f64>();
        let all_ms = sum(|work| work.ms);
        let part = if all_ms > 0.0 { sum(|work| work.cpu_ms) / all_ms } else { 0.0 };
        Samples(self.0.iter().map(|work| Work { cpu_ms: work.ms * part.min(1.0), ..*work }).collect())
    }

    /// # Errors
    /// These are no times; the error has no subject.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.0.is_empty() {
            return Err("has no times".to_string());
        }
        for work in &self.0 {
            for (name, number) in [("ms", work.ms), ("cpu_ms", work.cpu_ms)] {
                if !number.is_finite() || number < 0.0 {
                    return Err(format!("has a time whose `{name}` is {number}, not a number from 0 on"));
                }
            }
        }
        if !self.0.is_sorted_by(|one, other| one.ms <= other.ms) {
            return Err("has times that are not in order, the shortest first".to_string());
        }
        Ok(())
    }
}

/// One time stands for a list of one: costs of version 2 have such.
impl<'de> Deserialize<'de> for Samples {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Samples, D::Error> {
        struct OneOrMore;
        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Samples;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a time with `ms` and `cpu_ms`, or a list of such")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Samples, A::Error> {
                Ok(Samples(vec![Work::deserialize(MapAccessDeserializer::new(map))?]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Samples, A::Error> {
                Ok(Samples(Vec::deserialize(SeqAccessDeserializer::new(list))?))
            }
        }
        deserializer.deserialize_any(OneOrMore)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(ms: f64, cpu_ms: f64) -> Work {
        Work { ms, cpu_ms }
    }

    #[test]
    fn a_share_picks_one_of_the_times() {
        let times = Samples::of(vec![work(4.0, 1.0), work(2.0, 2.0), work(3.0, 1.0), work(9.0, 1.0)]).unwrap();
        let at = |share: f64| times.at(share).ms;
        assert_eq!([0.0, 0.24, 0.25, 0.5, 0.74, 0.75, 0.999].map(at), [2.0, 2.0, 3.0, 4.0, 4.0, 9.0, 9.0]);
        assert_eq!(at(1.0), 9.0);
        assert_eq!(Samples::of(Vec::new()), None);
        let even = Samples::of(vec![work(10.0, 10.0), work(30.0, 0.0)]).unwrap().with_even_work();
        assert_eq!([0.0, 0.5].map(|share| even.at(share)), [work(10.0, 2.5), work(30.0, 7.5)]);
    }

    #[test]
    fn a_list_and_one_time_are_read_and_others_refused() {
        let read = serde_json::from_str::<Samples>;
        let one = read(r#"{"ms": 2, "cpu_ms": 1}"#).unwrap();
        assert_eq!(one, Samples::of(vec![work(2.0, 1.0)]).unwrap());
        let text = r#"[{"ms":2.0,"cpu_ms":1.0},{"ms":3.0,"cpu_ms":1.0}]"#;
        assert_eq!(serde_json::to_string(&read(text).unwrap()).unwrap(), text);
        assert!(read(text).unwrap().check().is_ok());
        for (text, said) in [
            ("[]", "no times"),
            (r#"[{"ms":3,"cpu_ms":1},{"ms":2,"cpu_ms":1}]"#, "not in order"),
            (r#"{"ms":3,"cpu_ms":-1}"#, "`cpu_ms` is -1"),
        ] {
            let problem = read(text).unwrap().check().unwrap_err();
            assert!(problem.contains(said), "{problem}");
        }
        assert!(read("7").unwrap_err().to_string().contains("`ms` and `cpu_ms`, or a list"));
        assert!(read(r#"{"ms":3,"cpu_ms":1,"x":1}"#).unwrap_err().to_string().contains("unknown field `x`"));
    }
}
