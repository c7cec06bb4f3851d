//! Arrival traces in files: tvmm's own, and the two that Microsoft has published of Azure Functions.
//!
//! The first line tells the shape. Lines are read one by one; of each request only its moment and function are kept.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::arrivals::{Collector, Part, Trace};
use super::random::Random;
use crate::sys::errors::{BoxError, refuse};

/// The longest line. A line of the trace of 2019 has 1,440 counts.
const MAX_LINE: usize = 64 << 10;
/// Minutes of a day, which a line of the trace of 2019 has counts of.
const MINUTES: usize = 1440;
const MINUTE_US: u64 = 60_000_000;
/// The latest moment: ten years.
const MAX_S: f64 = 3.2e8;

/// The shape of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// `time_s,function`, in the order of time.
    Own,
    /// `HashOwner,HashApp,HashFunction,Trigger,1,…,1440`: requests a minute.
    Azure2019,
    /// `app,func,end_timestamp,duration`.
    Azure2021,
}

impl Shape {
    fn of(header: &str) -> Option<Shape> {
        let fields: Vec<&str> = header.split(',').map(str::trim).collect();
        match fields.as_slice() {
            ["time_s", "function"] => Some(Shape::Own),
            ["app", "func", "end_timestamp", "duration"] => Some(Shape::Azure2021),
            ["HashOwner", "HashApp", "HashFunction", "Trigger", minutes @ ..]
                if minutes.len() == MINUTES && minutes.iter().zip(1..).all(|(field, n)| **field == format!("{n}")) =>
            {
                Some(Shape::Azure2019)
            }
            _ => None,
        }
    }
}

/// A trace of 2021 is in the order of the ends; its starts are known when all lines are read.
struct Started {
    start_us: i64,
    function: Option<u32>,
}

/// Reads a trace line by line.
struct Reader {
    shape: Shape,
    collector: Collector,
    /// The moment of the line before, of tvmm's own shape.
    last_s: f64,
    /// The function of the last line of the trace of 2019, for its random moments.
    rows: u64,
    seed: u64,
    started: Vec<Started>,
}

/// Reads the arrivals of a file. `seed` places the requests of a minute, where the trace has only their number.
///
/// # Errors
/// The file cannot be read, or a line is not of the shape that the first line names; the error has the line's number.
pub(super) fn read(path: &Path, part: Part, seed: u64) -> Result<Trace, BoxError> {
    let named = |line: usize, problem: String| format!("Cannot use {}, line {line}: {problem}", path.display());
    let file = File::open(path).map_err(|error| format!("Cannot open {}: {error}", path.display()))?;
    let mut lines = Lines { reader: BufReader::with_capacity(1 << 20, file), line: Vec::new(), number: 0 };
    let header = lines.next().map_err(|problem| named(1, problem))?.unwrap_or_default();
    let Some(shape) = Shape::of(header) else {
        let known = "it is not `time_s,function`, not `app,func,end_timestamp,duration` (Azure Functions 2021), and \
                     not `HashOwner,HashApp,HashFunction,Trigger,1,…,1440` (Azure Functions 2019). Give the file its \
                     header";
        return refuse(named(1, known.to_string()));
    };
    let mut reader = Reader { shape, collector: Collector::new(part), last_s: 0.0, rows: 0, seed, started: Vec::new() };
    loop {
        let number = lines.number + 1;
        let Some(line) = lines.next().map_err(|problem| named(number, problem))? else { break };
        if line.is_empty() {
            continue;
        }
        reader.take(line).map_err(|error| named(number, error.to_string()))?;
    }
    let trace = reader.finish().map_err(|error| format!("Cannot use {}: {error}", path.display()))?;
    Ok(trace)
}

/// The lines of a file, with a limit on their length.
struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
    number: usize,
}

impl Lines {
    /// The next line without its end; `None` at the end of the file.
    fn next(&mut self) -> Result<Option<&str>, String> {
        self.line.clear();
        self.number += 1;
        let mut limited = std::io::Read::take(&mut self.reader, MAX_LINE as u64 + 1);
        let read = limited.read_until(b'\n', &mut self.line).map_err(|error| error.to_string())?;
        if read > MAX_LINE {
            return Err(format!("it has more than {MAX_LINE} bytes"));
        }
        if read == 0 {
            return Ok(None);
        }
        let text = std::str::from_utf8(&self.line).map_err(|_| "it is not UTF-8".to_string())?;
        Ok(Some(text.trim_end_matches(['\n', '\r'])))
    }
}

