//! Verbs on files, with qemu-img as the judge.

use crate::support::Place;
use serde_json::{Value, json};

const SIZE: u64 = 24 << 20;

#[track_caller]
fn same(place: &Place, a: &str, b: &str) {
    place.tool(&format!("qemu-img compare {a} {b}")).ok();
    place.hw(&format!("compare {a} {b}")).ok();
}

#[track_caller]
fn sound(place: &Place, image: &str) {
    place.tool(&format!("qemu-img check -f qcow2 {image}")).ok();
    place.hw(&format!("check -f qcow2 {image}")).ok();
}

#[test]
fn convert_there_and_back() {
    let place = Place::new();
    place.raw("a.raw", SIZE + 512);
    for options in [
        "",
        "-o cluster_size=512",
        "-o cluster_size=2M,lazy_refcounts=on",
        "-o compat=0.10",
        "-o extended_l2=on,cluster_size=128k",
        "-o refcount_bits=1",
        "-o preallocation=metadata",
        "-o data_file=d.bin",
        "-o data_file=d.bin,data_file_raw=on",
        "-c",
        "-c -o compression_type=zstd",
        "-c -o cluster_size=4k",
        "-S 0",
    ] {
        place.hw(&format!("convert {options} -O qcow2 a.raw b.qcow2")).ok();
        sound(&place, "b.qcow2");
        same(&place, "a.raw", "b.qcow2");
        place.hw("convert -O raw b.qcow2 c.raw").ok();
        same(&place, "b.qcow2", "c.raw");
        assert!(
            std::fs::read(place.path("a.raw")).unwrap() == std::fs::read(place.path("c.raw")).unwrap(),
            "{options}"
        );
    }
}

#[test]
fn convert_a_file_that_ends_within_a_sector() {
    let place = Place::new();
    place.raw("a.raw", SIZE + 12_345);
    std::fs::write(place.path("tail.raw"), b"highwater ".repeat(10_001)).unwrap();
    for (source, options) in
        [("a.raw", ""), ("a.raw", "-c"), ("tail.raw", ""), ("tail.raw", "-c"), ("tail.raw", "-S 0")]
    {
        place.hw(&format!("convert {options} -O qcow2 {source} b.qcow2")).ok();
        sound(&place, "b.qcow2");
        same(&place, source, "b.qcow2");
    }
    place.hw("convert -O raw tail.raw b.raw").ok();
    assert_eq!(std::fs::read(place.path("tail.raw")).unwrap(), std::fs::read(place.path("b.raw")).unwrap());
}

#[test]
fn convert_what_qemu_img_made() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    for options in
        ["-c", "-c -o compression_type=zstd", "-o compat=0.10,cluster_size=1k", "-o extended_l2=on", "-o data_file=x"]
    {
        place.tool(&format!("qemu-img convert {options} -f raw -O qcow2 a.raw q.qcow2")).ok();
        place.hw("convert -O raw q.qcow2 c.raw").ok();
        same(&place, "a.raw", "c.raw");
        place.hw("convert -O qcow2 -c q.qcow2 d.qcow2").ok();
        sound(&place, "d.qcow2");
        same(&place, "a.raw", "d.qcow2");
    }
}

#[test]
fn convert_is_sparse() {
    let place = Place::new();
    place.raw("a.raw", 1 << 30);
    for (target, limit) in [("b.raw", 4 << 20), ("b.qcow2", 5 << 20)] {
        let format = target.split_once('.').unwrap().1;
        let report = place.hw(&format!("--json convert -O {format} a.raw {target}")).ok().json();
        assert_eq!(report["virtual-size"], 1 << 30);
        assert!(report["copied"].as_u64().unwrap() < 4 << 20, "{report}");
        assert_eq!(report["copied"].as_u64().unwrap() + report["zero"].as_u64().unwrap(), 1 << 30);
        let actual = place.hw(&format!("info --json {target}")).ok().json()["actual-size"].as_u64().unwrap();
        assert!(actual < limit, "{target} takes {actual} bytes");
        same(&place, "a.raw", target);
    }
}

#[test]
fn convert_over_a_backing_file() {
    let place = Place::new();
    place.raw("base.raw", SIZE);
    place.hw("create -f qcow2 -b base.raw -F raw a.qcow2").ok();
    place.qemu_io("qcow2", "a.qcow2", &["write -P 7 1M 100k", "write -z 9600k 64k", "write -P 0 7200k 128k"]);
    place.hw("convert -O qcow2 -B base.raw -F raw a.qcow2 b.qcow2").ok();
    sound(&place, "b.qcow2");
    same(&place, "a.qcow2", "b.qcow2");
    let info = place.hw("info --json b.qcow2").ok().json();
    assert_eq!(info["backing-filename"], "base.raw");
    assert!(info["actual-size"].as_u64().unwrap() < 2 << 20, "{info}");
    place.hw("convert -O qcow2 a.qcow2 flat.qcow2").ok();
    same(&place, "a.qcow2", "flat.qcow2");
}

