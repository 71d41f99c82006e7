//! Jobs are paused, slowed down, stopped and remembered.

use crate::daemon::Daemon;
use crate::support::{ended, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// Starts a job that writes zeroes for a very long time, at so many bytes a second.
fn begin(daemon: &Daemon, rate: u64) -> u64 {
    let file = daemon.place.path("long.raw");
    let options = json!({"preallocation": "full"});
    let job = json!({"job": "create", "file": file, "format": "raw", "size": 200u64 << 30, "options": options});
    start(daemon, &job, rate)
}

fn start(daemon: &Daemon, job: &Value, rate: u64) -> u64 {
    let path = format!("/v1/jobs?bytes-per-second={rate}");
    let (code, text) = daemon.curl("POST", &path, Some(&job.to_string()));
    assert_eq!(code, 202, "{text}");
    let id = serde_json::from_str::<Value>(&text).unwrap()["id"].as_u64().unwrap();
    until("the job has done something", || done(daemon, id) > 0);
    id
}

fn show(daemon: &Daemon, id: u64) -> Value {
    daemon.hw(&format!("--json jobs show {id}")).ok().json()
}

fn done(daemon: &Daemon, id: u64) -> u64 {
    show(daemon, id)["done"].as_u64().unwrap()
}

/// Pauses a job, and returns how far it is when what was under way has ended.
fn pause(daemon: &Daemon, id: u64) -> u64 {
    let paused = daemon.hw(&format!("--json jobs pause {id}")).ok().json();
    assert_eq!(paused["state"], "paused", "{paused}");
    std::thread::sleep(Duration::from_millis(300));
    done(daemon, id)
}

/// Bytes a second, over two seconds.
fn measured(daemon: &Daemon, id: u64) -> f64 {
    let (start, before) = (Instant::now(), done(daemon, id));
    std::thread::sleep(Duration::from_secs(2));
    let after = done(daemon, id);
    (after - before) as f64 / start.elapsed().as_secs_f64()
}

/// Not faster than that, and not hindered by it: on a machine with much else to do it may well be slower.
fn near(found: f64, expected: u64) {
    let part = found / expected as f64;
    assert!((0.25..1.25).contains(&part), "expected {expected} bytes a second, found {found}");
}

#[test]
fn a_pause_stops_the_work_and_its_end_lets_it_go_on() {
    let daemon = Daemon::new();
    let mut events = daemon.place.spawn("--api api.sock events");
    let lines = BufReader::new(events.stdout.take().unwrap()).lines();
    // Subscribed before the job begins: what is told is told in this order.
    std::thread::sleep(Duration::from_millis(300));
    let id = begin(&daemon, 20 * MIB);
    let before = pause(&daemon, id);
    std::thread::sleep(Duration::from_secs(1));
    let status = show(&daemon, id);
    assert_eq!((&status["done"], &status["state"], &status["rate"]), (&json!(before), &json!("paused"), &json!(0)));
    assert!(status["seconds-left"].is_null(), "{status}");
    daemon.hw(&format!("jobs pause {id}")).ok();
    assert!(daemon.hw("status").ok().out.contains("jobs: 0 running, 1 paused"));
    let refused = daemon.hw(&format!("jobs forget {id}")).code(1);
    assert!(refused.err.contains("is running"), "{refused:?}");

    let resumed = daemon.hw(&format!("--json jobs resume {id}")).ok().json();
    assert_eq!(resumed["state"], "running", "{resumed}");
    daemon.hw(&format!("jobs resume {id}")).ok();
    until("it goes on", || done(&daemon, id) > before);
    until("its rate is known", || show(&daemon, id)["seconds-left"].as_u64().is_some());
    daemon.hw(&format!("jobs cancel {id}")).ok();
    daemon.hw(&format!("jobs wait {id}")).code(130);

    let told = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut states = Vec::new();
    for event in told.filter(|event| event["event"] == "job") {
        assert_eq!(event["id"], id);
        states.push(event["state"].as_str().unwrap().to_owned());
        if states.last().is_some_and(|state| state == "cancelled") {
            break;
        }
    }
    assert_eq!(states, ["running", "paused", "paused", "running", "running", "cancelled"]);
    events.kill().unwrap();
    events.wait().unwrap();
}

#[test]
fn jobs_keep_to_their_rate() {
    let daemon = Daemon::new();
    let id = begin(&daemon, 16 * MIB);
    near(measured(&daemon, id), 16 * MIB);
    let status = show(&daemon, id);
    assert_eq!(status["rate-limit"], 16 * MIB);
    near(status["rate"].as_f64().unwrap(), 16 * MIB);
    let left = status["seconds-left"].as_f64().unwrap();
    near((200u64 << 30) as f64 / left, 16 * MIB);
    // The old rate's debt is paid soon.
    daemon.hw(&format!("jobs set-rate {id} 60M")).ok();
    std::thread::sleep(Duration::from_millis(300));
    near(measured(&daemon, id), 60 * MIB);
    let list = daemon.hw("jobs list").ok().out;
    assert!(list.contains("60 MiB/s"), "{list}");
    daemon.hw(&format!("jobs set-rate {id} none")).ok();
    assert!(show(&daemon, id)["rate-limit"].is_null());
    daemon.hw(&format!("jobs cancel {id}")).ok();
    daemon.hw(&format!("jobs wait {id}")).code(130);

    let path = format!("/v1/jobs/{id}/rate");
    for (body, code) in [
        (json!({"bytes-per-second": 5}), 409),
        (json!({"bytes-per-second": null}), 409),
        (json!({"bytes-per-second": 0}), 400),
        (json!({}), 400),
        (json!({"bytes-per-second": 5, "burst": 1}), 400),
    ] {
        assert_eq!(daemon.curl("POST", &path, Some(&body.to_string())).0, code, "{body}");
    }
    assert_eq!(daemon.curl("POST", "/v1/jobs?bytes-per-second=0", Some("{}")).0, 400);
    assert_eq!(daemon.curl("POST", "/v1/jobs/99/pause", None).0, 404);
    assert!(daemon.hw(&format!("jobs pause {id}")).code(1).err.contains("has ended already"));
    daemon.hw("jobs set-rate 1 0").code(2);
}

#[test]
fn copies_keep_to_their_rate() {
    let daemon = Daemon::new();
    let bytes: Vec<u8> =
        (0..64 * MIB / 8).flat_map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()).collect();
    std::fs::write(daemon.place.path("a.raw"), &bytes).unwrap();
    daemon.hw("disk add a.raw --name d").ok();
    for line in ["convert -O qcow2 a.raw b.qcow2", "convert -c -O qcow2 ./a.raw b.qcow2", "convert -O raw d b.raw"] {
        let (program, target) = line.rsplit_once(' ').unwrap();
        // The file without the daemon, the disk with it.
        let force = if line.contains(" d ") { "--api api.sock" } else { "" };
        let unshared = if force.is_empty() { "-U" } else { "" };
        let start = Instant::now();
        daemon.place.hw(&format!("{force} {program} {unshared} --rate 24M {target}")).ok();
        near(bytes.len() as f64 / start.elapsed().as_secs_f64(), 24 * MIB);
        let format = if target.ends_with("raw") { "raw" } else { "qcow2" };
        daemon.place.tool(&format!("qemu-img compare -U -f raw -F {format} a.raw {target}")).ok();
    }
}

