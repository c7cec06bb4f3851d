//! Errors of preparing, running, recording and reporting on a VM.

use std::io;
use std::path::PathBuf;

use crate::backends;
use crate::backends::pool_media;
use crate::memory;
use crate::snapshot;
use crate::sys::secret_key::SecretKeyError;
use crate::tiering;
use crate::vmm;

/// The one error of the room `session`. Each variant names the action and its object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("The request is to be made over vsock, but the machine has no vsock device")]
    NoVsock,
    #[error("Cannot restore from pools: there is none")]
    NoPool,
    #[error("The machine to repurpose is gone")]
    NoMachine,
    #[error(
        "Cannot stand by: no request can come, because standard input has ended, and there is neither an API socket \
         nor a vsock device. Give --api-sock PATH, keep standard input open, or leave --standby (`tvmm.standby`) out"
    )]
    StandbyForNothing,
    #[error("The run cannot be recorded: {0}")]
    Record(String),
    #[error("The run cannot be recorded: the guest did not answer{0}")]
    NoAnswer(String),
    #[error("Cannot keep plans and working-set images in {path}", path = path.display())]
    PlanDir { path: PathBuf, source: io::Error },
    #[error(transparent)]
    SecretKey(#[from] SecretKeyError),
    #[error(
        "Cannot keep plans and working-set images: those beside a signed snapshot are not signed, and there is no \
         cache directory. Give --plan-dir DIR (`tvmm.plan_dir`), or set HOME"
    )]
    NoPlanDir,
    #[error(
        "Cannot fork the VM: the child for {socket} does not start: {why}. All children were ended",
        socket = socket.display()
    )]
    Child { socket: PathBuf, why: String },
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Otlp(#[from] crate::sys::otlp::Unusable),
    #[error(transparent)]
    Jail(#[from] crate::sys::jail::Error),
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Backends(#[from] backends::Error),
    #[error(transparent)]
    Medium(#[from] pool_media::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    Tiering(#[from] tiering::Error),
}

impl Error {
    pub(super) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}
