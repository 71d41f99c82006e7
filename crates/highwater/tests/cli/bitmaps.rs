//! Marks from QEMU's persistent bitmaps, and such bitmaps from marks.

use crate::marks::{data, ranges, served};
use crate::support::Place;
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The dirty ranges of a bitmap, as QEMU serves them.
fn dirty(place: &Place, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = place.path("qemu.sock");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-t", "-f", "qcow2", "-B", bitmap, "-k"])
        .arg(&socket)
        .arg(place.path(image))
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-nbd starts");
    crate::support::until("qemu-nbd listens", || socket.exists());
    std::thread::sleep(Duration::from_millis(50));
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let map = place.tool(&format!("nbdinfo --json --map=qemu:dirty-bitmap:{bitmap} {uri}")).ok().json();
    server.kill().expect("kill");
    server.wait().expect("qemu-nbd ends");
    let number = |entry: &Value, name: &str| entry[name].as_u64().expect("a number");
    let entries = map.as_array().expect("a list");
    entries.iter().filter(|e| e["type"] == 1).map(|e| (number(e, "offset"), number(e, "length"))).collect()
}

#[test]
fn a_bitmap_becomes_a_mark_and_a_mark_a_bitmap() {
    let place = Place::new();
    place.tool("qemu-img create -q -f qcow2 d.qcow2 64M").ok();
    place.tool("qemu-img bitmap --add d.qcow2 b0").ok();
    place.qemu_io("qcow2", "d.qcow2", &["write 1M 128k", "write 10M 1M"]);
    let mark = place.hw("--json marks import d.qcow2 b0 --as start").ok().json();
    assert_eq!(mark["name"], "start");
    let changed = || ranges(&place.hw("--json changes d.qcow2 --since start").ok().json());
    assert_eq!(changed(), [data(1 << 20, 128 << 10), data(10 << 20, 1 << 20)]);
    served(&place, "d.qcow2", &["write 20M 64k"]);
    let expected = [data(1 << 20, 128 << 10), data(10 << 20, 1 << 20), data(20 << 20, 64 << 10)];
    assert_eq!(changed(), expected);
    // The guest's write has made QEMU's own bitmap one that is not to be trusted.
    assert!(place.hw("marks import d.qcow2 b0 --as again").code(1).err.contains("b0"));

    place.hw("marks export d.qcow2 start --as b1").ok();
    place.tool("qemu-img check d.qcow2").ok();
    let told: Vec<(u64, u64)> = expected.iter().map(|(start, length, _)| (*start, *length)).collect();
    assert_eq!(dirty(&place, "d.qcow2", "b1"), told);
    assert_eq!(changed(), expected, "storing a bitmap is no change, and the mark is trusted");
    // QEMU goes on with it, which is what ends our own history.
    place.qemu_io("qcow2", "d.qcow2", &["write 30M 64k"]);
    assert_eq!(dirty(&place, "d.qcow2", "b1").last(), Some(&(30 << 20, 64 << 10)));
    assert!(place.hw("changes d.qcow2 --since start").code(1).err.contains("another program"));
    // And back again.
    place.hw("marks import d.qcow2 b1").ok();
    let again = ranges(&place.hw("--json changes d.qcow2 --since b1").ok().json());
    assert_eq!(again.len(), 4);
}

#[test]
fn what_holds_no_bitmap_says_so() {
    let place = Place::new();
    place.hw("create a.raw 1M").ok();
    place.hw("create b.qcow2 1M").ok();
    for (line, words) in [
        ("marks import a.raw x", "only qcow2 images hold persistent bitmaps"),
        ("marks export a.raw x", "only qcow2 images hold persistent bitmaps"),
        ("marks import b.qcow2 x", "bitmap \"x\" is not there"),
        ("marks export b.qcow2 x", "no history is kept"),
    ] {
        let error = place.hw(line).code(1).err;
        assert!(error.contains(words), "{line}: {error}");
    }
}
