//! An oracle for what a guest may read, also after a crash.

use disk::{Buf, ByteRange, DiskHandle, Result, WriteFlags, ZeroMode};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::rc::Rc;

/// Bytes that reach a disk whole or not at all.
const SECTOR: u64 = 512;
/// Bytes compared at a time.
const CHUNK: u64 = 1 << 20;

/// What a disk should hold, as the set of values that each byte may have.
///
/// Every write is told to the model before it is issued and after it has ended; a value is possible until a
/// later write (one that began after it had ended) has certainly replaced it. In normal operation "certainly"
/// means that the later write has ended; after a crash, that it was also made durable by a flush which began
/// after it had ended. Values are judged in whole sectors of 512 bytes, or the parts of a sector that one
/// write covered.
///
/// Clones are the same model. Requests may overlap each other; sizes change while nothing is under way.
#[derive(Clone)]
pub struct ModelDisk(Rc<RefCell<State>>);

struct State {
    size: u64,
    /// Counts events; orders issue and end of requests.
    clock: u64,
    /// By first byte; together they cover the disk.
    segments: BTreeMap<u64, Segment>,
    /// Ended, but not yet durable.
    unsynced: Vec<Rc<Write>>,
    /// When the checks under way began.
    checks: Vec<u64>,
}

#[derive(Clone)]
struct Segment {
    end: u64,
    versions: Vec<Version>,
}

#[derive(Clone)]
struct Version {
    write: Rc<Write>,
    content: Content,
}

#[derive(Clone)]
enum Content {
    Zero,
    /// `bytes[0]` stands at `base`.
    Bytes {
        bytes: Rc<[u8]>,
        base: u64,
    },
}

struct Write {
    issued: u64,
    ended: Cell<Option<u64>>,
    synced: Cell<bool>,
    /// May have had no effect: a discard, or a write that failed.
    weak: Cell<bool>,
}

/// A write that was told to the model and has not ended.
#[must_use]
pub struct Issued(Rc<Write>);

impl Content {
    fn matches(&self, offset: u64, found: &[u8]) -> bool {
        match self {
            Self::Zero => found.iter().all(|b| *b == 0),
            Self::Bytes { bytes, base } => {
                let at = (offset - base) as usize;
                bytes[at..at + found.len()] == *found
            }
        }
    }
}

impl Version {
    /// Whether `later` leaves nothing of this version.
    fn replaced_by(&self, later: &Self, when: Judge) -> bool {
        let Some(ended) = self.write.ended.get() else { return false };
        let Some(later_ended) = later.write.ended.get() else { return false };
        if later.write.weak.get() || later.write.issued <= ended {
            return false;
        }
        match when {
            Judge::Running { since } => later_ended < since,
            Judge::Crashed => later.write.synced.get(),
        }
    }
}

#[derive(Clone, Copy)]
enum Judge {
    /// For a read that began at `since`.
    Running {
        since: u64,
    },
    Crashed,
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Makes `at` the beginning of a segment.
    fn cut(&mut self, at: u64) {
        let Some((start, segment)) = self.segments.range_mut(..=at).next_back() else { return };
        if *start == at || segment.end <= at {
            return;
        }
        let tail = segment.clone();
        segment.end = at;
        self.segments.insert(at, tail);
    }

    fn add(&mut self, range: ByteRange, version: &Version) {
        self.cut(range.offset());
        self.cut(range.end());
        for (_, segment) in self.segments.range_mut(range.offset()..range.end()) {
            segment.versions.push(version.clone());
        }
    }

    /// Forgets versions that no check can meet any more.
    fn prune(&mut self) {
        let since = self.checks.iter().copied().min().unwrap_or(u64::MAX);
        for segment in self.segments.values_mut() {
            let gone: Vec<bool> = segment
                .versions
                .iter()
                .map(|v| {
                    segment.versions.iter().any(|later| {
                        v.replaced_by(later, Judge::Crashed) && v.replaced_by(later, Judge::Running { since })
                    })
                })
                .collect();
            let mut gone = gone.into_iter();
            segment.versions.retain(|_| !gone.next().expect("one answer per version"));
        }
    }

