//! Chains of images: parents that changed under their children are found, in whatever way it was done, and nothing else is
//! called a change.

use crate::support::Place;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Long enough for a file's time to be another.
fn a_moment() {
    std::thread::sleep(Duration::from_millis(25));
}

impl Place {
    /// A base that Highwater made, so that it bears an id, with noise in it; and a child over it that holds some bytes.
    fn chain_of_two(&self) {
        self.raw("noise.raw", 4 << 20);
        self.hw("convert -O qcow2 noise.raw base.qcow2").ok();
        self.hw("create -q -f qcow2 -b base.qcow2 -F qcow2 child.qcow2").ok();
        self.write(&["write -P 9 1M 64k"], "child.qcow2");
        self.judge_images(&["base.qcow2", "child.qcow2"]);
    }

    /// Writes through a server of ours.
    #[track_caller]
    fn write(&self, commands: &[&str], image: &str) {
        let server = self.start(&format!("serve {image} --socket nbd.sock --history off"));
        let mut args = vec!["-f", "raw"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(server.uri());
        let ended = self.run("qemu-io", args).ok();
        assert!(!ended.out.contains("failed"), "{ended:?}");
        assert!(server.end().success());
    }

    #[track_caller]
    fn judge_images(&self, images: &[&str]) {
        for image in images {
            self.tool(&format!("qemu-img check -q {image}")).ok();
        }
    }

    /// The one fault of a chain: what kind, of which parent, and in which words. Everything that reads or writes is refused,
    /// and what only looks is not.
    #[track_caller]
    fn fault(&self, disk: &str) -> Fault {
        let report = self.hw(&format!("chain verify {disk} --json")).code(2).json();
        assert_eq!(report["sound"], false);
        let faulty: Vec<&Value> =
            report["layers"].as_array().expect("layers").iter().filter(|l| l["link"]["state"] == "fault").collect();
        let [layer] = faulty[..] else { panic!("one fault: {report}") };
        let link = &layer["link"];
        let fault = Fault {
            kind: link["fault"].as_str().expect("a kind").to_owned(),
            parent: link["parent"].as_str().expect("a parent").to_owned(),
            text: link["text"].as_str().expect("words").to_owned(),
            exposed: link["exposed"].as_u64().expect("bytes"),
        };
        assert!(fault.text.contains(layer["file"].as_str().expect("a child")) && fault.text.contains(&fault.parent));
        // A server names files from the root.
        let said = fault.text.split("made over: ").nth(1).expect("what is wrong");
        for refused in [
            format!("convert -O raw {disk} refused.raw"),
            format!("compare {disk} {disk}"),
            format!("serve {disk} --socket refused.sock"),
            format!("serve -r {disk} --socket refused.sock"),
            format!("resize {disk} 8M"),
            format!("create -f qcow2 -b {disk} -F qcow2 grandchild.qcow2"),
        ] {
            let ended = self.hw(&refused);
            assert!(ended.code == Some(1) || ended.code == Some(2), "{refused}: {ended:?}");
            assert!(ended.err.contains(said), "{refused}: {ended:?}");
            assert!(ended.err.contains("chain accept"), "the next step: {ended:?}");
        }
        assert!(!self.path("refused.raw").exists() && !self.path("grandchild.qcow2").exists());
        self.hw(&format!("info {disk}")).ok();
        let map = self.hw(&format!("map {disk}")).ok();
        assert!(map.err.contains(&fault.text), "{map:?}");
        self.hw(&format!("check {disk}")).ok();
        let mine = self.hw(&format!("info --json {disk}")).ok().json();
        if layer["file"] == disk {
            assert_eq!(mine["link"]["fault"], fault.kind);
            let said = self.hw(&format!("check {disk}")).ok().out;
            assert!(said.contains("its metadata aside"), "{said}");
        }
        fault
    }

    #[track_caller]
    fn sound(&self, disk: &str) {
        let report = self.hw(&format!("chain verify {disk} --json")).ok().json();
        assert_eq!(report["sound"], true, "{report}");
        for layer in report["layers"].as_array().expect("layers") {
            assert!(layer["link"]["state"] == "sound" || layer.get("link").is_none(), "{report}");
        }
    }

    fn id(&self, image: &str) -> String {
        let info = self.hw(&format!("info --json {image}")).ok().json();
        info["content"].as_str().unwrap_or_default().to_owned()
    }
}

struct Fault {
    kind: String,
    parent: String,
    text: String,
    exposed: u64,
}

impl Fault {
    #[track_caller]
    fn is(&self, kind: &str, parent: &str, words: &str) {
        assert_eq!((&self.kind[..], &self.parent[..]), (kind, parent), "{}", self.text);
        assert!(self.text.contains(words), "{words:?} in {:?}", self.text);
    }
}

/// One way to do something to a base.
type Deed = fn(&Place);

/// What is done to the base, what it is called, and in which words.
const DEEDS: [(&str, Deed, &str, &str); 12] = [
    (
        "qemu-io writes to it",
        |p| drop(p.qemu_io("qcow2", "base.qcow2", &["write -P 3 0 64k"])),
        "opened-for-writing",
        "another program",
    ),
    (
        "QEMU opens it for writing and writes nothing",
        |p| drop(p.qemu_io("qcow2", "base.qcow2", &["read 0 64k"])),
        "opened-for-writing",
        "may have changed it",
    ),
    (
        "another image takes its place",
        |p| {
            p.raw("other.raw", 4 << 20);
            p.hw("convert -O qcow2 other.raw other.qcow2").ok();
            fs::rename(p.path("other.qcow2"), p.path("base.qcow2")).expect("rename");
        },
        "other-image",
        "another image",
    ),
    (
        "an image of QEMU's takes its place",
        |p| {
            p.tool("qemu-img convert -O qcow2 noise.raw new.qcow2").ok();
            fs::rename(p.path("new.qcow2"), p.path("base.qcow2")).expect("rename");
        },
        "identity-gone",
        "bears none",
    ),
    (
        "it is cut",
        |p| {
            let size = fs::metadata(p.path("base.qcow2")).expect("there").len();
            let file = fs::File::options().write(true).open(p.path("base.qcow2")).expect("open");
            file.set_len(size - 512).expect("cut");
        },
        "truncated",
        "was cut from",
    ),
    (
        "it grows",
        |p| {
            let size = fs::metadata(p.path("base.qcow2")).expect("there").len();
            let file = fs::File::options().write(true).open(p.path("base.qcow2")).expect("open");
            file.set_len(size + 65536).expect("grow");
        },
        "grown",
        "has grown from",
    ),
    (
        "an earlier copy is put back with its times",
        |p| drop(p.tool("cp -p earlier.qcow2 base.qcow2").ok()),
        "older",
        "an earlier copy was put back",
    ),
    (
        "Highwater writes to it after the child was forgotten",
        |p| {
            p.hw("chain forget base.qcow2 child.qcow2").ok();
            p.write(&["write -P 3 0 64k"], "base.qcow2");
        },
        "written-by-highwater",
        "Highwater wrote to it",
    ),
    (
        "a sibling is committed into it by QEMU",
        |p| {
            p.tool("qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 sibling.qcow2").ok();
            p.qemu_io("qcow2", "sibling.qcow2", &["write -P 4 0 64k"]);
            p.tool("qemu-img commit -q sibling.qcow2").ok();
        },
        "modified", // QEMU opened it read-only first, and leaves the bit alone then.
        "an unknown program modified it",
    ),
    (
        "its extension is overwritten",
        |p| {
            let bytes = fs::read(p.path("base.qcow2")).expect("bytes");
            let at = bytes.windows(4).position(|w| w == b"HWLI").expect("there") as u64;
            let file = fs::File::options().write(true).open(p.path("base.qcow2")).expect("open");
            file.write_all_at(b"XXXX", at).expect("stripped");
        },
        "identity-gone",
        "bears none",
    ),
    (
        "bytes of it are changed and nothing else, not even its time",
        |p| {
            let file = fs::File::options().write(true).open(p.path("base.qcow2")).expect("open");
            let facts = file.metadata().expect("facts");
            let bytes = fs::read(p.path("base.qcow2")).expect("bytes");
            let id = p.id("base.qcow2");
            let raw: Vec<u8> = (0..16).map(|n| u8::from_str_radix(&id[2 * n..2 * n + 2], 16).expect("hex")).collect();
            let at = bytes.windows(16).position(|w| w == raw).expect("there") as u64;
            // As a program would that copies a header from another state of the image.
            file.write_all_at(&[0x55; 8], at + 8).expect("changed");
            file.set_modified(facts.modified().expect("a time")).expect("its time again");
        },
        "written-by-highwater",
        "Highwater wrote to it",
    ),
    (
        "it is copied without its times",
        |p| {
            fs::copy(p.path("base.qcow2"), p.path("copy.qcow2")).expect("copy");
            fs::rename(p.path("copy.qcow2"), p.path("base.qcow2")).expect("rename");
        },
        "modified",
        "copied without its times",
    ),
];

#[test]
fn what_is_done_to_a_base_is_found_and_named() {
    for (what, deed, kind, words) in DEEDS {
        let p = Place::new();
        p.raw("noise.raw", 4 << 20);
        p.hw("convert -O qcow2 noise.raw base.qcow2").ok();
        p.tool("cp -p base.qcow2 earlier.qcow2").ok();
        a_moment();
        p.write(&["write -P 8 3M 64k"], "base.qcow2");
        p.hw("create -q -f qcow2 -b base.qcow2 -F qcow2 child.qcow2").ok();
        p.write(&["write -P 9 1M 64k"], "child.qcow2");
        p.judge_images(&["base.qcow2", "child.qcow2"]);
        p.sound("child.qcow2");
        a_moment();
        deed(&p);
        let fault = p.fault("child.qcow2");
        assert_eq!((&fault.kind[..], &fault.parent[..]), (kind, "base.qcow2"), "{what}: {}", fault.text);
        assert!(fault.text.contains(words), "{what}: {}", fault.text);
        assert_eq!(fault.exposed, (4 << 20) - (64 << 10), "{what}: what the child does not hold shows through");
        if kind != "grown" && kind != "truncated" {
            p.hw("chain accept child.qcow2").ok();
            p.sound("child.qcow2");
            p.judge_images(&["child.qcow2"]);
        }
    }
}

#[test]
fn a_changed_raw_base_is_found() {
    let deeds: [(Deed, &str, &str); 5] = [
        (
            |p| drop(p.tool("dd if=/dev/zero of=base.raw bs=64k count=1 conv=notrunc status=none").ok()),
            "modified",
            "an unknown program modified it",
        ),
        (|p| drop(p.tool("truncate -s 2M base.raw").ok()), "truncated", "was cut from 4194304 to 2097152"),
        (|p| drop(p.tool("truncate -s 6M base.raw").ok()), "grown", "has grown from 4194304 to 6291456"),
        (
            |p| {
                p.tool("cp base.raw copy.raw").ok();
                p.tool("touch -d 2001-01-01 copy.raw").ok();
                fs::rename(p.path("copy.raw"), p.path("base.raw")).expect("rename");
            },
            "older",
            "an earlier copy was put back, or another file",
        ),
        (|p| drop(p.qemu_io("raw", "base.raw", &["write -P 1 0 512"])), "modified", "an unknown program modified it"),
    ];
    for (deed, kind, words) in deeds {
        let p = Place::new();
        p.raw("base.raw", 4 << 20);
        a_moment();
        p.hw("create -q -f qcow2 -b base.raw -F raw child.qcow2").ok();
        p.sound("child.qcow2");
        a_moment();
        deed(&p);
        p.fault("child.qcow2").is(kind, "base.raw", words);
        p.hw("chain accept child.qcow2").ok();
        p.sound("child.qcow2");
        // Whole seconds are what some ways of copying keep.
        let time = fs::metadata(p.path("base.raw")).and_then(|facts| facts.modified()).expect("a time");
        let seconds = time.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        p.tool(&format!("touch -d @{seconds} base.raw")).ok();
        p.sound("child.qcow2");
    }
}

#[test]
fn a_child_put_over_another_base_is_found() {
    let p = Place::new();
    p.chain_of_two();
    p.raw("other.raw", 4 << 20);
    p.write_raw_noise("other.raw");
    p.hw("convert -O qcow2 other.raw other.qcow2").ok();
    p.tool("qemu-img rebase -u -b other.qcow2 -F qcow2 child.qcow2").ok();
    p.fault("child.qcow2").is("other-image", "other.qcow2", "another image");
    p.tool("qemu-img rebase -u -b other.raw -F raw child.qcow2").ok();
    p.fault("child.qcow2").is("identity-gone", "other.raw", "bears none");
    p.tool("qemu-img rebase -u -b base.qcow2 -F qcow2 child.qcow2").ok();
    p.sound("child.qcow2");
    // And both changed.
    a_moment();
    p.qemu_io("qcow2", "base.qcow2", &["write -P 3 0 64k"]);
    p.qemu_io("qcow2", "child.qcow2", &["write -P 3 2M 64k"]);
    let fault = p.fault("child.qcow2");
    fault.is("opened-for-writing", "base.qcow2", "another program");
    assert_eq!(fault.exposed, (4 << 20) - (128 << 10), "as the child is now");
}

impl Place {
    fn write_raw_noise(&self, name: &str) {
        let file = fs::File::options().write(true).open(self.path(name)).expect("open");
        file.write_all_at(&[0xee; 4096], 1 << 20).expect("write");
    }
}

#[test]
fn the_middle_of_a_chain_is_verified_too() {
    let p = Place::new();
    p.chain_of_two();
    p.hw("create -q -f qcow2 -b child.qcow2 -F qcow2 top.qcow2").ok();
    p.write(&["write -P 7 2M 64k"], "top.qcow2");
    p.sound("top.qcow2");
    a_moment();
    p.qemu_io("qcow2", "child.qcow2", &["write -P 5 0 64k"]);
    let fault = p.fault("top.qcow2");
    fault.is("opened-for-writing", "child.qcow2", "top.qcow2: its parent child.qcow2");
    assert_eq!(fault.exposed, (4 << 20) - (64 << 10));
    p.sound("child.qcow2");
    p.hw("chain accept top.qcow2").ok();
    p.sound("top.qcow2");
    // The lowest: the fault is that of the middle, and so is the acceptance; the top follows.
    a_moment();
    p.qemu_io("qcow2", "base.qcow2", &["write -P 5 3M 64k"]);
    let fault = p.fault("top.qcow2");
    fault.is("opened-for-writing", "base.qcow2", "child.qcow2: its parent base.qcow2");
    assert_eq!(fault.exposed, (4 << 20) - 3 * (64 << 10), "neither the top nor the middle holds it");
    p.hw("chain accept child.qcow2").ok();
    p.sound("top.qcow2");
    p.judge_images(&["base.qcow2", "child.qcow2", "top.qcow2"]);
    let shown = p.qemu_io("qcow2", "top.qcow2", &["read -P 5 3M 64k", "read -P 7 2M 64k", "read -P 9 1M 64k"]);
    assert!(!shown.out.contains("verification failed"), "{shown:?}");
}

#[test]
fn what_changes_nothing_raises_no_alarm() {
    let p = Place::new();
    p.chain_of_two();
    let id = p.id("child.qcow2");
    for reads in [
        "qemu-img check child.qcow2",
        "qemu-img check base.qcow2",
        "qemu-img info --backing-chain child.qcow2",
        "qemu-img map child.qcow2",
        "qemu-img convert -O raw child.qcow2 copy.raw",
        "qemu-img measure -O qcow2 child.qcow2",
        "qemu-io -r -f qcow2 base.qcow2 -c read",
        "qemu-img compare child.qcow2 copy.raw",
    ] {
        p.tool(reads);
        p.sound("child.qcow2");
    }
    p.run("qemu-io", ["-r", "-f", "qcow2", "-c", "read 0 1M", "base.qcow2"]).ok();
    p.sound("child.qcow2");
    assert_eq!(p.id("child.qcow2"), id, "reading leaves the id");
    // QEMU runs on the top layer.
    for command in ["write -P 4 3M 64k", "discard 1M 64k", "write -z 2M 128k"] {
        p.qemu_io("qcow2", "child.qcow2", &[command]);
        p.sound("child.qcow2");
    }
    for acts in
        ["qemu-img snapshot -c s child.qcow2", "qemu-img bitmap --add child.qcow2 b", "qemu-img resize child.qcow2 6M"]
    {
        p.tool(acts).ok();
        p.sound("child.qcow2");
    }
    assert_eq!(p.id("child.qcow2"), "", "its own id has no meaning any more");
    p.tool("qemu-img snapshot -d s child.qcow2").ok();
    p.write(&["write -P 6 5M 64k"], "child.qcow2");
    let again = p.id("child.qcow2");
    assert!(again != id && again[..16] == id[..16], "another content of the same image: {id}, {again}");
    p.sound("child.qcow2");
    // The whole chain elsewhere.
    p.tool("mkdir moved copied").ok();
    p.tool("mv base.qcow2 base.qcow2.identity child.qcow2 moved").ok();
    p.sound("moved/child.qcow2");
    p.tool("cp -a moved/base.qcow2 moved/child.qcow2 copied").ok();
    p.sound("copied/child.qcow2");
    p.write(&["write -P 1 0 64k"], "copied/child.qcow2");
    p.sound("copied/child.qcow2");
    p.sound("moved/child.qcow2");
    p.judge_images(&["moved/child.qcow2", "copied/child.qcow2", "moved/base.qcow2"]);
    let children = p.hw("chain show copied/child.qcow2 --json").ok().json();
    assert_eq!(children["layers"][1]["children"][0]["state"], "there", "noted by its new name: {children}");
}

#[test]
fn a_child_that_is_not_bound_is_let_pass_and_bound_with_its_first_write() {
    let p = Place::new();
    p.raw("base.raw", 4 << 20);
    p.tool("qemu-img create -q -f qcow2 -b base.raw -F raw child.qcow2").ok();
    let state = |p: &Place| p.hw("chain verify child.qcow2 --json").ok().json()["layers"][0]["link"]["state"].clone();
    assert_eq!(state(&p), "unbound");
    let before = fs::read(p.path("child.qcow2")).expect("bytes");
    p.write(&["read 0 64k"], "child.qcow2");
    assert!(before == fs::read(p.path("child.qcow2")).expect("bytes"), "opening alone writes nothing");
    assert_eq!(state(&p), "unbound");
    p.write(&["write -P 1 0 64k"], "child.qcow2");
    assert_eq!(state(&p), "sound");
    p.judge_images(&["child.qcow2"]);
    p.qemu_io("qcow2", "child.qcow2", &["read -P 1 0 64k"]);
    // Its parent knows it from the opening on.
    let ended = p.hw("serve base.raw --socket x.sock").code(1);
    assert!(ended.err.contains("is the parent of") && ended.err.contains("child.qcow2"), "{ended:?}");
    // Version 2 has no place for a link; it is known to its parent all the same.
    p.raw("base2.raw", 4 << 20);
    p.tool("qemu-img create -q -f qcow2 -o compat=0.10 -b base2.raw -F raw old.qcow2").ok();
    p.write(&["write -P 1 0 64k"], "old.qcow2");
    let report = p.hw("chain verify old.qcow2 --json").ok().json();
    assert_eq!(report["layers"][0]["link"]["state"], "unbound");
    let refused = p.hw("chain accept old.qcow2").code(1);
    assert!(refused.err.contains("version 2"), "{refused:?}");
    p.hw("resize base2.raw 8M").code(1);
}

#[test]
fn an_image_with_children_is_not_written_to() {
    let p = Place::new();
    p.chain_of_two();
    p.tool("qemu-img create -q -f raw target.raw 4M").ok();
    let bytes = fs::read(p.path("base.qcow2")).expect("bytes");
    for refused in [
        "serve base.qcow2 --socket x.sock",
        "resize base.qcow2 8M",
        "check --repair all base.qcow2",
        "convert -n -O qcow2 noise.raw base.qcow2",
        "convert -O qcow2 noise.raw base.qcow2",
        "create -f qcow2 base.qcow2 1M",
        "mark base.qcow2 monday",
    ] {
        let ended = p.hw(refused).code(1);
        for part in ["base.qcow2: is the parent of", "child.qcow2", "chain forget", "chain rebase"] {
            assert!(ended.err.contains(part), "{refused}: {part:?} in {ended:?}");
        }
    }
    assert!(bytes == fs::read(p.path("base.qcow2")).expect("bytes"), "nothing has changed");
    // Reading is as ever.
    let server = p.start("serve -r base.qcow2 --socket x.sock");
    assert!(server.end().success());
    p.hw("check base.qcow2").ok();
    p.hw("convert -O raw base.qcow2 out.raw").ok();
    // A child that is gone, or names another parent, is none.
    p.tool("mv child.qcow2 away.qcow2").ok();
    p.hw("resize base.qcow2 5M").ok();
    p.tool("mv away.qcow2 child.qcow2").ok();
    p.hw("resize base.qcow2 6M").code(1);
    p.raw("flat.raw", 4 << 20);
    p.tool("qemu-img rebase -u -b flat.raw -F raw child.qcow2").ok();
    p.hw("resize base.qcow2 6M").ok();
    p.tool("qemu-img rebase -u -b base.qcow2 -F qcow2 child.qcow2").ok();
    p.hw("resize base.qcow2 7M").code(1);
    p.hw("chain forget base.qcow2 child.qcow2").ok();
    let ended = p.hw("chain forget base.qcow2 child.qcow2").code(1);
    assert!(ended.err.contains("no child"), "{ended:?}");
    p.hw("resize base.qcow2 7M").ok();
    p.fault("child.qcow2").is("written-by-highwater", "base.qcow2", "Highwater wrote to it");
}

#[test]
fn a_damaged_identity_file_is_told_of_and_blocks_nothing() {
    let p = Place::new();
    p.chain_of_two();
    let known = r#"{"version":1,"snapshot":{"name":"monday","time":5,"consistency":"frozen"},"moved-to":"/x"}"#;
    fs::write(p.path("base.qcow2.identity"), known).expect("file");
    let shown = p.hw("chain show child.qcow2").ok();
    assert!(shown.out.contains("monday") && shown.out.contains("the disk was moved to /x"), "{shown:?}");
    p.write(&["write -P 2 0 64k"], "child.qcow2");
    let report = p.hw("chain show child.qcow2 --json").ok().json();
    assert_eq!(report["layers"][1]["snapshot"]["consistency"], "frozen", "kept when a child is noted: {report}");
    assert_eq!(report["layers"][1]["children"][0]["state"], "there");
    fs::write(p.path("base.qcow2.identity"), "{ not json").expect("damage");
    let shown = p.hw("chain show child.qcow2").ok();
    assert!(shown.out.contains("base.qcow2.identity cannot be used"), "{shown:?}");
    p.sound("child.qcow2");
    p.hw("info child.qcow2").ok();
    p.write(&["write -P 2 0 64k"], "child.qcow2");
    // Put aside, and begun anew with the child that was opened.
    p.hw("resize base.qcow2 8M").code(1);
    let aside = fs::read_dir(p.dir())
        .expect("list")
        .any(|entry| entry.expect("entry").file_name().to_string_lossy().starts_with("base.qcow2.identity.damaged-"));
    assert!(aside);
}

#[test]
fn a_hash_proves_a_link_sound_or_does_not() {
    let p = Place::new();
    p.chain_of_two();
    let refused = |p: &Place, words: &str| {
        let ended = p.hw("chain repair child.qcow2").code(1);
        assert!(ended.err.contains(words) && ended.err.contains("chain accept"), "{words:?} in {ended:?}");
        assert_eq!(p.hw("chain verify child.qcow2").code, Some(2), "nothing has changed");
    };
    a_moment();
    p.tool("touch base.qcow2").ok();
    refused(&p, "no hash was recorded");
    p.hw("chain accept child.qcow2").ok();
    let hash = |p: &Place, code: i32| {
        let report = p.hw("chain verify child.qcow2 --hash --json").code(code).json();
        report["layers"][0]["link"]["hash"].as_str().expect("a hash's verdict").to_owned()
    };
    assert_eq!(hash(&p, 0), "recorded");
    assert_eq!(hash(&p, 0), "same");
    let record: Value = serde_json::from_slice(&fs::read(p.path("base.qcow2.identity")).expect("file")).expect("JSON");
    let blake3 = record["content-hash"]["blake3"].as_str().expect("a hash").to_owned();
    assert_eq!(blake3.len(), 64);
    // Touched, and opened by a program that does not know of ids: the content is what it was.
    a_moment();
    p.qemu_io("qcow2", "base.qcow2", &["read 0 64k"]);
    assert_eq!(p.fault("child.qcow2").kind, "opened-for-writing");
    assert_eq!(hash(&p, 2), "same");
    p.hw("chain repair child.qcow2").ok();
    p.sound("child.qcow2");
    p.judge_images(&["base.qcow2", "child.qcow2"]);
    // The same content in an image that was made anew.
    assert_eq!(hash(&p, 0), "recorded", "of the image as it is now");
    p.tool("qemu-img convert -O qcow2 base.qcow2 anew.qcow2").ok();
    fs::rename(p.path("anew.qcow2"), p.path("base.qcow2")).expect("rename");
    p.hw("chain repair child.qcow2").ok();
    p.sound("child.qcow2");
    assert_eq!(hash(&p, 0), "recorded");
    // Really changed.
    a_moment();
    p.qemu_io("qcow2", "base.qcow2", &["write -P 1 3M 4k"]);
    assert_eq!(hash(&p, 2), "different");
    refused(&p, "holds something else");
    p.hw("chain accept child.qcow2").ok();
    assert_eq!(hash(&p, 0), "recorded");
    // Changed so that neither id nor size nor time tells: the hash does.
    let file = fs::File::options().read(true).write(true).open(p.path("base.qcow2")).expect("open");
    let time = file.metadata().and_then(|facts| facts.modified()).expect("a time");
    let bytes = fs::read(p.path("base.qcow2")).expect("bytes");
    let at = bytes.windows(20).position(|w| w == b"highwater highwater ").expect("data") as u64;
    file.write_all_at(b"H", at).expect("write");
    file.set_modified(time).expect("its time again");
    p.sound("child.qcow2");
    let report = p.hw("chain verify child.qcow2 --hash --json").code(2).json();
    assert_eq!((&report["layers"][0]["link"]["fault"], &report["sound"]), (&"other-content".into(), &false.into()));
}

#[test]
fn a_rebased_child_shows_what_it_showed() {
    let p = Place::new();
    p.chain_of_two();
    p.hw("convert -O raw child.qcow2 shown.raw").ok();
    // Shorter, longer, of another format, none, and back.
    p.tool("qemu-img create -q -f raw short.raw 2M").ok();
    p.raw("long.raw", 6 << 20);
    p.write_raw_noise("long.raw");
    p.hw("create -q -f qcow2 -b base.qcow2 -F qcow2 beside.qcow2").ok();
    p.write(&["write -P 3 2M 1M"], "beside.qcow2");
    let mut last = "base.qcow2";
    for (parent, format) in
        [("short.raw", "raw"), ("long.raw", "raw"), ("beside.qcow2", "qcow2"), ("base.qcow2", "qcow2")]
    {
        p.hw(&format!("chain rebase child.qcow2 -b {parent} -F {format}")).ok();
        p.judge_images(&["child.qcow2"]);
        p.tool("qemu-img compare -q child.qcow2 shown.raw").ok();
        p.sound("child.qcow2");
        let report = p.hw("chain show child.qcow2 --json").ok().json();
        assert_eq!(report["layers"][0]["link"]["parent"], parent);
        assert_eq!(
            report["layers"][1]["children"].as_array().map_or(0, Vec::len),
            if parent == "base.qcow2" { 2 } else { 1 }
        );
        let left = p.hw(&format!("chain show {last} --json")).ok().json();
        let still = left["layers"][0]["children"]
            .as_array()
            .is_some_and(|all| all.iter().any(|child| child["file"].as_str().expect("file").ends_with("/child.qcow2")));
        assert!(!still, "{last} has forgotten it: {left}");
        last = parent;
    }
    // The name alone: what shows is another matter, and the link is to the new parent.
    p.hw("chain rebase -u child.qcow2 -b long.raw -F raw").ok();
    p.sound("child.qcow2");
    p.hw("chain rebase -u child.qcow2 -b base.qcow2 -F qcow2").ok();
    p.tool("qemu-img compare -q child.qcow2 shown.raw").ok();
    let empty = p.run(env!("CARGO_BIN_EXE_highwater"), ["chain", "rebase", "child.qcow2", "-b", ""]);
    empty.ok();
    p.judge_images(&["child.qcow2"]);
    p.tool("rm base.qcow2 beside.qcow2").ok();
    p.tool("qemu-img compare -q child.qcow2 shown.raw").ok();
    // What makes no sense.
    p.hw("create -q -f qcow2 -b child.qcow2 -F qcow2 above.qcow2").ok();
    let ended = p.hw("chain rebase child.qcow2 -b above.qcow2 -F qcow2").code(1);
    assert!(ended.err.contains("is the parent of"), "{ended:?}");
    let ended = p.hw("chain rebase above.qcow2 -b above.qcow2 -F qcow2").code(1);
    assert!(ended.err.contains("below itself") || ended.err.contains("in use"), "{ended:?}");
    p.hw("chain rebase above.qcow2 -b missing.raw -F raw").code(1);
    p.hw("chain rebase above.qcow2 -b long.raw").code(2);
    let ended = p.hw("chain rebase long.raw -b short.raw -F raw").code(1);
    assert!(ended.err.contains("a raw image has no parent"), "{ended:?}");
    p.sound("above.qcow2");
}

#[test]
fn a_rebase_that_is_killed_leaves_what_the_disk_showed() {
    let p = Place::new();
    p.raw("one.raw", 24 << 20);
    p.raw("two.raw", 24 << 20);
    let file = fs::File::options().write(true).open(p.path("two.raw")).expect("open");
    for at in 0..20 {
        file.write_all_at(&[at + 1; 100_000], u64::from(at) << 20).expect("other bytes");
    }
    p.hw("create -q -f qcow2 -b one.raw -F raw fresh.qcow2").ok();
    p.hw("convert -O raw fresh.qcow2 shown.raw").ok();
    let (mut old, mut new) = (0, 0);
    for round in 0..16 {
        p.tool("cp -p fresh.qcow2 child.qcow2").ok();
        let mut rebase = p.spawn("chain rebase child.qcow2 -b two.raw -F raw -q");
        std::thread::sleep(Duration::from_millis(10 + 12 * round));
        let _ = rebase.kill();
        rebase.wait().expect("ended");
        // The kernel gives a killed process's locks back a moment after it is gone.
        crate::support::until("the leaks are mended", || {
            p.tool("qemu-img check -q -r leaks child.qcow2").code == Some(0)
        });
        p.judge_images(&["child.qcow2"]);
        p.tool("qemu-img compare -q child.qcow2 shown.raw").ok();
        let report = p.hw("chain verify child.qcow2 --json").ok().json();
        match report["layers"][0]["link"]["parent"].as_str() {
            Some("one.raw") => old += 1,
            Some("two.raw") => new += 1,
            other => panic!("{other:?}: {report}"),
        }
        // It can be done again, and is done then.
        p.hw("chain rebase child.qcow2 -b two.raw -F raw -q").ok();
        p.sound("child.qcow2");
        p.tool("qemu-img compare -q child.qcow2 shown.raw").ok();
    }
    assert!(old > 0, "some were killed before the end: {old} before, {new} after");
}

#[test]
fn marks_stay_usable_when_a_child_is_bound_or_rebased() {
    let p = Place::new();
    p.raw("noise.raw", 4 << 20);
    p.hw("convert -O qcow2 noise.raw base.qcow2").ok();
    p.hw("create -q -f qcow2 -b base.qcow2 -F qcow2 child.qcow2").ok();
    p.hw("mark child.qcow2 monday").ok();
    let changes =
        |p: &Place| p.hw("changes child.qcow2 --since monday --json").ok().json()["summary"]["changed"].clone();
    assert_eq!(changes(&p), 0);
    p.tool("cp noise.raw flat.raw").ok();
    a_moment();
    p.hw("chain rebase child.qcow2 -b flat.raw -F raw").ok();
    assert_eq!(changes(&p), 0, "what the disk shows is what it was, and it is known");
    a_moment();
    p.tool("touch flat.raw").ok();
    let ended = p.hw("changes child.qcow2 --since monday").code(1);
    assert!(ended.err.contains("a parent or data file"), "{ended:?}");
}

#[test]
fn a_served_disk_is_shown_and_verified_through_the_daemon() {
    let p = Place::new();
    p.chain_of_two();
    let server = p.start("serve child.qcow2 --socket nbd.sock --api api.sock --history off");
    let report = p.hw("--api api.sock chain show child --json").ok().json();
    assert_eq!((report["disk"].as_str(), &report["sound"]), (Some("child"), &true.into()));
    assert_eq!(report["layers"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["layers"][1]["children"][0]["state"], "there");
    p.hw("--api api.sock chain verify child").ok();
    let ended = p.hw("--api api.sock chain verify child --hash").code(1);
    assert!(ended.err.contains("hashes are taken of images at rest"), "{ended:?}");
    let ended = p.hw("--api api.sock chain accept child").code(1);
    assert!(ended.err.contains("disk remove child"), "{ended:?}");
    p.hw("--api api.sock chain verify child -U").code(1);
    // Changed under the server's hands.
    a_moment();
    p.tool("touch base.qcow2").ok();
    let report = p.hw("--api api.sock chain verify child --json").code(2).json();
    assert_eq!(report["layers"][0]["link"]["fault"], "modified");
    assert!(server.end().success());
    // A disk of a faulty chain is not opened; when that is accepted, it is.
    let daemon = p.start("daemon --api daemon.sock --state state");
    let ended = p.hw("--api daemon.sock disk add child.qcow2").code(1);
    assert!(ended.err.contains("is not what it was made over") && ended.err.contains("chain accept"), "{ended:?}");
    p.hw("chain accept ./child.qcow2").ok();
    p.hw("--api daemon.sock disk add child.qcow2").ok();
    let ended = p.hw("--api daemon.sock disk add base.qcow2").code(1);
    assert!(ended.err.contains("is the parent of") || ended.err.contains("in use"), "{ended:?}");
    p.hw("--api daemon.sock chain verify child").ok();
    assert!(daemon.end().success());
    p.judge_images(&["base.qcow2", "child.qcow2"]);
}

#[test]
fn a_faulty_chain_is_read_when_that_is_said() {
    let p = Place::new();
    p.chain_of_two();
    p.hw("convert -O raw child.qcow2 shown.raw").ok();
    a_moment();
    p.qemu_io("qcow2", "base.qcow2", &["write -P 3 0 64k"]);
    let told = p.hw("convert --despite-fault -O raw child.qcow2 out.raw").ok();
    assert!(told.err.contains("another program"), "{told:?}");
    p.tool("qemu-img compare -q child.qcow2 out.raw").ok();
    p.hw("compare --despite-fault child.qcow2 out.raw").ok();
    p.hw("compare --despite-fault child.qcow2 shown.raw").code(1);
    let ended = p.hw("serve --despite-fault child.qcow2 --socket x.sock").code(1);
    assert!(ended.err.contains("make it read-only"), "{ended:?}");
    let server = p.start("serve -r --despite-fault child.qcow2 --socket x.sock");
    let read = p.run("qemu-io", ["-r", "-f", "raw", "-c", "read -P 3 0 64k", server.uri()]).ok();
    assert!(!read.out.contains("failed"), "{read:?}");
    assert!(server.end().success());
    assert_eq!(p.fault("child.qcow2").kind, "opened-for-writing", "it is as faulty as before");
}

#[test]
fn beside_a_writer_times_are_not_compared() {
    let p = Place::new();
    p.chain_of_two();
    a_moment();
    p.tool("touch base.qcow2").ok();
    p.hw("convert -O raw child.qcow2 out.raw").code(1);
    p.hw("convert -U -O raw child.qcow2 out.raw").ok();
    p.qemu_io("qcow2", "base.qcow2", &["write -P 3 0 64k"]);
    let ended = p.hw("convert -U -O raw child.qcow2 out.raw").code(1);
    assert!(ended.err.contains("another program"), "ids are: {ended:?}");
}
