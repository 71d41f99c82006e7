//! QEMU's persistent bitmaps in an image that is written to by somebody who does not keep them.

mod support;

use disk::{Buf, ErrorKind, Operation};
use formats::qcow2::{AUTOCLEAR_BITMAPS, BitmapDirectory, Header, Invalidate, invalidate_bitmaps};
use support::{Place, load, qemu_img, qemu_img_json, qemu_img_ok, qemu_io, run};

/// An image with a recording bitmap, a frozen one, and data that both saw.
fn image(place: &Place, options: &str) {
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "64M"]);
    qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "64k", "x.qcow2", "frozen"]);
    qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "512", "x.qcow2", "recording"]);
    qemu_io(place.dir(), "x.qcow2", &["write 1M 3M"]);
    qemu_img_ok(place.dir(), &["bitmap", "--disable", "x.qcow2", "frozen"]);
}

fn flags_by_qemu(place: &Place) -> Vec<(String, Vec<String>)> {
    let (info, _) = qemu_img_json(place.dir(), &["info", "--output=json", "x.qcow2"]);
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().expect("bitmaps").clone();
    bitmaps
        .iter()
        .map(|b| {
            let flags = b["flags"].as_array().expect("flags").iter();
            (
                b["name"].as_str().expect("name").to_owned(),
                flags.map(|f| f.as_str().expect("flag").to_owned()).collect(),
            )
        })
        .collect()
}

#[test]
fn listed_as_qemu_lists_them() {
    let place = Place::new();
    image(&place, "cluster_size=4k");
    let (_, handle) = load(&place.path("x.qcow2"));
    let header = run(Header::read(&handle)).expect("header");
    let directory = run(BitmapDirectory::read(&handle, &header)).expect("directory");
    let ours: Vec<_> =
        directory.bitmaps.iter().map(|b| (b.name_text().into_owned(), b.granularity_bits, b.auto, b.in_use)).collect();
    assert_eq!(ours, [("frozen".to_owned(), 16, false, false), ("recording".to_owned(), 9, true, false)]);
    let by_qemu = flags_by_qemu(&place);
    assert_eq!(by_qemu, [("frozen".to_owned(), vec![]), ("recording".to_owned(), vec!["auto".to_owned()])]);
}

#[test]
fn a_write_invalidates_recording_bitmaps_only() {
    for (which, frozen_flags) in [(Invalidate::Recording, vec![]), (Invalidate::All, vec!["in-use".to_owned()])] {
        let place = Place::new();
        image(&place, "cluster_size=64k");
        let (memory, handle) = load(&place.path("x.qcow2"));
        let mut header = run(Header::read(&handle)).expect("header");
        assert!(run(invalidate_bitmaps(&handle, &mut header, which)).expect("marked"));
        assert!(!run(invalidate_bitmaps(&handle, &mut header, which)).expect("again"), "nothing is left to mark");
        memory.write_to(&place.path("x.qcow2")).expect("file");
        let mut flags = flags_by_qemu(&place);
        flags.iter_mut().for_each(|(_, f)| f.sort());
        assert_eq!(flags[0], ("frozen".to_owned(), frozen_flags));
        assert_eq!(flags[1], ("recording".to_owned(), vec!["auto".to_owned(), "in-use".to_owned()]));
        qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        // QEMU can write to such an image, refuses to use the bitmap, and can remove it without a leak.
        qemu_io(place.dir(), "x.qcow2", &["write 8M 64k"]);
        assert!(!qemu_img(place.dir(), &["bitmap", "--disable", "x.qcow2", "recording"]).status.success());
        qemu_img_ok(place.dir(), &["bitmap", "--remove", "x.qcow2", "recording"]);
        qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        let usable = qemu_img(place.dir(), &["bitmap", "--enable", "x.qcow2", "frozen"]).status.success();
        assert_eq!(usable, which == Invalidate::Recording, "a frozen bitmap stays usable over plain writes");
    }
}

#[test]
fn a_directory_that_cannot_be_marked_is_disowned() {
    let place = Place::new();
    image(&place, "cluster_size=64k");
    let (memory, handle) = load(&place.path("x.qcow2"));
    let mut header = run(Header::read(&handle)).expect("header");
    let at = header.bitmaps.expect("bitmaps").directory_offset;
    run(handle.write(at + 16, Buf::copy_of(&[9]))).expect("an unknown type");
    assert_eq!(run(BitmapDirectory::read(&handle, &header)).expect_err("invalid").kind(), ErrorKind::Corrupt);
    assert!(run(invalidate_bitmaps(&handle, &mut header, Invalidate::Recording)).expect("disowned"));
    assert_eq!(run(Header::read(&handle)).expect("header").autoclear & AUTOCLEAR_BITMAPS, 0);
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_io(place.dir(), "x.qcow2", &["write 8M 64k", "read 1M 3M"]);
}

#[test]
fn a_failed_mark_is_an_error() {
    let place = Place::new();
    image(&place, "cluster_size=64k");
    for operation in [Operation::Write, Operation::Flush] {
        let (memory, handle) = load(&place.path("x.qcow2"));
        let mut header = run(Header::read(&handle)).expect("header");
        memory.fail_once(Some(operation), 0, ErrorKind::Io);
        run(invalidate_bitmaps(&handle, &mut header, Invalidate::Recording)).expect_err("the fault");
    }
}
