//! Arrivals of requests: the moment of each, and its function.

use std::collections::BTreeMap;

use crate::sys::errors::{BoxError, refuse};

/// The most arrivals that are kept: 16 bytes each.
const MAX_ARRIVALS: usize = 20_000_000;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrival {
    /// Time since the start of the trace, µs.
    pub(super) at_us: u64,
    /// Index in [`Trace::functions`].
    pub(super) function: u32,
}

/// The part of a trace that is used.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    /// Arrivals at this time or later are left out.
    pub(super) until_us: Option<u64>,
    /// Functions beyond so many, in the order of their first lines, are left out.
    pub(super) functions: Option<usize>,
}

/// Requests in the order of their arrival.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) functions: Vec<String>,
    pub(super) arrivals: Vec<Arrival>,
    /// The length of the trace, µs.
    pub(super) length_us: u64,
    /// Remarks for the report, such as the lines that were left out.
    pub(super) notes: Vec<String>,
}

/// Collects the arrivals of a trace.
#[derive(Debug)]
pub(super) struct Collector {
    part: Part,
    trace: Trace,
    indices: BTreeMap<String, Option<u32>>,
    left_out: u64,
}

impl Collector {
    pub(super) fn new(part: Part) -> Collector {
        Collector { part, trace: Trace::default(), indices: BTreeMap::new(), left_out: 0 }
    }

    /// The index of a function; `None` if it is left out.
    pub(super) fn function(&mut self, name: &str) -> Option<u32> {
        if let Some(index) = self.indices.get(name) {
            return *index;
        }
        let count = self.trace.functions.len();
        let index = (count < self.part.functions.unwrap_or(usize::MAX)).then_some(count as u32);
        if index.is_some() {
            self.trace.functions.push(name.to_string());
        }
        self.indices.insert(name.to_string(), index);
        index
    }

    /// Returns whether no request of `function` from `at_us` on is in the part that is to be used.
    pub(super) fn leaves_out(&self, at_us: u64, function: Option<u32>) -> bool {
        function.is_none() || self.part.until_us.is_some_and(|until| at_us >= until)
    }

    /// Counts requests that are left out.
    pub(super) fn leave_out(&mut self, requests: u64) {
        self.left_out += requests;
    }

    /// Adds a request of a function that may be left out.
    ///
    /// # Errors
    /// There are more arrivals than can be kept.
    pub(super) fn add(&mut self, at_us: u64, function: Option<u32>) -> Result<(), BoxError> {
        let Some(function) = function.filter(|_| !self.leaves_out(at_us, function)) else {
            self.leave_out(1);
            return Ok(());
        };
        if self.trace.arrivals.len() == MAX_ARRIVALS {
            return refuse(format!("more than {MAX_ARRIVALS} arrivals: give --duration, or fewer --functions"));
        }
        self.trace.arrivals.push(Arrival { at_us, function });
        Ok(())
    }

    /// Adds a remark for the report.
    pub(super) fn note(&mut self, note: String) {
        self.trace.notes.push(note);
    }

    /// The trace, its arrivals in the order of time. Functions without an arrival in the used part are dropped.
    ///
    /// # Errors
    /// No arrival is left.
    pub(super) fn finish(mut self) -> Result<Trace, BoxError> {
        let trace = &mut self.trace;
        if self.left_out > 0 {
            trace.notes.push(format!("{} requests of the trace are beyond --duration or --functions", self.left_out));
        }
        trace.arrivals.sort_by_key(|arrival| (arrival.at_us, arrival.function));
        let Some(last) = trace.arrivals.last() else { return refuse("no arrival is in the part that is to be used") };
        trace.length_us = self.part.until_us.unwrap_or(last.at_us + 1);
        let mut kept: Vec<Option<u32>> = vec![None; trace.functions.len()];
        let mut functions = Vec::new();
        for arrival in &mut trace.arrivals {
            let old = arrival.function as usize;
            arrival.function = *kept[old].get_or_insert_with(|| {
                functions.push(trace.functions[old].clone());
                functions.len() as u32 - 1
            });
        }
        trace.functions = functions;
        Ok(self.trace)
    }
}
