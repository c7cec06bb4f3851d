//! Costs of memory operations on a host: the numbers that [`tiered`](super::policy) weighs placements with.
//!
//! `tvmm calibrate` measures them. Until it has, built-in numbers stand in, and the commands that show a plan say so:
//! their ratios hold on many hosts, their sizes on few.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::snapshot::replace_file;

/// The version of the file that this build writes and reads.
const VERSION: u32 = 2;
/// The largest file that can be one, in bytes.
const FILE_LIMIT: u64 = 64 << 10;
/// The most that a single operation can cost: 100 ms.
const LARGEST_NS: u64 = 100_000_000;

/// The largest ratio of a measured number to the built-in one, or the reverse.
const APART: f64 = 8.0;
/// Operations and the larger ones that they are part of, in an order in which each is right when it serves as a bound:
/// touching a present page costs less than mapping it, reading it less than copying, and so on.
const PARTS: [(&str, &str); 8] = [
    ("cow_fault_ns", "cow_split_fault_ns"),
    ("populate_write_page_ns", "cow_fault_ns"),
    ("file_read_fault_ns", "cow_fault_ns"),
    ("populated_alone_ns", "file_read_fault_ns"),
    ("populated_touch_ns", "populated_alone_ns"),
    ("read_huge_page_ns", "read_small_page_ns"),
    ("uffd_copy_ns", "uffd_fault_ns"),
    ("uffd_call_ns", "uffd_fault_ns"),
];

/// The state of a snapshot's files in the page cache when they are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceCache {
    /// Cached in folios of 2 MiB, as a sealed snapshot is left: one fault maps 512 pages.
    #[default]
    Huge,
    /// Cached in small folios, as files are that were just written: each page is a fault.
    Small,
    /// Not cached: bytes come from the device.
    Cold,
}

impl SourceCache {
    pub const ALL: [SourceCache; 3] = [SourceCache::Huge, SourceCache::Small, SourceCache::Cold];

    pub fn name(self) -> &'static str {
        match self {
            SourceCache::Huge => "huge",
            SourceCache::Small => "small",
            SourceCache::Cold => "cold",
        }
    }
}

/// Linux' default, 128 KiB.
fn default_readahead() -> u64 {
    32
}

