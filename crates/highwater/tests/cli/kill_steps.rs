//! SIGKILL at each step of changes to images that nobody serves, one kill at a time: whatever the step, the disk shows what it
//! showed, it opens for writing, its history is trusted, and the command is done when it is given again.
//!
//! `strace` kills the process when one of its threads makes its N-th system call of a kind. Of the calls that move data only the
//! last ones are all tried, as that is where images are exchanged; `HIGHWATER_ROUNDS` has all of them tried.

use crate::relocate::{SIZE, names, with_snapshots};
use crate::support::{Ended, Place, until};
use std::collections::BTreeMap;
use std::fs;

/// Of io_uring, and of what changes names and makes them durable.
const KINDS: [&str; 2] = ["io_uring_enter", "rename,unlink,fsync,fdatasync,ftruncate,pwrite64,link,linkat"];
/// The last so many calls of one kind are all tried, and before them every one of so many.
const LAST: usize = 16;
const EVERY: usize = 9;

fn traced(place: &Place, kinds: &str, more: &[String], line: &str) -> Ended {
    let mut args: Vec<String> = ["-f", "-qq", "-e"].map(str::to_owned).into();
    args.push(format!("trace={kinds}"));
    args.extend(more.iter().cloned());
    args.push(env!("CARGO_BIN_EXE_highwater").to_owned());
    args.extend(line.split_whitespace().map(str::to_owned));
    place.run("strace", args)
}

/// How many of these calls the busiest thread makes.
fn calls(place: &Place, kinds: &str, line: &str) -> usize {
    traced(place, kinds, &["-o".to_owned(), "calls".to_owned()], line).ok();
    let mut of_thread: BTreeMap<String, usize> = BTreeMap::new();
    for call in fs::read_to_string(place.path("calls")).unwrap().lines().filter(|call| !call.contains("resumed>")) {
        *of_thread.entry(call.split_whitespace().next().unwrap().to_owned()).or_default() += 1;
    }
    of_thread.into_values().max().unwrap_or(0)
}

fn copy_of(template: &Place) -> Place {
    let place = Place::new();
    place.run("cp", ["-a", &format!("{}/.", template.dir().display()), "."]).ok();
    place
}

/// Kills the command at its steps; `judge` gets the place after each kill, and `again` the command's end when it is given again.
fn at_each_step(template: &Place, line: &str, judge: impl Fn(&Place), again: impl Fn(&Place, Ended)) {
    for kinds in KINDS {
        let steps = calls(&copy_of(template), kinds, line);
        assert!(steps > 0, "{line}: {kinds}");
        let mut killed = 0;
        for step in 1..=steps {
            if step + LAST <= steps && step % EVERY != 0 && std::env::var_os("HIGHWATER_ROUNDS").is_none() {
                continue;
            }
            let place = copy_of(template);
            let inject = format!("inject={kinds}:signal=SIGKILL:when={step}");
            let more = ["-o", "/dev/null", "-e", &inject].map(str::to_owned);
            let ended = traced(&place, kinds, &more, line);
            // Not every run makes as many calls.
            if ended.code == Some(0) {
                continue;
            }
            assert_eq!(ended.code, None, "killed: {ended:?}");
            killed += 1;
            eprintln!("{line}: killed at step {step} of {kinds}");
            judge(&place);
            again(&place, place.hw(line));
        }
        assert!(killed > 0, "{line}: nothing was killed");
        println!("{line}: {killed} kills at {steps} steps of {kinds}");
    }
}

/// The image shows what that raw file holds. Space that a killed process had set aside may be lost, and nothing else.
fn shows(place: &Place, raw: &str, image: &str) {
    let mut check = None;
    // The kernel gives a killed process's locks back a moment after it is gone.
    until("the locks are free", || {
        let ended = place.tool(&format!("qemu-img check {image}"));
        !check.insert(ended).err.contains("lock")
    });
    assert!(check.as_ref().is_some_and(|check| matches!(check.code, Some(0 | 3))), "{check:?}");
    place.tool(&format!("qemu-img compare -q -f raw -F qcow2 {raw} {image}")).ok();
}

