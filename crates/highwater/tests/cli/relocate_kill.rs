//! SIGKILL of the daemon while images are exchanged under a guest that writes: nothing that was answered is lost, the chain
//! opens and is sound, jobs go on, and no change is missed.
//!
//! `HIGHWATER_ROUNDS` multiplies the kills, `HIGHWATER_SEED` replays a run.

use crate::daemon::Daemon;
use crate::snapshots::uri;
use crate::support::{ended, until};
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

const SIZE: u64 = 64 << 20;
/// Kills in one run.
const KILLS: u64 = 8;

/// Writes until the server is gone, and notes what each block may hold then: what was durable, and what was written since the
/// last flush, as after any crash. Or verifies that, or writes for a moment.
const SCRIPT: &str = r#"
import json, nbd, random, struct, sys
what, uri, size, state, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
h = nbd.NBD(); h.connect_uri(uri)
known = {int(at): n for at, n in json.load(open(state)).items()}
base = open("base.raw", "rb")
def block(at, n):
    if n < 0: base.seek(at); return base.read(4096)
    return struct.pack("<QQ", at, n) * 256 if n else bytes(4096)
if what == "verify":
    for at, allowed in known.items():
        found = bytes(h.pread(4096, at))
        fits = [n for n in allowed if found == block(at, n)]
        assert fits, ("lost", at, allowed, struct.unpack("<QQ", found[:16]))
        known[at] = fits[-1:]
    # What was found must stay.
    h.flush()
    json.dump(known, open(state, "w"))
    sys.exit()
chance, n, since = random.Random(seed), seed << 32, set()
left = 400 if what == "burst" else None
try:
    while left is None or left > 0:
        left = left and left - 1
        at = chance.randrange(size >> 12) << 12
        n += 1
        value = 0 if chance.random() < 0.05 else n
        known.setdefault(at, [-1]).append(value)
        since.add(at)
        if value: h.pwrite(block(at, n), at)
        else: h.zero(4096, at)
        if n % 50 == 0:
            h.flush()
            for at in since: known[at] = known[at][-1:]
            since.clear()
    h.flush()
    for at in since: known[at] = known[at][-1:]
except nbd.Error:
    pass
json.dump(known, open(state, "w"))
"#;

fn rounds() -> u64 {
    let set = std::env::var("HIGHWATER_ROUNDS").ok();
    KILLS * set.map_or(1, |text| text.parse().expect("HIGHWATER_ROUNDS is a number"))
}

fn seed() -> u64 {
    let set = std::env::var("HIGHWATER_SEED").ok();
    set.map_or(1, |text| text.parse().expect("HIGHWATER_SEED is a number"))
}

fn jobs(daemon: &Daemon) -> Vec<Value> {
    daemon.hw("--json jobs list").ok().json()["jobs"].as_array().expect("a list").clone()
}

#[track_caller]
fn trusted(daemon: &Daemon, round: u64) {
    let marks = daemon.hw("--json marks list d").ok().json();
    let list = marks["marks"].as_array().expect("a list");
    assert!(!list.is_empty() && list.iter().all(|mark| mark["refused"].is_null()), "round {round}: {marks}");
}

