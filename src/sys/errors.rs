//! Errors on their way to the user: makes one text of an error and its causes.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// Any room's error on its way to the user.
pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

/// The refusal of a user's request, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refusal(String);

pub(crate) fn refuse<T>(what: impl Into<String>) -> Result<T, BoxError> {
    Err(Box::new(Refusal(what.into())))
}

/// An error and its causes in one line, each said once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let sentence = error.to_string();
        if !text.ends_with(&sentence) {
            text = format!("{}: {sentence}", text.trim_end_matches('.'));
        }
        cause = error.source();
    }
    text
}

/// True if an error, or one of its causes, says that a disk is full or a quota is used up.
pub(crate) fn is_storage_full(error: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&error| error.source()).any(|error| {
        let io = error.downcast_ref::<io::Error>().map(io::Error::kind);
        let errno = error.downcast_ref::<Errno>().copied();
        matches!(io, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
            || matches!(errno, Some(Errno::NOSPC | Errno::DQUOT))
    })
}
