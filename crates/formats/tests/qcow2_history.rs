//! The mark of a history kept beside an image: who may keep it, who takes it away, and what a loss of power leaves.

mod support;

use disk::{Below, Buf, ByteRange, DiskHandle, ErrorKind, HistoryMark, LayerHandle, Operation, WriteFlags, ZeroMode};
use formats::qcow2::check::{RepairMode, check, repair};
use formats::qcow2::{self, AUTOCLEAR_HISTORY, BackingRef, CreateOptions, Header, Image, OpenOptions};
use std::path::Path;
use support::{Place, load, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::conformance::LayerDisk;
use testkit::executor::Executor;
use testkit::{CrashStorage, MemoryStorage, seeds};

fn mark(n: u8) -> HistoryMark {
    HistoryMark { lineage: [n / 16 + 1; 16], moment: [n; 16] }
}

async fn open(memory: &MemoryStorage) -> LayerHandle {
    LayerHandle::from_rc(Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open"))
}

fn set(memory: &MemoryStorage, mark: Option<HistoryMark>) -> bool {
    run(async {
        let layer = open(memory).await;
        let set = layer.set_history_mark(mark).await.expect("set");
        layer.close().await.expect("close");
        set
    })
}

fn header_of(memory: &MemoryStorage) -> Header {
    run(Header::read(&memory.handle())).expect("header")
}

/// As the next opener finds it.
fn mark_of(memory: &MemoryStorage) -> Option<HistoryMark> {
    run(async { open(memory).await.history_mark() })
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

/// A parent that exists.
fn base(place: &Place) -> &'static str {
    std::fs::write(place.path("base.raw"), vec![0; 1 << 20]).expect("file");
    "base.raw"
}

/// The parent's name in so many bytes, 8 at least.
fn path_of(len: usize) -> String {
    let mut name = if len.is_multiple_of(2) { String::new() } else { ".//".to_owned() };
    while name.len() + 8 < len {
        name.insert_str(0, "./");
    }
    name + "base.raw"
}

#[test]
fn an_image_bears_a_mark_wherever_there_is_room() {
    let place = Place::new();
    let base = base(&place);
    let (long, longer) = (path_of(300), path_of(1023));
    for cluster_bits in [9, 10, 12, 14, 16, 21] {
        for name in [None, Some(base), Some(&long[..]), Some(&longer[..])] {
            let options = options(cluster_bits, name);
            if options.validate().is_err() || cluster_bits < 11 && name.is_some_and(|name| name.len() > 900) {
                continue;
            }
            let memory = created(&options);
            let before = memory.to_vec();
            let borne = set(&memory, Some(mark(1)));
            let what = format!("clusters of {} bytes, name {name:?}", 1 << cluster_bits);
            let fits = cluster_bits > 10 || name.is_none_or(|name| name.len() < 100 || cluster_bits == 10);
            assert_eq!(borne, fits, "{what}");
            assert_eq!(mark_of(&memory), borne.then_some(mark(1)), "{what}");
            assert_eq!(header_of(&memory).backing, options.backing, "{what}");
            if !borne {
                assert!(before == memory.to_vec(), "{what}: nothing has changed");
            }
            // What is in memory of the header is what is on the storage.
            run(async {
                let image = Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open");
                let layer = LayerHandle::from_rc(std::rc::Rc::clone(&image));
                for n in [2, 3] {
                    assert_eq!(layer.set_history_mark(Some(mark(n))).await.expect("set"), borne);
                    assert_eq!(layer.history_mark(), borne.then_some(mark(n)), "{what}");
                    assert_eq!(image.header(), Header::read(&memory.handle()).await.expect("header"), "{what}");
                }
                let header = image.header();
                header.write(&memory.handle()).await.expect("written");
                assert_eq!(header, Header::read(&memory.handle()).await.expect("header"), "{what}");
            });
            assert_clean(&memory);
            memory.write_to(&place.path("x.qcow2")).expect("file");
            assert_eq!(backing_by_qemu(place.dir(), "x.qcow2").as_deref(), name, "{what}");
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
            let (copy, _) = load(&place.path("x.qcow2"));
            assert_eq!(mark_of(&copy), borne.then_some(mark(3)), "{what}: a copy bears the same mark");
        }
    }
}

#[test]
fn a_change_of_mark_is_one_write_within_a_sector() {
    let memory = created(&options(16, Some("base.raw")));
    assert!(set(&memory, Some(mark(1))));
    run(async {
        let layer = open(&memory).await;
        let before = (memory.counters(), memory.to_vec());
        assert!(layer.set_history_mark(Some(mark(2))).await.expect("set"));
        let after = (memory.counters(), memory.to_vec());
        assert_eq!(after.0.writes - before.0.writes, 1);
        assert_eq!(after.0.syncs - before.0.syncs, 1);
        let changed: Vec<usize> = (0..after.1.len()).filter(|at| before.1[*at] != after.1[*at]).collect();
        assert_eq!(changed[0] / 512, changed[changed.len() - 1] / 512);
        assert!(layer.set_history_mark(Some(mark(2))).await.expect("set"));
        assert_eq!(memory.counters().writes, after.0.writes, "the same mark is not written again");
    });
}

#[test]
fn who_cannot_bear_a_mark_says_so() {
    let v2 = created(&CreateOptions { version: 2, ..CreateOptions::new(1 << 20) });
    let before = v2.to_vec();
    assert!(!set(&v2, Some(mark(1))) && !set(&v2, None));
    assert!(before == v2.to_vec());
    let memory = created(&options(16, None));
    assert!(set(&memory, Some(mark(1))));
    run(async {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let layer = LayerHandle::from_rc(Image::open(memory.handle(), None, options).await.expect("open"));
        assert_eq!(layer.history_mark(), Some(mark(1)));
        let error = layer.set_history_mark(Some(mark(2))).await.expect_err("read-only");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        let raw = formats::raw::RawLayer::open(memory.handle(), formats::raw::OpenOptions::default());
        let raw = LayerHandle::new(raw);
        assert!(!raw.set_history_mark(Some(mark(2))).await.expect("raw"));
        assert_eq!(raw.history_mark(), None);
    });
    let place = Place::new();
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
    let (memory, _) = load(&place.path("x.qcow2"));
    assert!(set(&memory, Some(mark(1))));
    run(async {
        let options = OpenOptions { snapshot: Some("s".to_owned()), ..OpenOptions::default() };
        let layer = LayerHandle::from_rc(Image::open(memory.handle(), None, options).await.expect("open"));
        assert_eq!(layer.history_mark(), None, "the mark is about the disk as it is now");
    });
}

/// One way to change what the guest reads.
type Change = fn(&LayerHandle, &DiskHandle) -> disk::Result<()>;

const CHANGES: [(&str, Change); 4] = [
    ("write", |_, disk| run(disk.write(4096, Buf::copy_of(&[5; 4096]), WriteFlags::default()))),
    ("zero", |layer, _| run(layer.write_zeroes(ByteRange::new(0, 65536), Below::Zeroes, ZeroMode::default()))),
    ("discard", |layer, _| run(layer.discard(ByteRange::new(0, 65536), Below::Zeroes))),
    ("resize", |layer, _| run(layer.resize(2 << 20, disk::Preallocation::Off))),
];

#[test]
fn a_tracked_write_keeps_the_mark_and_any_other_clears_it() {
    for (name, change) in CHANGES {
        for tracked in [false, true] {
            let memory = created(&options(16, None));
            assert!(set(&memory, Some(mark(1))));
            let layer = run(open(&memory));
            assert_eq!(layer.history_mark(), Some(mark(1)), "opening alone changes nothing");
            let mut expected = None;
            if tracked {
                assert!(run(layer.set_history_mark(Some(mark(2)))).expect("set"));
                expected = Some(mark(2));
            }
            let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
            change(&layer, &disk).expect("change");
            assert_eq!(layer.history_mark(), expected, "{name}, tracked: {tracked}");
            assert_eq!(header_of(&memory).history_mark(), expected, "{name}: durable before the first change");
            run(layer.close()).expect("close");
            // The next opening is tracked by whoever sets the mark again.
            assert_eq!(mark_of(&memory), expected, "{name}, tracked: {tracked}");
            assert!(set(&memory, Some(mark(3))));
            assert_eq!(mark_of(&memory), Some(mark(3)));
            assert_clean(&memory);
            assert!(set(&memory, None));
            assert_eq!(mark_of(&memory), None);
        }
    }
}

#[test]
fn whoever_takes_the_mark_out_is_not_tracked_any_more() {
    let memory = created(&options(16, None));
    run(async {
        let layer = open(&memory).await;
        assert!(layer.set_history_mark(Some(mark(1))).await.expect("set"));
        assert!(layer.set_history_mark(None).await.expect("out"));
        assert!(layer.set_history_mark(None).await.expect("twice"));
        assert_eq!(layer.history_mark(), None);
        let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
        disk.write(0, Buf::copy_of(&[5; 512]), WriteFlags::default()).await.expect("write");
        // Set while writes go on: from here on they are tracked.
        assert!(layer.set_history_mark(Some(mark(2))).await.expect("set"));
        disk.write(512, Buf::copy_of(&[5; 512]), WriteFlags::default()).await.expect("write");
        disk.close().await.expect("close");
    });
    assert_eq!(mark_of(&memory), Some(mark(2)));
}

#[test]
fn qemu_clears_the_bit_when_it_writes_and_leaves_it_when_it_reads() {
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
        for n in 1..5 {
            let (memory, _) = load(&path);
            assert_eq!(mark_of(&memory), None, "{creation:?}, round {n}");
            assert!(set(&memory, Some(mark(n))), "{creation:?}");
            let backing = header_of(&memory).backing;
            memory.write_to(&path).expect("file");
            backing_by_qemu(place.dir(), "x.qcow2");
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
            qemu_img_ok(place.dir(), &["map", "x.qcow2"]);
            assert_eq!(mark_of(&load(&path).0), Some(mark(n)), "{creation:?}: reading leaves it");
            match n {
                1 => qemu_io(place.dir(), "x.qcow2", &["write -P 7 128k 64k"]),
                2 => qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]).truncate(0),
                3 => qemu_img_ok(place.dir(), &["bitmap", "--add", "x.qcow2", "b"]).truncate(0),
                _ => qemu_io(place.dir(), "x.qcow2", &["read 0 64k"]), // Opens it for writing all the same.
            }
            let (memory, _) = load(&path);
            let header = header_of(&memory);
            assert_eq!(header.autoclear & AUTOCLEAR_HISTORY, 0, "{creation:?}");
            assert_eq!((mark_of(&memory), header.backing), (None, backing), "{creation:?}");
            assert_clean(&memory);
        }
    }
}

