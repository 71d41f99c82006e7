//! What changed since a mark, asked by the verb and by NBD clients; and offline work on images with a history.

use crate::marks::{data, ranges, served};
use crate::support::{Ended, Place};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

fn kind(start: u64, length: u64, kind: &str) -> (u64, u64, String) {
    (start, length, kind.to_owned())
}

fn changes(place: &Place, arguments: &str) -> Vec<(u64, u64, String)> {
    ranges(&place.hw(&format!("--json changes {arguments}")).ok().json())
}

fn python(place: &Place, script: &str, args: &[&str]) -> Ended {
    place.run("/usr/bin/python3", [&["-c", script], args].concat())
}

#[test]
fn kinds_and_their_sums() {
    let place = Place::new();
    for image in ["a.raw", "b.qcow2"] {
        place.hw(&format!("create {image} 16M")).ok();
        served(&place, image, &["write -P 1 0 16M"]);
        place.hw(&format!("mark {image} m1")).ok();
        served(&place, image, &["write -P 2 1M 100k", "write -z -u 4M 1M", "discard 8M 1M", "write -P 3 15M 1"]);
        place.hw(&format!("mark {image} m2")).ok();
        served(&place, image, &["write -P 2 2M 64k", "write -P 2 4M 64k"]);

        let answer = place.hw(&format!("--json changes {image} --since m1 --until m2")).ok().json();
        let found = ranges(&answer);
        // What changed again after m2 is told as data, whether it had changed before or not.
        assert!(found.contains(&data(M, 128 * K)) && found.contains(&data(15 * M, 64 * K)), "{found:?}");
        assert!(found.contains(&data(2 * M, 64 * K)) && found.contains(&data(4 * M, 64 * K)), "{found:?}");
        let given_back: u64 = found.iter().filter(|(_, _, kind)| kind != "data").map(|(_, length, _)| length).sum();
        assert_eq!(given_back, 2 * M - 64 * K, "{found:?}");
        assert_eq!(answer["size"], 16 * M);
        assert_eq!((&answer["since"]["name"], &answer["until"]["name"]), (&Value::from("m1"), &Value::from("m2")));
        let summary = |key: &str| answer["summary"][key].as_u64().unwrap();
        assert_eq!(summary("changed"), found.iter().map(|(_, length, _)| length).sum::<u64>());
        assert_eq!(summary("changed"), summary("data") + summary("zero") + summary("discarded"));
        assert_eq!(changes(&place, &format!("{image} --since m2")), [data(2 * M, 64 * K), data(4 * M, 64 * K)]);

        let table = place.hw(&format!("changes {image} --since m2")).ok().out;
        assert!(table.contains("START") && table.contains("0x200000  0x10000  data"), "{table}");
        let text = place.hw(&format!("changes {image} --since m2 --summary")).ok().out;
        assert!(text.contains("131072 bytes (128 KiB)"), "{text}");
        let short = place.hw(&format!("--json changes {image} --since m2 --summary")).ok().json();
        assert!(short["ranges"].is_null() && short["summary"]["data"] == 128 * K, "{short}");
        let chart = place.hw(&format!("changes {image} --since m1 --chart")).ok().out;
        assert!(chart.contains("a cell is") && chart.contains('█'), "{chart}");
        place.hw(&format!("changes {image} --since m1 --picture p.png")).ok();
        assert!(fs::read(place.path("p.png")).unwrap().starts_with(b"\x89PNG"));
        let nowhere = place.hw(&format!("changes {image} --since m1 --picture missing/p.png")).code(1);
        assert!(nowhere.err.contains("missing/p.png"), "{nowhere:?}");
    }
}

