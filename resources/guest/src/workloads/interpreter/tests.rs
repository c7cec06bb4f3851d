use super::*;

fn number(source: &str) -> i64 {
    match compile(source).unwrap().call("main", Vec::new()).unwrap() {
        Value::Number(number) => number,
        Value::List(_) => panic!("a list"),
    }
}

fn error(source: &str) -> String {
    match compile(source) {
        Err(error) => error.as_str().to_string(),
        Ok(program) => program.call("main", Vec::new()).unwrap_err().as_str().to_string(),
    }
}

#[test]
fn operators_bind_as_documented() {
    assert_eq!(number("fn main() { return 2 + 3 * 4 % 5; }"), 4);
    assert_eq!(number("fn main() { return 1 | 6 ^ 3 & 2 < 5; }"), 1 | (6 ^ (3 & 1)));
    assert_eq!(number("fn main() { return (1 << 4 >> 2) == 4; }"), 1);
    assert_eq!(number("fn main() { return 10 - 3 - 2; }"), 5);
}

#[test]
fn loops_choices_calls_and_lists_work() {
    let fibonacci = "fn main() { return fib(15); } fn fib(n) { if n < 2 { return n; } return fib(n-1) + fib(n-2); }";
    assert_eq!(number(fibonacci), 610);
    let sieve = "fn main() {
        s = list(100); i = 2; found = 0;   # primes below 100
        while i < 100 {
            if s[i] == 0 { found = found + 1; j = i * i; while j < 100 { s[j] = 1; j = j + i; } } else { s[i] = 2; }
            i = i + 1;
        }
        return found * 1000 + len(s);
    }";
    assert_eq!(number(sieve), 25_100);
    let nested = "fn main() { a = list(2); a[1] = list(3); fill(a[1]); return a[1][2]; } fn fill(l) { l[2] = 7; }";
    assert_eq!(number(nested), 7);
}

#[test]
fn broken_programs_are_refused() {
    for (source, part) in [
        ("fn main() { return 1 }", "where ; should be"),
        ("fn main() { return x; }", "no x"),
        ("fn main() { return f(); }", "no function f"),
        ("fn main() { return f(1); } fn f(a, b) { return b; }", "values"),
        ("fn main() { return list(2)[2]; }", "out of range"),
        ("fn main() { return 1 % 0; }", "remainder"),
        ("fn main() { return list(1) + 1; }", "no number"),
        ("fn main() { return 1[0]; }", "no list"),
        ("fn main() { return main(); }", "too deep"),
        ("fn main() {", "too early"),
        ("fn main() { return \u{e9}; }", "bad character"),
    ] {
        let error = error(source);
        assert!(error.contains(part), "{source}: {error}");
    }
}
