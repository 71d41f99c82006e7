//! Marks: on files and on disks of the daemon, and when they are trusted.

use crate::daemon::Daemon;
use crate::scripted_agent::{Answer, ScriptedAgent};
use crate::support::{Ended, Place, Server};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;

const SIZE: u64 = 16 << 20;

/// Writes to a disk of that name through a server of its own.
pub(crate) fn served(place: &Place, line: &str, commands: &[&str]) {
    let server = place.start(&format!("serve {line}"));
    place.qemu_io("raw", server.uri(), commands);
    assert!(server.end().success());
}

/// The changed ranges in an answer.
pub(crate) fn ranges(answer: &Value) -> Vec<(u64, u64, String)> {
    let ranges = answer["ranges"].as_array().unwrap_or_else(|| panic!("no ranges: {answer}"));
    let number = |value: &Value| value.as_u64().expect("a number");
    ranges.iter().map(|r| (number(&r["start"]), number(&r["length"]), r["kind"].as_str().unwrap().to_owned())).collect()
}

pub(crate) fn data(start: u64, length: u64) -> (u64, u64, String) {
    (start, length, "data".to_owned())
}

/// That the mark `before` is refused, by everything, for a reason with these words.
#[track_caller]
fn refused(place: &Place, image: &str, words: &str) {
    let error = place.hw(&format!("changes {image} --since before")).code(1).err;
    assert!(error.contains("\"before\" cannot be trusted") && error.contains(words), "{error}");
    assert!(error.contains("marks trust"), "{error}");
    let list = place.hw(&format!("--json marks list {image}")).ok().json();
    assert!(list["marks"][0]["refused"].as_str().unwrap().contains(words), "{list}");
    assert_eq!(list["history"]["refused"], 1, "{list}");
}

#[track_caller]
fn trusted(place: &Place, image: &str) -> Vec<(u64, u64, String)> {
    ranges(&place.hw(&format!("--json changes {image} --since before")).ok().json())
}

/// An image with the mark `before`, and 64 KiB at 1 MiB written after it.
fn marked(place: &Place, image: &str) {
    place.hw(&format!("create {image} 16M")).ok();
    place.hw(&format!("mark {image} before")).ok();
    served(place, image, &["write -P 1 1M 64k"]);
    assert_eq!(trusted(place, image), [data(1 << 20, 64 << 10)]);
}

