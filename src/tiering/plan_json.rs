//! A plan in JSON, as `tvmm plan --json` prints it: the way for a policy in any language.
//!
//! A plan file of tvmm comes from one of its policies, which takes each page from where the snapshot has it. A plan in
//! JSON may come from anywhere, so [`check_pages`] compares the place of each page with the snapshot's page maps.
//! Without that, a plan with a wrong offset would be a guest with wrong memory.

use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Error;
use super::plan_file::{FILE_LIMIT, SourceFile};
use super::policy::advance;
use crate::snapshot::{
    Chain, Content, Extent, JsonPlan, MemoryLayout, PageOrigin, PageSource, PlannedExtent, ResolvedRun, RestorePlan,
    read_limited,
};

/// A plan that was read from JSON. The caller must still check it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanDocument {
    pub plan: RestorePlan,
    /// The memory file of each layer when the plan was made, base first. None: the plan is for the files as they are.
    pub sources: Option<Vec<SourceFile>>,
}

/// The keys that `tvmm plan --json` prints. All but `plan` and `sources` are a summary for readers.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    plan: JsonPlan,
    sources: Option<Vec<SourceFile>>,
    #[serde(default, rename = "policy")]
    _policy: IgnoredAny,
    #[serde(default, rename = "snapshot")]
    _snapshot: IgnoredAny,
    #[serde(default, rename = "costs")]
    _costs: IgnoredAny,
    #[serde(default, rename = "groups")]
    _groups: IgnoredAny,
    #[serde(default, rename = "expected")]
    _expected: IgnoredAny,
    #[serde(default, rename = "fit_expected")]
    _fit_expected: IgnoredAny,
    #[serde(default, rename = "fit_against")]
    _fit_against: IgnoredAny,
    #[serde(default, rename = "images")]
    _images: IgnoredAny,
    #[serde(default, rename = "background_steps")]
    _background_steps: IgnoredAny,
    #[serde(default, rename = "fault_pages")]
    _fault_pages: IgnoredAny,
}

/// The kind of the chain's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// The layers' own files.
    Files,
    /// A cold pool, which has the page of any layer at its offset in the memory file.
    ColdPool,
}

/// Returns the plan in the JSON at `path`; `None` if the file is not JSON.
///
/// # Errors
/// A file that cannot be read; [`Error::PlanFile`] for JSON that is no plan.
pub fn load(path: &Path) -> Result<Option<PlanDocument>, Error> {
    parse(path, &read_limited(path, FILE_LIMIT)?)
}

/// As [`load`] for bytes; `path` names them in errors.
///
/// # Errors
/// [`Error::PlanFile`] for JSON that is no plan.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Option<PlanDocument>, Error> {
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Ok(None);
    }
    let read: Result<Document, _> = serde_json::from_slice(bytes);
    let Document { plan, sources, .. } = read.map_err(|error| {
        let problem = format!("{error}; docs/policies.md describes a plan in JSON");
        Error::PlanFile { path: path.to_path_buf(), problem }
    })?;
    Ok(Some(PlanDocument { plan: RestorePlan::from(plan), sources }))
}

/// Checks that a valid `plan` takes each page from where `resolved` says that `chain` has it. An image is made of the
/// snapshot's pages, so its extents are always right.
///
/// # Errors
/// The first page that is taken from another place.
pub fn check_pages(
    plan: &RestorePlan,
    chain: &Chain,
    resolved: &[ResolvedRun],
    memory: MemoryKind,
) -> Result<(), String> {
    let places = Places { layout: chain.layout(), tip: chain.tip_index(), memory };
    let mut at = 0;
    for item in &plan.extents {
        while let Some(run) = resolved.get(at) {
            if let Some(part) = run.extent.intersection(&item.extent) {
                places.check(item, run, part)?;
            }
            if run.extent.end() > item.extent.end() {
                break;
            }
            at += 1;
        }
    }
    Ok(())
}

struct Places<'a> {
    layout: &'a MemoryLayout,
    tip: usize,
    memory: MemoryKind,
}

impl Places<'_> {
    /// Checks the source of `part`, which `item` and `run` share.
    fn check(&self, item: &PlannedExtent, run: &ResolvedRun, part: Extent) -> Result<(), String> {
        let planned = item.source.map(|source| advance(source, part.first.0 - item.extent.first.0));
        let held = match run.content {
            Content::Zero => None,
            Content::Bytes(source) => Some(advance(source, part.first.0 - run.extent.first.0)),
        };
        match (planned, held) {
            (None, None) => Ok(()),
            (Some(PageSource { origin: PageOrigin::Image(_), .. }), _) => Ok(()),
            (Some(planned), held) if Some(planned) == held => Ok(()),
            (Some(planned), _) if self.memory == MemoryKind::ColdPool && self.is_own_offset(planned, part) => Ok(()),
            (Some(planned), None) if self.is_hole(planned, part) => Ok(()),
            (Some(planned), None) => Err(format!("{part} is zero, but the plan takes it from {}", place(planned))),
            (None, Some(held)) => {
                Err(format!("{part} is zero in the plan, but the snapshot has it in {}", place(held)))
            }
            (Some(planned), Some(held)) => Err(format!(
                "the plan takes {part} from {}, but the snapshot has it in {}",
                place(planned),
                place(held)
            )),
        }
    }

    /// Returns true for the tip's bytes at the offset of pages that are zero: the file has a hole there.
    fn is_hole(&self, source: PageSource, part: Extent) -> bool {
        source.origin == PageOrigin::Layer(self.tip) && self.is_own_offset(source, part)
    }

    /// Returns true for the bytes that a layer's memory file has at the offset of these pages.
    fn is_own_offset(&self, source: PageSource, part: Extent) -> bool {
        matches!(source.origin, PageOrigin::Layer(_)) && self.layout.file_offset(part.first) == Some(source.offset)
    }
}

fn place(source: PageSource) -> String {
    let PageSource { origin, offset } = source;
    match origin {
        PageOrigin::Layer(index) => format!("layer {index} at offset {offset}"),
        PageOrigin::Tier(index) => format!("tier {index} at offset {offset}"),
        PageOrigin::Image(index) => format!("image {index} at offset {offset}"),
    }
}
