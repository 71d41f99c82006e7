//! A history whose sidecar holds anything.
//!
//! Input: flags, and then changes of 12 bytes and more to a sidecar that valid operations have made. With flag 1 the changed
//! blocks get right checksums, so that the mutator gets behind them.
//!
//! Always: no panic, bounded memory and time. And: when one block was changed without its checksum, the history says so,
//! refuses its points, or tells every change.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, LayerHandle, LocalFuture, Result, StorageHandle, WriteFlags, ZeroMode};
use formats::Format;
use formats::raw::{OpenOptions, RawLayer};
use std::cell::Cell;
use std::rc::Rc;
use testkit::executor::run;
use testkit::{MemoryStorage, SparseBytes};
use tracking::{
    Boot, ChangeKind, CreateOptions, History, Host, Id, ImageFacts, ImageMark, NewPoint, PendingRun, Tracked,
};

const BLOCK: u64 = 4096;
const POINTS: u64 = 4 << 20;
const GROUPS: u64 = 16 << 20;
const GROUP: u64 = 2 * BLOCK + 128 * 2 * BLOCK;
const GRANULE: u64 = 4096;
/// More than a group's granules.
const SIZE: u64 = 136 * 1024 * GRANULE;
/// Parts of an answer that are asked for.
const PARTS: usize = 64;
/// Bytes of the disk that operations reach.
const WINDOW: u64 = 64 * GRANULE;

struct FuzzHost(Cell<u128>);

