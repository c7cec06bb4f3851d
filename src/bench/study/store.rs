//! The file of measurements: one JSON object per line, appended at once, so that an interrupted run can go on.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sys::errors::{BoxError, refuse};

/// The file in the directory of results.
pub const FILE: &str = "results.jsonl";
const FORMAT: u32 = 1;

/// The settings and the host of the measurements, in the first line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub tvmm_version: String,
    /// The settings that the numbers depend on, by name; a run goes on only if all are the same.
    pub settings: BTreeMap<String, String>,
    /// Facts about the host.
    pub host: BTreeMap<String, String>,
}

impl Header {
    pub fn new(settings: BTreeMap<String, String>, host: BTreeMap<String, String>) -> Self {
        Header { format: FORMAT, tvmm_version: env!("CARGO_PKG_VERSION").to_string(), settings, host }
    }
}

/// Identifies a measurement.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// `E1` to `E7`, or `burst`.
    pub experiment: String,
    /// The restored function, or a point on an axis.
    pub case: String,
    /// The flow, by name.
    pub flow: String,
    /// Counts from 0.
    pub round: u32,
}

/// Numbers by name.
pub type Values = BTreeMap<String, f64>;

/// The outcome of a measurement.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    pub values: Values,
    /// As in [`Sample::answers_ms`].
    pub answers_ms: Vec<f64>,
}

impl From<Values> for Measured {
    fn from(values: Values) -> Self {
        Measured { values, answers_ms: Vec::new() }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    #[serde(flatten)]
    pub key: Key,
    /// Numbers by name; the name ends in the unit.
    pub values: Values,
    /// In a burst: the time of each VM from the common start to its answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers_ms: Vec<f64>,
    /// The reason of a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Sample {
    pub fn new(key: Key, measured: Measured) -> Sample {
        Sample { key, values: measured.values, answers_ms: measured.answers_ms, failed: None }
    }
}

/// A file of results, open for more.
pub struct Store {
    path: PathBuf,
    file: File,
    pub results: Results,
    done: HashSet<Key>,
}

/// Results as they were read.
#[derive(Clone, Debug)]
pub struct Results {
    pub header: Header,
    pub samples: Vec<Sample>,
}

impl Results {
    /// Reads a file of results, or the one in a directory.
    ///
    /// # Errors
    /// The defect and its line. An incomplete last line does not count: the run was interrupted while writing it.
    pub fn read(path: &Path) -> Result<Results, BoxError> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let mut text = String::new();
        let read = File::open(&path).and_then(|mut file| file.read_to_string(&mut text));
        read.map_err(|error| format!("Cannot read {}: {error}", path.display()))?;
        parse(&text, &path).map(|(results, _)| results)
    }
}

/// Parses the results. Returns their length in bytes, too.
fn parse(text: &str, path: &Path) -> Result<(Results, usize), BoxError> {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut lines = text[..whole].lines().enumerate();
    let bad = |number: usize, problem: String| format!("{}, line {}: {problem}", path.display(), number + 1);
    let Some((_, first)) = lines.next() else { return refuse(format!("{} is empty", path.display())) };
    let header: Header = serde_json::from_str(first).map_err(|error| bad(0, error.to_string()))?;
    if header.format != FORMAT {
        return refuse(bad(0, format!("format {} is not known to this tvmm, only {FORMAT}", header.format)));
    }
    let samples = lines.map(|(number, line)| {
        serde_json::from_str(line).map_err(|error| BoxError::from(bad(number, error.to_string())))
    });
    Ok((Results { header, samples: samples.collect::<Result<_, _>>()? }, whole))
}