    fn check(&self, offset: u64, found: &[u8], judge: Judge) {
        let range = ByteRange::new(offset, found.len() as u64);
        let first = self.segments.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        for (start, segment) in self.segments.range((Bound::Included(first), Bound::Excluded(range.end()))) {
            let part = ByteRange::between(*start, segment.end).intersect(range);
            let possible: Vec<&Version> = segment
                .versions
                .iter()
                .filter(|v| !segment.versions.iter().any(|later| v.replaced_by(later, judge)))
                .collect();
            let bytes = |part: ByteRange| &found[(part.offset() - offset) as usize..(part.end() - offset) as usize];
            if let [only] = possible[..]
                && only.content.matches(part.offset(), bytes(part))
            {
                continue;
            }
            let mut rest = part;
            while !rest.is_empty() {
                let piece = rest.prefix(SECTOR - rest.offset() % SECTOR);
                rest = rest.skip(piece.len());
                let found = bytes(piece);
                assert!(
                    possible.iter().any(|v| v.content.matches(piece.offset(), found)),
                    "wrong bytes at {piece} ({}): found {}, possible {}",
                    match judge {
                        Judge::Running { .. } => "running",
                        Judge::Crashed => "after a crash",
                    },
                    shown(found),
                    possible.iter().map(|v| v.shown(piece)).collect::<Vec<_>>().join(" or "),
                );
            }
        }
    }
}

impl Version {
    fn shown(&self, piece: ByteRange) -> String {
        let content = match &self.content {
            Content::Zero => "zeroes".to_owned(),
            Content::Bytes { bytes, base } => {
                let at = (piece.offset() - base) as usize;
                shown(&bytes[at..at + piece.len() as usize])
            }
        };
        let Write { issued, ended, synced, weak } = &*self.write;
        format!("{content} (issued {issued}, ended {:?}, synced {}, weak {})", ended.get(), synced.get(), weak.get())
    }
}

fn shown(bytes: &[u8]) -> String {
    let head: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("[{}… {} bytes]", head.join(" "), bytes.len())
}

impl ModelDisk {
    /// A disk of `size` bytes that reads as zero and is durable so.
    pub fn new(size: u64) -> Self {
        let mut state =
            State { size: 0, clock: 0, segments: BTreeMap::new(), unsynced: Vec::new(), checks: Vec::new() };
        state.append(size, Content::Zero);
        Self(Rc::new(RefCell::new(state)))
    }