#[test]
fn qemu_moves_the_extension_and_the_mark_is_set_all_the_same() {
    let place = Place::new();
    // QEMU's order of extensions is another than ours, so the name's length decides where it lands.
    for len in (8..=136).step_by(8) {
        let data = "d".repeat(len);
        let option = format!("cluster_size=64k,data_file={data}");
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", &option, "x.qcow2", "1M"]);
        let path = place.path("x.qcow2");
        for n in 1..4 {
            let (memory, _) = load(&path);
            let (data_file, _) = load(&place.path(&data));
            run(async {
                let image = Image::open(memory.handle(), Some(data_file.handle()), OpenOptions::default());
                let layer = LayerHandle::from_rc(image.await.expect("open"));
                assert_eq!(layer.history_mark(), None);
                for m in [n, n + 100] {
                    assert!(layer.set_history_mark(Some(mark(m))).await.expect("set"));
                    let header = Header::read(&memory.handle()).await.expect("header");
                    assert_eq!(header.history_mark(), Some(mark(m)), "{len}");
                    assert_eq!(header.unknown_extensions.iter().filter(|e| e.kind == 0x4857_4849).count(), 1);
                }
            });
            memory.write_to(&path).expect("file");
            qemu_io(place.dir(), "x.qcow2", &["write 0 4k"]);
            std::fs::remove_file(place.path(&data))
                .and_then(|()| std::fs::write(place.path(&data), [0]))
                .expect("data");
        }
    }
}

