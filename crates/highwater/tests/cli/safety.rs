//! What stands there already is not lost by mistake.

use crate::support::Place;
use std::fs;

/// The names in the directory.
fn names(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.dir()).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_api_socket_replaces_no_file() {
    let place = Place::new();
    place.raw("victim.raw", 1 << 20);
    place.hw("create s.qcow2 1M").ok();
    let before = fs::read(place.path("victim.raw")).unwrap();
    for line in ["serve s.qcow2 --socket n.sock", "daemon --state state"] {
        let refused = place.hw(&format!("--api victim.raw {line}")).code(1);
        assert!(refused.err.contains("is not a socket"), "{line}: {refused:?}");
        assert!(fs::read(place.path("victim.raw")).unwrap() == before, "{line} changed the file");
    }
    // A link to a file is no socket either.
    std::os::unix::fs::symlink("victim.raw", place.path("link")).unwrap();
    place.hw("--api link daemon --state state").code(1);
    assert!(fs::read(place.path("link")).unwrap() == before);
    // A socket that nobody listens on is taken over.
    drop(std::os::unix::net::UnixListener::bind(place.path("dead.sock")).unwrap());
    let server = place.start("--api dead.sock serve s.qcow2 --socket n.sock");
    place.hw("--api dead.sock disk list").ok();
    assert!(server.end().success());
    assert!(!place.path("dead.sock").exists());
}

