//! Files with secrets, or that decide about access.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Checks that no other user has a right to an open file, and that it belongs to this user or to root.
///
/// # Errors
/// The defect and its remedy.
pub fn check_private(metadata: &Metadata) -> Result<(), String> {
    let me = rustix::process::geteuid().as_raw();
    if ![me, 0].contains(&metadata.uid()) {
        return Err(format!("it belongs to user {}. Give a file of user {me}", metadata.uid()));
    }
    if metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(format!("its mode is {mode:o}: other users have a right to it. Take it with chmod 600"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn file_that_others_may_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "").unwrap();
        for (mode, is_good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(check_private(&std::fs::metadata(&path).unwrap()).is_ok(), is_good, "{mode:o}");
        }
    }
}
