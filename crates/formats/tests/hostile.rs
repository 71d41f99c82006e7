//! Images made to hurt whoever opens them: refused, or contained within bounded memory and time. Headers made to
//! hurt are in `qcow2_damage.rs`, chains of parents that come back to themselves in chain's `tests/open.rs`.

mod support;

use disk::{
    Below, Buf, ByteRange, DiskError, ErrorKind, LayerHandle, Presence, Result, StorageHandle, StorageId, ZeroMode,
};
use formats::qcow2::check::{RepairMode, check, repair};
use formats::qcow2::{CreateOptions, Header, Image, OpenOptions, SnapshotTable, create, encode_cluster};
use support::run;
use testkit::MemoryStorage;

const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Finds an offset in an image.
type Place = fn(&Victim) -> u64;

/// A sound image of 4 MiB (two L2 tables) with a data cluster at guest offset 0 and one in the second table's part.
struct Victim {
    memory: MemoryStorage,
    storage: StorageHandle,
    header: Header,
}

fn be64(storage: &StorageHandle, at: u64) -> u64 {
    u64::from_be_bytes(run(storage.read_new(at, 8)).expect("read")[..].try_into().expect("8 bytes"))
}

impl Victim {
    fn new() -> Self {
        let memory = MemoryStorage::new(0);
        let storage = memory.handle();
        let mut options = CreateOptions::new(4 << 20);
        options.cluster_size = CLUSTER;
        run(create(&storage, None, &options)).expect("create");
        let victim = Self { header: run(Header::read(&storage)).expect("header"), memory, storage };
        let layer = victim.open().expect("sound");
        for at in [0, 2 << 20] {
            run(write(&layer, at, 7)).expect("write");
        }
        run(layer.close()).expect("close");
        victim
    }

    fn open(&self) -> Result<LayerHandle> {
        run(Image::open(self.storage.clone(), None, OpenOptions::default())).map(LayerHandle::from_rc)
    }

    fn open_read_only(&self) -> Result<LayerHandle> {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        run(Image::open(self.storage.clone(), None, options)).map(LayerHandle::from_rc)
    }

    fn set(&self, at: u64, entry: u64) {
        run(self.storage.write(at, Buf::copy_of(&entry.to_be_bytes()))).expect("write");
    }

    fn refcount_block(&self) -> u64 {
        be64(&self.storage, self.header.refcount_table_offset)
    }

    fn l2(&self, index: u64) -> u64 {
        be64(&self.storage, self.header.l1_offset + 8 * index) & !COPIED
    }

    /// The clusters of all tables.
    fn tables(&self) -> Vec<Vec<u8>> {
        [self.header.l1_offset, self.header.refcount_table_offset, self.refcount_block(), self.l2(0), self.l2(1)]
            .map(|at| run(self.storage.read_new(at, CLUSTER as usize)).expect("read").to_vec())
            .to_vec()
    }

