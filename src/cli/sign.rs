//! `tvmm snapshot sign` and `tvmm snapshot keygen`: signatures of snapshots, in the format of minisign.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::identify::InputPath;
use crate::snapshot::{Location, SigningKey, Snapshot, make_keys, sign};
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct SignArgs {
    /// The snapshot directory, or with --mem-file the state file of Firecracker's two. A diff's parents are not signed
    /// with it
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    /// A secret key without a password, of `tvmm snapshot keygen` or `minisign -G -W`; default: only write the
    /// statement to be signed, signed.json (`minisign -Sm DIR/signed.json` signs it)
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct KeygenArgs {
    /// The file of the secret key, without a password and for its owner only: it must not exist
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The file of the public key: it must not exist
    #[arg(long = "pub", value_name = "FILE")]
    public: PathBuf,
}

impl SignArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        InputPath::snapshot(&self.snapshot, self.mem_file.as_deref())
    }

    fn location(&self) -> Location {
        match &self.mem_file {
            None => Location::Dir(self.snapshot.clone()),
            Some(memory) => Location::Files { snapshot: self.snapshot.clone(), memory: memory.clone() },
        }
    }
}

pub fn run(args: &SignArgs) -> Result<ExitCode, BoxError> {
    let key = args.key.as_deref().map(SigningKey::read).transpose()?;
    let snapshot = Snapshot::open(&args.location())?;
    let paths = sign(&snapshot, key.as_ref())?;
    let id = snapshot.id();
    if key.is_some() {
        out!("{}", paths.signature.display());
        say!("snapshot {id} signed");
    } else {
        out!("{}", paths.statement.display());
        say!("snapshot {id} is not signed yet: minisign -Sm {}", paths.statement.display());
    }
    if let Some(parent) = snapshot.parent_location() {
        say!("It is a diff: restores that trust only some keys need a signature of {} too", parent.display());
    }
    Ok(ExitCode::SUCCESS)
}

pub fn keygen(args: &KeygenArgs) -> Result<ExitCode, BoxError> {
    make_keys(&args.key, &args.public)?;
    out!("{}", args.public.display());
    Ok(ExitCode::SUCCESS)
}
