//! Drawings as they are.

use super::text::{Style, ascii_wanted, draw};
use super::*;

const UNICODE: Style = Style { ascii: false, colour: false };
const GIB: u64 = 1 << 30;

fn layer(file: &str) -> Layer {
    Layer {
        file: file.into(),
        format: Some("qcow2".to_owned()),
        virtual_size: Some(10 * GIB),
        actual_size: Some(3 * GIB / 2),
        ..Layer::default()
    }
}

pub(super) fn one() -> Forest {
    let mut forest = Forest::default();
    forest.add_chain(vec![Layer { asked: true, ..layer("/vms/a.qcow2") }]);
    forest
}

/// A disk over two snapshots and a base, with all there is to tell; a clone of a snapshot with a fault, and its own child.
pub(super) fn everything() -> Forest {
    let mut forest = Forest::default();
    let names = ["monday", "tuesday", "wednesday", "thursday", "friday"].map(str::to_owned).to_vec();
    forest.add_chain(vec![
        Layer {
            asked: true,
            disks: vec!["vm1".to_owned()],
            content_id: Some("3fa2c1d0aabbccdd0011223344556677".to_owned()),
            link: Some(Link::Sound),
            marks: Some(Marks { count: 5, refused: 0, names }),
            ..layer("/vms/vm1.qcow2")
        },
        Layer {
            snapshot: Some(Snapshot {
                name: "before-upgrade".to_owned(),
                time: Some(1_795_563_645),
                consistency: Some("application".to_owned()),
            }),
            link: Some(Link::Unbound),
            ..layer("/vms/vm1@before-upgrade.qcow2")
        },
        Layer {
            snapshot: Some(Snapshot { name: "s1".to_owned(), time: None, consistency: None }),
            ..layer("/vms/vm1@s1.qcow2")
        },
        Layer {
            format: Some("raw".to_owned()),
            marks: Some(Marks { count: 2, refused: 1, names: Vec::new() }),
            findings: vec![Finding::warning("one mark is refused: written to while it was not watched")],
            ..layer("/vms/bases/debian.raw")
        },
    ]);
    let clone = Layer {
        content_id: Some("99".to_owned()),
        link: Some(Link::Fault),
        findings: vec![Finding::fault("its parent was opened for writing on 2026-11-25 08:00:00 UTC")],
        ..layer("/vms/clone.qcow2")
    };
    forest.add_child(Path::new("/vms/vm1@s1.qcow2"), clone);
    forest.add_child(
        Path::new("/vms/clone.qcow2"),
        Layer { format: None, virtual_size: None, actual_size: None, ..layer("/vms/clone2.qcow2") },
    );
    forest.add_child(Path::new("/vms/nobody.qcow2"), layer("/vms/of-nobody.qcow2"));
    forest
}

#[test]
fn one_image() {
    assert_eq!(draw(&one(), UNICODE), "in /vms\n\n● a.qcow2  qcow2, 10 GiB, 1.5 GiB in the file\n");
    assert_eq!(draw(&Forest::default(), UNICODE), "");
}

