//! Bad blocks in the sidecar: found, or without consequences.

use crate::answers::{all_changes, judge};
use crate::host::{TestHost, created, named};
use disk::{Buf, ByteRange, Disk, WriteFlags};
use std::collections::BTreeMap;
use std::rc::Rc;
use testkit::executor::{self, yield_now};
use testkit::{MemoryStorage, SparseBytes};
use tracking::{Damage, History, HistoryError, Tracked};

const GRANULE: u64 = 4096;
const SIZE: u64 = 3 << 20;
const BLOCK: u64 = 4096;

/// A sidecar of a disk on which much has happened, and what the disk held at its points.
struct Sidecar {
    bytes: SparseBytes,
    host: Rc<TestHost>,
    points: BTreeMap<String, Vec<u8>>,
    now: Vec<u8>,
}

async fn sidecar(closed: bool, writes: u64, wraps: bool) -> Sidecar {
    let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
    let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
    disk.history().set_open_limit(0);
    let mut random = fastrand::Rng::with_seed(writes);
    let mut points = BTreeMap::new();
    for n in 0..4 {
        for _ in 0..writes {
            let at = random.u64(..SIZE / GRANULE) * GRANULE;
            let bytes = Buf::copy_of(&[random.u8(1..); 512]);
            disk.write(at, bytes, WriteFlags::default()).await.expect("no faults");
        }
        if n == 3 {
            break;
        }
        let name = format!("p{n}");
        points.insert(name.clone(), image.to_vec());
        disk.mark(named(&name)).await.expect("no faults");
        if wraps {
            // Many blocks of the journal, so that it goes over its beginning.
            for granule in 0..300 {
                let bytes = Buf::copy_of(&[random.u8(1..); 512]);
                disk.write(granule * GRANULE, bytes, WriteFlags::default()).await.expect("no faults");
            }
        }
    }
    disk.history().give_sign().await.expect("no faults");
    if closed {
        disk.close().await.expect("no faults");
    }
    let now = image.to_vec();
    Sidecar { bytes: sidecar.snapshot(), host, points, now }
}

/// Opens a damaged copy. It says that it is damaged, refuses its points, or says the truth.
async fn look(sidecar: &Sidecar, damage: impl FnOnce(&mut SparseBytes), what: &str, found: &mut [u32; 3]) {
    let mut bytes = sidecar.bytes.clone();
    damage(&mut bytes);
    for writable in [false, true] {
        let storage = MemoryStorage::of(bytes.clone());
        let storage = if writable { storage } else { storage.read_only() };
        let (history, distrust) = match History::open(storage.handle(), sidecar.host.clone()).await {
            Ok(opened) => opened,
            Err(HistoryError::Damaged(_)) => {
                found[0] += 1;
                continue;
            }
            // What is found to be damaged when it is settled.
            Err(HistoryError::Disk(error)) => panic!("{what}: {error}"),
            Err(_) => continue,
        };
        if distrust.is_some() {
            found[1] += 1;
        }
        let known = history.points();
        for (name, content) in &sidecar.points {
            let Some(point) = known.iter().find(|point| point.name == *name) else {
                continue; // The superblock before this point counts: the point does not exist.
            };
            if point.refused.is_some() {
                continue;
            }
            let query = history.changes(name, None).expect("it is not refused");
            match history.next_changes(&query, 0, 10_000).await {
                Ok(span) => judge(content, &sidecar.now, &span.changes, &format!("{what}, since {name}")),
                Err(HistoryError::Damaged(_)) => found[0] += 1,
                Err(error) => panic!("{what}: {error}"),
            }
            found[2] += 1;
        }
    }
}