#[test]
fn create_judges_before_it_empties() {
    let place = Place::new();
    place.raw("keep.raw", 1 << 20);
    place.tool("qemu-img convert -f raw -O qcow2 keep.raw keep.qcow2").ok();
    place.tool("cp keep.raw data.raw").ok();
    let contents = || ["keep.raw", "keep.qcow2", "data.raw"].map(|name| fs::read(place.path(name)).unwrap());
    let before = contents();
    let there = names(&place);
    for (line, words) in [
        ("create -o preallocation=metadata keep.raw 1M", "no metadata"),
        ("create -o preallocation=some keep.raw 1M", "preallocation"),
        ("create keep.raw 7E", "keep.raw"),
        ("create -f qcow2 -o data_file=keep.qcow2 keep.qcow2 1M", "its own data file"),
        ("create -f qcow2 -o data_file=/nonexist/x keep.qcow2 1M", "/nonexist/x"),
        ("create -f qcow2 -o data_file=data.raw,cluster_size=2M keep.qcow2 63P", "data.raw"),
        ("create -f qcow2 -o data_file=keep.raw -b keep.raw -F raw keep.qcow2", "both parent and data file"),
        ("create -f qcow2 -b keep.qcow2 -F qcow2 keep.qcow2", "its own parent"),
        ("create -f qcow2 -u -b other.qcow2 -F qcow2 keep.qcow2", "needs a SIZE"),
        ("create -f qcow2 -o cluster_size=3k keep.qcow2 1M", "keep.qcow2: create: the cluster size"),
        ("create -f qcow2 -o size=2G keep.qcow2", "give SIZE instead of the option size"),
        // And what was not there is not there afterwards.
        ("create new.raw 7E", "new.raw"),
        ("create -f qcow2 -o data_file=/nonexist/x new.qcow2 1M", "/nonexist/x"),
        ("create -f qcow2 -o data_file=same.qcow2 same.qcow2 1M", "its own data file"),
        ("create .", "is a directory"),
        ("create -f qcow2 . 1M", "is a directory"),
    ] {
        let line = if line == "create ." { "create . 1M" } else { line };
        let refused = place.hw(line).code(1);
        assert!(refused.err.contains(words), "{line}: {refused:?}");
        assert!(contents() == before, "{line} changed a file");
        assert_eq!(names(&place), there, "{line}");
    }
    // What is in order replaces it.
    place.hw("create keep.raw 2M").ok();
    assert!(fs::read(place.path("keep.raw")).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn full_preallocation_writes_zeroes() {
    let place = Place::new();
    let size = (5 << 20) + 512;
    place.hw(&format!("create -o preallocation=full a.raw {size}")).ok();
    let bytes = fs::read(place.path("a.raw")).unwrap();
    assert_eq!(bytes.len(), size);
    assert!(bytes.iter().all(|b| *b == 0));
    assert!(place.hw("info --json a.raw").ok().json()["actual-size"].as_u64().unwrap() >= size as u64);
}

#[test]
fn new_images_have_the_format_of_their_name() {
    let place = Place::new();
    for (line, file, format) in [
        ("create a.qcow2 1M", "a.qcow2", "qcow2"),
        ("create -f raw b.qcow2 1M", "b.qcow2", "raw"),
        ("create c.img 1M", "c.img", "raw"),
        ("create d 1M", "d", "raw"),
        ("convert c.img e.qcow2", "e.qcow2", "qcow2"),
        ("convert -O raw a.qcow2 f.img", "f.img", "raw"),
    ] {
        place.hw(line).ok();
        let found = place.tool(&format!("qemu-img info --output=json {file}")).ok().json();
        assert_eq!(found["format"], format, "{line}");
    }
}

#[test]
fn what_is_missing_is_named_with_who_needs_it() {
    let place = Place::new();
    place.hw("create base.raw 1M").ok();
    place.hw("create -b base.raw -F raw top.qcow2").ok();
    place.tool("rm base.raw").ok();
    let failed = place.hw("map top.qcow2").code(1);
    assert!(failed.err.contains("top.qcow2: a file that it needs") && failed.err.contains("base.raw"), "{failed:?}");
    let refused = place.hw("convert -n -o cluster_size=4k top.qcow2 x.qcow2").code(1);
    assert!(refused.err.contains("-n"), "{refused:?}");
}

#[test]
fn what_is_no_image_is_named() {
    let place = Place::new();
    place.tool("mkfifo ff.raw").ok();
    fs::write(place.path("empty.qcow2"), b"").unwrap();
    place.raw("r.raw", 1 << 20);
    for (line, words) in [
        ("info ff.raw", "is a pipe"),
        ("info -f raw ff.raw", "is a pipe"),
        ("create ff.raw 1M", "is a pipe"),
        ("info -f qcow2 r.raw", "is not a qcow2 image"),
        ("map empty.qcow2", "is not a qcow2 image"),
        ("serve empty.qcow2 --socket n.sock", "is not a qcow2 image"),
    ] {
        let refused = place.hw(line).code(1);
        assert!(refused.err.contains(words), "{line}: {refused:?}");
        assert!(!refused.err.contains("corrupt") && !refused.err.contains('\u{1b}'), "{line}: {refused:?}");
        assert_eq!(refused.err.lines().count(), 1, "{line}: {refused:?}");
    }
}

#[test]
fn who_uses_an_image_is_told_what_helps() {
    let place = Place::new();
    place.hw("create a.qcow2 1M").ok();
    let server = place.start("serve a.qcow2 --socket n.sock");
    let reader = place.hw("info a.qcow2").code(1);
    assert!(reader.err.contains("read beside it with -U"), "{reader:?}");
    let writer = place.hw("resize a.qcow2 2M").code(1);
    assert!(writer.err.trim_end().ends_with("end that use first"), "{writer:?}");
    assert!(server.end().success());
}

#[test]
fn check_tells_its_results_apart() {
    let place = Place::new();
    let secret = ["create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2", "-o"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    place.run("qemu-img", secret.into_iter().chain([options, "e.qcow2", "1M"])).ok();
    // Not 63: this format has something to check.
    let refused = place.hw("check e.qcow2").code(1);
    assert!(refused.err.contains("encrypt"), "{refused:?}");
    place.hw("check --nonsense e.qcow2").code(1);
    place.hw("--api x.sock check --nonsense e.qcow2").code(1);
    place.hw("compare --nonsense e.qcow2").code(2);

    place.hw("create a.qcow2 1M").ok();
    // The corrupt bit, the second of the incompatible features.
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(place.path("a.qcow2")).unwrap();
    file.write_all_at(&[2], 79).unwrap();
    assert_eq!(place.hw("check --json a.qcow2").ok().json()["marked-corrupt"], true);
    assert!(place.hw("check a.qcow2").ok().out.contains("marked as corrupt"));
    assert!(place.hw("check --json -r all a.qcow2").ok().json()["marked-corrupt"].is_null());
    assert!(!place.hw("check a.qcow2").ok().out.contains("marked as corrupt"));

    // A leak, and what is said of its mending.
    let end = place.hw("check --json a.qcow2").ok().json()["image-end-offset"].as_u64().unwrap();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    file.write_all_at(&1u16.to_be_bytes(), be64(be64(48)) + end / 65536 * 2).unwrap();
    file.set_len(end + 65536).unwrap();
    let found = place.hw("check a.qcow2").code(3);
    assert_eq!(found.out.lines().next().unwrap().matches("leak").count(), 1, "{found:?}");
    let mended = place.hw("check --json -r leaks a.qcow2").ok().json();
    assert_eq!(mended["mended"].as_array().unwrap().len(), 1, "{mended}");
}

#[test]
fn options_are_listed_on_request() {
    let place = Place::new();
    assert!(place.hw("create -f qcow2 -o help").ok().out.contains("cluster_size"));
    assert!(place.hw("create -f raw -o help").ok().out.contains("preallocation"));
    let help = place.hw("serve --help").ok().out;
    assert!(help.contains("writeback") && help.contains("qcow2"), "{help}");
    assert!(place.hw("completions bash").ok().out.contains("writeback"));
}

#[test]
fn names_need_not_be_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let name = OsStr::from_bytes(b"n\xff.raw");
    let words = |words: &[&'static str]| words.iter().map(|w| OsStr::new(*w)).collect::<Vec<_>>();
    let run = |before: &[&'static str], after: &[&'static str]| {
        let args = words(before).into_iter().chain([name]).chain(words(after));
        place.run(env!("CARGO_BIN_EXE_highwater"), args)
    };
    run(&["create"], &["1M"]).ok();
    run(&["resize"], &["2M"]).ok();
    assert_eq!(run(&["info", "--json"], &[]).ok().json()["virtual-size"], 2 << 20);
    run(&["map"], &[]).ok();
}
