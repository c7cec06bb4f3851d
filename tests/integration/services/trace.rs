//! `tvmm bench trace`: arrival traces on a real service, and simulated.

use std::fmt::Write;
use std::path::Path;
use std::process::Output;

use serde_json::{Value, json};

use crate::support::{finish, refusal, scratch, text, tvmm};

/// A time that is all work, of an action that was measured once.
fn work(ms: f64) -> Value {
    json!([{ "ms": ms, "cpu_ms": ms }])
}

/// The end of a window, at which a VM gives so many of its 8,000 pages back, as measured once.
fn window(given: u64, mib: f64) -> Value {
    json!({
        "give": work(3.0), "pages": { "given": given, "recalled_ever": 0, "local": 8000 - given, "away": given },
        "mib": mib, "request": work(4.0), "after_mib": mib + 0.5
    })
}

/// The costs of the default workload on an imaginary host with two CPUs.
fn costs() -> Value {
    json!({
        "version": 3, "tvmm_version": "0", "cpus": 2, "shells_mib": 1.0,
        "workloads": { "*": {
            "workload": {
                "mem_mib": 128, "prepare": "fill pages=8192 seed=1", "call": "touch",
                "params": "pages=2048 write=25 seed=1"
            },
            "restored": work(20.0), "repurposed": work(15.0), "warm": work(2.0), "standby": work(6.0),
            "rewound": work(3.0), "rewind": work(2.0), "end": work(5.0), "gone": work(3.0),
            "kept": { "vacate": work(3.0), "mib": 1.0 },
            "trimmed": { "request": work(4.0), "step": work(3.0), "mib": 5.0, "after_mib": 8.0 },
            "spilled": { "request": work(9.0), "step": work(8.0), "mib": 2.0, "after_mib": 7.0 },
            "woken": work(25.0), "suspend": [{ "ms": 30.0, "cpu_ms": 10.0 }],
            "windows": [window(5000, 6.0), window(100, 5.5)], "starting_mib": 6.0,
            "used_mib": 12.0, "standby_mib": 4.0, "rewound_mib": 10.0, "reused_mib": 12.0, "woken_mib": 9.0
        } }
    })
}

/// Runs `tvmm bench trace` with its temporary files in `dir`, and checks that it leaves none, and no process.
fn trace(dir: &Path, args: &[&str]) -> Output {
    let temporary = dir.join("temporary");
    std::fs::create_dir_all(&temporary).unwrap();
    let output = finish(tvmm().args(["bench", "trace"]).args(args).env("TMPDIR", &temporary));
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0, "files for temporary use are removed");
    for entry in std::fs::read_dir("/proc").unwrap() {
        // A process may end while it is looked at.
        let command = std::fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&command).contains(text(dir)), "a process is left");
    }
    output
}

/// Simulates with the imaginary costs; returns the summaries.
fn simulated(dir: &Path, args: &[&str]) -> Vec<Value> {
    let costs_path = dir.join("costs-of-the-test.json");
    std::fs::write(&costs_path, costs().to_string()).unwrap();
    let out = dir.join("out");
    let more = ["--simulate", "--costs", text(&costs_path), "--out", text(&out)];
    let output = trace(dir, &[args, &more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    summaries(&out)
}

fn summaries(out: &Path) -> Vec<Value> {
    let summary: Value = serde_json::from_slice(&std::fs::read(out.join("summary.json")).unwrap()).unwrap();
    summary["policies"].as_array().unwrap().clone()
}

fn of<'a>(summaries: &'a [Value], policy: &str, is_simulated: bool) -> &'a Value {
    let is_it = |summary: &&Value| summary["policy"] == policy && summary["simulated"] == is_simulated;
    summaries.iter().find(is_it).unwrap_or_else(|| panic!("no {policy} in {summaries:?}"))
}

const WAYS: [&str; 7] = ["warm", "trimmed", "spilled", "woken", "standby", "rewound", "restored"];

/// The answered requests, by all ways.
fn answered(summary: &Value) -> f64 {
    WAYS.iter().map(|way| number(summary, way)).sum()
}

fn number(summary: &Value, name: &str) -> f64 {
    summary[name].as_f64().unwrap_or_else(|| panic!("no {name} in {summary}"))
}

