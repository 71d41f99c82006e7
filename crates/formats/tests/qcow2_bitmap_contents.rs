//! What persistent bitmaps say: read as QEMU reads them, and stored so that QEMU reads the same.

mod support;

use disk::{Buf, ByteRange, DiskHandle, ErrorKind, HistoryMark, LayerHandle, Operation, WriteFlags};
use formats::qcow2::check::check;
use formats::qcow2::{
    self, AUTOCLEAR_BITMAPS, BitmapDirectory, BitmapRanges, CreateOptions, Header, Image, NewBitmap, OpenOptions,
    read_bitmap,
};
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use support::{Place, load, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::conformance::LayerDisk;
use testkit::executor::Executor;
use testkit::{CrashStorage, MemoryStorage, seeds};

/// The dirty ranges as QEMU sees them, through its NBD server.
fn by_qemu(place: &Place, image: &str, name: &str, auto: bool) -> Vec<ByteRange> {
    // A copy: the server marks a recording bitmap as in use, and saves it at its end, which comes when it likes.
    static SERVERS: AtomicU32 = AtomicU32::new(0);
    let number = SERVERS.fetch_add(1, Ordering::Relaxed);
    let (copy, socket) = (format!("served-{number}.qcow2"), place.path(&format!("socket-{number}")));
    std::fs::copy(place.path(image), place.path(&copy)).expect("copy");
    let mut server = Command::new("qemu-nbd");
    server.current_dir(place.dir()).args(["--fork", "-f", "qcow2", "-k"]).arg(&socket);
    // A bitmap that records can only be shown by a server that writes.
    server.args(if auto { &[][..] } else { &["-r"] }).args(["-B", name, &copy]);
    let output = server.output().expect("qemu-nbd is installed");
    assert!(output.status.success(), "qemu-nbd: {}", String::from_utf8_lossy(&output.stderr));
    let server =
        format!("driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}", socket.display());
    let (map, _) = qemu_img_json(place.dir(), &["map", "--output=json", "--image-opts", &server]);
    let extents = map.as_array().expect("extents").iter();
    merged(extents.filter(|extent| extent["data"] == false).map(|extent| {
        ByteRange::new(extent["start"].as_u64().expect("start"), extent["length"].as_u64().expect("length"))
    }))
}

fn merged(ranges: impl IntoIterator<Item = ByteRange>) -> Vec<ByteRange> {
    let mut all: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if last.end() >= range.offset() => {
                *last = ByteRange::between(last.offset(), last.end().max(range.end()));
            }
            _ => all.push(range),
        }
    }
    all
}

fn granules(dirty: &[ByteRange], granularity: u64, size: u64) -> Vec<ByteRange> {
    merged(dirty.iter().map(|range| range.align_out(granularity).intersect(ByteRange::new(0, size))))
}

fn ours(memory: &MemoryStorage, name: &str) -> disk::Result<Vec<ByteRange>> {
    run(async {
        let header = Header::read(&memory.handle()).await?;
        read_bitmap(&memory.handle(), &header, name).await
    })
}

fn assert_clean(memory: &MemoryStorage) {
    let report = run(check(&memory.handle(), None, &mut |_, _| {})).expect("check");
    assert!(report.is_clean(), "{:?}", report.findings);
}

async fn open(memory: &MemoryStorage) -> Rc<Image> {
    Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open")
}

fn disk_of(image: &Rc<Image>) -> DiskHandle {
    DiskHandle::new(LayerDisk::new(LayerHandle::from_rc(Rc::clone(image)), None))
}

/// Sorted ranges within the disk that do not overlap; some of them touch.
fn random_ranges(rng: &mut fastrand::Rng, size: u64) -> Vec<ByteRange> {
    let mut ends: Vec<u64> = (0..2 * rng.u64(..12)).map(|_| rng.u64(..=size)).collect();
    if rng.u8(..4) == 0 {
        ends.extend([0, rng.u64(..=size)]);
    }
    if rng.u8(..4) == 0 {
        ends.extend([rng.u64(..=size), size]);
    }
    ends.sort_unstable();
    let step = 1 + usize::from(rng.bool());
    let pairs = ends.windows(2).step_by(step).map(|pair| ByteRange::between(pair[0], pair[1]));
    pairs.filter(|range| !range.is_empty()).collect()
}