macro_rules! costs {
    ($($(#[$doc:meta])* $name:ident = $built_in:literal,)*) => {
        /// Costs of one host. All numbers are nanoseconds.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Costs {
            version: u32,
            /// The fields that were measured on this host. The others are built in.
            pub measured: Vec<String>,
            /// The page cache state of the snapshot's files: not a fact about the host, so it is not in its file.
            #[serde(skip)]
            pub cache: SourceCache,
            /// Pages the kernel reads around a fault on a file mapping that is not cached: the read-ahead window of the
            /// device the snapshot is on, so it is not in this file either.
            #[serde(skip, default = "default_readahead")]
            pub readahead_pages: u64,
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Default for Costs {
            /// The built-in numbers.
            fn default() -> Self {
                let cache = SourceCache::default();
                let readahead_pages = default_readahead();
                Costs { version: VERSION, measured: Vec::new(), cache, readahead_pages, $($name: $built_in,)* }
            }
        }

        impl Costs {
            /// Every number by name, in the order of this file.
            pub fn fields(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }

            /// Notes that a number was measured, clamped to what is possible: zero becomes 1, an hour the most allowed.
            pub fn set_measured(&mut self, name: &str, ns: u64) {
                match name {
                    $(stringify!($name) => self.$name = ns.clamp(1, LARGEST_NS),)*
                    _ => return,
                }
                if !self.is_measured(name) {
                    self.measured.push(name.to_string());
                }
            }
        }
    };
}

costs! {
    /// First write of the guest to a page of anonymous memory.
    anon_write_fault_ns = 7_000,
    /// First read of the guest of a page of anonymous memory.
    anon_read_fault_ns = 5_600,
    /// First touch of a block of 2 MiB that one huge page or folio maps.
    huge_fault_ns = 7_500,
    /// First touch of a page of a private file mapping in small pages, cached.
    file_read_fault_ns = 5_100,
    /// First write to a page of a private file mapping: a fault and a copy.
    cow_fault_ns = 7_700,
    /// The first write into a block mapped by a huge folio: the copy, and the block mapped by small pages from then on.
    cow_split_fault_ns = 9_000,
    /// A page of a hole in a file, over one that has data: the page cache must allocate one.
    hole_extra_ns = 2_400,
    /// `MADV_POPULATE_WRITE` over a private file mapping: each call.
    populate_write_call_ns = 400,
    /// `MADV_POPULATE_WRITE` over a private file mapping: each page.
    populate_write_page_ns = 650,
    /// The guest's first touch of a small page that is in the host's page tables, writable, with all of its group of 8:
    /// KVM maps those along (Linux `arch/x86/kvm/mmu/mmu.c`, `PTE_PREFETCH_NUM`).
    populated_touch_ns = 1_000,
    /// The same where others of the group are missing: each page is a fault.
    populated_alone_ns = 4_500,
    /// Reading from the cache into anonymous memory in huge pages, allocation included: each page of 4 KiB.
    read_huge_page_ns = 250,
    /// Reading from the cache into anonymous memory in small pages, allocation included: each page.
    read_small_page_ns = 1_150,
    /// A system call that reads: the part independent of its length.
    call_ns = 300,
    /// A mapping of its own: its `mmap`, and the cost of one more VMA.
    vma_ns = 1_500,
    /// A page fault that a userfaultfd thread answers.
    uffd_fault_ns = 36_000,
    /// A page installed by `UFFDIO_COPY`, many at a time.
    uffd_copy_ns = 560,
    /// A call of `UFFDIO_COPY`: the part independent of its length.
    uffd_call_ns = 950,
    /// A page from the device, in a long sequential read.
    device_sequential_page_ns = 1_050,
    /// A single page from the device: the cost beyond that in a sequential read.
    device_seek_ns = 24_000,
}

/// The version field, read first: is the file for this build?
#[derive(Deserialize)]
struct Probe {
    version: u32,
}

impl Costs {
    /// True if a number was measured on this host.
    pub fn is_measured(&self, name: &str) -> bool {
        self.measured.iter().any(|known| known == name)
    }

    /// `built-in`, `measured`, or the count of measured numbers.
    pub fn source(&self) -> String {
        let all = self.fields().count();
        match self.measured.len() {
            0 => "built-in".to_string(),
            measured if measured >= all => "measured".to_string(),
            measured => format!("{measured} of {all} measured, the others built-in"),
        }
    }

    /// The same host, with the snapshot's files cached in another way.
    #[must_use]
    pub fn with_cache(mut self, cache: SourceCache) -> Costs {
        self.cache = cache;
        self
    }

    /// Corrects implausible numbers: those of a busy host would lead to plans that are bad everywhere. No operation
    /// then costs more than one that it is part of, and no number is more than [`APART`] times away from the built-in
    /// one, once all are scaled to this host's speed (the median ratio of measured to built-in numbers). Returns the
    /// changed numbers: name, before, after.
    pub fn make_plausible(&mut self) -> Vec<(&'static str, u64, u64)> {
        let built_in = Costs::default();
        let measured = self.clone();
        let was = |name: &str| measured.fields().find(|(known, _)| *known == name).map_or(1, |(_, ns)| ns);
        let mut ratios: Vec<f64> = (built_in.fields().zip(self.fields()))
            .filter(|((name, _), _)| self.is_measured(name))
            .map(|((_, built_in), (_, here))| here as f64 / built_in as f64)
            .collect();
        ratios.sort_unstable_by(f64::total_cmp);
        let speed = ratios.get(ratios.len() / 2).copied().unwrap_or(1.0);
        for (name, ns) in built_in.fields().filter(|(name, _)| measured.is_measured(name)) {
            let scaled = ns as f64 * speed;
            self.set_measured(name, (was(name) as f64).clamp(scaled / APART, scaled * APART).round() as u64);
        }
        for (part, whole) in PARTS {
            let bound = self.fields().find(|(name, _)| *name == whole).map_or(LARGEST_NS, |(_, ns)| ns);
            let is_more = self.fields().any(|(name, ns)| name == part && ns > bound);
            if is_more {
                self.set_measured(part, bound);
            }
        }
        let now: Vec<(&'static str, u64)> = self.fields().collect();
        now.into_iter().filter(|(name, ns)| was(name) != *ns).map(|(name, ns)| (name, was(name), ns)).collect()
    }

    /// Reads what [`Costs::save`] wrote.
    pub fn load(path: &Path) -> Result<Costs, Error> {
        let bad = |problem: String| Error::Costs { path: path.to_path_buf(), problem };
        let file = std::fs::File::open(path).map_err(|error| bad(error.to_string()))?;
        let mut text = String::new();
        file.take(FILE_LIMIT).read_to_string(&mut text).map_err(|error| bad(error.to_string()))?;
        let probe: Probe = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if probe.version != VERSION {
            let version = probe.version;
            return Err(bad(format!(
                "it has version {version}, this build reads {VERSION}; run `tvmm calibrate` again"
            )));
        }
        let costs: Costs = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        if let Some((name, ns)) = costs.fields().find(|(_, ns)| !(1..=LARGEST_NS).contains(ns)) {
            return Err(bad(format!("its {name} is {ns}, allowed is 1 to {LARGEST_NS}")));
        }
        match costs.measured.iter().find(|name| !costs.fields().any(|(known, _)| known == name.as_str())) {
            Some(name) => Err(bad(format!("it says that {name:?} was measured, which is no cost"))),
            None => Ok(costs),
        }
    }

    /// Writes the numbers as JSON, in one step.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let bad = |problem: String| Error::Costs { path: path.to_path_buf(), problem };
        let json = serde_json::to_string_pretty(self).map_err(|error| bad(error.to_string()))?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|error| bad(error.to_string()))?;
        }
        replace_file(path, format!("{json}\n").as_bytes())?;
        Ok(())
    }

    /// The file of this host's measurements: `$XDG_CACHE_HOME/tvmm/costs.json`, or below `~/.cache`.
    pub fn default_path() -> Option<PathBuf> {
        Some(cache_home()?.join("costs.json"))
    }

    /// The measurements of this host if there are any, else the built-in numbers.
    pub fn of_this_host() -> Result<Costs, Error> {
        match Costs::default_path().filter(|path| path.exists()) {
            Some(path) => Costs::load(&path),
            None => Ok(Costs::default()),
        }
    }
}