#[test]
fn marks_of_files() {
    let place = Place::new();
    place.hw("create a.raw 16M").ok();
    place.hw("create b.qcow2 16M").ok();
    let missing = place.hw("marks list a.raw").code(1);
    assert!(missing.err.contains("no history is kept"), "{missing:?}");
    for line in ["marks trust a.raw", "marks delete a.raw x"] {
        assert!(place.hw(line).code(1).err.contains("`highwater mark` makes one"), "{line}");
        assert!(!place.path("a.raw.history").exists(), "{line} made a history");
    }
    let both = place.hw("--json mark a.raw b.qcow2 first").ok().json();
    assert_eq!(both["marks"][0]["set"], both["marks"][1]["set"], "one instant");
    assert_ne!(both["marks"][0]["id"], both["marks"][1]["id"]);
    assert_eq!(both["marks"][0]["consistency"], "crash");
    let taken = place.hw("mark a.raw first").code(1);
    assert!(taken.err.contains("there is a mark \"first\" already"), "{taken:?}");
    let table = place.hw("mark -f raw a.raw second").ok().out;
    assert!(table.contains("trusted") && table.contains("16 MiB"), "{table}");
    let list = place.hw("marks list a.raw -v").ok().out;
    for word in ["first", "second", "lineage", "granule: 64 KiB", "a.raw.history"] {
        assert!(list.contains(word), "{word} is not in {list}");
    }
    assert!(place.hw("marks show a.raw second").ok().out.contains("trust: trusted"));
    assert_eq!(place.hw("--json marks show b.qcow2 first").ok().json()["size"], SIZE);
    place.hw("marks delete a.raw first").ok();
    for line in ["marks show a.raw first", "marks delete a.raw first", "changes a.raw --since first"] {
        let gone = place.hw(line).code(1);
        assert!(gone.err.contains("no mark \"first\"") && gone.err.contains("marks list"), "{line}: {gone:?}");
    }
    // Names that need care.
    for name in ["a b/c", "ä%2F", "?x=1&y"] {
        place.run(env!("CARGO_BIN_EXE_highwater"), ["mark", "a.raw", name]).ok();
        place.run(env!("CARGO_BIN_EXE_highwater"), ["changes", "a.raw", "--since", name]).ok();
    }
    for name in [".", "..", "a\nb"] {
        let bad = place.run(env!("CARGO_BIN_EXE_highwater"), ["mark", "a.raw", name]).code(1);
        assert!(bad.err.contains("mark"), "{name:?}: {bad:?}");
    }
    // The whole group or nothing.
    assert!(place.hw("mark a.raw b.qcow2 first").code(1).err.contains("already"));
    place.hw("marks show a.raw first").code(1);
    assert!(place.hw("mark a.raw missing.raw x").code(1).err.contains("missing.raw"));
    place.hw("marks show a.raw x").code(1);
    let frozen = place.hw("mark a.raw x --freeze /x.sock").code(1);
    assert!(frozen.err.contains("at rest"), "{frozen:?}");
    place.hw("mark a.raw").code(2);
    place.run(env!("CARGO_BIN_EXE_highwater"), ["mark", "a.raw", ""]).code(2);
    // Another place.
    place.hw("create c.raw 1M").ok();
    place.hw("mark c.raw --history-file elsewhere before").ok();
    assert!(!place.path("c.raw.history").exists());
    place.hw("changes c.raw --history-file elsewhere --since before").ok();
    place.hw("changes c.raw --since before").code(1);
    place.hw("resize c.raw 2M --history-file elsewhere").ok();
    let grown = place.hw("--json changes c.raw --history-file elsewhere --since before").ok().json();
    assert_eq!(ranges(&grown), [(1 << 20, 1 << 20, "zero".to_owned())]);
    // A slip must not cost a file.
    place.raw("d.raw", SIZE);
    let content = fs::read(place.path("d.raw")).unwrap();
    for named in ["d.raw", "c.raw"] {
        let refused = place.hw(&format!("mark c.raw --history-file {named} x")).code(1);
        assert!(refused.err.contains("is no history") && refused.err.contains("left alone"), "{refused:?}");
    }
    assert!(fs::read(place.path("d.raw")).unwrap() == content);
    assert_eq!(fs::metadata(place.path("c.raw")).unwrap().len(), 2 << 20);
}

#[test]
fn info_shows_the_history() {
    let place = Place::new();
    place.hw("create a.qcow2 16M").ok();
    assert!(place.hw("--json info a.qcow2").ok().json()["history"].is_null());
    place.hw("mark a.qcow2 before").ok();
    let info = place.hw("--json info a.qcow2").ok().json();
    assert_eq!((&info["history"]["kept"], &info["history"]["marks"]), (&Value::Bool(true), &Value::from(1)));
    assert!(place.hw("info a.qcow2").ok().out.contains("a crash would over-report: 0 B now, 64 MiB at most"));
    let server = place.start("serve a.qcow2");
    assert_eq!(server.ready["history"]["kept"], true);
    let beside = place.hw("--json info -U a.qcow2").ok().json();
    assert_eq!(beside["history"]["kept"], false, "{beside}");
    assert!(beside["history"]["file"].as_str().unwrap().ends_with("a.qcow2.history"));
    assert!(server.end().success());
    // One that cannot be read is told of, and the image is shown.
    fs::write(place.path("a.qcow2.history"), [1; 10_000]).unwrap();
    let info = place.hw("--json info a.qcow2").ok().json();
    assert!(info["history"]["reason"].as_str().unwrap().contains("superblock"), "{info}");
}