#[test]
fn convert_into_what_is_there() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    place.hw("create -f qcow2 t.qcow2 24M").ok();
    place.qemu_io("qcow2", "t.qcow2", &["write -P 3 0 24M"]);
    place.hw("convert -n -O qcow2 a.raw t.qcow2").ok();
    sound(&place, "t.qcow2");
    same(&place, "a.raw", "t.qcow2");
    place.hw("create -f qcow2 small.qcow2 1M").ok();
    let refused = place.hw("convert -n -O qcow2 a.raw small.qcow2").code(1);
    assert!(refused.err.contains("1048576 bytes"), "{refused:?}");
    let refused = place.hw("convert -O raw a.raw ./a.raw").code(1);
    assert!(refused.err.contains("both source and target"), "{refused:?}");
    assert!(place.hw("convert -c -O raw a.raw x.raw").code(1).err.contains("-O qcow2"));
}

#[test]
fn convert_a_snapshot() {
    let place = Place::new();
    place.tool("qemu-img create -q -f qcow2 a.qcow2 4M").ok();
    place.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M"]);
    place.tool("qemu-img snapshot -c before a.qcow2").ok();
    place.qemu_io("qcow2", "a.qcow2", &["write -P 2 0 2M"]);
    place.hw("convert -l before -O raw a.qcow2 b.raw").ok();
    place.qemu_io("raw", "b.raw", &["read -P 1 0 1M", "read -P 0 1M 3M"]);
    assert!(place.hw("convert -l never -O raw a.qcow2 b.raw").code(1).err.contains("never"));
}

#[test]
fn compare_says_what_differs() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    place.tool("cp --sparse=always a.raw b.raw").ok();
    place.hw("compare a.raw b.raw").ok();
    place.qemu_io("raw", "b.raw", &["write -P 5 20000000 1"]);
    let report = place.hw("--json compare a.raw b.raw").code(1).json();
    assert_eq!(report, json!({"identical": false, "first-difference": 20_000_000, "sizes-differ": false}));
    place.tool("cp --sparse=always a.raw longer.raw").ok();
    place.tool("truncate -s 40M longer.raw").ok();
    place.hw("compare a.raw longer.raw").ok();
    place.hw("compare longer.raw a.raw").ok();
    place.hw("compare -s a.raw longer.raw").code(1);
    place.qemu_io("raw", "longer.raw", &["write -P 1 39M 1"]);
    place.hw("compare a.raw longer.raw").code(1);
    let failed = place.hw("compare a.raw missing.raw").code(2);
    assert!(failed.err.starts_with("highwater: missing.raw: "), "{failed:?}");
}

/// Names and values that scripts read.
const INFO: [&str; 9] = [
    "virtual-size",
    "filename",
    "format",
    "cluster-size",
    "backing-filename",
    "full-backing-filename",
    "backing-filename-format",
    "dirty-flag",
    "actual-size",
];

#[test]
fn info_has_qemu_imgs_fields() {
    let place = Place::new();
    place.raw("base.raw", SIZE);
    place.tool("qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2").ok();
    place.tool("qemu-img snapshot -c s1 top.qcow2").ok();
    place.tool("qemu-img bitmap --add top.qcow2 b1").ok();
    place.tool("qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M").ok();
    place.tool("qemu-img create -q -f qcow2 -o compression_type=zstd,extended_l2=on,data_file=d,data_file_raw=on e.qcow2 1M").ok();
    for image in ["base.raw", "top.qcow2", "old.qcow2", "e.qcow2"] {
        let ours = place.hw(&format!("info --json {image}")).ok().json();
        let theirs = place.tool(&format!("qemu-img info -U --output=json {image}")).ok().json();
        for field in INFO {
            assert_eq!(ours[field], theirs[field], "{field} of {image}");
        }
        let (own, other) = (&ours["format-specific"], &theirs["format-specific"]);
        for field in [
            "compat",
            "compression-type",
            "lazy-refcounts",
            "refcount-bits",
            "corrupt",
            "extended-l2",
            "data-file",
            "data-file-raw",
            "bitmaps",
        ] {
            assert_eq!(own["data"][field], other["data"][field], "{field} of {image}");
        }
        for field in ["id", "name", "date-sec", "vm-state-size"] {
            assert_eq!(ours["snapshots"][0][field], theirs["snapshots"][0][field], "{field} of {image}");
        }
    }
    let chain = place.hw("info --json --backing-chain top.qcow2").ok().json();
    assert_eq!(chain[1]["filename"], "base.raw");
    let text = place.hw("info top.qcow2").ok().out;
    assert!(text.contains("virtual size: 24 MiB (25165824 bytes)"), "{text}");
}