    fn refused(&self) -> String {
        let error = self.open().expect_err("must be refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
        format!("{error:?}")
    }
}

/// Writes one cluster as a chain would.
async fn write(layer: &LayerHandle, offset: u64, byte: u8) -> Result<()> {
    let _guard = layer.guard();
    let prepared = layer.prepare_write(ByteRange::new(offset, CLUSTER), Below::Zeroes).await?;
    let plan = *prepared.plan();
    layer.storage(plan.storage).write(plan.offset, Buf::copy_of(&vec![byte; plan.range.len() as usize])).await?;
    prepared.commit().await
}

/// Reads one cluster as a chain would.
async fn read(layer: &LayerHandle, offset: u64) -> Result<Vec<u8>> {
    let _guard = layer.guard();
    let extent = layer.map(ByteRange::new(offset, CLUSTER)).await?;
    let len = extent.range.len() as usize;
    match extent.presence {
        Presence::Data { storage, offset } => layer.storage(storage).read_new(offset, len).await.map(|b| b.to_vec()),
        Presence::Encoded { .. } => layer.read_encoded(offset, Buf::new(len)).await.map(|b| b.to_vec()),
        Presence::Zero { .. } | Presence::Absent => Ok(vec![0; len]),
    }
}

fn corrupt<T: std::fmt::Debug>(result: Result<T>) -> DiskError {
    let error = result.expect_err("must be refused");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    error
}

#[test]
fn tables_in_one_cluster_are_never_written() {
    let places: [(&str, Place); 5] = [
        ("another L2 table", |v| v.l2(1)),
        ("the L1 table", |v| v.header.l1_offset),
        ("the refcount table", |v| v.header.refcount_table_offset),
        ("a refcount block", Victim::refcount_block),
        ("a data cluster's own L2 table", |v| v.l2(0)),
    ];
    for (name, place) in &places[..4] {
        let victim = Victim::new();
        victim.set(victim.header.l1_offset, place(&victim) | COPIED);
        assert!(victim.refused().contains("two of the image's own tables"), "L2 in {name}");
        // For reading any table will do.
        let layer = victim.open_read_only().expect("can be looked at");
        for at in (0..4 << 20).step_by(1 << 17) {
            let _ = run(read(&layer, at));
        }
    }
    for (name, place) in &places[1..] {
        if *name == "a refcount block" {
            continue; // It is one.
        }
        let victim = Victim::new();
        victim.set(victim.header.refcount_table_offset, place(&victim));
        assert!(victim.refused().contains("two of the image's own tables"), "refcount block in {name}");
    }
    // 4,096 ways to one L2 table that refers to itself.
    let victim = Victim::new();
    let table = victim.l2(0);
    let all = (table | COPIED).to_be_bytes().repeat(512);
    run(victim.storage.write(table, Buf::copy_of(&all))).expect("write");
    run(victim.storage.write(victim.header.l1_offset, Buf::copy_of(&all))).expect("write");
    victim.refused();
}

#[test]
fn data_in_a_table_is_neither_read_nor_written() {
    let places: [(&str, Place); 4] = [
        ("its own L2 table", |v| v.l2(0)),
        ("the L1 table", |v| v.header.l1_offset),
        ("the refcount table", |v| v.header.refcount_table_offset),
        ("a refcount block", Victim::refcount_block),
    ];
    for (name, place) in places {
        for flags in [COPIED, 0, COPIED | 1] {
            let victim = Victim::new();
            victim.set(victim.l2(0), place(&victim) | flags);
            let before = victim.tables();
            let attempts: [fn(&LayerHandle) -> Result<()>; 4] = [
                |layer| run(read(layer, 0)).map(drop),
                |layer| run(write(layer, 0, 9)),
                |layer| run(layer.discard(ByteRange::new(0, CLUSTER), Below::Zeroes)),
                |layer| run(layer.write_zeroes(ByteRange::new(0, CLUSTER), Below::Zeroes, ZeroMode::default())),
            ];
            for attempt in attempts {
                let layer = match victim.open() {
                    Ok(layer) => layer,
                    // An earlier attempt has marked the image.
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}");
                        continue;
                    }
                };
                let text = format!("{:?}", corrupt(attempt(&layer)));
                assert!(text.contains("its own tables"), "{name}: {text}");
                let _ = run(layer.close());
                assert!(victim.tables() == before, "{name}: a table was changed");
            }
        }
    }
}

#[test]
fn refcount_blocks_anywhere_are_refused() {
    for (entry, says) in [
        (0x123, "no cluster's beginning"),
        (CLUSTER + 512, "no cluster's beginning"),
        (u64::MAX, "no cluster's beginning"),
        (!(CLUSTER - 1), "beyond the end"),
        (1 << 62, "beyond the end"),
        (1 << 40, "beyond the end"),
    ] {
        for index in [0, 1, 511] {
            let victim = Victim::new();
            victim.set(victim.header.refcount_table_offset + 8 * index, entry);
            let text = victim.refused();
            assert!(text.contains(says), "{entry:#x}: {text}");
        }
    }
}

#[test]
fn tables_that_count_as_free_are_never_given_away() {
    // All counts are 0: every cluster of the file seems to be free.
    let victim = Victim::new();
    let block = victim.refcount_block();
    run(victim.storage.write(block, Buf::zeroed(CLUSTER as usize))).expect("write");
    let before = victim.tables();
    let layer = victim.open().expect("opens");
    for at in (0..4 << 20).step_by(4096) {
        if run(write(&layer, at, 9)).is_err() {
            break;
        }
    }
    let _ = run(layer.flush());
    let _ = run(layer.close());
    let after = victim.tables();
    // The counts may change; that the L1, the refcount table and the header's cluster stay is what matters.
    assert!(before[..2] == after[..2]);
    assert_eq!(run(Header::read_for_check(&victim.storage)).expect("header").l1_offset, victim.header.l1_offset);
}