#[test]
fn bitmaps_of_qemu_are_read_as_qemu_reads_them() {
    let kinds = [
        ("cluster_size=64k", "512", 64 << 20),
        ("cluster_size=64k", "64k", (64 << 20) + 1536),
        ("cluster_size=512", "512", (8 << 20) + 512),
        ("cluster_size=1k", "4k", 5 << 20),
        ("cluster_size=2M", "1M", (300 << 20) + 512),
        ("extended_l2=on,cluster_size=16k", "2k", 32 << 20),
        ("cluster_size=4k", "512", 4 << 30),
    ];
    for (seed, (options, granularity, size)) in kinds.into_iter().enumerate() {
        let place = Place::new();
        let mut rng = fastrand::Rng::with_seed(seed as u64);
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", &size.to_string()]);
        qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", granularity, "x.qcow2", "empty"]);
        qemu_img_ok(place.dir(), &["bitmap", "--disable", "x.qcow2", "empty"]);
        qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", granularity, "x.qcow2", "b"]);
        let mut writes: Vec<String> = (0..40)
            .map(|_| {
                let len = rng.u64(1..=256) * 512;
                format!("write -z {} {len}", rng.u64(..=(size - len) / 512) * 512)
            })
            .collect();
        writes.push(format!("write -z {} 512", size - 512));
        writes.push("write -z 0 1M".to_owned());
        qemu_io(place.dir(), "x.qcow2", &writes.iter().map(String::as_str).collect::<Vec<_>>());
        let (memory, _) = load(&place.path("x.qcow2"));
        let found = ours(&memory, "b").expect("read");
        assert!(found.len() > 2 && found.last().is_some_and(|range| range.end() == size), "{options}");
        assert_eq!(found, by_qemu(&place, "x.qcow2", "b", true), "{options}");
        assert_eq!(ours(&memory, "empty").expect("read"), []);
        assert_eq!(ours(&memory, "absent").expect_err("absent").kind(), ErrorKind::NotFound);
        // Whoever writes without keeping it makes it useless.
        run(async {
            let image = open(&memory).await;
            disk_of(&image).write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.expect("write");
        });
        assert_eq!(ours(&memory, "b").expect_err("in use").kind(), ErrorKind::Invalid);
        assert_eq!(ours(&memory, "empty").expect("frozen"), []);
        memory.tamper(|bytes| bytes.write(88, &[0; 8]));
        assert_eq!(ours(&memory, "empty").expect_err("disowned").kind(), ErrorKind::NotFound);
    }
}

