//! The files and directories of the host, and the cold pools of other hosts, that clients may name. Only the command
//! line allows them (`docs/serve.md`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::StatusCode;

use super::blocking::blocking;
use super::error::ServeError;
use super::fault::Fault;
use super::function::Function;
use super::load::{is_node, on_this_host};
use super::options::Options;
use super::store;
use crate::config::restore::{FileUse, NamedFile, RestoreOptions};
use crate::snapshot::ColdSpec;

/// A file or directory that a client names.
#[derive(Clone, Debug)]
struct NamedPath {
    /// The key that names it.
    key: String,
    path: PathBuf,
    access: FileUse,
}

/// Everything that clients may name.
#[derive(Clone, Debug)]
pub(super) struct Allowances {
    /// The daemon's directory, without symbolic links.
    dir: PathBuf,
    /// Directories and files, without symbolic links.
    roots: Vec<PathBuf>,
    /// Pools that are not paths (`numa:N`).
    nodes: Vec<PathBuf>,
    /// Cold pools of other hosts.
    cold: Vec<String>,
}

impl Allowances {
    /// Collects the allowances of the command line. `dir`: the daemon's directory.
    pub(super) fn new(dir: &Path, options: &Options) -> Result<Allowances, ServeError> {
        let load = &options.load;
        let own = on_this_host(load).into_iter().map(|(path, _)| path).chain(load.cold_cache.clone());
        let mut allowed =
            Allowances { dir: dir.to_owned(), roots: vec![dir.to_owned()], nodes: Vec::new(), cold: Vec::new() };
        for path in own.chain(options.allow_paths.clone()) {
            if is_node(&path) {
                allowed.nodes.push(path);
                continue;
            }
            // A missing directory may be made later (a cache); it is then looked up by the same name.
            let path = std::path::absolute(&path).unwrap_or(path);
            let resolved = resolve(&path).map_err(|source| ServeError::Directory { path, source })?;
            allowed.roots.push(resolved);
        }
        let cold = load.cold_pools.iter().flatten().chain(&options.allow_cold);
        allowed.cold = cold.filter(|spec| spec.dir().is_none()).map(ColdSpec::to_string).collect();
        for dir in options.allow_cold.iter().filter_map(ColdSpec::dir) {
            let resolved = resolve(dir).map_err(|source| ServeError::Directory { path: dir.to_owned(), source })?;
            allowed.roots.push(resolved);
        }
        Ok(allowed)
    }

    /// Returns the path without symbolic links if clients may name it. Blocks for the disk.
    fn check(&self, named: &NamedPath) -> Result<PathBuf, Fault> {
        let NamedPath { key, path, access } = named;
        let shown = path.display();
        let refused = |why: String| Fault::new(StatusCode::FORBIDDEN, format!("Cannot use `{key}` {shown}: {why}."));
        if self.nodes.contains(path) {
            return Ok(path.clone());
        }
        let resolved = resolve(path).map_err(|error| refused(error.to_string()))?;
        if !self.roots.iter().any(|root| resolved.starts_with(root)) {
            let why =
                "it is not among what clients of this service may name. Start the service with --allow-path for it";
            return Err(refused(why.to_string()));
        }
        let is_the_daemons = resolved.strip_prefix(&self.dir).is_ok_and(store::is_the_daemons);
        if *access == FileUse::Write && is_the_daemons {
            return Err(refused("it is where the daemon keeps its own files. Choose another".to_string()));
        }
        Ok(resolved)
    }

    /// Returns whether clients may restore from a cold pool at this address.
    fn knows_address(&self, text: &str) -> bool {
        let servers = |text: &str| {
            let (scheme, list) = text.split_once(':')?;
            let list: Vec<String> = list.split(',').map(str::to_string).collect();
            ["tcp", "rdma"].contains(&scheme).then(|| (scheme.to_string(), list))
        };
        match servers(text) {
            Some((scheme, wanted)) => {
                let known: Vec<_> = self.cold.iter().filter_map(|known| servers(known)).collect();
                let is_known = |server: &String| known.iter().any(|(of, list)| *of == scheme && list.contains(server));
                wanted.iter().all(is_known)
            }
            None => {
                let is_below = |known: &String| {
                    let rest = text.strip_prefix(known.trim_end_matches('/'));
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                };
                // No part of the text may lead outside the allowed URL, whatever a store makes of it.
                let is_plain = !text.contains(['?', '#', '%', '\\']) && !text.split('/').any(|part| part == "..");
                is_plain && self.cold.iter().any(is_below)
            }
        }
    }
}

/// The path without symbolic links. A path that does not exist yet stays as it is.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        // A dangling link is refused: it would lead to its target once that is made.
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => Ok(resolve(parent)?.join(name)),
                _ => Err(error),
            }
        }
        resolved => resolved,
    }
}

impl Allowances {
    async fn check_all(self: &Arc<Self>, named: Vec<NamedPath>) -> Result<Vec<PathBuf>, Fault> {
        if named.is_empty() {
            return Ok(Vec::new());
        }
        let allowed = self.clone();
        blocking(move || named.iter().map(|named| allowed.check(named)).collect()).await?
    }

