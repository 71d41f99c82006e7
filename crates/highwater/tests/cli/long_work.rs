//! Long work is watched, stopped, and not forgotten.

use crate::daemon::Daemon;
use crate::support::{Place, ended, send_signal, until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};

/// Far more than any test waits for.
const LONG: &str = "200G";

/// A description of a job that takes far longer than any test waits for.
fn long_job(daemon: &Daemon) -> String {
    let file = daemon.place.path("long.raw");
    json!({"job": "create", "file": file, "format": "raw", "size": 200u64 << 30, "options": {"preallocation": "full"}})
        .to_string()
}

fn begin(daemon: &Daemon) -> u64 {
    let (code, text) = daemon.curl("POST", "/v1/jobs", Some(&long_job(daemon)));
    assert_eq!(code, 202, "{text}");
    let id = serde_json::from_str::<Value>(&text).unwrap()["id"].as_u64().unwrap();
    until("the job has done something", || {
        daemon.hw(&format!("--json jobs show {id}")).ok().json()["done"].as_u64().unwrap() > 0
    });
    id
}

#[test]
fn ctrl_c_ends_work_on_files() {
    let place = Place::new();
    place.hw("create -f raw small.raw 1M").ok();
    place.hw("create grow.qcow2 1M").ok();
    // So many tables take a while to be checked.
    place.hw("create -o preallocation=metadata,cluster_size=4k many.qcow2 128G").ok();
    let beginning = |name: &str, size: u64| {
        let path = place.path(name);
        until("the work has begun", move || std::fs::metadata(&path).is_ok_and(|f| f.len() >= size));
    };
    for (line, file, size) in [
        (format!("create -f raw -o preallocation=full a.raw {LONG}"), "a.raw", 1 << 30),
        (format!("create -f qcow2 -o preallocation=full a.qcow2 {LONG}"), "a.qcow2", 1 << 30),
        (format!("resize --preallocation full small.raw {LONG}"), "small.raw", 100 << 20),
        (format!("resize --preallocation full grow.qcow2 {LONG}"), "grow.qcow2", 100 << 20),
        ("check many.qcow2".to_owned(), "many.qcow2", 1),
    ] {
        let child = place.spawn(&line);
        beginning(file, size);
        // The signal is caught once the work has begun.
        std::thread::sleep(std::time::Duration::from_millis(200));
        send_signal(&child, "INT");
        let stopped = ended(child);
        assert_eq!(stopped.code, Some(130), "{line}: {stopped:?}");
        assert!(stopped.err.contains("cancelled"), "{line}: {stopped:?}");
    }
    // What was there before cannot come back, so it is named.
    place.hw("create a.img 2G").ok();
    let child = place.spawn(&format!("create -f raw -o preallocation=full a.img {LONG}"));
    beginning("a.img", 3 << 30);
    std::thread::sleep(std::time::Duration::from_millis(200));
    send_signal(&child, "INT");
    let stopped = ended(child).code(130);
    assert!(stopped.err.contains("a.img is incomplete"), "{stopped:?}");
    assert!(!place.path("a.raw").exists() && !place.path("a.qcow2").exists(), "an incomplete image was left");
    // An image that did not grow whole did not grow at all.
    for image in ["small.raw", "grow.qcow2"] {
        assert_eq!(place.hw(&format!("info --json {image}")).ok().json()["virtual-size"], 1 << 20);
    }
    place.tool("qemu-img check grow.qcow2").ok();
}

#[test]
fn jobs_are_watched_and_stopped() {
    let daemon = Daemon::new();
    let mut events = daemon.place.spawn("--api api.sock events");
    let mut lines = BufReader::new(events.stdout.take().unwrap()).lines();
    // Somebody must listen before something happens.
    daemon.place.hw("create a.raw 1M").ok();
    let mut added = 0;
    let first = std::thread::spawn(move || (lines.next(), lines));
    until("events are told", || {
        added += 1;
        daemon.hw(&format!("disk add a.raw --read-only --name a{added} --no-export")).ok();
        first.is_finished()
    });
    let (first, lines) = first.join().unwrap();
    assert!(first.unwrap().unwrap().contains("disk-opened"));

    let id = begin(&daemon);
    let progress = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut progress = progress;
    let progress = progress.find(|event| event["event"] == "job-progress").unwrap();
    assert_eq!((&progress["id"], &progress["total"]), (&json!(id), &json!(200u64 << 30)), "{progress}");
    assert_eq!(progress["unit"], "bytes");
    send_signal(&events, "KILL");
    events.wait().unwrap();

    let waiting = daemon.place.spawn(&format!("--api api.sock --json jobs wait {id}"));
    assert!(daemon.hw(&format!("jobs forget {id}")).code(1).err.contains("is running"));
    daemon.hw(&format!("jobs cancel {id}")).ok();
    let stopped = ended(waiting).code(130).json();
    assert_eq!(stopped["state"], "cancelled", "{stopped}");
    assert!(!daemon.place.path("long.raw").exists(), "an incomplete image was left");
}

#[test]
fn progress_is_measured_in_what_is_set_aside() {
    let daemon = Daemon::new();
    let size = 64u64 << 20;
    for (format, preallocation) in [("raw", "full"), ("raw", "falloc"), ("qcow2", "full"), ("qcow2", "falloc")] {
        let file = daemon.place.path(&format!("{preallocation}.{format}"));
        let options = json!({"preallocation": preallocation});
        let job = json!({"job": "create", "file": file, "format": format, "size": size, "options": options});
        let (code, text) = daemon.curl("POST", "/v1/jobs", Some(&job.to_string()));
        assert_eq!(code, 202, "{text}");
        let id = serde_json::from_str::<Value>(&text).unwrap()["id"].as_u64().unwrap();
        let job = daemon.hw(&format!("--json jobs wait {id}")).ok().json();
        let (done, total) = (job["done"].as_u64().unwrap(), job["total"].as_u64().unwrap());
        assert!((size..size + (1 << 20)).contains(&total), "{job}");
        assert!(done > total - total / 100, "{job}");
    }
}

#[test]
fn jobs_that_the_end_interrupts_are_listed_afterwards() {
    let mut daemon = Daemon::new();
    let id = begin(&daemon);
    daemon.end();
    assert!(!daemon.place.path("long.raw").exists(), "an incomplete image was left");
    daemon.start();
    let list = daemon.hw("--json jobs list").ok().json();
    let job = &list["jobs"][0];
    assert_eq!((&job["id"], &job["state"], &job["kind"]["job"]), (&json!(id), &json!("interrupted"), &json!("create")));
    assert!(job["error"].as_str().unwrap().contains("start it again"), "{job}");
    daemon.hw(&format!("jobs wait {id}")).code(1);
    // A crash is no different, and no number is used twice.
    let next = begin(&daemon);
    assert!(next > id);
    daemon.server.take().unwrap().kill();
    daemon.start();
    let list = daemon.hw("--json jobs list").ok().json();
    let states: Vec<&Value> = list["jobs"].as_array().unwrap().iter().map(|job| &job["state"]).collect();
    assert_eq!(states, ["interrupted", "interrupted"]);
    daemon.hw(&format!("jobs forget {id}")).ok();
    daemon.hw(&format!("jobs forget {next}")).ok();
    daemon.end();
    daemon.start();
    assert_eq!(daemon.hw("--json jobs list").ok().json(), json!({"jobs": []}));
}