#[test]
fn stored_bitmaps_are_read_by_qemu() {
    let place = Place::new();
    seeds::each(40, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = [rng.u64(1..5000) * 512, (1 << 30) + 512][rng.usize(..2)];
        let cluster_bits = [9, 12, 16, 21][rng.usize(..4)];
        let options = CreateOptions {
            cluster_size: 1 << cluster_bits,
            refcount_bits: [1, 16, 64][rng.usize(..3)],
            lazy_refcounts: rng.bool(),
            ..CreateOptions::new(size)
        };
        let memory = MemoryStorage::new(0);
        run(qcow2::create(&memory.handle(), None, &options)).expect("create");
        memory.write_to(&place.path("x.qcow2")).expect("file");
        // Some of QEMU's beside ours.
        let foreign = rng.bool();
        if foreign {
            qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "4k", "x.qcow2", "foreign"]);
            qemu_io(place.dir(), "x.qcow2", &["write 0 512"]);
            qemu_img_ok(place.dir(), &["bitmap", "--disable", "x.qcow2", "foreign"]);
        }
        let (memory, _) = load(&place.path("x.qcow2"));
        let bytes: Vec<u8> = (0..size.min(20_000)).map(|n| n as u8 | 1).collect();
        let mut expected = Vec::new();
        run(async {
            let image = open(&memory).await;
            let disk = disk_of(&image);
            for (name, auto) in [("a", false), ("b", true), ("a", rng.bool()), ("c", false)] {
                if rng.bool() {
                    disk.write(0, Buf::copy_of(&bytes), WriteFlags::default()).await.expect("write");
                    // Which the bitmaps that record do not know of.
                    expected.retain(|(_, _, auto, _)| !auto);
                }
                let least = if size > 1 << 29 { 4096 } else { 512 };
                let granularity = least << rng.u32(..8);
                let dirty = random_ranges(&mut rng, size);
                image.store_bitmap(&NewBitmap { name, granularity, auto }, &dirty).await.expect("store");
                expected.retain(|(other, ..)| *other != name);
                expected.push((name, granularity, auto, granules(&dirty, granularity, size)));
            }
            if rng.bool() {
                disk.close().await.expect("close");
            }
        });
        for (name, granularity, auto, dirty) in &expected {
            assert_eq!(&ours(&memory, name).expect("read"), dirty, "{name}, granules of {granularity} bytes");
            memory.write_to(&place.path("x.qcow2")).expect("file");
            assert_eq!(&by_qemu(&place, "x.qcow2", name, *auto), dirty, "{name}, granules of {granularity} bytes");
        }
        assert_clean(&memory);
        memory.write_to(&place.path("x.qcow2")).expect("file");
        qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        if foreign {
            assert_eq!(ours(&memory, "foreign").expect("kept"), [ByteRange::new(0, size.min(4096))]);
            assert_eq!(by_qemu(&place, "x.qcow2", "foreign", false), [ByteRange::new(0, size.min(4096))]);
        }
        // QEMU goes on with it: a bitmap that records sees the write.
        if let Some((name, granularity, _, dirty)) = expected.iter().find(|(_, _, auto, _)| *auto) {
            qemu_io(place.dir(), "x.qcow2", &["write 0 512"]);
            let mut more = vec![ByteRange::new(0, 512)];
            more.extend(dirty);
            assert_eq!(ours(&load(&place.path("x.qcow2")).0, name).expect("read"), granules(&more, *granularity, size));
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        }
    });
}

/// An image with data, a frozen bitmap and a recording one of QEMU's.
fn with_bitmaps(place: &Place, cluster_size: &str) -> MemoryStorage {
    let options = format!("cluster_size={cluster_size}");
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", &options, "x.qcow2", "2M"]);
    qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "512", "x.qcow2", "frozen"]);
    qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "4k", "x.qcow2", "recording"]);
    qemu_io(place.dir(), "x.qcow2", &["write -P 3 1M 300k", "write -P 4 12k 512"]);
    qemu_img_ok(place.dir(), &["bitmap", "--disable", "x.qcow2", "frozen"]);
    load(&place.path("x.qcow2")).0
}

