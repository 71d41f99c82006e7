//! What every layer must do.

use super::{LayerDisk, Workload, disk, workload};
use crate::{ModelDisk, SparseBytes};
use disk::{
    Below, Buf, ByteRange, ContentId, DiskHandle, HistoryMark, LayerHandle, ParentLink, Presence, StorageHandle,
    WriteFlags, ZeroMode,
};
use futures_util::future::join;
use std::future::Future;

/// Encodes one unit's bytes.
pub type Encode = fn(&[u8]) -> Vec<u8>;

/// What a layer can do.
#[derive(Clone, Copy, Debug)]
pub struct LayerCaps {
    /// Whether bytes may be absent, so that a parent shows through.
    pub parent: bool,
    /// Whether it can change its size.
    pub resizes: bool,
    /// Encodes one unit, where the layer stores encoded bytes.
    pub encode: Option<Encode>,
}

const SIZE: u64 = 1 << 20;

/// Runs the suite on layers that `make` makes: for a disk of that many bytes, empty, writable, nobody else's.
/// The disk suite runs over the layer, too.
///
/// # Panics
/// At the first breach of the contract.
pub async fn layer<F: Future<Output = LayerHandle>>(make: impl Fn(u64) -> F, caps: LayerCaps) {
    let make = &make;
    disk(|size| async move { DiskHandle::new(LayerDisk::new(make(size).await, None)) }, caps.resizes).await;
    aborted(make(SIZE).await).await;
    stable(make(SIZE).await).await;
    marked(make(SIZE).await).await;
    identified(make(SIZE).await).await;
    if caps.parent {
        for seed in 0..6 {
            over_parent(make(SIZE).await, seed).await;
        }
        zeroes_meet_a_write(make(SIZE).await).await;
    }
    if let Some(encode) = caps.encode {
        encoded(make(SIZE).await, encode).await;
    }
}

/// A history's mark is what was set last, and stays over writes of whoever set it.
async fn marked(layer: LayerHandle) {
    assert_eq!(layer.history_mark(), None, "a new image has no history");
    let first = HistoryMark { lineage: [1; 16], moment: [2; 16] };
    let bears = layer.set_history_mark(Some(first)).await.expect("set");
    assert_eq!(layer.history_mark(), bears.then_some(first));
    let second = HistoryMark { moment: [3; 16], ..first };
    assert_eq!(layer.set_history_mark(Some(second)).await.expect("set"), bears);
    let d = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    d.write(5000, Buf::copy_of(&[7; 9000]), WriteFlags::default()).await.expect("write");
    d.flush().await.expect("flush");
    assert_eq!(layer.history_mark(), bears.then_some(second), "a write of whoever set it leaves it");
    assert_eq!(d.read(5000, Buf::new(9000)).await.expect("read")[..], [7; 9000]);
    assert_eq!(layer.set_history_mark(None).await.expect("taken out"), bears);
    assert_eq!(layer.history_mark(), None);
    d.close().await.expect("close");
}

