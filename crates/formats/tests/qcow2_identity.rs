//! The id of an image's content and the link to its parent: when they change, who takes the id away, and what a loss of
//! power leaves.

mod support;

use disk::{
    Below, Buf, ByteRange, ContentId, DiskHandle, ErrorKind, HistoryMark, LayerHandle, LayerIdentity, Operation,
    ParentLink, WriteFlags, ZeroMode,
};
use formats::qcow2::check::{RepairMode, check, repair};
use formats::qcow2::{self, AUTOCLEAR_IDENTITY, BackingRef, CreateOptions, Header, Image, OpenOptions};
use std::path::Path;
use std::rc::Rc;
use support::{Place, load, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::conformance::LayerDisk;
use testkit::executor::Executor;
use testkit::{CrashStorage, MemoryStorage, seeds};

fn id(n: u8) -> ContentId {
    ContentId::from_bytes([n; 16]).expect("an id")
}

fn link(n: u8) -> ParentLink {
    let second = (n.is_multiple_of(2)).then(|| id(n + 1));
    ParentLink { parent: Some(id(n)), second, size: u64::from(n) << 40, modified: -i64::from(n), linked: u64::from(n) }
}

async fn open(memory: &MemoryStorage) -> LayerHandle {
    LayerHandle::from_rc(Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open"))
}

async fn write(layer: &LayerHandle, at: u64) {
    let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    disk.write(at, Buf::copy_of(&[5; 4096]), WriteFlags::default()).await.expect("write");
}

fn set(memory: &MemoryStorage, link: Option<ParentLink>) -> bool {
    run(async {
        let layer = open(memory).await;
        let set = layer.set_parent_link(link).await.expect("set");
        layer.close().await.expect("close");
        set
    })
}

fn header_of(memory: &MemoryStorage) -> Header {
    run(Header::read(&memory.handle())).expect("header")
}

/// As the next opener finds it.
fn identity_of(memory: &MemoryStorage) -> LayerIdentity {
    run(async { open(memory).await.identity() })
}

fn assert_clean(memory: &MemoryStorage) {
    let report = run(check(&memory.handle(), None, &mut |_, _| {})).expect("check");
    assert!(report.is_clean(), "{:?}", report.findings);
}

fn created(options: &CreateOptions) -> MemoryStorage {
    let memory = MemoryStorage::new(0);
    run(qcow2::create(&memory.handle(), None, options)).expect("create");
    memory
}

fn options(cluster_bits: u32, name: Option<&str>) -> CreateOptions {
    CreateOptions {
        cluster_size: 1 << cluster_bits,
        backing: name.map(|name| BackingRef { name: name.to_owned(), format: Some("raw".to_owned()) }),
        ..CreateOptions::new(1 << 20)
    }
}

fn backing_by_qemu(dir: &Path, name: &str) -> Option<String> {
    let (info, status) = qemu_img_json(dir, &["info", "--output=json", name]);
    assert_eq!(status, 0);
    info.get("backing-filename").map(|name| name.as_str().expect("text").to_owned())
}

/// A parent's name in so many bytes, 8 at least; the parent is made.
fn path_of(place: &Place, len: usize) -> String {
    std::fs::write(place.path("base.raw"), vec![0; 1 << 20]).expect("file");
    let mut name = if len.is_multiple_of(2) { String::new() } else { ".//".to_owned() };
    while name.len() + 8 < len {
        name.insert_str(0, "./");
    }
    name + "base.raw"
}

#[test]
fn an_image_bears_an_identity_beside_a_history_wherever_there_is_room() {
    let place = Place::new();
    let names = [0, 8, 300, 1023].map(|len| (len > 0).then(|| path_of(&place, len)));
    for cluster_bits in [9, 10, 12, 14, 16, 21] {
        for name in names.iter().map(Option::as_deref) {
            let options = options(cluster_bits, name);
            let len = name.map_or(0, str::len);
            if options.validate().is_err() || cluster_bits < 11 && len > 900 {
                continue;
            }
            let what = format!("clusters of {} bytes, a name of {len}", 1 << cluster_bits);
            let memory = created(&options);
            let before = memory.to_vec();
            let borne = set(&memory, Some(link(1)));
            assert_eq!(borne, cluster_bits > 9 || len < 100, "{what}");
            if !borne {
                assert!(before == memory.to_vec(), "{what}: nothing has changed");
            }
            let first = identity_of(&memory);
            assert_eq!((first.link, first.content.is_some()), (borne.then_some(link(1)), borne), "{what}");
            run(async {
                let image = Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open");
                let layer = LayerHandle::from_rc(Rc::clone(&image));
                let mark = HistoryMark { lineage: [1; 16], moment: [2; 16] };
                let marked = layer.set_history_mark(Some(mark)).await.expect("mark");
                assert!(marked || cluster_bits < 11, "{what}");
                for n in [2, 3] {
                    assert_eq!(layer.set_parent_link(Some(link(n))).await.expect("set"), borne);
                    assert_eq!(layer.parent_link(), borne.then_some(link(n)), "{what}");
                    assert_eq!(layer.content_id(), first.content, "{what}: a link is no content");
                    assert_eq!(image.header(), Header::read(&memory.handle()).await.expect("header"), "{what}");
                }
                write(&layer, 0).await;
                assert_eq!(layer.history_mark(), marked.then_some(mark), "{what}");
                layer.close().await.expect("close");
                let header = image.header();
                header.write(&memory.handle()).await.expect("written");
                assert_eq!(header, Header::read(&memory.handle()).await.expect("header"), "{what}");
            });
            let second = identity_of(&memory);
            assert!(second.content.is_some() == borne && (second.content != first.content) == borne, "{what}");
            assert_eq!(header_of(&memory).backing, options.backing, "{what}");
            assert_clean(&memory);
            memory.write_to(&place.path("x.qcow2")).expect("file");
            assert_eq!(backing_by_qemu(place.dir(), "x.qcow2").as_deref(), name, "{what}");
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
            let (copy, _) = load(&place.path("x.qcow2"));
            assert_eq!(identity_of(&copy), second, "{what}: a copy has the same content");
        }
    }
}

/// One way to change what the guest reads.
type Change = fn(&LayerHandle) -> disk::Result<()>;

const CHANGES: [(&str, Change); 4] = [
    ("write", |layer| {
        run(write(layer, 4096));
        Ok(())
    }),
    ("zero", |layer| run(layer.write_zeroes(ByteRange::new(0, 65536), Below::Zeroes, ZeroMode::default()))),
    ("discard", |layer| run(layer.discard(ByteRange::new(0, 65536), Below::Zeroes))),
    ("resize", |layer| run(layer.resize(2 << 20, disk::Preallocation::Off))),
];

#[test]
fn the_first_change_of_an_opening_changes_the_id_and_opening_changes_nothing() {
    for (name, change) in CHANGES {
        let memory = created(&options(16, Some("base.raw")));
        assert_eq!(identity_of(&memory), LayerIdentity::default());
        let mut known: Vec<ContentId> = Vec::new();
        for round in 0..3 {
            let before = memory.to_vec();
            let layer = run(open(&memory));
            if round == 2 {
                layer.link_with_first_write(link(7));
            }
            run(layer.close()).expect("close");
            assert!(before == memory.to_vec(), "{name}: opening and closing writes nothing");
            assert_eq!(layer.content_id(), known.last().copied());
            if name == "resize" && round > 0 {
                run(layer.resize(1 << 20, disk::Preallocation::Off)).expect("smaller");
                run(layer.close()).expect("close");
                known.push(layer.content_id().expect("an id"));
            }
            change(&layer).expect("change");
            let new = layer.content_id().expect("an id, as there is room");
            assert!(!known.contains(&new), "{name}");
            assert_eq!(header_of(&memory).identity(), layer.identity(), "{name}: durable before the change");
            change(&layer).expect("again");
            assert_eq!(layer.content_id(), Some(new), "{name}: once in an opening");
            run(layer.close()).expect("close");
            if let Some(old) = known.last() {
                assert!(new.same_image(*old));
            }
            known.push(new);
            assert_clean(&memory);
        }
        assert_eq!(identity_of(&memory).link, Some(link(7)), "{name}");
    }
}

#[test]
fn an_id_is_written_once_within_a_sector() {
    let memory = created(&options(16, Some("base.raw")));
    assert!(set(&memory, Some(link(1))));
    run(async {
        let layer = open(&memory).await;
        let before = (memory.counters(), memory.to_vec());
        assert!(layer.renew_content_id(id(9)).await.expect("given"));
        assert!(layer.set_parent_link(Some(link(1))).await.expect("the same"));
        let after = (memory.counters(), memory.to_vec());
        assert_eq!((after.0.writes - before.0.writes, after.0.syncs - before.0.syncs), (1, 1));
        let changed: Vec<usize> = (0..after.1.len()).filter(|at| before.1[*at] != after.1[*at]).collect();
        assert_eq!(changed[0] / 512, changed[changed.len() - 1] / 512);
        write(&layer, 0).await;
        assert_eq!((layer.content_id(), layer.parent_link()), (Some(id(9)), Some(link(1))));
    });
}

#[test]
fn who_cannot_bear_an_identity_says_so() {
    let v2 = created(&CreateOptions { version: 2, ..CreateOptions::new(1 << 20) });
    let before = v2.to_vec();
    assert!(!set(&v2, Some(link(1))) && !set(&v2, None));
    assert!(before == v2.to_vec());
    run(async { write(&open(&v2).await, 0).await });
    assert_eq!(identity_of(&v2), LayerIdentity::default());
    let memory = created(&options(16, None));
    assert!(set(&memory, Some(link(1))));
    run(async {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let layer = LayerHandle::from_rc(Image::open(memory.handle(), None, options).await.expect("open"));
        assert_eq!(layer.parent_link(), Some(link(1)));
        assert_eq!(layer.set_parent_link(None).await.expect_err("read-only").kind(), ErrorKind::ReadOnly);
        assert_eq!(layer.renew_content_id(id(1)).await.expect_err("read-only").kind(), ErrorKind::ReadOnly);
        let raw = formats::raw::RawLayer::open(memory.handle(), formats::raw::OpenOptions::default());
        let raw = LayerHandle::new(raw);
        assert!(!raw.set_parent_link(Some(link(2))).await.expect("raw"));
        assert_eq!(raw.identity(), LayerIdentity::default());
    });
    let place = Place::new();
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
    let (memory, _) = load(&place.path("x.qcow2"));
    run(async {
        write(&open(&memory).await, 0).await;
        let options = OpenOptions { snapshot: Some("s".to_owned()), ..OpenOptions::default() };
        let layer = LayerHandle::from_rc(Image::open(memory.handle(), None, options).await.expect("open"));
        let expected = LayerIdentity { link: Some(link(1)), ..LayerIdentity::default() };
        assert_eq!(layer.identity(), expected, "the id is about the disk as it is now, the parent is the same");
    });
}

#[test]
fn qemu_ends_the_id_when_it_writes_and_leaves_it_when_it_reads() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "raw", "base.raw", "1M"]);
    for creation in [
        &["-o", "cluster_size=64k"][..],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k,extended_l2=off,lazy_refcounts=on"],
        &["-b", "base.raw", "-F", "raw"],
        &["-b", "base.raw", "-F", "raw", "-o", "cluster_size=512"],
    ] {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(creation);
        args.extend(["x.qcow2", "1M"]);
        qemu_img_ok(place.dir(), &args);
        qemu_io(place.dir(), "x.qcow2", &["write 0 64k"]);
        let path = place.path("x.qcow2");
        let mut last: Option<ContentId> = None;
        for n in 1..6 {
            let (memory, _) = load(&path);
            let found = identity_of(&memory);
            assert_eq!((found.content, found.lapsed), (None, last), "{creation:?}, round {n}");
            assert_eq!(found.link, last.map(|_| link(n - 1)), "{creation:?}: the link stays");
            assert!(set(&memory, Some(link(n))), "{creation:?}");
            let now = identity_of(&memory);
            let content = now.content.expect("an id again");
            assert!(last.is_none_or(|last| last != content && last.same_image(content)), "another id, the same image");
            let backing = header_of(&memory).backing;
            memory.write_to(&path).expect("file");
            backing_by_qemu(place.dir(), "x.qcow2");
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
            qemu_img_ok(place.dir(), &["map", "x.qcow2"]);
            qemu_img_ok(place.dir(), &["convert", "-O", "raw", "x.qcow2", "copy.raw"]);
            assert_eq!(identity_of(&load(&path).0), now, "{creation:?}: reading leaves it");
            match n {
                1 => qemu_io(place.dir(), "x.qcow2", &["write -P 7 128k 64k"]),
                2 => qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]).truncate(0),
                3 => qemu_img_ok(place.dir(), &["bitmap", "--add", "x.qcow2", "b"]).truncate(0),
                4 => qemu_img_ok(place.dir(), &["amend", "-o", "lazy_refcounts=off", "x.qcow2"]).truncate(0),
                _ => qemu_io(place.dir(), "x.qcow2", &["read 0 64k"]), // Opens it for writing all the same.
            }
            let (memory, _) = load(&path);
            let header = header_of(&memory);
            assert_eq!(header.autoclear & AUTOCLEAR_IDENTITY, 0, "{creation:?}");
            assert_eq!(header.backing, backing, "{creation:?}");
            assert_clean(&memory);
            last = Some(content);
        }
    }
}

