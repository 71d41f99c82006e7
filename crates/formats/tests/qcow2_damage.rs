//! Images with random damage, and images made to hurt.

mod support;

use disk::{Buf, ErrorKind, StorageHandle};
use formats::qcow2::check::{RepairMode, check, repair};
use formats::qcow2::{Header, SnapshotTable};
use support::{Place, load, qemu_img, qemu_img_ok, qemu_io, run};
use testkit::MemoryStorage;

/// A small image with all kinds of tables in it.
fn rich_image(place: &Place, options: &str) {
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "src.qcow2", "4M"]);
    qemu_io(place.dir(), "src.qcow2", &["write -P 1 0 300k", "write -P 2 1M 200k"]);
    qemu_img_ok(place.dir(), &["convert", "-c", "-O", "qcow2", "-o", options, "src.qcow2", "x.qcow2"]);
    qemu_io(place.dir(), "x.qcow2", &["write -P 3 2M 200k", "write -z 3M 64k"]);
    qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
    qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "512", "x.qcow2", "b"]);
    qemu_io(place.dir(), "x.qcow2", &["write -P 4 2100k 200k", "write -P 5 3500k 64k"]);
}

/// `qemu-img check`: sound, damaged, or not to be opened.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Verdict {
    Sound,
    Leaks,
    Corrupt,
    Refused,
}

fn verdict_of_qemu(place: &Place, name: &str) -> Verdict {
    let output = qemu_img(place.dir(), &["check", "-f", "qcow2", "--output=json", name]);
    match output.status.code() {
        Some(0) => Verdict::Sound,
        Some(2) => Verdict::Corrupt,
        Some(3) => Verdict::Leaks,
        _ => Verdict::Refused,
    }
}

#[test]
fn random_damage_never_escapes_us_when_qemu_sees_it() {
    let place = Place::new();
    let (mut corrupt, mut refused, mut repaired, mut sound) = (0, 0, 0, 0);
    for options in ["cluster_size=4k", "cluster_size=512,refcount_bits=8", "extended_l2=on,cluster_size=16k"] {
        rich_image(&place, options);
        let (original, handle) = load(&place.path("x.qcow2"));
        let header = run(Header::read(&handle)).expect("header");
        let cluster = header.cluster_size();
        // Damage goes where tables are: the header's fields, L1, L2, refcounts, snapshots, bitmaps.
        let be64 = |at: u64| -> u64 {
            u64::from_be_bytes(run(handle.read_new(at, 8)).expect("read")[..].try_into().expect("8 bytes"))
        };
        let mut targets = vec![0, header.l1_offset, header.refcount_table_offset, be64(header.refcount_table_offset)];
        targets.push(header.snapshots_offset);
        targets.push(header.bitmaps.expect("bitmaps").directory_offset);
        targets.push(be64(header.bitmaps.expect("bitmaps").directory_offset));
        let snapshots = run(SnapshotTable::read(&handle, &header)).expect("snapshots");
        targets.push(snapshots.snapshots[0].l1_offset);
        for index in 0..u64::from(header.l1_entries) {
            let l2 = be64(header.l1_offset + 8 * index) & 0x00ff_ffff_ffff_fe00;
            if l2 != 0 {
                targets.push(l2);
            }
        }
        for seed in 0..60 {
            let mut random = fastrand::Rng::with_seed(seed);
            let memory = MemoryStorage::of(original.snapshot());
            let handle = memory.handle();
            for _ in 0..random.u32(1..4) {
                let target = targets[random.usize(..targets.len())];
                let near = if random.bool() { 128 } else { cluster };
                let at = target + random.u64(..near / 8) * 8 + random.u64(..8);
                let byte = [random.u8(..), 0, 0xff, 1 << random.u32(..8)][random.usize(..4)];
                run(handle.write(at, Buf::copy_of(&[byte]))).expect("write");
            }
            memory.write_to(&place.path("d.qcow2")).expect("file");
            let theirs = verdict_of_qemu(&place, "d.qcow2");
            let ours = run(check(&handle, None, &mut |_, _| {}));
            let context = format!("{options}, seed {seed}: qemu {theirs:?}, we {ours:?}");
            match (&ours, theirs) {
                (Err(_), Verdict::Refused) => refused += 1,
                // What QEMU does not look at, or repairs in memory while it opens.
                (Err(error), _) => assert!(
                    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::NoMemory),
                    "{context}"
                ),
                (Ok(report), Verdict::Sound) => sound += u32::from(report.is_clean()),
                (Ok(report), Verdict::Leaks) => assert!(!report.is_clean(), "{context}"),
                (Ok(report), Verdict::Corrupt) => {
                    corrupt += 1;
                    assert!(report.corruptions > 0 || report.check_errors > 0, "{context}");
                }
                (Ok(_), Verdict::Refused) => {}
            }
            let Ok(report) = run(repair(&handle, None, RepairMode::All, &mut |_, _| {})) else { continue };
            if report.is_clean() {
                memory.write_to(&place.path("d.qcow2")).expect("file");
                let after = verdict_of_qemu(&place, "d.qcow2");
                // QEMU may still refuse what neither side calls corruption (a name, an unknown feature).
                if theirs != Verdict::Refused {
                    assert_eq!(after, Verdict::Sound, "{context}: after our repair");
                }
                repaired += 1;
            }
        }
    }
    // The damage must do what it is for.
    assert!(corrupt > 30 && repaired > 30 && refused > 1 && sound > 3, "{corrupt} {repaired} {refused} {sound}");
}

