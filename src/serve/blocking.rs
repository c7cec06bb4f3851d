//! Work that may block: it runs on a thread for that, so that requests do not wait for a disk.

use super::fault::Fault;

/// Runs work that may block on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Fault::internal("The work was given up."))
}