#[test]
fn a_repair_keeps_the_mark_unless_it_changes_what_the_guest_reads() {
    // The count of a cluster at the file's end, too high; too low; and an entry that leads nowhere.
    for (damage, mode, kept) in [
        (0, RepairMode::Leaks, true),
        (0, RepairMode::All, true),
        (1, RepairMode::All, true),
        (2, RepairMode::All, false),
    ] {
        let memory = created(&options(16, None));
        run(async {
            let layer = open(&memory).await;
            assert!(layer.set_history_mark(Some(mark(1))).await.expect("set"));
            let disk = DiskHandle::new(LayerDisk::new(layer, None));
            disk.write(0, Buf::copy_of(&[5; 65536]), WriteFlags::default()).await.expect("write");
            disk.close().await.expect("close");
            let (handle, header) = (memory.handle(), Header::read(&memory.handle()).await.expect("header"));
            let be64 = async |at| {
                u64::from_be_bytes(handle.read_new(at, 8).await.expect("read")[..].try_into().expect("8 bytes"))
            };
            let l2 = be64(header.l1_offset).await & 0x00ff_ffff_ffff_fe00;
            let data = be64(l2).await & 0x00ff_ffff_ffff_fe00;
            let counts = be64(header.refcount_table_offset).await;
            let (at, bytes) = match damage {
                0 => (counts + 2 * (data >> 16), vec![0, 2]),
                1 => (counts + 2 * (data >> 16), vec![0, 0]),
                _ => (l2 + 8, (1u64 << 40 | 1 << 63).to_be_bytes().to_vec()),
            };
            handle.write(at, Buf::copy_of(&bytes)).await.expect("damage");
            let before = check(&handle, None, &mut |_, _| {}).await.expect("check");
            assert!(!before.is_clean());
            repair(&handle, None, mode, &mut |_, _| {}).await.expect("repair");
        });
        assert_clean(&memory);
        assert_eq!(mark_of(&memory), kept.then_some(mark(1)), "damage {damage}, {mode:?}");
        assert!(header_of(&memory).unknown_extensions.iter().any(|e| e.kind == 0x4857_4849));
    }
}

