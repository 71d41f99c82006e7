//! Verbs on disks that the daemon serves.

use crate::daemon::Daemon;
use serde_json::json;

/// A daemon with the disk `d` (qcow2 over raw), to which a guest has written, and what is in it now.
fn with_a_disk() -> (Daemon, String) {
    let daemon = Daemon::new();
    daemon.place.raw("base.raw", 24 << 20);
    daemon.place.hw("create -b base.raw -F raw top.qcow2").ok();
    let added = daemon.hw("--json disk add top.qcow2 --name d").ok().json();
    let uri = added["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    daemon.place.qemu_io("raw", &uri, &["write -P 9 1M 3M", "write -z 10M 1M"]);
    daemon.place.run("nbdcopy", [uri.as_str(), "now.raw"]).ok();
    (daemon, uri)
}

#[test]
fn a_served_disk_is_copied_compared_and_measured() {
    let (daemon, uri) = with_a_disk();
    daemon.hw("compare d now.raw").ok();
    daemon.hw("compare now.raw d").ok();
    let report = daemon.hw("--json convert d copy.qcow2").ok().json();
    assert_eq!(report["virtual-size"], 24 << 20);
    daemon.place.tool("qemu-img compare -f raw -F qcow2 now.raw copy.qcow2").ok();
    daemon.place.tool("qemu-img check copy.qcow2").ok();
    daemon.hw("convert -c -O qcow2 d small.qcow2").ok();
    daemon.place.tool("qemu-img compare -f raw -F qcow2 now.raw small.qcow2").ok();
    daemon.hw("convert d copy.raw").ok();
    daemon.place.tool("qemu-img compare -f raw -F raw now.raw copy.raw").ok();

    let measured = daemon.hw("--json measure -O qcow2 d").ok().json();
    assert!(measured["fully-allocated"].as_u64().unwrap() > 24 << 20);
    let length = std::fs::metadata(daemon.place.path("copy.qcow2")).unwrap().len();
    assert!(length <= measured["required"].as_u64().unwrap(), "{length}: {measured}");

    daemon.place.qemu_io("raw", &uri, &["write -P 8 5M 1"]);
    let report = daemon.hw("--json compare d now.raw").code(1).json();
    assert_eq!(report["first-difference"], 5 << 20);
    daemon.hw("compare d missing.raw").code(2);
    // No job is left over.
    assert_eq!(daemon.hw("--json jobs list").ok().json(), json!({"jobs": []}));
}

#[test]
fn a_served_disk_is_not_overwritten() {
    let (daemon, _uri) = with_a_disk();
    let refused = daemon.hw("convert -O qcow2 d top.qcow2").code(1);
    assert!(refused.err.contains("is the image of disk \"d\""), "{refused:?}");
    daemon.hw("compare d now.raw").ok();
    let job = json!({"job": "resize", "file": daemon.place.path("top.qcow2"), "size": {"to": 1 << 20}, "shrink": true});
    let (code, text) = daemon.curl("POST", "/v1/jobs", Some(&job.to_string()));
    assert_eq!(code, 409, "{text}");
}

#[test]
fn what_cannot_be_done_with_a_served_disk_is_said() {
    let (daemon, _uri) = with_a_disk();
    for (line, words) in [
        ("check d", "highwater disk remove d"),
        ("check -r all d", "highwater disk remove d"),
        ("info -f raw d", "-f says how a file is opened"),
        ("info -U d", "-U says how a file is opened"),
        ("map -f raw d", "-f says how a file is opened"),
        ("convert -f raw d x.raw", "-f says how a file is opened"),
        ("convert -l snap d x.raw", "-l says how a file is opened"),
        ("measure -U d", "-U says how a file is opened"),
        ("resize -f raw d 1G", "-f says how a file is opened"),
    ] {
        let refused = daemon.hw(line).code(1);
        assert!(refused.err.contains(words), "{line}: {refused:?}");
    }
    assert!(!daemon.place.path("x.raw").exists());
    // Nothing changes under a check of a disk that nobody writes to.
    daemon.place.hw("create r.qcow2 1M").ok();
    daemon.hw("disk add --read-only r.qcow2").ok();
    assert_eq!(daemon.hw("--json check r").ok().json()["check-errors"], 0);
}

#[test]
fn a_served_disk_has_a_backing_chain_and_a_size() {
    let (daemon, _uri) = with_a_disk();
    let chain = daemon.hw("--json info --backing-chain d").ok().json();
    assert_eq!(chain[0]["format"], "qcow2");
    assert!(chain[1]["filename"].as_str().unwrap().ends_with("base.raw"), "{chain}");
    let (code, text) = daemon.curl("GET", "/v1/disks/d/chain", None);
    assert_eq!(code, 200, "{text}");
    daemon.hw("resize d 33000000").ok();
    let rounded = 33_000_000u64.next_multiple_of(512);
    assert_eq!(daemon.hw("--json info d").ok().json()["virtual-size"], rounded);
    daemon.place.hw("create -f raw p.raw 1M").ok();
    daemon.hw("disk add p.raw").ok();
    daemon.hw("resize --preallocation falloc p +8M").ok();
    assert!(daemon.hw("--json info p").ok().json()["actual-size"].as_u64().unwrap() >= 8 << 20);
}