#[test]
fn qemu_moves_the_extension_and_it_is_changed_in_one_step_all_the_same() {
    let place = Place::new();
    let mut moved = 0;
    // QEMU's order of extensions is another than ours, so the name's length decides where it lands.
    for len in (360..=520).step_by(8) {
        let data = format!("{}data.raw", "./".repeat(len / 2 - 4));
        let option = format!("cluster_size=64k,data_file={data}");
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", &option, "x.qcow2", "1M"]);
        let path = place.path("x.qcow2");
        for n in 1..4 {
            let (memory, _) = load(&path);
            let (data_file, _) = load(&place.path(&data));
            run(async {
                let image = Image::open(memory.handle(), Some(data_file.handle()), OpenOptions::default());
                let layer = LayerHandle::from_rc(image.await.expect("open"));
                for m in [2 * n, 2 * n + 100] {
                    let writes = memory.counters().writes;
                    assert!(layer.set_parent_link(Some(link(m))).await.expect("set"));
                    moved += u32::from(n > 1 && memory.counters().writes - writes == 3); // Place, lead, bit.
                    let header = Header::read(&memory.handle()).await.expect("header");
                    assert_eq!(header.identity().link, Some(link(m)), "{len}");
                    assert!(header.identity().content.is_some(), "{len}");
                    assert_eq!(header.unknown_extensions.iter().filter(|e| e.kind == 0x4857_4c49).count(), 1);
                }
            });
            memory.write_to(&path).expect("file");
            qemu_img_ok(place.dir(), &["bitmap", if n % 2 == 1 { "--add" } else { "--remove" }, "x.qcow2", "b"]);
            std::fs::remove_file(place.path(&data))
                .and_then(|()| std::fs::write(place.path(&data), [0]))
                .expect("data");
        }
    }
    assert!(moved > 0, "some extension came to lie across a sector's end");
}