#[test]
fn what_cannot_be_replayed_is_refused_with_its_line_or_name() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let workloads = path("workloads.json");
    std::fs::write(&workloads, r#"{"a": {}}"#).unwrap();
    std::fs::write(path("costs.json"), costs().to_string()).unwrap();
    let file = path("trace.csv");
    let out = path("out");
    let refused = |text_of_file: &str, args: &[&str]| {
        std::fs::write(&file, text_of_file).unwrap();
        let output = trace(dir.path(), &[&[text(&file), "--out", text(&out)], args].concat());
        assert!(!output.status.success());
        assert!(!out.exists(), "nothing is written");
        refusal(&output)
    };
    let costs_file = path("costs.json");
    let of_file = ["--memory", "1024", "--simulate", "--costs", text(&costs_file)];
    for (contents, said) in [
        ("time_s,function\n0,a\nx,a\n", "line 3: `time_s` is `x`"),
        ("time_s,function\n2,a\n1,a\n", "line 3: time 1 comes after 2"),
        ("app,func,end_timestamp,duration\na,b,c\n", "line 2: it has 3 fields"),
        ("HashOwner,HashApp\n", "line 1: it is not `time_s,function`"),
    ] {
        let error = refused(contents, &of_file);
        assert!(error.contains("Cannot use") && error.contains("trace.csv") && error.contains(said), "{error}");
    }
    let good = "time_s,function\n0,a\n1,b\n";
    let error = refused(good, &[&of_file[..], &["--workloads", text(&workloads)]].concat());
    assert!(error.contains("Cannot replay function `b`") && error.contains("workloads.json"), "{error}");
    let error = refused(good, &["--memory", "64", "--policy", "end"]);
    assert!(error.contains("its guest has 128 MiB") && error.contains("--memory"), "{error}");
    let error = refused(good, &["--memory", "1000000000", "--policy", "end"]);
    assert!(error.contains("Cannot give VMs 1000000000 MiB"), "{error}");
    let error = refused(good, &["--memory", "256", "--policy", "ladder", "--floor", "700"]);
    assert!(error.contains("Cannot use policy ladder with --floor 700"), "{error}");
    let mut many = "time_s,function\n".to_string();
    for function in 0..300 {
        writeln!(many, "{function},f{function}").unwrap();
    }
    let error = refused(&many, &["--memory", "256", "--policy", "end"]);
    assert!(error.contains("Cannot replay 300 functions") && error.contains("--functions 256"), "{error}");
    std::fs::write(path("costs.json"), costs().to_string().replace("\"version\":3", "\"version\":9")).unwrap();
    let error = refused(good, &of_file);
    assert!(error.contains("costs.json") && error.contains("version 9"), "{error}");
    let mut wrong = costs();
    wrong["workloads"]["*"]["warm"] = json!([{ "ms": 3, "cpu_ms": 3 }, { "ms": 2, "cpu_ms": 2 }]);
    std::fs::write(path("costs.json"), wrong.to_string()).unwrap();
    let error = refused(good, &of_file);
    assert!(error.contains("workload `*`: `warm` has times that are not in order"), "{error}");
}

