//! The arrows between the files of the source: an arrow goes from a file to each file whose items it names.
//!
//! Paths are read in `use` declarations and in the code. A name that a module only exports again leads to the file
//! that has the item. Macros by example and their uses are read as any other code.

use std::collections::{BTreeMap, BTreeSet};

use super::tokens::{is_word, tokens};

/// The names of a module and of the modules around it, outermost first; empty for the root of the crate.
pub type Module = Vec<String>;

/// The arrows of each file, with the items that they are for.
pub type Arrows = BTreeMap<Module, BTreeMap<Module, BTreeSet<String>>>;

/// Returns the arrows between `files`: the text of each module that is a file of its own.
pub fn arrows(files: &BTreeMap<Module, String>) -> Arrows {
    let modules: BTreeSet<Module> = files.keys().cloned().collect();
    let named: BTreeMap<&Module, Vec<Named>> =
        files.iter().map(|(module, text)| (module, Reader::read(text, module, &modules))).collect();
    let mut exports = BTreeMap::new();
    for (module, named) in &named {
        for item in named.iter().filter(|item| item.is_exported) {
            let exported = [module.as_slice(), std::slice::from_ref(&item.name)].concat();
            exports.insert(exported, item.path.clone());
        }
    }
    let house = House { modules, exports };
    let mut arrows = Arrows::new();
    for (module, named) in named {
        let found = arrows.entry(module.clone()).or_default();
        for item in named {
            let (home, name) = house.home(item.path);
            if home != *module {
                found.entry(home).or_default().insert(name);
            }
        }
    }
    arrows
}

struct House {
    modules: BTreeSet<Module>,
    /// Items that a module exports again: the path of the exported name, and the path that it stands for.
    exports: BTreeMap<Vec<String>, Vec<String>>,
}

impl House {
    /// Returns the file that has the item of `path`, and the item's name in it.
    fn home(&self, mut path: Vec<String>) -> (Module, String) {
        loop {
            let is_module = |len: &usize| self.modules.contains(&path[..*len]);
            let len = (0..=path.len()).rev().find(is_module).unwrap_or(0);
            let Some(name) = path.get(len) else { return (path, "self".to_string()) };
            match self.exports.get(&path[..=len]) {
                Some(target) if !path.starts_with(target) => path = [target, &path[len + 1..]].concat(),
                _ => {
                    let name = name.clone();
                    path.truncate(len);
                    return (path, name);
                }
            }
        }
    }
}

/// A path that a file names, from the root of the crate.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    path: Vec<String>,
    /// The name by which the file knows it.
    name: String,
    /// Named by a `pub use`.
    is_exported: bool,
}

/// Reads the paths that one file names.
struct Reader<'a> {
    tokens: Vec<&'a str>,
    at: usize,
    /// The module at hand: the file's, or one in braces within it.
    module: Module,
    modules: &'a BTreeSet<Module>,
    /// The depth of braces outside each module in braces.
    outside: Vec<usize>,
    depth: usize,
    found: Vec<Named>,
}

