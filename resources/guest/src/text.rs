//! Text in a fixed buffer: this kernel has no heap for strings.

use core::fmt;

/// A string of at most `N` bytes. Writing more cuts the text off at the last whole character and
/// is not an error, so that formatting a message never fails.
#[derive(Clone, Copy)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: u16,
    cut: bool,
}

impl<const N: usize> Text<N> {
    pub const fn new() -> Self {
        Self { bytes: [0; N], len: 0, cut: false }
    }

    /// Formats `args` into a new text.
    pub fn of(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self::new();
        // Cannot fail: write_str below never returns an error.
        let _ = fmt::write(&mut text, args);
        text
    }

    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or("")
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        if self.cut {
            return Ok(());
        }
        let start = usize::from(self.len);
        let mut take = s.len().min(N - start);
        self.cut = take < s.len();
        while !s.is_char_boundary(take) {
            take -= 1;
        }
        self.bytes[start..start + take].copy_from_slice(&s.as_bytes()[..take]);
        self.len += take as u16; // at most N
        Ok(())
    }
}

impl<const N: usize> PartialEq for Text<N> {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl<const N: usize> Eq for Text<N> {}

impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn text_longer_than_the_buffer_is_cut_at_a_character() {
        let mut t = Text::<4>::new();
        write!(t, "abc\u{e9}d").unwrap();
        assert_eq!(t.as_str(), "abc");
        write!(t, "x").unwrap();
        assert_eq!(t.as_str(), "abc");
    }

    #[test]
    fn text_that_fits_is_kept() {
        assert_eq!(Text::<8>::of(format_args!("{}-{}", 12, 34)).as_str(), "12-34");
    }
}