#[test]
fn a_repair_keeps_the_id_unless_it_changes_what_the_guest_reads() {
    for (damage, mode, kept) in [(0, RepairMode::All, true), (1, RepairMode::All, false)] {
        let memory = created(&options(16, None));
        let before = run(async {
            let layer = open(&memory).await;
            assert!(layer.set_parent_link(Some(link(2))).await.expect("set"));
            write(&layer, 0).await;
            layer.close().await.expect("close");
            let (handle, header) = (memory.handle(), Header::read(&memory.handle()).await.expect("header"));
            let be64 = async |at| {
                u64::from_be_bytes(handle.read_new(at, 8).await.expect("read")[..].try_into().expect("8 bytes"))
            };
            let l2 = be64(header.l1_offset).await & 0x00ff_ffff_ffff_fe00;
            let data = be64(l2).await & 0x00ff_ffff_ffff_fe00;
            let counts = be64(header.refcount_table_offset).await;
            let (at, bytes) = match damage {
                0 => (counts + 2 * (data >> 16), vec![0, 2]),
                _ => (l2 + 8, (1u64 << 40 | 1 << 63).to_be_bytes().to_vec()),
            };
            handle.write(at, Buf::copy_of(&bytes)).await.expect("damage");
            repair(&handle, None, mode, &mut |_, _| {}).await.expect("repair");
            layer.identity()
        });
        assert_clean(&memory);
        let after = identity_of(&memory);
        assert_eq!(after.content, before.content.filter(|_| kept), "damage {damage}");
        assert_eq!((after.lapsed.is_some(), after.link), (!kept, before.link));
    }
}