    /// A disk that durably holds these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut state =
            State { size: 0, clock: 0, segments: BTreeMap::new(), unsynced: Vec::new(), checks: Vec::new() };
        state.append_bytes(bytes);
        Self(Rc::new(RefCell::new(state)))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.borrow().size
    }

    /// A write of `bytes` is about to be issued.
    pub fn issue_write(&self, offset: u64, bytes: &[u8]) -> Issued {
        let range = ByteRange::new(offset, bytes.len() as u64);
        self.issue(range, Content::Bytes { bytes: bytes.into(), base: offset }, false)
    }

    /// A zeroing is about to be issued.
    pub fn issue_zeroes(&self, range: ByteRange) -> Issued {
        self.issue(range, Content::Zero, false)
    }

    /// A discard is about to be issued.
    pub fn issue_discard(&self, range: ByteRange) -> Issued {
        self.issue(range, Content::Zero, true)
    }

    fn issue(&self, range: ByteRange, content: Content, weak: bool) -> Issued {
        let mut state = self.0.borrow_mut();
        assert!(range.end() <= state.size, "the test stays inside the disk");
        let issued = state.tick();
        let write = Rc::new(Write { issued, ended: Cell::new(None), synced: Cell::new(false), weak: Cell::new(weak) });
        state.add(range, &Version { write: Rc::clone(&write), content });
        Issued(write)
    }

    /// The write has ended: well, or (`failed`) with a part of its effect or none.
    pub fn end(&self, issued: Issued, failed: bool, durable: bool) {
        let mut state = self.0.borrow_mut();
        let now = state.tick();
        issued.0.ended.set(Some(now));
        if failed {
            issued.0.weak.set(true);
        } else if durable {
            issued.0.synced.set(true);
        }
        state.unsynced.push(issued.0);
    }

    /// A flush is about to be issued; pass the answer to [`ModelDisk::end_flush`] when it succeeds.
    pub fn issue_flush(&self) -> u64 {
        self.0.borrow_mut().tick()
    }

    /// The flush has succeeded.
    pub fn end_flush(&self, issued: u64) {
        let mut state = self.0.borrow_mut();
        state.unsynced.retain(|write| {
            let durable = write.ended.get().is_some_and(|ended| ended < issued);
            if durable {
                write.synced.set(true);
            }
            !durable
        });
        state.prune();
    }

    /// Follows a change of size; nothing is under way.
    pub fn set_size(&self, size: u64) {
        let mut state = self.0.borrow_mut();
        if size > state.size {
            let grown = size - state.size;
            state.append(grown, Content::Zero);
        } else {
            state.cut(size);
            state.segments.split_off(&size);
            state.size = size;
        }
    }

    /// Writes to the disk under the model's eyes.
    ///
    /// # Errors
    /// The disk's.
    pub async fn write(&self, disk: &DiskHandle, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let issued = self.issue_write(offset, &buf);
        let result = disk.write(offset, buf, flags).await;
        self.end(issued, result.is_err(), flags.fua);
        result
    }

    /// Zeroes under the model's eyes.
    ///
    /// # Errors
    /// The disk's.
    pub async fn write_zeroes(
        &self,
        disk: &DiskHandle,
        range: ByteRange,
        mode: ZeroMode,
        flags: WriteFlags,
    ) -> Result<()> {
        let issued = self.issue_zeroes(range);
        let result = disk.write_zeroes(range, mode, flags).await;
        self.end(issued, result.is_err(), flags.fua);
        result
    }

    /// Discards under the model's eyes.
    ///
    /// # Errors
    /// The disk's.
    pub async fn discard(&self, disk: &DiskHandle, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let issued = self.issue_discard(range);
        let result = disk.discard(range, flags).await;
        self.end(issued, result.is_err(), flags.fua);
        result
    }

    /// Flushes under the model's eyes.
    ///
    /// # Errors
    /// The disk's.
    pub async fn flush(&self, disk: &DiskHandle) -> Result<()> {
        let issued = self.issue_flush();
        disk.flush().await?;
        self.end_flush(issued);
        Ok(())
    }

    /// Reads from the disk and judges the answer.
    ///
    /// # Errors
    /// The disk's.
    ///
    /// # Panics
    /// When the answer is impossible.
    pub async fn read(&self, disk: &DiskHandle, offset: u64, buf: Buf) -> Result<Buf> {
        let since = {
            let mut state = self.0.borrow_mut();
            let since = state.tick();
            state.checks.push(since);
            since
        };
        let result = disk.read(offset, buf).await;
        let mut state = self.0.borrow_mut();
        let at = state.checks.iter().position(|c| *c == since).expect("entered above");
        state.checks.swap_remove(at);
        if let Ok(buf) = &result {
            state.check(offset, buf, Judge::Running { since });
        }
        result
    }

    /// Judges bytes that were read while nothing was being written.
    ///
    /// # Panics
    /// When they are impossible.
    pub fn check(&self, offset: u64, found: &[u8]) {
        let mut state = self.0.borrow_mut();
        let since = state.tick();
        state.check(offset, found, Judge::Running { since });
    }

    /// Reads the whole disk and judges it.
    ///
    /// # Errors
    /// The disk's.
    ///
    /// # Panics
    /// When the size or a byte is wrong.
    pub async fn check_equal(&self, disk: &DiskHandle) -> Result<()> {
        assert_eq!(disk.geometry().size, self.size(), "size of the disk");
        let mut rest = ByteRange::new(0, self.size());
        while !rest.is_empty() {
            let chunk = rest.prefix(CHUNK);
            self.read(disk, chunk.offset(), Buf::new(chunk.len() as usize)).await?;
            rest = rest.skip(chunk.len());
        }
        Ok(())
    }

    /// Reads the whole disk as reopened after a crash and judges it. Returns the model of what was found, to
    /// go on with.
    ///
    /// # Errors
    /// The disk's.
    ///
    /// # Panics
    /// When the size is wrong, or a sector is neither what was last made durable nor issued later.
    pub async fn check_after_crash(&self, disk: &DiskHandle) -> Result<Self> {
        assert_eq!(disk.geometry().size, self.size(), "size of the disk");
        let found = Self::new(0);
        let mut rest = ByteRange::new(0, self.size());
        while !rest.is_empty() {
            let chunk = rest.prefix(CHUNK);
            let buf = disk.read(chunk.offset(), Buf::new(chunk.len() as usize)).await?;
            self.0.borrow().check(chunk.offset(), &buf, Judge::Crashed);
            found.0.borrow_mut().append_bytes(&buf);
            rest = rest.skip(chunk.len());
        }
        Ok(found)
    }
}

