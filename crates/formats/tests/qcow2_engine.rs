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