/// This user's directory for files that can be made again: `$XDG_CACHE_HOME/tvmm`, or `~/.cache/tvmm`.
pub fn cache_home() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("tvmm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_survive_a_file_and_name_the_measured_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep").join("costs.json");
        let mut costs = Costs::default();
        assert_eq!(costs.source(), "built-in");
        costs.set_measured("vma_ns", 0);
        costs.set_measured("cow_fault_ns", u64::MAX);
        costs.set_measured("no_such_thing", 7);
        assert_eq!((costs.vma_ns, costs.cow_fault_ns), (1, LARGEST_NS));
        costs.save(&path).unwrap();
        let back = Costs::load(&path).unwrap();
        assert_eq!(back, costs);
        assert!(back.is_measured("vma_ns") && !back.is_measured("call_ns"));
        assert!(back.source().starts_with("2 of "), "{}", back.source());
    }

    #[test]
    fn implausible_costs_are_put_in_order_and_plausible_ones_left_alone() {
        let mut costs = Costs::default();
        // A host twice as slow.
        for (name, ns) in Costs::default().fields() {
            costs.set_measured(name, ns * 2);
        }
        assert_eq!(costs.make_plausible(), []);
        let usual = costs.clone();
        costs.set_measured("populate_write_page_ns", usual.cow_fault_ns + 1);
        costs.set_measured("vma_ns", usual.vma_ns * 50);
        costs.set_measured("device_seek_ns", 1);
        let mut changed = costs.make_plausible();
        changed.sort_unstable();
        let expected = [
            ("device_seek_ns", 1, usual.device_seek_ns / 8),
            ("populate_write_page_ns", usual.cow_fault_ns + 1, usual.populate_write_page_ns * 8),
            ("vma_ns", usual.vma_ns * 50, usual.vma_ns * 8),
        ];
        assert_eq!(changed, expected);
        costs.set_measured("populated_alone_ns", usual.file_read_fault_ns + 1000);
        assert_eq!(costs.make_plausible().len(), 1);
        assert_eq!(costs.populated_alone_ns, costs.file_read_fault_ns);
    }

    #[test]
    fn costs_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("costs.json");
        let good = serde_json::to_value(Costs::default()).unwrap();
        let mut cases = vec![(serde_json::json!([]), "invalid")];
        let mut with = |key: &str, value: serde_json::Value, message| {
            let mut costs = good.clone();
            costs[key] = value;
            cases.push((costs, message));
        };
        with("version", 1.into(), "version 1");
        with("vma_ns", 0.into(), "vma_ns is 0");
        with("vma_ns", u64::MAX.into(), "vma_ns is");
        with("vma_ns", (-1).into(), "invalid");
        with("surplus_ns", 1.into(), "unknown field");
        with("measured", serde_json::json!(["x"]), "no cost");
        for (json, message) in cases {
            std::fs::write(&path, json.to_string()).unwrap();
            let error = Costs::load(&path).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(Costs::load(&dir.path().join("none")).is_err());
    }
}
