//! The checker beside `qemu-img check`, on sound images and on images broken in every way that it knows.

mod support;

use disk::{Buf, StorageHandle};
use formats::qcow2::check::{CheckReport, RepairMode, check, repair};
use formats::qcow2::{Corruption, Header, L2Rule, SnapshotTable, Table};
use support::{Place, load, qemu_img, qemu_img_ok, qemu_io, run};
use testkit::{CrashStorage, MemoryStorage};

/// `qemu-img check`'s counters, or `None` when it cannot check at all.
#[derive(Debug, PartialEq, Eq)]
struct ByQemu {
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
    image_end_offset: u64,
    total: u64,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
}

fn by_qemu(place: &Place, name: &str) -> Option<ByQemu> {
    let output = qemu_img(place.dir(), &["check", "-f", "qcow2", "--output=json", name]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let number = |key: &str| json[key].as_u64().unwrap_or(0);
    Some(ByQemu {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        check_errors: number("check-errors"),
        image_end_offset: number("image-end-offset"),
        total: number("total-clusters"),
        allocated: number("allocated-clusters"),
        fragmented: number("fragmented-clusters"),
        compressed: number("compressed-clusters"),
    })
}

fn ours(report: &CheckReport) -> ByQemu {
    ByQemu {
        corruptions: report.corruptions,
        leaks: report.leaks,
        check_errors: report.check_errors,
        image_end_offset: report.image_end_offset,
        total: report.total_clusters,
        allocated: report.allocated_clusters,
        fragmented: report.fragmented_clusters,
        compressed: report.compressed_clusters,
    }
}

fn check_now(handle: &StorageHandle) -> CheckReport {
    run(check(handle, None, &mut |_, _| {})).unwrap_or_else(|e| panic!("{e:?}"))
}

fn repair_now(handle: &StorageHandle, mode: RepairMode) -> CheckReport {
    run(repair(handle, None, mode, &mut |_, _| {})).unwrap_or_else(|e| panic!("{e:?}"))
}

/// A random byte pattern, so that decompressed and plain clusters differ.
fn fill(place: &Place, image: &str, seed: u64, size: u64, count: usize) {
    let mut random = fastrand::Rng::with_seed(seed);
    let commands: Vec<String> = (0..count)
        .map(|_| {
            let len = random.u64(1..=64) * 512;
            let at = random.u64(0..(size - len) / 512) * 512;
            match random.u32(0..6) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", random.u8(1..)),
            }
        })
        .collect();
    qemu_io(place.dir(), image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn sound_images_of_every_kind_are_clean_with_the_same_numbers() {
    let kinds = [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=2,cluster_size=4k",
        "refcount_bits=64,cluster_size=1k",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "preallocation=metadata",
        "lazy_refcounts=on",
    ];
    for (seed, options) in kinds.into_iter().enumerate() {
        let place = Place::new();
        let size = 8 << 20;
        qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "8M"]);
        fill(&place, "x.qcow2", seed as u64, size, 60);
        if !options.contains("refcount_bits=1") {
            qemu_img_ok(place.dir(), &["snapshot", "-c", "first", "x.qcow2"]);
            fill(&place, "x.qcow2", seed as u64 + 100, size, 30);
            qemu_img_ok(place.dir(), &["snapshot", "-c", "second", "x.qcow2"]);
            fill(&place, "x.qcow2", seed as u64 + 200, size, 30);
        }
        if !options.contains("compat=0.10") {
            qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "512", "x.qcow2", "b"]);
            fill(&place, "x.qcow2", seed as u64 + 300, size, 30);
        }
        let (_, handle) = load(&place.path("x.qcow2"));
        let report = check_now(&handle);
        assert!(report.is_clean(), "{options}: {:?}", report.findings);
        assert_eq!(Some(ours(&report)), by_qemu(&place, "x.qcow2"), "{options}");
        // A sound image stays as it is.
        let (memory, handle) = load(&place.path("x.qcow2"));
        let before = memory.to_vec();
        assert!(repair_now(&handle, RepairMode::All).is_clean());
        assert!(before == memory.to_vec(), "{options}: repair changed a sound image");
    }
}