#[test]
fn guests_go_on_while_a_job_that_reads_their_disk_is_paused() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 64 << 20);
    daemon.place.hw("convert -O qcow2 -S 0 a.raw d.qcow2").ok();
    let added = daemon.hw("--json disk add d.qcow2 --name d").ok().json();
    let uri = added["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    let job = json!({"job": "convert", "source": {"disk": "d"}, "target": daemon.place.path("b.raw"), "format": "raw"});
    let id = start(&daemon, &job, 8 * MIB);
    let before = pause(&daemon, id);
    daemon.place.qemu_io("raw", &uri, &["write -P 7 63M 64k", "flush", "read -P 7 63M 64k"]);
    daemon.hw("resize d +1M").ok();
    assert_eq!(done(&daemon, id), before);
    daemon.hw(&format!("jobs set-rate {id} none")).ok();
    daemon.hw(&format!("jobs resume {id}")).ok();
    let status = daemon.hw(&format!("--json jobs wait {id}")).ok().json();
    assert_eq!((&status["state"], &status["percent"]), (&json!("done"), &json!(100)));
    // It had not come to the guest's write, which is in the copy.
    assert_eq!(std::fs::read(daemon.place.path("b.raw")).unwrap()[63 << 20..][..64 << 10], [7; 64 << 10]);
    // What came out is remembered.
    let mut daemon = daemon;
    daemon.end();
    daemon.start();
    let again = show(&daemon, id);
    assert_eq!(again["result"], status["result"]);
    assert_eq!((&again["state"], &again["ended"]), (&json!("done"), &status["ended"]));
}