#[test]
fn storing_changes_no_byte_of_the_guests_and_leaves_other_bitmaps_true() {
    let place = Place::new();
    let memory = with_bitmaps(&place, "64k");
    let flags = |memory: &MemoryStorage| {
        run(async {
            let header = Header::read(&memory.handle()).await.expect("header");
            let directory = BitmapDirectory::read(&memory.handle(), &header).await.expect("directory");
            let bitmaps = directory.bitmaps.iter();
            bitmaps.map(|b| (b.name_text().into_owned(), b.auto, b.in_use)).collect::<Vec<_>>()
        })
    };
    let entry = |name: &str, auto, in_use| (name.to_owned(), auto, in_use);
    let (frozen, recording) = (ours(&memory, "frozen").expect("read"), ours(&memory, "recording").expect("read"));
    let mark = HistoryMark { lineage: [1; 16], moment: [2; 16] };
    let dirty = [ByteRange::new(5000, 100)];
    run(async {
        let image = open(&memory).await;
        let layer = LayerHandle::from_rc(Rc::clone(&image));
        assert!(layer.set_history_mark(Some(mark)).await.expect("marked"));
        layer.close().await.expect("close");
        let image = open(&memory).await;
        image.store_bitmap(&NewBitmap { name: "new", granularity: 512, auto: true }, &dirty).await.expect("store");
        assert_eq!(image.header().history_mark(), Some(mark), "the guest's bytes are as they were");
        assert_eq!(image.header(), Header::read(&memory.handle()).await.expect("header"));
    });
    let expected = [entry("frozen", false, false), entry("recording", true, false), entry("new", true, false)];
    assert_eq!(flags(&memory), expected);
    assert_eq!(ours(&memory, "frozen").expect("read"), frozen);
    assert_eq!(ours(&memory, "recording").expect("read"), recording);
    memory.write_to(&place.path("y.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["compare", "x.qcow2", "y.qcow2"]);
    // The next write in the same opening is announced, even behind one that was announced before.
    run(async {
        let image = open(&memory).await;
        let write = async |at| {
            disk_of(&image).write(at, Buf::copy_of(&[9; 512]), WriteFlags::default()).await.expect("write");
        };
        write(0).await;
        image.store_bitmap(&NewBitmap { name: "new", granularity: 512, auto: true }, &dirty).await.expect("store");
        assert_eq!(flags(&memory)[2], entry("new", true, false));
        write(0).await;
        assert_eq!(flags(&memory)[2], entry("new", true, true), "an in-place write is announced");
        disk_of(&image).close().await.expect("close");
    });
    assert_eq!(flags(&memory)[..2], [entry("frozen", false, false), entry("recording", true, true)]);
    assert_clean(&memory);
}

#[test]
fn a_replaced_bitmap_gives_its_space_back() {
    let memory = MemoryStorage::new(0);
    let size = 1 << 30;
    run(async {
        let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(size) };
        qcow2::create(&memory.handle(), None, &options).await.expect("create");
        let image = open(&memory).await;
        let mut sizes = Vec::new();
        for round in 0..20 {
            let dirty: Vec<_> = (0..100).map(|n| ByteRange::new(n * 10_000_000 + round * 512, 512)).collect();
            image.store_bitmap(&NewBitmap { name: "b", granularity: 512, auto: false }, &dirty).await.expect("store");
            sizes.push(memory.to_vec().len());
        }
        assert!(sizes[19] <= sizes[2], "{sizes:?}");
    });
    assert_clean(&memory);
    // All ones and all zeroes need no data.
    run(async {
        let image = open(&memory).await;
        let all = [ByteRange::new(0, size)];
        image.store_bitmap(&NewBitmap { name: "b", granularity: 512, auto: false }, &all).await.expect("store");
    });
    assert_eq!(ours(&memory, "b").expect("read"), [ByteRange::new(0, size)]);
    assert_clean(&memory);
}

#[test]
fn what_cannot_be_stored_is_refused_and_changes_nothing() {
    let memory = MemoryStorage::new(0);
    let size = 1 << 20;
    run(qcow2::create(&memory.handle(), None, &CreateOptions::new(size))).expect("create");
    let before = memory.to_vec();
    let good = NewBitmap { name: "b", granularity: 4096, auto: false };
    let long = "n".repeat(1024);
    let range = ByteRange::new;
    run(async {
        let image = open(&memory).await;
        for (bitmap, dirty) in [
            (NewBitmap { name: "", ..good }, vec![]),
            (NewBitmap { name: &long, ..good }, vec![]),
            (NewBitmap { name: "a\0b", ..good }, vec![]),
            (NewBitmap { granularity: 256, ..good }, vec![]),
            (NewBitmap { granularity: 5000, ..good }, vec![]),
            (NewBitmap { granularity: 0, ..good }, vec![]),
            (NewBitmap { granularity: 1 << 32, ..good }, vec![]),
            (good, vec![range(0, size + 1)]),
            (good, vec![range(4096, 10), range(0, 10)]),
            (good, vec![range(0, 10), range(5, 10)]),
            (good, vec![range(7, 0)]),
        ] {
            let error = image.store_bitmap(&bitmap, &dirty).await.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bitmap:?} {dirty:?}");
        }
        let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
        let image = Image::open(memory.handle(), None, read_only).await.expect("open");
        assert_eq!(image.store_bitmap(&good, &[]).await.expect_err("refused").kind(), ErrorKind::ReadOnly);
    });
    assert!(before == memory.to_vec());
    for options in [
        CreateOptions { version: 2, ..CreateOptions::new(size) },
        CreateOptions {
            cluster_size: 512,
            backing: Some(qcow2::BackingRef { name: "n".repeat(330), format: Some("raw".to_owned()) }),
            ..CreateOptions::new(size)
        },
    ] {
        let memory = MemoryStorage::new(0);
        run(qcow2::create(&memory.handle(), None, &options)).expect("create");
        let before = memory.to_vec();
        run(async {
            let image = open(&memory).await;
            assert_eq!(image.store_bitmap(&good, &[]).await.expect_err("refused").kind(), ErrorKind::Unsupported);
            disk_of(&image).write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.expect("goes on");
            assert!(before != memory.to_vec());
        });
    }
}