#[test]
fn an_unreadable_mark_is_none_and_is_replaced() {
    for (at, byte) in [(3, 9), (7, 1), (4, 0xff)] {
        let memory = created(&options(16, Some("base.raw")));
        assert!(set(&memory, Some(mark(1))));
        let data = memory.to_vec().windows(8).position(|w| w == b"HWHI\0\0\0\x40").expect("there") as u64 + 8;
        memory.tamper(|bytes| bytes.write(data + at, &[byte]));
        assert_eq!(mark_of(&memory), None);
        assert!(set(&memory, Some(mark(2))));
        assert_eq!(mark_of(&memory), Some(mark(2)));
    }
}

#[test]
fn a_failed_mark_is_an_error_and_the_image_opens_again() {
    for name in [None, Some("base.raw")] {
        for operation in [Operation::Write, Operation::Flush] {
            for kind in [ErrorKind::Io, ErrorKind::NoSpace] {
                for pass in 0..6 {
                    let options = options(16, name);
                    let memory = created(&options);
                    run(async {
                        let layer = open(&memory).await;
                        memory.fail_once(Some(operation), pass, kind);
                        let failed = layer.set_history_mark(Some(mark(1))).await;
                        memory.heal();
                        let Err(error) = failed else { return };
                        assert_eq!(error.kind(), kind);
                        assert_eq!(layer.history_mark(), None);
                        let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
                        let again = layer.set_history_mark(Some(mark(1))).await;
                        let written = disk.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await;
                        if kind == ErrorKind::NoSpace && operation == Operation::Write {
                            assert!(again.expect("a write without space was not done") && written.is_ok());
                            assert_eq!(layer.history_mark(), Some(mark(1)));
                            disk.close().await.expect("close");
                        } else {
                            assert_eq!(again.expect_err("stopped").kind(), ErrorKind::Poisoned);
                            assert_eq!(written.expect_err("stopped").kind(), ErrorKind::Poisoned);
                        }
                    });
                    assert_eq!(header_of(&memory).backing, options.backing);
                    assert!(set(&memory, Some(mark(2))));
                    assert_eq!(mark_of(&memory), Some(mark(2)));
                }
            }
        }
    }
}