#[test]
fn hostile_extensions_are_no_identity_or_an_odd_one() {
    let mut rng = fastrand::Rng::with_seed(3);
    let good = created(&options(16, Some("base.raw")));
    assert!(set(&good, Some(link(1))));
    let data = good.to_vec().windows(8).position(|w| w == b"HWLI\0\0\0\xf0").expect("there") as u64 + 8;
    for round in 0..300 {
        let memory = MemoryStorage::new(0);
        memory.tamper(|bytes| bytes.write(0, &good.to_vec()));
        memory.tamper(|bytes| match round % 3 {
            0 => bytes.write(data + rng.u64(..8), &[rng.u8(..)]),
            1 => bytes.write(data - 4, &(rng.u32(..300) & !7).to_be_bytes()),
            _ => {
                let noise: Vec<u8> = (0..240).map(|_| rng.u8(..)).collect();
                bytes.write(data + 8, &noise[8..]);
            }
        });
        let Ok(header) = run(Header::read(&memory.handle())) else { continue };
        let found = header.identity();
        // Whatever it says, it can be replaced or is given up, and the image can be used.
        run(async {
            let Ok(image) = Image::open(memory.handle(), None, OpenOptions::default()).await else { return };
            let layer = LayerHandle::from_rc(image);
            assert_eq!(layer.identity(), found);
            write(&layer, 0).await;
            let renewed = layer.identity();
            assert!(renewed.content.is_none() || renewed.content != found.content);
            let set = layer.set_parent_link(Some(link(8))).await.expect("set");
            assert_eq!((set, layer.parent_link()), (renewed.content.is_some(), set.then_some(link(8))));
            layer.close().await.expect("close");
        });
        assert_clean(&memory);
    }
}