#[test]
fn many_ranges_come_in_parts() {
    let place = Place::new();
    place.hw("create a.raw 256M").ok();
    let server = place.start("--api s.sock serve a.raw --history-granule 4k");
    place.hw("--api s.sock mark a before").ok();
    let script = "
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for n in range(20000):
    h.pwrite(b'x' * 512, n * 8192)
";
    python(&place, script, &[server.uri()]).ok();
    let expected: Vec<_> = (0..20000).map(|n| data(n * 8192, 4096)).collect();
    let answer = ["-sf", "--unix-socket", "s.sock", "http://x/v1/disks/a/changes?since=before"];
    let part = place.run("curl", answer).ok().json();
    assert!(part["next"].is_u64() && ranges(&part).len() < 20000, "it was to be in parts");
    assert!(changes(&place, "--api s.sock a --since before") == expected);
    assert!(server.end().success());
    assert!(changes(&place, "a.raw --since before") == expected);
}

/// Reads the context of a mark and copies what it calls dirty into a copy.
const COPY_DIRTY: &str = "
import nbd, sys
uri, context, copy = sys.argv[1:]
h = nbd.NBD()
h.add_meta_context(context)
h.connect_uri(uri)
assert h.can_meta_context(context)
runs = []
def extent(name, offset, entries, err):
    if name == context:
        for length, flags in zip(entries[::2], entries[1::2]):
            runs.append((offset, length, flags))
            offset += length
at, size = 0, h.get_size()
while at < size:
    runs.clear()
    h.block_status(min(size - at, 1 << 30), at, extent)
    with open(copy, 'r+b') as out:
        for offset, length, flags in runs:
            if flags & 1:
                print(offset, length, flags)
                out.seek(offset)
                out.write(b'\\0' * length if flags & 2 else h.pread(length, offset))
            at = offset + length
";

#[test]
fn nbd_clients_copy_what_changed() {
    let place = Place::new();
    for image in ["a.raw", "b.qcow2"] {
        place.hw(&format!("create {image} 16M")).ok();
        served(&place, image, &["write -P 1 0 16M"]);
        let server = place.start(&format!("--api s.sock serve {image} --name disk"));
        let disk = &image[..1];
        place.run("nbdcopy", [server.uri(), "full.raw"]).ok();
        place.tool("cp full.raw typed.raw").ok();
        place.hw(&format!("--api s.sock mark {disk} before")).ok();
        place.qemu_io(
            "raw",
            server.uri(),
            &["write -P 7 1M 100k", "write -z -u 4M 1M", "discard 8M 1M", "write -P 9 15M 1k", "flush"],
        );
        let told = changes(&place, &format!("--api s.sock {disk} --since before"));

        // nbdinfo: runs of the same truth.
        let map = place.run("nbdinfo", ["--json", "--map=qemu:dirty-bitmap:before", server.uri()]).ok().json();
        let number = |value: &Value| value.as_u64().unwrap();
        let dirty: u64 =
            map.as_array().unwrap().iter().filter(|e| number(&e["type"]) == 1).map(|e| number(&e["length"])).sum();
        assert_eq!(dirty, told.iter().map(|(_, length, _)| length).sum::<u64>(), "{map}");
        let types = place.run("nbdinfo", ["--json", "--map=highwater:changes:before", server.uri()]).ok().json();
        let typed: Vec<_> = types
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| number(&entry["type"]) != 0)
            .map(|entry| {
                let word = match number(&entry["type"]) {
                    1 => "data",
                    3 => "zero",
                    7 => "discarded",
                    other => panic!("status {other}"),
                };
                kind(number(&entry["offset"]), number(&entry["length"]), word)
            })
            .collect();
        assert_eq!(typed, told);

        // QEMU shows what is dirty as no data.
        let path = server.uri().split("socket=").nth(1).unwrap();
        let options = format!(
            "driver=nbd,server.type=unix,server.path={path},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:before"
        );
        let map = place.run("qemu-img", ["map", "--output=json", "--image-opts", &options]).ok().json();
        let dirty: u64 = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| entry["data"] == false)
            .map(|entry| number(&entry["length"]))
            .sum();
        assert_eq!(dirty, told.iter().map(|(_, length, _)| length).sum::<u64>(), "{map}");

        // A full copy and what changed since are the disk.
        for (context, copy) in [("qemu:dirty-bitmap:before", "full.raw"), ("highwater:changes:before", "typed.raw")] {
            assert_ne!(place.tool(&format!("cmp -s now.raw {copy}")).code, Some(0));
            python(&place, COPY_DIRTY, &[server.uri(), context, copy]).ok();
            place.run("nbdcopy", [server.uri(), "now.raw"]).ok();
            place.tool(&format!("cmp now.raw {copy}")).ok();
            fs::remove_file(place.path("now.raw")).unwrap();
        }
        assert!(server.end().success());
    }
}