#[test]
fn nothing_is_lost_by_a_kill_at_any_moment() {
    let mut daemon = Daemon::new();
    daemon.place.raw("base.raw", SIZE);
    daemon.place.hw("create -f qcow2 -b base.raw -F raw d.qcow2").ok();
    fs::write(daemon.place.path("client.py"), SCRIPT).unwrap();
    fs::write(daemon.place.path("state.json"), "{}").unwrap();
    daemon.hw("disk add d.qcow2").ok();
    daemon.hw("mark d before").ok();
    let mut random = seed();
    for name in ["x", "y", "z"] {
        daemon.hw(&format!("snapshot create d {name}")).ok();
    }
    let mut draw = move |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let client = |daemon: &Daemon, what: &str, seed: u64| {
        let (uri, size) = (uri(daemon, "d"), SIZE.to_string());
        let mut command = Command::new("/usr/bin/python3");
        command.args(["client.py", what, &uri, &size, "state.json", &seed.to_string()]);
        command.current_dir(daemon.place.dir()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("python3 with libnbd")
    };
    let mut targets = 0;
    let (mut begun, mut gone_on) = (0u64, 0u64);
    for round in 1..=rounds() {
        let writer = client(&daemon, "write", round);
        std::thread::sleep(Duration::from_millis(150));
        let list = daemon.hw("--json snapshot list d").ok().json();
        let names: Vec<String> =
            list["snapshots"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
        // Jobs mostly, once there is something to work on.
        let work = match draw(if names.len() < 3 { 5 } else { 3 }) {
            0 => {
                targets += 1;
                let (kind, format) = if draw(2) == 0 { ("raw", "raw") } else { ("qcow2", "qcow2") };
                let target = daemon.place.path(&format!("t{targets}.{kind}"));
                format!(r#"{{"job":"promote","disk":"d","target":"{}","format":"{format}"}}"#, target.display())
            }
            1 if !names.is_empty() => {
                let name = &names[draw(names.len() as u64) as usize];
                format!(r#"{{"job":"consolidate","disk":"d","snapshot":"{name}"}}"#)
            }
            2 if !names.is_empty() => r#"{"job":"consolidate","disk":"d"}"#.to_owned(),
            _ => String::new(),
        };
        println!("round {round}: {}", if work.is_empty() { "snapshot" } else { &work });
        if work.is_empty() {
            // The snapshot is killed itself.
            let taker = daemon.place.spawn(&format!("--api api.sock snapshot create d s{round}"));
            std::thread::sleep(Duration::from_micros(draw(60_000)));
            daemon.server.take().unwrap().kill();
            ended(taker);
        } else {
            fs::write(daemon.place.path("job.json"), work).unwrap();
            // Slow enough that most are cut off.
            daemon.hw("jobs start job.json --rate 16M").ok();
            begun += 1;
            std::thread::sleep(Duration::from_micros(draw(1_500_000)));
            daemon.server.take().unwrap().kill();
        }
        ended(writer).ok();
        daemon.start();
        let shown = daemon.hw("--json disk show d").ok().json();
        assert_eq!(shown["state"], "open", "round {round}: {shown}");
        ended(client(&daemon, "verify", 0)).ok();
        trusted(&daemon, round);
        // What a guest writes while a job goes on reaches both sides.
        ended(client(&daemon, "burst", rounds() + round)).ok();
        // What was interrupted goes on, and comes to its end.
        for job in jobs(&daemon).iter().filter(|job| job["state"] == "running") {
            gone_on += 1;
            // It may have ended just now.
            let _ = daemon.hw(&format!("jobs set-rate {} none", job["id"]));
        }
        until("the jobs have ended", || jobs(&daemon).iter().all(|job| job["state"] != "running"));
        for job in jobs(&daemon) {
            assert_eq!(job["state"], "done", "round {round}: {job}");
            daemon.hw(&format!("jobs forget {}", job["id"])).ok();
        }
        ended(client(&daemon, "verify", 0)).ok();
        let chain = daemon.hw("--json chain verify d").ok().json();
        assert_eq!(chain["sound"], true, "round {round}: {chain}");
        trusted(&daemon, round);
    }
    let changed = daemon.hw("--json changes d --since before").ok().json();
    let chain = daemon.hw("--json chain show d").ok().json();
    daemon.end();
    println!("{} kills, {begun} jobs, of which {gone_on} went on after a kill", rounds());
    for layer in chain["layers"].as_array().unwrap().iter().filter(|layer| layer["format"] == "qcow2") {
        // 3: space that a killed process had set aside is lost, and nothing else.
        let checked = daemon.place.tool(&format!("qemu-img check -f qcow2 {}", layer["file"].as_str().unwrap()));
        assert!(matches!(checked.code, Some(0 | 3)), "{checked:?}");
    }
    let top = &chain["layers"][0];
    let (file, format) = (top["file"].as_str().unwrap(), top["format"].as_str().unwrap());
    daemon.place.tool(&format!("qemu-img convert -f {format} -O raw {file} last.raw")).ok();
    let read = |name: &str| fs::read(daemon.place.path(name)).unwrap();
    let (base, last) = (read("base.raw"), read("last.raw"));
    let mut told = vec![false; (SIZE >> 16) as usize];
    for (start, length, _) in crate::marks::ranges(&changed) {
        told[(start >> 16) as usize..((start + length).div_ceil(1 << 16)) as usize].fill(true);
    }
    for (granule, told) in told.iter().enumerate() {
        let range = granule << 16..(granule + 1) << 16;
        assert!(*told || base[range.clone()] == last[range], "granule {granule} changed, and nobody tells");
    }
}