#[test]
fn an_extension_is_used_again_wherever_it_stands() {
    let place = Place::new();
    let new = NewBitmap { name: "new", granularity: 4096, auto: false };
    let dirty = [ByteRange::new(8192, 4096)];
    // The data file's name decides where the bitmaps extension stands: once it lies across a sector's end.
    for len in (8..=136).step_by(8) {
        let data = "d".repeat(len);
        let option = format!("cluster_size=64k,data_file={data}");
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", &option, "x.qcow2", "1M"]);
        qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "4k", "x.qcow2", "foreign"]);
        for disowned in [false, true] {
            let (memory, _) = load(&place.path("x.qcow2"));
            if disowned {
                memory.tamper(|bytes| bytes.write(88, &[0; 8]));
            }
            let (data_file, _) = load(&place.path(&data));
            run(async {
                let image = Image::open(memory.handle(), Some(data_file.handle()), OpenOptions::default());
                let image = image.await.expect("open");
                image.store_bitmap(&new, &dirty).await.expect("store");
                assert_eq!(image.header(), Header::read(&memory.handle()).await.expect("header"));
                disk::Layer::close(&*image).await.expect("close");
            });
            assert_eq!(ours(&memory, "new").expect("read"), dirty, "{len}");
            match ours(&memory, "foreign") {
                Ok(found) => assert!(!disowned && found.is_empty()),
                Err(error) => assert!(disowned && error.kind() == ErrorKind::NotFound, "{error:?}"),
            }
            let report = run(check(&memory.handle(), None, &mut |_, _| {})).expect("check");
            let leaks = if disowned { 3 } else { 0 }; // What the bitmap had that nobody may use.
            assert!(report.corruptions == 0 && report.leaks <= leaks, "{:?}", report.findings);
            memory.write_to(&place.path("y.qcow2")).expect("file");
            let (info, _) = qemu_img_json(place.dir(), &["info", "--output=json", "y.qcow2"]);
            let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().expect("bitmaps").len();
            assert_eq!(bitmaps, if disowned { 1 } else { 2 });
        }
        std::fs::remove_file(place.path(&data)).expect("removed");
    }
}

#[test]
fn tables_made_to_hurt() {
    let place = Place::new();
    let sound = with_bitmaps(&place, "4k");
    let (header, directory) = run(async {
        let header = Header::read(&sound.handle()).await.expect("header");
        let directory = BitmapDirectory::read(&sound.handle(), &header).await.expect("directory");
        (header, directory)
    });
    let frozen = &directory.bitmaps[0];
    let end = sound.to_vec().len() as u64;
    let text = |at: u64, bytes: &[u8]| {
        let broken = sound.named("broken");
        broken.tamper(|b| b.write(at, bytes));
        let error = ours(&broken, "frozen").expect_err("corrupt");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
        format!("{error:?}")
    };
    for entry in [2u64, 1 << 56, 4096 + 512, 4096 | 1, 0xffff_ffff_ffff_ffff] {
        assert!(text(frozen.table_offset, &entry.to_be_bytes()).contains("of the bitmap table"), "{entry:#x}");
    }
    assert!(text(frozen.table_offset, &(1u64 << 40).to_be_bytes()).contains("bitmap data"));
    let at = header.bitmaps.expect("bitmaps").directory_offset;
    assert!(text(at, &end.next_multiple_of(4096).to_be_bytes()).contains("bitmap table"));
    assert!(text(at + 8, &2u32.to_be_bytes()).contains("disk's size needs 1"));
    assert!(text(at + 17, &[0]).contains("disk's size needs 64"));
    // A granularity beyond the disk is one bit; bits behind the end mean nothing.
    let huge = sound.named("huge");
    huge.tamper(|b| b.write(at + 17, &[63]));
    huge.tamper(|b| b.write(frozen.table_offset, &1u64.to_be_bytes()));
    assert_eq!(ours(&huge, "frozen").expect("read"), [ByteRange::new(0, 2 << 20)]);

    // Whatever the bytes are: no panic, and a bitmap stored into it is read again.
    seeds::each(3000, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let broken = sound.named("broken");
        let tables = [at, frozen.table_offset, directory.bitmaps[1].table_offset, header.refcount_table_offset];
        for _ in 0..rng.u8(1..4) {
            let place = tables[rng.usize(..4)] + rng.u64(..64);
            broken.tamper(|b| b.write(place, &[rng.u8(..)]));
        }
        let _ = ours(&broken, "frozen");
        run(async {
            let Ok(image) = Image::open(broken.handle(), None, OpenOptions::default()).await else { return };
            let new = NewBitmap { name: "frozen", granularity: 4096, auto: false };
            if image.store_bitmap(&new, &[ByteRange::new(0, 512)]).await.is_ok() {
                let header = Header::read(&broken.handle()).await.expect("header");
                let found = read_bitmap(&broken.handle(), &header, "frozen").await.expect("read");
                assert_eq!(found, [ByteRange::new(0, 4096)]);
            }
        });
    });
}

