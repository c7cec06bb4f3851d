//! Privileges that a jailed process gives up: its user and groups, all capabilities, core dumps, and whatever programs
//! could give it (capabilities(7), prctl(2), credentials(7)).

use std::fs;
use std::io;

use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::error::Error;
use super::types::Jail;

const ROOT_REMEDY: &str = "Run tvmm as root, or leave it out";

fn failed<E: Into<io::Error>>(doing: impl Into<String>, remedy: &'static str) -> impl FnOnce(E) -> Error {
    let doing = doing.into();
    move |source| Error::Privileges { doing, remedy, source: source.into() }
}

/// Moves this process into cgroups. Both versions take `0` for the writing process (cgroups(7)).
///
/// # Errors
/// [`Error::Cgroup`] with the directory.
pub fn join_cgroups(jail: &Jail) -> Result<(), Error> {
    for path in &jail.cgroups {
        let joined = fs::write(path.join("cgroup.procs"), "0");
        joined.map_err(|source| Error::Cgroup { path: path.clone(), source })?;
    }
    Ok(())
}

/// Becomes the jail's user, and gives up everything that this process could still do by privilege.
///
/// # Errors
/// [`Error::Privileges`] with the step that failed.
pub fn give_up(jail: &Jail) -> Result<(), Error> {
    let have = rustix::thread::capabilities(None).map_err(failed("read capabilities", ""))?;
    if have.effective.contains(CapabilitySet::SETPCAP) {
        let bits = CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
        rustix::thread::set_capabilities_secure_bits(bits).map_err(failed("lock capabilities", ""))?;
        for capability in CapabilitySet::all().iter() {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // One that this kernel does not have.
                Err(rustix::io::Errno::INVAL) => {}
                removed => removed.map_err(failed("bound capabilities", ""))?,
            }
        }
    }
    if let Some(gid) = jail.gid.or(jail.uid) {
        let gid = Gid::from_raw(gid);
        let doing = format!("become group {}", gid.as_raw());
        rustix::thread::set_thread_groups(&[]).map_err(failed("leave all other groups", ROOT_REMEDY))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed(doing, ROOT_REMEDY))?;
    }
    if let Some(uid) = jail.uid {
        let uid = Uid::from_raw(uid);
        let doing = format!("become user {}", uid.as_raw());
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed(doing, ROOT_REMEDY))?;
    }
    rustix::thread::clear_ambient_capability_set().map_err(failed("give up capabilities", ""))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed("give up capabilities", ""))?;
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, no_core).map_err(failed("forbid core dumps", ""))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("forbid new privileges", ""))
}

/// The capabilities in the effective, permitted and inheritable sets, as bits.
///
/// # Errors
/// [`Error::Privileges`].
pub fn left() -> Result<u64, Error> {
    let sets = rustix::thread::capabilities(None).map_err(failed("read capabilities", ""))?;
    Ok((sets.effective | sets.permitted | sets.inheritable).bits())
}

/// Makes this process one that cannot be dumped, or traced by others of its user (PR_SET_DUMPABLE). Changing the user
/// sets it anew, so this comes last.
///
/// # Errors
/// [`Error::Privileges`].
pub fn hide_memory() -> Result<(), Error> {
    let set = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    set.map_err(failed("forbid dumps of memory", ""))
}
