//! Reference points: names of instants, without any data.

use crate::fields::{Reader, Writer};
use crate::kind::LAST_EPOCH;
use crate::layout::{GRANULE_BITS, MAX_GRANULES, POINTS_CAPACITY};
use crate::run_map::RunMap;
use crate::{ChangeKind, Damage, Id};

/// Longest name of a point in bytes: with NBD's `qemu:dirty-bitmap:` before it, it fits every client.
pub const MAX_NAME: usize = 255;
/// Bytes of the largest disk that is tracked.
const MAX_SIZE: u64 = MAX_GRANULES << *GRANULE_BITS.end();
/// Bytes of a pending run.
const PENDING: usize = 17;

/// What the guest's file systems had to say to the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// They were frozen through the guest agent.
    Application {
        /// For how long, in milliseconds.
        frozen_ms: u32,
    },
}

/// Why a point is not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub since: u64,
}

/// Granules that had changed at the point, but whose bytes its consumer deliberately did not copy (blocks that no file
/// used, for example). They count as changed since the point until a later point's consumer has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRun {
    /// First granule.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What they hold.
    pub kind: ChangeKind,
}

/// A reference point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    /// Its name, unique within the history.
    pub name: String,
    /// What consumers remember: a name may be given again, this is not.
    pub id: Id,
    /// Shared by the points of several disks that were taken at one instant.
    pub set: Id,
    /// The epoch that it ended.
    pub epoch: u32,
    /// When, in milliseconds since 1970.
    pub time: u64,
    /// Bytes of the guest's disk at the instant.
    pub size: u64,
    /// What the instant is worth.
    pub consistency: Consistency,
    /// Why it is not to be trusted.
    pub refused: Option<Refusal>,
    /// What was not copied, in order, without overlaps.
    pub pending: Vec<PendingRun>,
}

/// Pending runs as a point keeps them: in order, without overlaps, and none beyond the largest disk. Where they do overlap,
/// bytes that must be read win.
pub(crate) fn in_order(pending: &[PendingRun]) -> Vec<PendingRun> {
    let mut runs = RunMap::default();
    let (data, others): (Vec<&PendingRun>, Vec<&PendingRun>) =
        pending.iter().partition(|run| run.kind == ChangeKind::Data);
    for run in others.into_iter().chain(data) {
        runs.insert(run.start, run.end.min(MAX_GRANULES), run.kind);
    }
    runs.iter().map(|(start, end, kind)| PendingRun { start, end, kind }).collect()
}

/// Whether a point may bear that name.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Tags of a record's parts. A reader skips what it does not know.
const TAG_REFUSED: u16 = 1;
const TAG_PENDING: u16 = 2;
const TAG_APPLICATION: u16 = 3;

/// All points as bytes; `None` when they do not fit.
pub(crate) fn encode(points: &[Point]) -> Option<Vec<u8>> {
    let mut w = Writer::default();
    w.u32(points.len() as u32);
    for point in points {
        let mut r = Writer::default();
        r.text(&point.name);
        r.bytes(&point.id.0);
        r.bytes(&point.set.0);
        r.u32(point.epoch);
        r.u64(point.time);
        r.u64(point.size);
        if let Consistency::Application { frozen_ms } = point.consistency {
            r.u16(TAG_APPLICATION);
            r.u32(4);
            r.u32(frozen_ms);
        }
        if let Some(refused) = &point.refused {
            let mut part = Writer::default();
            part.u64(refused.since);
            part.text(&refused.reason);
            r.u16(TAG_REFUSED);
            r.u32(part.0.len() as u32);
            r.bytes(&part.0);
        }
        if !point.pending.is_empty() {
            r.u16(TAG_PENDING);
            r.u32((point.pending.len() * PENDING) as u32);
            for run in &point.pending {
                r.u64(run.start);
                r.u64(run.end);
                r.u8(run.kind.code() as u8);
            }
        }
        w.u32(r.0.len() as u32);
        w.bytes(&r.0);
        if w.0.len() as u64 > POINTS_CAPACITY {
            return None;
        }
    }
    Some(w.0)
}

/// The points that `encode` wrote. Memory is bounded by the bytes' number.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Point>, Damage> {
    all(bytes).ok_or(Damage::Points)
}

fn all(bytes: &[u8]) -> Option<Vec<Point>> {
    let mut r = Reader(bytes);
    let count = r.u32()?;
    let mut points: Vec<Point> = Vec::new();
    for _ in 0..count {
        let len = r.u32()? as usize;
        points.push(one(Reader(r.bytes(len)?))?);
    }
    r.0.is_empty().then_some(points)
}

