//! Headers, snapshot tables and bitmap directories: as QEMU writes them, and as nobody should.

mod support;

use disk::{Buf, ErrorKind, Operation, StorageHandle};
use formats::qcow2::check::check;
use formats::qcow2::{
    BackingRef, BitmapDirectory, BitmapsExtension, Compression, CreateOptions, Header, INCOMPATIBLE_CORRUPT,
    SnapshotTable, create,
};
use support::{Place, load, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::MemoryStorage;

fn text<T: std::fmt::Debug>(result: disk::Result<T>) -> String {
    text_of(result, ErrorKind::Corrupt)
}

fn text_of<T: std::fmt::Debug>(result: disk::Result<T>, kind: ErrorKind) -> String {
    let error = result.expect_err("invalid");
    assert_eq!(error.kind(), kind, "{error:?}");
    format!("{error:?}")
}

fn put(handle: &StorageHandle, at: u64, bytes: &[u8]) {
    run(handle.write(at, Buf::copy_of(bytes))).expect("write");
}

#[test]
fn fields_are_read_as_qemu_reports_them() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    let options = "backing_file=base.qcow2,backing_fmt=qcow2,compression_type=zstd,refcount_bits=8,cluster_size=16k,\
                   extended_l2=on,lazy_refcounts=on";
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "24M"]);
    let (_, handle) = load(&place.path("x.qcow2"));
    let header = run(Header::read(&handle)).expect("header");
    assert_eq!((header.version, header.size, header.cluster_size()), (3, 24 << 20, 16 << 10));
    assert_eq!((header.refcount_bits(), header.refcount_max(), header.refcounts_per_block()), (8, 255, 16384));
    assert_eq!((header.l2_entries(), header.subclusters(), header.subcluster_size()), (1024, 32, 512));
    assert_eq!(header.l1_entries_for(header.size), 2);
    assert_eq!(header.compression, Compression::Zstd);
    assert!(header.lazy_refcounts() && header.extended_l2() && !header.is_dirty() && !header.has_data_file());
    let backing = BackingRef { name: "base.qcow2".to_owned(), format: Some("qcow2".to_owned()) };
    assert_eq!(header.backing, Some(backing));
}

#[test]
fn a_changed_header_is_read_by_qemu() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "raw", "a.raw", "1M"]);
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", "x.qcow2"]);
    for name in ["a.raw", "another/rather/long/name/that/needs/more/room.raw", "b"] {
        let (memory, handle) = load(&place.path("x.qcow2"));
        let mut header = run(Header::read(&handle)).expect("header");
        header.backing = Some(BackingRef { name: name.to_owned(), format: Some("raw".to_owned()) });
        run(header.write(&handle)).expect("written");
        assert_eq!(run(Header::read(&handle)).expect("header").backing, header.backing);
        memory.write_to(&place.path("x.qcow2")).expect("file");
        let (info, _) = qemu_img_json(place.dir(), &["info", "-U", "--output=json", "x.qcow2"]);
        assert_eq!(info["backing-filename"], name);
        assert_eq!(info["backing-filename-format"], "raw");
    }
    let (memory, handle) = load(&place.path("x.qcow2"));
    let mut header = run(Header::read(&handle)).expect("header");
    header.backing = None;
    run(header.write(&handle)).expect("written");
    memory.write_to(&place.path("x.qcow2")).expect("file");
    let (info, _) = qemu_img_json(place.dir(), &["info", "--output=json", "x.qcow2"]);
    assert!(info.get("backing-filename").is_none());
    qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
}

#[test]
fn a_change_of_fields_is_one_write_of_one_sector() {
    let memory = MemoryStorage::new(0);
    let mut header = run(create(&memory.handle(), None, &CreateOptions::new(1 << 20))).expect("created");
    let before = memory.counters();
    header.incompatible |= INCOMPATIBLE_CORRUPT;
    header.size += 512;
    run(header.write(&memory.handle())).expect("written");
    let after = memory.counters();
    assert_eq!((after.writes - before.writes, after.bytes_written - before.bytes_written), (1, 512));
    let read = run(Header::read(&memory.handle())).expect("header");
    assert_eq!(read.require_writable().expect_err("marked").kind(), ErrorKind::Corrupt);
    memory.fail_once(Some(Operation::Write), 0, ErrorKind::Io);
    run(header.write(&memory.handle())).expect_err("the fault");
}

#[test]
fn a_header_that_does_not_fit_is_refused() {
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
    let memory = MemoryStorage::new(0);
    let mut header = run(create(&memory.handle(), None, &options)).expect("created");
    header.backing = Some(BackingRef { name: "n".repeat(500), format: Some("raw".to_owned()) });
    assert!(text_of(header.encode(), ErrorKind::Invalid).contains("more than the first cluster's 512"));
    let mut with_data_file = options.clone();
    with_data_file.data_file = Some("d".repeat(600));
    let data = MemoryStorage::new(0);
    let error = text_of(run(create(&memory.handle(), Some(&data.handle()), &with_data_file)), ErrorKind::Invalid);
    assert!(error.contains("more than the first cluster's 512"), "{error}");
    run(Header::read(&memory.handle())).expect("the old image is untouched");
}