#[test]
fn memory_is_bounded_whatever_the_table_says() {
    // Half a billion granules of which every other one is dirty, all told by one cluster of data.
    let memory = MemoryStorage::new(0);
    let size = 1u64 << 38;
    run(async {
        qcow2::create(&memory.handle(), None, &CreateOptions::new(size)).await.expect("create");
        let image = open(&memory).await;
        let new = NewBitmap { name: "b", granularity: 512, auto: false };
        image.store_bitmap(&new, &[ByteRange::new(0, 512)]).await.expect("store");
        let header = image.header();
        let directory = BitmapDirectory::read(&memory.handle(), &header).await.expect("directory");
        let bitmap = &directory.bitmaps[0];
        let table = bitmap.table_offset as usize;
        let entry: [u8; 8] = memory.to_vec()[table..table + 8].try_into().expect("8 bytes");
        memory.tamper(|bytes| {
            bytes.write(u64::from_be_bytes(entry), &vec![0x55; 65536]);
            (0..u64::from(bitmap.table_entries)).for_each(|n| bytes.write(bitmap.table_offset + 8 * n, &entry));
        });
        let error = read_bitmap(&memory.handle(), &header, "b").await.expect_err("too many");
        assert_eq!(error.kind(), ErrorKind::NoMemory);
        let mut ranges = BitmapRanges::open(&memory.handle(), &header, "b").await.expect("open");
        for n in 0..100_000 {
            assert_eq!(ranges.next().await.expect("read"), Some(ByteRange::new(n * 1024, 512)));
        }
    });
}

/// Everything that must hold whatever was lost: no corruption, other bitmaps as they were, and the one that was stored is
/// there as it was before or as it is now.
fn judge(
    left: &MemoryStorage,
    lazy: bool,
    kept: &[(&str, Vec<ByteRange>)],
    old: Option<&[ByteRange]>,
    new: &[ByteRange],
) {
    let report = run(check(&left.handle(), None, &mut |_, _| {})).expect("check");
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "lazy: {lazy}: {:?}", report.findings);
    for (name, dirty) in kept {
        assert_eq!(&ours(left, name).expect("kept"), dirty);
    }
    match ours(left, "new") {
        Ok(found) => assert!(found == new || Some(&found[..]) == old, "{found:?} is neither old nor new"),
        Err(error) => assert!(error.kind() == ErrorKind::NotFound && old.is_none(), "{error:?}"),
    }
}