#[test]
fn data_that_counts_as_free_stops_the_image_when_it_is_freed() {
    let victim = Victim::new();
    let data = be64(&victim.storage, victim.l2(0)) & !COPIED;
    let at = victim.refcount_block() + 2 * (data / CLUSTER);
    run(victim.storage.write(at, Buf::copy_of(&[0, 0]))).expect("write");
    let layer = victim.open().expect("opens");
    run(layer.discard(ByteRange::new(0, CLUSTER), Below::Zeroes)).expect("the entry goes");
    corrupt(run(layer.flush()));
    let error = run(write(&layer, 0, 1)).expect_err("stopped");
    assert_eq!(error.kind(), ErrorKind::Poisoned);
}

#[test]
fn l2_tables_beyond_the_end_or_unaligned() {
    for entry in [1 << 30, 0x00ff_ffff_ffff_f000, 0x1200, 0x00ff_ffff_ffff_fe00] {
        let victim = Victim::new();
        victim.set(victim.header.l1_offset, entry | COPIED);
        corrupt(run(read(&victim.open_read_only().expect("can be looked at"), 0)));
        // An unaligned table lies over others, so that the image is not even opened for writing.
        match victim.open() {
            Ok(layer) => drop(corrupt(run(write(&layer, 0, 1)))),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}"),
        }
    }
}

#[test]
fn data_beyond_the_end_or_unaligned() {
    for entry in [1 << 40, 0x00ff_ffff_ffff_f000] {
        let victim = Victim::new();
        victim.memory.full_at(64 << 20);
        victim.set(victim.l2(0), entry | COPIED);
        let layer = victim.open().expect("opens");
        assert_eq!(run(read(&layer, 0)).expect("nothing is there"), vec![0; CLUSTER as usize]);
        assert!(run(write(&layer, 0, 1)).is_err(), "the storage has no such place");
    }
    let victim = Victim::new();
    victim.set(victim.l2(0), 0x12200 | COPIED);
    let layer = victim.open().expect("opens");
    corrupt(run(read(&layer, 0)));
    corrupt(run(write(&layer, 0, 1)));
}

#[test]
fn compressed_bytes_beyond_the_end() {
    let shift = 62 - (CLUSTER.trailing_zeros() - 8);
    let most_sectors = (COMPRESSED - 1) >> shift << shift;
    for descriptor in [
        COMPRESSED | 1 << 40,
        COMPRESSED | most_sectors | 1 << 40,
        COMPRESSED | most_sectors | ((1 << shift) - 1),
        COMPRESSED | 512,
        COMPRESSED | most_sectors | CLUSTER,
    ] {
        let victim = Victim::new();
        victim.set(victim.l2(0), descriptor);
        let layer = victim.open().expect("opens");
        corrupt(run(read(&layer, 0)));
        // The guest may overwrite it; what becomes of its references must not take anybody else's.
        let _ = run(write(&layer, 0, 1));
        let _ = run(layer.flush());
        let _ = run(layer.close());
        assert_eq!(run(Header::read_for_check(&victim.storage)).expect("header").l1_offset, victim.header.l1_offset);
    }
}

#[test]
fn a_compressed_cluster_expands_to_one_cluster_at_most() {
    // 2 MiB of zeroes in the bytes of a cluster of 4 KiB.
    let bomb = encode_cluster(formats::qcow2::Compression::Zlib, &vec![0; 2 << 20]).expect("compresses");
    let victim = Victim::new();
    let end = victim.storage.size();
    run(victim.storage.write(end, Buf::copy_of(&bomb))).expect("write");
    let shift = 62 - (CLUSTER.trailing_zeros() - 8);
    victim.set(victim.l2(0), COMPRESSED | (bomb.len() as u64 / 512) << shift | end);
    let layer = victim.open_read_only().expect("opens");
    assert_eq!(run(read(&layer, 0)).expect("the first cluster of it"), vec![0; CLUSTER as usize]);
}

