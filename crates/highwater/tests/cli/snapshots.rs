//! Snapshots: of files and of served disks, going back to them, and clones.

use crate::daemon::Daemon;
use crate::support::{Place, until};
use serde_json::Value;
use std::fs;
use std::path::Path;

const SIZE: u64 = 16 << 20;

fn snapshots(answer: &Value) -> Vec<(String, bool)> {
    let list = answer["snapshots"].as_array().unwrap_or_else(|| panic!("no snapshots: {answer}"));
    list.iter().map(|s| (s["name"].as_str().unwrap().to_owned(), s["current"].as_bool().unwrap())).collect()
}

fn named(name: &str, current: bool) -> (String, bool) {
    (name.to_owned(), current)
}

/// That two images show the same, and are sound.
#[track_caller]
pub(crate) fn equal(place: &Place, a: (&str, &str), b: (&str, &str)) {
    place.tool(&format!("qemu-img compare -f {} -F {} {} {}", a.0, b.0, a.1, b.1)).ok();
    for (format, file) in [a, b] {
        if format == "qcow2" {
            place.tool(&format!("qemu-img check -f qcow2 {file}")).ok();
        }
    }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn of_a_file() {
    let place = Place::new();
    place.raw("start.raw", SIZE);
    place.hw("convert start.raw d.qcow2").ok();
    let taken = place.hw("--json snapshot create d.qcow2 s1").ok().json();
    assert!(taken["snapshots"][0]["file"].as_str().unwrap().ends_with("/d@s1.qcow2"), "{taken}");
    assert_eq!(taken["snapshots"][0]["size"], SIZE);
    place.qemu_io("qcow2", "d.qcow2", &["write -P 7 1M 64k", "write -z 3M 1M"]);
    equal(&place, ("raw", "start.raw"), ("qcow2", "d@s1.qcow2"));
    fs::copy(place.path("start.raw"), place.path("second.raw")).unwrap();
    place.qemu_io("raw", "second.raw", &["write -P 7 1M 64k", "write -z 3M 1M"]);
    equal(&place, ("raw", "second.raw"), ("qcow2", "d.qcow2"));
    place.hw("snapshot create d.qcow2 s2").ok();
    place.qemu_io("qcow2", "d.qcow2", &["write -P 9 0 4k"]);
    equal(&place, ("raw", "second.raw"), ("qcow2", "d@s2.qcow2"));
    let list = place.hw("--json snapshot list d.qcow2").ok().json();
    assert_eq!(snapshots(&list), [named("s1", true), named("s2", true)]);
    let table = place.hw("snapshot list d.qcow2").ok().out;
    assert!(table.contains("s1") && table.contains("16 MiB") && table.contains("d@s2.qcow2"), "{table}");

    // Names that cannot be.
    let again = place.hw("snapshot create d.qcow2 s1").code(1);
    assert!(again.err.contains("d@s1.qcow2") && again.err.contains("another name"), "{again:?}");
    place.hw("snapshot create d.qcow2 a/b").code(1);
    place.hw("snapshot create d.qcow2").code(2);
    assert_eq!(files(place.dir()).iter().filter(|name| name.ends_with(".new")).count(), 0);

    place.hw("snapshot revert d.qcow2 s1").ok();
    equal(&place, ("raw", "start.raw"), ("qcow2", "d.qcow2"));
    // What stood on the snapshot is still there.
    let list = place.hw("--json snapshot list d.qcow2").ok().json();
    assert_eq!(snapshots(&list), [named("s1", true), named("s2", false)]);
    place.hw("snapshot revert d.qcow2 s2").ok();
    equal(&place, ("raw", "second.raw"), ("qcow2", "d.qcow2"));
    let missing = place.hw("snapshot revert d.qcow2 s3").code(1);
    assert!(missing.err.contains("no snapshot \"s3\"") && missing.err.contains("snapshot list"), "{missing:?}");

    place.hw("snapshot clone d.qcow2 s1 c.qcow2").ok();
    equal(&place, ("raw", "start.raw"), ("qcow2", "c.qcow2"));
    place.qemu_io("qcow2", "c.qcow2", &["write -P 3 0 1M"]);
    equal(&place, ("raw", "second.raw"), ("qcow2", "d.qcow2"));
    let taken = place.hw("snapshot clone d.qcow2 s1 c.qcow2").code(1);
    assert!(taken.err.contains("another name"), "{taken:?}");
    fs::create_dir(place.path("elsewhere")).unwrap();
    place.hw("snapshot clone d.qcow2 s2 elsewhere/c.qcow2").ok();
    equal(&place, ("raw", "second.raw"), ("qcow2", "elsewhere/c.qcow2"));
}

#[test]
fn of_a_raw_file_goes_on_beside_it() {
    let place = Place::new();
    place.raw("d.raw", SIZE);
    fs::copy(place.path("d.raw"), place.path("start.raw")).unwrap();
    place.hw("snapshot create d.raw s1").ok();
    place.qemu_io("qcow2", "d.qcow2", &["write -P 7 1M 64k"]);
    equal(&place, ("raw", "start.raw"), ("raw", "d.raw"));
    let refused = place.hw("snapshot create d.raw s2").code(1);
    assert!(refused.err.contains("d.qcow2"), "{refused:?}");
    place.hw("snapshot create d.qcow2 s2").ok();
    assert_eq!(
        snapshots(&place.hw("--json snapshot list d.qcow2").ok().json()),
        [named("s1", true), named("s2", true)]
    );
    place.hw("snapshot revert d.qcow2 s1").ok();
    equal(&place, ("raw", "start.raw"), ("qcow2", "d.qcow2"));
}

#[test]
fn what_a_crash_left_is_taken_over() {
    let place = Place::new();
    place.raw("start.raw", SIZE);
    place.hw("convert start.raw d.qcow2").ok();
    // Between the two steps: the disk has its second name, and the overlay is ready.
    fs::hard_link(place.path("d.qcow2"), place.path("d@s1.qcow2")).unwrap();
    fs::write(place.path("d.qcow2.new"), "an overlay").unwrap();
    place.hw("snapshot create d.qcow2 s1").ok();
    equal(&place, ("raw", "start.raw"), ("qcow2", "d.qcow2"));
    equal(&place, ("raw", "start.raw"), ("qcow2", "d@s1.qcow2"));
    assert!(!place.path("d.qcow2.new").exists());
}

pub(crate) fn uri(daemon: &Daemon, disk: &str) -> String {
    let shown = daemon.hw(&format!("--json disk show {disk}")).ok().json();
    shown["exports"][0]["uris"][0].as_str().expect("an export").to_owned()
}

#[test]
fn of_served_disks_at_one_instant() {
    let mut daemon = Daemon::new();
    let place = &daemon.place;
    for name in ["a", "b"] {
        place.raw(&format!("{name}-start.raw"), SIZE);
        place.hw(&format!("convert {name}-start.raw {name}.qcow2")).ok();
    }
    place.raw("c.raw", SIZE);
    fs::copy(place.path("c.raw"), place.path("c-start.raw")).unwrap();
    for disk in ["a.qcow2", "b.qcow2", "c.raw"] {
        daemon.hw(&format!("disk add {disk} --vm web")).ok();
    }
    daemon.hw("mark web before").ok();
    let taken = daemon.hw("--json snapshot create web s1").ok().json();
    let list = taken["snapshots"].as_array().unwrap();
    assert_eq!(list.len(), 3, "{taken}");
    assert!(list.iter().all(|s| s["set"] == list[0]["set"] && s["pause-us"].as_u64().is_some()), "{taken}");
    // Through the connection that a guest would keep: exports go on.
    for (disk, pattern) in [("a", 1), ("b", 2), ("c", 3)] {
        place.qemu_io("raw", &uri(&daemon, disk), &[&format!("write -P {pattern} 2M 64k"), "flush"]);
        let changed = daemon.hw(&format!("--json changes {disk} --since before")).ok().json();
        assert_eq!(crate::marks::ranges(&changed), [crate::marks::data(2 << 20, 64 << 10)], "{disk}");
    }
    let one = daemon.hw("--json snapshot create a s1").code(1);
    assert!(one.err.contains("a@s1.qcow2"), "{one:?}");
    // One of several cannot: none does.
    daemon.hw("snapshot create a s2").ok();
    let some = daemon.hw("snapshot create web s2").code(1);
    assert!(some.err.contains("a@s2.qcow2"), "{some:?}");
    assert!(!place.path("b@s2.qcow2").exists());
    place.qemu_io("raw", &uri(&daemon, "b"), &["write -P 5 3M 64k", "read -P 2 2M 64k"]);

    let clone = daemon.hw("--json snapshot clone a s1 clone.qcow2").ok().json();
    assert_eq!(clone["virtual-size"], SIZE);
    // After a restart the raw disk is its overlay.
    daemon.end();
    daemon.start();
    let place = &daemon.place;
    place.qemu_io("raw", &uri(&daemon, "c"), &["read -P 3 2M 64k"]);
    assert_eq!(snapshots(&daemon.hw("--json snapshot list a").ok().json()), [named("s1", true), named("s2", true)]);
    for disk in ["a", "b", "c"] {
        let marks = daemon.hw(&format!("--json marks list {disk}")).ok().json();
        assert!(marks["marks"][0]["refused"].is_null(), "{disk}: {marks}");
    }
    daemon.hw("snapshot revert a s1").ok();
    let refused = daemon.hw("--json marks list a").ok().json();
    assert!(!refused["marks"][0]["refused"].is_null(), "{refused}");
    daemon.end();
    let place = &daemon.place;
    equal(place, ("raw", "a-start.raw"), ("qcow2", "a.qcow2"));
    equal(place, ("raw", "a-start.raw"), ("qcow2", "clone.qcow2"));
    equal(place, ("raw", "b-start.raw"), ("qcow2", "b@s1.qcow2"));
    equal(place, ("raw", "c-start.raw"), ("raw", "c.raw"));
}

#[test]
fn nobody_loses_his_disk_to_a_revert() {
    let daemon = Daemon::new();
    daemon.place.hw("create d.qcow2 16M").ok();
    daemon.hw("disk add d.qcow2").ok();
    daemon.hw("snapshot create d s1").ok();
    let mut guest = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 4k", "-c", "sleep 60000", &uri(&daemon, "d")])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let connected = || daemon.hw("metrics").ok().out.contains("highwater_nbd_connections{disk=\"d\",export=\"d\"} 1");
    until("the guest is connected", connected);
    let refused = daemon.hw("snapshot revert d s1").code(1);
    assert!(refused.err.contains("connected") && refused.err.contains("shut the guest down"), "{refused:?}");
    guest.kill().unwrap();
    guest.wait().unwrap();
    until("the guest is gone", || !connected());
    daemon.hw("snapshot revert d s1").ok();
}
