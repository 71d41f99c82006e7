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
fn compressed_runs_of_all_cluster_sizes() {
    let place = Place::new();
    place.raw("a.raw", SIZE + 12_345);
    for cluster in ["512", "4k", "64k", "512k", "2M"] {
        for kind in ["zlib", "zstd"] {
            let options = format!("compression_type={kind},cluster_size={cluster}");
            place.tool(&format!("qemu-img convert -c -f raw -O qcow2 -o {options} a.raw q.qcow2")).ok();
            // Some clusters in the middle of a run are rewritten.
            place.qemu_io("qcow2", "q.qcow2", &["write -P 3 17000k 3k"]);
            place.tool("qemu-img convert -O raw q.qcow2 expected.raw").ok();
            place.hw("convert -O raw q.qcow2 c.raw").ok();
            let files = ["expected.raw", "c.raw"].map(|file| std::fs::read(place.path(file)).unwrap());
            assert!(files[0] == files[1], "{options}");
            place.hw("compare c.raw q.qcow2").ok();
        }
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
fn convert_leaves_what_is_behind_the_source() {
    let place = Place::new();
    std::fs::write(place.path("s.raw"), b"highwater ".repeat(100_000)).unwrap();
    let source = std::fs::read(place.path("s.raw")).unwrap();
    let before = vec![0xa5; 4 << 20];
    for options in ["", "-S 0", "-C", "-t none"] {
        std::fs::write(place.path("t.raw"), &before).unwrap();
        place.hw(&format!("convert -n {options} -O raw s.raw t.raw")).ok();
        let after = std::fs::read(place.path("t.raw")).unwrap();
        assert!(after[..source.len()] == source && after[source.len()..] == before[source.len()..], "{options}");
    }
    // The source ends inside a cluster of the target.
    for options in ["", "-c", "-S 0", "-C"] {
        place.hw("create -f qcow2 t.qcow2 4M").ok();
        place.qemu_io("qcow2", "t.qcow2", &["write -P 0xa5 0 4M"]);
        place.hw(&format!("convert -n {options} -O qcow2 s.raw t.qcow2")).ok();
        sound(&place, "t.qcow2");
        place.tool("qemu-img convert -O raw t.qcow2 t.raw").ok();
        let after = std::fs::read(place.path("t.raw")).unwrap();
        assert!(after[..source.len()] == source && after[source.len()..] == before[source.len()..], "{options}");
    }
}

#[test]
fn convert_never_writes_to_its_source() {
    let place = Place::new();
    place.raw("base.raw", SIZE);
    place.hw("create -f qcow2 -b base.raw -F raw top.qcow2").ok();
    place.qemu_io("qcow2", "top.qcow2", &["write -P 7 1M 100k"]);
    place.hw("create -f qcow2 -o data_file=d.bin,data_file_raw=on own.qcow2 4M").ok();
    place.qemu_io("qcow2", "own.qcow2", &["write -P 7 1M 100k"]);
    std::fs::hard_link(place.path("base.raw"), place.path("link.raw")).unwrap();
    std::os::unix::fs::symlink("top.qcow2", place.path("sym.qcow2")).unwrap();
    let files = ["base.raw", "top.qcow2", "own.qcow2", "d.bin"];
    let before = files.map(|file| std::fs::read(place.path(file)).unwrap());
    for line in [
        "-O raw base.raw link.raw",
        "-f qcow2 -O qcow2 top.qcow2 base.raw",
        "-O raw top.qcow2 link.raw",
        "-O qcow2 top.qcow2 sym.qcow2",
        "-n -O raw top.qcow2 link.raw",
        "-O raw own.qcow2 d.bin",
        "-n -O raw own.qcow2 d.bin",
        "-O qcow2 -o data_file=d.bin own.qcow2 new.qcow2",
        // Its data file is the source.
        "-n -O qcow2 d.bin own.qcow2",
    ] {
        for force in ["", "-U"] {
            let raw = if line.ends_with("d.bin own.qcow2") { "-f raw" } else { "" };
            let refused = place.hw(&format!("convert {force} {raw} {line}")).code(1);
            assert!(refused.err.contains("both source and target"), "{line}: {refused:?}");
        }
    }
    assert!(files.map(|file| std::fs::read(place.path(file)).unwrap()) == before);
    assert!(!place.path("new.qcow2").exists());
}

#[test]
fn convert_leaves_no_half_of_a_copy() {
    let place = Place::new();
    let text: String = (0..700_000).map(|n| format!("{n} ")).collect();
    std::fs::write(place.path("a.raw"), &text.as_bytes()[..4 << 20]).unwrap();
    place.tool("qemu-img convert -c -f raw -O qcow2 a.raw c.qcow2").ok();
    // The last compressed bytes are damaged, so that the copy fails when most of it is done.
    let mut bytes = std::fs::read(place.path("c.qcow2")).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end - 300..=end].fill(0xff);
    std::fs::write(place.path("c.qcow2"), bytes).unwrap();
    for (options, target) in [
        ("-O raw", "b.raw"),
        ("-O qcow2", "b.qcow2"),
        ("-c -O qcow2", "b.qcow2"),
        ("-O qcow2 -o data_file=d.bin", "b.qcow2"),
    ] {
        let failed = place.hw(&format!("convert {options} c.qcow2 {target}")).code(1);
        assert!(failed.err.contains(target) && failed.err.contains("removed"), "{failed:?}");
        assert!(failed.err.contains("c.qcow2"), "{failed:?}");
        assert!(!place.path(target).exists() && !place.path("d.bin").exists(), "{options}");
    }
    place.raw("t.raw", SIZE);
    let failed = place.hw("convert -n -O raw c.qcow2 t.raw").code(1);
    assert!(failed.err.contains("t.raw") && failed.err.contains("incomplete"), "{failed:?}");
    assert_eq!(std::fs::metadata(place.path("t.raw")).unwrap().len(), SIZE);
    // What was refused before anything was written stays as it was, and is not called incomplete.
    place.hw("create -f qcow2 small.qcow2 1M").ok();
    let refused = place.hw("convert -n -O qcow2 a.raw small.qcow2").code(1);
    assert!(!refused.err.contains("incomplete"), "{refused:?}");
    std::fs::write(place.path("keep.qcow2"), b"precious").unwrap();
    let refused = place.hw("convert -c -O qcow2 -o data_file=d.bin a.raw keep.qcow2").code(1);
    assert!(refused.err.contains("data_file"), "{refused:?}");
    assert_eq!(std::fs::read(place.path("keep.qcow2")).unwrap(), b"precious");
}

#[test]
fn convert_with_no_holes() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    for (options, target) in [("-O raw", "b.raw"), ("-O qcow2", "b.qcow2")] {
        let report = place.hw(&format!("--json convert -S 0 {options} a.raw {target}")).ok().json();
        assert_eq!(report["copied"], SIZE, "{report}");
        let actual = place.hw(&format!("info --json {target}")).ok().json()["actual-size"].as_u64().unwrap();
        assert!(actual >= SIZE, "{target} takes {actual} bytes");
        same(&place, "a.raw", target);
    }
    place.hw("convert -c -S 0 -O qcow2 a.raw c.qcow2").ok();
    sound(&place, "c.qcow2");
    same(&place, "a.raw", "c.qcow2");
    let map = place.hw("map --json c.qcow2").ok().json();
    assert!(map.as_array().unwrap().iter().all(|run| run["present"] == true), "{map}");
}