/// The content's id changes with the first write of an opening, before it and no more; the link is what was set last.
async fn identified(layer: LayerHandle) {
    assert_eq!(layer.identity().lapsed, None, "nobody else has opened it");
    let link = |n: u8| ParentLink {
        parent: (n > 1).then(|| ContentId::from_bytes([n; 16]).expect("an id")),
        second: ContentId::from_bytes([n / 2; 16]),
        size: u64::from(n) << 30,
        modified: i64::from(n) - 2,
        linked: u64::from(n),
    };
    let bears = layer.set_parent_link(Some(link(1))).await.expect("set");
    assert_eq!(layer.parent_link(), bears.then_some(link(1)));
    let first = layer.content_id();
    assert_eq!(first.is_some(), bears, "who bears a link bears an id");
    assert_eq!(layer.set_parent_link(Some(link(2))).await.expect("set"), bears);
    assert_eq!((layer.parent_link(), layer.content_id()), (bears.then_some(link(2)), first), "a link is no content");
    layer.link_with_first_write(link(3));
    assert_eq!(layer.parent_link(), bears.then_some(link(2)), "nothing before the first write");
    let d = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    d.write(5000, Buf::copy_of(&[7; 9000]), WriteFlags::default()).await.expect("write");
    let second = layer.content_id();
    assert_eq!((second.is_some(), second == first), (bears, !bears), "other content, another id");
    assert_eq!(layer.parent_link(), bears.then_some(link(3)));
    if let (Some(first), Some(second)) = (first, second) {
        assert!(first.same_image(second));
    }
    d.write(50000, Buf::copy_of(&[7; 9000]), WriteFlags::default()).await.expect("write");
    d.flush().await.expect("flush");
    assert_eq!(layer.content_id(), second, "once in an opening");
    layer.close().await.expect("close");
    assert_eq!(layer.content_id(), second);
    layer.write_zeroes(ByteRange::new(0, 65536), Below::Zeroes, ZeroMode::default()).await.expect("zeroes");
    let third = layer.content_id();
    assert!(bears == (third != second), "what is written after a close is announced again");
    layer.close().await.expect("close");
    let given = ContentId::from_bytes([0xcc; 16]).expect("an id");
    assert_eq!(layer.renew_content_id(given).await.expect("given"), bears);
    assert_eq!(layer.content_id(), bears.then_some(given));
    d.write(5000, Buf::copy_of(&[9; 512]), WriteFlags::default()).await.expect("write");
    assert_eq!(layer.content_id(), bears.then_some(given), "the first write leaves what was given ahead of it");
    assert_eq!(layer.set_parent_link(None).await.expect("taken out"), bears);
    assert_eq!((layer.parent_link(), layer.content_id()), (None, bears.then_some(given)));
    d.close().await.expect("close");
}

fn parent_bytes(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    fastrand::Rng::with_seed(seed).fill(&mut bytes[..SIZE as usize / 2]);
    bytes
}

/// What the layer holds shows, what it does not hold shows the parent.
async fn over_parent(layer: LayerHandle, seed: u64) {
    let bytes = parent_bytes(seed);
    let mut parent = SparseBytes::new(0);
    parent.write(0, &bytes);
    let d = DiskHandle::new(LayerDisk::new(layer, Some(parent)));
    let model = ModelDisk::of(&bytes);
    model.check_equal(&d).await.expect("read");
    let w = match seed.is_multiple_of(2) {
        true => Workload { seed, requests: 120, ..Workload::default() },
        // Crowded: requests meet in the same units, whose old bytes are the parent's.
        false => Workload { seed, requests: 25, workers: 8, span: Some(256 << 10), ..Workload::default() },
    };
    workload(&d, &model, w).await.unwrap_or_else(|error| panic!("{w:?}: {error:?}"));
    model.check_equal(&d).await.expect("read");
    d.close().await.expect("close");
}

/// Zeroes that meet a write under way are not undone by the old bytes that it filled its blocks with.
async fn zeroes_meet_a_write(layer: LayerHandle) {
    let bytes = parent_bytes(7);
    let mut parent = SparseBytes::new(0);
    parent.write(0, &bytes);
    let d = LayerDisk::new(layer.clone(), Some(parent.clone()));
    let handle = DiskHandle::new(LayerDisk::new(layer.clone(), Some(parent)));
    let none = WriteFlags::default();
    let model = ModelDisk::of(&bytes);
    for offset in [700, 200_100] {
        let guard = layer.guard();
        let issued = model.issue_write(offset, &[1; 100]);
        let filled = d.fill_piece(offset, &[1; 100]).await.expect("write without commit");
        let zeroed = ByteRange::new(offset / 65_536 * 65_536, 65_536);
        let zeroes = model.write_zeroes(&handle, zeroed, ZeroMode::default(), none);
        let commit = async {
            filled.commit().await.expect("commit");
            model.end(issued, false, false);
        };
        let (zeroes, ()) = join(zeroes, commit).await;
        zeroes.expect("zero");
        drop(guard);
        model.check_equal(&handle).await.expect("read");
    }
    handle.close().await.expect("close");
}

