//! Finds the key of a JSON text that a line and column belong to.
//!
//! serde reports the place of a wrong value but, for a wrong type, not its key.

/// One open object or array.
struct Frame {
    /// The key whose value is being read; empty in arrays and before the first key.
    key: String,
    is_object: bool,
    /// True if the next string is a key.
    expects_key: bool,
}

/// The dotted path of the key at a place of `text` (both counted from 1, as serde does). The text may be broken at that
/// place; the parser has accepted the part before it.
pub(crate) fn key_at(text: &str, line: usize, column: usize) -> String {
    let mut frames: Vec<Frame> = Vec::new();
    let mut string: Option<Vec<u8>> = None;
    let mut escaped = false;
    for &byte in &text.as_bytes()[..offset(text, line, column)] {
        if let Some(content) = &mut string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    if let Some(frame) = frames.last_mut().filter(|frame| frame.expects_key) {
                        frame.key = String::from_utf8_lossy(content).into_owned();
                        frame.expects_key = false;
                    }
                    string = None;
                    continue;
                }
                _ => {}
            }
            content.push(byte);
            continue;
        }
        match byte {
            b'"' => string = Some(Vec::new()),
            b'{' => frames.push(Frame { key: String::new(), is_object: true, expects_key: true }),
            b'[' => frames.push(Frame { key: String::new(), is_object: false, expects_key: false }),
            b'}' | b']' => drop(frames.pop()),
            b',' => {
                if let Some(frame) = frames.last_mut() {
                    frame.expects_key = frame.is_object;
                }
            }
            _ => {}
        }
    }
    let keys: Vec<&str> = frames.iter().map(|frame| frame.key.as_str()).filter(|key| !key.is_empty()).collect();
    if keys.is_empty() { "the top level".to_owned() } else { keys.join(".") }
}

/// The byte offset just past a place of `text`.
fn offset(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    before.saturating_add(column).min(text.len())
}
