//! Images that qemu-img made with every option, changed by us; and images that we made, changed by QEMU.

use interop::{Server, assert_equal, assert_sound, highwater, missing, pattern_file, python, qemu_img, qemu_io, run};
use std::path::Path;
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Changes the image at random through our server; the shadow follows.
fn change(image: &Path, shadow: &Path, seed: u64, rounds: u64) {
    let server = Server::start(image, &["-f", "qcow2"]);
    python("random_writer.py", &[&server.uri, text(shadow), &seed.to_string(), &rounds.to_string(), "2"]);
    server.stop();
}

/// An image that qemu-img converts from a pattern, with `options` of both qemu-img and the format.
fn made_by_qemu(options: &str, flags: &[&str], seed: u64) {
    if missing(&["qemu-img", "python3-libnbd"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (image, shadow) = (directory.path().join("disk.qcow2"), directory.path().join("shadow.raw"));
    pattern_file(&shadow, 12 << 20, seed);
    let options = options.replace("DIRECTORY", text(directory.path()));
    let all =
        [&["convert", "-f", "raw", "-O", "qcow2", "-o", &options], flags, &[text(&shadow), text(&image)]].concat();
    qemu_img(&all);
    change(&image, &shadow, seed, 40);
    assert_sound(&image);
    assert_equal(&image, "qcow2", &shadow);
    if options.contains("data_file_raw=on") {
        assert_equal(&directory.path().join("data.raw"), "raw", &shadow);
    }
}

#[test]
fn version_2() {
    made_by_qemu("compat=0.10", &[], 1);
}

#[test]
fn version_2_compressed() {
    made_by_qemu("compat=0.10", &["-c"], 2);
}

#[test]
fn every_cluster_size() {
    for (index, size) in
        ["512", "1k", "2k", "4k", "8k", "16k", "32k", "128k", "256k", "512k", "1M", "2M"].iter().enumerate()
    {
        made_by_qemu(&format!("cluster_size={size}"), &[], 10 + index as u64);
    }
}

#[test]
fn every_refcount_width() {
    for bits in [1, 2, 4, 8, 32, 64] {
        made_by_qemu(&format!("refcount_bits={bits}"), &[], 30 + bits);
    }
}

#[test]
fn lazy_refcounts() {
    made_by_qemu("lazy_refcounts=on", &[], 40);
}

#[test]
fn subclusters() {
    made_by_qemu("extended_l2=on", &[], 41);
    made_by_qemu("extended_l2=on,cluster_size=16k", &[], 42);
}

#[test]
fn compressed_with_zlib() {
    made_by_qemu("compression_type=zlib", &["-c"], 43);
    made_by_qemu("extended_l2=on", &["-c"], 44);
}

#[test]
fn compressed_with_zstd() {
    made_by_qemu("compression_type=zstd", &["-c"], 45);
    made_by_qemu("compression_type=zstd,cluster_size=2M", &["-c"], 46);
}

#[test]
fn external_data_file() {
    made_by_qemu("data_file=DIRECTORY/data.raw", &[], 47);
    made_by_qemu("data_file=DIRECTORY/data.raw,data_file_raw=on", &[], 48);
}

#[test]
fn every_preallocation() {
    for (index, mode) in ["metadata", "falloc", "full"].iter().enumerate() {
        made_by_qemu(&format!("preallocation={mode}"), &[], 50 + index as u64);
    }
}

#[test]
fn chain_of_three_with_mixed_formats_and_relative_names() {
    if missing(&["qemu-img", "qemu-io", "python3-libnbd"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    pattern_file(&at("base.raw"), 10 << 20, 60);
    let (middle, top, shadow) = (at("middle.qcow2"), at("top.qcow2"), at("shadow.raw"));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "-b",
        "base.raw",
        "-F",
        "raw",
        text(&middle),
        "11M",
    ]);
    qemu_io("qcow2", text(&middle), &["write -P 3 1M 300k", "write -z 3M 1M"]);
    let options = "extended_l2=on";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "-b", "middle.qcow2", "-F", "qcow2", text(&top), "12M"]);
    qemu_io("qcow2", text(&top), &["write -P 4 2M 5k", "write -z 5M 64k"]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&top), text(&shadow)]);
    let middle_was = std::fs::read(&middle).expect("the middle can be read");
    change(&top, &shadow, 60, 60);
    assert_sound(&top);
    assert_equal(&top, "qcow2", &shadow);
    assert!(std::fs::read(&middle).expect("the middle can be read") == middle_was, "a parent was changed");
}