/// A ticket that is not committed leaves the bytes as they were, and the blocks free for the next.
async fn aborted(layer: LayerHandle) {
    let d = LayerDisk::new(layer.clone(), None);
    let handle = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    let model = ModelDisk::new(SIZE);
    let bytes = vec![0x11; 100_000];
    for offset in [0, 300_000, 300_000, SIZE - 100_000] {
        let prepared = layer.prepare_write(ByteRange::new(offset, bytes.len() as u64), Below::Zeroes).await;
        let in_place = prepared.expect("prepare").plan().ticket.is_none();
        if !in_place {
            let guard = layer.guard();
            drop(d.fill_piece(offset, &bytes).await.expect("write without commit"));
            drop(guard);
            model.check_equal(&handle).await.expect("read");
        }
        model.write(&handle, offset, Buf::copy_of(&bytes[..5_000]), WriteFlags::default()).await.expect("write");
        model.check_equal(&handle).await.expect("read");
    }
    handle.close().await.expect("close");
}

/// What a guard protects is not given to other bytes.
async fn stable(layer: LayerHandle) {
    let handle = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    let none = WriteFlags::default();
    handle.write(0, Buf::copy_of(&vec![0x77; 256 << 10]), none).await.expect("write");
    let guard = layer.guard();
    let mut places: Vec<(StorageHandle, u64, u64)> = Vec::new();
    let mut rest = ByteRange::new(0, 256 << 10);
    while !rest.is_empty() {
        let extent = layer.map(rest).await.expect("map");
        let Presence::Data { storage, offset } = extent.presence else { panic!("written bytes are data: {extent:?}") };
        places.push((layer.storage(storage).clone(), offset, extent.range.len()));
        rest = rest.skip(extent.range.len());
    }
    let in_place = layer.geometry().unit == 1;
    if in_place {
        return handle.close().await.expect("close"); // Nothing ever moves.
    }
    let zeroed = ByteRange::new(0, 128 << 10);
    let mode = ZeroMode { unmap: true, fast_only: false };
    handle.write_zeroes(zeroed, mode, none).await.expect("zero");
    handle.discard(ByteRange::new(128 << 10, 128 << 10), none).await.expect("discard");
    handle.flush().await.expect("flush");
    for at in 0..8 {
        handle.write((256 << 10) + at * (64 << 10), Buf::copy_of(&[0x22; 64 << 10]), none).await.expect("write");
    }
    for (storage, offset, len) in places {
        // Space that was given back may read as zero, but never as somebody else's bytes.
        let bytes = storage.read_new(offset, len as usize).await.expect("read");
        assert!(bytes.iter().all(|b| *b == 0x77 || *b == 0), "protected space was used for other bytes");
    }
    drop(guard);
    let model = ModelDisk::new(SIZE);
    for at in 0..8 {
        model.end(model.issue_write((256 << 10) + at * (64 << 10), &[0x22; 64 << 10]), false, false);
    }
    model.end(model.issue_write(128 << 10, &[0x77; 128 << 10]), false, false);
    model.end(model.issue_discard(ByteRange::new(128 << 10, 128 << 10)), false, false);
    model.check_equal(&handle).await.expect("read");
    handle.close().await.expect("close");
}

/// Encoded units read as what was encoded, also beside and under later writes.
async fn encoded(layer: LayerHandle, encode: Encode) {
    let unit = layer.geometry().encoded_unit.expect("the layer says that it stores encoded bytes");
    let handle = DiskHandle::new(LayerDisk::new(layer.clone(), None));
    let model = ModelDisk::new(SIZE);
    let units: Vec<u64> = (0..SIZE / unit).step_by(3).take(40).collect();
    for at in &units {
        let bytes: Vec<u8> = (0..unit).map(|n| (n / 64 + at) as u8).collect();
        let issued = model.issue_write(at * unit, &bytes);
        layer.write_encoded(ByteRange::new(at * unit, unit), &encode(&bytes)).await.expect("write encoded");
        model.end(issued, false, false);
    }
    model.check_equal(&handle).await.expect("read");
    let extent = layer.map(ByteRange::new(units[0] * unit, unit)).await.expect("map");
    assert!(matches!(extent.presence, Presence::Encoded { .. }), "found {extent:?}");
    for seed in 0..3 {
        let w = Workload { seed, requests: 20, workers: 4, ..Workload::default() };
        workload(&handle, &model, w).await.unwrap_or_else(|error| panic!("{w:?}: {error:?}"));
        model.check_equal(&handle).await.expect("read");
    }
    handle.close().await.expect("close");
}
