//! Storage that runs out of space for a moment under a qcow2 image: a request may fail, nothing else is lost, and once
//! there is space again the disk goes on.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, DiskHandle, ErrorKind, LayerHandle, Operation, WriteFlags, ZeroMode};
use formats::Format;
use formats::qcow2::check::check;
use formats::qcow2::{self, CreateOptions, Image, OpenOptions};
use std::rc::Rc;
use testkit::executor::run;
use testkit::{MemoryStorage, seeds};

/// Longer than what the first refcount table of 512-byte clusters can count: it has to grow under the guest.
const SIZE: u64 = 12 << 20;
const SECTOR: u64 = 512;

async fn open(memory: &MemoryStorage) -> Rc<Chain> {
    let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
    let image = Image::open(memory.handle(), None, options).await.expect("opens");
    let handle = LayerHandle::from_rc(image);
    Rc::new(Chain::new(vec![LayerInfo { path: "image".into(), format: Format::Qcow2, handle }]))
}

fn made(rng: &mut fastrand::Rng) -> MemoryStorage {
    let memory = MemoryStorage::new(0);
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = [512, 512, 1024, 4096][rng.usize(..4)];
    options.refcount_bits = [16, 64, 64][rng.usize(..3)];
    options.lazy_refcounts = rng.u8(..4) == 0;
    run(1, async { qcow2::create(&memory.handle(), None, &options).await.expect("create") });
    memory
}

/// For each sector the bytes that it may hold: one, and after failed requests also what these would have put there.
struct Truth(Vec<Vec<u8>>);

impl Truth {
    fn new() -> Self {
        Self(vec![vec![0]; (SIZE / SECTOR) as usize])
    }

    fn note(&mut self, range: ByteRange, byte: u8, done: bool) {
        for sector in &mut self.0[(range.offset() / SECTOR) as usize..(range.end() / SECTOR) as usize] {
            if done {
                sector.clear();
            }
            sector.push(byte);
        }
    }

    async fn check(&self, disk: &DiskHandle) {
        for (n, may) in self.0.iter().enumerate() {
            let at = n as u64 * SECTOR;
            let found = disk.read(at, Buf::new(SECTOR as usize)).await.expect("read");
            assert!(may.iter().any(|byte| found.iter().all(|b| b == byte)), "{at:#x}: {} is none of {may:?}", found[0]);
        }
    }
}

/// One request of the guest; the range is where it goes on from.
async fn request(rng: &mut fastrand::Rng, disk: &DiskHandle, next: &mut u64, truth: &mut Truth) -> disk::Result<()> {
    let anywhere = rng.u8(..4) == 0;
    let offset = if anywhere { rng.u64(..SIZE / SECTOR) * SECTOR } else { *next };
    let len = rng.u64(1..if anywhere { 64 } else { 512 }) * SECTOR;
    let range = ByteRange::new(offset, len).intersect(ByteRange::new(0, SIZE));
    if !anywhere {
        *next = range.end() % SIZE;
    }
    let flags = WriteFlags { fua: rng.u8(..8) == 0 };
    let (byte, done) = match rng.u8(..8) {
        0 => return disk.flush().await,
        1 => (0, disk.write_zeroes(range, ZeroMode { unmap: rng.bool(), fast_only: false }, flags).await),
        _ => {
            let byte = rng.u8(1..);
            (byte, disk.write(range.offset(), Buf::copy_of(&vec![byte; range.len() as usize]), flags).await)
        }
    };
    truth.note(range, byte, done.is_ok());
    done
}

fn one_history(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let memory = made(&mut rng);
    let mut truth = Truth::new();
    let mut failed = 0;
    run(seed, async {
        let chain = open(&memory).await;
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let mut next = 0;
        for n in 0..rng.u64(40..160) {
            if rng.u8(..2) == 0 {
                let operation = [Operation::Write, Operation::Resize, Operation::WriteZeroes][rng.usize(..3)];
                memory.fail_once(Some(operation), rng.u64(..12), ErrorKind::NoSpace);
            }
            let done = request(&mut rng, &disk, &mut next, &mut truth).await;
            memory.heal();
            if let Err(error) = done {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "request {n}: {error:?}");
                failed += 1;
            }
        }
        truth.check(&disk).await;
        drop(disk);
        Disk::close(&*chain).await.expect("there is space at the close");
    });
    let report = run(seed, check(&memory.handle(), None, &mut |_, _| {})).expect("check");
    assert!(report.is_clean(), "after {failed} failures and the close: {report:?}");
    run(seed, async { truth.check(&DiskHandle::from_rc(open(&memory).await)).await });
}

#[test]
fn running_out_of_space_loses_nothing_else() {
    seeds::each(200, one_history);
}

/// A refcount table that could not be moved must not be written as if it had been.
#[test]
fn the_refcount_table_survives_a_failed_growth() {
    for (operation, pass) in [(Operation::Write, 80), (Operation::Resize, 4)]
        .into_iter()
        .flat_map(|(operation, most)| (0..most).map(move |pass| (operation, pass)))
    {
        let memory = MemoryStorage::new(0);
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 512;
        run(1, async {
            qcow2::create(&memory.handle(), None, &options).await.expect("create");
            let chain = open(&memory).await;
            let write = |at, len: usize, byte| chain.write(at, Buf::copy_of(&vec![byte; len]), WriteFlags::default());
            for at in (0..7 << 20).step_by(64 << 10) {
                write(at, 64 << 10, 1).await.expect("write");
            }
            Disk::flush(&*chain).await.expect("flush");
            // The table's growth is somewhere in here.
            memory.fail_once(Some(operation), pass, ErrorKind::NoSpace);
            let mut at = 7 << 20;
            while at < 9 << 20 {
                match write(at, 64 << 10, 2).await {
                    Ok(()) => at += 64 << 10,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}"),
                }
            }
            memory.heal();
            Disk::flush(&*chain).await.expect("flush");
            Disk::close(&*chain).await.expect("close");
            let report = check(&memory.handle(), None, &mut |_, _| {}).await.expect("check");
            assert!(report.is_clean(), "failure of {operation} after {pass}: {report:?}");
        });
    }
}