impl Reader {
    fn take(&mut self, line: &str) -> Result<(), BoxError> {
        match self.shape {
            Shape::Own => self.own(line),
            Shape::Azure2019 => self.minutes(line),
            Shape::Azure2021 => self.ended(line),
        }
    }

    fn own(&mut self, line: &str) -> Result<(), BoxError> {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let &[time, name] = fields.as_slice() else {
            return refuse(format!("it has {} fields, not `time_s,function`", fields.len()));
        };
        let at_s = seconds("time_s", time)?;
        if at_s < self.last_s {
            return refuse(format!("time {at_s} comes after {}: sort the file by time", self.last_s));
        }
        if name.is_empty() {
            return refuse("it names no function");
        }
        self.last_s = at_s;
        let function = self.collector.function(name);
        self.collector.add((at_s * 1e6) as u64, function)
    }

    /// A function's requests in each minute of a day. They are spread over the minute at random.
    fn minutes(&mut self, line: &str) -> Result<(), BoxError> {
        let mut fields = line.split(',').map(str::trim);
        let ids: Vec<&str> = fields.by_ref().take(4).collect();
        let &[owner, app, function, _] = ids.as_slice() else {
            return refuse("it has fewer than the four fields that name a function");
        };
        if owner.is_empty() || app.is_empty() || function.is_empty() {
            return refuse("it names no function");
        }
        let function = self.collector.function(&format!("{owner}/{app}/{function}"));
        let mut random = Random::new(self.seed, self.rows);
        self.rows += 1;
        let mut minute = 0;
        for field in fields {
            if minute == MINUTES {
                return refuse(format!("it has more than {MINUTES} counts"));
            }
            let count: u32 =
                field.parse().map_err(|_| format!("`{field}` is no number of requests (minute {})", minute + 1))?;
            let start_us = minute as u64 * MINUTE_US;
            minute += 1;
            if self.collector.leaves_out(start_us, function) {
                self.collector.leave_out(count.into());
                continue;
            }
            for _ in 0..count {
                let within = (random.unit() * MINUTE_US as f64) as u64;
                self.collector.add(start_us + within, function)?;
            }
        }
        if minute < MINUTES {
            return refuse(format!("it has {minute} counts, not {MINUTES}"));
        }
        Ok(())
    }

    fn ended(&mut self, line: &str) -> Result<(), BoxError> {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let &[app, func, end, duration] = fields.as_slice() else {
            return refuse(format!("it has {} fields, not `app,func,end_timestamp,duration`", fields.len()));
        };
        if app.is_empty() || func.is_empty() {
            return refuse("it names no function");
        }
        let start_s = seconds("end_timestamp", end)? - seconds("duration", duration)?;
        let function = self.collector.function(&format!("{app}/{func}"));
        self.started.push(Started { start_us: (start_s * 1e6) as i64, function });
        Ok(())
    }

    fn finish(mut self) -> Result<Trace, BoxError> {
        match self.shape {
            Shape::Own => {}
            Shape::Azure2019 => {
                let note = "Azure Functions 2019: requests are spread over their minutes at random; times of execution \
                            are those of --workloads";
                self.collector.note(note.to_string());
            }
            Shape::Azure2021 => {
                let note = "Azure Functions 2021: sorted by the start, end_timestamp - duration; times of execution \
                            are those of --workloads";
                self.collector.note(note.to_string());
                let earliest = self.started.iter().map(|started| started.start_us).min().unwrap_or_default();
                // An invocation that began before the trace has a negative start.
                let shift = earliest.min(0);
                for Started { start_us, function } in self.started {
                    self.collector.add((start_us - shift) as u64, function)?;
                }
            }
        }
        self.collector.finish()
    }
}

