//! Words to bytecode, by recursive descent.

use alloc::string::ToString;
use alloc::vec::Vec;

use super::lex::{Word, words};
use super::{Code, Function, Operator, Program};
use crate::args::{Message, short};
use crate::message;

/// Operators from the loosest level to the tightest.
const LEVELS: &[&[(&str, Operator)]] = &[
    &[("|", Operator::Or)],
    &[("^", Operator::Xor)],
    &[("&", Operator::And)],
    &[("<", Operator::Less), ("==", Operator::Equal)],
    &[("<<", Operator::ShiftLeft), (">>", Operator::ShiftRight)],
    &[("+", Operator::Add), ("-", Operator::Subtract)],
    &[("*", Operator::Multiply), ("%", Operator::Remainder)],
];

/// Compiles a program. A function may call itself and those after it.
pub fn compile(source: &str) -> Result<Program, Message> {
    let words = words(source)?;
    // First the functions that can be called.
    let mut known = Vec::new();
    for (at, pair) in words.windows(2).enumerate() {
        if let [Word::Name("fn"), Word::Name(name)] = pair {
            let parameters = words[at + 2..].iter().take_while(|word| **word != Word::Sign(")"));
            known.push((*name, parameters.filter(|word| matches!(word, Word::Name(_))).count()));
        }
    }
    let mut compiler = Compiler { words: &words, at: 0, known: &known, locals: Vec::new(), code: Vec::new() };
    let mut functions = Vec::new();
    while compiler.at < words.len() {
        functions.push(compiler.function()?);
    }
    Ok(Program { functions })
}

struct Compiler<'a> {
    words: &'a [Word<'a>],
    at: usize,
    /// Names and their numbers of parameters.
    known: &'a [(&'a str, usize)],
    locals: Vec<&'a str>,
    code: Vec<Code>,
}

