//! SIGKILL of the server while a client writes: what a flush made durable is there afterwards.

use interop::{Server, assert_no_worse_than_leaks, assert_sound, highwater, missing, python, qemu_img, script};
use std::time::Duration;

/// How often each image is killed under: `HIGHWATER_CRASH_ROUNDS`, 17 when unset: 51 of all three together.
fn rounds() -> u64 {
    let set = std::env::var("HIGHWATER_CRASH_ROUNDS").ok();
    set.map_or(17, |text| text.parse().expect("HIGHWATER_CRASH_ROUNDS is a number"))
}

fn kill_rounds(options: &str, serve: &[&str], seed: u64) {
    if missing(&["python3-libnbd", "qemu-img"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (image, state) = (directory.path().join("disk.qcow2"), directory.path().join("state.json"));
    let (name, state_name) = (image.to_str().expect("UTF-8"), state.to_str().expect("UTF-8"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "64M"]);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut last = String::new();
    for round in 0..rounds() {
        let server = Server::start(&image, serve);
        let seed = (seed * 1000 + round).to_string();
        let mut writer = script("flushed_writer.py", &["write", &server.uri, state_name, &seed]);
        let mut writer = writer.spawn().expect("Python starts");
        // The first requests take a while; then any moment will do.
        std::thread::sleep(Duration::from_millis(600 + random.u64(0..1200)));
        server.kill();
        assert!(writer.wait().expect("our child").success(), "round {round}: the writer failed");

        // Lazy refcounts are behind by design until the next opening: the dirty bit must say so.
        if options.contains("lazy_refcounts=on") {
            let info: serde_json::Value =
                serde_json::from_str(&qemu_img(&["info", "-f", "qcow2", "--output=json", name])).expect("JSON");
            assert_eq!(info["dirty-flag"], true, "round {round}: {info}");
        } else {
            assert_no_worse_than_leaks(&image);
        }
        let server = Server::start(&image, serve);
        last = python("flushed_writer.py", &["verify", &server.uri, state_name]);
        server.stop();
        assert_no_worse_than_leaks(&image);
    }
    let flushes: u64 = last.split(' ').nth(3).and_then(|n| n.parse().ok()).expect("the number of flushes");
    assert!(flushes >= rounds(), "too few flushes to show anything: {last}");
    // Frees what the kills leaked.
    highwater(&["check", "-r", "leaks", name]);
    assert_sound(&image);
}

#[test]
fn flushed_writes_survive_a_kill() {
    kill_rounds("cluster_size=64k", &[], 1);
}

#[test]
fn flushed_writes_survive_a_kill_with_direct_io_and_subclusters() {
    kill_rounds("extended_l2=on", &["--cache", "none"], 2);
}

#[test]
fn flushed_writes_survive_a_kill_with_lazy_refcounts_and_small_clusters() {
    kill_rounds("lazy_refcounts=on,cluster_size=4k", &["--io-backend", "threads"], 3);
}