fn one(mut r: Reader<'_>) -> Option<Point> {
    let mut point = Point {
        name: r.text()?,
        id: Id(r.array()?),
        set: Id(r.array()?),
        epoch: r.u32()?,
        time: r.u64()?,
        size: r.u64()?,
        consistency: Consistency::Crash,
        refused: None,
        pending: Vec::new(),
    };
    if !is_name(&point.name) || point.epoch == 0 || point.epoch > LAST_EPOCH || point.size > MAX_SIZE {
        return None;
    }
    while !r.0.is_empty() {
        let (tag, len) = (r.u16()?, r.u32()? as usize);
        let mut part = Reader(r.bytes(len)?);
        match tag {
            TAG_APPLICATION => point.consistency = Consistency::Application { frozen_ms: part.u32()? },
            TAG_REFUSED => point.refused = Some(Refusal { since: part.u64()?, reason: part.printable()? }),
            TAG_PENDING => {
                let mut last = 0;
                while !part.0.is_empty() {
                    let (start, end) = (part.u64()?, part.u64()?);
                    let kind = ChangeKind::of_code(part.u8()?.into());
                    if start < last || end <= start || end > MAX_GRANULES {
                        return None;
                    }
                    last = end;
                    point.pending.push(PendingRun { start, end, kind });
                }
            }
            _ => {}
        }
    }
    Some(point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str) -> Point {
        Point {
            name: name.to_owned(),
            id: Id([1; 16]),
            set: Id([2; 16]),
            epoch: 4,
            time: 5,
            size: 6,
            consistency: Consistency::Application { frozen_ms: 7 },
            refused: Some(Refusal { reason: "the image was changed".to_owned(), since: 8 }),
            pending: vec![
                PendingRun { start: 0, end: 3, kind: ChangeKind::Data },
                PendingRun { start: 3, end: 9, kind: ChangeKind::Zero },
            ],
        }
    }

    #[test]
    fn text_and_back() {
        let mut plain = point("plain");
        (plain.consistency, plain.refused, plain.pending) = (Consistency::Crash, None, Vec::new());
        let points = vec![point("a"), plain, point("größe")];
        assert_eq!(decode(&encode(&points).unwrap()).unwrap(), points);
        assert_eq!(decode(&encode(&[]).unwrap()).unwrap(), []);
    }

    #[test]
    fn every_cut_is_noticed() {
        let bytes = encode(&[point("a"), point("b")]).unwrap();
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]), Err(Damage::Points), "{len} bytes");
        }
        let mut longer = bytes;
        longer.push(0);
        assert_eq!(decode(&longer), Err(Damage::Points));
    }

    #[test]
    fn numbers_have_bounds() {
        let data = |start, end| PendingRun { start, end, kind: ChangeKind::Data };
        type Change = fn(&mut Point, fn(u64, u64) -> PendingRun);
        let changes: [(Change, bool); 8] = [
            (|p, run| p.pending.push(run(9, MAX_GRANULES)), true),
            (|p, run| p.pending.push(run(9, MAX_GRANULES + 1)), false),
            (|p, run| p.pending.push(run(u64::MAX - 1, u64::MAX)), false),
            (|p, run| p.pending = vec![run(0, u64::MAX)], false),
            (|p, run| p.pending = vec![run(1, 2), run(0, 1)], false),
            (|p, _| p.size = MAX_SIZE, true),
            (|p, _| p.size = MAX_SIZE + 1, false),
            (|p, _| p.time = u64::MAX, true),
        ];
        for (n, (change, good)) in changes.into_iter().enumerate() {
            let mut changed = point("a");
            change(&mut changed, data);
            assert_eq!(decode(&encode(&[changed]).unwrap()).is_ok(), good, "change {n}");
        }
    }

    #[test]
    fn reasons_hold_nothing_for_the_terminal() {
        let mut changed = point("a");
        changed.refused = Some(Refusal { reason: "\x1b[2Jgröße\n".to_owned(), since: 1 });
        let found = decode(&encode(&[changed]).unwrap()).unwrap();
        assert_eq!(found[0].refused.as_ref().unwrap().reason, "\u{fffd}[2Jgröße\u{fffd}");
    }

    #[test]
    fn room_for_thousands() {
        let mut plain = point("p");
        (plain.refused, plain.pending) = (None, Vec::new());
        assert!(encode(&vec![plain.clone(); 10_000]).is_some());
        plain.pending = vec![PendingRun { start: 0, end: 1, kind: ChangeKind::Data }; 1 << 20];
        assert!(encode(&[plain]).is_none());
    }
}