    /// Returns the function with the paths of its files free of symbolic links.
    ///
    /// # Errors
    /// The function names a file that clients may not name.
    pub(super) async fn confined_function(self: &Arc<Self>, mut function: Function) -> Result<Function, Fault> {
        let mut files =
            vec![("image", &mut function.image), ("kernel", &mut function.kernel), ("initrd", &mut function.initrd)];
        files.retain(|(_, path)| path.is_some());
        let named = files.iter().filter_map(|(key, path)| {
            Some(NamedPath { key: (*key).to_owned(), path: path.as_ref()?.clone(), access: FileUse::Read })
        });
        let resolved = self.check_all(named.collect()).await?;
        for ((_, path), resolved) in files.into_iter().zip(resolved) {
            *path = Some(resolved);
        }
        Ok(function)
    }

    /// Returns the restore options with the paths of files and directories free of symbolic links.
    ///
    /// # Errors
    /// The options name something that clients may not name.
    pub(super) async fn confined(self: &Arc<Self>, mut options: RestoreOptions) -> Result<RestoreOptions, Fault> {
        for spec in options.cold_pools.iter().flatten().filter(|spec| spec.dir().is_none()) {
            let text = spec.to_string();
            if !self.knows_address(&text) {
                let text = text.escape_default();
                let why = "it is not among those that clients of this service may name. Start the service with \
                           --allow-cold for it";
                let message = format!("Cannot restore from `{text}` of `tvmm.cold_pools`: {why}.");
                return Err(Fault::new(StatusCode::FORBIDDEN, message));
            }
        }
        // The daemon's own, which no client can give, and none may name: it could write to them.
        let trusted_keys = options.trusted_keys.take();
        let files = options.files_mut();
        let named = files.iter().map(|NamedFile { key, path, access }| NamedPath {
            key: format!("tvmm.{key}"),
            path: path.to_path_buf(),
            access: *access,
        });
        let resolved = self.check_all(named.collect()).await?;
        for (file, resolved) in files.into_iter().zip(resolved) {
            *file.path = resolved;
        }
        Ok(RestoreOptions { trusted_keys, ..options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(dir: &Path, roots: &[PathBuf], cold: &[&str]) -> Allowances {
        Allowances {
            dir: dir.to_owned(),
            roots: roots.to_vec(),
            nodes: vec!["numa:1".into()],
            cold: cold.iter().map(|text| text.to_string()).collect(),
        }
    }

    #[test]
    fn links_and_dots_do_not_lead_out() {
        let scratch = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(scratch.path()).unwrap();
        let dir = base.join("dir");
        let inside = base.join("inside");
        let outside = base.join("outside");
        for made in [&dir, &inside, &outside, &dir.join("snapshots")] {
            fs::create_dir(made).unwrap();
        }
        fs::write(inside.join("file"), "").unwrap();
        fs::write(outside.join("file"), "").unwrap();
        for (link, to) in [("out", &outside), ("nowhere", &base.join("later")), ("in", &inside)] {
            std::os::unix::fs::symlink(to, inside.join(link)).unwrap();
        }
        std::os::unix::fs::symlink(inside.join("loop"), inside.join("loop")).unwrap();
        let allowed = allowed(&dir, &[dir.clone(), inside.clone()], &[]);
        let check = |path: PathBuf, access| allowed.check(&NamedPath { key: "k".to_owned(), path, access });
        for (path, resolved) in [
            (inside.join("file"), Some(inside.join("file"))),
            (inside.join("in/in/file"), Some(inside.join("file"))),
            (inside.join("new/dir"), Some(inside.join("new/dir"))),
            (outside.join("../inside/file"), Some(inside.join("file"))),
            ("numa:1".into(), Some("numa:1".into())),
            ("numa:2".into(), None),
            (outside.join("file"), None),
            (inside.join("out/file"), None),
            (inside.join("out/new"), None),
            (inside.join("nowhere"), None),
            (inside.join("nowhere/new"), None),
            (inside.join("loop"), None),
            (inside.join("new/../../outside/file"), None),
            (inside.join("../outside/file"), None),
            (base.join("inside2"), None),
            ("/".into(), None),
            ("".into(), None),
            ("/nul\0".into(), None),
        ] {
            let shown = path.display().to_string();
            let checked = check(path, FileUse::Read);
            assert_eq!(checked.as_ref().ok(), resolved.as_ref(), "{shown}: {checked:?}");
            assert!(checked.is_ok() || checked.is_err_and(|fault| fault.status == StatusCode::FORBIDDEN));
        }
        check(dir.join("snapshots/x"), FileUse::Read).unwrap();
        check(dir.join("images/x"), FileUse::Write).unwrap();
        for own in ["snapshots/x", "snapshots", "lock", "vms.json", ""] {
            check(dir.join(own), FileUse::Write).unwrap_err();
        }
    }

    #[test]
    fn only_known_addresses_are_connected_to() {
        let cold = ["tcp:a:1,b:2", "rdma:c:3", "s3://bucket/some", "https://store/x/"];
        let allowed = allowed(Path::new("/d"), &[], &cold);
        for (text, is_known) in [
            ("tcp:a:1", true),
            ("tcp:b:2,a:1", true),
            ("rdma:c:3", true),
            ("tcp:c:3", false),
            ("tcp:a:1,d:4", false),
            ("tcp:a:11", false),
            ("tcp:", false),
            ("s3://bucket/some", true),
            ("s3://bucket/some/", true),
            ("s3://bucket/some/deeper", true),
            ("s3://bucket/something", false),
            ("s3://bucket/some/../other", false),
            ("s3://bucket", false),
            ("s3://bucket/some?x", false),
            ("https://store/x", true),
            ("http://store/x", false),
        ] {
            assert_eq!(allowed.knows_address(text), is_known, "{text}");
        }
    }
}
