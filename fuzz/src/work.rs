//! What is done to an image, and what must hold.
//!
//! Always: no panic, no deadlock, bounded memory and time (libFuzzer's limits). And:
//! * A check writes nothing. What a repair leaves clean, a check finds clean.
//! * An image that a check finds clean, and in which every operation succeeds, shows the bytes that were
//!   written, and is clean after the close.

use crate::{Input, Op};
use chain::{Chain, LayerInfo};
use disk::{
    Below, Buf, ByteRange, ContentId, Disk, DiskHandle, ErrorKind, HistoryMark, LayerHandle, ParentLink, Result,
    StorageHandle, WriteFlags, ZeroMode,
};
use formats::Format;
use formats::qcow2::check::{CheckReport, RepairMode, Severity, check, repair};
use formats::qcow2::{
    BitmapDirectory, BitmapRanges, Compression, Corruption, Header, Image, OpenOptions, SnapshotTable, encode_cluster,
};
use futures_util::future::join_all;
use std::rc::Rc;
use testkit::MemoryStorage;
use testkit::executor::run;

/// Bytes of the guest's disk that are looked at, and whose contents are known.
const WINDOW: u64 = 512 << 10;
/// Extents that are asked for.
const MAX_EXTENTS: usize = 256;

async fn open(input: &Input, options: OpenOptions) -> Result<Rc<Image>> {
    let data = input.data.as_ref().map(|data| data.handle());
    Image::open(input.image.handle(), data, OpenOptions { l2_cache_bytes: 0, ..options }).await
}

fn chain_of(image: Rc<Image>) -> Rc<Chain> {
    let handle = LayerHandle::from_rc(image);
    Rc::new(Chain::new(vec![LayerInfo { path: "image".into(), format: Format::Qcow2, handle }]))
}

/// The first bytes, as far as they can be read.
async fn read_window(disk: &DiskHandle) -> Vec<u8> {
    let size = disk.geometry().size;
    let mut at = ByteRange::new(0, size);
    for _ in 0..MAX_EXTENTS {
        if at.is_empty() {
            break;
        }
        match disk.map(at).await {
            Ok(extent) => at = at.skip(extent.range.len()),
            Err(_) => break,
        }
    }
    let len = size.min(WINDOW) as usize;
    if let Ok(bytes) = disk.read(0, Buf::new(len)).await {
        return bytes.to_vec();
    }
    // In parts, so that one that fails does not hide the others.
    for offset in (0..len).step_by(4096) {
        let _ = disk.read(offset as u64, Buf::new(4096.min(len - offset))).await;
    }
    Vec::new()
}

/// Opens an image for reading, at its snapshots as well, and reads.
pub fn look(input: &Input) {
    run(1, async {
        let storage = input.image.handle();
        if let Ok(header) = Header::read(&storage).await {
            let encoded = header.encode();
            drop(encoded);
            let identity = header.identity();
            assert!(identity.content.is_none() || identity.lapsed.is_none());
            if let Ok(table) = SnapshotTable::read(&storage, &header).await {
                for snapshot in table.snapshots.iter().take(3) {
                    let snapshot = Some(snapshot.id_text().into_owned());
                    if let Ok(image) = open(input, OpenOptions { snapshot, ..OpenOptions::default() }).await {
                        read_window(&DiskHandle::from_rc(chain_of(image))).await;
                    }
                }
            }
        }
        if let Ok(header) = Header::read(&storage).await
            && let Ok(directory) = BitmapDirectory::read(&storage, &header).await
        {
            for bitmap in directory.bitmaps.iter().take(3) {
                let Ok(mut ranges) = BitmapRanges::open(&storage, &header, &bitmap.name).await else { continue };
                let mut end = 0;
                for _ in 0..MAX_EXTENTS {
                    let Ok(Some(range)) = ranges.next().await else { break };
                    assert!(!range.is_empty() && range.offset() >= end && range.end() <= header.size);
                    end = range.end() + 1; // Neighbours are merged.
                }
            }
        }
        if let Ok(image) = open(input, OpenOptions { read_only: true, ..OpenOptions::default() }).await {
            let disk = DiskHandle::from_rc(chain_of(image));
            read_window(&disk).await;
            let _ = disk.close().await;
        }
    });
    assert_eq!(input.image.counters().writes, 0, "reading must not write");
}

/// Where an operation takes place.
fn range_of(op: Op, size: u64) -> ByteRange {
    if size == 0 {
        return ByteRange::new(0, 0);
    }
    // Most in the window, some anywhere.
    let offset = match op.kind >> 6 {
        3 => (u64::from(op.offset) << 28) % size,
        2 => u64::from(op.offset) * 512 % size,
        _ => u64::from(op.offset) % size,
    };
    let len = if op.kind & 32 != 0 { u64::from(op.len) * 64 } else { u64::from(op.len) };
    ByteRange::new(offset, len).intersect(ByteRange::new(0, size))
}