impl<'a> Compiler<'a> {
    fn peek(&self) -> Option<Word<'a>> {
        self.words.get(self.at).copied()
    }

    fn next(&mut self) -> Result<Word<'a>, Message> {
        let word = self.peek().ok_or_else(|| message!("program: it ends too early"))?;
        self.at += 1;
        Ok(word)
    }

    /// Takes `word` if it comes next; returns whether it did.
    fn take(&mut self, word: Word) -> bool {
        let found = self.peek() == Some(word);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: &str) -> Result<(), Message> {
        match self.next()? {
            Word::Sign(found) if found == sign => Ok(()),
            found => Err(message!("program: {found:?} where {sign} should be")),
        }
    }

    fn name(&mut self) -> Result<&'a str, Message> {
        match self.next()? {
            Word::Name(name) => Ok(name),
            found => Err(message!("program: {found:?} where a name should be")),
        }
    }

    fn function(&mut self) -> Result<Function, Message> {
        if self.name()? != "fn" {
            return Err(message!("program: a function begins with fn"));
        }
        let name = self.name()?;
        self.locals.clear();
        self.expect("(")?;
        while !self.take(Word::Sign(")")) {
            let parameter = self.name()?;
            self.locals.push(parameter);
            self.take(Word::Sign(","));
        }
        let parameters = self.locals.len() as u16;
        self.block()?;
        // A function without a value is 0.
        self.code.extend([Code::Push(0), Code::Return]);
        let code = core::mem::take(&mut self.code);
        Ok(Function { name: name.to_string(), parameters, locals: self.locals.len() as u16, code })
    }

    fn block(&mut self) -> Result<(), Message> {
        self.expect("{")?;
        while !self.take(Word::Sign("}")) {
            self.statement()?;
        }
        Ok(())
    }

    fn statement(&mut self) -> Result<(), Message> {
        match self.peek() {
            Some(Word::Name("while")) => self.repeat(),
            Some(Word::Name("if")) => self.choose(),
            Some(Word::Name("return")) => {
                self.at += 1;
                self.expression(0)?;
                self.code.push(Code::Return);
                self.expect(";")
            }
            _ => self.assign_or_call(),
        }
    }

    fn repeat(&mut self) -> Result<(), Message> {
        self.at += 1;
        let start = self.code.len() as u32;
        self.expression(0)?;
        let exit = self.jump_if_zero();
        self.block()?;
        self.code.push(Code::Jump(start));
        self.land(exit);
        Ok(())
    }

    fn choose(&mut self) -> Result<(), Message> {
        self.at += 1;
        self.expression(0)?;
        let skip = self.jump_if_zero();
        self.block()?;
        if self.take(Word::Name("else")) {
            let end = self.code.len();
            self.code.push(Code::Jump(0));
            self.land(skip);
            self.block()?;
            self.code[end] = Code::Jump(self.code.len() as u32);
        } else {
            self.land(skip);
        }
        Ok(())
    }

    fn jump_if_zero(&mut self) -> usize {
        self.code.push(Code::JumpIfZero(0));
        self.code.len() - 1
    }

    fn land(&mut self, jump: usize) {
        self.code[jump] = Code::JumpIfZero(self.code.len() as u32);
    }

    fn assign_or_call(&mut self) -> Result<(), Message> {
        let name = self.name()?;
        match self.next()? {
            Word::Sign("(") => {
                self.call(name)?;
                self.code.push(Code::Pop);
            }
            Word::Sign("=") => {
                self.expression(0)?;
                let slot = self.local(name).unwrap_or_else(|| {
                    self.locals.push(name);
                    self.locals.len() as u16 - 1
                });
                self.code.push(Code::Store(slot));
            }
            Word::Sign("[") => {
                self.load(name)?;
                self.expression(0)?;
                self.expect("]")?;
                self.expect("=")?;
                self.expression(0)?;
                self.code.push(Code::SetIndex);
            }
            found => return Err(message!("program: {found:?} after {}", short(name))),
        }
        self.expect(";")
    }

    fn local(&self, name: &str) -> Option<u16> {
        self.locals.iter().position(|local| *local == name).map(|slot| slot as u16)
    }

    fn load(&mut self, name: &str) -> Result<(), Message> {
        let slot = self.local(name).ok_or_else(|| message!("program: no {}", short(name)))?;
        self.code.push(Code::Load(slot));
        Ok(())
    }

    fn expression(&mut self, level: usize) -> Result<(), Message> {
        let Some(operators) = LEVELS.get(level) else {
            return self.operand();
        };
        self.expression(level + 1)?;
        while let Some(Word::Sign(sign)) = self.peek()
            && let Some((_, operator)) = operators.iter().find(|(name, _)| *name == sign)
        {
            self.at += 1;
            self.expression(level + 1)?;
            self.code.push(Code::Apply(*operator));
        }
        Ok(())
    }

    fn operand(&mut self) -> Result<(), Message> {
        match self.next()? {
            Word::Number(number) => self.code.push(Code::Push(number)),
            Word::Sign("(") => {
                self.expression(0)?;
                self.expect(")")?;
            }
            Word::Name(name) if self.take(Word::Sign("(")) => self.call(name)?,
            Word::Name(name) => self.load(name)?,
            found => return Err(message!("program: {found:?} where a value should be")),
        }
        while self.take(Word::Sign("[")) {
            self.expression(0)?;
            self.expect("]")?;
            self.code.push(Code::Index);
        }
        Ok(())
    }

    /// The arguments and the call itself; the opening bracket is taken already.
    fn call(&mut self, name: &str) -> Result<(), Message> {
        let mut count = 0;
        while !self.take(Word::Sign(")")) {
            self.expression(0)?;
            count += 1;
            self.take(Word::Sign(","));
        }
        let code = match (name, count) {
            ("list", 1) => Code::NewList,
            ("len", 1) => Code::Length,
            _ => {
                let index = self.known.iter().position(|known| *known == (name, count));
                let missing = || message!("program: no function {} of {count} values", short(name));
                Code::Call(index.ok_or_else(missing)? as u16)
            }
        };
        self.code.push(code);
        Ok(())
    }
}
