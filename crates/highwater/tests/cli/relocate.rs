//! Promotion, moves, commits and deleted snapshots: of files, and of disks while a guest writes.

use crate::daemon::Daemon;
use crate::snapshots::{equal, uri};
use crate::support::{Place, until};
use serde_json::Value;
use std::fs;
use std::process::{Child, Command, Stdio};

pub(crate) const SIZE: u64 = 64 << 20;

/// A disk `d.qcow2` with the snapshots s1, s2 and s3; `SN.raw` is what each holds, and `now.raw` what the disk holds.
pub(crate) fn with_snapshots(place: &Place) {
    place.raw("s1.raw", SIZE);
    place.hw("convert s1.raw d.qcow2").ok();
    let steps = [
        ("s1", "s2", vec!["write -P 1 1M 3M", "write -z 20M 1M"]),
        ("s2", "s3", vec!["write -P 2 2M 64k", "write -P 3 50M 1M", "write -z 0 64k"]),
        ("s3", "now", vec!["write -P 4 2M 4k", "write -P 5 60M 2M"]),
    ];
    for (name, next, writes) in steps {
        place.hw(&format!("snapshot create d.qcow2 {name}")).ok();
        fs::copy(place.path(&format!("{name}.raw")), place.path(&format!("{next}.raw"))).unwrap();
        place.qemu_io("qcow2", "d.qcow2", &writes);
        place.qemu_io("raw", &format!("{next}.raw"), &writes);
    }
}

fn holds(place: &Place, snapshots: &[&str]) {
    equal(place, ("raw", "now.raw"), ("qcow2", "d.qcow2"));
    for name in snapshots {
        equal(place, ("raw", &format!("{name}.raw")), ("qcow2", &format!("d@{name}.qcow2")));
    }
    assert_eq!(names(place), snapshots);
}