#[test]
fn a_failed_identity_is_an_error_and_the_image_opens_again() {
    for operation in [Operation::Write, Operation::Flush] {
        for kind in [ErrorKind::Io, ErrorKind::NoSpace] {
            for pass in 0..6 {
                let options = options(16, Some("base.raw"));
                let memory = created(&options);
                run(async {
                    let layer = open(&memory).await;
                    memory.fail_once(Some(operation), pass, kind);
                    let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
                    let written = disk.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await;
                    memory.heal();
                    let Err(error) = written else { return };
                    assert_eq!(error.kind(), kind);
                    let again = disk.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await;
                    if kind == ErrorKind::NoSpace && operation == Operation::Write {
                        again.expect("a write without space was not done");
                        assert!(layer.content_id().is_some());
                        disk.close().await.expect("close");
                    } else if layer.content_id().is_none() {
                        assert_eq!(again.expect_err("stopped").kind(), ErrorKind::Poisoned);
                    }
                });
                assert_eq!(header_of(&memory).backing, options.backing);
                assert!(set(&memory, Some(link(2))));
                assert_eq!(identity_of(&memory).link, Some(link(2)));
            }
        }
    }
}

fn renamed(name: &str, format: &str) -> BackingRef {
    BackingRef { name: name.to_owned(), format: Some(format.to_owned()) }
}

