//! Disks as they were at a mark, while their guests write on.

use crate::marks::ranges;
use crate::support::{Place, Server};
use std::fs;

const API: &str = "--api api.sock";

fn daemon(place: &Place, image: &str) -> Server {
    place.hw(&format!("create {image} 64M")).ok();
    let server = place.start(&format!("{API} daemon --state state"));
    place.hw(&format!("{API} disk add {image} --name d")).ok();
    place.qemu_io("raw", &uri(place, "d"), &["write -P 7 0 32M", "flush"]);
    server
}

fn uri(place: &Place, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", place.path("nbd.sock").display())
}

#[test]
fn a_view_shows_the_instant() {
    for image in ["d.qcow2", "d.raw"] {
        let place = Place::new();
        let server = daemon(&place, image);
        place.tool(&format!("nbdcopy {} truth.raw", uri(&place, "d"))).ok();
        place.hw(&format!("{API} mark d A")).ok();
        place.qemu_io("raw", &uri(&place, "d"), &["write -P 1 40M 64k", "flush"]);
        place.tool(&format!("nbdcopy {} truth.raw", uri(&place, "d"))).ok();
        place.hw(&format!("{API} mark d B --view")).ok();
        let changes = ["write -P 8 1M 10M", "discard 20M 5M", "write -z 30M 1M", "write -P 9 60M 3k", "flush"];
        place.qemu_io("raw", &uri(&place, "d"), &changes);
        place.tool(&format!("nbdcopy {} view.raw", uri(&place, "d@B"))).ok();
        assert!(fs::read(place.path("truth.raw")).unwrap() == fs::read(place.path("view.raw")).unwrap(), "{image}");
        // What had changed up to the instant, by a client that knows QEMU's bitmaps.
        let map = format!("nbdinfo --json --map=qemu:dirty-bitmap:A {}", uri(&place, "d@B"));
        let map = place.tool(&map).ok().json();
        let first = map.as_array().unwrap().iter().find(|e| e["type"] == 1).expect("something has changed");
        assert!(first["offset"].as_u64().unwrap() <= 40 << 20);
        let changed = ranges(&place.hw(&format!("{API} --json changes d --since B")).ok().json());
        assert!(
            changed.iter().any(|(start, length, kind)| (*start, *length, &**kind) == (20 << 20, 5 << 20, "discarded"))
        );

        let list = place.hw(&format!("{API} --json views list")).ok().json();
        assert_eq!(list["views"][0]["name"], "d@B");
        assert!(list["views"][0]["stored"].as_u64().unwrap() >= 10 << 20, "{list}");
        assert!(place.qemu_write_is_refused(&uri(&place, "d@B")));
        place.hw(&format!("{API} views close d@B")).ok();
        assert!(place.hw(&format!("{API} views close d@B")).code(1).err.contains("there is no view"));
        assert_ne!(place.tool(&format!("nbdinfo {}", uri(&place, "d@B"))).code, Some(0));
        assert!(place.hw(&format!("{API} marks list d")).ok().out.contains('B'), "the mark stays");
        assert!(server.end().success());
    }
}

#[test]
fn a_full_store_ends_the_view_alone() {
    let place = Place::new();
    let server = daemon(&place, "d.raw");
    place.hw(&format!("{API} mark d A --view --view-limit 1M")).ok();
    place.qemu_io("raw", &uri(&place, "d"), &["write -P 8 0 8M", "flush", "read -P 8 0 8M"]);
    let list = place.hw(&format!("{API} views list")).ok().out;
    assert!(list.contains("ended") && list.contains("full"), "{list}");
    assert_ne!(place.tool(&format!("nbdcopy {} view.raw", uri(&place, "d@A"))).code, Some(0));
    // The disk goes, and its views with it.
    place.hw(&format!("{API} disk remove d")).ok();
    assert!(!place.hw(&format!("{API} views list")).ok().out.contains("d@A"));
    assert!(server.end().success());
}

impl Place {
    fn qemu_write_is_refused(&self, uri: &str) -> bool {
        let ended = self.run("qemu-io", ["-f", "raw", "-c", "write 0 512", uri]);
        ended.code != Some(0) || ended.out.contains("failed") || ended.err.contains("read-only")
    }
}