#[test]
fn a_paused_job_is_stopped_like_another() {
    let mut daemon = Daemon::new();
    let id = begin(&daemon, 20 * MIB);
    pause(&daemon, id);
    let waiting = daemon.place.spawn(&format!("--api api.sock --json jobs wait {id}"));
    daemon.hw(&format!("jobs cancel {id}")).ok();
    assert_eq!(ended(waiting).code(130).json()["state"], "cancelled");
    assert!(!daemon.place.path("long.raw").exists(), "an incomplete image was left");

    // The end of the daemon, told and untold.
    let told = begin(&daemon, 20 * MIB);
    pause(&daemon, told);
    let start = Instant::now();
    daemon.end();
    assert!(start.elapsed() < Duration::from_secs(10), "the end waited for a paused job");
    assert!(!daemon.place.path("long.raw").exists(), "an incomplete image was left");
    daemon.start();
    let untold = begin(&daemon, 20 * MIB);
    pause(&daemon, untold);
    daemon.server.take().unwrap().kill();
    daemon.start();
    let list = daemon.hw("--json jobs list").ok().json();
    let states: Vec<(u64, &str)> = list["jobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| (job["id"].as_u64().unwrap(), job["state"].as_str().unwrap()))
        .collect();
    assert_eq!(states, [(id, "cancelled"), (told, "interrupted"), (untold, "interrupted")]);
    let refused = daemon.hw(&format!("jobs resume {untold}")).code(1);
    assert!(refused.err.contains("cannot go on from there"), "{refused:?}");
    daemon.hw(&format!("jobs wait {untold}")).code(1);
    // The name it had before.
    daemon.hw(&format!("job forget {untold}")).ok();
    daemon.hw(&format!("jobs show {untold}")).code(1);
}

#[test]
fn waiting_ends_with_the_code_of_the_work() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 4 << 20);
    std::fs::copy(daemon.place.path("a.raw"), daemon.place.path("b.raw")).unwrap();
    daemon.place.qemu_io("raw", "b.raw", &["write -P 7 1M 512"]);
    daemon.place.hw("create leak.qcow2 64M").ok();
    // Two clusters are used, and then nothing leads to them: the L1 table is the image's fourth cluster.
    daemon.place.qemu_io("qcow2", "leak.qcow2", &["write 0 64k"]);
    daemon.place.qemu_io("raw", "leak.qcow2", &["write -P 0 196608 8"]);
    let file = |name: &str| json!({"file": daemon.place.path(name)});
    let path = |name: &str| daemon.place.path(name);
    for (job, code) in [
        (json!({"job": "compare", "first": file("a.raw"), "second": file("a.raw")}), 0),
        (json!({"job": "compare", "first": file("a.raw"), "second": file("b.raw")}), 1),
        (json!({"job": "compare", "first": file("a.raw"), "second": file("missing.raw")}), 2),
        (json!({"job": "check", "file": path("leak.qcow2")}), 3),
        (json!({"job": "check", "file": path("missing.qcow2")}), 1),
        (json!({"job": "measure", "size": 5, "format": "qcow2"}), 0),
    ] {
        std::fs::write(path("job.json"), job.to_string()).unwrap();
        let id = daemon.hw("--json jobs start --rate 1G job.json").ok().json()["id"].as_u64().unwrap();
        daemon.hw(&format!("jobs wait {id}")).code(code);
    }
}