/// The disk opens for writing, and its mark is trusted.
fn is_sound(place: &Place, disk: &str) {
    place.hw(&format!("chain verify {disk}")).ok();
    place.hw(&format!("mark {disk} after")).ok();
    let marks = place.hw(&format!("--json marks list {disk}")).ok().json();
    let before = marks["marks"].as_array().unwrap().iter().find(|mark| mark["name"] == "before");
    assert!(before.expect("the mark")["refused"].is_null(), "{marks}");
}

fn shows_the_same(place: &Place) {
    shows(place, "now.raw", "d.qcow2");
    is_sound(place, "d.qcow2");
    shows(place, "now.raw", "d.qcow2");
}

/// The disk has these snapshots, and they show what they held.
fn shows_all<'a>(place: &Place, snapshots: impl Iterator<Item = &'a str>) {
    let snapshots: Vec<&str> = snapshots.collect();
    shows(place, "now.raw", "d.qcow2");
    for name in &snapshots {
        shows(place, &format!("{name}.raw"), &format!("d@{name}.qcow2"));
    }
    assert_eq!(names(place), snapshots);
}

/// A disk with three snapshots and the mark `before`.
fn template() -> Place {
    let template = Place::new();
    with_snapshots(&template);
    template.hw("mark d.qcow2 before").ok();
    template
}

#[test]
fn of_deleted_snapshots() {
    let template = template();
    for gone in ["s1", "s2", "s3"] {
        for into in ["child", "parent"] {
            let line = format!("snapshot delete d.qcow2 {gone} --into {into}");
            at_each_step(&template, &line, shows_the_same, |place, again| {
                let done_before = again.err.contains(&format!("no snapshot \"{gone}\""));
                assert!(again.code == Some(0) || done_before, "{again:?}");
                shows_all(place, ["s1", "s2", "s3"].into_iter().filter(|name| *name != gone));
                assert!(!place.path(&format!("d@{gone}.qcow2")).exists(), "{again:?}");
            });
        }
    }
}

#[test]
fn of_a_snapshot() {
    at_each_step(&template(), "snapshot create d.qcow2 s4", shows_the_same, |place, again| {
        assert!(again.code == Some(0) || again.err.contains("snapshot's name already"), "{again:?}");
        fs::copy(place.path("now.raw"), place.path("s4.raw")).unwrap();
        shows_all(place, ["s1", "s2", "s3", "s4"].into_iter());
    });
}

#[test]
fn of_a_commit_into_a_parent_that_is_the_disk_then() {
    let template = Place::new();
    template.raw("now.raw", SIZE);
    template.hw("convert now.raw base.qcow2").ok();
    template.hw("create -f qcow2 -b base.qcow2 -F qcow2 d.qcow2").ok();
    for (format, file) in [("qcow2", "d.qcow2"), ("raw", "now.raw")] {
        template.qemu_io(format, file, &["write -P 7 5M 256k", "write -z 0 64k"]);
    }
    template.hw("mark d.qcow2 before").ok();
    let judge = |place: &Place| {
        let verified = place.hw("--json chain verify d.qcow2");
        let moved = verified.json()["layers"][0]["moved-to"].clone();
        if moved.is_null() {
            return shows_the_same(place);
        }
        assert!(moved.as_str().is_some_and(|to| to.ends_with("base.qcow2")), "{verified:?}");
        shows(place, "now.raw", "base.qcow2");
        if place.path("d.qcow2.history").exists() {
            // The last thing that is done.
            place.tool("mv d.qcow2.history base.qcow2.history").ok();
        }
        is_sound(place, "base.qcow2");
    };
    at_each_step(&template, "commit d.qcow2", judge, |place, again| {
        assert!(again.code == Some(0) || place.hw("chain verify d.qcow2").code != Some(0), "{again:?}");
        shows(place, "now.raw", "base.qcow2");
    });
}
