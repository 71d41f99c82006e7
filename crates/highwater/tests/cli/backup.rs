//! Backups and restores with the real binary: of files, of disks while a guest writes, and over a kill.

use crate::daemon::Daemon;
use crate::snapshots::{equal, uri};
use crate::support::{Place, until};
use serde_json::Value;
use std::fs;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

fn kinds(report: &Value) -> Vec<&str> {
    report["disks"].as_array().unwrap().iter().map(|disk| disk["kind"].as_str().unwrap()).collect()
}

/// The one mark of a disk.
fn mark(place: &Place, disk: &str) -> String {
    let marks = place.hw(&format!("--json marks list {disk}")).ok().json();
    let marks = marks["marks"].as_array().unwrap();
    assert_eq!(marks.len(), 1, "{marks:?}");
    marks[0]["name"].as_str().unwrap().to_owned()
}

/// Restores a point into new images of both formats; they show what that raw file holds.
fn restores(place: &Place, point: &str, raw: &str) {
    for format in ["raw", "qcow2"] {
        let target = format!("restored.{format}");
        place.hw(&format!("restore repo {point} {target} -O {format}")).ok();
        equal(place, ("raw", raw), (format, &target));
        fs::remove_file(place.path(&target)).unwrap();
    }
}

#[test]
fn of_files_and_back() {
    let place = Place::new();
    place.hw("repo init repo").ok();
    place.raw("1.raw", SIZE);
    for (format, disk) in [("qcow2", "d.qcow2"), ("raw", "d.raw")] {
        place.hw(&format!("convert 1.raw {disk} -O {format}")).ok();
        let machine = format!("machine-{format}");
        let backup = |more: &str| place.hw(&format!("--json backup {disk} repo --vm {machine} {more}")).ok().json();
        let first = backup("");
        assert_eq!(kinds(&first), ["full"]);
        restores(&place, first["point"].as_str().unwrap(), "1.raw");
        // Nothing has changed, and the history says so.
        let second = backup("");
        assert_eq!(kinds(&second), ["incremental"], "{second}");
        assert_eq!((&second["disks"][0]["read"], &second["new-leaves"]), (&0.into(), &0.into()));
        // What is called unchanged since is proven by the point's hashes.
        let proved =
            place.hw(&format!("--json audit {disk} --repository repo --point {}", second["point"].as_str().unwrap()));
        let proved = proved.ok().json();
        assert_eq!((&proved["checked"], &proved["unchanged"]), (&SIZE.into(), &SIZE.into()), "{proved}");
        // Somebody else has written: the history cannot say what, and the hashes do.
        fs::copy(place.path("1.raw"), place.path("2.raw")).unwrap();
        let writes = ["write -P 7 5M 100k", "write -z 20M 3M", "write -P 9 63M 1M", "discard 1M 1M"];
        place.qemu_io(format, disk, &writes);
        place.qemu_io("raw", "2.raw", &writes);
        std::thread::sleep(Duration::from_millis(20));
        let third = backup("--note changed");
        assert_eq!(kinds(&third), ["compared"], "{third}");
        assert!(third["disks"][0]["reason"].as_str().unwrap().contains("modif") || format == "qcow2", "{third}");
        assert!(third["new-leaves"].as_u64().unwrap() < 60, "{third}");
        restores(&place, third["point"].as_str().unwrap(), "2.raw");
        restores(&place, first["point"].as_str().unwrap(), "1.raw");
        assert_eq!(kinds(&backup("--compare")), ["compared"]);
        // A point whose mark has gone proves nothing, and a history that is trusted against all reason is found out.
        let gone = place.hw(&format!("audit {disk} --repository repo --point {}", first["point"].as_str().unwrap()));
        assert!(gone.code(1).err.contains("does not have the mark"));
        mark(&place, disk);
        place.qemu_io(format, disk, &["write -P 0x77 8M 64k"]);
        place.hw(&format!("marks trust {disk}")).ok();
        let wrong = place.hw(&format!("audit {disk} --repository repo --vm {machine}"));
        assert!(wrong.code(1).out.contains("WRONG"));

        // In place, only what differs is written.
        let (one, three) = (first["point"].as_str().unwrap(), third["point"].as_str().unwrap());
        let there = place.hw(&format!("restore repo {one} {disk} -O {format}")).code(1);
        assert!(there.err.contains("--in-place"), "{there:?}");
        let back = place.hw(&format!("--json restore repo {one} {disk} -O {format} --in-place")).ok().json();
        assert!(back["written"].as_u64().unwrap() <= 8 * MIB, "{back}");
        assert!(back["same"].as_u64().unwrap() > 0, "{back}");
        equal(&place, ("raw", "1.raw"), (format, disk));

        // Others read what is exported: whole, as a chain, and as bytes.
        place.hw(&format!("export repo {one} base.qcow2")).ok();
        place.hw(&format!("export repo {three} over.qcow2 --since {one} --backing base.qcow2")).ok();
        equal(&place, ("raw", "1.raw"), ("qcow2", "base.qcow2"));
        equal(&place, ("raw", "2.raw"), ("qcow2", "over.qcow2"));
        assert!(fs::metadata(place.path("over.qcow2")).unwrap().len() < 8 * MIB);
        let children = place.hw("--json chain show base.qcow2").ok().out;
        assert!(children.contains("over.qcow2\"") && !children.contains("restoring"), "{children}");
        // Over an image that does not hold that point it would show what nobody ever wrote.
        let other = place.hw(&format!("export repo {three} wrong.qcow2 --since {three} --backing base.qcow2")).code(1);
        assert!(other.err.contains("does not hold") && !place.path("wrong.qcow2").exists(), "{other:?}");
        let binary = env!("CARGO_BIN_EXE_highwater");
        place.run("bash", ["-c", &format!("{binary} export repo {three} - | cmp - 2.raw")]).ok();
        for file in ["base.qcow2", "over.qcow2"] {
            fs::remove_file(place.path(file)).unwrap();
            let _identity = fs::remove_file(place.path(&format!("{file}.identity")));
        }
    }
    place.hw("repo verify repo").ok();
    let left =
        fs::read_dir(place.dir()).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().contains("restoring"));
    assert!(!left);
}