#[test]
fn another_backing_file_is_named_and_qemu_agrees() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "other.qcow2", "1M"]);
    for (cluster_bits, len) in [(16, 0), (16, 8), (16, 300), (12, 1023), (9, 8), (9, 0)] {
        let name = (len > 0).then(|| path_of(&place, len));
        let options = options(cluster_bits, name.as_deref());
        let memory = created(&options);
        if cluster_bits > 9 {
            assert!(set(&memory, Some(link(2))));
        }
        let before = identity_of(&memory);
        let long = format!("{}other.qcow2", "./".repeat(150));
        let mut wanted = vec![Some(renamed("other.qcow2", "qcow2")), Some(renamed("base.raw", "raw")), None];
        wanted.push(Some(renamed("other.qcow2", "qcow2")));
        if cluster_bits > 9 {
            wanted.extend([Some(renamed(&long, "qcow2")), Some(renamed("base.raw", "raw"))]);
        }
        if len == 0 && cluster_bits > 9 {
            // The extension was added behind the first sector, so the format stays what it was.
            wanted.retain(|backing| backing.as_ref().is_none_or(|b| b.format.as_deref() == Some("qcow2")));
        }
        path_of(&place, 8);
        for backing in wanted {
            let what = format!("clusters of {} bytes, a name of {len}: {backing:?}", 1 << cluster_bits);
            run(qcow2::rename_backing(&memory.handle(), backing.as_ref())).unwrap_or_else(|e| panic!("{what}: {e:?}"));
            assert_eq!(header_of(&memory).backing, backing, "{what}");
            assert_eq!(identity_of(&memory), before, "{what}");
            assert_clean(&memory);
            memory.write_to(&place.path("x.qcow2")).expect("file");
            assert_eq!(backing_by_qemu(place.dir(), "x.qcow2"), backing.map(|b| b.name), "{what}");
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        }
    }
    let memory = created(&options(16, Some("base.raw")));
    let without = created(&options(16, None));
    run(qcow2::rename_backing(&without.handle(), Some(&renamed("other.qcow2", "qcow2")))).expect("the first");
    let error = run(qcow2::rename_backing(&without.handle(), Some(&renamed("base.raw", "raw")))).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "not in one step");
    assert_eq!(header_of(&without).backing, Some(renamed("other.qcow2", "qcow2")), "nothing has changed");
    let mut longer = options(16, Some("base.raw"));
    longer.backing = Some(renamed("base.raw", "host_device"));
    let longer = created(&longer);
    assert!(set(&longer, Some(link(2))));
    let before = identity_of(&longer);
    let error = run(qcow2::rename_backing(&longer.handle(), Some(&renamed("base.raw", "raw")))).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "what is behind a shorter extension would be found no more");
    assert_eq!(identity_of(&longer), before);
    let long = "n".repeat(1024);
    for bad in [renamed("", "raw"), renamed(&long, "raw"), BackingRef { format: None, ..renamed("a", "raw") }] {
        let error = run(qcow2::rename_backing(&memory.handle(), Some(&bad))).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert_eq!(header_of(&memory).backing, Some(renamed("base.raw", "raw")));
}