#[test]
fn after_a_kill_nothing_is_missed() {
    const WRITER: &str = "
import nbd, random, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
r = random.Random(int(sys.argv[2]))
try:
    while True:
        at = r.randrange(0, 16 << 20) & ~511
        length = min(r.choice([512, 4096, 65536, 300000]) & ~511, (16 << 20) - at)
        kind = r.randrange(10)
        if kind == 0:
            h.flush()
        elif kind == 1:
            h.zero(length, at)
        elif kind == 2:
            h.trim(length, at)
        else:
            h.pwrite(bytes([r.randrange(256)]) * length, at)
        print(kind, flush=True)
except nbd.Error:
    pass
";
    let place = Place::new();
    for image in ["a.raw", "b.qcow2"] {
        place.hw(&format!("create {image} 32M")).ok();
        served(&place, image, &["write -P 1 0 32M"]);
        for round in 0..4u64 {
            let mark = format!("m{round}");
            place.hw(&format!("convert -O raw {image} full.raw")).ok();
            place.hw(&format!("mark {image} {mark}")).ok();
            let server = place.start(&format!("serve {image} --name disk --history-open 1M"));
            let mut writer = std::process::Command::new("/usr/bin/python3")
                .args(["-c", WRITER, server.uri(), &round.to_string()])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("python3 with libnbd");
            let mut done = std::io::BufRead::lines(std::io::BufReader::new(writer.stdout.take().unwrap()));
            for _ in 0..50 + 40 * round {
                done.next().expect("the client writes").unwrap();
            }
            server.kill();
            done.for_each(drop);
            writer.wait().unwrap();
            let server = place.start(&format!("serve {image} --name disk"));
            assert_eq!(server.ready["history"]["refused"], 0, "{}", server.ready);
            python(&place, COPY_DIRTY, &[server.uri(), &format!("highwater:changes:{mark}"), "full.raw"]).ok();
            place.run("nbdcopy", [server.uri(), "now.raw"]).ok();
            place.tool("cmp now.raw full.raw").ok();
            fs::remove_file(place.path("now.raw")).unwrap();
            assert!(server.end().success());
            // Only its first half was written to, and 1 MiB may be told beyond.
            let changed = place.hw(&format!("--json changes {image} --since {mark} --summary")).ok().json();
            assert!(changed["summary"]["changed"].as_u64().unwrap() <= 17 * M, "{changed}");
        }
    }
}

#[test]
fn a_client_is_not_answered_for_another_mark_of_the_same_name() {
    let place = Place::new();
    place.hw("create a.raw 16M").ok();
    let server = place.start("--api s.sock serve a.raw");
    place.hw("--api s.sock mark a before").ok();
    place.qemu_io("raw", server.uri(), &["write -P 7 1M 64k"]);
    let script = "
import nbd, subprocess, sys
hw, uri = sys.argv[1:]
h = nbd.NBD()
h.add_meta_context('qemu:dirty-bitmap:before')
h.connect_uri(uri)
told = []
def extent(name, offset, entries, err):
    told.extend(entries)
h.block_status(1 << 20, 1 << 20, extent)
assert told == [65536, 1, (1 << 20) - 65536, 0], told
for verb in ['marks delete', 'mark']:
    subprocess.run([hw, '--api', 's.sock', *verb.split(), 'a', 'before'], check=True)
try:
    h.block_status(1 << 20, 1 << 20, extent)
    sys.exit('it was answered')
except nbd.Error as e:
    print(e.errno)
";
    python(&place, script, &[env!("CARGO_BIN_EXE_highwater"), server.uri()]).ok();
    assert!(server.end().success());
}

