//! Linux guests with a shell on their console.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{Vm, scratch, text};

/// A shell on the serial line of a Linux guest.
pub struct Shell {
    pub vm: Vm,
    asked: u32,
    report: PathBuf,
    _dir: tempfile::TempDir,
}

impl Shell {
    pub fn of(args: &[&str]) -> Shell {
        let dir = scratch();
        let report = dir.path().join("report.json");
        let args = [args, &["--report", text(&report)]].concat();
        Shell { vm: Vm::spawn(scratch(), &args), asked: 0, report, _dir: dir }
    }

    pub fn boot(config: &Value) -> Shell {
        let dir = scratch();
        let path = dir.path().join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let mut shell = Shell::of(&["--config", text(&path)]);
        shell.vm.wait_line(|line| line.starts_with("guest: up "));
        shell.wait_ready();
        shell
    }

    pub fn restore(snapshot: &Path, more: &[&str]) -> Shell {
        let mut shell = Shell::of(&[&["restore", "--snapshot", text(snapshot)], more].concat());
        shell.wait_ready();
        shell
    }

    /// Until the shell listens, what is typed may get lost.
    fn wait_ready(&mut self) {
        for _ in 0..60 {
            self.vm.send(b"echo =$((30+9)):\n");
            if self.vm.try_line(|line| line.trim_end() == "=39:", Duration::from_secs(1)).is_some() {
                return;
            }
        }
        panic!("the guest's shell does not answer");
    }

    /// Runs a command and returns what it prints, its lines joined by `~`.
    pub fn ask(&mut self, command: &str) -> String {
        self.asked += 1;
        let id = self.asked;
        let mark = format!("=q{}: ", self.asked);
        // The echo of what is typed has the mark only with quotes in it.
        self.vm.send(format!("echo \"=q\"\"{id}: $({command} 2>&1 | tr '\\n' '~')\"\n").as_bytes());
        let line = self.vm.wait_line(|line| line.starts_with(&mark));
        line[mark.len()..].trim_end().trim_end_matches('~').to_string()
    }

    pub fn ask_number(&mut self, command: &str) -> f64 {
        let answer = self.ask(command);
        answer.parse().unwrap_or_else(|_| panic!("{command}: {answer}"))
    }

    pub fn uptime(&mut self) -> f64 {
        self.ask_number("cut -d' ' -f1 /proc/uptime")
    }

    /// Types a last command and waits for the VM to end well; why the report says it did.
    pub fn end(mut self, command: &str) -> String {
        self.vm.send(format!("{command}\n").as_bytes());
        let (status, stderr) = self.vm.wait();
        assert!(status.success(), "{stderr}");
        let report: Value = serde_json::from_slice(&std::fs::read(&self.report).unwrap()).unwrap();
        report["ending"].as_str().unwrap().to_string()
    }
}
