//! Counts of promotions by cause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Map, Value, json};

/// The way in which the pages to promote were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resort {
    /// Known to be written: by KVM at the restore, or by a background step.
    Ahead,
    /// A VMM thread was about to write.
    Device,
    /// KVM named the page.
    Told,
    /// KVM's emulator passed the write to the VMM as if it were one to a device.
    Emulated,
    /// An operand of the instruction.
    Operand,
    /// The guest's page tables on the way to anything the instruction touches.
    PageTables,
    /// Stacks: the current one, and those an interrupt may switch to.
    Stack,
    /// Descriptor tables and task state segments.
    Descriptors,
    /// Everything near the pages above.
    Near,
    /// Everything.
    All,
}

impl Resort {
    const NAMES: [&str; 10] =
        ["ahead", "device", "told", "emulated", "operand", "page_tables", "stack", "descriptors", "near", "all"];
}

/// Promotions by the way in which the page was found.
#[derive(Debug, Default)]
pub struct Counts {
    times: [AtomicU64; Resort::NAMES.len()],
    pages: [AtomicU64; Resort::NAMES.len()],
    /// Exits whose page another vCPU had promoted already.
    raced: AtomicU64,
    /// Time between the exits of vCPUs and their return into the guest.
    nanoseconds: AtomicU64,
}

impl Counts {
    /// Counts a promotion of at least one page.
    pub fn add(&self, resort: Resort, pages: u64) {
        if pages > 0 {
            self.times[resort as usize].fetch_add(1, Ordering::Relaxed);
            self.pages[resort as usize].fetch_add(pages, Ordering::Relaxed);
        }
    }

    pub fn add_raced(&self) {
        self.raced.fetch_add(1, Ordering::Relaxed);
    }

    pub fn add_time(&self, time: Duration) {
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    pub fn json(&self) -> Value {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = |index: usize| json!({ "times": load(&self.times[index]), "pages": load(&self.pages[index]) });
        let named = Resort::NAMES.iter().enumerate().map(|(index, name)| (name.to_string(), of(index)));
        let mut json: Map<String, Value> = named.collect();
        json.insert("raced".into(), load(&self.raced).into());
        json.insert("exits_us".into(), (load(&self.nanoseconds) / 1000).into());
        Value::Object(json)
    }
}