/// The snapshots of `d.qcow2`.
pub(crate) fn names(place: &Place) -> Vec<String> {
    let list = place.hw("--json snapshot list d.qcow2").ok().json();
    list["snapshots"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn snapshots_are_deleted_in_any_order_and_both_ways() {
    for (first, second, third) in [
        ("s1", "s2", "s3"),
        ("s3", "s2", "s1"),
        ("s2", "s1", "s3"),
        ("s3 --into child", "s2 --into child", "s1 --into child"),
    ] {
        let place = Place::new();
        with_snapshots(&place);
        holds(&place, &["s1", "s2", "s3"]);
        let mut left = vec!["s1", "s2", "s3"];
        for gone in [first, second, third] {
            place.hw(&format!("snapshot delete d.qcow2 {gone}")).ok();
            left.retain(|name| *name != &gone[..2]);
            holds(&place, &left);
        }
        assert!(!fs::read_dir(place.dir()).unwrap().any(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.contains('@') || name.ends_with(".new")
        }));
        let info = place.tool("qemu-img info --output=json d.qcow2").ok().json();
        assert!(info["backing-filename"].is_null(), "{info}");
    }
}

#[test]
fn what_others_stand_on_stays() {
    let place = Place::new();
    with_snapshots(&place);
    place.hw("snapshot clone d.qcow2 s3 clone.qcow2").ok();
    let refused = place.hw("snapshot delete d.qcow2 s3 --into parent").code(1);
    assert!(refused.err.contains("clone.qcow2"), "{refused:?}");
    // The other way harms nobody: the layer stays for the clone.
    place.hw("snapshot delete d.qcow2 s3").ok();
    equal(&place, ("raw", "now.raw"), ("qcow2", "d.qcow2"));
    equal(&place, ("raw", "s3.raw"), ("qcow2", "clone.qcow2"));
    let missing = place.hw("snapshot delete d.qcow2 s9").code(1);
    assert!(missing.err.contains("no snapshot \"s9\""), "{missing:?}");
}

#[test]
fn a_resized_layer_is_merged() {
    for size in ["96M", "--shrink 48M"] {
        let place = Place::new();
        place.raw("now.raw", SIZE);
        place.hw("convert now.raw d.qcow2").ok();
        place.hw("snapshot create d.qcow2 s1").ok();
        place.hw(&format!("resize d.qcow2 {size}")).ok();
        place.hw(&format!("resize -f raw now.raw {size}")).ok();
        for (format, file) in [("qcow2", "d.qcow2"), ("raw", "now.raw")] {
            place.qemu_io(format, file, &["write -P 9 47M 64k"]);
        }
        place.hw("snapshot delete d.qcow2 s1 --into parent").ok();
        equal(&place, ("raw", "now.raw"), ("qcow2", "d.qcow2"));
    }
}

#[test]
fn files_are_promoted_and_committed() {
    let place = Place::new();
    place.raw("base.raw", SIZE);
    place.hw("create -f qcow2 -b base.raw -F raw clone.qcow2").ok();
    place.hw("mark clone.qcow2 before").ok();
    let server = place.start("serve clone.qcow2");
    place.qemu_io("raw", server.uri(), &["write -P 1 1M 1M"]);
    assert!(server.end().success());
    fs::copy(place.path("base.raw"), place.path("now.raw")).unwrap();
    place.qemu_io("raw", "now.raw", &["write -P 1 1M 1M"]);
    for (disk, target) in [("clone.qcow2", "full.qcow2"), ("full.qcow2", "full.raw")] {
        let done = place.hw(&format!("--json promote {disk} {target}")).ok().json();
        assert!(done["copied"].as_u64().unwrap() > 0, "{done}");
        let format = target.rsplit('.').next().unwrap();
        equal(&place, ("raw", "now.raw"), (format, target));
        let changed = place.hw(&format!("--json changes {target} --since before")).ok().json();
        assert_eq!(crate::marks::ranges(&changed), [crate::marks::data(1 << 20, 1 << 20)], "{target}");
    }
    let taken = place.hw("promote full.raw full.qcow2").code(1);
    assert!(taken.err.contains("another name"), "{taken:?}");
    // A commit into a parent that is not a snapshot's: the parent is the disk then.
    place.hw("create -f qcow2 -b full.raw -F raw top.qcow2").ok();
    place.qemu_io("qcow2", "top.qcow2", &["write -P 7 5M 64k"]);
    place.qemu_io("raw", "now.raw", &["write -P 7 5M 64k"]);
    let done = place.hw("--json commit top.qcow2").ok().json();
    assert!(done["file"].as_str().unwrap().ends_with("full.raw"), "{done}");
    equal(&place, ("raw", "now.raw"), ("raw", "full.raw"));
}

/// A guest that writes at full speed until it is ended, and then says whether all that it wrote is there.
struct Guest {
    child: Child,
    uri: String,
}

impl Guest {
    /// Writes blocks of 4 KiB whose content tells their place and their round, and reads back what it wrote before.
    fn start(place: &Place, uri: &str) -> Self {
        let script = r#"
import nbd, random, sys, os, struct
uri, size, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
h = nbd.NBD(); h.connect_uri(uri)
chance, known, n = random.Random(7), {}, 0
def block(at, n): return struct.pack("<QQ", at, n) * 256
while not os.path.exists(stop):
    at = chance.randrange(size >> 12) << 12
    if chance.random() < 0.3 and known:
        at = chance.choice(list(known)) if chance.random() < 0.02 else at
        if at in known:
            found = bytes(h.pread(4096, at))
            assert found == (block(at, known[at]) if known[at] else bytes(4096)), ("lost", at, known[at], found[:16])
    elif chance.random() < 0.03:
        h.zero(4096, at); known[at] = 0
    else:
        n += 1
        h.pwrite(block(at, n), at); known[at] = n
        if n % 500 == 0: h.flush()
h.flush()
for at, n in known.items():
    found = bytes(h.pread(4096, at))
    assert found == (block(at, n) if n else bytes(4096)), ("lost at the end", at, n, found[:16])
print(len(known))
"#;
        fs::write(place.path("guest.py"), script).unwrap();
        let _ = fs::remove_file(place.path("stop"));
        let child = Command::new("/usr/bin/python3")
            .args(["guest.py", uri, &SIZE.to_string(), "stop"])
            .current_dir(place.dir())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, uri: uri.to_owned() }
    }

    #[track_caller]
    fn end(self, place: &Place) -> u64 {
        fs::write(place.path("stop"), "").unwrap();
        let ended = crate::support::ended(self.child).ok();
        let _ = self.uri;
        ended.out.trim().parse().expect("a number")
    }
}

