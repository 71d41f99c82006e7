//! The history is proved against copies.

use crate::marks::served;
use crate::support::Place;
use std::fs;
use std::os::unix::fs::FileExt;

#[test]
fn a_change_behind_the_histories_back_is_found() {
    let place = Place::new();
    place.raw("d.raw", 16 << 20);
    place.hw("mark d.raw before").ok();
    fs::copy(place.path("d.raw"), place.path("copy.raw")).unwrap();
    served(&place, "d.raw", &["write -P 1 1M 64k", "discard 5M 1M", "flush"]);
    let proved = place.hw("--json audit d.raw --since before --against copy.raw").ok().json();
    assert_eq!(proved["proved"], true);
    assert_eq!(proved["checked"], proved["unchanged"]);
    assert!(proved["unchanged"].as_u64().unwrap() >= 13 << 20 && proved["zero"].as_u64().unwrap() > 0, "{proved}");
    let sample = place.hw("--json audit d.raw --since before --against copy.raw --sample 30").ok().json();
    assert!(sample["checked"].as_u64() < sample["unchanged"].as_u64(), "{sample}");

    // What no time and no mark tells.
    let file = fs::File::options().write(true).open(place.path("d.raw")).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"changed", 9 << 20).unwrap();
    file.write_all_at(b"not zero", 5 << 20).unwrap();
    file.set_modified(modified).unwrap();
    drop(file);
    place.hw("changes d.raw --since before").ok();
    let found = place.hw("audit d.raw --since before --against copy.raw").code(1).out;
    assert!(found.contains("WRONG") && found.contains("0x900000+") && found.contains("0x500000+"), "{found}");
    assert!(place.hw("audit d.raw --since nope --against copy.raw").code(1).err.contains("nope"));
}

#[test]
fn a_disk_in_use_is_audited_against_the_view_of_its_mark() {
    let place = Place::new();
    place.hw("create d.qcow2 64M").ok();
    let server = place.start("--api api.sock daemon --state state");
    place.hw("--api api.sock disk add d.qcow2").ok();
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", place.path("nbd.sock").display());
    place.qemu_io("raw", &uri("d"), &["write -P 7 0 32M", "flush"]);
    place.hw("--api api.sock mark d B --view").ok();
    place.qemu_io("raw", &uri("d"), &["write -P 8 1M 5M", "write -z 10M 1M", "flush"]);
    place.tool(&format!("nbdcopy {} copy.raw", uri("d@B"))).ok();
    let proved = place.hw("--api api.sock --json audit d --since B --against copy.raw").ok().json();
    assert_eq!((&proved["proved"], &proved["checked"]), (&true.into(), &proved["unchanged"]));
    // A copy of another moment is told from one of the mark.
    place.raw("other.raw", 64 << 20);
    assert!(place.hw("--api api.sock audit d --since B --against other.raw").code(1).out.contains("WRONG"));
    assert!(server.end().success());
}