#[test]
fn compressed_images_have_the_same_numbers() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "src.qcow2", "8M"]);
    fill(&place, "src.qcow2", 5, 8 << 20, 200);
    for options in ["", "compression_type=zstd", "cluster_size=4k", "cluster_size=2M", "extended_l2=on", "compat=0.10"]
    {
        let mut args = vec!["convert", "-c", "-O", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(["src.qcow2", "x.qcow2"]);
        qemu_img_ok(place.dir(), &args);
        qemu_io(place.dir(), "x.qcow2", &["write -P 3 100k 300k"]);
        qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
        qemu_io(place.dir(), "x.qcow2", &["write -P 4 200k 300k"]);
        let (_, handle) = load(&place.path("x.qcow2"));
        let report = check_now(&handle);
        assert!(report.is_clean() && report.compressed_clusters > 0, "{options}: {:?}", report.findings);
        assert_eq!(Some(ours(&report)), by_qemu(&place, "x.qcow2"), "{options}");
    }
}

/// One broken image: what it is made from, and how it is broken.
struct Break {
    name: &'static str,
    options: &'static str,
    how: fn(&mut Tool),
    /// A finding that must be among ours.
    expect: fn(&Corruption) -> bool,
    /// Ours and QEMU's counters must be equal; `false` where we find more on purpose.
    same: bool,
    /// `repair(All)` leaves nothing.
    repairable: bool,
}

/// Reads and changes an image's tables.
struct Tool {
    handle: StorageHandle,
    header: Header,
}

impl Tool {
    fn read(&self, at: u64) -> u64 {
        u64::from_be_bytes(run(self.handle.read_new(at, 8)).expect("read")[..].try_into().expect("8"))
    }
    fn write(&self, at: u64, value: u64) {
        run(self.handle.write(at, Buf::copy_of(&value.to_be_bytes()))).expect("write");
    }
    fn bytes(&self, at: u64, bytes: &[u8]) {
        run(self.handle.write(at, Buf::copy_of(bytes))).expect("write");
    }
    fn cluster(&self) -> u64 {
        self.header.cluster_size()
    }
    /// Where the L2 table of the first L1 entry stands.
    fn l2(&self) -> u64 {
        self.read(self.header.l1_offset) & 0x00ff_ffff_ffff_fe00
    }
    fn l2_entry_at(&self, index: u64) -> u64 {
        self.l2() + index * self.header.l2_entry_size()
    }
    fn change(&self, at: u64, change: impl Fn(u64) -> u64) {
        self.write(at, change(self.read(at)));
    }
    /// Where the refcount of a cluster stands; widths of 16 bits.
    fn refcount_at(&self, cluster: u64) -> u64 {
        self.read(self.header.refcount_table_offset) + 2 * cluster
    }
    fn data(&self, index: u64) -> u64 {
        self.read(self.l2_entry_at(index)) & 0x00ff_ffff_ffff_fe00
    }
}

const COPIED: u64 = 1 << 63;

fn l2_rule(what: &Corruption) -> Option<L2Rule> {
    match what {
        Corruption::L2Entry { rule, .. } => Some(*rule),
        _ => None,
    }
}