#[test]
fn resize_keeps_the_history() {
    let place = Place::new();
    for image in ["a.raw", "b.qcow2"] {
        place.hw(&format!("create {image} 16M")).ok();
        served(&place, image, &["write -P 1 0 16M"]);
        place.hw(&format!("mark {image} before")).ok();
        place.hw(&format!("resize {image} +4M")).ok();
        let grown = place.hw(&format!("--json changes {image} --since before")).ok().json();
        assert_eq!(ranges(&grown), [kind(16 * M, 4 * M, "zero")]);
        assert_eq!((&grown["since"]["size"], &grown["size"]), (&Value::from(16 * M), &Value::from(20 * M)));
        // What is cut off and comes again is zero.
        place.hw(&format!("resize --shrink {image} 8M")).ok();
        assert_eq!(changes(&place, &format!("{image} --since before")), []);
        place.hw(&format!("resize {image} 16M")).ok();
        assert_eq!(changes(&place, &format!("{image} --since before")), [kind(8 * M, 8 * M, "zero")]);
        // A mark between remembers its own size.
        place.hw(&format!("mark {image} between")).ok();
        place.hw(&format!("resize {image} 32M --preallocation full")).ok();
        assert_eq!(changes(&place, &format!("{image} --since between")), [kind(16 * M, 16 * M, "zero")]);
        let until = place.hw(&format!("--json changes {image} --since before --until between")).ok().json();
        assert_eq!((&until["size"], ranges(&until)), (&Value::from(16 * M), vec![kind(8 * M, 8 * M, "zero")]));
        served(&place, image, &["read -P 0 8M 24M"]);
    }
}

/// Sets the reference count of a cluster that has another one, leaving the image's times as they are, and returns the
/// cluster.
fn set_count(image: &Path, from: u16, to: u16, which: impl Fn(u64) -> bool) -> u64 {
    let file = fs::File::options().read(true).write(true).open(image).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = number(number(48));
    let clusters = file.metadata().unwrap().len() / (64 * K);
    let cluster = (0..clusters).find(|cluster| {
        let mut count = [0; 2];
        file.read_exact_at(&mut count, block + 2 * cluster).unwrap();
        u16::from_be_bytes(count) == from && which(*cluster)
    });
    let cluster = cluster.expect("a cluster with that count");
    file.write_all_at(&to.to_be_bytes(), block + 2 * cluster).unwrap();
    file.set_modified(times).unwrap();
    cluster
}