#[test]
fn marks_of_the_daemon() {
    let mut daemon = Daemon::new();
    daemon.place.hw("create a.qcow2 16M").ok();
    daemon.place.hw("create b.raw 16M").ok();
    daemon.place.hw("create c.raw 16M").ok();
    let added = daemon.hw("--json disk add a.qcow2 --vm vm1").ok().json();
    assert_eq!(added["history"]["kept"], true);
    daemon.hw("disk add b.raw --vm vm1 --history-granule 4k").ok();
    let uri = added["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    let set = daemon.hw("--json mark vm1 before").ok().json();
    assert_eq!((&set["marks"][0]["disk"], &set["marks"][1]["disk"]), (&Value::from("a"), &Value::from("b")));
    assert_eq!(set["marks"][0]["set"], set["marks"][1]["set"]);
    let mixed = daemon.hw("mark a c.raw x").code(1);
    assert!(mixed.err.contains("c.raw is a file") && mixed.err.contains("a belongs to the daemon"), "{mixed:?}");
    assert!(daemon.hw("mark nothing x").code(1).err.contains("neither a disk nor a virtual machine"));
    assert!(daemon.hw("mark -f raw a x").code(1).err.contains("open already"));
    daemon.hw("mark c.raw alone").ok();
    assert!(daemon.place.path("c.raw.history").exists());
    daemon.place.qemu_io("raw", &uri, &["write -P 1 1M 64k"]);
    daemon.hw("mark a b after").ok();
    daemon.place.qemu_io("raw", &uri, &["write -P 1 3M 64k"]);
    let changes = daemon.hw("--json changes a --since before").ok().json();
    assert_eq!(ranges(&changes), [data(1 << 20, 64 << 10), data(3 << 20, 64 << 10)]);
    assert_eq!(changes["summary"]["data"], 128 << 10);
    assert_eq!(ranges(&daemon.hw("--json changes a --since after").ok().json()), [data(3 << 20, 64 << 10)]);
    assert_eq!(ranges(&daemon.hw("--json changes b --since before").ok().json()), []);
    let wrong = daemon.hw("changes a --since after --until before").code(1);
    assert!(wrong.err.contains("older than"), "{wrong:?}");
    let list = daemon.hw("disk list").ok().out;
    assert!(list.contains("kept, marks: 2"), "{list}");
    assert!(daemon.hw("info a").ok().out.contains("marks: 2"));
    let metrics = daemon.hw("metrics").ok().out;
    for line in ["highwater_disk_history_kept{disk=\"a\"} 1", "highwater_disk_marks{disk=\"b\"} 2"] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in {metrics}");
    }
    daemon.hw("marks delete b after").ok();
    assert!(daemon.hw("marks show b after").code(1).err.contains("no mark"));
    let trust = daemon.hw("marks trust a").ok().out;
    assert!(trust.contains("no mark was refused"), "{trust}");

    // HTTP alone, with a name that needs care.
    let spec = r#"{"disks":["a"],"name":"ä /%"}"#;
    let (status, _) = daemon.curl("POST", "/v1/marks", Some(spec));
    assert_eq!(status, 201);
    let path = "/v1/disks/a/marks/%C3%A4%20%2F%25";
    let (status, mark) = daemon.curl("GET", path, None);
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<Value>(&mark).unwrap()["name"], "ä /%");
    let (status, history) = daemon.curl("GET", "/v1/disks/a/history", None);
    assert_eq!((status, &serde_json::from_str::<Value>(&history).unwrap()["marks"]), (200, &Value::from(3)));
    let (status, part) = daemon.curl("GET", "/v1/disks/a/changes?since=before&most=1&start=2097152", None);
    assert_eq!(status, 200);
    assert_eq!(ranges(&serde_json::from_str(&part).unwrap()), [data(3 << 20, 64 << 10)]);
    assert_eq!(daemon.curl("DELETE", path, None).0, 204);
    assert_eq!(daemon.curl("DELETE", path, None).0, 404);
    for (method, path, body, expected) in [
        ("POST", "/v1/marks", Some(r#"{"disks":["a"],"name":"before"}"#), 409),
        ("POST", "/v1/marks", Some(r#"{"disks":["a"],"name":""}"#), 400),
        ("POST", "/v1/marks", Some(r#"{"disks":["zz"],"name":"x"}"#), 404),
        ("POST", "/v1/marks", Some(r#"{"disks":["a"]}"#), 400),
        ("POST", "/v1/marks", Some(r#"{"disks":["a"],"name":"x","freeze":{"socket":"s"}}"#), 400),
        ("GET", "/v1/disks/a/changes", None, 400),
        ("GET", "/v1/disks/a/changes?since=zz", None, 404),
        ("GET", "/v1/disks/a/changes?since=before&x=1", None, 400),
        ("GET", "/v1/disks/zz/marks", None, 404),
        ("POST", "/v1/disks/a/history/trust", None, 200),
    ] {
        assert_eq!(daemon.curl(method, path, body).0, expected, "{method} {path} {body:?}");
    }

    // They outlive the daemon, its death too.
    daemon.end();
    daemon.start();
    assert_eq!(ranges(&daemon.hw("--json changes a --since after").ok().json()), [data(3 << 20, 64 << 10)]);
    daemon.place.qemu_io("raw", &uri, &["write -P 1 5M 64k", "flush", "write -P 1 7M 64k"]);
    daemon.server.take().unwrap().kill();
    daemon.start();
    let changes = daemon.hw("--json changes a --since after").ok().json();
    let found = ranges(&changes);
    for at in [3u64 << 20, 5 << 20, 7 << 20] {
        let covered = found.iter().any(|(start, len, _)| *start <= at && at + (64 << 10) <= start + len);
        assert!(covered, "{at} is not in {found:?}");
    }
    assert!(changes["summary"]["changed"].as_u64().unwrap() < SIZE, "{changes}");
    daemon.end();
}

#[test]
fn a_mark_of_a_frozen_guest() {
    let daemon = Daemon::new();
    for disk in ["a", "b"] {
        daemon.place.hw(&format!("create {disk}.raw 16M")).ok();
        daemon.hw(&format!("disk add {disk}.raw --vm vm1")).ok();
    }
    let socket = daemon.place.path("agent.sock");
    let agent = ScriptedAgent::listen(&socket, |state| state.freezes = vec![Answer::Yes, Answer::No("not now")]);
    let marks = daemon.hw("--json mark vm1 frozen --freeze agent.sock --freeze-limit 5000").ok().json();
    for mark in marks["marks"].as_array().unwrap() {
        assert_eq!(mark["consistency"], "application", "{mark}");
        assert!(mark["frozen-ms"].is_u64(), "{mark}");
    }
    assert!(!agent.is_frozen());
    assert!(daemon.hw("marks list a").ok().out.contains("application, frozen for"));
    // Nobody is frozen for a mark that cannot be taken.
    let commands = agent.state().commands.len();
    assert!(daemon.hw("mark vm1 frozen --freeze agent.sock").code(1).err.contains("already"));
    assert_eq!(agent.state().commands.len(), commands);
    let refused = daemon.hw("mark vm1 again --freeze agent.sock").code(1);
    assert!(refused.err.contains("not now"), "{refused:?}");
    assert!(!agent.is_frozen());
    for disk in ["a", "b"] {
        daemon.hw(&format!("marks show {disk} frozen")).ok();
        daemon.hw(&format!("marks show {disk} again")).code(1);
    }
}

#[test]
fn an_image_may_be_moved_with_its_history() {
    let place = Place::new();
    for image in ["a.raw", "a.qcow2"] {
        marked(&place, image);
        let moved = format!("moved-{image}");
        for suffix in ["", ".history"] {
            fs::rename(place.path(&format!("{image}{suffix}")), place.path(&format!("{moved}{suffix}"))).unwrap();
        }
        assert_eq!(trusted(&place, &moved), [data(1 << 20, 64 << 10)]);
        let copy = place.path(&format!("copy-{image}"));
        fs::create_dir(&copy).unwrap();
        place.tool(&format!("cp -a {moved} {moved}.history {}", copy.display())).ok();
        let copied = format!("copy-{image}/{moved}");
        assert_eq!(trusted(&place, &copied), [data(1 << 20, 64 << 10)]);
        served(&place, &copied, &["write -P 1 5M 64k"]);
        assert_eq!(trusted(&place, &copied), [data(1 << 20, 64 << 10), data(5 << 20, 64 << 10)]);
        assert_eq!(trusted(&place, &moved), [data(1 << 20, 64 << 10)]);
    }
}

#[test]
fn changes_by_others_are_found_and_may_be_accepted() {
    let place = Place::new();
    for (image, format, words) in
        [("a.raw", "raw", "another program modified"), ("a.qcow2", "qcow2", "another program opened the image")]
    {
        marked(&place, image);
        // Who only reads leaves it trusted.
        place.run("qemu-io", ["-r", "-f", format, "-c", "read 0 1M", image]).ok();
        place.tool(&format!("qemu-img convert -f {format} -O raw {image} read.raw")).ok();
        assert_eq!(trusted(&place, image).len(), 1);
        place.qemu_io(format, image, &["write -P 9 9M 64k"]);
        refused(&place, image, words);
        // A server says so, and serves.
        let server = place.start(&format!("--api s.sock serve {image}"));
        let history = &server.ready["history"];
        assert_eq!((&history["kept"], &history["refused"]), (&Value::Bool(true), &Value::from(1)));
        assert!(history["reason"].as_str().unwrap().contains(words), "{history}");
        place.qemu_io("raw", server.uri(), &["read -P 9 9M 64k", "write -P 3 3M 64k"]);
        let over_nbd = place.run("nbdinfo", ["--map=qemu:dirty-bitmap:before", server.uri()]);
        assert_ne!(over_nbd.code, Some(0), "{over_nbd:?}");
        let trust = place.hw("--api s.sock marks trust a").ok().out;
        assert!(trust.contains("\"before\" is trusted again") && trust.contains(words), "{trust}");
        let shown = place.hw("--api s.sock --json disk show a").ok().json();
        assert!(shown["history"]["reason"].is_null(), "{shown}");
        place.run("nbdinfo", ["--map=qemu:dirty-bitmap:before", server.uri()]).ok();
        server.signal("TERM");
        assert!(server.errors_at_end().contains("older marks are refused"));
        assert_eq!(trusted(&place, image), [data(1 << 20, 64 << 10), data(3 << 20, 64 << 10)]);
        place.qemu_io(format, image, &["write -P 9 9M 64k"]);
        refused(&place, image, words);
        let trust = place.hw(&format!("--json marks trust {image}")).ok().json();
        assert!(trust["marks"][0]["refused"].is_null());
        assert_eq!(trusted(&place, image).len(), 2);
    }
}

#[test]
fn an_image_that_is_not_the_same_is_refused() {
    let place = Place::new();
    // Committed into, as a parent.
    for (base, format) in [("base.raw", "raw"), ("base.qcow2", "qcow2")] {
        marked(&place, base);
        place.tool(&format!("qemu-img create -q -f qcow2 -b {base} -F {format} top.qcow2")).ok();
        place.qemu_io("qcow2", "top.qcow2", &["write -P 7 2M 64k"]);
        assert_eq!(trusted(&place, base).len(), 1);
        place.tool("qemu-img commit -q top.qcow2").ok();
        refused(&place, base, "closed here");
    }
    // Shorter.
    marked(&place, "short.raw");
    fs::File::options().write(true).open(place.path("short.raw")).unwrap().set_len(SIZE / 2).unwrap();
    refused(&place, "short.raw", "8388608 bytes");
    // Another file.
    marked(&place, "replaced.raw");
    place.raw("new.raw", SIZE);
    fs::rename(place.path("new.raw"), place.path("replaced.raw")).unwrap();
    refused(&place, "replaced.raw", "another program modified");
    // An earlier copy.
    for (image, words) in [("old.raw", "earlier copy"), ("old.qcow2", "another moment")] {
        marked(&place, image);
        place.tool(&format!("cp -a {image} earlier")).ok();
        served(&place, image, &["write -P 1 5M 64k"]);
        place.tool(&format!("cp -a earlier {image}")).ok();
        refused(&place, image, words);
    }
}

/// What a server that ends says.
fn said(server: Server) -> String {
    server.signal("TERM");
    server.errors_at_end()
}

#[test]
fn without_its_sidecar_a_disk_is_served_all_the_same() {
    let place = Place::new();
    for image in ["a.raw", "a.qcow2"] {
        let sidecar = place.path(&format!("{image}.history"));
        marked(&place, image);
        fs::remove_file(&sidecar).unwrap();
        served(&place, image, &["read -P 1 1M 64k", "write -P 1 1M 64k"]);
        assert!(place.hw(&format!("changes {image} --since before")).code(1).err.contains("no mark"));

        let damages: [fn(&fs::File); 4] = [
            |file| file.write_all_at(&[0x5a; 8192], 0).unwrap(),
            |file| file.set_len(100).unwrap(),
            |file| file.set_len(5 << 20).unwrap(),
            |file| file.set_len(0).unwrap(),
        ];
        for (n, damage) in damages.iter().enumerate() {
            fs::remove_file(&sidecar).unwrap();
            fs::remove_file(place.path(image)).unwrap();
            marked(&place, image);
            damage(&fs::File::options().write(true).open(&sidecar).unwrap());
            let server = place.start(&format!("serve {image}"));
            let history = server.ready["history"].clone();
            assert_eq!(history["kept"], true, "{n}: {history}");
            assert!(history["reason"].as_str().unwrap().contains("damaged"), "{n}: {history}");
            place.qemu_io("raw", server.uri(), &["read -P 1 1M 64k", "write -P 1 1M 64k"]);
            let said = said(server);
            assert!(said.contains("damaged") && said.contains("a new one has begun"), "{n}: {said}");
            let aside = fs::read_dir(place.dir()).unwrap().map(|entry| entry.unwrap().file_name());
            let aside: Vec<_> = aside.filter(|name| name.to_string_lossy().contains(".damaged-")).collect();
            assert_eq!(aside.len(), 1, "{n}: {aside:?}");
            fs::remove_file(place.path(aside[0].to_str().unwrap())).unwrap();
            assert!(place.hw(&format!("changes {image} --since before")).code(1).err.contains("no mark"));
            place.hw(&format!("mark {image} before")).ok();
            assert_eq!(trusted(&place, image), []);
        }
    }
}

#[test]
fn where_no_history_can_be_kept() {
    let place = Place::new();
    place.hw("create a.raw 16M").ok();
    let server = place.start("--api s.sock serve a.raw --history-file /proc/x");
    assert_eq!(server.ready["history"]["kept"], false, "{}", server.ready);
    assert!(server.ready["history"]["reason"].as_str().unwrap().contains("/proc/x"), "{}", server.ready);
    place.qemu_io("raw", server.uri(), &["write -P 1 1M 64k"]);
    let refused = place.hw("--api s.sock mark a x").code(1);
    assert!(refused.err.contains("no history is kept") && refused.err.contains("/proc/x"), "{refused:?}");
    let shown = place.hw("--api s.sock disk show a").ok().out;
    assert!(shown.contains("no history is kept"), "{shown}");
    let said = said(server);
    assert!(said.contains("no history is kept") && said.contains("/proc/x"), "{said}");
    let refused = place.hw("serve a.raw --history on --history-file /proc/x").code(1);
    assert!(refused.err.contains("no history is kept") && refused.err.contains("/proc/x"), "{refused:?}");
    // Without a wish for one none is made, and what is there ends.
    marked(&place, "b.raw");
    served(&place, "b.raw --history off", &["write -P 1 5M 64k"]);
    self::refused(&place, "b.raw", "another program modified");
    served(&place, "a.raw --history off", &["write -P 1 1M 64k"]);
    assert!(!place.path("a.raw.history").exists());
    place.start("serve a.raw --read-only").end();
    assert!(!place.path("a.raw.history").exists());
}

/// A directory in which nobody but root makes files, and the image in it is anybody's.
#[test]
fn a_directory_that_cannot_be_written_to() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let mode = |path: &str, mode| fs::set_permissions(place.path(path), fs::Permissions::from_mode(mode)).unwrap();
    fs::create_dir(place.path("locked")).unwrap();
    place.hw("create locked/a.raw 16M").ok();
    mode("", 0o777);
    mode("locked/a.raw", 0o666);
    mode("locked", 0o555);
    // Root may do everything, so somebody else does it.
    let somebody = match rustix::process::geteuid().is_root() {
        true => "setpriv --reuid=65534 --regid=65534 --clear-groups ",
        false => "",
    };
    let hw = format!("{somebody}{}", env!("CARGO_BIN_EXE_highwater"));
    if place.tool(&format!("{hw} --version")).code != Some(0) {
        eprintln!("nobody but root can run the binary here");
        return;
    }
    let made = place.tool(&format!("{hw} mark locked/a.raw x")).code(1);
    assert!(made.err.contains("no history is kept") && made.err.contains("ermission denied"), "{made:?}");
    let refused = place.tool(&format!("{hw} serve locked/a.raw --history on --socket s.sock")).code(1);
    assert!(refused.err.contains("no history is kept") && refused.err.contains("ermission denied"), "{refused:?}");
    // Ended by the clock: what it said until then is of interest.
    let served = place.tool(&format!("timeout 5 {hw} --json serve locked/a.raw --socket s.sock"));
    assert!(served.out.contains("\"kept\":false") && served.out.contains("uris"), "{served:?}");
    assert!(served.err.contains("no history is kept"), "{served:?}");
    mode("locked", 0o755);
}

/// A loop device, taken down when dropped.
struct Loop(String);

impl Loop {
    fn of(place: &Place, file: &str) -> Option<Self> {
        let made = place.run("losetup", ["-f", "--show", file]);
        (made.code == Some(0)).then(|| Self(made.out.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn block_devices_have_a_history_in_a_named_file() {
    let place = Place::new();
    place.hw("create a.img 16M").ok();
    let Some(device) = Loop::of(&place, "a.img") else {
        eprintln!("no loop devices here");
        return;
    };
    let device = &device.0;
    let server = place.start(&format!("serve -f raw {device}"));
    assert!(server.ready["history"]["reason"].as_str().unwrap().contains("name a file for it"), "{}", server.ready);
    assert!(server.end().success());
    place.hw(&format!("mark -f raw {device} --history-file h before")).ok();
    let changes = || -> Ended { place.hw(&format!("--json changes -f raw {device} --history-file h --since before")) };
    served(&place, &format!("-f raw {device} --history-file h"), &["write -P 1 1M 64k"]);
    assert_eq!(ranges(&changes().ok().json()), [data(1 << 20, 64 << 10)]);
    place.qemu_io("raw", device, &["write -P 1 5M 64k", "flush"]);
    let refused = changes().code(1);
    assert!(refused.err.contains("written to while it was not served"), "{refused:?}");
}

#[test]
fn a_thousand_marks() {
    let place = Place::new();
    place.hw("create a.raw 16M").ok();
    let server = place.start("--api s.sock serve a.raw");
    for n in 0..1000 {
        let spec = format!(r#"{{"disks":["a"],"name":"mark-{n:04}"}}"#);
        let args = ["-sf", "--unix-socket", "s.sock", "-d", &spec, "-H", "content-type: application/json"];
        place.run("curl", args.into_iter().chain(["http://x/v1/marks"])).ok();
    }
    place.qemu_io("raw", server.uri(), &["write -P 1 1M 64k"]);
    let list = place.hw("--api s.sock --json marks list a").ok().json();
    let marks = list["marks"].as_array().unwrap();
    assert_eq!((marks.len(), &marks[999]["name"]), (1000, &Value::from("mark-0999")));
    for name in ["mark-0000", "mark-0999"] {
        let changes = place.hw(&format!("--api s.sock --json changes a --since {name}")).ok().json();
        assert_eq!(ranges(&changes), [data(1 << 20, 64 << 10)]);
        place.run("nbdinfo", [&format!("--map=qemu:dirty-bitmap:{name}"), server.uri()]).ok();
    }
    assert!(server.end().success());
    let list = place.hw("--json marks list a.raw").ok().json();
    assert_eq!(list["marks"].as_array().unwrap().len(), 1000);
}