impl Host for FuzzHost {
    fn now(&self) -> u64 {
        1_000_000
    }
    fn boot(&self) -> Boot {
        Boot { id: Id([1; 16]), began: 1 }
    }
    fn random_id(&self) -> Id {
        self.0.set(self.0.get() + 1);
        Id(self.0.get().to_le_bytes())
    }
    fn facts(&self) -> LocalFuture<'_, Result<ImageFacts>> {
        Box::pin(async { Ok(ImageFacts::default()) })
    }
    fn mark(&self) -> Option<ImageMark> {
        None
    }
    fn set_mark(&self, _mark: ImageMark) -> LocalFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }
    fn let_time_pass(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }
    fn remove_sidecar(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

fn host() -> Rc<FuzzHost> {
    Rc::new(FuzzHost(Cell::new(0)))
}

fn raw(image: &MemoryStorage) -> Rc<Chain> {
    let handle = LayerHandle::new(RawLayer::open(image.handle(), OpenOptions::default()));
    Rc::new(Chain::new(vec![LayerInfo { path: "disk".into(), format: Format::Raw, handle }]))
}

/// A sidecar that valid operations have made.
struct Base {
    bytes: SparseBytes,
    /// Blocks that hold something.
    blocks: Vec<u64>,
    /// Points, and the granules that were written to since.
    touched: Vec<(String, Vec<u64>)>,
}

fn point(name: &str) -> NewPoint {
    NewPoint { name: name.to_owned(), set: Id::NONE }
}

fn base(closed: bool) -> Base {
    let (image, sidecar) = (MemoryStorage::new(SIZE), MemoryStorage::new(0));
    let mut touched: Vec<(String, Vec<u64>)> = Vec::new();
    run(1, async {
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        let history = History::create(sidecar.handle(), host(), options).await.expect("no faults");
        history.set_open_limit(0);
        let disk = Rc::new(Tracked::new(raw(&image), Rc::new(history)).await.expect("no faults"));
        for n in 0..4_u64 {
            for granule in [n, 9 * n + 3, 1024 + n, 130 * 1024 + 2 * n] {
                touched.iter_mut().for_each(|(_, granules)| granules.push(granule));
                let bytes = Buf::copy_of(&[1; 512]);
                disk.write(granule * GRANULE, bytes, WriteFlags::default()).await.expect("no faults");
            }
            let name = format!("p{n}");
            disk.mark(point(&name)).await.expect("no faults");
            touched.push((name, Vec::new()));
        }
        let pending = vec![PendingRun { start: 7, end: 8, kind: ChangeKind::Zero }];
        disk.history().set_pending("p1", pending).await.expect("no faults");
        for granule in 20..26 {
            touched.iter_mut().for_each(|(_, granules)| granules.push(granule));
            let bytes = Buf::copy_of(&[1; 512]);
            disk.write(granule * GRANULE, bytes, WriteFlags::default()).await.expect("no faults");
        }
        disk.history().give_sign().await.expect("no faults");
        if closed {
            disk.close().await.expect("no faults");
        }
    });
    let bytes = sidecar.snapshot();
    let blocks = (0..bytes.size() / BLOCK)
        .filter(|block| {
            let mut block_bytes = [0; BLOCK as usize];
            bytes.read(block * BLOCK, &mut block_bytes);
            block_bytes.iter().any(|byte| *byte != 0)
        })
        .collect();
    Base { bytes, blocks, touched }
}

thread_local! {
    static BASES: [Base; 2] = [base(false), base(true)];
}

/// Gives a changed block its right checksum.
fn reseal(bytes: &mut SparseBytes, block: u64) {
    let at = block * BLOCK;
    let sum_at = match at {
        0 | BLOCK => 12,
        _ if at < POINTS => 4,
        _ if at < GROUPS => return reseal_points(bytes),
        _ if (at - GROUPS) % GROUP < 2 * BLOCK => 4,
        _ => return,
    };
    let mut block = [0; BLOCK as usize];
    bytes.read(at, &mut block);
    block[sum_at..sum_at + 4].fill(0);
    let sum = crc32c::crc32c(&block);
    block[sum_at..sum_at + 4].copy_from_slice(&sum.to_le_bytes());
    bytes.write(at, &block);
}

/// Both superblocks get the sum of the points that they speak of.
fn reseal_points(bytes: &mut SparseBytes) {
    const SLOT: u64 = 43;
    const LEN: u64 = 88;
    for slot in 0..2 {
        let (mut which, mut len) = ([0], [0; 4]);
        bytes.read(slot * BLOCK + SLOT, &mut which);
        bytes.read(slot * BLOCK + LEN, &mut len);
        let len = u32::from_le_bytes(len).min(1 << 20);
        let mut points = vec![0; len as usize];
        bytes.read(POINTS + u64::from(which[0] & 1) * (6 << 20), &mut points);
        bytes.write(slot * BLOCK + LEN + 4, &crc32c::crc32c(&points).to_le_bytes());
        reseal(bytes, slot);
    }
}

/// Applies the input to a base; returns the blocks that were changed.
fn change(base: &Base, bytes: &mut SparseBytes, mut input: &[u8]) -> Vec<u64> {
    let mut changed = Vec::new();
    // Which block, where in it, how many bytes; and the bytes.
    while let Some((head, rest)) = input.split_first_chunk::<4>() {
        let block = base.blocks[usize::from(head[0]) % base.blocks.len()];
        let within = u64::from(u16::from_le_bytes([head[1], head[2]])) % BLOCK;
        let len = usize::from(head[3] % 32 + 1).min(rest.len()).min((BLOCK - within) as usize);
        let (new, rest) = rest.split_at(len);
        bytes.write(block * BLOCK + within, new);
        changed.push(block);
        input = rest;
    }
    changed.sort_unstable();
    changed.dedup();
    changed
}

/// Asks for the changes since every point; `None` where the history says that it does not know.
async fn ask(history: &History) -> Vec<(String, Option<Vec<ByteRange>>)> {
    let mut answers = Vec::new();
    let points = history.points();
    for (n, point) in points.iter().take(8).enumerate() {
        let until = points.get(n + 1).map(|point| point.name.as_str()).filter(|_| n % 2 == 1);
        let Ok(query) = history.changes(&point.name, until) else { continue };
        let mut ranges = Some(Vec::new());
        let mut next = Some(0);
        for _ in 0..PARTS {
            let Some(from) = next else { break };
            match history.next_changes(&query, from, 500).await {
                Ok(span) => {
                    if let Some(ranges) = &mut ranges {
                        ranges.extend(span.changes.iter().map(|change| change.range));
                    }
                    next = span.next;
                }
                Err(_) => {
                    ranges = None;
                    break;
                }
            }
        }
        if until.is_none() && next.is_none() {
            answers.push((point.name.clone(), ranges));
        }
    }
    answers
}

async fn look(storage: StorageHandle) -> Vec<(String, Option<Vec<ByteRange>>)> {
    match History::open(storage, host()).await {
        Ok((history, _)) => ask(&history).await,
        Err(_) => Vec::new(),
    }
}

async fn work(storage: StorageHandle) -> std::result::Result<(), tracking::HistoryError> {
    let (history, _) = History::open(storage, host()).await?;
    let disk = Rc::new(Tracked::new(raw(&MemoryStorage::new(SIZE)), Rc::new(history)).await?);
    for n in 0..4 {
        let (at, range) = (n * 7 * GRANULE % WINDOW, ByteRange::new(n * GRANULE, 3 * GRANULE));
        disk.write(at, Buf::copy_of(&[2; 700]), WriteFlags::default()).await?;
        disk.write_zeroes(range, ZeroMode::default(), WriteFlags { fua: n == 2 }).await?;
        disk.discard(range, WriteFlags::default()).await?;
    }
    disk.flush().await?;
    if let Ok(point) = disk.mark(point("new")).await {
        disk.write(GRANULE, Buf::copy_of(&[2; 700]), WriteFlags::default()).await?;
        let query = disk.history().changes("new", None)?;
        let _ = disk.history().next_changes(&query, 0, 10).await;
        disk.history().set_pending(&point.name, vec![PendingRun { start: 0, end: 9, kind: ChangeKind::Data }]).await?;
    }
    disk.history().give_sign().await?;
    ask(disk.history()).await;
    disk.resize(SIZE / 2 + 512).await?;
    disk.resize(SIZE).await?;
    if let Some(first) = disk.history().points().first() {
        disk.history().delete_point(&first.name).await?;
    }
    disk.history().trust().await?;
    disk.close().await?;
    Ok(())
}

/// Opens a changed sidecar for reading and for writing, and works with it.
///
/// # Panics
/// When a change is missed.
pub fn history(input: &[u8]) {
    let Some((flags, input)) = input.split_first() else { return };
    BASES.with(|bases| {
        let base = &bases[usize::from(flags >> 1 & 1)];
        let mut bytes = base.bytes.clone();
        let mut changed = change(base, &mut bytes, input);
        let resealed = flags & 1 != 0;
        if resealed {
            // Superblocks last: points change them.
            changed.sort_unstable_by_key(|block| std::cmp::Reverse(*block));
            changed.iter().for_each(|block| reseal(&mut bytes, *block));
        } else if flags & 4 != 0 {
            bytes.set_size(bytes.size() / 256 * u64::from(flags >> 3));
            changed.clear();
        }
        run(1, async {
            let reader = MemoryStorage::of(bytes.clone()).read_only();
            let answers = look(reader.handle()).await;
            if !resealed && changed.len() <= 1 {
                for (name, ranges) in answers {
                    let Some(ranges) = ranges else { continue };
                    let Some((_, granules)) = base.touched.iter().find(|(n, _)| *n == name) else { continue };
                    for granule in granules {
                        let told = ranges.iter().any(|range| range.contains(ByteRange::new(granule * GRANULE, 512)));
                        assert!(told, "the change of granule {granule} since {name} was missed");
                    }
                }
            }
            let writer = MemoryStorage::of(bytes);
            writer.full_at(GROUPS + 4 * GROUP);
            let _ = work(writer.handle()).await;
            look(writer.handle()).await;
        });
    });
}

/// First inputs: one change to every block, with and without a checksum.
pub(crate) fn seeds(write: &dyn Fn(String, &[u8])) {
    BASES.with(|bases| {
        for flags in 0..4_u8 {
            let blocks = bases[usize::from(flags >> 1)].blocks.len().min(256);
            // The head of each block, and something behind it.
            for (n, within) in (0..blocks).flat_map(|n| [(n, 24_u16), (n, 64), (n, 100)]) {
                let mut bytes = vec![flags, n as u8];
                bytes.extend_from_slice(&within.to_le_bytes());
                bytes.push(7);
                bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
                write(format!("seed-{flags}-{n}-{within}"), &bytes);
            }
        }
    });
}