fn breaks() -> Vec<Break> {
    let plain = "cluster_size=64k";
    vec![
        Break {
            name: "refcount too low",
            options: plain,
            how: |t| t.bytes(t.refcount_at(t.data(0) / t.cluster()), &[0, 0]),
            expect: |c| matches!(c, Corruption::RefcountTooLow { count: 0, references: 1, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "leak",
            options: plain,
            how: |t| t.bytes(t.refcount_at(t.data(0) / t.cluster()), &[0, 3]),
            expect: |c| matches!(c, Corruption::RefcountTooHigh { count: 3, references: 1, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "copied flag missing in L2",
            options: plain,
            how: |t| t.change(t.l2_entry_at(1), |e| e & !COPIED),
            expect: |c| matches!(c, Corruption::CopiedL2 { index: 1, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "copied flag missing in L1",
            options: plain,
            how: |t| t.change(t.header.l1_offset, |e| e & !COPIED),
            expect: |c| matches!(c, Corruption::CopiedL1 { index: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "two entries for one cluster",
            options: plain,
            how: |t| t.write(t.l2_entry_at(1), t.read(t.l2_entry_at(0))),
            expect: |c| matches!(c, Corruption::RefcountTooLow { count: 1, references: 2, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "data in the L1 table",
            options: plain,
            how: |t| t.write(t.l2_entry_at(1), t.header.l1_offset | COPIED),
            expect: |c| matches!(c, Corruption::Overlap { first: Table::L1, second: Table::Data, .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "data in the refcount table, with a fitting count",
            options: plain,
            how: |t| {
                t.write(t.l2_entry_at(1), t.header.refcount_table_offset);
                t.bytes(t.refcount_at(t.header.refcount_table_offset / t.cluster()), &[0, 2]);
            },
            expect: |c| matches!(c, Corruption::Overlap { first: Table::RefcountTable, second: Table::Data, .. }),
            same: false,
            repairable: false,
        },
        Break {
            name: "L1 entry refers to its own table",
            options: plain,
            how: |t| t.write(t.header.l1_offset + 8, t.header.l1_offset | COPIED),
            expect: |c| matches!(c, Corruption::Overlap { second: Table::L2, .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "reserved bits in L1",
            options: plain,
            how: |t| t.change(t.header.l1_offset, |e| e | 1 << 60 | 2),
            expect: |c| matches!(c, Corruption::L1Reserved { index: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "L1 entry with flags alone",
            options: plain,
            how: |t| t.write(t.header.l1_offset + 8, COPIED),
            expect: |c| matches!(c, Corruption::L1Reserved { index: 1, .. }),
            same: false,
            repairable: true,
        },
        Break {
            name: "unaligned L2 table",
            options: plain,
            how: |t| t.change(t.header.l1_offset, |e| e + 512),
            expect: |c| matches!(c, Corruption::L2TableUnaligned { index: 0, .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "L2 table beyond the end",
            options: plain,
            how: |t| t.write(t.header.l1_offset + 8, 1 << 40 | COPIED),
            expect: |c| matches!(c, Corruption::TableBeyondEnd { table: Table::L2, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "data beyond the end",
            options: plain,
            how: |t| t.write(t.l2_entry_at(1), 1 << 40 | COPIED),
            expect: |c| matches!(c, Corruption::TableBeyondEnd { table: Table::Data, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "data beyond the end in version 2",
            options: "compat=0.10",
            how: |t| t.write(t.l2_entry_at(1), 1 << 40 | COPIED),
            expect: |c| matches!(c, Corruption::TableBeyondEnd { table: Table::Data, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "compressed beyond the end",
            options: plain,
            how: |t| t.write(t.l2_entry_at(200), 1 << 62 | 1 << 40),
            expect: |c| matches!(c, Corruption::TableBeyondEnd { table: Table::Data, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "reserved bits in L2",
            options: plain,
            how: |t| t.change(t.l2_entry_at(0), |e| e | 1 << 58 | 4),
            expect: |c| l2_rule(c) == Some(L2Rule::Reserved),
            same: true,
            repairable: true,
        },
        Break {
            name: "unaligned data",
            options: plain,
            how: |t| t.change(t.l2_entry_at(0), |e| e + 512),
            expect: |c| l2_rule(c) == Some(L2Rule::DataUnaligned),
            same: true,
            repairable: false,
        },
        Break {
            name: "unaligned preallocated zero cluster",
            options: plain,
            how: |t| t.change(t.l2_entry_at(0), |e| (e | 1) + 512),
            expect: |c| l2_rule(c) == Some(L2Rule::PreallocatedUnaligned),
            same: true,
            repairable: true,
        },
        Break {
            name: "zero flag in version 2",
            options: "compat=0.10",
            how: |t| t.change(t.l2_entry_at(0), |e| e | 1),
            expect: |c| l2_rule(c) == Some(L2Rule::ZeroFlag),
            same: false,
            repairable: false,
        },
        Break {
            name: "zero flag with extended L2",
            options: "extended_l2=on",
            how: |t| t.change(t.l2_entry_at(0), |e| e | 1),
            expect: |c| l2_rule(c) == Some(L2Rule::ZeroFlag),
            same: false,
            repairable: true,
        },
        Break {
            name: "compressed with the copied flag",
            options: plain,
            how: |t| t.write(t.l2_entry_at(200), 3 << 62 | t.data(0)),
            expect: |c| l2_rule(c) == Some(L2Rule::CompressedCopied),
            same: true,
            repairable: true,
        },
        Break {
            name: "compressed with a subcluster bitmap",
            options: "extended_l2=on",
            how: |t| {
                t.write(t.l2_entry_at(200), 1 << 62 | t.data(0));
                t.write(t.l2_entry_at(200) + 8, 1);
            },
            expect: |c| l2_rule(c) == Some(L2Rule::CompressedBitmap),
            same: true,
            repairable: true,
        },
        Break {
            name: "subcluster allocated and zero",
            options: "extended_l2=on",
            how: |t| t.change(t.l2_entry_at(0) + 8, |b| b | b << 32),
            expect: |c| l2_rule(c) == Some(L2Rule::SubclusterBoth),
            same: true,
            repairable: true,
        },
        Break {
            name: "subcluster allocated without a cluster",
            options: "extended_l2=on",
            how: |t| t.write(t.l2_entry_at(200) + 8, 0xff),
            expect: |c| l2_rule(c) == Some(L2Rule::SubclusterUnallocated),
            same: true,
            repairable: true,
        },
        Break {
            name: "refcount table entry with reserved bits",
            options: plain,
            how: |t| t.change(t.header.refcount_table_offset, |e| e | 2),
            expect: |c| matches!(c, Corruption::RefcountTableReserved { index: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "unaligned refcount block",
            options: plain,
            how: |t| t.change(t.header.refcount_table_offset, |e| e + 512),
            expect: |c| matches!(c, Corruption::RefcountBlockUnaligned { index: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "refcount block beyond the end",
            options: plain,
            how: |t| t.write(t.header.refcount_table_offset, 1 << 40),
            expect: |c| matches!(c, Corruption::TableBeyondEnd { table: Table::RefcountBlock, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "no refcount block",
            options: plain,
            how: |t| t.write(t.header.refcount_table_offset, 0),
            expect: |c| matches!(c, Corruption::RefcountTooLow { count: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "refcount block entered twice",
            options: plain,
            how: |t| t.write(t.header.refcount_table_offset + 8, t.read(t.header.refcount_table_offset)),
            expect: |c| matches!(c, Corruption::RefcountBlockShared { index: 1, references: 2, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "no refcount table",
            options: plain,
            how: |t| t.bytes(56, &[0; 4]),
            expect: |c| matches!(c, Corruption::RefcountTooLow { count: 0, .. }),
            same: true,
            repairable: true,
        },
        Break {
            name: "refcount too narrow",
            options: "refcount_bits=1",
            how: |t| t.write(t.l2_entry_at(1), t.read(t.l2_entry_at(0))),
            expect: |c| matches!(c, Corruption::RefcountOverflow { .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "snapshot entry without the extra data of version 3",
            options: "snapshot",
            how: |t| {
                let table = run(SnapshotTable::read(&t.handle, &t.header)).expect("snapshots");
                let mut snapshot = table.snapshots[0].clone();
                (snapshot.extra, snapshot.disk_size, snapshot.icount) = (Vec::new(), None, None);
                let bytes = SnapshotTable { snapshots: vec![snapshot], size: 0 }.encode().expect("encoded");
                t.bytes(t.header.snapshots_offset, &bytes);
            },
            expect: |c| matches!(c, Corruption::SnapshotExtraTooSmall { index: 0, size: 0 }),
            same: true,
            repairable: true,
        },
        Break {
            name: "unaligned L1 table of a snapshot",
            options: "snapshot",
            how: |t| t.change(t.header.snapshots_offset, |e| e + 512),
            expect: |c| matches!(c, Corruption::TableUnaligned { table: Table::SnapshotL1, .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "huge L1 table of a snapshot",
            options: "snapshot",
            how: |t| t.bytes(t.header.snapshots_offset + 8, &[0x10, 0, 0, 0]),
            expect: |c| matches!(c, Corruption::TableTooLarge { table: Table::SnapshotL1, .. }),
            same: true,
            repairable: false,
        },
        Break {
            name: "bitmap table entry with reserved bits",
            options: "bitmap",
            how: |t| {
                let at = t.header.bitmaps.expect("bitmaps").directory_offset;
                t.change(t.read(at), |e| e | 1 << 60);
            },
            expect: |c| matches!(c, Corruption::BitmapTableEntry { index: 0, .. }),
            same: false,
            repairable: true,
        },
        Break {
            name: "bitmaps without their bit",
            options: "bitmap",
            how: |t| t.write(88, 0),
            expect: |c| matches!(c, Corruption::RefcountTooHigh { references: 0, .. }),
            same: true,
            repairable: true,
        },
    ]
}

/// Makes the image that a case breaks: two L1 entries' worth of disk, data in the first clusters.
fn make(place: &Place, case: &Break) {
    let (options, special) = match case.options {
        "snapshot" | "bitmap" => ("cluster_size=64k", case.options),
        other => (other, ""),
    };
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "1G"]);
    qemu_io(place.dir(), "x.qcow2", &["write -P 1 0 64k", "write -P 2 64k 64k", "write -P 3 1M 256k"]);
    match special {
        "snapshot" => {
            qemu_img_ok(place.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
            qemu_io(place.dir(), "x.qcow2", &["write -P 9 0 128k"]);
        }
        "bitmap" => {
            qemu_img_ok(place.dir(), &["bitmap", "--add", "-g", "512", "x.qcow2", "b"]);
            qemu_io(place.dir(), "x.qcow2", &["write -P 9 0 128k"]);
        }
        _ => {}
    }
}

#[test]
fn every_corruption_is_found_as_by_qemu_and_repaired() {
    let mut failures = Vec::new();
    for case in breaks() {
        let place = Place::new();
        make(&place, &case);
        let (memory, handle) = load(&place.path("x.qcow2"));
        let header = run(Header::read(&handle)).expect("header");
        assert!(check_now(&handle).is_clean(), "{}: sound before", case.name);
        (case.how)(&mut Tool { handle: handle.clone(), header });
        memory.write_to(&place.path("x.qcow2")).expect("file");
        let report = check_now(&handle);
        if !report.findings.iter().any(|f| (case.expect)(&f.what)) {
            failures.push(format!("{}: not found: {:?}", case.name, report.findings));
        }
        let theirs = by_qemu(&place, "x.qcow2");
        if case.same && theirs.as_ref() != Some(&ours(&report)) {
            failures.push(format!("{}: qemu says {theirs:?}, we {:?} {:?}", case.name, ours(&report), report.findings));
        }
        if let Some(theirs) = &theirs
            && (theirs.corruptions > 0 || theirs.check_errors > 0)
            && report.corruptions == 0
            && report.check_errors == 0
        {
            failures.push(format!("{}: qemu finds corruption, we do not: {theirs:?}", case.name));
        }
        let repaired = repair_now(&handle, RepairMode::All);
        if repaired.is_clean() != case.repairable {
            failures.push(format!("{}: after the repair: {repaired:?}", case.name));
        }
        memory.write_to(&place.path("x.qcow2")).expect("file");
        if case.repairable {
            let text = qemu_img(place.dir(), &["check", "x.qcow2"]);
            if !text.status.success() {
                let text = String::from_utf8_lossy(&text.stderr).into_owned() + &String::from_utf8_lossy(&text.stdout);
                failures.push(format!("{}: qemu after our repair: {text}", case.name));
            }
            // What the breaking did not touch is still there.
            qemu_io(place.dir(), "x.qcow2", &["read -P 3 1M 256k"]);
            qemu_io(place.dir(), "x.qcow2", &["write -P 5 2M 1M", "read -P 5 2M 1M", "read -P 3 1M 256k"]);
            qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn leaks_are_repaired_alone_and_corruption_is_left() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "x.qcow2", "64M"]);
    qemu_io(place.dir(), "x.qcow2", &["write 0 1M"]);
    let (memory, handle) = load(&place.path("x.qcow2"));
    let header = run(Header::read(&handle)).expect("header");
    let tool = Tool { handle: handle.clone(), header };
    let first = tool.data(0) / tool.cluster();
    tool.bytes(tool.refcount_at(first), &[0, 2]);
    tool.bytes(tool.refcount_at(first + 1), &[0, 7]);
    assert_eq!(check_now(&handle).leaks, 2);
    let after = repair_now(&handle, RepairMode::Leaks);
    assert!(after.is_clean(), "{after:?}");
    assert_eq!(after.leaks_fixed, 2);
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["check", "x.qcow2"]);

    tool.bytes(tool.refcount_at(first), &[0, 2]);
    tool.write(tool.l2_entry_at(3), tool.read(tool.l2_entry_at(4)));
    let before = check_now(&handle);
    assert!(before.corruptions > 0 && before.leaks > 0);
    let after = repair_now(&handle, RepairMode::Leaks);
    assert_eq!((after.leaks, after.corruptions > 0), (0, true), "{after:?}");
}

#[test]
fn a_dirty_image_is_rebuilt_and_its_marks_cleared() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "x.qcow2", "64M"]);
    // A QEMU that dies leaves lazy reference counts behind.
    let commands = ["write -P 1 0 5M", "write -P 2 20M 1M", "sigraise 9"];
    let mut args = vec!["-f".to_owned(), "qcow2".to_owned(), "x.qcow2".to_owned()];
    args.extend(commands.iter().flat_map(|c| ["-c".to_owned(), (*c).to_owned()]));
    let status = std::process::Command::new("qemu-io").current_dir(place.dir()).args(&args).output().expect("qemu-io");
    assert!(!status.status.success());
    let (memory, handle) = load(&place.path("x.qcow2"));
    assert!(run(Header::read(&handle)).expect("header").is_dirty());
    let before = check_now(&handle);
    assert!(before.dirty && before.corruptions > 50, "{before:?}");
    assert_eq!(Some(ours(&before)), by_qemu(&place, "x.qcow2"));
    let after = repair_now(&handle, RepairMode::All);
    assert!(after.is_clean() && !after.dirty, "{after:?}");
    assert!(!run(Header::read(&handle)).expect("header").is_dirty());
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
    qemu_io(place.dir(), "x.qcow2", &["read -P 1 0 5M", "read -P 2 20M 1M"]);
}

#[test]
fn marks_stay_while_anything_is_wrong() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "x.qcow2", "64M"]);
    qemu_io(place.dir(), "x.qcow2", &["write 0 1M"]);
    let (_, handle) = load(&place.path("x.qcow2"));
    let header = run(Header::read(&handle)).expect("header");
    let tool = Tool { handle: handle.clone(), header };
    tool.write(72, 2);
    tool.change(tool.l2_entry_at(0), |e| e + 512);
    let after = repair_now(&handle, RepairMode::All);
    assert!(after.corruptions > 0 && after.marked_corrupt);
    assert!(run(Header::read(&handle)).expect("header").is_corrupt());
    tool.change(tool.l2_entry_at(0), |e| e - 512);
    assert!(repair_now(&handle, RepairMode::All).is_clean());
    assert!(!run(Header::read(&handle)).expect("header").is_corrupt());
}

#[test]
fn a_crash_in_a_repair_leaves_what_a_second_repair_mends() {
    let place = Place::new();
    let mut stops = 0;
    for case in breaks().into_iter().filter(|c| c.repairable && c.options != "compat=0.10") {
        make(&place, &case);
        let (memory, handle) = load(&place.path("x.qcow2"));
        let header = run(Header::read(&handle)).expect("header");
        (case.how)(&mut Tool { handle, header });
        let broken = memory.snapshot();
        for pass in 0.. {
            let storage = CrashStorage::of(MemoryStorage::of(broken.clone()));
            storage.memory().fail_from(Some(disk::Operation::Write), pass, disk::ErrorKind::Io);
            let done = run(repair(&storage.handle(), None, RepairMode::All, &mut |_, _| {})).is_ok();
            for seed in 0..4 {
                let left = storage.crash(seed).handle();
                let after = repair_now(&left, RepairMode::All);
                assert!(after.is_clean(), "{} stopped at write {pass}, seed {seed}: {after:?}", case.name);
            }
            stops += 1;
            if done {
                break;
            }
        }
    }
    assert!(stops > 50, "repairs write: {stops}");
}

#[test]
fn external_data_files() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "x.qcow2", "64M"]);
    qemu_io(place.dir(), "x.qcow2", &["write 0 1M", "write 8M 1M", "write -z 20M 1M"]);
    let (_, handle) = load(&place.path("x.qcow2"));
    let (data, data_handle) = load(&place.path("d.raw"));
    let report = run(check(&handle, Some(&data_handle), &mut |_, _| {})).expect("checked");
    assert!(report.is_clean(), "{:?}", report.findings);
    assert_eq!(Some(ours(&report)), by_qemu(&place, "x.qcow2"));
    run(data_handle.set_size(4 << 20)).expect("cut off");
    let report = run(check(&handle, Some(&data_handle), &mut |_, _| {})).expect("checked");
    assert!(report.is_clean(), "what a data file does not reach reads as zero: {:?}", report.findings);
    data.write_to(&place.path("d.raw")).expect("file");
    assert_eq!(Some(ours(&report)), by_qemu(&place, "x.qcow2"));
    drop(data);
    let header = run(Header::read(&handle)).expect("header");
    let tool = Tool { handle: handle.clone(), header };
    tool.change(tool.l2_entry_at(3), |e| e + 65536);
    let report = check_now(&handle);
    assert!(report.findings.iter().any(|f| l2_rule(&f.what) == Some(L2Rule::DataFileOffset)), "{report:?}");
    tool.write(tool.l2_entry_at(3), 1 << 62 | 0x50000);
    let report = check_now(&handle);
    assert!(report.findings.iter().any(|f| l2_rule(&f.what) == Some(L2Rule::CompressedDataFile)), "{report:?}");
}

#[test]
fn progress_ends_at_its_total() {
    let place = Place::new();
    qemu_img_ok(place.dir(), &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "x.qcow2", "8M"]);
    qemu_io(place.dir(), "x.qcow2", &["write 0 8M"]);
    let (_, handle) = load(&place.path("x.qcow2"));
    let mut seen = Vec::new();
    run(check(&handle, None, &mut |done, total| seen.push((done, total)))).expect("checked");
    assert_eq!(seen.len(), 256);
    assert_eq!(seen.last(), Some(&(256, 256)));
}