#[test]
fn convert_by_copies_of_the_kernel() {
    let place = Place::new();
    place.raw("a.raw", SIZE + 12_345);
    for options in ["", "-o cluster_size=4k", "-o extended_l2=on", "-o data_file=d.bin"] {
        place.hw(&format!("convert -C {options} -O qcow2 a.raw b.qcow2")).ok();
        sound(&place, "b.qcow2");
        same(&place, "a.raw", "b.qcow2");
        place.hw("convert -C -O raw b.qcow2 c.raw").ok();
        same(&place, "a.raw", "c.raw");
        place.hw("convert -C -O qcow2 b.qcow2 d.qcow2").ok();
        sound(&place, "d.qcow2");
        same(&place, "a.raw", "d.qcow2");
    }
    place.hw("convert -C -c -O qcow2 a.raw x.qcow2").code(2);
    place.hw("convert -C -S 4k -O qcow2 a.raw x.qcow2").code(2);
    assert!(!place.path("x.qcow2").exists());
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
fn compare_huge_and_empty() {
    let place = Place::new();
    for name in ["a", "b"] {
        place.hw(&format!("create -f raw {name}.raw 4T")).ok();
        place.hw(&format!("create -f qcow2 {name}.qcow2 4T")).ok();
    }
    for (a, b) in [("a.raw", "b.raw"), ("a.qcow2", "b.qcow2"), ("a.raw", "b.qcow2")] {
        place.hw(&format!("compare {a} {b}")).ok();
    }
    place.hw("compare -s a.raw b.raw").ok();
    place.hw("compare -s a.qcow2 b.qcow2").ok();
    // One byte, far out, and behind the end of the shorter image.
    let far = (3u64 << 40) + 12_345;
    for (b, place_of_it) in [("b.raw", far), ("b.qcow2", far)] {
        let format = b.split_once('.').unwrap().1;
        place.qemu_io(format, b, &[&format!("write -P 1 {far} 1")]);
        for a in ["a.raw", "a.qcow2"] {
            let report = place.hw(&format!("--json compare {a} {b}")).code(1).json();
            assert_eq!(report["first-difference"], place_of_it, "{a} {b}: {report}");
            place.tool("qemu-img create -q -f raw short.raw 1T").ok();
            let report = place.hw(&format!("--json compare short.raw {b}")).code(1).json();
            assert_eq!(report["first-difference"], place_of_it, "{a} {b}: {report}");
        }
    }
}

#[test]
fn compare_strictly_as_qemu_img_does() {
    let place = Place::new();
    place.raw("data.raw", SIZE);
    place.tool("qemu-img convert -f raw -O qcow2 data.raw data.qcow2").ok();
    place.tool("qemu-img convert -S 0 -f raw -O qcow2 data.raw full.qcow2").ok();
    place.tool("qemu-img convert -c -f raw -O qcow2 data.raw packed.qcow2").ok();
    place.tool("qemu-img create -q -f qcow2 -b data.raw -F raw over.qcow2").ok();
    place.tool(&format!("qemu-img create -q -f raw hole.raw {SIZE}")).ok();
    std::fs::write(place.path("zero.raw"), vec![0; SIZE as usize]).unwrap();
    place.tool(&format!("qemu-img create -q -f qcow2 hole.qcow2 {SIZE}")).ok();
    place.tool(&format!("qemu-img create -q -f qcow2 flag.qcow2 {SIZE}")).ok();
    place.qemu_io("qcow2", "flag.qcow2", &[&format!("write -z 0 {SIZE}")]);
    let images = [
        "data.raw",
        "data.qcow2",
        "full.qcow2",
        "packed.qcow2",
        "over.qcow2",
        "hole.raw",
        "zero.raw",
        "hole.qcow2",
        "flag.qcow2",
    ];
    for a in images {
        for b in images {
            let judge = place.tool(&format!("qemu-img compare -s {a} {b}"));
            let ours = place.hw(&format!("compare -s {a} {b}"));
            assert_eq!(ours.code, judge.code, "{a} {b}: {ours:?} {judge:?}");
        }
    }
    // Whether a run of bytes ends with the file is a part of qemu-img's status, so its offsets may be lower.
    let ours = place.hw("--json compare -s data.raw full.qcow2").code(1).json();
    assert_eq!(ours["status-mismatch"], 73_728, "where the first hole begins: {ours}");
    let judge = place.tool("qemu-img compare -s data.qcow2 packed.qcow2").code(1);
    assert_eq!(place.hw("compare -s data.qcow2 packed.qcow2").code(1).out, judge.out);
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
