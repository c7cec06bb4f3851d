//! Plans in JSON: a policy outside tvmm, and JSON that is no plan of the snapshot.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Vm, config, run_err, run_ok, scratch, text};

/// A chain of two snapshots.
struct Scene {
    dir: TempDir,
    tip: PathBuf,
    digest: String,
}

impl Scene {
    fn make() -> Scene {
        let dir = scratch();
        let tip = dir.path().join("tip");
        let mut vm = Vm::boot(&config(1, 64));
        vm.call("fill pages=3000 seed=3");
        vm.snapshot(&dir.path().join("base"), &["--verify"]);
        vm.call("touch pages=300 write=50 seed=8");
        let digest = vm.call("check").digest;
        vm.snapshot(&tip, &["--diff", "--verify"]);
        Scene { dir, tip, digest }
    }

    /// The plan of `trenv`: it tells where the snapshot has each page.
    fn shown(&self) -> Value {
        let args = ["plan", "--snapshot", text(&self.tip), "--policy", "trenv", "--json"];
        serde_json::from_str(&run_ok(&args)).expect("JSON")
    }

    fn write(&self, plan: &[u8]) -> PathBuf {
        let path = self.dir.path().join("p.json");
        fs::write(&path, plan).unwrap();
        path
    }

    /// The reason for which a restore refuses `plan`.
    fn refused(&self, plan: &[u8]) -> String {
        let path = self.write(plan);
        run_err(&["restore", "--snapshot", text(&self.tip), "--plan", text(&path), "--run", "check"])
    }

    /// The reason for which a restore refuses the plan of `trenv` after `spoil` has changed it.
    fn refused_after(&self, spoil: impl Fn(&mut Value)) -> String {
        let mut shown = self.shown();
        spoil(&mut shown);
        self.refused(shown.to_string().as_bytes())
    }
}

/// Restores by the plan at `path`, lets the guest check its memory, and returns `restore` of the report.
fn restored(scene: &Scene, path: &Path) -> Value {
    let mut vm = Vm::spawn(scratch(), &["restore", "--snapshot", text(&scene.tip), "--plan", text(path)]);
    assert_eq!(vm.call("check").digest, scene.digest);
    vm.api_ok("GET", "/tvmm/report", None)["restore"].clone()
}

/// The extents of a plan with a source.
fn held(shown: &mut Value) -> Vec<&mut Value> {
    let extents = shown["plan"]["extents"].as_array_mut().unwrap();
    extents.iter_mut().filter(|item| item["placement"] != "zero").collect()
}

#[test]
fn a_policy_outside_tvmm_is_carried_out() {
    let scene = Scene::make();
    let mut shown = scene.shown();
    let mut copied = 0;
    for (number, item) in held(&mut shown).into_iter().enumerate() {
        if number % 2 == 0 {
            item["placement"] = json!("preload");
            copied += item["extent"]["pages"].as_u64().unwrap();
        } else {
            item["placement"] = json!("lazy");
        }
    }
    assert!(copied > 0, "{shown}");
    // A program writes what a plan needs, and leaves out the rest.
    let snapshot = &shown["plan"]["snapshot"];
    let plan = json!({ "snapshot": snapshot, "policy": "every-other", "extents": shown["plan"]["extents"] });
    let restore = restored(&scene, &scene.write(json!({ "plan": plan }).to_string().as_bytes()));
    assert_eq!((&restore["policy"], &restore["policy_reason"]), (&json!("every-other"), &json!("plan-file")));
    assert_eq!((&restore["plan"], &restore["engine"]["planned"]["preload"]), (&json!("file"), &json!(copied)));
}

#[test]
fn an_image_in_json_is_made_and_read() {
    let scene = Scene::make();
    let mut shown = scene.shown();
    let mut image = Vec::new();
    let mut offset = 0;
    for item in held(&mut shown) {
        image.push(item["extent"].clone());
        item["placement"] = json!("preload");
        item["source"] = json!({ "image": 0, "offset": offset });
        offset += item["extent"]["pages"].as_u64().unwrap() * 4096;
    }
    shown["plan"]["images"] = json!([{ "extents": image }]);
    let restore = restored(&scene, &scene.write(shown.to_string().as_bytes()));
    assert_eq!(restore["engine"]["planned"]["preload"], json!(offset / 4096));
}

