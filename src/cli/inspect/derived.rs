//! Files derived from a snapshot: kept plans, images of its pages, profiles of its runs. Each is read whole and
//! compared with its checksums.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::snapshot::{self, ImageSpec, ImageState, Location, Snapshot, check_image, derived_dir};
use crate::sys::errors::BoxError;
use crate::tiering::plan_file::PlanFile;
use crate::tiering::profile::Profile;

/// A derived file and its state.
pub struct Derived {
    pub path: PathBuf,
    kind: &'static str,
    pub state: State,
}

/// The state of a derived file.
pub enum State {
    Intact(String),
    /// Valid, but restores do not use it as it is.
    Unused(String),
    /// The error, with its causes.
    Damaged(String),
}

impl Derived {
    pub fn to_json(&self) -> Value {
        let (state, told) = match &self.state {
            State::Intact(told) => ("intact", told),
            State::Unused(told) => ("unused", told),
            State::Damaged(told) => ("damaged", told),
        };
        json!({ "path": self.path, "kind": self.kind, "state": state, "told": told })
    }

    /// One line for the screen.
    pub fn line(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().display();
        let told = match &self.state {
            State::Intact(told) => told.clone(),
            State::Unused(told) => format!("not used: {told}"),
            State::Damaged(_) => "damaged".to_string(),
        };
        format!("{:<10} {name}  {told}", self.kind)
    }
}

/// Checks all files derived from `snapshot`.
pub fn check_all(snapshot: &Snapshot) -> Result<Vec<Derived>, BoxError> {
    let dir = derived_dir(snapshot.location());
    let mut found = Vec::new();
    let mut specs = Vec::new();
    for path in files_in(&dir, "plan")? {
        let (state, images) = check_plan(&path, snapshot);
        specs.extend(images);
        found.push(Derived { path, kind: "plan", state });
    }
    for path in files_in(&dir, "image")? {
        let state = state_of_image(check_image(&path, snapshot.id(), &specs));
        found.push(Derived { path, kind: "image", state });
    }
    if let Location::Dir(dir) = snapshot.location() {
        for path in files_in(&dir.join("profile"), "profile")? {
            let state = check_profile(&path, snapshot);
            found.push(Derived { path, kind: "profile", state });
        }
    }
    Ok(found)
}

/// The files of a directory with this extension, by name; none if the directory is missing.
fn files_in(dir: &Path, extension: &str) -> Result<Vec<PathBuf>, BoxError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| format!("Cannot list {}: {error}", dir.display()))?,
    };
    let paths: Result<Vec<PathBuf>, io::Error> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(|error| format!("Cannot list {}: {error}", dir.display()))?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort_unstable();
    Ok(paths)
}

fn check_plan(path: &Path, snapshot: &Snapshot) -> (State, Vec<ImageSpec>) {
    let file = match PlanFile::load(path) {
        Ok(file) => file,
        // Its checksums are right: another version wrote it, and the next restore makes it again.
        Err(error @ crate::tiering::Error::PlanFile { .. }) => return (State::Unused(error.to_string()), Vec::new()),
        Err(error) => return (State::Damaged(with_causes(&error)), Vec::new()),
    };
    if file.plan.snapshot != snapshot.id() {
        return (State::Unused(format!("it is for snapshot {}", file.plan.snapshot)), Vec::new());
    }
    let told = format!("{}, {} extents", file.plan.policy, file.plan.extents.len());
    (State::Intact(told), file.plan.images)
}

fn state_of_image(checked: snapshot::Result<ImageState>) -> State {
    match checked {
        Ok(ImageState::Intact { pages }) => State::Intact(format!("{pages} pages")),
        Ok(ImageState::OfOther) => State::Unused("it is of another snapshot".to_string()),
        Ok(ImageState::WithoutChecksums) => {
            State::Unused("an older tvmm made it without checksums; a restore makes it again".to_string())
        }
        Err(error) => State::Damaged(with_causes(&error)),
    }
}

fn check_profile(path: &Path, snapshot: &Snapshot) -> State {
    let profile = match Profile::load(path) {
        Ok(profile) => profile,
        Err(error) => return State::Damaged(with_causes(&error)),
    };
    match profile.check_for(snapshot) {
        Ok(()) => State::Intact(format!("{}, {} pages", profile.function, profile.working_set().len())),
        Err(error) => State::Unused(error.to_string()),
    }
}

/// An error with its causes, as one sentence.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}