/// Bytes of the header and where they stand.
type Fields<'a> = &'a [(usize, &'a [u8])];

/// A version 3 header with these fields, in a file of `size` bytes.
fn hostile(size: u64, fields: Fields<'_>) -> (MemoryStorage, StorageHandle) {
    let memory = MemoryStorage::new(size);
    let handle = memory.handle();
    let mut header = vec![0; 112];
    let mut set = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, b"QFI\xfb");
    set(4, &3u32.to_be_bytes());
    set(20, &16u32.to_be_bytes());
    set(24, &(1u64 << 30).to_be_bytes());
    set(36, &2u32.to_be_bytes());
    set(40, &0x30000u64.to_be_bytes());
    set(48, &0x10000u64.to_be_bytes());
    set(56, &1u32.to_be_bytes());
    set(96, &4u32.to_be_bytes());
    set(100, &112u32.to_be_bytes());
    for (at, bytes) in fields {
        set(*at, bytes);
    }
    run(handle.write(0, Buf::copy_of(&header))).expect("write");
    (memory, handle)
}

#[test]
fn headers_made_to_hurt_are_refused() {
    let cases: [(&str, Fields<'_>, &str); 26] = [
        ("magic", &[(0, b"QFI\xfa")], "magic"),
        ("version", &[(4, &[0, 0, 0, 4])], "version 4"),
        ("cluster_bits small", &[(20, &[0, 0, 0, 8])], "cluster_bits"),
        ("cluster_bits large", &[(20, &[0, 0, 0, 22])], "cluster_bits"),
        ("cluster_bits huge", &[(20, &[0xff; 4])], "cluster_bits"),
        ("refcount_order", &[(96, &[0, 0, 0, 7])], "refcount_order"),
        ("header length", &[(100, &[0, 0, 0, 103])], "header length"),
        ("header length beyond", &[(100, &[0, 2, 0, 0])], "header length"),
        ("AES", &[(32, &[0, 0, 0, 1])], "AES"),
        ("LUKS", &[(32, &[0, 0, 0, 2])], "LUKS"),
        ("unknown bit", &[(72, &[0x40, 0, 0, 0, 0, 0, 0, 0])], "bit 62"),
        ("compression type", &[(104, &[2])], "compression type 2"),
        ("compression without its bit", &[(104, &[1])], "compression type 1"),
        ("compression bit alone", &[(79, &[8])], "compression type 0"),
        ("extended L2 with 8k clusters", &[(79, &[16]), (23, &[13])], "extended L2"),
        ("raw data without a file", &[(95, &[2])], "raw external data"),
        ("L1 too large", &[(36, &[0, 0x40, 0, 1])], "L1 table"),
        ("L1 unaligned", &[(47, &[1])], "L1 table"),
        ("L1 beyond the end", &[(40, &[0x10])], "L1 table"),
        ("L1 too small", &[(36, &[0, 0, 0, 1])], "1 entries"),
        ("disk too large", &[(24, &[0x7f])], "more than an L1 table"),
        ("refcount table too large", &[(56, &[0, 0, 0, 129])], "refcount table"),
        ("refcount table beyond the end", &[(50, &[1])], "refcount table"),
        ("no refcount table", &[(56, &[0, 0, 0, 0])], "no refcount table"),
        ("refcount table in the header", &[(48, &[0; 8])], "header's cluster"),
        ("too many snapshots", &[(60, &[0, 1, 0, 1])], "snapshots"),
    ];
    for (name, fields, says) in cases {
        let (_, handle) = hostile(1 << 20, fields);
        let error = run(Header::read(&handle)).expect_err(name);
        let text = format!("{error:?}");
        assert!(text.contains(says), "{name}: {text}");
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{name}: {text}");
    }
    let (_, handle) = hostile(1 << 20, &[]);
    run(Header::read(&handle)).expect("sound without a change");
    for size in [0, 3, 7, 71, 103, 111] {
        let (memory, handle) = hostile(1 << 20, &[]);
        memory.tamper(|bytes| *bytes = testkit::SparseBytes::new(0));
        run(handle.write(0, Buf::copy_of(&b"QFI\xfb\0\0\0\x03"[..size.min(8)]))).expect("write");
        run(handle.set_size(size as u64)).expect("size");
        run(Header::read(&handle)).expect_err("truncated");
    }
}

#[test]
fn an_unknown_feature_is_called_by_the_images_name_for_it() {
    let (_, handle) = hostile(1 << 20, &[(79, &[1 << 6])]);
    let mut extension = vec![0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 48, 0, 6];
    extension.extend(b"time travel\x1b[31m");
    extension.resize(8 + 48, 0);
    run(handle.write(112, Buf::copy_of(&extension))).expect("write");
    let text = run(Header::read(&handle)).expect_err("unknown feature").to_string();
    assert!(text.contains("\"time travel[31m\" (bit 6)"), "{text}");
}

#[test]
fn extensions_made_to_hurt() {
    let over = |bytes: &[u8]| {
        let (_, handle) = hostile(1 << 20, &[]);
        run(handle.write(112, Buf::copy_of(bytes))).expect("write");
        run(Header::read(&handle))
    };
    let text = |r: disk::Result<Header>| format!("{:?}", r.expect_err("invalid"));
    assert!(text(over(&[1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff])).contains("beyond the header's area"));
    assert!(text(over(&[0x23, 0x85, 0x28, 0x75, 0, 0, 0, 8])).contains("does not allow"));
    assert!(text(over(&[0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16])).contains("encrypted"));
    let twice: Vec<u8> = [[0x44, 0x41, 0x54, 0x41, 0, 0, 0, 0]; 2].concat();
    assert!(text(over(&twice)).contains("more than once"));
    let many: Vec<u8> = [[9, 9, 9, 9, 0, 0, 0, 0]; 1000].concat();
    assert!(text(over(&many)).contains("256 extensions"));
    let some: Vec<u8> = [[9, 9, 9, 9, 0, 0, 0, 0]; 100].concat();
    assert_eq!(over(&some).expect("unknown ones may repeat").unknown_extensions.len(), 100);
}

#[test]
fn tables_made_to_hurt_end_within_bounds() {
    // 4 Mi L1 entries for one L2 table that refers to itself: counted once, multiplied.
    let (_, handle) = hostile(64 << 20, &[(36, &[0, 0x40, 0, 0])]);
    let entry = ((0x10_0000u64 * 35) | (1 << 63)).to_be_bytes();
    let l1 = Buf::copy_of(&entry.repeat(4 << 20));
    run(handle.write(0x30000, l1)).expect("write");
    run(handle.write(0x10_0000 * 35, Buf::copy_of(&entry.repeat(8192)))).expect("write");
    let report = run(check(&handle, None, &mut |_, _| {})).expect("ends");
    assert!(report.corruptions > 0);
    assert!(report.findings.len() <= 1000);
    // 65536 snapshots with 32 MiB of L1 table each, all over one another.
    let (_, handle) = hostile(256 << 20, &[(60, &[0, 1, 0, 0]), (64, &0x80000u64.to_be_bytes())]);
    let mut snapshots = Vec::new();
    for index in 0..65536u64 {
        snapshots.extend((0x100_0000 + (index % 1024) * 0x10000).to_be_bytes());
        snapshots.extend(0x40_0000u32.to_be_bytes());
        snapshots.extend([0; 28]);
    }
    run(handle.write(0x80000, Buf::copy_of(&snapshots))).expect("write");
    let report = run(check(&handle, None, &mut |_, _| {})).expect("ends");
    assert!(report.check_errors > 0, "{report:?}");
    let after = run(repair(&handle, None, RepairMode::All, &mut |_, _| {})).expect("ends");
    assert!(!after.is_clean(), "what could not be walked must not be called mended");
    // A file of 8 EiB without contents.
    let (_, handle) = hostile(1 << 62, &[]);
    assert_eq!(run(check(&handle, None, &mut |_, _| {})).expect_err("too many clusters").kind(), ErrorKind::NoMemory);
}