#[test]
fn json_that_is_no_plan_is_refused() {
    let scene = Scene::make();
    let deep = format!("{{\"plan\": {}", "[".repeat(1 << 20));
    let deep_summary = format!("{{\"groups\": {}", "[".repeat(1 << 20));
    for (text, reason) in [
        ("{", "EOF while parsing"),
        ("{}", "missing field `plan`"),
        (" \n{\"plans\": {}}", "unknown field `plans`"),
        ("{\"plan\": 3}", "invalid type"),
        ("{\"plan\": {\"snapshot\": \"x\"}}", "hexadecimal"),
        (&deep, "invalid type"),
        (&deep_summary, "EOF while parsing"),
    ] {
        let said = scene.refused(text.as_bytes());
        assert!(said.contains(reason) && said.contains("p.json cannot be used"), "{reason}: {said}");
    }
    let twice = [scene.shown().to_string(), "{}".to_owned()].concat();
    assert!(scene.refused(twice.as_bytes()).contains("trailing characters"));
    type Spoil = fn(&mut Value);
    let spoils: [(Spoil, &str); 8] = [
        (|shown| shown["plan"]["extent"] = json!([]), "unknown field `extent`"),
        (|shown| held(shown)[0]["source"]["tier"] = json!(0), "one of `layer`, `tier` and `image`"),
        (|shown| held(shown)[0]["source"] = json!({ "offset": 0 }), "one of `layer`, `tier` and `image`"),
        (|shown| held(shown)[0]["source"]["offset"] = json!(-4096), "invalid value"),
        (|shown| held(shown)[0]["extent"]["pages"] = json!(1e300), "invalid type"),
        (|shown| held(shown)[0]["placement"] = json!("copied"), "unknown variant `copied`"),
        (|shown| shown["plan"]["verify"] = json!("yes"), "invalid type"),
        (|shown| shown["sources"][0]["inode"] = json!(1), "unknown field `inode`"),
    ];
    for (spoil, reason) in spoils {
        let said = scene.refused_after(spoil);
        assert!(said.contains(reason) && said.contains("p.json cannot be used"), "{reason}: {said}");
    }
}

#[test]
fn json_with_another_place_for_a_page_is_refused() {
    let scene = Scene::make();
    type Spoil = fn(&mut Value);
    let spoils: [(Spoil, &str); 13] = [
        (|shown| shown["plan"]["snapshot"] = json!("00".repeat(32)), "was made for snapshot"),
        (|shown| shown["sources"][1]["modified"] = json!([0, 0]), "was changed after the plan was made"),
        (|shown| shown["sources"] = json!([]), "it is for 0 layers, the chain has 2"),
        (|shown| shown["plan"]["fault_pages"] = json!(3), "a fault cannot fetch 3 pages"),
        (|shown| drop(shown["plan"]["extents"].as_array_mut().unwrap().pop()), "nothing is planned from page"),
        (|shown| held(shown)[0]["extent"] = json!({ "first": u64::MAX, "pages": u64::MAX }), "should come next"),
        (|shown| held(shown)[0]["source"]["offset"] = json!(u64::MAX - 4095), "behind the end"),
        (|shown| held(shown)[0]["source"] = json!({ "layer": u64::MAX, "offset": 0 }), "there are 2"),
        (|shown| held(shown)[0]["source"] = json!({ "tier": 0, "offset": 0 }), "there are 0"),
        (|shown| held(shown)[0]["source"] = json!({ "image": 0, "offset": 0 }), "there are 0"),
        (to_zero, "is zero in the plan, but the snapshot has it in layer"),
        (to_other_offset, "but the snapshot has it in layer"),
        (to_other_layer, "but the snapshot has it in layer"),
    ];
    for (spoil, reason) in spoils {
        let said = scene.refused_after(spoil);
        assert!(said.contains(reason), "{reason}: {said}");
    }
}

/// Leaves out a page that the snapshot has.
fn to_zero(shown: &mut Value) {
    let mut held = held(shown);
    held[0]["placement"] = json!("zero");
    held[0]["source"] = Value::Null;
}

/// Takes pages from where the file has others.
fn to_other_offset(shown: &mut Value) {
    let mut held = held(shown);
    let last = held.len() - 1;
    held[last]["source"]["offset"] = json!(held[last]["source"]["offset"].as_u64().unwrap() - 4096);
}

/// Takes pages that the tip has from its parent, which has older ones at the same offset.
fn to_other_layer(shown: &mut Value) {
    let mut held = held(shown);
    let of_tip = held.iter_mut().find(|item| item["source"]["layer"] == 1).expect("a page of the tip");
    of_tip["source"]["layer"] = json!(0);
}
