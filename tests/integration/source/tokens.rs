//! Rust code as tokens (words, `::` and single marks), comments, and literals of text.

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Token,
    Comment,
    Literal,
}

/// The pieces of `code` of one kind, in order, each with its offset.
fn pieces(code: &str, kind: Kind) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let comment = comment_len(rest).map(|len| (Kind::Comment, len));
        let literal = || text_len(rest).or_else(|| quoted_len(rest)).map(|len| (Kind::Literal, len));
        let (found_kind, len) = comment.or_else(literal).unwrap_or_else(|| (Kind::Token, token_len(rest, first)));
        if found_kind == kind {
            found.push((code.len() - rest.len(), &rest[..len]));
        }
        rest = rest[len..].trim_start();
    }
    found
}

/// The tokens of `code`, in order. Numbers are words.
pub fn tokens(code: &str) -> Vec<&str> {
    pieces(code, Kind::Token).into_iter().map(|(_, token)| token).collect()
}

/// The comments of `code`, in order, each with its offset.
pub fn comments(code: &str) -> Vec<(usize, &str)> {
    pieces(code, Kind::Comment)
}

pub fn is_word(token: &str) -> bool {
    token.starts_with(is_part_of_word)
}

fn is_part_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn word_len(code: &str) -> usize {
    code.find(|c| !is_part_of_word(c)).unwrap_or(code.len())
}

fn token_len(code: &str, first: char) -> usize {
    if is_part_of_word(first) {
        return word_len(code);
    }
    if code.starts_with("::") { 2 } else { first.len_utf8() }
}

/// The length of the comment at the start of `code`, if one is there. Comments in `/*` may lie within each other.
fn comment_len(code: &str) -> Option<usize> {
    if code.starts_with("//") {
        return Some(code.find('\n').unwrap_or(code.len()));
    }
    if !code.starts_with("/*") {
        return None;
    }
    let mut depth = 0;
    let mut at = 0;
    loop {
        let next = at + code[at..].find(['/', '*'])?;
        match &code[next..code.len().min(next + 2)] {
            "/*" => depth += 1,
            "*/" => depth -= 1,
            _ => {
                at = next + 1;
                continue;
            }
        }
        at = next + 2;
        if depth == 0 {
            return Some(at);
        }
    }
}

/// The length of the string at the start of `code`, if one is there: plain, raw, of bytes or for C.
fn text_len(code: &str) -> Option<usize> {
    let prefix = ["br", "cr", "r", "b", "c", ""].into_iter().find(|prefix| code.starts_with(prefix))?;
    let body = &code[prefix.len()..];
    let hashes = if prefix.ends_with('r') { body.len() - body.trim_start_matches('#').len() } else { 0 };
    let inner = body[hashes..].strip_prefix('"')?;
    let len = if prefix.ends_with('r') {
        let end = format!("\"{}", "#".repeat(hashes));
        inner.find(&end)? + end.len()
    } else {
        end_of(inner, '"')?
    };
    Some(code.len() - inner.len() + len)
}

/// The length of the character or lifetime at the start of `code`, if one is there.
fn quoted_len(code: &str) -> Option<usize> {
    let inner = code.strip_prefix('\'')?;
    let mut chars = inner.chars();
    let is_character = chars.next() == Some('\\') || chars.next() == Some('\'');
    Some(1 + if is_character { end_of(inner, '\'')? } else { word_len(inner) })
}

/// The length of `code` up to and with the first `end` that no backslash escapes.
fn end_of(code: &str, end: char) -> Option<usize> {
    let mut is_escaped = false;
    for (at, c) in code.char_indices() {
        if c == end && !is_escaped {
            return Some(at + c.len_utf8());
        }
        is_escaped = c == '\\' && !is_escaped;
    }
    None
}

#[test]
fn comments_and_literals_are_no_tokens() {
    let code = r####"
        /// crate::a
        use crate::b; // super::c
        /* crate::d /* self::e */ crate::f */
        let text = "crate::g \" crate::h" + r#"crate::i " crate::j"# + b"\\";
        match x { 'a' | '\'' | '"' => crate::k::<'static, _>(b'\\', 'é'), _ => 7 }
    "####;
    let expected = "use crate :: b ; let text = + + ; match x { | | => crate :: k :: < , _ > ( b , ) , _ = > 7 }";
    let expected = expected.replace("=>", "= >").split(' ').map(str::to_string).collect::<Vec<_>>();
    assert_eq!(tokens(code), expected);
}
