//! Changes of size: what the guest had stays, what is added is zero.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, LayerHandle, Preallocation, WriteFlags, ZeroMode};
use formats::Format;
use formats::qcow2::check::check;
use formats::qcow2::{self, BackingRef, CreateOptions, Image, OpenOptions, encode_cluster};
use formats::raw;
use testkit::MemoryStorage;
use testkit::executor::run;

struct Made {
    image: MemoryStorage,
    data: Option<MemoryStorage>,
    parent: Option<MemoryStorage>,
}

impl Made {
    fn new(size: u64, words: &[(&str, &str)], parent: Option<MemoryStorage>) -> Self {
        let mut options = CreateOptions::parse(size, words.iter().copied()).expect("valid");
        options.backing = parent.as_ref().map(|_| BackingRef { name: "parent".into(), format: Some("raw".into()) });
        let image = MemoryStorage::new(0);
        let data = options.data_file.is_some().then(|| MemoryStorage::new(0));
        run(1, async {
            let data = data.as_ref().map(MemoryStorage::handle);
            qcow2::create(&image.handle(), data.as_ref(), &options).await.expect("create");
        });
        Self { image, data, parent }
    }

    async fn open(&self) -> Chain {
        let data = self.data.as_ref().map(MemoryStorage::handle);
        let image = Image::open(self.image.handle(), data, OpenOptions::default()).await.expect("opens");
        let layer = |format, handle| LayerInfo { path: "image".into(), format, handle };
        let mut layers = vec![layer(Format::Qcow2, LayerHandle::from_rc(image))];
        if let Some(parent) = &self.parent {
            let parent = raw::RawLayer::open(parent.read_only().handle(), raw::OpenOptions::default());
            layers.push(layer(Format::Raw, LayerHandle::new(parent)));
        }
        Chain::new(layers)
    }

    async fn assert_sound(&self) {
        let data = self.data.as_ref().map(MemoryStorage::handle);
        let report = check(&self.image.handle(), data.as_ref(), &mut |_, _| {}).await.expect("check");
        assert!(report.is_clean(), "{report:?}");
    }
}

async fn assert_bytes(chain: &Chain, range: ByteRange, byte: u8) {
    let found = Disk::read(chain, range.offset(), Buf::new(range.len() as usize)).await.expect("read");
    let differs = found.iter().position(|b| *b != byte);
    assert_eq!(differs, None, "{range}: expected {byte:#x}");
}

/// The old end is inside a cluster; the guest's part of that cluster is compressed, the parent's, or zero over old bytes.
#[test]
fn preallocation_leaves_the_last_cluster_alone() {
    const OLD: u64 = 3 * 65536 + 2560;
    const NEW: u64 = 1 << 20;
    let rest = ByteRange::between(3 * 65536, OLD);
    for how in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for kind in ["compressed", "parent", "zero", "data"] {
            let parent = (kind == "parent").then(|| {
                let parent = MemoryStorage::new(NEW);
                parent.tamper(|bytes| bytes.write(0, &[0x77; NEW as usize]));
                parent
            });
            let made = Made::new(OLD, &[], parent);
            run(1, async {
                let chain = made.open().await;
                let fill = Buf::copy_of(&[0xab; 2560]);
                let expected = match kind {
                    "compressed" => {
                        let mut cluster = vec![0; 65536];
                        cluster[..2560].fill(0xab);
                        let encoded = encode_cluster(qcow2::Compression::Zlib, &cluster).expect("compresses");
                        chain.top().write_encoded(rest, &encoded).await.expect("write");
                        0xab
                    }
                    "parent" => 0x77,
                    "zero" => {
                        Disk::write(&chain, rest.offset(), fill, WriteFlags::default()).await.expect("write");
                        Disk::write_zeroes(&chain, rest, ZeroMode::default(), WriteFlags::default())
                            .await
                            .expect("zero");
                        0
                    }
                    _ => {
                        Disk::write(&chain, rest.offset(), fill, WriteFlags::default()).await.expect("write");
                        0xab
                    }
                };
                chain.resize_with(NEW, how).await.expect("resize");
                assert_bytes(&chain, rest, expected).await;
                assert_bytes(&chain, ByteRange::between(OLD, NEW), 0).await;
                Disk::close(&chain).await.expect("close");
                made.assert_sound().await;
                assert_bytes(&made.open().await, rest, expected).await;
            });
        }
    }
}