#[test]
fn a_tree_with_everything() {
    let expected = "\
in /vms

○ bases/debian.raw  raw, 10 GiB, 1.5 GiB in the file
│ ! 2 marks (1 refused)
│ ! one mark is refused: written to while it was not watched
│
○ vm1@s1.qcow2  qcow2, 10 GiB, 1.5 GiB in the file
│   snapshot \"s1\"
│   2 images depend on it
│
├─✗ clone.qcow2  qcow2, 10 GiB, 1.5 GiB in the file
│ │ ! content 99, link faulty
│ │ ! its parent was opened for writing on 2026-11-25 08:00:00 UTC
│ │
│ ○ clone2.qcow2  unknown format
│
○ vm1@before-upgrade.qcow2  qcow2, 10 GiB, 1.5 GiB in the file
│   snapshot \"before-upgrade\", 2026-11-24 23:40:45 UTC, application-consistent
│   link not bound to its parent
│
● vm1.qcow2  qcow2, 10 GiB, 1.5 GiB in the file
    disk \"vm1\"
    content 3fa2c1d0, link sound
    5 marks: \"friday\", \"thursday\", \"wednesday\", \"tuesday\", …
";
    let forest = everything();
    assert_eq!(draw(&forest, UNICODE), expected);
    let ascii = expected.replace('○', "o").replace('●', "*").replace('✗', "x").replace('│', "|");
    let ascii = ascii.replace("├─", "+-").replace('…', "...");
    assert_eq!(draw(&forest, Style { ascii: true, colour: false }), ascii);
    let coloured = draw(&forest, Style { ascii: false, colour: true });
    assert!(coloured.contains("├─\x1b[31m✗ clone.qcow2") && coloured.contains("\x1b[1m● vm1.qcow2"), "{coloured}");
    let plain =
        ["\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"].iter().fold(coloured, |text, code| text.replace(code, ""));
    assert_eq!(plain, expected);
}

#[test]
fn chains_that_share_images_are_one_tree() {
    let mut forest = Forest::default();
    let disk = |name: &str, file: &str| Layer { asked: true, disks: vec![name.to_owned()], ..layer(file) };
    forest.add_chain(vec![disk("a", "/v/a"), layer("/v/mid"), layer("/v/base")]);
    forest.add_chain(vec![disk("b", "/v/b"), layer("/v/base")]);
    forest.add_chain(vec![disk("c", "/v/c"), layer("/v/mid"), layer("/v/base")]);
    // A disk that another one stands on, and one of its own.
    forest.add_chain(vec![disk("m", "/v/mid"), layer("/v/base")]);
    forest.add_chain(vec![disk("x", "/v/x")]);
    let expected = "\
in /v

○ base  qcow2, 10 GiB, 1.5 GiB in the file
│   2 images depend on it
│
├─● mid  qcow2, 10 GiB, 1.5 GiB in the file
│ │   disk \"m\"
│ │   2 images depend on it
│ │
│ ├─● a  qcow2, 10 GiB, 1.5 GiB in the file
│ │     disk \"a\"
│ │
│ ● c  qcow2, 10 GiB, 1.5 GiB in the file
│     disk \"c\"
│
● b  qcow2, 10 GiB, 1.5 GiB in the file
    disk \"b\"

● x  qcow2, 10 GiB, 1.5 GiB in the file
    disk \"x\"
";
    assert_eq!(draw(&forest, UNICODE), expected);
}

#[test]
fn a_ring_ends() {
    let mut forest = Forest::default();
    forest.add_chain(vec![layer("/v/a"), layer("/v/b"), layer("/v/a")]);
    forest.add_chain(vec![layer("/v/b"), layer("/v/b")]);
    forest.add_child(Path::new("/v/a"), layer("/v/b"));
    assert_eq!(draw(&forest, UNICODE).matches(['○', '●']).count(), 2);
    assert_eq!(serde_json::to_value(forest.report()).unwrap()["layers"].as_array().unwrap().len(), 2);
    assert!(svg::draw(&forest).ends_with("</svg>\n"));
}

#[test]
fn hundreds_of_layers_are_drawn() {
    let mut forest = Forest::default();
    forest.add_chain((0..3000).map(|n| layer(&format!("/v/{n}"))).collect());
    let text = draw(&forest, UNICODE);
    assert_eq!(text.lines().count(), 2 + 3000 * 2 - 1);
    assert!(text.lines().all(|line| line.chars().count() < 60));
}

