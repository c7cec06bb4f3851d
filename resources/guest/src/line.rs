//! From bytes on the serial line to lines.

/// Longest line that is looked at, without its end.
pub const LINE_MAX: usize = 1024;

/// The reason why a line is refused unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// More than [`LINE_MAX`] bytes.
    TooLong,
    /// A byte that is not printable ASCII.
    BadByte,
    /// The UART lost or damaged a byte (overrun, parity, framing, break).
    Receiver,
}

impl Fault {
    pub fn message(self) -> &'static str {
        match self {
            Self::TooLong => "line is longer than 1024 bytes",
            Self::BadByte => "line has bytes that are not printable ASCII",
            Self::Receiver => "receiver error: bytes were lost",
        }
    }
}

/// Collects one line at a time; a faulty one is consumed to its newline.
#[derive(Debug)]
pub struct LineReader {
    bytes: [u8; LINE_MAX + 1],
    len: usize,
    fault: Option<Fault>,
    complete: bool,
}

impl LineReader {
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_MAX + 1], len: 0, fault: None, complete: false }
    }

    /// Takes a byte; true when it ended a line, which is then in [`Self::line`] until the next push.
    pub fn push(&mut self, byte: u8) -> bool {
        if self.complete {
            self.len = 0;
            self.fault = None;
            self.complete = false;
        }
        if byte == b'\n' {
            if self.len > 0 && self.bytes[self.len - 1] == b'\r' {
                self.len -= 1;
            }
            self.check();
            self.complete = true;
        } else if self.len < self.bytes.len() {
            // One byte more than a line may have: the carriage return before the newline.
            self.bytes[self.len] = byte;
            self.len += 1;
        } else {
            self.fault.get_or_insert(Fault::TooLong);
        }
        self.complete
    }

    /// Marks the line that is being received as damaged.
    pub fn damage(&mut self) {
        if !self.complete {
            self.fault = Some(Fault::Receiver);
        }
    }

    /// The line, or its fault with the part before the first bad byte (for its id).
    pub fn line(&self) -> Result<&str, (Fault, &str)> {
        let bytes = &self.bytes[..self.len.min(LINE_MAX)];
        let good = bytes.iter().position(|b| !is_printable(*b)).unwrap_or(bytes.len());
        let text = core::str::from_utf8(&bytes[..good]).unwrap_or("");
        self.fault.map_or(Ok(text), |fault| Err((fault, text)))
    }

    fn check(&mut self) {
        if self.fault.is_some() {
            return;
        }
        if self.len > LINE_MAX {
            self.fault = Some(Fault::TooLong);
        } else if !self.bytes[..self.len].iter().all(|b| is_printable(*b)) {
            self.fault = Some(Fault::BadByte);
        }
    }
}

fn is_printable(byte: u8) -> bool {
    (b' '..=b'~').contains(&byte)
}

impl Default for LineReader {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(input: &[u8]) -> Vec<Result<String, Fault>> {
        let mut r = LineReader::new();
        let mut out = vec![];
        for b in input {
            if r.push(*b) {
                out.push(r.line().map(str::to_string).map_err(|e| e.0));
            }
        }
        out
    }

    #[test]
    fn several_lines_and_both_line_ends() {
        let got = lines(b"one\r\n\ntwo words\nrest");
        assert_eq!(got, [Ok("one".into()), Ok("".into()), Ok("two words".into())]);
    }

    #[test]
    fn control_characters_make_a_bad_line_and_the_next_one_is_fine() {
        for bad in [&b"a\tb\n"[..], b"\0\n", b"a\rb\n", b"\xc3\xa9\n", b"\x7f\n", b"a\r\r\n"] {
            let got = lines(&[bad, b"ok\n"].concat());
            assert_eq!(got, [Err(Fault::BadByte), Ok("ok".into())], "{bad:?}");
        }
    }

    #[test]
    fn line_of_1024_is_read_and_1025_refused() {
        let fits = [vec![b'x'; 1024], b"\r\nok\n".to_vec()].concat();
        assert_eq!(lines(&fits)[0].as_ref().unwrap().len(), 1024);
        for n in [1025, 1026, 5000] {
            let long = [vec![b'x'; n], b"\nok\n".to_vec()].concat();
            assert_eq!(lines(&long), [Err(Fault::TooLong), Ok("ok".into())], "{n}");
        }
    }

    #[test]
    fn damaged_line_is_refused_with_its_readable_beginning() {
        let mut r = LineReader::new();
        b"run a7 he".iter().for_each(|b| assert!(!r.push(*b)));
        r.damage();
        assert!(r.push(b'\n'));
        assert_eq!(r.line(), Err((Fault::Receiver, "run a7 he")));
        b"x\n".iter().for_each(|b| assert_eq!(r.push(*b), *b == b'\n'));
        assert_eq!(r.line(), Ok("x"));
    }
}
