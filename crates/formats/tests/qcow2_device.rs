//! qcow2 on something that neither grows nor begins with zeroes: a block device.

mod support;

use disk::{
    Below, Buf, ByteRange, LayerHandle, Operation, Result, Storage, StorageExtent, StorageHandle, StorageLimits,
    ZeroMode,
};
use disk::{DiskError, ErrorKind};
use formats::qcow2::check::{RepairMode, check, repair};
use formats::qcow2::{CreateOptions, Header, Image, OpenOptions, create};
use support::{Place, qemu_img_json, qemu_img_ok, qemu_io, run};
use testkit::MemoryStorage;

/// Memory of a fixed size that is full of old bytes.
struct Device(StorageHandle);

impl Device {
    fn of_old_bytes(size: u64) -> (MemoryStorage, StorageHandle) {
        let memory = MemoryStorage::new(size);
        let inner = memory.handle();
        let old = vec![0xd7; 1 << 20];
        for at in (0..size).step_by(1 << 20) {
            run(inner.write(at, Buf::copy_of(&old[..(size - at).min(1 << 20) as usize]))).expect("write");
        }
        (memory, StorageHandle::new(Self(inner)))
    }

    fn inside(&self, operation: Operation, end: u64) -> Result<()> {
        if end <= self.0.size() { Ok(()) } else { Err(DiskError::new(ErrorKind::NoSpace, operation)) }
    }
}

impl Storage for Device {
    fn name(&self) -> &str {
        "device"
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits { alignment: 512, read_only: false, grows_zeroed: false }
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.inside(Operation::Write, offset + buf.len() as u64)?;
        self.0.write(offset, buf).await
    }
    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.inside(Operation::WriteZeroes, range.end())?;
        self.0.write_zeroes(range, mode).await
    }
    async fn discard(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }
    async fn allocate(&self, range: ByteRange) -> Result<()> {
        self.inside(Operation::Write, range.end())
    }
    async fn sync(&self) -> Result<()> {
        self.0.sync().await
    }
    async fn set_size(&self, _size: u64) -> Result<()> {
        Err(DiskError::new(ErrorKind::Unsupported, Operation::Resize))
    }
    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        Ok(StorageExtent { range, hole: false })
    }
}

#[test]
fn new_images_read_as_zero_whatever_was_there() {
    for options in [
        "",
        "compat=0.10,preallocation=metadata",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
        "preallocation=falloc",
        "preallocation=full,cluster_size=512",
    ] {
        let pairs = options.split(',').filter(|o| !o.is_empty()).map(|o| o.split_once('=').expect("k=v"));
        let (memory, device) = Device::of_old_bytes(16 << 20);
        run(create(&device, None, &CreateOptions::parse(5 << 20, pairs).expect("valid"))).expect(options);
        let place = Place::new();
        memory.write_to(&place.path("x.qcow2")).expect("file");
        qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
        qemu_io(place.dir(), "x.qcow2", &["read -P 0 0 5M", "write -P 6 1M 1M", "read -P 0 2M 3M"]);
        qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
    }
}

#[test]
fn a_device_that_is_too_small_keeps_its_bytes() {
    let (memory, device) = Device::of_old_bytes(4 << 20);
    let options = CreateOptions::parse(8 << 20, [("preallocation", "metadata")]).expect("valid");
    assert_eq!(run(create(&device, None, &options)).expect_err("no room").kind(), ErrorKind::NoSpace);
    assert!(memory.to_vec().iter().all(|b| *b == 0xd7));
}

#[test]
fn refcounts_are_rebuilt_inside() {
    let place = Place::new();
    let (memory, device) = Device::of_old_bytes(16 << 20);
    run(create(&device, None, &CreateOptions::new(8 << 20))).expect("created");
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_io(place.dir(), "x.qcow2", &["write -P 5 1M 2M"]);
    let (file, _) = support::load(&place.path("x.qcow2"));
    let inner = file.handle();
    run(inner.set_size(16 << 20)).expect("as large as the device");
    let device = StorageHandle::new(Device(inner.clone()));
    let header = run(Header::read(&device)).expect("header");
    run(inner.write(header.refcount_table_offset, Buf::zeroed(8))).expect("the only block is gone");
    let before = run(check(&device, None, &mut |_, _| {})).expect("checked");
    assert!(before.corruptions > 30, "{before:?}");
    let after = run(repair(&device, None, RepairMode::All, &mut |_, _| {})).expect("repaired");
    assert!(after.is_clean(), "{after:?}");
    file.write_to(&place.path("x.qcow2")).expect("file");
    let (json, code) = qemu_img_json(place.dir(), &["check", "--output=json", "x.qcow2"]);
    assert_eq!(code, 0, "{json}");
    qemu_io(place.dir(), "x.qcow2", &["read -P 5 1M 2M", "read -P 0 3M 5M"]);
}

/// Writes whole clusters through the engine, as a chain does.
fn write_cluster(layer: &LayerHandle, cluster: u64, byte: u8) -> Result<()> {
    let range = ByteRange::new(cluster << 16, 1 << 16);
    let prepared = run(layer.prepare_write(range, Below::Zeroes))?;
    let plan = *prepared.plan();
    assert_eq!(plan.range, range, "a cluster is one piece");
    run(layer.storage(plan.storage).write(plan.offset, Buf::copy_of(&[byte; 1 << 16])))?;
    run(prepared.commit())
}

#[test]
fn a_guest_writes_until_the_device_is_full_and_goes_on_in_what_it_gave_back() {
    let (memory, device) = Device::of_old_bytes(4 << 20);
    run(create(&device, None, &CreateOptions::new(16 << 20))).expect("created");
    let open = || LayerHandle::from_rc(run(Image::open(device.clone(), None, OpenOptions::default())).expect("opens"));
    let mut layer = open();
    let mut written = 0;
    let error = loop {
        match write_cluster(&layer, written, 1) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    assert!(written >= 58, "64 clusters less the tables are the guest's, {written} were");
    run(layer.flush()).expect("flush");
    run(layer.discard(ByteRange::new(0, 8 << 16), Below::Zeroes)).expect("discard");
    run(layer.close()).expect("close");
    for life in 0..2 {
        layer = open();
        for cluster in 100 + 4 * life..104 + 4 * life {
            write_cluster(&layer, cluster, 2).expect("freed space is used again");
        }
        run(layer.close()).expect("close");
    }
    let report = run(check(&device, None, &mut |_, _| {})).expect("check");
    assert!(report.is_clean(), "{report:?}");
    let place = Place::new();
    memory.write_to(&place.path("x.qcow2")).expect("file");
    qemu_img_ok(place.dir(), &["check", "x.qcow2"]);
    let (kept, end) = (format!("read -P 1 512k {}k", (written - 8) * 64), format!("read -P 2 {}k 512k", 100 * 64));
    qemu_io(place.dir(), "x.qcow2", &["read -P 0 0 512k", &kept, &end]);
}
