//! Which images depend on which.

use crate::daemon::Daemon;
use crate::support::Place;
use serde_json::{Value, json};

/// base.raw ← mid.qcow2 ← top.qcow2, and other.qcow2 over the base as well.
fn images(place: &Place) {
    place.raw("base.raw", 4 << 20);
    place.tool("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2").ok();
    place.tool("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 8M").ok();
    place.tool("qemu-img create -q -f qcow2 -b base.raw -F raw other.qcow2").ok();
}

/// What stands before the facts, of the lines with images. Facts follow two blanks, and what else is told has a blank or
/// a `!` where an image has its sign.
fn drawn(text: &str) -> Vec<&str> {
    let image = |line: &&str| line.trim_start_matches(['|', '+', '-', ' ']).starts_with(['o', '*', 'x']);
    let named = |line: &&str| line.contains(".raw  ") || line.contains(".qcow2  ");
    text.lines().filter(image).filter(named).map(|line| line.split("  ").next().unwrap()).collect()
}

/// File, parent and health of all images, in the order of the drawing.
fn layers(report: &Value) -> Vec<(&str, Option<&str>, &str)> {
    fn name(file: &Value) -> Option<&str> {
        file.as_str().and_then(|file| file.rsplit('/').next())
    }
    let layers = report["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| (name(&layer["file"]).unwrap(), name(&layer["parent"]), layer["health"].as_str().unwrap()))
        .collect()
}

#[test]
fn chains_of_files_are_drawn() {
    let place = Place::new();
    images(&place);
    place.hw("mark top.qcow2 before").ok();
    let text = place.hw("tree --ascii top.qcow2").ok().out;
    assert_eq!(drawn(&text), ["o base.raw", "o mid.qcow2", "* top.qcow2"], "{text}");
    assert!(text.contains("qcow2, 8 MiB, ") && text.contains("1 mark: \"before\""), "{text}");
    let text = place.hw("tree --ascii top.qcow2 other.qcow2").ok().out;
    assert_eq!(drawn(&text), ["o base.raw", "+-o mid.qcow2", "| * top.qcow2", "* other.qcow2"], "{text}");
    assert!(text.contains("2 images depend on it"), "{text}");

    let report = place.hw("--json tree other.qcow2 top.qcow2").ok().json();
    assert_eq!(
        layers(&report),
        [
            ("base.raw", None, "sound"),
            ("other.qcow2", Some("base.raw"), "sound"),
            ("mid.qcow2", Some("base.raw"), "sound"),
            ("top.qcow2", Some("mid.qcow2"), "sound")
        ]
    );
    let top = &report["layers"][3];
    assert_eq!((&top["virtual-size"], &top["asked"], &top["format"]), (&json!(8 << 20), &json!(true), &json!("qcow2")));
    assert_eq!(top["marks"], json!({"count": 1, "refused": 0, "names": ["before"]}));
    // The sizes are those that others see.
    let seen = place.run("qemu-img", ["info", "--output=json", "mid.qcow2"]).ok().json();
    assert_eq!(report["layers"][2]["actual-size"], seen["actual-size"]);
}

#[test]
fn what_is_missing_or_damaged_is_seen() {
    let place = Place::new();
    images(&place);
    std::fs::rename(place.path("base.raw"), place.path("gone.raw")).unwrap();
    let text = place.hw("tree --ascii top.qcow2").ok().out;
    assert_eq!(drawn(&text), ["x base.raw", "o mid.qcow2", "* top.qcow2"], "{text}");
    assert!(text.contains("! ") && text.contains("No such file"), "{text}");
    let refused = place.hw("tree missing.qcow2").code(1);
    assert!(refused.err.contains("missing.qcow2"), "{refused:?}");

    // Marked as corrupt: bit 1 of the incompatible features.
    place.qemu_io("raw", "mid.qcow2", &["write -P 2 79 1"]);
    let report = place.hw("--json tree top.qcow2").ok().json();
    assert_eq!(
        layers(&report),
        [
            ("base.raw", None, "fault"),
            ("mid.qcow2", Some("base.raw"), "fault"),
            ("top.qcow2", Some("mid.qcow2"), "sound")
        ]
    );
    assert!(report["layers"][1]["findings"][0]["text"].as_str().unwrap().contains("corrupt"), "{report}");

    // A chain that leads back to itself.
    place.hw("create one.qcow2 1M").ok();
    place.tool("qemu-img create -q -f qcow2 -b one.qcow2 -F qcow2 two.qcow2").ok();
    place.tool("qemu-img rebase -u -b two.qcow2 -F qcow2 one.qcow2").ok();
    let report = place.hw("--json tree two.qcow2").ok().json();
    assert_eq!(layers(&report), [("one.qcow2", None, "fault"), ("two.qcow2", Some("one.qcow2"), "sound")]);
    assert!(report["layers"][0]["findings"][0]["text"].as_str().unwrap().contains("no end"), "{report}");

    // A parent whose format is not recorded: the header's extension that says it is of another type now.
    let mut image = std::fs::read(place.path("other.qcow2")).unwrap();
    let at = image.windows(4).position(|word| word == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    image[at..at + 4].copy_from_slice(&[1, 2, 3, 4]);
    std::fs::write(place.path("other.qcow2"), image).unwrap();
    let report = place.hw("--json tree other.qcow2").ok().json();
    assert_eq!(layers(&report), [("base.raw", None, "fault"), ("other.qcow2", Some("base.raw"), "sound")]);
    assert!(report["layers"][0]["findings"][0]["text"].as_str().unwrap().contains("not guessed"), "{report}");
}

#[test]
fn pictures_are_files() {
    let place = Place::new();
    images(&place);
    let said = place.hw("tree top.qcow2 other.qcow2 -o tree.svg").ok();
    assert!(said.out.contains("tree.svg: a picture of 4 images"), "{said:?}");
    let svg = std::fs::read_to_string(place.path("tree.svg")).unwrap();
    assert_eq!(svg.matches("<g><rect").count(), 4);
    place.run("/usr/bin/python3", ["-c", "import xml.dom.minidom; xml.dom.minidom.parse('tree.svg')"]).ok();
    let report = place.hw("--json tree top.qcow2 --picture tree.png").ok().json();
    assert_eq!(report["layers"].as_array().unwrap().len(), 3);
    let png = std::fs::read(place.path("tree.png")).unwrap();
    assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
    let refused = place.hw("tree top.qcow2 -o tree.jpg").code(2);
    assert!(refused.err.contains(".svg or a .png"), "{refused:?}");
    assert!(!place.path("tree.jpg").exists());
}

#[test]
fn disks_of_the_daemon_are_drawn_together() {
    let mut daemon = Daemon::new();
    images(&daemon.place);
    daemon.hw("disk add top.qcow2 --name vm1").ok();
    daemon.hw("disk add other.qcow2 --name vm2").ok();
    daemon.hw("mark vm1 monday").ok();
    daemon.hw("mark vm1 tuesday").ok();
    let text = daemon.hw("tree --ascii").ok().out;
    assert_eq!(drawn(&text), ["o base.raw", "+-o mid.qcow2", "| * top.qcow2", "* other.qcow2"], "{text}");
    assert!(text.contains("disk \"vm1\"") && text.contains("2 marks: \"tuesday\", \"monday\""), "{text}");
    assert!(!text.contains('!'), "{text}");
    let one = daemon.hw("tree --ascii vm2").ok().out;
    // The other disk's image stands on the same base.
    assert_eq!(drawn(&one), ["o base.raw", "+-o mid.qcow2", "* other.qcow2"], "{one}");
    let refused = daemon.hw("tree -U vm2").code(1);
    assert!(refused.err.contains("-U says how a file is opened"), "{refused:?}");
    // A disk that could not be opened does not hide the others.
    daemon.end();
    std::fs::rename(daemon.place.path("mid.qcow2"), daemon.place.path("away.qcow2")).unwrap();
    daemon.start();
    let report = daemon.hw("--json tree").ok().json();
    let found = layers(&report);
    assert!(found.contains(&("top.qcow2", None, "fault")), "{report}");
    assert!(found.contains(&("other.qcow2", Some("base.raw"), "sound")), "{report}");
}
