//! `tvmm snapshot encrypt`: an encrypted copy of a snapshot.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::identify::{InputPath, Role};
use super::merge::bytes_bar;
use crate::snapshot::{
    Chain, Durability, ENCRYPTED_MEMORY, KeySource, Location, PAGE_SIZE, PartialDir, encrypt_files, sweep,
};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::secret_key;
use crate::tiering::cold::store::{Manifest, Store};
use crate::tiering::cold::{DEFAULT_BANDWIDTH_MBPS, DEFAULT_CHUNK_PAGES};

#[derive(Debug, Args)]
pub struct EncryptArgs {
    /// The snapshot: a directory with a full snapshot
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    /// The key: a file of mode 0600 with 64 hexadecimal digits (`openssl rand -hex 32`), or command:CMD, which prints
    /// them
    #[arg(long, value_name = "KEY")]
    key: KeySource,
    /// The directory to make: it must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl EncryptArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        vec![InputPath::new(&self.snapshot, Role::Snapshot)]
    }
}

pub fn run(args: &EncryptArgs) -> Result<ExitCode, BoxError> {
    // Found at the end as well, after all the work.
    if args.out.symlink_metadata().is_ok() {
        return refuse(format!("Cannot make {}: it already exists. Name another directory", args.out.display()));
    }
    let key = secret_key::read(&args.key)?;
    let chain = Chain::open(&Location::Dir(args.snapshot.clone()))?;
    let beside = args.out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sweep(beside);
    let partial = PartialDir::create(beside)?;
    encrypt_files(chain.tip(), &key, partial.path())?;
    let chunk_kib = DEFAULT_CHUNK_PAGES * PAGE_SIZE / 1024;
    let store =
        Store::create(&partial.path().join(ENCRYPTED_MEMORY), Manifest::new(chunk_kib, DEFAULT_BANDWIDTH_MBPS)?)?;
    let bar = bytes_bar("encrypting");
    let packed = store.add(&chain, None, Some(key), &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    partial.publish(&args.out, Durability::Synced)?;
    out!("{}", args.out.display());
    say!(
        "snapshot {} encrypted: {} pages in {} chunks",
        chain.tip().id(),
        packed.index.pages(),
        packed.index.chunks().len()
    );
    Ok(ExitCode::SUCCESS)
}
