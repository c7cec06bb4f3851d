//! Pools in place and cold pools: adding, removing, collecting, killed at any moment; restores from them, by page
//! servers that are killed too.

use std::path::PathBuf;
use std::process::Output;

use fastrand::Rng;
use serde_json::Value;

use super::snapshots::{full, policy};
use super::world::{Snap, World, words};
use crate::support::cold::{Server, copy_bare};
use crate::support::text;

fn pool_path(world: &World) -> PathBuf {
    world.dir().join("pool")
}

fn cold_path(world: &World) -> PathBuf {
    world.dir().join("cold")
}

/// Makes the pool in place if there is none.
fn pool(world: &mut World) -> PathBuf {
    let path = pool_path(world);
    if !path.exists() {
        world.run_ok("pool create", &words(&["pool", "create", "--tier", "cxl", "--at", text(&path), "--size", "0.2"]));
    }
    path
}

/// Makes the cold pool if there is none.
fn cold(world: &mut World) -> PathBuf {
    let path = cold_path(world);
    if !path.exists() {
        world.run_ok("pool create", &words(&["pool", "create", "--tier", "remote", "--at", text(&path)]));
    }
    path
}

/// The names of the snapshots that the pool has and gives.
fn names(world: &mut World, pool: &str) -> Vec<String> {
    let listed: Value =
        serde_json::from_str(&world.run_ok("pool ls", &words(&["pool", "ls", pool, "--json"]))).unwrap();
    let heads = listed.as_array().expect("a list").iter().filter(|head| head["removed"] != true);
    heads.map(|head| head["name"].as_str().expect("a name").to_string()).collect()
}

fn name_of(snap: &Snap) -> String {
    snap.path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Returns true if an addition was refused because the pool has the snapshot.
fn has_already(output: &Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr);
    !output.status.success() && said.contains("already")
}

/// Nothing in the pools is damaged.
pub fn check(world: &mut World) {
    for path in [pool_path(world), cold_path(world)].into_iter().filter(|path| path.exists()) {
        world.run_ok("fsck", &words(&["pool", "fsck", text(&path)]));
    }
}

pub fn add(world: &mut World, rng: &mut Rng) {
    let kills = rng.u32(..3) == 0;
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let pool = pool(world);
    if names(world, text(&pool)).contains(&name_of(&snap)) {
        return restore(world, rng);
    }
    let args = words(&["pool", "add", text(&pool), text(&snap.path)]);
    let done = world.run("pool add", &args, kills.then_some(rng));
    world.count("pool additions");
    match done {
        Some(output) if output.status.success() => {
            assert!(names(world, text(&pool)).contains(&name_of(&snap)), "an acknowledged addition is not there");
        }
        // A copy has the id of its original.
        Some(output) if has_already(&output) => {}
        Some(output) if !kills => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("is full"), "pool add: {said}");
            let victim = names(world, text(&pool)).into_iter().next();
            if let Some(victim) = victim {
                world.run_ok("pool rm", &words(&["pool", "rm", text(&pool), &victim]));
                world.run_ok("pool gc", &words(&["pool", "gc", text(&pool)]));
            }
        }
        _ => {}
    }
    check(world);
}

pub fn remove_one(world: &mut World, rng: &mut Rng, kills: bool) {
    let pool = pool(world);
    let held = names(world, text(&pool));
    if held.is_empty() {
        return;
    }
    let victim = held[rng.usize(..held.len())].clone();
    let done = world.run("pool rm", &words(&["pool", "rm", text(&pool), &victim]), kills.then_some(rng));
    if done.is_some_and(|output| output.status.success()) {
        assert!(!names(world, text(&pool)).contains(&victim), "an acknowledged removal is undone");
    }
}

pub fn remove(world: &mut World, rng: &mut Rng) {
    let kills = rng.bool();
    remove_one(world, rng, kills);
    let pool = pool(world);
    world.run("pool gc", &words(&["pool", "gc", text(&pool)]), kills.then_some(rng));
    world.count("pool removals");
    check(world);
}

pub fn restore(world: &mut World, rng: &mut Rng) {
    let number = rng.usize(..);
    let pool = pool(world);
    let held = names(world, text(&pool));
    let here: Vec<Snap> = world.snaps.iter().filter(|snap| held.contains(&name_of(snap))).cloned().collect();
    if here.is_empty() {
        return;
    }
    let snap = &here[number % here.len()];
    let mut args = policy(snap, rng);
    args.extend(words(&["--pool", text(&pool)]));
    world.check(snap, &args);
}

pub fn cold_add(world: &mut World, rng: &mut Rng) {
    let kills = rng.u32(..3) == 0;
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let cold = cold(world);
    let args = words(&["pool", "add", text(&cold), text(&snap.path)]);
    let done = world.run("cold add", &args, kills.then_some(rng));
    let is_there = done.is_some_and(|output| output.status.success() || has_already(&output));
    assert!(kills || is_there, "pool add {}", cold.display());
    world.count("cold additions");
    check(world);
}

/// From the directory or by a page server, which may be killed meanwhile; from a copy of the snapshot without memory.
pub fn cold_restore(world: &mut World, rng: &mut Rng) {
    let serves = rng.bool();
    let kills = rng.u32(..3) == 0;
    let Some(snap) = world.any_dir(rng) else { return full(world, rng) };
    let cold = cold(world);
    let args = words(&["pool", "add", text(&cold), text(&snap.path)]);
    let added = world.run("cold add", &args, None).expect("it is not killed");
    assert!(added.status.success() || has_already(&added), "pool add {}: {added:?}", cold.display());
    let bare = world.fresh("b");
    copy_bare(&snap.path, &bare);
    let snap = Snap { path: bare.clone(), ..snap };
    let mut args = policy(&snap, rng);
    if serves {
        let mut server = Server::start(&cold, "127.0.0.1:0", &[]);
        args.extend(["--cold".to_string(), server.cold()]);
        if kills {
            let moment = world.moment("restore", rng);
            let pid = server.pid();
            let killer = std::thread::spawn(move || {
                std::thread::sleep(moment);
                crate::support::signal(pid, rustix::process::Signal::KILL);
            });
            world.check_or_refused(&snap, &args);
            killer.join().unwrap();
            server.kill();
            world.count("kills");
        } else {
            world.check(&snap, &args);
        }
    } else {
        args.extend(words(&["--cold", text(&cold)]));
        world.check(&snap, &args);
    }
    super::world::remove(&bare);
    world.count("cold restores");
}