#[test]
fn a_repair_that_gives_back_lost_space_keeps_the_marks() {
    let place = Place::new();
    let image = place.path("a.qcow2");
    place.hw("create a.qcow2 16M").ok();
    fs::File::options().write(true).open(&image).unwrap().set_len(4 * M).unwrap();
    place.hw("mark a.qcow2 before").ok();
    served(&place, "a.qcow2", &["write -P 1 1M 64k"]);
    let expected = [data(M, 64 * K)];
    assert_eq!(changes(&place, "a.qcow2 --since before"), expected);

    set_count(&image, 0, 1, |_| true);
    let leak = place.hw("--json check a.qcow2").code(3).json();
    assert_eq!(leak["leaks"], 1, "{leak}");
    let repaired = place.hw("--json check --repair leaks a.qcow2").ok().json();
    assert_eq!(repaired["leaks-fixed"], 1, "{repaired}");
    assert_eq!(changes(&place, "a.qcow2 --since before"), expected);
    // Nothing to mend is nothing changed.
    place.hw("check --repair all a.qcow2").ok();
    assert_eq!(changes(&place, "a.qcow2 --since before"), expected);
    served(&place, "a.qcow2", &["write -P 1 5M 64k"]);
    let expected = [data(M, 64 * K), data(5 * M, 64 * K)];
    assert_eq!(changes(&place, "a.qcow2 --since before"), expected);

    // After a kill, too: what may have changed stays known.
    let server = place.start("serve a.qcow2");
    place.qemu_io("raw", server.uri(), &["write -P 1 9M 64k", "flush", "write -P 1 11M 64k"]);
    server.kill();
    let repaired = place.hw("check --repair leaks a.qcow2").ok();
    let found = changes(&place, "a.qcow2 --since before");
    for at in [M, 5 * M, 9 * M, 11 * M] {
        assert!(
            found.iter().any(|(start, len, _)| (*start..start + len).contains(&at)),
            "{at}: {found:?} {repaired:?}"
        );
    }

    // In another place.
    place.hw("create b.qcow2 16M").ok();
    let other = place.path("b.qcow2");
    fs::File::options().write(true).open(&other).unwrap().set_len(4 * M).unwrap();
    place.hw("mark b.qcow2 --history-file h before").ok();
    served(&place, "b.qcow2 --history-file h", &["write -P 1 1M 64k"]);
    set_count(&other, 0, 1, |_| true);
    place.hw("check -r leaks b.qcow2 --history-file h").ok();
    assert_eq!(changes(&place, "b.qcow2 --history-file h --since before"), [data(M, 64 * K)]);

    // A corruption that was mended is another matter.
    set_count(&image, 1, 0, |cluster| cluster > 4);
    let mended = place.hw("--json check --repair all a.qcow2").ok();
    assert!(mended.json()["corruptions-fixed"].as_u64().unwrap() > 0, "{mended:?}");
    assert!(mended.err.contains("marks are refused"), "{mended:?}");
    let refused = place.hw("changes a.qcow2 --since before").code(1);
    assert!(refused.err.contains("a repair mended the image"), "{refused:?}");
    place.hw("marks trust a.qcow2").ok();
    place.hw("changes a.qcow2 --since before").ok();

    // What another program did before the repair is not forgiven by it.
    place.qemu_io("qcow2", "a.qcow2", &["write -P 1 13M 64k"]);
    set_count(&image, 0, 1, |_| true);
    place.hw("check --repair leaks a.qcow2").ok();
    let refused = place.hw("changes a.qcow2 --since before").code(1);
    assert!(refused.err.contains("another program"), "{refused:?}");
}

#[test]
fn an_image_that_is_overwritten_loses_its_marks() {
    let place = Place::new();
    place.raw("new.raw", 16 * M);
    for image in ["a.raw", "b.qcow2"] {
        let sidecar = place.path(&format!("{image}.history"));
        place.hw(&format!("create {image} 16M")).ok();
        place.hw(&format!("mark {image} before")).ok();
        served(&place, image, &["write -P 1 1M 64k"]);
        place.hw(&format!("convert -n new.raw {image}")).ok();
        let refused = place.hw(&format!("changes {image} --since before")).code(1);
        assert!(refused.err.contains("another program"), "{refused:?}");

        place.hw(&format!("create {image} 16M")).ok();
        assert!(!sidecar.exists(), "the history of the replaced image was left");
        assert!(place.hw(&format!("changes {image} --since before")).code(1).err.contains("no history"));
        place.hw(&format!("mark {image} before")).ok();
        place.hw(&format!("convert new.raw {image}")).ok();
        assert!(!sidecar.exists(), "the history of the replaced image was left");
        // Made anew where one was deleted: the history left by that one is found to be another image's.
        place.hw(&format!("mark {image} before")).ok();
        fs::remove_file(place.path(image)).unwrap();
        place.hw(&format!("create {image} 16M")).ok();
        let refused = place.hw(&format!("changes {image} --since before")).code(1);
        assert!(refused.err.contains("cannot be trusted"), "{refused:?}");
        // What only has the name of a history is left.
        fs::write(&sidecar, "diary").unwrap();
        place.hw(&format!("create {image} 16M")).ok();
        assert_eq!(fs::read(&sidecar).unwrap(), b"diary");
    }
}