#[test]
fn a_simulated_day_is_the_same_each_time_and_follows_the_policies() {
    let dir = scratch();
    let all = "keep,end,repurpose,standby,rewind,suspend,ladder,faasmem,shrink";
    let args = ["--synthetic", "high,middle,low", "--functions", "5", "--duration", "86400", "--memory", "65536"];
    let by = |policies: &str| simulated(dir.path(), &[&args[..], &["--policy", policies, "--seed", "5"]].concat());
    let first = by(all);
    let again = by("rewind,ladder");
    assert_eq!([of(&first, "rewind", true), of(&first, "ladder", true)], [&again[0], &again[1]]);
    let requests = number(&first[0], "requests");
    assert!(requests > 5_000.0, "{requests}");
    for policy in all.split(',') {
        let summary = of(&first, policy, true);
        assert_eq!(number(summary, "requests"), requests);
        assert_eq!(number(summary, "failed"), 0.0, "{summary}");
        assert_eq!(answered(summary), requests, "{summary}");
        assert!(number(summary, "p50_ms") <= number(summary, "p95_ms"), "{summary}");
    }
    let [keep, end, repurpose, standby, rewind] =
        ["keep", "end", "repurpose", "standby", "rewind"].map(|policy| of(&first, policy, true));
    let [suspend, ladder, faasmem] = ["suspend", "ladder", "faasmem"].map(|policy| of(&first, policy, true));
    assert!(number(keep, "warm") > 0.5 * requests && number(keep, "restored") >= 15.0, "{keep}");
    assert_eq!(number(end, "restored"), requests);
    assert_eq!(number(end, "repurposed"), 0.0);
    assert!(number(repurpose, "repurposed") > 0.0, "{repurpose}");
    assert!(number(standby, "standby") > 0.9 * requests && number(rewind, "rewound") > 0.9 * requests);
    // Memory: 15 functions have a VM each that stands by; those that end have hardly any.
    assert!(number(end, "mean_local_mib") < 10.0 && number(keep, "mean_local_mib") > 20.0, "{end} {keep}");
    let of_standby = number(standby, "mean_local_mib");
    assert!((15.0 * 4.0..15.0 * 4.0 + 60.0).contains(&of_standby), "{of_standby}");
    assert!(number(keep, "p50_ms") < number(rewind, "p50_ms") && number(rewind, "p50_ms") < number(end, "p50_ms"));
    // VMs that were suspended are woken, and no VM is made twice but for requests that overlap.
    assert!(number(suspend, "woken") > 500.0 && number(suspend, "trimmed") == 0.0, "{suspend}");
    assert!(
        number(ladder, "trimmed") > 0.0 && number(ladder, "spilled") > 0.0 && number(ladder, "woken") > 0.0,
        "{ladder}"
    );
    assert!(number(ladder, "woken") < number(suspend, "woken"), "{ladder} {suspend}");
    assert!(number(suspend, "restored") < number(keep, "restored"), "{suspend} {keep}");
    assert!(number(ladder, "mean_local_mib") < number(keep, "mean_local_mib"), "{ladder} {keep}");
    let shrink = of(&first, "shrink", true);
    assert!(number(shrink, "mean_local_mib") < number(ladder, "mean_local_mib"), "{shrink} {ladder}");
    // FaaSMem's VMs live as long as those that are kept, with less memory.
    assert!(
        number(faasmem, "spilled") > 0.0 && number(faasmem, "woken") + number(faasmem, "trimmed") == 0.0,
        "{faasmem}"
    );
    assert_eq!(number(faasmem, "restored"), number(keep, "restored"), "{faasmem} {keep}");
    assert!(number(faasmem, "mean_local_mib") < number(keep, "mean_local_mib"), "{faasmem} {keep}");
    assert!(number(faasmem, "vms_per_gib") > number(keep, "vms_per_gib"), "{faasmem} {keep}");
    assert!(number(suspend, "most_suspended") > 0.0 && number(faasmem, "most_suspended") == 0.0, "{suspend}");
    assert!((1.0..=15.0).contains(&number(keep, "most_vms")), "{keep}");
    // A host with room for eight VMs: they make room for each other, and requests fail only when all are busy.
    let small = ["--synthetic", "high", "--functions", "40", "--memory", "1024", "--policy", "keep"];
    let small = simulated(dir.path(), &small);
    assert!(number(&small[0], "peak_local_mib") <= 8.0 * 12.0 + 1.0, "{small:?}");
    assert!(number(&small[0], "restored") > 40.0 && number(&small[0], "failed") == 0.0, "{small:?}");
}