/// What the guest's bytes should be; empty when nobody knows.
type Known = Vec<u8>;

fn set(known: &mut Known, range: ByteRange, byte: u8) {
    let inside = range.intersect(ByteRange::new(0, known.len() as u64));
    if !inside.is_empty() {
        known[inside.offset() as usize..inside.end() as usize].fill(byte);
    }
}

async fn apply(op: Op, disk: &DiskHandle, chain: &Chain, compression: Compression, known: &mut Known) -> Result<()> {
    let size = disk.geometry().size;
    let range = range_of(op, size);
    let byte = (op.len as u8) | 1;
    let flags = WriteFlags { fua: op.kind & 16 != 0 };
    match op.kind % 16 {
        0..=4 => {
            set(known, range, byte);
            disk.write(range.offset(), Buf::copy_of(&vec![byte; range.len() as usize]), flags).await
        }
        5 | 6 => {
            set(known, range, 0);
            disk.write_zeroes(range, ZeroMode { unmap: op.kind % 16 == 5, fast_only: false }, flags).await
        }
        7 | 8 => {
            disk.discard(range, flags).await?;
            let inside = range.intersect(ByteRange::new(0, known.len() as u64));
            if !inside.is_empty() {
                let now = disk.read(inside.offset(), Buf::new(inside.len() as usize)).await?;
                for (now, was) in now.iter().zip(&mut known[inside.offset() as usize..]) {
                    assert!(*now == 0 || now == was, "a discarded byte is neither zero nor old");
                    *was = *now;
                }
            }
            Ok(())
        }
        9 | 10 => {
            let Some(unit) = chain.top().geometry().encoded_unit.filter(|unit| *unit <= 64 << 10 && size > 0) else {
                return Ok(());
            };
            let start = range.offset() / unit * unit;
            let range = ByteRange::between(start, (start + unit).min(size));
            let Some(encoded) = encode_cluster(compression, &vec![byte; unit as usize]) else { return Ok(()) };
            set(known, range, byte);
            chain.top().write_encoded(range, &encoded).await
        }
        11 if op.len % 4 == 3 => {
            let mark = HistoryMark { lineage: [1; 16], moment: [byte; 16] };
            let mark = (!op.offset.is_multiple_of(4)).then_some(mark);
            if chain.top().set_history_mark(mark).await? {
                assert_eq!(chain.top().history_mark(), mark);
            }
            if op.len % 8 == 7 {
                let parent = ContentId::from_bytes([byte; 16]);
                let link = ParentLink { parent, second: None, size, modified: 1, linked: 2 };
                if chain.top().set_parent_link(Some(link)).await? {
                    assert_eq!(chain.top().parent_link(), Some(link));
                    assert!(chain.top().content_id().is_some());
                }
            }
            Ok(())
        }
        11 => disk.flush().await,
        12 => {
            // A write that is given up.
            if range.is_empty() {
                return Ok(());
            }
            drop(chain.top().prepare_write(range, Below::Zeroes).await?);
            Ok(())
        }
        13 => {
            let wanted = u64::from(op.offset) * 512;
            let old = known.len();
            disk.resize(wanted).await?;
            if !known.is_empty() {
                known.truncate(wanted.min(WINDOW) as usize);
                if old as u64 == size {
                    known.resize(wanted.min(WINDOW) as usize, 0);
                }
            }
            Ok(())
        }
        14 => {
            let mut at = range;
            for _ in 0..MAX_EXTENTS {
                if at.is_empty() {
                    break;
                }
                at = at.skip(disk.map(at).await?.range.len());
            }
            Ok(())
        }
        _ => disk.read(range.offset(), Buf::new(range.len() as usize)).await.map(drop),
    }
}

/// Whether nothing is wrong, in the file as it is and in the space behind its end: there a check looks for nothing, but
/// a file that grows shows what is counted there.
async fn is_clean(image: &MemoryStorage, data: Option<&StorageHandle>) -> bool {
    let copy = image.named("copy");
    let storage = &copy.handle();
    for longer in [0, 4 << 20] {
        if storage.set_size(storage.size() + longer).await.is_err() {
            return false;
        }
        match check(storage, data, &mut |_, _| {}).await {
            Ok(report) if report.is_clean() && !report.dirty && !report.marked_corrupt => {}
            _ => return false,
        }
    }
    true
}