fn seconds(name: &str, text: &str) -> Result<f64, BoxError> {
    let number = text.parse().ok().filter(|number: &f64| (0.0..=MAX_S).contains(number));
    number.ok_or_else(|| format!("`{name}` is `{text}`, not a number of seconds from 0 to {MAX_S}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, part: Part) -> Result<Trace, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.csv");
        std::fs::write(&path, text).unwrap();
        read(&path, part, 1).map_err(|error| error.to_string().replace(&path.display().to_string(), "F"))
    }

    fn seen(trace: &Trace) -> Vec<(u64, &str)> {
        let one = |arrival: &super::super::arrivals::Arrival| {
            (arrival.at_us, trace.functions[arrival.function as usize].as_str())
        };
        trace.arrivals.iter().map(one).collect()
    }

    /// A line of the trace of 2019 with requests in some minutes, counted from 1.
    fn day(function: &str, counts: &[(usize, u32)]) -> String {
        let mut all = vec![0; MINUTES];
        for (minute, count) in counts {
            all[minute - 1] = *count;
        }
        let all: Vec<String> = all.iter().map(u32::to_string).collect();
        format!("o,a,{function},http,{}\n", all.join(","))
    }

    fn header_2019() -> String {
        let minutes: Vec<String> = (1..=MINUTES).map(|minute| minute.to_string()).collect();
        format!("HashOwner,HashApp,HashFunction,Trigger,{}\n", minutes.join(","))
    }

    #[test]
    fn own_shape_is_read_and_cut() {
        let text = "time_s,function\n0.5,a\n0.5,b\r\n\n2,a\n";
        let trace = read_text(text, Part::default()).unwrap();
        assert_eq!(seen(&trace), [(500_000, "a"), (500_000, "b"), (2_000_000, "a")]);
        assert_eq!(trace.length_us, 2_000_001);
        let trace = read_text(text, Part { until_us: Some(1_000_000), functions: Some(1) }).unwrap();
        assert_eq!(seen(&trace), [(500_000, "a")]);
        assert_eq!(trace.length_us, 1_000_000);
        assert_eq!(trace.notes, ["2 requests of the trace are beyond --duration or --functions"]);
    }

    #[test]
    fn azure_2021_is_sorted_by_the_start() {
        let text = "app,func,end_timestamp,duration\nA,f,1.0,0.25\nA,g,1.5,1.75\nB,f,2,0\n";
        let trace = read_text(text, Part::default()).unwrap();
        assert_eq!(seen(&trace), [(0, "A/g"), (1_000_000, "A/f"), (2_250_000, "B/f")]);
        assert!(trace.notes[0].contains("sorted by the start"));
    }

    #[test]
    fn azure_2019_is_spread_over_its_minutes() {
        let text = format!("{}{}{}", header_2019(), day("f", &[(1, 2), (1440, 1)]), day("g", &[(2, 3)]));
        let trace = read_text(&text, Part::default()).unwrap();
        let minutes: Vec<(u64, &str)> = seen(&trace).into_iter().map(|(at, name)| (at / MINUTE_US, name)).collect();
        assert_eq!(minutes, [(0, "o/a/f"), (0, "o/a/f"), (1, "o/a/g"), (1, "o/a/g"), (1, "o/a/g"), (1439, "o/a/f")]);
        assert_eq!(trace, read_text(&text, Part::default()).unwrap());
    }

    #[test]
    fn requests_that_are_left_out_take_no_time_however_many_they_are() {
        let most = u32::MAX;
        let text = format!("{}{}{}", header_2019(), day("f", &[(1, 2), (2, most)]), day("g", &[(1, most), (2, most)]));
        let trace = read_text(&text, Part { until_us: Some(MINUTE_US), functions: Some(1) }).unwrap();
        assert_eq!(trace.arrivals.len(), 2);
        let note = format!("{} requests of the trace are beyond --duration or --functions", 3 * u64::from(most));
        assert!(trace.notes.contains(&note), "{:?}", trace.notes);
        let error = read_text(&text, Part { until_us: None, functions: Some(1) }).unwrap_err();
        assert!(error.contains("more than 20000000 arrivals"), "{error}");
    }

    #[test]
    fn bad_lines_are_named() {
        let minutes = header_2019();
        for (text, said) in [
            ("", "line 1: it is not `time_s,function`"),
            ("a,b\n1,2\n", "line 1: it is not `time_s,function`"),
            ("time_s,function\n1,a\n0.5,a\n", "line 3: time 0.5 comes after 1"),
            ("time_s,function\n1\n", "line 2: it has 1 fields"),
            ("time_s,function\nNaN,a\n", "line 2: `time_s` is `NaN`"),
            ("time_s,function\n-1,a\n", "line 2: `time_s` is `-1`"),
            ("time_s,function\n1,\n", "line 2: it names no function"),
            ("time_s,function\n", "no arrival"),
            ("app,func,end_timestamp,duration\nA,f,1\n", "line 2: it has 3 fields"),
            ("app,func,end_timestamp,duration\nA,f,1,inf\n", "line 2: `duration` is `inf`"),
            (&format!("{minutes}o,a,f,http,1,2\n"), "line 2: it has 2 counts, not 1440"),
            (&format!("{minutes}{}", day("f", &[]).replace(",0\n", ",x\n")), "line 2: `x` is no number of requests"),
            (&format!("time_s,function\n1,{}\n", "a".repeat(MAX_LINE)), "line 2: it has more than"),
        ] {
            let error = read_text(text, Part::default()).unwrap_err();
            assert!(error.starts_with("Cannot use F") && error.contains(said), "{said}: {error}");
        }
    }
}