#[test]
fn names_cannot_steer_the_terminal_or_the_drawing() {
    let mut forest = Forest::default();
    forest.add_chain(vec![Layer {
        asked: true,
        snapshot: Some(Snapshot { name: "<s1>&\u{202e}\u{fffe}".to_owned(), time: None, consistency: None }),
        ..layer("/v/\u{1b}[31m<b>é\n.qcow2")
    }]);
    let text = draw(&forest, UNICODE);
    assert!(!text.contains(['\u{1b}', '\u{202e}']) && text.lines().count() == 4, "{text:?}");
    let ascii = draw(&forest, Style { ascii: true, colour: true });
    assert!(
        ascii
            .replace("\x1b[1m", "")
            .replace("\x1b[0m", "")
            .chars()
            .all(|c| c.is_ascii_graphic() || c == ' ' || c == '\n')
    );
    let svg = svg::draw(&forest);
    assert!(svg.contains("&lt;b&gt;é") && svg.contains("&lt;s1&gt;&amp;"), "{svg}");
    assert!(!svg.contains(['\u{1b}', '\u{202e}', '\u{fffe}']));
}

#[test]
fn the_drawing_has_a_box_for_each_layer_and_none_covers_another() {
    let forest = everything();
    let svg = svg::draw(&forest);
    let boxes: Vec<[u32; 4]> = svg
        .lines()
        .filter(|line| line.starts_with("<g><rect"))
        .map(|line| {
            ["x", "y", "width", "height"].map(|name| {
                let (_, rest) = line.split_once(&format!(" {name}=\"")).unwrap();
                rest.split_once('"').unwrap().0.parse().unwrap()
            })
        })
        .collect();
    assert_eq!(boxes.len(), 6);
    for (n, [x, y, width, height]) in boxes.iter().enumerate() {
        for [x2, y2, width2, height2] in &boxes[..n] {
            let apart = x + width <= *x2 || x2 + width2 <= *x || y + height <= *y2 || y2 + height2 <= *y;
            assert!(apart, "{boxes:?}");
        }
    }
    assert_eq!(svg.matches("<path class=\"link").count(), 5);
    assert_eq!(svg.matches("<path class=\"link broken\"").count(), 1);
    assert_eq!(svg, svg::draw(&forest), "the same layers, another drawing");
    // The base is below what stands on it.
    assert!(boxes[3][1] > boxes[0][1]);
}

#[test]
fn the_report_says_who_depends_on_what() {
    let report = serde_json::to_value(everything().report()).unwrap();
    let layers = report["layers"].as_array().unwrap();
    let files: Vec<&str> = layers.iter().map(|layer| layer["file"].as_str().unwrap()).collect();
    let expected =
        ["bases/debian.raw", "vm1@s1.qcow2", "clone.qcow2", "clone2.qcow2", "vm1@before-upgrade.qcow2", "vm1.qcow2"];
    assert_eq!(files, expected.map(|name| format!("/vms/{name}")));
    assert_eq!(layers[1]["children"], serde_json::json!(["/vms/clone.qcow2", "/vms/vm1@before-upgrade.qcow2"]));
    assert_eq!(layers[1]["parent"], "/vms/bases/debian.raw");
    assert_eq!(layers[0]["parent"], serde_json::Value::Null);
    let health: Vec<&str> = layers.iter().map(|layer| layer["health"].as_str().unwrap()).collect();
    assert_eq!(health, ["warning", "sound", "fault", "sound", "sound", "sound"]);
    assert_eq!(layers[5]["marks"]["names"].as_array().unwrap().len(), 5);
    assert_eq!(layers[5]["link"], "sound");
}

#[test]
fn terminals_say_whether_they_know_utf8() {
    let with = |set: &'static [(&str, &str)]| {
        ascii_wanted(move |name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
    };
    assert!(with(&[]));
    assert!(with(&[("LANG", "C")]));
    assert!(!with(&[("LANG", "de_DE.UTF-8")]));
    assert!(!with(&[("LC_ALL", ""), ("LC_CTYPE", "C.utf8"), ("LANG", "C")]));
    assert!(with(&[("LC_ALL", "POSIX"), ("LANG", "C.UTF-8")]));
}