/// Machines of one repository are not taken for each other.
#[test]
fn whose_disk_it_is() {
    let place = Place::new();
    place.hw("repo init repo").ok();
    for directory in ["one", "two"] {
        fs::create_dir(place.path(directory)).unwrap();
        place.raw(&format!("{directory}/disk.raw"), 4 * MIB);
    }
    place.qemu_io("raw", "two/disk.raw", &["write -P 2 0 1M"]);
    place.hw("backup one/disk.raw repo").ok();
    let taken = place.hw("backup two/disk.raw repo").code(1);
    assert!(taken.err.contains("one/disk.raw") && taken.err.contains("--vm"), "{taken:?}");
    place.hw("backup two/disk.raw repo --vm two").ok();
    let which = place.hw("restore repo latest t.raw").code(1);
    assert!(which.err.contains("several machines") && which.err.contains("--vm"), "{which:?}");
    for (machine, file) in [("disk", "one/disk.raw"), ("two", "two/disk.raw")] {
        place.hw(&format!("restore repo latest t.raw --vm {machine}")).ok();
        equal(&place, ("raw", file), ("raw", "t.raw"));
        fs::remove_file(place.path("t.raw")).unwrap();
    }
    // It was moved, and its owner says that it is the same.
    fs::rename(place.path("one"), place.path("three")).unwrap();
    place.hw("backup three/disk.raw repo").code(1);
    let moved = place.hw("--json backup three/disk.raw repo --vm disk").ok().json();
    assert_eq!(kinds(&moved), ["incremental"], "{moved}");
    let data_file = place.hw("restore repo latest t.qcow2 --vm two -O qcow2 -o data_file=two/disk.raw").code(1);
    assert!(data_file.err.contains("external data file"), "{data_file:?}");
    equal(&place, ("raw", "two/disk.raw"), ("raw", "two/disk.raw"));
}