#[test]
fn snapshots_beyond_the_end() {
    let victim = Victim::new();
    run(victim.storage.write(60, Buf::copy_of(&[0, 0, 0, 1]))).expect("write");
    for offset in [1 << 30, 1 << 62, !(CLUSTER - 1)] {
        victim.set(64, offset);
        let text = format!("{:?}", corrupt(run(Header::read(&victim.storage))));
        assert!(text.contains("snapshot"), "{text}");
    }
    // The table is in the file, the snapshot's L1 table is not, or is too large.
    let table = victim.storage.size().next_multiple_of(CLUSTER);
    run(victim.storage.set_size(table + CLUSTER)).expect("size");
    victim.set(64, table);
    for (l1, entries) in [(1u64 << 40, 2u32), (!(CLUSTER - 1), 2), (table, u32::MAX), (table + 1, 2), (0, 2)] {
        let mut entry = l1.to_be_bytes().to_vec();
        entry.extend(entries.to_be_bytes());
        entry.extend([0, 1, 0, 1]);
        entry.resize(40, 0);
        entry.extend(b"1s");
        run(victim.storage.write(table, Buf::copy_of(&entry))).expect("write");
        let header = run(Header::read(&victim.storage)).expect("header");
        run(SnapshotTable::read(&victim.storage, &header)).expect("the table itself is readable");
        let options = OpenOptions { snapshot: Some("1".to_owned()), ..OpenOptions::default() };
        let opened = run(Image::open(victim.storage.clone(), None, options));
        assert_eq!(
            opened.err().map(|error| error.kind()),
            Some(ErrorKind::Corrupt),
            "L1 at {l1:#x}, {entries} entries"
        );
    }
}

#[test]
fn a_dirty_image_that_cannot_be_mended_is_not_written() {
    let victim = Victim::new();
    // An unaligned entry holds data that nobody can place.
    let data = be64(&victim.storage, victim.l2(0));
    victim.set(victim.l2(0), data | 512);
    run(victim.storage.write(79, Buf::copy_of(&[1]))).expect("write");
    let text = victim.refused();
    assert!(text.contains("was not closed cleanly") && text.contains("could not be rebuilt"), "{text}");
    assert!(run(Header::read(&victim.storage)).expect("header").is_dirty());
    let layer = victim.open_read_only().expect("can be looked at");
    assert_eq!(run(read(&layer, 2 << 20)).expect("the other data"), vec![7; CLUSTER as usize]);
    assert_eq!(layer.storage(StorageId::IMAGE).name(), "memory");
}

#[test]
fn clusters_of_a_write_given_up_return_at_the_close() {
    let victim = Victim::new();
    let layer = victim.open().expect("sound");
    run(write(&layer, 1 << 20, 1)).expect("write");
    drop(run(layer.prepare_write(ByteRange::new((1 << 20) + 512, 3 * CLUSTER), Below::Parent)).expect("plan"));
    // No table is changed any more when the close begins.
    run(layer.flush()).expect("flush");
    run(layer.close()).expect("close");
    let report = run(check(&victim.storage, None, &mut |_, _| {})).expect("check");
    assert!(report.is_clean(), "{report:?}");
}

/// A snapshot whose L1 table is said to be the header: a repair that mends it there would take the header with it.
#[test]
fn a_repair_spares_tables_that_are_something_else_as_well() {
    for place in [0, CLUSTER] {
        let place_dir = support::Place::new();
        support::qemu_img_ok(
            place_dir.dir(),
            &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "x.qcow2", "1M"],
        );
        support::qemu_io(place_dir.dir(), "x.qcow2", &["write -P 5 0 64k"]);
        support::qemu_img_ok(place_dir.dir(), &["snapshot", "-c", "s", "x.qcow2"]);
        let (memory, storage) = support::load(&place_dir.path("x.qcow2"));
        let header = run(Header::read(&storage)).expect("header");
        memory.tamper(|bytes| bytes.write(header.snapshots_offset, &place.to_be_bytes()));
        let before = memory.to_vec();
        run(repair(&storage, None, RepairMode::All, &mut |_, _| {})).expect("repaired as far as can be");
        let after = memory.to_vec();
        assert_eq!(before[..8], after[..8], "the magic number and the version");
        run(Header::read_for_check(&storage)).expect("the header is still one");
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let layer = LayerHandle::from_rc(run(Image::open(storage.clone(), None, options)).expect("can be read"));
        let disk::Presence::Data { offset, .. } = run(layer.map(ByteRange::new(0, 4096))).expect("map").presence else {
            panic!("the guest's bytes are mapped");
        };
        assert_eq!(run(storage.read_new(offset, 4096)).expect("read")[..], [5; 4096]);
    }
}