#[test]
fn loss_of_power_leaves_the_old_backing_file_or_the_new_one() {
    let place = Place::new();
    let mut seen = [0; 2];
    seeds::each(1000, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cluster_bits = [10, 12, 16][rng.usize(..3)];
        let name = path_of(&place, rng.usize(12..250));
        let options = options(cluster_bits, (rng.u8(..3) > 0).then_some(&name[..]));
        let memory = created(&options);
        set(&memory, Some(link(1)));
        let new = (rng.u8(..4) > 0).then(|| renamed(&path_of(&place, rng.usize(12..250)), "qcow2"));
        let storage = CrashStorage::of(memory).yielding(seed);
        let (handle, backing) = (storage.handle(), new.clone());
        let mut executor = Executor::new(seed);
        executor.spawn(async move {
            qcow2::rename_backing(&handle, backing.as_ref()).await.expect("renamed");
        });
        let ended = executor.run_steps(rng.u64(..60));
        let memory = storage.crash(seed);
        drop(executor);
        let found = header_of(&memory).backing;
        assert!(found == new || found == options.backing && !ended, "{found:?}");
        seen[usize::from(found == new)] += 1;
        assert!(cluster_bits < 12 || identity_of(&memory).link == Some(link(1)));
        assert_clean(&memory);
        if seed.is_multiple_of(20) {
            memory.write_to(&place.path("x.qcow2")).expect("file");
            assert_eq!(backing_by_qemu(place.dir(), "x.qcow2"), found.map(|b| b.name));
        }
    });
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.iter().all(|count| *count > 50), "old and new: {seen:?}");
    }
}

/// What a guest reads.
fn content_of(memory: &MemoryStorage) -> Vec<u8> {
    run(async {
        let layer = open(memory).await;
        let disk = DiskHandle::new(LayerDisk::new(layer, None));
        disk.read(0, Buf::new(1 << 20)).await.expect("read").to_vec()
    })
}

