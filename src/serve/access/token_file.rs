//! The token file: one token a line, without secrets. It is read at the start, and again at SIGHUP.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use constant_time_eq::constant_time_eq_32;

use super::rate::Rate;
use super::token::{Token, digest};
use crate::snapshot::{self, open_regular};
use crate::sys::own_file::check_private;

/// The largest token file.
const MAX_BYTES: u64 = 1 << 20;

/// The reason why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] snapshot::Error),
    /// It cannot be read to its end.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: std::io::Error,
    },
    /// Other users may read or write it.
    #[error("Cannot use the token file {}: {problem}", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// The defect and its remedy.
        problem: String,
    },
    /// A line is no token.
    #[error("Cannot use the token file {}: line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: usize,
        /// The defect and its remedy.
        problem: String,
    },
}

/// Reads a token file. Lines that are empty or begin with `#` say nothing.
///
/// # Errors
/// Other users have a right to the file, or a line is no token.
pub fn read(path: &Path) -> Result<Vec<Token>, TokenFileError> {
    let (file, len) = open_regular(path)?;
    let failed = |source| TokenFileError::Read { path: path.to_owned(), source };
    let metadata = file.metadata().map_err(failed)?;
    let exposed = |problem: String| TokenFileError::Exposed { path: path.to_owned(), problem };
    check_private(&metadata).map_err(exposed)?;
    if len > MAX_BYTES {
        return Err(exposed(format!("it has {len} bytes, and may have {MAX_BYTES}. Remove tokens that are not used")));
    }
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).map_err(failed)?;
    parse(path, &text)
}

/// Reads the text of a token file; `path` names it in errors.
///
/// # Errors
/// A line is no token, or the same as another.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Token>, TokenFileError> {
    let mut tokens: Vec<Token> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong = |problem: String| TokenFileError::Line { path: path.to_owned(), line: index + 1, problem };
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let token: Token = serde_json::from_str(line).map_err(|error| {
            let text = error.to_string();
            // serde_json appends a position, whose line is always 1 here.
            let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
            wrong(format!("{text} in column {}. `tvmm token new` prints lines as they must be", error.column()))
        })?;
        token.check().map_err(wrong)?;
        if tokens.iter().any(|other| other.name == token.name) {
            return Err(wrong(format!("another token has the name `{}`. Give each its own", token.name)));
        }
        if tokens.iter().any(|other| other.sha256 == token.sha256) {
            return Err(wrong(format!("`{}` has the secret of another token. Make a new one", token.name)));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

/// A token that the service accepts, and its use.
#[derive(Debug)]
pub struct Accepted {
    pub token: Token,
    rate: Option<Rate>,
    running: Arc<AtomicU32>,
}

impl Accepted {
    /// `running`: the count of the same token before the file was read again.
    fn new(token: Token, running: Arc<AtomicU32>) -> Accepted {
        Accepted { rate: token.max_requests_per_s.map(Rate::new), token, running }
    }

    /// Counts a request. Returns the seconds to wait if the token's clients have made as many as they may.
    pub fn over_rate(&self) -> Option<u32> {
        self.rate.as_ref().and_then(Rate::take)
    }

    /// Takes a place for an invocation, or a start of VMs. None: the token's clients have as many as they may.
    pub fn run(&self) -> Option<Running> {
        let most = self.token.max_running.unwrap_or(u32::MAX);
        let running = Running(self.running.clone());
        // The place is given back at once if it was one too many.
        (running.0.fetch_add(1, Ordering::Relaxed) < most).then_some(running)
    }
}

/// The place of an invocation, or a start of VMs, of a token's clients.
#[derive(Debug)]
pub struct Running(Arc<AtomicU32>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The tokens of a service.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    accepted: Mutex<Vec<Arc<Accepted>>>,
}

impl TokenFile {
    pub fn open(path: &Path) -> Result<TokenFile, TokenFileError> {
        let accepted = read(path)?.into_iter().map(|token| Arc::new(Accepted::new(token, Arc::default()))).collect();
        Ok(TokenFile { path: path.to_owned(), accepted: Mutex::new(accepted) })
    }

    /// Reads the file again, and returns the number of its tokens. After an error the former tokens stay accepted.
    /// Blocks for the disk.
    pub fn reload(&self) -> Result<usize, TokenFileError> {
        let tokens = read(&self.path)?;
        let count = tokens.len();
        let mut accepted = self.lock();
        let former = std::mem::take(&mut *accepted);
        for token in tokens {
            let same = former.iter().find(|one| one.token.sha256 == token.sha256);
            let running = same.map(|one| one.running.clone()).unwrap_or_default();
            accepted.push(Arc::new(Accepted::new(token, running)));
        }
        Ok(count)
    }

    /// The token of a secret. The time that this takes does not depend on the secret.
    pub fn find(&self, secret: &[u8]) -> Option<Arc<Accepted>> {
        let sent = digest(secret);
        let mut found = None;
        for one in self.lock().iter() {
            if constant_time_eq_32(&one.token.sha256.0, &sent.0) {
                found = Some(one.clone());
            }
        }
        found
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Accepted>>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::access::role::Role;

    fn problem(text: &str) -> String {
        parse(Path::new("tokens"), text).unwrap_err().to_string()
    }

    #[test]
    fn lines_are_tokens_comments_or_nothing() {
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let line = format!(r#"{{"name":"a","role":"invoke","sha256":"{sha256}","max_requests_per_s":5}}"#);
        let tokens = parse(Path::new("tokens"), &format!("# Robots\n\n{line}\n")).unwrap();
        assert_eq!(tokens.len(), 1);
        assert_eq!(
            (tokens[0].name.as_str(), tokens[0].role, tokens[0].max_requests_per_s),
            ("a", Role::Invoke, Some(5))
        );
        assert_eq!(tokens[0].line(), line);
        for (text, says) in [
            (format!("{line}\n{line}"), "line 2: another token has the name `a`"),
            (format!("{line}\n{}", line.replace("\"a\"", "\"b\"")), "line 2: `b` has the secret of another token"),
            (line.replace("invoke", "root"), "unknown variant `root`"),
            (line.replace("\"a\"", "\"a b\""), "is no name"),
            (line.replace("sha256", "secret"), "unknown field `secret`"),
            (line.replace("ba78", "BA78"), "64 lower-case hexadecimal digits"),
            (line.replace(":5", ":0"), "`max_requests_per_s` is 0"),
            ("tvmm_secret".to_string(), "`tvmm token new` prints"),
        ] {
            assert!(problem(&text).contains(says), "{text}: {}", problem(&text));
        }
    }
}