#[test]
fn a_guest_writes_through_all_of_it() {
    let mut daemon = Daemon::new();
    daemon.place.raw("base.raw", SIZE);
    daemon.place.hw("create -f qcow2 -b base.raw -F raw d.qcow2").ok();
    daemon.hw("disk add d.qcow2").ok();
    daemon.hw("mark d before").ok();
    let guest = Guest::start(&daemon.place, &uri(&daemon, "d"));
    let written = || {
        let metrics = daemon.hw("metrics").ok().out;
        let lines = metrics.lines().filter(|line| line.starts_with("highwater_nbd_requests_total"));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    until("the guest writes", || written() > 100.0);
    let mut pauses: Vec<Value> = Vec::new();
    let rounds = std::env::var("HIGHWATER_ROUNDS").map_or(1, |text| text.parse().expect("a number")) * 3;
    let mut last = String::new();
    for round in 0..rounds {
        for name in ["a", "b", "c"] {
            let taken = daemon.hw(&format!("--json snapshot create d {name}")).ok().json();
            pauses.push(taken["snapshots"][0]["pause-us"].clone());
        }
        for gone in [["b", "c --into parent", "a"], ["c --into child", "a", "b"], ["a", "b", "c"]][round % 3] {
            let merged = daemon.hw(&format!("--json snapshot delete d {gone}")).ok().json();
            pauses.push(merged["pause-us"].clone());
        }
        last = format!("{round}.{}", ["raw", "qcow2", "qcow2"][round % 3]);
        let moved = daemon.hw(&format!("--json promote d {last} --remove-source")).ok().json();
        pauses.push(moved["pause-us"].clone());
        assert!(moved["copied"].as_u64().unwrap() <= SIZE, "one pass: {moved}");
    }
    let mut waited: Vec<u64> = pauses.iter().map(|pause| pause.as_u64().expect("a pause")).collect();
    waited.sort_unstable();
    println!(
        "{} exchanges; the guest's writes waited {} us in the middle, {} at most",
        waited.len(),
        waited[waited.len() / 2],
        waited[waited.len() - 1]
    );
    let blocks = guest.end(&daemon.place);
    assert!(blocks > 100, "the guest wrote {blocks} blocks");
    // What changed since the mark has not been forgotten: what is told as unchanged is as in the base.
    let changed = daemon.hw("--json changes d --since before").ok().json();
    daemon.end();
    daemon.place.tool(&format!("qemu-img check {last}")).ok();
    daemon.place.hw(&format!("convert {last} last.raw")).ok();
    let (base, last) =
        (fs::read(daemon.place.path("base.raw")).unwrap(), fs::read(daemon.place.path("last.raw")).unwrap());
    let mut told = vec![false; (SIZE >> 16) as usize];
    for (start, length, _) in crate::marks::ranges(&changed) {
        told[(start >> 16) as usize..((start + length) >> 16) as usize].fill(true);
    }
    for (granule, told) in told.iter().enumerate() {
        let range = granule << 16..(granule + 1) << 16;
        assert!(*told || base[range.clone()] == last[range], "granule {granule} changed, and nobody tells");
    }
    daemon.start();
    assert_eq!(daemon.hw("--json disk show d").ok().json()["state"], "open");
    daemon.end();
}

#[test]
fn work_on_layers_does_not_meet_and_can_be_called_off() {
    let daemon = Daemon::new();
    let place = &daemon.place;
    with_snapshots(place);
    daemon.hw("disk add d.qcow2").ok();
    let job = |description: &str| {
        fs::write(place.path("job.json"), description).unwrap();
        daemon.hw("--json jobs start job.json --rate 64k").ok().json()["id"].as_u64().unwrap()
    };
    let kinds = [
        r#"{"job":"consolidate","disk":"d","snapshot":"s2","into":"child"}"#.to_owned(),
        r#"{"job":"consolidate","disk":"d","snapshot":"s3","into":"child"}"#.to_owned(),
        r#"{"job":"consolidate","disk":"d","snapshot":"s3","into":"parent"}"#.to_owned(),
        format!(r#"{{"job":"promote","disk":"d","target":"{}","format":"raw"}}"#, place.path("t.raw").display()),
    ];
    for (n, kind) in kinds.iter().enumerate() {
        if kind.contains("promote") {
            // A snapshot whose deletion was begun is none any more, and goes first.
            for line in
                ["snapshot clone d s3 c.qcow2", "snapshot revert d s3", "snapshot create d s4", "snapshot delete d s2"]
            {
                let refused = daemon.hw(line).code(1);
                assert!(
                    refused.err.contains("its deletion was begun") && refused.err.contains("\"s3\""),
                    "{line}: {refused:?}"
                );
            }
            daemon.hw("snapshot delete d s3").ok();
        }
        let id = job(kind);
        until("it is at work", || daemon.hw(&format!("--json jobs show {id}")).ok().json()["done"].as_u64() > Some(0));
        let promote = daemon.hw("promote d other.qcow2").code(1);
        assert!(promote.err.contains("highwater jobs list"), "{promote:?}");
        if kind.contains("consolidate") {
            let snapshot = daemon.hw("snapshot create d s4").code(1);
            assert!(snapshot.err.contains("being merged"), "{snapshot:?}");
        } else {
            // An overlay takes part in a promotion.
            daemon.hw("snapshot create d s4").ok();
        }
        // A guest writes meanwhile.
        let write = format!("write -P {} {}M 64k", 0x50 + n, 10 + n);
        place.qemu_io("raw", &uri(&daemon, "d"), &[&write, "flush"]);
        place.qemu_io("raw", "now.raw", &[&write]);
        daemon.hw(&format!("jobs pause {id}")).ok();
        daemon.hw(&format!("jobs cancel {id}")).ok();
        daemon.hw(&format!("jobs wait {id}")).code(130);
        let chain = daemon.hw("--json chain verify d").ok().json();
        assert_eq!(chain["sound"], true, "{kind}: {chain}");
        place.tool(&format!("qemu-img compare -f raw -F raw now.raw {}", uri(&daemon, "d"))).ok();
        assert!(!place.path("t.raw").exists(), "what was made for a cancelled job is gone");
    }
    for name in ["s4", "s2", "s1"] {
        daemon.hw(&format!("snapshot delete d {name}")).ok();
        place.tool(&format!("qemu-img compare -f raw -F raw now.raw {}", uri(&daemon, "d"))).ok();
    }
}

/// The daemon was killed after a promotion's last step, and before the job's end was noted.
#[test]
fn a_promotion_whose_end_was_not_noted_comes_to_its_end() {
    let mut daemon = Daemon::new();
    with_snapshots(&daemon.place);
    daemon.hw("disk add d.qcow2").ok();
    let target = daemon.place.path("full.qcow2");
    let kind = format!(r#"{{"job":"promote","disk":"d","target":"{}","format":"qcow2"}}"#, target.display());
    fs::write(daemon.place.path("job.json"), kind).unwrap();
    daemon.hw("jobs start job.json").ok();
    daemon.hw("jobs wait 1").ok();
    daemon.end();
    let list = daemon.place.path("state/jobs.json");
    let mut jobs: Value = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
    assert!(!jobs["jobs"][0]["end"].is_null(), "{jobs}");
    jobs["jobs"][0].as_object_mut().unwrap().remove("end");
    fs::write(&list, jobs.to_string()).unwrap();
    daemon.start();
    until("the job has ended", || daemon.hw("--json jobs show 1").ok().json()["state"] != "running");
    let job = daemon.hw("--json jobs show 1").ok().json();
    assert_eq!(job["state"], "done", "{job}");
    equal(&daemon.place, ("raw", "now.raw"), ("raw", &uri(&daemon, "d")));
    // Somebody else's disk is not taken for the target.
    daemon.place.hw("create other.qcow2 64M").ok();
    daemon.hw("disk add other.qcow2").ok();
    let refused = daemon.hw("promote d other.qcow2").code(1);
    assert!(refused.err.contains("is the image of disk \"other\""), "{refused:?}");
}
