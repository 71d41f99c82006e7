//! libnbd's and QEMU's clients.

use interop::{Server, assert_equal, assert_sound, highwater, missing, pattern_file, qemu_img, qemu_io, run};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SIZE: usize = 24 << 20;

/// A directory with `pattern.raw` and, made of it by qemu-img, `disk.qcow2`.
fn images() -> (TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let (raw, image) = (directory.path().join("pattern.raw"), directory.path().join("disk.qcow2"));
    pattern_file(&raw, SIZE, 7);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&image)]);
    (directory, raw, image)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn nbdcopy_reads_and_writes() {
    if missing(&["nbdcopy", "qemu-img"]).is_some() {
        return;
    }
    let (directory, raw, image) = images();
    let server = Server::start(&image, &[]);
    let copy = directory.path().join("copy.raw");
    run("nbdcopy", &[&server.uri, text(&copy)]);
    server.stop();
    assert_equal(&image, "qcow2", &copy);
    assert_equal(&copy, "raw", &raw);

    let other = directory.path().join("other.qcow2");
    highwater(&["create", "-q", "-f", "qcow2", text(&other), &SIZE.to_string()]);
    let server = Server::start(&other, &[]);
    run("nbdcopy", &["--flush", text(&raw), &server.uri]);
    server.stop();
    assert_sound(&other);
    assert_equal(&other, "qcow2", &raw);
}

#[test]
fn nbdinfo_sees_the_export_and_its_map() {
    if missing(&["nbdinfo", "qemu-img", "qemu-io"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk.qcow2");
    highwater(&["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    qemu_io("qcow2", text(&image), &["write -P 1 1M 64k", "write -P 2 4M 1M", "write -z 6M 64k"]);
    let server = Server::start(&image, &["--name", "a disk"]);

    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--list", &server.uri])).expect("JSON");
    let exports = list["exports"].as_array().expect("a list");
    assert_eq!(exports.len(), 1, "{list}");
    assert_eq!(exports[0]["export-name"], "a disk");
    assert_eq!(exports[0]["export-size"], 8 << 20);

    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &server.uri])).expect("JSON");
    let export = &info["exports"][0];
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_cache"] {
        assert_eq!(export[can], true, "{can}: {info}");
    }
    assert_eq!(export["is_read_only"], false);
    let contexts: Vec<&str> =
        export["contexts"].as_array().expect("a list").iter().filter_map(|c| c.as_str()).collect();
    assert_eq!(contexts, ["base:allocation", "qemu:allocation-depth"]);

    let map: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", "--map", &server.uri])).expect("JSON");
    let data: Vec<(u64, u64)> = map
        .as_array()
        .expect("a list")
        .iter()
        .filter(|extent| extent["type"].as_u64().expect("a number") & 2 == 0)
        .map(|extent| (extent["offset"].as_u64().expect("a number"), extent["length"].as_u64().expect("a number")))
        .collect();
    assert_eq!(data, [(1 << 20, 64 << 10), (4 << 20, 1 << 20)], "{map}");
    let depth = run("nbdinfo", &["--map=qemu:allocation-depth", &server.uri]);
    assert!(depth.lines().any(|line| line.split_whitespace().take(3).eq(["1048576", "65536", "1"])), "{depth}");
    server.stop();
}

#[test]
fn read_only_export_refuses_writes() {
    if missing(&["nbdinfo", "qemu-img", "qemu-io"]).is_some() {
        return;
    }
    let (_directory, raw, image) = images();
    let server = Server::start(&image, &["--read-only"]);
    assert_eq!(run("nbdinfo", &["--is", "read-only", &server.uri]), "");
    let (status, said) = interop::run_for_status("qemu-io", &["-f", "raw", "-c", "write 0 64k", &server.uri]);
    assert!(status != 0 || said.contains("ead"), "a write was accepted: {said}");
    assert_equal(Path::new(&server.uri), "raw", &raw);
    server.stop();
    assert_equal(&image, "qcow2", &raw);
}

#[test]
fn qemu_img_converts_and_compares_over_nbd() {
    if missing(&["qemu-img"]).is_some() {
        return;
    }
    let (directory, raw, image) = images();
    let server = Server::start(&image, &[]);
    assert_equal(Path::new(&server.uri), "raw", &raw);
    let copy = directory.path().join("copy.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", &server.uri, text(&copy)]);
    server.stop();
    assert_equal(&copy, "qcow2", &raw);

    let other = directory.path().join("other.qcow2");
    highwater(&["create", "-q", "-f", "qcow2", "-o", "extended_l2=on", text(&other), &SIZE.to_string()]);
    let server = Server::start(&other, &[]);
    qemu_img(&["convert", "-n", "-m", "16", "-W", "-f", "qcow2", "-O", "raw", text(&copy), &server.uri]);
    server.stop();
    assert_sound(&other);
    assert_equal(&other, "qcow2", &raw);
}

#[test]
fn qemu_io_writes_zeroes_and_discards() {
    if missing(&["qemu-img", "qemu-io"]).is_some() {
        return;
    }
    let (_directory, raw, image) = images();
    let server = Server::start(&image, &[]);
    let commands = [
        "write -P 0xa5 12345 70001",
        "write -f -P 0x11 5M 512",
        "write -z 6M 1M",
        "write -z -u 8M 3M",
        "aio_write -P 0x22 12M 2M",
        "aio_write -P 0x33 15M 2M",
        "aio_flush",
        "flush",
        "read -P 0xa5 12345 70001",
        "read -P 0 8M 3M",
    ];
    qemu_io("raw", &server.uri, &commands);
    qemu_io("raw", &server.uri, &["discard 20M 1M", "write -P 9 20M 1M"]);
    qemu_io("raw", text(&raw), &commands);
    qemu_io("raw", text(&raw), &["write -P 9 20M 1M"]);
    server.stop();
    assert_sound(&image);
    assert_equal(&image, "qcow2", &raw);
}

#[test]
fn nbdkit_filters_stack_on_our_export() {
    if missing(&["nbdkit", "nbdcopy", "qemu-img"]).is_some() {
        return;
    }
    let (directory, raw, image) = images();
    let server = Server::start(&image, &["--read-only"]);
    let copy = directory.path().join("copy.raw");
    let upstream = format!("uri={}", server.uri);
    let copy_command = format!("nbdcopy \"$uri\" '{}'", text(&copy));
    run("nbdkit", &["-U", "-", "--filter=cow", "nbd", &upstream, "--run", &copy_command]);
    server.stop();
    assert_equal(&copy, "raw", &raw);
}