#[test]
fn map_agrees_with_qemu_img() {
    let place = Place::new();
    place.raw("base.raw", SIZE);
    place.hw("create -f qcow2 -b base.raw -F raw top.qcow2 32M").ok();
    place.qemu_io("qcow2", "top.qcow2", &["write -P 7 64k 128k", "write -z 9600k 64k"]);
    place.tool("qemu-img convert -c -f raw -O qcow2 base.raw c.qcow2").ok();
    for (image, format) in [("top.qcow2", "qcow2"), ("base.raw", "raw"), ("c.qcow2", "qcow2")] {
        let ours = place.hw(&format!("map --json {image}")).ok().json();
        let theirs = place.tool(&format!("qemu-img map -f {format} --output=json {image}")).ok().json();
        assert_eq!(by_cluster(&ours), by_cluster(&theirs), "{image}");
    }
    let part = place.hw("map --json -s 64k -l 64k top.qcow2").ok().json();
    assert_eq!(part.as_array().unwrap().len(), 1);
    assert_eq!((&part[0]["start"], &part[0]["length"], &part[0]["data"]), (&json!(65536), &json!(65536), &json!(true)));
}

/// What each block of 4 KiB is, so that entries may be cut in different places.
fn by_cluster(map: &Value) -> Vec<(bool, bool, bool, Option<u64>)> {
    let mut blocks = Vec::new();
    for entry in map.as_array().unwrap() {
        let flag = |name: &str| entry[name].as_bool().unwrap();
        for at in 0..entry["length"].as_u64().unwrap() / 4096 {
            let offset = entry["offset"].as_u64().filter(|_| flag("data") && !flag("compressed"));
            blocks.push((flag("zero"), flag("data"), flag("compressed"), offset.map(|o| o + at * 4096)));
        }
    }
    blocks
}

#[test]
fn check_and_its_exit_codes() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    place.hw("check a.raw").code(63);
    place.hw("convert -O qcow2 a.raw a.qcow2").ok();
    let clean = place.hw("check --json a.qcow2").ok().json();
    let theirs = place.tool("qemu-img check --output=json a.qcow2").ok().json();
    for field in ["check-errors", "image-end-offset", "total-clusters", "allocated-clusters", "filename", "format"] {
        assert_eq!(clean[field], theirs[field], "{field}");
    }
    // A leak: a cluster behind the end gets a reference count.
    let end = clean["image-end-offset"].as_u64().unwrap();
    leak(&place, "a.qcow2", end);
    place.tool("qemu-img check a.qcow2").code(3);
    assert_eq!(place.hw("check --json a.qcow2").code(3).json()["leaks"], 1);
    let mended = place.hw("check --json -r leaks a.qcow2").ok().json();
    assert_eq!(mended["leaks-fixed"], 1);
    sound(&place, "a.qcow2");
    // A corruption: an L2 table without a reference.
    leak(&place, "a.qcow2", 0);
    place.hw("check a.qcow2").code(2);
    place.hw("check --repair all a.qcow2").ok();
    sound(&place, "a.qcow2");
    same(&place, "a.raw", "a.qcow2");
    place.hw("check missing.qcow2").code(1);
}

/// Changes the reference count of the cluster at `offset`: 1 for a free one, 0 for the header.
fn leak(place: &Place, image: &str, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(place.path(image)).unwrap();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = be64(be64(48));
    let count: u16 = if offset == 0 { 0 } else { 1 };
    file.write_all_at(&count.to_be_bytes(), block + offset / 65536 * 2).unwrap();
    if offset > 0 {
        file.set_len(offset + 65536).unwrap();
    }
}

#[test]
fn measure_is_never_too_small() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    for options in ["", "-o cluster_size=4k", "-o extended_l2=on,cluster_size=32k"] {
        let ours = place.hw(&format!("measure --json {options} -O qcow2 a.raw")).ok().json();
        let theirs = place.tool(&format!("qemu-img measure --output=json {options} -O qcow2 -f raw a.raw")).ok().json();
        assert_eq!(ours["fully-allocated"], theirs["fully-allocated"], "{options}");
        place.hw(&format!("convert {options} -O qcow2 a.raw b.qcow2")).ok();
        let length = std::fs::metadata(place.path("b.qcow2")).unwrap().len();
        assert!(length <= ours["required"].as_u64().unwrap(), "{length} > {ours}");
    }
    let ours = place.hw("measure --json -O qcow2 --size 10G").ok().json();
    let theirs = place.tool("qemu-img measure --output=json -O qcow2 --size 10G").ok().json();
    assert_eq!(ours, theirs);
}