/// Loss of power at any moment of setting marks: the old mark, a new one, or none; and the same image otherwise.
#[test]
fn loss_of_power_leaves_an_old_mark_a_new_one_or_none() {
    let place = Place::new();
    base(&place);
    let mut seen = [0; 3];
    seeds::each(3000, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let cluster_bits = [9, 10, 12, 16][rng.usize(..4)];
        let longest = [20, 200, 320, 1000][rng.usize(..4)];
        let name = path_of(rng.usize(12..longest));
        let mut options = options(cluster_bits, (rng.u8(..3) > 0).then_some(&name[..]));
        options.lazy_refcounts = rng.bool();
        let memory = MemoryStorage::new(0).aligned([1, 512, 4096.min(1 << cluster_bits)][rng.usize(..3)]);
        let Ok(_) = run(qcow2::create(&memory.handle(), None, &options)) else { return };
        let old = (rng.u8(..3) > 0 && set(&memory, Some(mark(1)))).then(|| mark(1));
        if rng.u8(..4) == 0 {
            set(&memory, None);
        }
        let old = old.filter(|_| header_of(&memory).history_mark().is_some());
        let storage = CrashStorage::of(memory).yielding(seed);
        let image = run(Image::open(storage.handle(), None, OpenOptions::default())).expect("open");
        let layer = LayerHandle::from_rc(image);
        let new: Vec<_> = (0..rng.u8(1..4)).map(|n| (rng.u8(..5) > 0).then_some(mark(50 + n))).collect();
        let mut executor = Executor::new(seed);
        let marks = new.clone();
        let writes = rng.bool();
        executor.spawn(async move {
            for mark in marks {
                layer.set_history_mark(mark).await.expect("set");
                if writes {
                    let disk = DiskHandle::new(LayerDisk::new(layer.clone(), None));
                    disk.write(0, Buf::copy_of(&[5; 4096]), WriteFlags::default()).await.expect("write");
                    disk.flush().await.expect("flush");
                }
            }
        });
        let most = [10, 30, 60, 200][rng.usize(..4)];
        let ended = executor.run_steps(rng.u64(..most));
        let memory = storage.crash(seed);
        drop(executor);
        let header = header_of(&memory);
        assert_eq!(header.backing, options.backing);
        assert_eq!(header.size, options.size);
        let found = header.history_mark();
        if ended {
            let last = new[new.len() - 1];
            assert!(found == last || cluster_bits < 12 && found.is_none(), "what was set is durable");
        }
        let at = if found.is_none() {
            0
        } else if found == old {
            1
        } else {
            2
        };
        assert!(at < 2 || new.contains(&found), "{found:?} is neither {old:?} nor one of {new:?}");
        seen[at] += 1;
        let report = run(check(&memory.handle(), None, &mut |_, _| {})).expect("check");
        if !(header.lazy_refcounts() && header.is_dirty()) {
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
        }
        if seed.is_multiple_of(20) {
            memory.write_to(&place.path("x.qcow2")).expect("file");
            let name = backing_by_qemu(place.dir(), "x.qcow2");
            assert_eq!(name.as_ref(), options.backing.as_ref().map(|backing| &backing.name));
            if !header.is_dirty() {
                let (check, _) = qemu_img_json(place.dir(), &["check", "--output=json", "x.qcow2"]);
                assert!(check.get("corruptions").is_none() && check["check-errors"] == 0, "{check}");
            }
        }
        // The next opener can set it, if anybody could.
        if cluster_bits >= 12 {
            assert!(set(&memory, Some(mark(99))));
            assert_eq!(mark_of(&memory), Some(mark(99)));
            assert_eq!(header_of(&memory).backing, options.backing);
        }
    });
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.iter().all(|count| *count > 50), "none, old, new: {seen:?}");
    }
}

/// Loss of power while a repair takes an extension out in front of the mark.
#[test]
fn loss_of_power_while_the_header_is_rearranged_leaves_it_readable() {
    let place = Place::new();
    base(&place);
    let images: Vec<_> = [&[][..], &["-b", "base.raw", "-F", "raw"]]
        .into_iter()
        .map(|backing| {
            qemu_img_ok(place.dir(), &[&["create", "-q", "-f", "qcow2"], backing, &["x.qcow2", "1M"]].concat());
            qemu_img_ok(place.dir(), &["bitmap", "--add", "x.qcow2", "b"]);
            let (memory, _) = load(&place.path("x.qcow2"));
            assert!(set(&memory, Some(mark(1))));
            // A program that knows the mark, but no bitmaps, has written.
            memory.tamper(|bytes| bytes.write(88, &AUTOCLEAR_HISTORY.to_be_bytes()));
            memory
        })
        .collect();
    let mut seen = [0; 2];
    seeds::each(400, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let memory = &images[rng.usize(..2)];
        let before = header_of(memory);
        let storage = CrashStorage::of(memory.named("image")).yielding(seed);
        let handle = storage.handle();
        let mut executor = Executor::new(seed);
        executor.spawn(async move {
            repair(&handle, None, RepairMode::Leaks, &mut |_, _| {}).await.expect("repair");
        });
        let ended = executor.run_steps(rng.u64(..120));
        let left = storage.crash(seed);
        drop(executor);
        let header = header_of(&left);
        assert_eq!(header.backing, before.backing);
        let found = mark_of(&left);
        assert!(found == Some(mark(1)) || found.is_none() && !ended, "{found:?}");
        seen[usize::from(found.is_some())] += 1;
        run(repair(&left.handle(), None, RepairMode::Leaks, &mut |_, _| {})).expect("repair");
        assert_clean(&left);
        assert_eq!(header_of(&left).bitmaps, None);
        assert!(set(&left, Some(mark(2))));
        assert_eq!(mark_of(&left), Some(mark(2)));
    });
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.iter().all(|count| *count > 5), "without and with the mark: {seen:?}");
    }
}