impl State {
    /// Adds a durable segment behind the end.
    fn append(&mut self, len: u64, content: Content) {
        if len == 0 {
            return;
        }
        let now = self.tick();
        let write = Write { issued: now, ended: Cell::new(Some(now)), synced: Cell::new(true), weak: Cell::new(false) };
        let end = self.size + len;
        let versions = vec![Version { write: Rc::new(write), content }];
        self.segments.insert(self.size, Segment { end, versions });
        self.size = end;
    }

    fn append_bytes(&mut self, bytes: &[u8]) {
        let content = match bytes.iter().all(|b| *b == 0) {
            true => Content::Zero,
            false => Content::Bytes { bytes: bytes.into(), base: self.size },
        };
        self.append(bytes.len() as u64, content);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crashed(model: &ModelDisk, found: &[u8]) -> bool {
        let state = model.0.borrow();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.check(0, found, Judge::Crashed))).is_ok()
    }

    fn running(model: &ModelDisk, found: &[u8]) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.check(0, found))).is_ok()
    }

    #[test]
    fn a_crash_may_lose_what_was_not_flushed_and_nothing_else() {
        let (old, new) = ([1_u8; 1024], [2_u8; 1024]);
        let mut torn = old;
        torn[512..].fill(2);
        let mut finely_torn = old;
        finely_torn[100..].fill(2);
        let model = ModelDisk::new(1024);
        model.end(model.issue_write(0, &old), false, false);
        assert!(crashed(&model, &[0; 1024]) && crashed(&model, &old));
        let flush = model.issue_flush();
        model.end_flush(flush);
        assert!(!crashed(&model, &[0; 1024]) && crashed(&model, &old));
        let issued = model.issue_write(0, &new);
        assert!(running(&model, &old) && running(&model, &new), "under way");
        let too_early = model.issue_flush();
        model.end(issued, false, false);
        assert!(!running(&model, &old) && running(&model, &new), "ended");
        model.end_flush(too_early);
        assert!(crashed(&model, &old) && crashed(&model, &new) && crashed(&model, &torn));
        assert!(!crashed(&model, &finely_torn), "sectors are whole");
        let flush = model.issue_flush();
        model.end_flush(flush);
        assert!(!crashed(&model, &old) && crashed(&model, &new));
    }

    #[test]
    fn overlapping_requests_may_end_in_either_order() {
        let model = ModelDisk::new(512);
        let a = model.issue_write(0, &[1; 512]);
        let b = model.issue_write(0, &[2; 512]);
        model.end(a, false, false);
        model.end(b, false, false);
        assert!(running(&model, &[1; 512]) && running(&model, &[2; 512]) && !running(&model, &[0; 512]));
        model.end(model.issue_write(0, &[3; 512]), true, false);
        assert!(running(&model, &[1; 512]) && running(&model, &[3; 512]), "a failed write may have had effect");
        model.end(model.issue_write(0, &[4; 512]), false, true);
        assert!(!crashed(&model, &[1; 512]) && crashed(&model, &[4; 512]), "durable at once");
    }

    #[test]
    fn discard_is_zero_or_before() {
        let model = ModelDisk::of(&[9; 1024]);
        model.end(model.issue_discard(ByteRange::new(0, 512)), false, false);
        let mut half = [9; 1024];
        half[..512].fill(0);
        assert!(running(&model, &half) && running(&model, &[9; 1024]) && !running(&model, &[0; 1024]));
    }
}