#[test]
fn bytes_that_were_cut_off_do_not_come_back() {
    for words in [
        &[][..],
        &[("extended_l2", "on")],
        &[("data_file", "d")],
        &[("data_file", "d"), ("extended_l2", "on")],
        &[("data_file", "d"), ("data_file_raw", "on")],
        &[("compat", "0.10")],
    ] {
        for cut in [512, 2048, 66048, 65536, 70144] {
            let made = Made::new(131072, words, None);
            run(1, async {
                let chain = made.open().await;
                let all = Buf::copy_of(&[0xcd; 131072]);
                Disk::write(&chain, 0, all, WriteFlags::default()).await.expect("write");
                Disk::resize(&chain, cut).await.expect("shrink");
                Disk::resize(&chain, 262144).await.expect("grow");
                assert_bytes(&chain, ByteRange::new(0, cut), 0xcd).await;
                assert_bytes(&chain, ByteRange::between(cut, 262144), 0).await;
                Disk::close(&chain).await.expect("close");
                made.assert_sound().await;
                assert_bytes(&made.open().await, ByteRange::between(cut, 262144), 0).await;
            });
        }
    }
}

/// A data file that is shorter than the disk is sound, and so is one that grew with it.
#[test]
fn a_data_file_grows_with_the_disk() {
    for raw in ["on", "off"] {
        for how in [Preallocation::Off, Preallocation::Metadata] {
            let made = Made::new(1 << 20, &[("data_file", "d"), ("data_file_raw", raw)], None);
            run(1, async {
                let chain = made.open().await;
                chain.resize_with(8 << 20, how).await.expect("resize");
                Disk::close(&chain).await.expect("close");
                made.assert_sound().await;
            });
            assert_eq!(made.data.as_ref().expect("has one").handle().size(), 8 << 20);
        }
    }
}

/// Growth that fails half-way leaves the old size and the old bytes, and can be tried again.
#[test]
fn growth_without_space_can_be_tried_again() {
    for pass in 0..12 {
        let parent = MemoryStorage::new(4 << 20);
        parent.tamper(|bytes| bytes.write(0, &[0x77; 4 << 20]));
        let made = Made::new(1 << 20, &[("cluster_size", "512")], Some(parent));
        run(1, async {
            let chain = made.open().await;
            made.image.fail_once(Some(disk::Operation::Write), pass, disk::ErrorKind::NoSpace);
            let first = Disk::resize(&chain, 64 << 20).await;
            made.image.heal();
            if let Err(error) = first {
                assert_eq!(error.kind(), disk::ErrorKind::NoSpace, "{error:?}");
                assert_eq!(Disk::geometry(&chain).size, 1 << 20);
                Disk::resize(&chain, 64 << 20).await.expect("there is space now");
            }
            assert_bytes(&chain, ByteRange::new(0, 1 << 20), 0x77).await;
            assert_bytes(&chain, ByteRange::new(1 << 20, 4 << 20), 0).await;
            Disk::close(&chain).await.expect("close");
            made.assert_sound().await;
        });
    }
}

/// A change of size that nobody waits for is finished before the disk is closed; what comes later is refused.
#[test]
fn closing_waits_for_a_change_of_size() {
    for seed in 0..50 {
        let mut made = Made::new(1 << 20, &[("cluster_size", "512")], None);
        made.image = made.image.yielding(seed);
        run(seed, async {
            let chain = std::rc::Rc::new(made.open().await);
            let resize = Disk::resize(&*chain, 64 << 20);
            let (resized, closed) = futures_util::future::join(resize, Disk::close(&*chain)).await;
            resized.expect("begun before the close");
            closed.expect("close");
            let late = Disk::read(&*chain, 0, Buf::new(512)).await.expect_err("closed");
            assert_eq!(late.kind(), disk::ErrorKind::Closed);
            let late = Disk::resize(&*chain, 1 << 20).await.expect_err("closed");
            assert_eq!(late.kind(), disk::ErrorKind::Closed);
            assert_eq!(Disk::geometry(&made.open().await).size, 64 << 20);
            made.assert_sound().await;
        });
    }
}
