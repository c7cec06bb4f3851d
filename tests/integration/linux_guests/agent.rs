//! The agent of Linux guests, built and run here, on its standard input and output instead of a vsock port.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::skip::skip;
use crate::support::{Answer, scratch};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The agent: built here, or `TVMM_AGENT` where it cannot be. Static, so that it runs in any guest.
pub fn agent() -> PathBuf {
    if let Some(path) = std::env::var_os("TVMM_AGENT") {
        return path.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/agent");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("agent");
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--manifest-path"]).arg(root.join("Cargo.toml"));
    build
        .arg("--target-dir")
        .arg(&target)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    build.args(["--target", TARGET]);
    assert!(build.status().unwrap().success(), "the agent builds");
    target.join(TARGET).join("debug/tvmm-agent")
}

/// Returns the agent's answers to these lines, without its greeting.
fn answers(functions: &Path, lines: &str) -> Vec<String> {
    let mut command = Command::new(agent());
    command.arg("--console").arg("--functions").arg(functions);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().map(str::to_string);
    assert!(lines.next().unwrap().starts_with("ready "), "{text}");
    lines.collect()
}

fn program(dir: &Path, name: &str, script: &str) {
    let path = dir.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn agent_answers_as_the_tiny_guest_does_and_runs_programs() {
    let dir = scratch();
    program(dir.path(), "args", "echo some output; echo count=$# first=$1");
    program(dir.path(), "plain", "printf hello");
    program(dir.path(), "fails", "echo why not >&2; exit 3");
    program(dir.path(), "endless", "yes");
    std::fs::write(dir.path().join("data"), "not executable").unwrap();
    let lines = [
        "run 1 hello",
        "run 2 info",
        "run 3 args a=1 b=2",
        "run 4 plain",
        "run 5 fails",
        "run 6 endless",
        "run 7 data",
        "run 8 ../../bin/sh",
        "",
        "walk 9",
        "run 10 args novalue",
        "run 11 \u{e9}",
    ];
    let said = answers(dir.path(), &format!("{}\n", lines.join("\n")));
    assert!(said[0].starts_with("ok 1 a0ac0ed9675fab36 "), "{said:?}");
    assert!(said[1].contains(" kernel=") && said[1].ends_with("functions=args,data,endless,fails,plain"), "{said:?}");
    let answer = Answer::parse(&said[2]);
    assert_eq!((answer.value("count"), answer.value("first")), ("2", "a=1"));
    assert!(said[3].ends_with(" bytes=5"), "{said:?}");
    assert_eq!(said[4], "err 5 exit status: 3: why not");
    assert_eq!(said[5], "err 6 the output is longer than 1 MiB");
    assert!(said[6].starts_with("err 7 cannot run "), "{said:?}");
    assert_eq!(said[7], "err 8 unknown function '../../bin/sh'");
    assert_eq!(said[8], "err - unknown command 'walk' (expected run)");
    assert_eq!(said[9], "err 10 'novalue' is not key=value");
    assert!(said[10].starts_with("err 11 line has bytes"), "{said:?}");
    assert_eq!(said.len(), 11);
}

#[test]
fn agent_keeps_python_modules_warm() {
    if !Command::new("python3").arg("-c").arg("").status().is_ok_and(|status| status.success()) {
        skip!("python", "there is no python3");
        return;
    }
    let dir = scratch();
    let module = "calls = 0\ndef run(arguments):\n    global calls\n    calls += 1\n    print('noise')\n    \
                  return b'hello', {'calls': calls, 'half': int(arguments['x']) / 2}\n";
    std::fs::write(dir.path().join("count.py"), module).unwrap();
    std::fs::write(dir.path().join("broken.py"), "import no_such_module\n").unwrap();
    let said =
        answers(dir.path(), "run 1 count x=1\nrun 2 count x=6\nrun 3 count x=no\nrun 4 broken\nrun 5 count x=2\n");
    for (index, (calls, half)) in [(0, ("1", "0.5")), (1, ("2", "3.0")), (4, ("4", "1.0"))] {
        let answer = Answer::parse(&said[index]);
        assert_eq!((answer.value("calls"), answer.value("half")), (calls, half), "{said:?}");
        assert_eq!(answer.digest, "a7b6eda801e5347d", "BLAKE2b of 8 bytes");
    }
    assert!(said[2].starts_with("err 3 ValueError: invalid literal"), "{said:?}");
    assert!(said[3].starts_with("err 4 the handler's process has ended"), "{said:?}");
}