#[test]
fn backing_names_made_to_hurt() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "x.qcow2", "1M"]);
    for (offset, len) in [(512u64, 1024u32), (65_530, 100), (1 << 40, 5), (16, 5), (u64::MAX, u32::MAX)] {
        let (_, handle) = load(&place.path("x.qcow2"));
        put(&handle, 8, &offset.to_be_bytes());
        put(&handle, 16, &len.to_be_bytes());
        assert!(text(run(Header::read(&handle))).contains("backing file's name"), "{offset} {len}");
    }
    let (_, handle) = load(&place.path("x.qcow2"));
    put(&handle, 8, &2048u64.to_be_bytes());
    put(&handle, 16, &4u32.to_be_bytes());
    put(&handle, 2048, &[0xff, 0xfe, b'a', b'b']);
    assert_eq!(run(Header::read(&handle)).expect_err("not UTF-8").kind(), ErrorKind::Unsupported);
}

#[test]
fn snapshots_are_read_and_written_as_by_qemu() {
    for options in ["compat=1.1", "compat=0.10"] {
        let place = Place::new();
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "8M"]);
        for name in ["one", "a name with spaces and ümlauts", "three"] {
            qemu_img_ok(place.dir(), &["snapshot", "-c", name, "x.qcow2"]);
            qemu_io(place.dir(), "x.qcow2", &["write 0 1M"]);
        }
        let (memory, handle) = load(&place.path("x.qcow2"));
        let header = run(Header::read(&handle)).expect("header");
        let table = run(SnapshotTable::read(&handle, &header)).expect("snapshots");
        let names: Vec<_> = table.snapshots.iter().map(|s| s.name_text().into_owned()).collect();
        assert_eq!(names, ["one", "a name with spaces and ümlauts", "three"]);
        assert_eq!(table.find("2"), Some(&table.snapshots[1]), "by ID");
        assert_eq!(table.find("three").expect("by name").disk_size_or(0), 8 << 20);
        table.snapshots.iter().for_each(|s| s.validate_l1(&header, handle.size()).expect("sound"));
        let bytes = table.encode().expect("encoded");
        let stored = memory.to_vec()[header.snapshots_offset as usize..][..bytes.len()].to_vec();
        assert_eq!(bytes.len() as u64, table.size);
        assert!(bytes == stored, "the table comes out as it was read");
    }
}

#[test]
fn snapshot_tables_made_to_hurt() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "x.qcow2", "8M"]);
    qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
    let broken = |at: u64, bytes: &[u8]| {
        let (_, handle) = load(&place.path("x.qcow2"));
        let header = run(Header::read(&handle)).expect("header");
        put(&handle, header.snapshots_offset + at, bytes);
        let report = run(check(&handle, None, &mut |_, _| {})).expect("checked");
        assert!(report.check_errors > 0, "the checker says so, too: {report:?}");
        text(run(SnapshotTable::read(&handle, &header)))
    };
    assert!(broken(36, &0x1000u32.to_be_bytes()).contains("extra data"));
    let (_, handle) = load(&place.path("x.qcow2"));
    let mut header = run(Header::read(&handle)).expect("header");
    header.snapshots_offset = handle.size().next_multiple_of(65536);
    assert!(text(run(SnapshotTable::read(&handle, &header))).contains("beyond the end"));
    header = run(Header::read(&handle)).expect("header");
    let mut snapshot = run(SnapshotTable::read(&handle, &header)).expect("snapshots").snapshots.remove(0);
    for (offset, entries, says) in
        [(512, 1, "not aligned"), (0, 1, "header's cluster"), (1 << 40, 1, "beyond"), (65536, 1 << 23, "bound")]
    {
        (snapshot.l1_offset, snapshot.l1_entries) = (offset, entries);
        let error = snapshot.validate_l1(&header, handle.size()).expect_err(says);
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn bitmap_directories_made_to_hurt() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "x.qcow2", "8M"]);
    for name in ["b1", "b2"] {
        qemu_img_ok(place.dir(), &["bitmap", "--add", "x.qcow2", name]);
    }
    let (_, handle) = load(&place.path("x.qcow2"));
    let header = run(Header::read(&handle)).expect("header");
    let sound = header.bitmaps.expect("bitmaps");
    let with = |change: fn(&mut BitmapsExtension)| {
        let mut header = header.clone();
        change(header.bitmaps.as_mut().expect("bitmaps"));
        text(run(BitmapDirectory::read(&handle, &header)))
    };
    assert!(with(|b| b.count = 0).contains("bitmaps extension"));
    assert!(with(|b| b.count = 65536).contains("bitmaps extension"));
    assert!(with(|b| b.directory_offset += 512).contains("bitmaps extension"));
    assert!(with(|b| b.directory_offset = 1 << 40).contains("bitmaps extension"));
    assert!(with(|b| b.directory_size = 1 << 40).contains("bitmaps extension"));
    assert!(with(|b| b.count = 1).contains("entries fill 32"));
    assert!(with(|b| b.count = 3).contains("beyond the directory") || with(|b| b.count = 3).contains("extension"));
    let entry = |at: u64, bytes: &[u8]| {
        let (_, handle) = load(&place.path("x.qcow2"));
        put(&handle, sound.directory_offset + at, bytes);
        text(run(BitmapDirectory::read(&handle, &header)))
    };
    assert!(entry(15, &[0x80]).contains("reserved flags"));
    assert!(entry(16, &[2]).contains("type"));
    assert!(entry(17, &[64]).contains("granularity"));
    assert!(entry(18, &[0, 0]).contains("name is empty"));
    assert!(entry(20, &[0xff; 4]).contains("beyond the directory"));
    assert!(entry(7, &[1]).contains("not aligned"));
    assert!(entry(8, &[0; 4]).contains("empty or too large"));
    assert!(entry(25, b"2").contains("same name"));
}