#[test]
fn what_cannot_be_is_said_and_leaves_nothing() {
    let place = Place::new();
    place.raw("d.raw", 8 * MIB);
    let missing = place.hw("backup d.raw nowhere").code(1);
    assert!(missing.err.contains("highwater repo init"), "{missing:?}");
    assert!(!place.path("nowhere").exists());
    place.hw("repo init repo").ok();
    let empty = place.hw("restore repo latest t.raw").code(1);
    assert!(empty.err.contains("latest") && !place.path("t.raw").exists(), "{empty:?}");
    place.hw("backup d.raw repo").ok();
    let s3 = place.hw("backup d.raw s3://bucket/x").code(1);
    assert!(s3.err.contains("not there yet"), "{s3:?}");
    let absent = place.hw("restore repo latest t.raw --disk other").code(1);
    assert!(absent.err.contains("no disk other") && absent.err.contains("it has d"), "{absent:?}");
    // A damaged pack: the restore says so, and leaves no half image.
    let packs: Vec<_> = fs::read_dir(place.path("repo/packs"))
        .unwrap()
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { fs::read_dir(path).unwrap().map(|e| e.unwrap().path()).collect() } else { vec![path] }
        })
        .collect();
    for pack in packs {
        let mut bytes = fs::read(&pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let _writable = std::process::Command::new("chmod").args(["u+w"]).arg(&pack).status();
        fs::write(&pack, bytes).unwrap();
    }
    let damaged = place.hw("restore repo latest t.raw").code(1);
    assert!(damaged.err.contains("packs/") && !place.path("t.raw").exists(), "{damaged:?}");
    // What is damaged is not built upon.
    let anew = place.hw("--json backup d.raw repo --full").ok().json();
    assert_eq!(kinds(&anew), ["full"]);
    place.hw("restore repo latest t.raw").ok();
    equal(&place, ("raw", "d.raw"), ("raw", "t.raw"));
}