/// Opens an image for writing and does what the input says.
pub fn work(input: &mut Input) {
    let concurrent = input.flags & 1 != 0;
    if concurrent {
        input.image = std::mem::replace(&mut input.image, MemoryStorage::new(0)).yielding(1);
    }
    let input = &*input;
    run(u64::from(input.flags), async {
        let storage = input.image.handle();
        let data = input.data.as_ref().map(|data| data.handle());
        let mut sound = is_clean(&input.image, data.as_ref()).await;
        let Ok(image) = open(input, OpenOptions::default()).await else { return };
        let compression = image.header().compression;
        let mut chain = chain_of(image);
        let mut disk = DiskHandle::from_rc(Rc::clone(&chain));
        let mut known = read_window(&disk).await;
        if !sound || concurrent {
            known.clear();
        }
        let mut failed = false;
        if concurrent {
            for ops in input.ops.chunks(6) {
                let done = join_all(ops.iter().map(|op| {
                    let (disk, chain) = (disk.clone(), Rc::clone(&chain));
                    async move {
                        // Nobody knows what overlapping requests leave.
                        match op.kind % 16 {
                            13 => disk.flush().await,
                            _ => apply(*op, &disk, &chain, compression, &mut Vec::new()).await,
                        }
                    }
                }))
                .await;
                failed |= done.iter().any(Result::is_err);
            }
        } else {
            for op in &input.ops {
                if let Err(error) = apply(*op, &disk, &chain, compression, &mut known).await {
                    assert!(
                        !sound
                            || failed && error.kind() == ErrorKind::Poisoned
                            || matches!(
                                error.kind(),
                                ErrorKind::NoSpace
                                    | ErrorKind::Invalid
                                    | ErrorKind::Unsupported
                                    | ErrorKind::OutOfRange
                                    | ErrorKind::Corrupt
                            ),
                        "in a sound image: {error:?}"
                    );
                    failed = true;
                }
                if input.flags & 2 != 0 && op.kind & 0x80 != 0 {
                    if Disk::close(&*chain).await.is_err() {
                        return;
                    }
                    let Ok(image) = open(input, OpenOptions::default()).await else {
                        assert!(!sound, "a sound image cannot be opened again");
                        return;
                    };
                    chain = chain_of(image);
                    disk = DiskHandle::from_rc(Rc::clone(&chain));
                }
            }
        }
        // A compressed cluster that cannot be read stays so whatever its counts say.
        sound &= !failed;
        let now = read_window(&disk).await;
        let closed = Disk::close(&*chain).await;
        if !sound {
            return;
        }
        closed.expect("a sound image is closed");
        if !known.is_empty() {
            let differs = now.iter().zip(&known).position(|(a, b)| a != b);
            assert!(differs.is_none() && now.len() == known.len(), "byte {differs:?} differs");
        }
        let report = check(&storage, data.as_ref(), &mut |_, _| {}).await.expect("a sound image is checked");
        assert!(report.is_clean(), "not clean after the close: {report:?}");
    });
}

/// How many corruptions were found, but for copied flags; `None` when not all are listed. In an image that has
/// corruptions, giving space back leaves these flags as they are: one that is missing costs a copy, and one that was set
/// by doubtful counts could cost data.
fn worse_than_flags(report: &CheckReport) -> Option<usize> {
    let is_flag = |what: &Corruption| matches!(what, Corruption::CopiedL1 { .. } | Corruption::CopiedL2 { .. });
    let corruptions = report.findings.iter().filter(|finding| finding.severity == Severity::Corruption);
    (report.findings_omitted == 0).then(|| corruptions.filter(|finding| !is_flag(&finding.what)).count())
}

/// Checks an image, repairs copies of it in both ways, and checks and reads what comes out.
pub fn check_and_repair(input: &Input) {
    run(1, async {
        let data = input.data.as_ref().map(|data| data.handle());
        let storage = input.image.handle();
        let before = check(&storage, data.as_ref(), &mut |_, _| {}).await;
        assert_eq!(input.image.counters().writes, 0, "a check must not write");
        for mode in [RepairMode::Leaks, RepairMode::All] {
            let copy = input.image.named("copy");
            copy.full_at(128 << 20);
            let storage = copy.handle();
            let Ok(said) = repair(&storage, data.as_ref(), mode, &mut |_, _| {}).await else { continue };
            let before = before.as_ref().expect("what can be repaired can be checked");
            let found = check(&storage, data.as_ref(), &mut |_, _| {}).await.expect("repaired images can be checked");
            // It may say more where it gave up half-way; less would be a lie.
            assert!(
                said.corruptions >= found.corruptions
                    && said.leaks >= found.leaks
                    && said.check_errors >= found.check_errors
                    && (said.dirty, said.marked_corrupt) == (found.dirty, found.marked_corrupt),
                "a check finds more than the repair said ({mode:?}): {found:?}, {said:?}"
            );
            if mode == RepairMode::Leaks {
                assert!(before.corruptions > 0 || found.corruptions == 0, "giving space back made it worse");
                if let (Some(was), Some(is)) = (worse_than_flags(before), worse_than_flags(&found)) {
                    assert!(is <= was, "giving space back made it worse: {before:?}, {found:?}");
                }
            }
            if found.is_clean() && mode == RepairMode::All {
                let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
                if let Ok(image) = Image::open(storage.clone(), data.clone(), options).await {
                    let chain = chain_of(image);
                    read_window(&DiskHandle::from_rc(Rc::clone(&chain))).await;
                    let _ = Disk::close(&*chain).await;
                }
            }
        }
    });
}