impl Store {
    /// Opens the results in `dir`, or begins them.
    ///
    /// # Errors
    /// The results there were measured with other settings or on another host: they cannot go on here.
    pub fn open(dir: &Path, header: Header) -> Result<Store, BoxError> {
        let path = dir.join(FILE);
        let failed = |error: std::io::Error| format!("Cannot keep results in {}: {error}", path.display());
        std::fs::create_dir_all(dir).map_err(failed)?;
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;
        let results = if text.contains('\n') {
            let (results, whole) = parse(&text, &path)?;
            check_same(&results.header, &header, &path)?;
            file.set_len(whole as u64).map_err(failed)?;
            results
        } else {
            file.set_len(0).map_err(failed)?;
            Results { header, samples: Vec::new() }
        };
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        let done = results.samples.iter().map(|sample| sample.key.clone()).collect();
        let mut store = Store { path, file, results, done };
        if store.results.samples.is_empty() && store.file.stream_position()? == 0 {
            let line = serde_json::to_string(&store.results.header)?;
            store.append(&line)?;
        }
        Ok(store)
    }

    /// Returns whether this was measured before.
    pub fn has(&self, key: &Key) -> bool {
        self.done.contains(key)
    }

    /// Keeps a measurement.
    pub fn add(&mut self, sample: Sample) -> Result<(), BoxError> {
        self.append(&serde_json::to_string(&sample)?)?;
        self.done.insert(sample.key.clone());
        self.results.samples.push(sample);
        Ok(())
    }

    /// Writes in one call, so that a line is complete or is torn at the very end.
    fn append(&mut self, line: &str) -> Result<(), BoxError> {
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        Ok(written.map_err(|error| format!("Cannot write {}: {error}", self.path.display()))?)
    }
}

fn check_same(old: &Header, new: &Header, path: &Path) -> Result<(), BoxError> {
    let differs = |name: &str, old: &str, new: &str| {
        refuse(format!(
            "{} was measured with {name} {old}, and this is {new}: give another --out, or remove it",
            path.display()
        ))
    };
    if old.tvmm_version != new.tvmm_version {
        return differs("tvmm", &old.tvmm_version, &new.tvmm_version);
    }
    let names: std::collections::BTreeSet<&String> = old.settings.keys().chain(new.settings.keys()).collect();
    for name in names {
        let value = |header: &Header| header.settings.get(name).cloned().unwrap_or_else(|| "nothing".to_string());
        if value(old) != value(new) {
            return differs(name, &value(old), &value(new));
        }
    }
    if old.host == new.host {
        Ok(())
    } else {
        refuse(format!("Cannot go on with {}: it was measured on another host. Give another --out", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(runs: &str) -> Header {
        Header::new([("runs".to_string(), runs.to_string())].into(), BTreeMap::new())
    }

    fn sample(round: u32) -> Sample {
        let key = Key { experiment: "E1".into(), case: "hello".into(), flow: "reap".into(), round };
        Sample::new(key, Values::from([("answer_ms".to_string(), 1.5)]).into())
    }

    #[test]
    fn torn_line_is_measured_again_and_the_rest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), header("3")).unwrap();
        store.add(sample(0)).unwrap();
        store.add(sample(1)).unwrap();
        drop(store);
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..40 {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            let mut store = Store::open(dir.path(), header("3")).unwrap();
            assert!(store.has(&sample(0).key) && !store.has(&sample(1).key));
            store.add(sample(1)).unwrap();
            drop(store);
            assert_eq!(Results::read(dir.path()).unwrap().samples, [sample(0), sample(1)]);
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        // Not even the header was written whole.
        std::fs::write(&path, &whole[..10]).unwrap();
        assert!(Store::open(dir.path(), header("3")).unwrap().results.samples.is_empty());
    }

    #[test]
    fn results_of_other_settings_and_garbage_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path(), header("3")).unwrap().add(sample(0)).unwrap();
        let fault = |dir: &Path, header| Store::open(dir, header).err().map(|error| error.to_string()).unwrap();
        assert!(fault(dir.path(), header("4")).contains("was measured with runs 3, and this is 4"));
        let mut other = header("3");
        other.host.insert("cpu".into(), "another".into());
        assert!(fault(dir.path(), other).contains("another host"));
        let path = dir.path().join(FILE);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text += "{\"experiment\":5}\n";
        std::fs::write(&path, &text).unwrap();
        assert!(fault(dir.path(), header("3")).contains("line 3"));
        std::fs::write(&path, text.replacen("\"format\":1", "\"format\":9", 1)).unwrap();
        assert!(fault(dir.path(), header("3")).contains("format 9"));
    }
}