fn every_block(closed: bool, writes: u64, wraps: bool) {
    executor::run(1, async {
        let sidecar = sidecar(closed, writes, wraps).await;
        let mut random = fastrand::Rng::with_seed(7);
        let mut found = [0; 3];
        let size = sidecar.bytes.size();
        look(&sidecar, |_| (), "undamaged", &mut found).await;
        assert!(found[0] == 0 && found[1] == 0 && found[2] == 6, "{found:?}");
        let blocks: Vec<u64> = (0..size / BLOCK)
            .filter(|block| {
                let mut bytes = [0; BLOCK as usize];
                sidecar.bytes.read(block * BLOCK, &mut bytes);
                bytes.iter().any(|byte| *byte != 0)
            })
            .collect();
        assert!(blocks.len() > 5);
        for block in blocks {
            let at = block * BLOCK;
            let zero = |bytes: &mut SparseBytes| bytes.zero(ByteRange::new(at, BLOCK), true);
            look(&sidecar, zero, &format!("block {block} zeroed"), &mut found).await;
            let sector = at + random.u64(..8) * 512;
            let zero = |bytes: &mut SparseBytes| bytes.zero(ByteRange::new(sector, 512), false);
            look(&sidecar, zero, &format!("sector at {sector} zeroed"), &mut found).await;
            for near in [64, 512, BLOCK] {
                let (byte, bit) = (at + random.u64(..near), random.u8(..8));
                let flip = |bytes: &mut SparseBytes| {
                    let mut one = [0];
                    bytes.read(byte, &mut one);
                    bytes.write(byte, &[one[0] ^ 1 << bit]);
                };
                look(&sidecar, flip, &format!("bit {bit} of byte {byte} flipped"), &mut found).await;
            }
            look(&sidecar, |bytes| bytes.set_size(at), &format!("cut at {at}"), &mut found).await;
        }
        println!("damage found {}, distrusted {}, points asked {}", found[0], found[1], found[2]);
        assert!(found[0] > 0 && found[2] > 0);
    });
}

#[test]
fn every_block_of_a_closed_sidecar() {
    every_block(true, 40, false);
}

#[test]
fn every_block_of_one_in_use() {
    every_block(false, 40, false);
}

#[test]
fn every_block_of_one_whose_journal_went_round() {
    every_block(false, 10, true);
}

/// Blocks that later ones prove to have been durable, without a sign of life.
#[test]
fn holes_in_the_journal() {
    executor::run(1, async {
        let (image, storage, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk: Rc<Tracked<_>> = created(image.handle(), storage.handle(), &host, GRANULE).await;
        disk.history().set_open_limit(0);
        disk.mark(named("p")).await.unwrap();
        for granule in 0..10 {
            let bytes = Buf::copy_of(&[1]);
            disk.write(granule * GRANULE, bytes, WriteFlags::default()).await.unwrap();
        }
        for block in 0..9 {
            let copy = MemoryStorage::of(storage.snapshot());
            copy.tamper(|bytes| bytes.zero(ByteRange::new((64 << 10) + block * BLOCK, BLOCK), true));
            let opened = History::open(copy.handle(), host.clone()).await;
            let expected = Damage::Journal { sequence: block };
            assert!(matches!(opened, Err(HistoryError::Damaged(damage)) if damage == expected), "block {block}");
        }
    });
}

/// A history that was given up stays so with one of its superblocks gone.
#[test]
fn a_loss_is_not_forgotten() {
    executor::run(1, async {
        let (image, storage, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk: Rc<Tracked<_>> = created(image.handle(), storage.handle(), &host, GRANULE).await;
        disk.mark(named("p")).await.unwrap();
        let before = image.to_vec();
        let write = async |at: u64| disk.write(at, Buf::copy_of(&[1]), WriteFlags::default()).await.unwrap();
        write(0).await;
        storage.fail_once(Some(disk::Operation::Flush), 0, disk::ErrorKind::Io);
        write(GRANULE).await;
        write(9 * GRANULE).await;
        yield_now().await;
        let sidecar = Sidecar {
            bytes: storage.snapshot(),
            host: host.clone(),
            points: [("p".to_owned(), before)].into(),
            now: image.to_vec(),
        };
        let mut found = [0; 3];
        for block in 0..2 {
            let zero = |bytes: &mut SparseBytes| bytes.zero(ByteRange::new(block * BLOCK, BLOCK), true);
            look(&sidecar, zero, "a superblock zeroed", &mut found).await;
        }
        assert_eq!(found, [0, 4, 0]);
    });
}

/// What stands in a sidecar is read in parts as well.
#[test]
fn parts_of_an_answer() {
    executor::run(1, async {
        let sidecar = sidecar(true, 30, false).await;
        let storage = MemoryStorage::of(sidecar.bytes.clone());
        let (history, _) = History::open(storage.handle(), sidecar.host.clone()).await.unwrap();
        let whole = all_changes(&history, "p0", None, usize::MAX).await;
        for most in [0, 1, 5] {
            let mut parts = all_changes(&history, "p0", None, most).await;
            parts.dedup_by(|b, a| {
                let joins = a.kind == b.kind && a.range.end() == b.range.offset();
                if joins {
                    a.range = ByteRange::between(a.range.offset(), b.range.end());
                }
                joins
            });
            assert_eq!(parts, whole);
        }
    });
}