#[test]
fn resize_grows_and_shrinks_on_request_only() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    place.hw("convert -O qcow2 a.raw a.qcow2").ok();
    for image in ["a.raw", "a.qcow2"] {
        place.hw(&format!("resize {image} +8M")).ok();
        assert_eq!(place.hw(&format!("info --json {image}")).ok().json()["virtual-size"], 32 << 20);
        let refused = place.hw(&format!("resize {image} 1M")).code(1);
        assert!(refused.err.contains("--shrink"), "{refused:?}");
        place.hw(&format!("resize --shrink {image} -16M")).ok();
        assert_eq!(place.hw(&format!("info --json {image}")).ok().json()["virtual-size"], 16 << 20);
    }
    sound(&place, "a.qcow2");
    same(&place, "a.raw", "a.qcow2");
}

#[test]
fn create_as_qemu_img_reads_it() {
    let place = Place::new();
    place.hw("create -f raw a.raw 10M").ok();
    assert_eq!(std::fs::metadata(place.path("a.raw")).unwrap().len(), 10 << 20);
    place.hw("create -f raw -o preallocation=falloc f.raw 10M").ok();
    assert!(place.hw("info --json f.raw").ok().json()["actual-size"].as_u64().unwrap() >= 10 << 20);
    for options in
        ["cluster_size=2M", "compat=0.10", "extended_l2=on", "refcount_bits=64", "preallocation=full", "data_file=dd"]
    {
        place.hw(&format!("create -f qcow2 -o {options} a.qcow2 10M")).ok();
        sound(&place, "a.qcow2");
        let info = place.tool("qemu-img info --output=json a.qcow2").ok().json();
        assert_eq!(info["virtual-size"], 10 << 20, "{options}");
    }
    place.hw("create -f qcow2 -b a.raw -F raw top.qcow2").ok();
    assert_eq!(place.tool("qemu-img info --output=json top.qcow2").ok().json()["virtual-size"], 10 << 20);
    for (line, words) in [
        ("create -f qcow2 x.qcow2", "SIZE"),
        ("create -f qcow2 -b a.raw x.qcow2", "-F FORMAT"),
        ("create -f qcow2 -b missing.raw -F raw x.qcow2", "missing.raw"),
        ("create -f qcow2 -o nonsense=1 x.qcow2 1M", "nonsense"),
        ("create -f raw -o cluster_size=1 x.raw 1M", "cluster_size"),
        ("create -f raw -b a.raw -F raw x.raw", "qcow2"),
    ] {
        let refused = place.hw(line).code(1);
        assert!(refused.err.contains(words), "{line}: {refused:?}");
        assert!(!place.path("x.qcow2").exists(), "{line} left a file");
    }
    place.hw("create -f vdi x 1M").code(2);
}

#[test]
fn content_never_decides_the_format() {
    let place = Place::new();
    place.tool("qemu-img create -q -f qcow2 disguised.raw 1M").ok();
    let refused = place.hw("info disguised.raw").code(1);
    assert!(refused.err.contains("give -f qcow2 or -f raw"), "{refused:?}");
    assert_eq!(place.hw("info --json -f qcow2 disguised.raw").ok().json()["virtual-size"], 1 << 20);
    assert_eq!(place.hw("info --json -f raw disguised.raw").ok().json()["format"], "raw");
    place.tool("cp disguised.raw noext").ok();
    assert!(place.hw("info noext").code(1).err.contains("-f raw or -f qcow2"));
}

#[test]
fn errors_are_said_once() {
    let place = Place::new();
    let failed = place.hw("info -f raw ./missing.raw").code(1);
    assert_eq!(failed.err.lines().count(), 1, "{failed:?}");
    assert!(failed.err.starts_with("highwater: "), "{failed:?}");
    assert_eq!(failed.err.matches("No such file").count(), 1, "{failed:?}");
    std::fs::write(place.path("a.qcow2"), b"not an image at all").unwrap();
    assert!(place.hw("info a.qcow2").code(1).err.contains("a.qcow2"));
}

#[test]
fn completions() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.hw(&format!("completions {shell}")).ok().out;
        assert!(script.contains("convert") && script.contains("backing-chain"), "{shell}");
    }
    place.hw("completions tcl").code(2);
    place.hw("").code(2);
    assert!(place.hw("--version").ok().out.starts_with("highwater "));
}