/// Loss of power at any moment of first writes and new links: never other content under an old id; the link is an old or a
/// new one and never lost.
#[test]
fn loss_of_power_leaves_no_other_content_under_an_old_id() {
    let place = Place::new();
    let mut seen = [0; 3];
    seeds::each(2500, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cluster_bits = [9, 10, 12, 16][rng.usize(..4)];
        let longest = [20, 200, 320, 1000][rng.usize(..4)];
        let name = path_of(&place, rng.usize(12..longest));
        let mut options = options(cluster_bits, (rng.u8(..3) > 0).then_some(&name[..]));
        options.lazy_refcounts = rng.bool();
        let memory = MemoryStorage::new(0).aligned([1, 512, 4096.min(1 << cluster_bits)][rng.usize(..3)]);
        let Ok(_) = run(qcow2::create(&memory.handle(), None, &options)) else { return };
        let mut old_link = None;
        if rng.u8(..4) > 0 && set(&memory, Some(link(1))) {
            old_link = Some(link(1));
            if rng.u8(..4) == 0 {
                // As if a program had opened it that does not know of ids, perhaps moving the extension.
                memory.tamper(|bytes| bytes.write(88, &[0; 8]));
            }
        }
        let (old, before) = (header_of(&memory).identity(), content_of(&memory));
        let storage = CrashStorage::of(memory).yielding(seed);
        let image = run(Image::open(storage.handle(), None, OpenOptions::default())).expect("open");
        let layer = LayerHandle::from_rc(image);
        let mut executor = Executor::new(seed);
        let links: Vec<_> = (0..rng.u8(..3)).map(|n| link(50 + n)).collect();
        let (ahead, later) = (links.clone(), rng.bool().then(|| link(80)));
        let given = (rng.u8(..4) == 0).then(|| id(0xdd));
        let rounds = rng.u8(1..4);
        executor.spawn(async move {
            for link in ahead {
                layer.set_parent_link(Some(link)).await.expect("set");
            }
            if let Some(id) = given {
                layer.renew_content_id(id).await.expect("given");
            }
            if let Some(link) = later {
                layer.link_with_first_write(link);
            }
            for round in 0..rounds {
                let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
                disk.write(0, Buf::copy_of(&[5 + round; 4096]), WriteFlags::default()).await.expect("write");
                disk.flush().await.expect("flush");
                layer.close().await.expect("close");
            }
        });
        let most = [10, 30, 60, 200][rng.usize(..4)];
        let ended = executor.run_steps(rng.u64(..most));
        let memory = storage.crash(seed);
        drop(executor);
        let header = header_of(&memory);
        let found = header.identity();
        assert_eq!((header.backing.clone(), header.size), (options.backing.clone(), options.size));
        let report = run(check(&memory.handle(), None, &mut |_, _| {})).expect("check");
        if !(header.lazy_refcounts() && header.is_dirty()) {
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
        }
        let possible = [old_link, later].into_iter().chain(links.iter().map(|link| Some(*link)));
        assert!(possible.clone().any(|link| link == found.link), "{found:?}: neither old nor new");
        assert!(old_link.is_none() || found.link.is_some(), "a link is never lost");
        if ended && cluster_bits >= 12 {
            let last = later.or(links.last().copied()).or(old_link);
            assert_eq!(found.link, last, "what was set is durable");
            assert!(found.content.is_some());
        }
        let changed = content_of(&memory) != before;
        if changed {
            assert!(found.content.is_none() || found.content != old.content, "other content under the id of the old");
        }
        seen[if changed { 2 } else { usize::from(found.content != old.content) }] += 1;
        if seed.is_multiple_of(25) {
            memory.write_to(&place.path("x.qcow2")).expect("file");
            let name = backing_by_qemu(place.dir(), "x.qcow2");
            assert_eq!(name.as_ref(), options.backing.as_ref().map(|backing| &backing.name));
            if !header.is_dirty() {
                let (check, _) = qemu_img_json(place.dir(), &["check", "--output=json", "x.qcow2"]);
                assert!(check.get("corruptions").is_none() && check["check-errors"] == 0, "{check}");
            }
        }
        // The next opener goes on.
        if cluster_bits >= 12 {
            assert!(set(&memory, Some(link(90))));
            let now = identity_of(&memory);
            assert!(now.link == Some(link(90)) && now.content.is_some());
        }
    });
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.iter().all(|count| *count > 50), "old id, new id, new content: {seen:?}");
    }
}

/// Loss of power while a record that another program moved across a sector's end gets a place of its own again.
#[test]
fn loss_of_power_while_a_record_moves_loses_no_link() {
    let mut seen = [0; 2];
    seeds::each(1500, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let memory = created(&options(16, None));
        assert!(set(&memory, Some(link(1))));
        // Bring the extension to another place, as QEMU may.
        run(async {
            let mut header = Header::read(&memory.handle()).await.expect("header");
            let kind = 0x7000_0001;
            let data = vec![1; 8 * rng.usize(..70)];
            header.unknown_extensions.insert(0, qcow2::Extension { kind, data });
            header.autoclear = 0;
            header.write(&memory.handle()).await.expect("moved");
        });
        assert_eq!(identity_of(&memory).link, Some(link(1)));
        let storage = CrashStorage::of(memory).yielding(seed);
        let image = run(Image::open(storage.handle(), None, OpenOptions::default())).expect("open");
        let layer = LayerHandle::from_rc(image);
        let mut executor = Executor::new(seed);
        executor.spawn(async move {
            layer.set_parent_link(Some(link(2))).await.expect("set");
        });
        let ended = executor.run_steps(rng.u64(..30));
        let memory = storage.crash(seed);
        drop(executor);
        let found = identity_of(&memory).link;
        assert!(found == Some(link(2)) || found == Some(link(1)) && !ended, "{found:?}");
        seen[usize::from(found == Some(link(2)))] += 1;
        assert_clean(&memory);
    });
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.iter().all(|count| *count > 50), "old and new: {seen:?}");
    }
}
