//! The stack machine.

use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;

use super::{Code, Function, Operator, Program, Value};
use crate::args::{Message, short};
use crate::message;

/// Deepest nesting of calls.
const DEPTH_MAX: usize = 200;
/// Longest list.
const LIST_MAX: i64 = 1 << 24;

struct Frame<'a> {
    function: &'a Function,
    at: usize,
    locals: usize,
}

impl Program {
    /// Calls a function by its name and runs to its end.
    pub fn call(&self, name: &str, arguments: Vec<Value>) -> Result<Value, Message> {
        let function = self.functions.iter().find(|function| function.name == name);
        let function = function.ok_or_else(|| message!("program: no function {}", short(name)))?;
        if arguments.len() != usize::from(function.parameters) {
            return Err(message!("program: {} takes {} values", short(name), function.parameters));
        }
        let mut machine = Machine { program: self, stack: Vec::new(), locals: arguments, frames: Vec::new() };
        machine.locals.resize(usize::from(function.locals), Value::Number(0));
        machine.run(Frame { function, at: 0, locals: 0 })
    }
}

struct Machine<'a> {
    program: &'a Program,
    stack: Vec<Value>,
    locals: Vec<Value>,
    frames: Vec<Frame<'a>>,
}

impl<'a> Machine<'a> {
    fn run(&mut self, mut frame: Frame<'a>) -> Result<Value, Message> {
        loop {
            let code = frame.function.code[frame.at];
            frame.at += 1;
            match code {
                Code::Push(number) => self.stack.push(Value::Number(number)),
                Code::Load(slot) => self.stack.push(self.locals[frame.locals + usize::from(slot)].clone()),
                Code::Store(slot) => self.locals[frame.locals + usize::from(slot)] = self.pop()?,
                Code::Apply(operator) => {
                    let (right, left) = (self.number()?, self.number()?);
                    self.stack.push(Value::Number(apply(operator, left, right)?));
                }
                Code::Index => {
                    let (index, list) = (self.number()?, self.list()?);
                    let element = usize::try_from(index).ok().and_then(|index| list.borrow().get(index).cloned());
                    self.stack.push(element.ok_or_else(|| message!("program: index {index} is out of range"))?);
                }
                Code::SetIndex => {
                    let (value, index, list) = (self.pop()?, self.number()?, self.list()?);
                    let mut list = list.borrow_mut();
                    let element = usize::try_from(index).ok().and_then(|index| list.get_mut(index));
                    *element.ok_or_else(|| message!("program: index {index} is out of range"))? = value;
                }
                Code::NewList => {
                    let len = self.number()?;
                    if !(0..=LIST_MAX).contains(&len) {
                        return Err(message!("program: a list of {len}"));
                    }
                    self.stack.push(Value::List(Rc::new(RefCell::new(vec![Value::Number(0); len as usize]))));
                }
                Code::Length => {
                    let len = self.list()?.borrow().len();
                    self.stack.push(Value::Number(len as i64));
                }
                Code::Jump(to) => frame.at = to as usize,
                Code::JumpIfZero(to) => {
                    if self.number()? == 0 {
                        frame.at = to as usize;
                    }
                }
                Code::Call(index) => frame = self.enter(&self.program.functions[usize::from(index)], frame)?,
                Code::Return => {
                    self.locals.truncate(frame.locals);
                    match self.frames.pop() {
                        Some(caller) => frame = caller,
                        None => return self.pop(),
                    }
                }
                Code::Pop => drop(self.pop()?),
            }
        }
    }

    fn enter(&mut self, function: &'a Function, caller: Frame<'a>) -> Result<Frame<'a>, Message> {
        if self.frames.len() == DEPTH_MAX {
            return Err(message!("program: calls are too deep"));
        }
        let first = self.stack.len().checked_sub(usize::from(function.parameters));
        let first = first.ok_or_else(|| message!("program: {} lacks values", short(&function.name)))?;
        let locals = self.locals.len();
        self.locals.extend(self.stack.drain(first..));
        self.locals.resize(locals + usize::from(function.locals), Value::Number(0));
        self.frames.push(caller);
        Ok(Frame { function, at: 0, locals })
    }

    fn pop(&mut self) -> Result<Value, Message> {
        self.stack.pop().ok_or_else(|| message!("program: a value is missing"))
    }

    fn number(&mut self) -> Result<i64, Message> {
        match self.pop()? {
            Value::Number(number) => Ok(number),
            Value::List(_) => Err(message!("program: a list is no number")),
        }
    }

    fn list(&mut self) -> Result<Rc<RefCell<Vec<Value>>>, Message> {
        match self.pop()? {
            Value::List(list) => Ok(list),
            Value::Number(_) => Err(message!("program: a number is no list")),
        }
    }
}

fn apply(operator: Operator, left: i64, right: i64) -> Result<i64, Message> {
    Ok(match operator {
        Operator::Or => left | right,
        Operator::Xor => left ^ right,
        Operator::And => left & right,
        Operator::Less => i64::from(left < right),
        Operator::Equal => i64::from(left == right),
        Operator::ShiftLeft => left.wrapping_shl(right as u32),
        Operator::ShiftRight => left.wrapping_shr(right as u32),
        Operator::Add => left.wrapping_add(right),
        Operator::Subtract => left.wrapping_sub(right),
        Operator::Multiply => left.wrapping_mul(right),
        Operator::Remainder => left.checked_rem(right).ok_or_else(|| message!("program: remainder of 0"))?,
    })
}