#[test]
fn loss_of_power_leaves_the_old_bitmaps_or_the_new_ones() {
    let place = Place::new();
    let bases: Vec<_> = ["512", "4k", "64k"].into_iter().map(|size| with_bitmaps(&place, size)).collect();
    seeds::each(2000, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (memory, kept) = if rng.bool() {
            let base = &bases[rng.usize(..3)];
            let kept: Vec<_> = ["frozen", "recording"].map(|name| (name, ours(base, name).expect("read"))).into();
            (base.named("image"), kept)
        } else {
            let memory = MemoryStorage::new(0).aligned([1, 512][rng.usize(..2)]);
            let options = CreateOptions {
                cluster_size: 1 << [9, 12, 16][rng.usize(..3)],
                refcount_bits: [1, 16][rng.usize(..2)],
                lazy_refcounts: rng.bool(),
                backing: rng.bool().then(|| qcow2::BackingRef { name: "n".repeat(60), format: Some("raw".to_owned()) }),
                ..CreateOptions::new(2 << 20)
            };
            run(qcow2::create(&memory.handle(), None, &options)).expect("create");
            (memory, Vec::new())
        };
        let backing = run(Header::read(&memory.handle())).expect("header").backing;
        let lazy = run(Header::read(&memory.handle())).expect("header").lazy_refcounts();
        let new = NewBitmap { name: "new", granularity: 512, auto: rng.bool() };
        let mut old = None;
        if rng.bool() {
            let dirty = random_ranges(&mut rng, 2 << 20);
            run(async { open(&memory).await.store_bitmap(&new, &dirty).await.expect("store") });
            old = Some(granules(&dirty, 512, 2 << 20));
        }
        let storage = CrashStorage::of(memory).yielding(seed);
        let image = run(Image::open(storage.handle(), None, OpenOptions::default())).expect("open");
        let dirty = random_ranges(&mut rng, 2 << 20);
        let expected = granules(&dirty, 512, 2 << 20);
        let mut executor = Executor::new(seed);
        executor.spawn(async move {
            image.store_bitmap(&new, &dirty).await.expect("store");
            let close = disk::Layer::close(&*image);
            close.await.expect("close");
        });
        let most = [20, 60, 200][rng.usize(..3)];
        let ended = executor.run_steps(rng.u64(..most));
        let left = storage.crash(seed);
        drop(executor);
        judge(&left, lazy, &kept, old.as_deref(), &expected);
        let header = run(Header::read(&left.handle())).expect("header");
        assert_eq!(header.backing, backing);
        if ended {
            assert_eq!(ours(&left, "new").expect("durable"), expected);
            assert_clean(&left);
        }
        if seed.is_multiple_of(25) && backing.is_none() {
            left.write_to(&place.path("y.qcow2")).expect("file");
            let (report, status) = qemu_img_json(place.dir(), &["check", "--output=json", "y.qcow2"]);
            assert!(matches!(status, 0 | 3) && report.get("corruptions").is_none(), "{report}");
            for (name, dirty) in kept.iter().take(1) {
                assert_eq!(&by_qemu(&place, "y.qcow2", name, false), dirty);
            }
        }
        // And the next one is stored as if nothing had been.
        run(async {
            let again = NewBitmap { name: "new", granularity: 4096, auto: false };
            open(&left).await.store_bitmap(&again, &[ByteRange::new(8192, 1)]).await.expect("store");
        });
        assert_eq!(ours(&left, "new").expect("read"), [ByteRange::new(8192, 4096)]);
    });
}

#[test]
fn a_failure_at_any_step_leaves_the_image_sound() {
    let place = Place::new();
    let base = with_bitmaps(&place, "4k");
    let kept: Vec<_> = ["frozen", "recording"].map(|name| (name, ours(&base, name).expect("read"))).into();
    let dirty: Vec<_> = (0..50).map(|n| ByteRange::new(n * 40_000, 512)).collect();
    let expected = granules(&dirty, 512, 2 << 20);
    let new = NewBitmap { name: "new", granularity: 512, auto: false };
    for operation in [Operation::Write, Operation::Flush, Operation::Read] {
        for kind in [ErrorKind::Io, ErrorKind::NoSpace] {
            let mut failures = 0;
            for pass in 0..40 {
                let memory = base.named("image");
                run(async {
                    let image = open(&memory).await;
                    memory.fail_once(Some(operation), pass, kind);
                    let stored = image.store_bitmap(&new, &dirty).await;
                    memory.heal();
                    let Err(error) = stored else { return };
                    failures += 1;
                    assert_eq!(error.kind(), kind);
                    judge(&memory, false, &kept, None, &expected);
                    if kind == ErrorKind::NoSpace && operation == Operation::Write {
                        image.store_bitmap(&new, &dirty).await.expect("there is space again");
                        disk_of(&image).close().await.expect("close");
                        assert_clean(&memory);
                    }
                });
            }
            assert!((2..30).contains(&failures), "{operation:?} {kind:?}: {failures}");
        }
    }
    assert_ne!(run(Header::read(&base.handle())).expect("header").autoclear & AUTOCLEAR_BITMAPS, 0);
}