impl Reader<'_> {
    fn read(text: &str, module: &Module, modules: &BTreeSet<Module>) -> Vec<Named> {
        let mut reader = Reader {
            tokens: tokens(text),
            at: 0,
            module: module.clone(),
            modules,
            outside: Vec::new(),
            depth: 0,
            found: Vec::new(),
        };
        while reader.at < reader.tokens.len() {
            reader.step();
        }
        reader.found
    }

    /// The token `ahead` of the one at hand; empty behind the last.
    fn token(&self, ahead: usize) -> &str {
        self.tokens.get(self.at + ahead).copied().unwrap_or_default()
    }

    fn step(&mut self) {
        match self.token(0) {
            "{" => self.depth += 1,
            "}" => self.close(),
            "mod" if self.token(2) == "{" => {
                self.module.push(self.token(1).to_string());
                self.outside.push(self.depth);
                self.at += 1;
            }
            // `use<…>` lists what an `impl` captures.
            "use" if self.token(1) != "<" => {
                let is_exported = self.is_public();
                self.at += 1;
                self.tree(&[], is_exported);
                return;
            }
            word if is_word(word) && self.token(1) == "::" && (self.at == 0 || self.tokens[self.at - 1] != "::") => {
                self.path();
                return;
            }
            _ => {}
        }
        self.at += 1;
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        if self.outside.last() == Some(&self.depth) {
            self.outside.pop();
            self.module.pop();
        }
    }

    /// Returns true if `pub` or `pub(…)` stands before the token at hand.
    fn is_public(&self) -> bool {
        let before = &self.tokens[..self.at];
        match before.last() {
            Some(&")") => {
                before.iter().rposition(|token| *token == "(").is_some_and(|at| before[..at].ends_with(&["pub"]))
            }
            last => last == Some(&"pub"),
        }
    }

    /// Reads one branch of a `use` declaration, up to the mark behind it.
    fn tree(&mut self, prefix: &[String], is_exported: bool) {
        let mut path = prefix.to_vec();
        let mut alias = None;
        loop {
            match self.token(0) {
                "{" => return self.branches(&path, is_exported),
                "," | "}" | ";" | "" => break,
                "::" => {}
                "as" => {
                    alias = Some(self.token(1).to_string());
                    self.at += 1;
                }
                word => path.push(word.to_string()),
            }
            self.at += 1;
        }
        // Nothing stands behind the last comma of a list.
        if path.len() == prefix.len() {
            return;
        }
        if path.len() > 1 && path.ends_with(&["self".to_string()]) {
            path.pop();
        }
        if let Some(name) = alias.or_else(|| path.last().cloned()) {
            self.note(&path, name, is_exported);
        }
    }

    /// Reads the branches in braces, and the braces.
    fn branches(&mut self, prefix: &[String], is_exported: bool) {
        while !["}", ""].contains(&self.token(0)) {
            self.at += 1;
            self.tree(prefix, is_exported);
        }
        self.at += 1;
    }

    /// Reads a path in the code.
    fn path(&mut self) {
        let mut path = vec![self.token(0).to_string()];
        while self.token(1) == "::" && is_word(self.token(2)) {
            path.push(self.token(2).to_string());
            self.at += 2;
        }
        self.at += 1;
        self.note(&path, String::new(), false);
    }

    /// Notes a path if it leads to a module of the crate.
    fn note(&mut self, path: &[String], name: String, is_exported: bool) {
        let mut base = self.module.clone();
        let mut rest = path;
        match path.first().map(String::as_str) {
            Some("crate") => {
                base.clear();
                rest = &rest[1..];
            }
            Some("self") => rest = &rest[1..],
            Some("super") => {
                while let Some((_, behind)) = rest.split_first().filter(|(first, _)| *first == "super") {
                    base.pop();
                    rest = behind;
                }
            }
            Some(word) => {
                base.push(word.to_string());
                if !self.modules.contains(&base) {
                    return;
                }
                rest = &rest[1..];
            }
            None => return,
        }
        base.extend_from_slice(rest);
        self.found.push(Named { path: base, name, is_exported });
    }
}

pub fn module(path: &str) -> Module {
    path.split("::").filter(|name| !name.is_empty()).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The arrows between made-up files, one a line: `from -> to: items`.
    fn lines(files: &[(&str, &str)]) -> Vec<String> {
        let files = files.iter().map(|(path, text)| (module(path), text.to_string())).collect();
        let mut lines = Vec::new();
        for (from, to) in arrows(&files) {
            for (to, items) in to {
                let items: Vec<String> = items.into_iter().collect();
                lines.push(format!("{} -> {}: {}", from.join("::"), to.join("::"), items.join(", ")));
            }
        }
        lines
    }

    #[test]
    fn paths_in_braces_and_from_self_super_and_crate_are_found() {
        let files = [
            ("", "pub mod a; pub mod b;"),
            (
                "a",
                "mod c; use crate::b::{self, X as Y, d::{Deep, Other}}; fn f() -> impl T + use<> { c::g(self::c::H) }",
            ),
            ("a::c", "use std::fs; use super::{f,}; fn g() { super::super::b::z::<u8>(); other::x(); }"),
            ("b", "pub mod d; use self::{d::{In,},};"),
            ("b::d", ""),
        ];
        let expected = [
            "a -> a::c: H, g",
            "a -> b: X, self",
            "a -> b::d: Deep, Other",
            "a::c -> a: f",
            "a::c -> b: z",
            "b -> b::d: In",
        ];
        assert_eq!(lines(&files), expected);
    }

    #[test]
    fn items_that_are_exported_again_are_found_in_their_file() {
        let files = [
            ("", "pub mod a; pub mod b;"),
            ("a", "mod c; mod d; pub use c::{Item, run as start}; pub(crate) use d::Far; use c::Own;"),
            ("a::c", "use super::Far;"),
            ("a::d", ""),
            ("b", "use crate::a::{Item, Own}; pub use crate::a::Far; fn f() { crate::a::start(); }"),
            ("e", "use crate::b::Far;"),
        ];
        let expected = [
            "a -> a::c: Item, Own, run",
            "a -> a::d: Far",
            "a::c -> a::d: Far",
            "b -> a: Own",
            "b -> a::c: Item, run",
            "b -> a::d: Far",
            "e -> a::d: Far",
        ];
        assert_eq!(lines(&files), expected);
    }

    #[test]
    fn modules_in_braces_belong_to_their_file() {
        let files = [
            ("", ""),
            (
                "a",
                "mod tests { use super::*; use super::super::b::X; mod deep { fn f() { super::super::g() } } } \
                 fn g() { self::h() }",
            ),
            ("b", ""),
        ];
        assert_eq!(lines(&files), ["a -> b: X"]);
    }
}
