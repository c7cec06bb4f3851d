//! Directories in which tvmm keeps guest memory, or data derived from it, between runs.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Checks that files in `dir` can be trusted: it belongs to this user or to root, and no other user may make files in
/// it.
///
/// # Errors
/// The reason and a remedy; errors of the host.
pub fn check_owner(dir: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(dir)?;
    let me = rustix::process::geteuid().as_raw();
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if ![me, 0].contains(&metadata.uid()) {
        return refuse(format!(
            "it belongs to user {}, who could put other bytes there. Give a directory of user {me}",
            metadata.uid()
        ));
    }
    if metadata.mode() & 0o022 != 0 {
        return refuse(format!(
            "its mode is {:o}: other users may put other bytes there. Take their right with chmod go-w, or give \
             another directory",
            metadata.mode() & 0o7777
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn directory_that_others_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, is_good) in [(0o700, true), (0o755, true), (0o775, false), (0o777, false), (0o1777, false)] {
            std::fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_owner(dir.path()).is_ok(), is_good, "{mode:o}");
        }
    }
}
