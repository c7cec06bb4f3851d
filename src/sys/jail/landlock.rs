//! Landlock (kernel `Documentation/userspace-api/landlock.rst`): the paths that stay, no TCP, and neither signals nor
//! abstract sockets to processes outside.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};

use super::error::Error;
use super::types::{JailPath, Use};

/// The oldest version that keeps signals and abstract sockets in.
const OLDEST: ABI = ABI::V6;

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Landlock { why: error.to_string() }
}

/// The rights of a use. A right for directories is refused for a file.
fn rights(allowed: Use, is_dir: bool) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let sockets = AccessFs::ReadDir | AccessFs::MakeSock | AccessFs::RemoveFile;
    let rights = match allowed {
        Use::Read => read,
        Use::Sockets => sockets,
        Use::ReadAndSockets => read | sockets,
        Use::Write => {
            AccessFs::from_all(OLDEST)
                & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeFifo)
        }
    };
    if is_dir { rights } else { rights & AccessFs::from_file(OLDEST) }
}

/// Restricts this thread, and those that it starts from now on, to `paths`. TCP is left as it is if `has_network`.
/// Returns the version of the interface in use.
///
/// # Errors
/// A kernel without Landlock, or with too old a version; a path that cannot be opened.
pub fn restrict<'a>(paths: impl Iterator<Item = &'a JailPath>, has_network: bool) -> Result<i32, Error> {
    // Every right is required: an older kernel is an error, not a weaker jail.
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let old = || Error::OldLandlock { have: version() };
    let mut ruleset = ruleset.handle_access(AccessFs::from_all(OLDEST)).map_err(|_| old())?;
    if !has_network {
        ruleset = ruleset.handle_access(AccessNet::from_all(OLDEST)).map_err(|_| old())?;
    }
    let ruleset = ruleset.scope(Scope::from_all(OLDEST)).map_err(|_| old())?;
    let mut created = ruleset.create().map_err(|_| old())?;
    for entry in paths {
        created = add(created, &entry.path, entry.allowed)?;
    }
    let status = created.restrict_self().map_err(failed)?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => Ok(kernel_abi.unwrap_or(effective_abi as i32)),
        _ => Err(old()),
    }
}

fn add(created: landlock::RulesetCreated, path: &Path, allowed: Use) -> Result<landlock::RulesetCreated, Error> {
    let fd = PathFd::new(path).map_err(failed)?;
    let is_dir = path.is_dir();
    created.add_rule(PathBeneath::new(fd, rights(allowed, is_dir))).map_err(failed)
}

/// Says in words which version this kernel has (landlock_create_ruleset(2), `LANDLOCK_CREATE_RULESET_VERSION`).
fn version() -> String {
    // SAFETY: with this flag, no pointer and no length, the call touches no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, 1_u32) };
    if version > 0 { format!("version {version}") } else { "no Landlock, or has it switched off".to_owned() }
}
