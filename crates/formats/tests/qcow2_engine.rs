//! The engine's answer to images that contradict the format while they are in use.

use disk::{Below, ByteRange, ErrorKind, LayerHandle};
use formats::qcow2::{self, CreateOptions, Header, Image, OpenOptions};
use testkit::MemoryStorage;
use testkit::executor::run;

/// An image with its first guest cluster mapped to `host`.
fn mapped_to(host: u64) -> MemoryStorage {
    let memory = MemoryStorage::new(0);
    run(1, async {
        let options = CreateOptions::new(1 << 20);
        qcow2::create(&memory.handle(), None, &options).await.expect("create");
        let image =
            LayerHandle::from_rc(Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open"));
        let plan = image.prepare_write(ByteRange::new(0, 65536), Below::Zeroes).await.expect("plan");
        plan.commit().await.expect("commit");
        image.close().await.expect("close");
        let header = Header::read(&memory.handle()).await.expect("header");
        let l1 = memory.handle().read_new(header.l1_offset, 8).await.expect("L1");
        let l2 = u64::from_be_bytes(l1[..].try_into().expect("8 bytes")) & 0x00ff_ffff_ffff_fe00;
        memory.tamper(|bytes| bytes.write(l2, &(host | 1 << 63).to_be_bytes()));
    });
    memory
}

#[test]
fn a_write_into_the_images_own_tables_is_refused_and_marks_the_image() {
    // The header's cluster, and the refcount table's.
    for host in [0x10000, 0x20000, 0x30000] {
        let memory = mapped_to(host);
        run(2, async {
            let image = Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open");
            let layer = LayerHandle::from_rc(image);
            let error = layer.prepare_write(ByteRange::new(0, 512), Below::Zeroes).await.err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            let next = layer.prepare_write(ByteRange::new(65536, 512), Below::Zeroes).await.err().expect("stopped");
            assert_eq!(next.kind(), ErrorKind::Poisoned, "{next}");
        });
        let header = run(3, async { Header::read(&memory.handle()).await.expect("header") });
        assert!(header.is_corrupt(), "cluster {host:#x}");
        let refused = run(4, Image::open(memory.handle(), None, OpenOptions::default())).err().expect("refused");
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        run(5, Image::open(memory.handle(), None, options)).expect("can still be read");
    }
}

#[test]
fn an_unaligned_cluster_is_refused() {
    let memory = mapped_to(0x50200);
    run(2, async {
        let layer =
            LayerHandle::from_rc(Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open"));
        let error = layer.map(ByteRange::new(0, 512)).await.err();
        // The first look finds the slice unread; from then on every entry is checked.
        let error = match error {
            Some(error) => error,
            None => layer.map(ByteRange::new(0, 512)).await.expect_err("refused"),
        };
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    });
}

/// The first L2 entry of an image of 64 KiB clusters that has one.
fn set_first_entry(memory: &MemoryStorage, entry: u64) {
    run(1, async {
        let header = Header::read(&memory.handle()).await.expect("header");
        let l1 = memory.handle().read_new(header.l1_offset, 8).await.expect("L1");
        let l2 = u64::from_be_bytes(l1[..].try_into().expect("8 bytes")) & 0x00ff_ffff_ffff_fe00;
        memory.tamper(|bytes| bytes.write(l2, &entry.to_be_bytes()));
    });
}

#[test]
fn a_copied_flag_without_a_cluster_means_nothing() {
    for entry in [1 << 63, 1 << 63 | 1] {
        let memory = mapped_to(0x50000);
        set_first_entry(&memory, entry);
        run(2, async {
            let image = Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open");
            let layer = LayerHandle::from_rc(image);
            let extent = layer.map(ByteRange::new(0, 512)).await.expect("map");
            assert!(!matches!(extent.presence, disk::Presence::Data { .. }), "{extent:?}");
            let plan = layer.prepare_write(ByteRange::new(0, 65536), Below::Zeroes).await.expect("a new cluster");
            assert!(plan.plan().offset >= 0x50000, "{:?}", plan.plan());
            plan.commit().await.expect("commit");
            layer.close().await.expect("close");
        });
    }
}

#[test]
fn clusters_mapped_beyond_the_end_of_the_file_keep_what_is_written() {
    let memory = MemoryStorage::new(0);
    run(1, async {
        let options = CreateOptions::parse(64 << 20, [("preallocation", "metadata")]).expect("valid");
        qcow2::create(&memory.handle(), None, &options).await.expect("create");
    });
    memory.tamper(|bytes| bytes.set_size(512 << 10));
    run(2, async {
        let open = || Image::open(memory.handle(), None, OpenOptions::default());
        let layer = LayerHandle::from_rc(open().await.expect("open"));
        let range = ByteRange::new(40 << 20, 65536);
        layer.map(range).await.expect("the table is read before the first write");
        let write = async |range: ByteRange, byte: u8| {
            let prepared = layer.prepare_write(range, Below::Zeroes).await.expect("plan");
            let plan = *prepared.plan();
            layer
                .storage(plan.storage)
                .write(plan.offset, disk::Buf::copy_of(&vec![byte; 65536]))
                .await
                .expect("write");
            prepared.commit().await.expect("commit");
        };
        write(range, 7).await;
        layer.flush().await.expect("flush");
        layer.resize(128 << 20, disk::Preallocation::Off).await.expect("resize");
        write(ByteRange::new(100 << 20, 65536), 8).await;
        layer.close().await.expect("close");
        let layer = LayerHandle::from_rc(open().await.expect("open"));
        for (range, byte) in [(range, 7), (ByteRange::new(100 << 20, 65536), 8)] {
            let disk::Presence::Data { storage, offset } = layer.map(range).await.expect("map").presence else {
                panic!("{range} is mapped");
            };
            let found = layer.storage(storage).read_new(offset, 65536).await.expect("read");
            assert!(found.iter().all(|b| *b == byte), "{range}: {}", found[0]);
        }
    });
}

#[test]
fn counts_beyond_the_end_of_the_file_are_passed_over() {
    let memory = MemoryStorage::new(0);
    run(1, async {
        let pairs = [("cluster_size", "4096"), ("refcount_bits", "1")];
        qcow2::create(&memory.handle(), None, &CreateOptions::parse(64 << 20, pairs).expect("valid"))
            .await
            .expect("create");
        let header = Header::read(&memory.handle()).await.expect("header");
        let table = memory.handle().read_new(header.refcount_table_offset, 8).await.expect("table");
        let block = u64::from_be_bytes(table[..].try_into().expect("8 bytes"));
        memory.tamper(|bytes| bytes.write(block, &[0xff; 4096]));
        let layer =
            LayerHandle::from_rc(Image::open(memory.handle(), None, OpenOptions::default()).await.expect("open"));
        let plan = layer.prepare_write(ByteRange::new(0, 4096), Below::Zeroes).await.expect("plan");
        assert!(plan.plan().offset >= 4096 * 32768, "{:?}", plan.plan());
        plan.commit().await.expect("commit");
        layer.close().await.expect("close");
    });
}

#[test]
fn a_version_2_image_with_a_zero_flag_is_refused_there() {
    let memory = MemoryStorage::new(0);
    run(1, async {
        let options =
            CreateOptions::parse(1 << 20, [("compat", "0.10"), ("preallocation", "metadata")]).expect("valid");
        qcow2::create(&memory.handle(), None, &options).await.expect("create");
    });
    set_first_entry(&memory, 1);
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    run(2, async {
        let layer = LayerHandle::from_rc(Image::open(memory.handle(), None, options).await.expect("open"));
        layer.map(ByteRange::new(65536, 512)).await.expect("the other clusters are sound");
        let error = layer.map(ByteRange::new(0, 512)).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    });
}