/// The point holds the instant at which the job began, though the guest writes all the while.
#[test]
fn of_disks_while_a_guest_writes() {
    let mut daemon = Daemon::new();
    let place = &daemon.place;
    place.hw("repo init repo").ok();
    place.raw("1.raw", SIZE);
    place.hw("convert 1.raw a.qcow2").ok();
    place.hw("convert 1.raw b.raw -O raw").ok();
    daemon.hw("disk add a.qcow2 --vm machine").ok();
    daemon.hw("disk add b.raw --vm machine").ok();
    let (a, b) = (uri(&daemon, "a"), uri(&daemon, "b"));
    let job = format!(
        r#"{{"job":"backup","disks":["machine"],"repository":{{"directory":"{}"}}}}"#,
        place.path("repo").display()
    );
    fs::write(place.path("job.json"), job).unwrap();
    let mut points = Vec::new();
    for round in 0..3u64 {
        for (disk, uri) in [("a", &a), ("b", &b)] {
            let now = place.path(&format!("{disk}{round}.raw"));
            fs::copy(
                place.path(&if round == 0 { "1.raw".to_owned() } else { format!("{disk}{}-later.raw", round - 1) }),
                now,
            )
            .unwrap();
            let writes =
                [format!("write -P {} {}M 300k", 10 + round, 3 + round), format!("write -z {}M 1M", 30 + round)];
            let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
            place.qemu_io("raw", uri, &writes);
            place.qemu_io("raw", &format!("{disk}{round}.raw"), &writes);
        }
        let id = daemon.hw("--json jobs start job.json --rate 24M").ok().json()["id"].as_u64().unwrap();
        until("it reads", || {
            let job = daemon.hw(&format!("--json jobs show {id}")).ok().json();
            job["total"].as_u64() > Some(0) || job["state"] != "running"
        });
        for (disk, uri) in [("a", &a), ("b", &b)] {
            let later = format!("{disk}{round}-later.raw");
            fs::copy(place.path(&format!("{disk}{round}.raw")), place.path(&later)).unwrap();
            let writes = [format!("write -P {} 40M 2M", 90 + round), "write -P 1 0 64k".to_owned(), "flush".to_owned()];
            let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
            place.qemu_io("raw", uri, &writes);
            place.qemu_io("raw", &later, &writes);
        }
        daemon.hw(&format!("jobs wait {id}")).ok();
        let report = daemon.hw(&format!("--json jobs show {id}")).ok().json()["result"].clone();
        let expected = if round == 0 { "full" } else { "incremental" };
        assert_eq!(kinds(&report), [expected, expected], "{report}");
        points.push(report["point"].as_str().unwrap().to_owned());
        // One mark is remembered for this repository, and no view is left.
        let marks = daemon.hw("--json marks list a").ok().json();
        assert_eq!(marks["marks"].as_array().unwrap().len(), 1, "{marks}");
        assert_eq!(daemon.hw("--json views list").ok().json()["views"], Value::Array(Vec::new()));
    }
    for (round, point) in points.iter().enumerate() {
        for disk in ["a", "b"] {
            place.hw(&format!("restore repo {point} t.raw --disk {disk}")).ok();
            equal(place, ("raw", &format!("{disk}{round}.raw")), ("raw", "t.raw"));
            fs::remove_file(place.path("t.raw")).unwrap();
        }
    }
    daemon.end();
}

/// Killed at any moment, the daemon begins the backup again, and what it makes then is whole.
#[test]
fn a_backup_goes_on_after_a_kill() {
    let mut daemon = Daemon::new();
    daemon.place.hw("repo init repo").ok();
    daemon.place.raw("1.raw", SIZE);
    daemon.place.hw("convert 1.raw a.qcow2").ok();
    daemon.hw("disk add a.qcow2").ok();
    let job = format!(
        r#"{{"job":"backup","disks":["a"],"repository":{{"directory":"{}"}}}}"#,
        daemon.place.path("repo").display()
    );
    fs::write(daemon.place.path("job.json"), job).unwrap();
    for round in 0..4u64 {
        let write = format!("write -P {} {}M 1M", 20 + round, 5 * round);
        daemon.place.qemu_io("raw", &uri(&daemon, "a"), &[&write, "flush"]);
        daemon.place.qemu_io("raw", "1.raw", &[&write]);
        daemon.hw("jobs start job.json --rate 40M").ok();
        std::thread::sleep(Duration::from_millis(100 + 250 * round));
        daemon.server.take().unwrap().kill();
        daemon.start();
        until("the jobs have ended", || {
            let jobs = daemon.hw("--json jobs list").ok().json();
            jobs["jobs"].as_array().unwrap().iter().all(|job| job["state"] != "running")
        });
        let jobs = daemon.hw("--json jobs list").ok().json();
        for job in jobs["jobs"].as_array().unwrap() {
            assert_eq!(job["state"], "done", "{job}");
            daemon.hw(&format!("jobs forget {}", job["id"])).ok();
        }
        daemon.place.hw("restore repo latest t.raw").ok();
        equal(&daemon.place, ("raw", "1.raw"), ("raw", "t.raw"));
        fs::remove_file(daemon.place.path("t.raw")).unwrap();
    }
    daemon.place.hw("repo check repo").ok();
    let report = daemon.hw("--json backup a repo").ok().json();
    assert_eq!(kinds(&report), ["incremental"], "{report}");
    let marks = daemon.hw("--json marks list a").ok().json();
    assert_eq!(marks["marks"].as_array().unwrap().len(), 1, "{marks}");
    daemon.end();
}