#[test]
fn internal_snapshots_stay_as_they_were() {
    if missing(&["qemu-img", "qemu-io", "nbdcopy", "python3-libnbd"]).is_some() {
        return;
    }
    for options in ["cluster_size=64k", "extended_l2=on", "refcount_bits=8,cluster_size=4k"] {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let (image, shadow) = (at("disk.qcow2"), at("shadow.raw"));
        pattern_file(&shadow, 8 << 20, 70);
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, text(&shadow), text(&image)]);
        let mut states = Vec::new();
        for name in ["first", "second"] {
            qemu_img(&["snapshot", "-c", name, text(&image)]);
            let state = at(&format!("{name}.raw"));
            std::fs::copy(&shadow, &state).expect("a copy");
            states.push((name, state));
            change(&image, &shadow, 71, 40);
        }
        assert_sound(&image);
        assert_equal(&image, "qcow2", &shadow);
        for (name, state) in &states {
            let copy = at("copy.raw");
            let snapshot = format!("snapshot.name={name}");
            qemu_img(&["convert", "-f", "qcow2", "-l", &snapshot, "-O", "raw", text(&image), text(&copy)]);
            assert_equal(&copy, "raw", state);
            let server = Server::start(&image, &["--snapshot", name, "--read-only"]);
            run("nbdcopy", &[&server.uri, text(&copy)]);
            server.stop();
            assert_equal(&copy, "raw", state);
        }
        qemu_img(&["snapshot", "-a", "first", text(&image)]);
        assert_sound(&image);
        assert_equal(&image, "qcow2", &states[0].1);
    }
}

#[test]
fn persistent_bitmaps_tell_the_truth_or_nothing() {
    if missing(&["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    qemu_img(&["bitmap", "--add", "-f", "qcow2", text(&image), "b"]);
    qemu_io("qcow2", text(&image), &["write -P 1 1M 64k"]);
    let server = Server::start(&image, &[]);
    qemu_io("raw", &server.uri, &["write -P 2 4M 64k"]);
    server.stop();
    assert_sound(&image);
    // Either QEMU refuses the bitmap, or the bitmap has both writes.
    let export = format!("qemu-nbd -r -t -f qcow2 -B b -k '{}/s' '{}' & p=$!;", text(directory.path()), text(&image));
    let wait = format!("while kill -0 $p 2>/dev/null && ! [ -S '{}/s' ]; do sleep 0.05; done;", text(directory.path()));
    let map = format!(
        "nbdinfo --map=qemu:dirty-bitmap:b 'nbd+unix:///?socket={}/s' || echo refused;",
        text(directory.path())
    );
    let map = run("sh", &["-c", &format!("{export} {wait} {map} kill $p 2>/dev/null; wait $p; true")]);
    let dirty: Vec<&str> = map
        .lines()
        .filter(|l| l.split_whitespace().nth(2) == Some("1"))
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    assert!(map.contains("refused") || dirty == ["1048576", "4194304"], "the bitmap lies: {map}");
}

/// An image that we make, changed by qemu-io, and read by us.
fn made_by_us(options: &[&str], seed: u64) -> TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    if missing(&["qemu-img", "qemu-io"]).is_some() {
        return directory;
    }
    let at = |name: &str| directory.path().join(name);
    let (image, shadow) = (at("disk.qcow2"), at("shadow.raw"));
    pattern_file(&shadow, 12 << 20, seed);
    let flags = ["convert", "-q", "-f", "raw", "-O", "qcow2"];
    highwater(&[&flags, options, &[text(&shadow), text(&image)]].concat());
    assert_sound(&image);
    assert_equal(&image, "qcow2", &shadow);
    let commands = [
        "write -P 1 100k 300k",
        "write -P 2 3M 64k",
        "write -z -u 5M 1M",
        "write -P 3 5242000 1234",
        "write -z 8M 70k",
        "aio_write -P 4 9M 1M",
        "aio_flush",
    ];
    qemu_io("qcow2", text(&image), &commands);
    qemu_io("raw", text(&shadow), &commands);
    highwater(&["check", text(&image)]);
    highwater(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(&image), text(&shadow)]);
    let copy = at("copy.raw");
    highwater(&["convert", "-q", "-f", "qcow2", "-O", "raw", text(&image), text(&copy)]);
    assert_equal(&copy, "raw", &shadow);
    directory
}

#[test]
fn qemu_changes_what_we_made() {
    let options = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "extended_l2=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
    ];
    for (index, options) in options.iter().enumerate() {
        made_by_us(&["-o", options], 80 + index as u64);
    }
}

#[test]
fn qemu_changes_what_we_compressed() {
    for (index, options) in ["compression_type=zlib", "compression_type=zstd", "extended_l2=on"].iter().enumerate() {
        made_by_us(&["-c", "-o", options], 90 + index as u64);
    }
}