#[test]
fn simulated_times_are_spread_as_those_of_the_costs_and_follow_the_seed() {
    let dir = scratch();
    let mut costs = costs();
    let warm: Vec<Value> =
        (0..1000).map(|index| json!({ "ms": 1.0 + f64::from(index) / 100.0, "cpu_ms": 0.5 })).collect();
    costs["workloads"]["*"]["warm"] = json!(warm);
    let costs_path = dir.path().join("costs.json");
    std::fs::write(&costs_path, costs.to_string()).unwrap();
    let file = dir.path().join("trace.csv");
    let lines: String = (0..2000).map(|second| format!("{second},a\n")).collect();
    std::fs::write(&file, format!("time_s,function\n{lines}")).unwrap();
    let by = |seed: &str| {
        let out = dir.path().join("out");
        let args = [text(&file), "--memory", "1024", "--policy", "keep,suspend", "--seed", seed, "--simulate"];
        let output = trace(dir.path(), &[&args[..], &["--costs", text(&costs_path), "--out", text(&out)]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        summaries(&out)
    };
    let one = by("1");
    assert_eq!(one, by("1"));
    for (name, ms) in [("p50_ms", 6.0), ("p95_ms", 10.5), ("p99_ms", 10.9)] {
        assert!((number(&one[0], name) - ms).abs() < 0.5, "{name}: {}", one[0]);
        // A request has the same share by each policy, and all but the first found a VM with all its memory.
        assert_eq!(number(&one[0], name), number(&one[1], name));
    }
    assert_ne!(number(&one[0], "p50_ms"), number(&by("2")[0], "p50_ms"));
}

#[test]
fn vms_that_serve_requests_give_memory_back_and_make_room_by_a_suspension() {
    let dir = scratch();
    let by = |policy: &str, args: &[&str]| {
        simulated(dir.path(), &[args, &["--policy", policy, "--keep-alive", "6000"]].concat()).remove(0)
    };
    let file = dir.path().join("trace.csv");
    // One VM, whose windows end with the requests 1 and 3, and no step.
    let lines: String = (0..100).map(|index| format!("{},a\n", index * 10)).collect();
    std::fs::write(&file, format!("time_s,function\n{lines}")).unwrap();
    let one = &by("shrink", &[text(&file), "--memory", "1024", "--floor", "6000"]);
    let mib = number(one, "mean_local_mib");
    // That of the processes that are kept ready, and of the VM: 6 MiB after the request behind its second window.
    assert!((6.9..7.1).contains(&mib), "{one}");
    assert!(number(one, "peak_local_mib") <= 13.0, "{one}");
    let kept = &by("ladder", &[text(&file), "--memory", "1024", "--floor", "6000"]);
    assert!(number(kept, "mean_local_mib") > mib + 3.0, "memory is not short: {kept}");
    // There is room for one VM, and two functions in turn.
    let lines: String = (0..10).map(|index| format!("{},{}\n", index * 10, ["a", "b"][index % 2])).collect();
    std::fs::write(&file, format!("time_s,function\n{lines}")).unwrap();
    let two = &by("ladder", &[text(&file), "--memory", "128", "--floor", "6000"]);
    assert_eq!(["restored", "woken", "failed"].map(|way| number(two, way)), [2.0, 8.0, 0.0], "{two}");
    assert_eq!([number(two, "most_vms"), number(two, "most_suspended")], [1.0, 1.0], "{two}");
    // The request waits for the suspension of the other VM.
    assert!((number(two, "p50_ms") - 55.0).abs() < 0.1, "{two}");
}

#[test]
fn a_restore_into_fresh_memory_takes_longer_than_one_into_memory_that_was_given_back_lately() {
    let dir = scratch();
    let mut costs = costs();
    costs["workloads"]["*"]["grown"] = work(100.0);
    let costs_path = dir.path().join("costs.json");
    std::fs::write(&costs_path, costs.to_string()).unwrap();
    let file = dir.path().join("trace.csv");
    let out = dir.path().join("out");
    // The memory of the VM before is there for a second VM 1 s later, and gone 3 s later.
    for (pause, recycled_ms) in [(1, 20.0), (3, 100.0)] {
        let lines: String = (0..10).map(|index| format!("{},a\n", index * pause)).collect();
        std::fs::write(&file, format!("time_s,function\n{lines}")).unwrap();
        let args = [text(&file), "--memory", "1024", "--policy", "keep,end", "--simulate", "--out", text(&out)];
        let output = trace(dir.path(), &[&args[..], &["--costs", text(&costs_path)]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let all = summaries(&out);
        let of = |policy: &str| ["p50_ms", "p99_ms"].map(|name| number(of(&all, policy, true), name).round());
        assert_eq!((of("keep"), of("end")), ([2.0, 100.0], [recycled_ms, 100.0]));
    }
}

#[test]
fn golden_costs_are_read_and_say_what_they_lack() {
    let dir = scratch();
    let file = dir.path().join("trace.csv");
    std::fs::write(&file, "time_s,function\n0,a\n100,a\n200,a\n").unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (version, lacks_windows) in [(2, true), (3, false)] {
        let folder = golden.join(format!("trace{version}"));
        let costs = folder.join("costs.json");
        let out = dir.path().join("out");
        let args = [text(&file), "--memory", "1024", "--policy", "keep,shrink", "--simulate", "--costs", text(&costs)];
        let output = trace(dir.path(), &[&args[..], &["--out", text(&out)]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let keep = &summaries(&out)[0];
        assert_eq!([number(keep, "restored"), number(keep, "warm")], [1.0, 2.0], "{keep}");
        let costs: Value = serde_json::from_slice(&std::fs::read(&costs).unwrap()).unwrap();
        assert_eq!(costs["version"], version);
        let of = &costs["workloads"]["*"];
        let is_measured = |name: &str, ms: f64| {
            let one = std::slice::from_ref(&of[name]);
            let times = of[name].as_array().map_or(one, Vec::as_slice);
            times.iter().filter_map(|time| time["ms"].as_f64()).any(|time| (time - ms).abs() < 1e-3)
        };
        assert!(is_measured("warm", number(keep, "p50_ms")), "{keep}");
        let restored_ms = number(keep, "p99_ms");
        assert!(is_measured("restored", restored_ms) || is_measured("grown", restored_ms), "{keep}");
        let said = String::from_utf8_lossy(&output.stdout);
        let gap = format!("The costs (version {version}) have no `windows`");
        assert_eq!(said.contains(&gap), lacks_windows, "{said}");
    }
}

#[test]
fn a_million_arrivals_are_read_line_by_line() {
    let dir = scratch();
    let path = dir.path().join("million.csv");
    let mut lines = "time_s,function\n".to_string();
    for index in 0..1_000_000 {
        writeln!(lines, "{}.{:03},f{}", index / 50, index % 50 * 20, index % 1000).unwrap();
    }
    std::fs::write(&path, lines).unwrap();
    let args = [text(&path), "--memory", "1048576", "--policy", "keep", "--keep-alive", "3600"];
    let summary = &simulated(dir.path(), &[&args[..], &["--functions", "20"]].concat())[0];
    assert_eq!(number(summary, "requests"), 20_000.0);
    assert_eq!(number(summary, "restored"), 20.0, "each function has one VM: {summary}");
    let part = simulated(dir.path(), &[&args[..], &["--duration", "10", "--functions", "7"]].concat());
    assert_eq!(number(&part[0], "requests"), 7.0);
}

/// Requests of two functions in turn, then a pause, then one more of each.
const REPLAYED: usize = 20;

fn replayed_trace() -> String {
    let mut lines = "time_s,function\n".to_string();
    for index in 0..REPLAYED {
        let pause = if index < REPLAYED - 2 { 0.0 } else { 40.0 };
        writeln!(lines, "{},{}", index as f64 * 2.5 + pause, ["a", "b"][index % 2]).unwrap();
    }
    lines
}

#[test]
fn a_short_trace_is_replayed_by_policies_on_the_service_and_simulated() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("trace.csv"), replayed_trace()).unwrap();
    let workload = json!({ "*": {
        "mem_mib": 64, "prepare": "fill pages=1024 seed=1", "params": "pages=512 write=50 seed=1"
    } });
    std::fs::write(path("workloads.json"), workload.to_string()).unwrap();
    let out = path("out");
    let file = path("trace.csv");
    let workloads = path("workloads.json");
    let args = [text(&file), "--workloads", text(&workloads), "--memory", "1024", "--speed", "20", "--floor", "2"];
    let args = [&args[..], &["--policy", "keep,rewind,ladder,faasmem", "--out", text(&out)]].concat();
    let output = trace(dir.path(), &args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("The simulator's error"), "{said}");
    let all = summaries(&out);
    assert_eq!(all.len(), 8, "{all:?}");
    let n = REPLAYED as f64;
    for summary in &all {
        assert_eq!(number(summary, "requests"), n, "{summary}");
        assert_eq!(number(summary, "failed"), 0.0, "{summary}");
        assert_eq!(answered(summary), n, "{summary}");
        assert!(number(summary, "mean_local_mib") > 0.0 && number(summary, "p99_ms") > 0.0, "{summary}");
    }
    let keep = of(&all, "keep", false);
    assert!(number(keep, "warm") > 0.0 && number(keep, "restored") >= 2.0, "{keep}");
    let ladder = of(&all, "ladder", false);
    assert!(number(ladder, "trimmed") + number(ladder, "spilled") + number(ladder, "woken") > 0.0, "{ladder}");
    let faasmem = of(&all, "faasmem", false);
    assert!(number(faasmem, "spilled_mib") > 0.0 && number(faasmem, "most_vms") >= 1.0, "{faasmem}");
    assert!(number(faasmem, "regretted_mib") <= number(faasmem, "recalled_mib"), "{faasmem}");
    let rewind = of(&all, "rewind", false);
    assert!(number(rewind, "standby") >= 2.0 && number(rewind, "rewound") > 0.0, "{rewind}");
    // The simulator counts as the service does where that does not depend on the host's speed, and its memory is of the
    // same size.
    assert_eq!(number(of(&all, "keep", true), "restored"), 2.0);
    for policy in ["keep", "rewind"] {
        let replayed = number(of(&all, policy, false), "mean_local_mib");
        let simulated = number(of(&all, policy, true), "mean_local_mib");
        assert!(simulated > replayed / 4.0 && simulated < replayed * 4.0, "{policy}: {simulated} for {replayed}");
    }
    for name in ["summary.csv", "memory.svg", "latency.svg", "report.html", "costs.json"] {
        assert!(std::fs::metadata(out.join(name)).unwrap().len() > 100, "{name}");
    }
    // One line for each request, and the first of each function and policy goes to a VM that has not served.
    let requests = std::fs::read_to_string(out.join("requests.csv")).unwrap();
    let lines: Vec<&str> = requests.lines().collect();
    assert_eq!(lines[0], "arrival_s,function,late_ms,latency_ms,policy,vm_answered,way");
    let replayed = all.iter().filter(|policy| policy["simulated"] == false);
    assert_eq!(lines.len() - 1, replayed.map(|policy| number(policy, "requests") as usize).sum::<usize>());
    assert!(lines.iter().any(|line| line.ends_with(",keep,0,restored")), "{requests}");
    assert!(lines.iter().any(|line| line.contains(",ladder,1,")), "{requests}");
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("rewind (simulated)") && page.contains("<svg"), "the page has tables and charts");
    assert!(!page.contains("NaN") && !page.contains("inf<"), "{page}");
    // The costs alone give the same simulation again.
    let again = path("again");
    let costs = out.join("costs.json");
    let more = ["--policy", "keep,rewind,ladder,faasmem", "--simulate", "--costs", text(&costs), "--out", text(&again)];
    let args = [text(&file), "--workloads", text(&workloads), "--memory", "1024", "--speed", "20", "--floor", "2"];
    let output = trace(dir.path(), &[&args[..], &more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let again = summaries(&again);
    for policy in ["keep", "rewind", "ladder", "faasmem"] {
        assert_eq!(of(&again, policy, true), of(&all, policy, true));
    }
}

#[test]
fn requests_that_fail_are_counted_and_make_the_exit_code() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    // The memory is for one VM, and four requests come at once.
    std::fs::write(path("trace.csv"), "time_s,function\n0,a\n0,a\n0,a\n0,a\n").unwrap();
    let workload = json!({ "*": {
        "mem_mib": 64, "prepare": "fill pages=256 seed=1", "call": "touch", "params": "pages=256 write=50 seed=1"
    } });
    std::fs::write(path("workloads.json"), workload.to_string()).unwrap();
    let mut costs = costs();
    costs["workloads"]["*"]["workload"] = workload["*"].clone();
    std::fs::write(path("costs.json"), costs.to_string()).unwrap();
    let [file, workloads, costs, out] = ["trace.csv", "workloads.json", "costs.json", "out"].map(path);
    let args = [text(&file), "--workloads", text(&workloads), "--memory", "64", "--policy", "end"];
    let args = [&args[..], &["--simulate", "--costs", text(&costs), "--out", text(&out)]].concat();
    let output = trace(dir.path(), &args);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("3 requests failed (status 429: 3)"));
    assert_eq!(number(&summaries(&out)[0], "failed"), 3.0);
}
