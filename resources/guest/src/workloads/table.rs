//! `chameleon`: an HTML table rendered from a template, as FunctionBench's `chameleon`. The template is compiled, then
//! evaluated with names looked up in scopes, and the output is collected piece by piece, as the Python engine does it.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::runtime::Pace;
use crate::args::{Message, short};
use crate::message;

/// FunctionBench's "big table": `{for NAME in NAME}`, `{end}`, `{NAME}`, `{NAME+1}`.
const TEMPLATE: &str = "<table xmlns=\"http://www.w3.org/1999/xhtml\">\n{for row in table}<tr>{for c in row}<td>\
                        <span class=\"column-{c+1}\" title=\"{hint}\">{c+1}</span></td>{end}</tr>\n{end}</table>\n";

/// Columns and rows of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub rows: u64,
    pub columns: u64,
}

impl Shape {
    /// About `cells` cells: as many rows as columns, or half as many.
    pub fn of_cells(cells: u64) -> Self {
        let side = cells.isqrt();
        let rows = if side * side == cells { side } else { (cells / 2).isqrt().max(1) };
        Self { rows, columns: cells / rows }
    }
}

pub const A: Shape = Shape { rows: 100, columns: 300 };
pub const B: Shape = Shape { rows: 200, columns: 200 };

#[derive(Debug)]
enum Node {
    Text(String),
    Value { name: String, plus: i64 },
    Repeat { name: String, over: String, body: Vec<Node> },
}

#[derive(Clone, Debug)]
enum Value {
    Number(i64),
    Text(Rc<str>),
    List(Rc<Vec<Value>>),
}

/// The nodes up to `{end}` or the end of `source`, and the rest of `source` after it.
fn parse(mut source: &str, inner: bool) -> Result<(Vec<Node>, &str), Message> {
    let mut nodes = Vec::new();
    loop {
        let Some((text, rest)) = source.split_once('{') else {
            if inner {
                return Err(message!("template: a loop has no end"));
            }
            nodes.push(Node::Text(source.to_string()));
            return Ok((nodes, ""));
        };
        nodes.push(Node::Text(text.to_string()));
        let (tag, rest) = rest.split_once('}').ok_or_else(|| message!("template: a tag has no end"))?;
        source = rest;
        let words: Vec<&str> = tag.split(' ').collect();
        match *words {
            ["end"] if inner => return Ok((nodes, rest)),
            ["for", name, "in", over] => {
                let (body, rest) = parse(rest, true)?;
                nodes.push(Node::Repeat { name: name.to_string(), over: over.to_string(), body });
                source = rest;
            }
            [name] if name != "end" => {
                let (name, plus) = name.split_once('+').unwrap_or((name, "0"));
                let plus = plus.parse().map_err(|_| message!("template: {} is no number", short(plus)))?;
                nodes.push(Node::Value { name: name.to_string(), plus });
            }
            _ => return Err(message!("template: bad tag {}", short(tag))),
        }
    }
}

type Scope = BTreeMap<String, Value>;

fn look_up(scope: &Scope, name: &str) -> Result<Value, Message> {
    scope.get(name).cloned().ok_or_else(|| message!("template: no {}", short(name)))
}

fn evaluate(
    nodes: &[Node],
    scope: &mut Scope,
    out: &mut Vec<String>,
    step: &mut dyn FnMut(u64, u64),
) -> Result<(), Message> {
    for node in nodes {
        match node {
            Node::Text(text) => out.push(text.clone()),
            Node::Value { name, plus } => out.push(match look_up(scope, name)? {
                Value::Number(number) => format!("{}", number + plus),
                Value::Text(text) => escape(&text),
                Value::List(_) => return Err(message!("template: {} is a list", short(name))),
            }),
            Node::Repeat { name, over, body } => {
                let Value::List(items) = look_up(scope, over)? else {
                    return Err(message!("template: {} is no list", short(over)));
                };
                for (index, item) in items.iter().enumerate() {
                    scope.insert(name.clone(), item.clone());
                    evaluate(body, scope, out, &mut |_, _| ())?;
                    step(index as u64 + 1, items.len() as u64);
                }
                scope.remove(name);
            }
        }
    }
    Ok(())
}

fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

/// The table as HTML.
pub fn render(shape: Shape, pace: &mut Pace) -> Result<String, Message> {
    let (nodes, _) = parse(TEMPLATE, false)?;
    let row = |row: u64| Value::List(Rc::new((0..shape.columns).map(|c| Value::Number((row + c) as i64)).collect()));
    let table = Value::List(Rc::new((0..shape.rows).map(row).collect()));
    let hint = Value::Text("\"row\" & <column>".into());
    let mut scope = Scope::from([("table".to_string(), table), ("hint".to_string(), hint)]);
    let mut pieces = Vec::new();
    evaluate(&nodes, &mut scope, &mut pieces, &mut |done, total| pace.at(done, total))?;
    Ok(pieces.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::runtime::Touches;

    #[test]
    fn table_equals_the_output_of_nested_loops() {
        let shape = Shape { rows: 3, columns: 4 };
        let mut pace = Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0);
        let mut expected = String::from("<table xmlns=\"http://www.w3.org/1999/xhtml\">\n");
        for row in 0..3 {
            expected += "<tr>";
            for column in 0..4 {
                let n = row + column + 1;
                expected += &format!(
                    "<td><span class=\"column-{n}\" title=\"&quot;row&quot; &amp; &lt;column&gt;\">{n}</span></td>"
                );
            }
            expected += "</tr>\n";
        }
        assert_eq!(render(shape, &mut pace).unwrap(), expected + "</table>\n");
    }

    #[test]
    fn shapes_of_cells_are_those_of_faasnap() {
        let shapes = [10_000, 20_000, 40_000, 80_000, 160_000].map(Shape::of_cells);
        let sides = shapes.map(|shape| (shape.rows, shape.columns));
        assert_eq!(sides, [(100, 100), (100, 200), (200, 200), (200, 400), (400, 400)]);
        assert_eq!(Shape::of_cells(1), Shape { rows: 1, columns: 1 });
    }

    #[test]
    fn broken_templates_are_refused() {
        for source in ["{for a in b}", "{end}", "{a", "{for a b}", "{a+x}"] {
            assert!(parse(source, false).is_err(), "{source}");
        }
        let (nodes, _) = parse("{missing}", false).unwrap();
        assert!(evaluate(&nodes, &mut Scope::new(), &mut Vec::new(), &mut |_, _| ()).is_err());
    }
}
