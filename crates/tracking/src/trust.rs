//! Whether the image is still the one that the history speaks of.

use crate::superblock::{State, Superblock};
use crate::{Boot, ImageFacts, ImageMark, OTHERS_CHANGE};
use std::fmt;

/// How much later than the last sign of life a write of ours may have been, in milliseconds: signs come every second.
const SIGNS_APART: u64 = 3_000;
/// The same when the machine stopped: signs of life may have been lost that the kernel had not written yet.
const SIGNS_LOST: u64 = 60_000;

/// Why the image may hold changes that the history does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// The file has another size.
    Size {
        /// Bytes, as recorded.
        recorded: u64,
        /// Bytes, as found.
        found: u64,
    },
    /// The file was modified after it was closed here.
    Modified {
        /// Nanoseconds since 1970, as recorded.
        recorded: i64,
        /// As found.
        found: i64,
    },
    /// The file was modified after the last sign of life of the process that wrote to it here.
    ModifiedLater {
        /// Milliseconds since 1970.
        last_sign: u64,
        /// Nanoseconds since 1970.
        found: i64,
    },
    /// The mark in the image's header is gone.
    MarkGone,
    /// The image bears another moment of this history: it is an earlier or later copy.
    OtherMoment,
    /// The image bears the mark of another history.
    OtherLineage,
    /// A parent or data file is another one, or was changed.
    OtherFiles,
    /// Flushes were ignored, and the machine was started anew.
    FlushesVoid,
    /// A block device was written to while it was not served here.
    DeviceWritten,
    /// Nothing can tell whether a block device was written to since the machine was started.
    DeviceUnknown,
    /// The image was a block device and is a file now, or the other way round.
    OtherSort,
    /// Changes were not recorded.
    Lost(String),
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { recorded, found } => {
                write!(f, "the image has {found} bytes, and had {recorded} when it was closed here")
            }
            Self::Modified { recorded, found } => {
                let seconds = found.saturating_sub(*recorded) / 1_000_000_000;
                match found > recorded {
                    true if seconds == 0 => {
                        write!(f, "another program modified the image soon after it was closed here")
                    }
                    true => write!(f, "another program modified the image {seconds} s after it was closed here"),
                    false => write!(f, "the image is older than when it was closed here; an earlier copy was put back"),
                }
            }
            Self::ModifiedLater { last_sign, found } => {
                let seconds = (found / 1_000_000).saturating_sub(*last_sign as i64) / 1000;
                write!(f, "another program modified the image {seconds} s after Highwater's last sign of life")
            }
            Self::MarkGone => write!(f, "another program opened the image for writing"),
            Self::OtherMoment => write!(f, "the image is a copy from another moment than the history"),
            Self::OtherLineage => write!(f, "the image belongs to another history"),
            Self::OtherFiles => write!(f, "a parent or data file of the image was changed or is another one"),
            Self::FlushesVoid => {
                write!(f, "the machine stopped while the disk was open with the cache mode that ignores flushes")
            }
            Self::DeviceWritten => write!(f, "the block device was written to while it was not served here"),
            Self::DeviceUnknown => write!(
                f,
                "the machine was started anew, and nothing tells whether the block device was written to meanwhile"
            ),
            Self::OtherSort => write!(f, "the image was a block device and is a file now, or the other way round"),
            Self::Lost(reason) => write!(f, "changes were not recorded: {reason}"),
        }
    }
}

/// Which of the images that a history names is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The one that it was kept of.
    Image,
    /// The one that was about to take its place, and has.
    Heir,
}

/// Judges what is found against what was recorded: whether the history can be trusted, and which image it is that is
/// there.
///
/// `last_sign` is the last sign of life of whoever wrote here, in milliseconds since 1970.
///
/// # Errors
/// Why it cannot be trusted.
pub(crate) fn judge(
    recorded: &Superblock,
    found: &ImageFacts,
    mark: Option<ImageMark>,
    boot: Boot,
    last_sign: u64,
) -> Result<Found, Distrust> {
    let Some(distrust) = judge_image(recorded, found, mark, boot, last_sign) else { return Ok(Found::Image) };
    let Some(heir) = recorded.of_heir() else { return Err(distrust) };
    let is_its_file = (heir.facts.device, heir.facts.inode) == (found.device, found.inode);
    // Without a mark nothing but the file tells the heir from anything else, such as the image after somebody else has
    // taken its mark away.
    if heir.moment.is_none() && !is_its_file {
        return Err(distrust);
    }
    match judge_image(&heir, found, mark, boot, last_sign) {
        None => Ok(Found::Heir),
        Some(of_heir) => Err(if is_its_file { of_heir } else { distrust }),
    }
}

/// Judges what is found against the facts and the mark of the image; `None` when the history can be trusted.
fn judge_image(
    recorded: &Superblock,
    found: &ImageFacts,
    mark: Option<ImageMark>,
    boot: Boot,
    last_sign: u64,
) -> Option<Distrust> {
    let then = &recorded.facts;
    if recorded.state == State::Lost {
        return Some(Distrust::Lost(recorded.reason.clone()));
    }
    if then.block_device != found.block_device {
        return Some(Distrust::OtherSort);
    }
    if !recorded.moment.is_none() {
        match mark {
            None => return Some(Distrust::MarkGone),
            Some(mark) if mark.lineage != recorded.lineage => return Some(Distrust::OtherLineage),
            Some(mark) => {
                let expected = [recorded.moment, recorded.next_moment];
                if mark.moment.is_none() || !expected.contains(&mark.moment) {
                    return Some(Distrust::OtherMoment);
                }
            }
        }
    }
    let restarted = boot.id != recorded.boot;
    if found.block_device {
        return judge_device(recorded, found, restarted);
    }
    if then.others != found.others && then.others != OTHERS_CHANGE {
        return Some(Distrust::OtherFiles);
    }
    let moved = (then.device, then.inode) != (found.device, found.inode);
    // The mark alone is not enough: QEMU leaves it alone when it commits into an image that it opened as a parent.
    match recorded.state {
        State::Closed => {
            if restarted && recorded.flushes_void {
                return Some(Distrust::FlushesVoid);
            }
            if then.size != found.size {
                return Some(Distrust::Size { recorded: then.size, found: found.size });
            }
            let same_time = then.modified == found.modified
                // Some ways of copying keep whole seconds alone.
                || moved && found.modified % 1_000_000_000 == 0 && then.modified / 1_000_000_000 == found.modified / 1_000_000_000;
            if !same_time {
                return Some(Distrust::Modified { recorded: then.modified, found: found.modified });
            }
        }
        State::InUse | State::Lost => {
            if restarted && recorded.flushes_void {
                return Some(Distrust::FlushesVoid);
            }
            // Times may be lost with the machine, but not with the process.
            if !restarted && found.modified < then.modified {
                return Some(Distrust::Modified { recorded: then.modified, found: found.modified });
            }
            let modified = u64::try_from(found.modified / 1_000_000).unwrap_or(0);
            let latest = last_sign.saturating_add(if restarted { SIGNS_LOST } else { SIGNS_APART });
            // After a restart of the machine nothing of ours is later than its beginning.
            let too_late = modified > latest || restarted && modified >= boot.began;
            if too_late {
                return Some(Distrust::ModifiedLater { last_sign, found: found.modified });
            }
        }
    }
    None
}

/// A block device has no time of modification. The kernel counts what is written to it, until the machine stops.
fn judge_device(recorded: &Superblock, found: &ImageFacts, restarted: bool) -> Option<Distrust> {
    let then = &recorded.facts;
    if recorded.state == State::Closed && then.size != found.size {
        return Some(Distrust::Size { recorded: then.size, found: found.size });
    }
    if !recorded.moment.is_none() {
        return None; // Whoever writes to the image takes its mark away.
    }
    match (then.sectors_written, found.sectors_written) {
        _ if restarted => Some(Distrust::DeviceUnknown),
        (Some(a), Some(b)) if a == b && recorded.state == State::Closed => None,
        (Some(_), Some(_)) if recorded.state == State::Closed => Some(Distrust::DeviceWritten),
        _ => Some(Distrust::DeviceUnknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Id;
    use crate::superblock::Heir;

    const SECOND: i64 = 1_000_000_000;
    const BOOT: Boot = Boot { id: Id([1; 16]), began: 1_000_000 };
    const NEXT_BOOT: Boot = Boot { id: Id([2; 16]), began: 3_000_000 };

    fn recorded(state: State, marked: bool) -> Superblock {
        Superblock {
            sequence: 1,
            lineage: Id([7; 16]),
            granule_bits: 16,
            state,
            flushes_void: false,
            size: 4096,
            epoch: 1,
            generation: 1,
            journal: Id([3; 16]),
            journal_start: 0,
            points_slot: 0,
            points_len: 0,
            points_sum: 0,
            index_sum: 0,
            time: 2_000_000,
            boot: BOOT.id,
            moment: if marked { Id([8; 16]) } else { Id::NONE },
            next_moment: Id::NONE,
            facts: facts(),
            reason: "no space".to_owned(),
            heir: None,
        }
    }

    fn facts() -> ImageFacts {
        ImageFacts { device: 1, inode: 2, size: 4096, modified: 2_000 * SECOND + 5, ..ImageFacts::default() }
    }

    fn mark() -> Option<ImageMark> {
        Some(ImageMark { lineage: Id([7; 16]), moment: Id([8; 16]) })
    }

    #[test]
    fn a_closed_raw_image() {
        let r = recorded(State::Closed, false);
        let ask = |found: ImageFacts| judge_image(&r, &found, None, NEXT_BOOT, 0);
        assert_eq!(ask(facts()), None);
        assert_eq!(ask(ImageFacts { inode: 9, ..facts() }), None, "moved with its times");
        assert_eq!(ask(ImageFacts { inode: 9, modified: 2_000 * SECOND, ..facts() }), None, "scp -p");
        let modified = |modified| Some(Distrust::Modified { recorded: facts().modified, found: modified });
        assert_eq!(ask(ImageFacts { modified: 2_000 * SECOND, ..facts() }), modified(2_000 * SECOND));
        for m in [facts().modified + 1, facts().modified - 1] {
            assert_eq!(ask(ImageFacts { modified: m, ..facts() }), modified(m));
            assert_eq!(ask(ImageFacts { modified: m, inode: 9, ..facts() }), modified(m));
        }
        assert_eq!(ask(ImageFacts { size: 1, ..facts() }), Some(Distrust::Size { recorded: 4096, found: 1 }));
        assert_eq!(ask(ImageFacts { others: 1, ..facts() }), Some(Distrust::OtherFiles));
        let mut changing = r.clone();
        changing.facts.others = OTHERS_CHANGE;
        let found = ImageFacts { others: 1, ..facts() };
        assert_eq!(
            judge_image(&changing, &found, None, NEXT_BOOT, 0),
            None,
            "they were changed by who keeps the history"
        );
        assert_eq!(ask(ImageFacts { block_device: true, ..facts() }), Some(Distrust::OtherSort));
    }

    #[test]
    fn a_closed_marked_image() {
        let r = recorded(State::Closed, true);
        let ask = |found: ImageFacts, mark| judge_image(&r, &found, mark, BOOT, 0);
        assert_eq!(ask(facts(), mark()), None);
        assert_eq!(ask(ImageFacts { inode: 3, ..facts() }, mark()), None, "moved with its times");
        let later = facts().modified + SECOND;
        for inode in [2, 3] {
            let found = ImageFacts { inode, modified: later, ..facts() };
            assert!(matches!(ask(found, mark()), Some(Distrust::Modified { .. })), "committed into, or copied");
        }
        assert_eq!(ask(facts(), None), Some(Distrust::MarkGone));
        let other = |lineage, moment| Some(ImageMark { lineage: Id([lineage; 16]), moment: Id([moment; 16]) });
        assert_eq!(ask(facts(), other(7, 9)), Some(Distrust::OtherMoment));
        assert_eq!(ask(facts(), other(7, 0)), Some(Distrust::OtherMoment));
        assert_eq!(ask(facts(), other(6, 8)), Some(Distrust::OtherLineage));
        let mut between = recorded(State::InUse, true);
        between.next_moment = Id([9; 16]);
        for moment in [8, 9] {
            assert_eq!(judge_image(&between, &facts(), other(7, moment), BOOT, 2_000_000), None);
        }
    }

    #[test]
    fn after_a_crash() {
        let r = recorded(State::InUse, false);
        let at = |ms: u64| ImageFacts { modified: ms as i64 * 1_000_000, ..facts() };
        let ask = |ms, boot| judge_image(&r, &at(ms), None, boot, 2_000_000);
        assert_eq!(ask(2_000_500, BOOT), None);
        assert!(matches!(ask(1_500_000, BOOT), Some(Distrust::Modified { .. })), "an earlier copy was put back");
        assert_eq!(ask(1_500_000, NEXT_BOOT), None, "times may be lost");
        assert!(matches!(ask(2_010_000, BOOT), Some(Distrust::ModifiedLater { .. })));
        assert_eq!(ask(2_010_000, NEXT_BOOT), None);
        assert!(matches!(ask(2_100_000, NEXT_BOOT), Some(Distrust::ModifiedLater { .. })));
        let soon = Boot { began: 2_005_000, ..NEXT_BOOT };
        assert!(matches!(ask(2_010_000, soon), Some(Distrust::ModifiedLater { .. })));
        let mut void = r.clone();
        void.flushes_void = true;
        let closed = Superblock { state: State::Closed, ..void.clone() };
        assert_eq!(judge_image(&closed, &facts(), None, BOOT, 0), None);
        assert_eq!(judge_image(&closed, &facts(), None, NEXT_BOOT, 0), Some(Distrust::FlushesVoid));
        assert_eq!(judge_image(&void, &at(2_000_001), None, BOOT, 2_000_000), None);
        assert_eq!(judge_image(&void, &at(2_000_000), None, NEXT_BOOT, 2_000_000), Some(Distrust::FlushesVoid));
        assert!(matches!(judge_image(&recorded(State::Lost, false), &facts(), None, BOOT, 0), Some(Distrust::Lost(_))));
    }

    #[test]
    fn block_devices() {
        let device = ImageFacts { block_device: true, sectors_written: Some(50), ..facts() };
        let mut r = recorded(State::Closed, false);
        r.facts = device;
        assert_eq!(judge_image(&r, &device, None, BOOT, 0), None);
        let written = ImageFacts { sectors_written: Some(51), ..device };
        assert_eq!(judge_image(&r, &written, None, BOOT, 0), Some(Distrust::DeviceWritten));
        assert_eq!(judge_image(&r, &device, None, NEXT_BOOT, 0), Some(Distrust::DeviceUnknown));
        let mut marked = recorded(State::Closed, true);
        marked.facts = device;
        assert_eq!(judge_image(&marked, &written, mark(), NEXT_BOOT, 0), None);
        r.state = State::InUse;
        assert_eq!(judge_image(&r, &device, None, BOOT, 0), Some(Distrust::DeviceUnknown));
    }

    /// A history in use whose image is about to be replaced by another file, which bears a mark or cannot.
    fn with_heir(marked: bool) -> Superblock {
        let facts = ImageFacts { inode: 30, size: 512, modified: 2_000 * SECOND + 9, others: 77, ..facts() };
        let moment = if marked { Id([9; 16]) } else { Id::NONE };
        Superblock { heir: Some(Heir { moment, facts }), ..recorded(State::InUse, true) }
    }

    #[test]
    fn the_image_or_its_heir() {
        let r = with_heir(true);
        let of = |moment| Some(ImageMark { lineage: Id([7; 16]), moment: Id([moment; 16]) });
        let heir = r.heir.expect("named").facts;
        for boot in [BOOT, NEXT_BOOT] {
            let ask = |found: ImageFacts, mark| judge(&r, &found, mark, boot, 2_000_000);
            assert_eq!(ask(facts(), of(8)), Ok(Found::Image), "the switch was cut off before");
            assert_eq!(ask(heir, of(9)), Ok(Found::Heir), "and after");
            assert_eq!(ask(ImageFacts { inode: 31, ..heir }, of(9)), Ok(Found::Heir), "moved since");
            assert_eq!(
                ask(ImageFacts { modified: heir.modified + SECOND, ..heir }, of(9)),
                Ok(Found::Heir),
                "written to"
            );
            // Neither's mark with the other's files, and no other moment.
            assert_eq!(ask(facts(), of(9)), Err(Distrust::OtherMoment));
            assert_eq!(ask(heir, of(8)), Err(Distrust::OtherMoment));
            assert_eq!(
                ask(ImageFacts { others: 78, ..heir }, of(9)),
                Err(Distrust::OtherFiles),
                "its parent was changed"
            );
            assert_eq!(ask(heir, None), Err(Distrust::MarkGone));
            assert_eq!(ask(facts(), None), Err(Distrust::MarkGone));
        }
        let ask = |modified, boot| judge(&r, &ImageFacts { modified, ..heir }, of(9), boot, 2_000_000);
        assert!(matches!(ask(heir.modified - 1, BOOT), Err(Distrust::Modified { .. })), "an earlier copy");
        assert_eq!(ask(heir.modified - 1, NEXT_BOOT), Ok(Found::Heir), "times may be lost");
        assert!(matches!(ask(2_010 * SECOND, BOOT), Err(Distrust::ModifiedLater { .. })));
        let lost = Superblock { state: State::Lost, ..r.clone() };
        assert!(matches!(judge(&lost, &heir, of(9), BOOT, 0), Err(Distrust::Lost(_))));
        let void = Superblock { flushes_void: true, ..r.clone() };
        assert_eq!(judge(&void, &heir, of(9), BOOT, 2_000_000), Ok(Found::Heir));
        assert_eq!(judge(&void, &heir, of(9), NEXT_BOOT, 2_000_000), Err(Distrust::FlushesVoid));
    }

    #[test]
    fn an_heir_without_a_mark_is_its_file() {
        let r = with_heir(false);
        let heir = r.heir.expect("named").facts;
        let ask = |found: ImageFacts, mark| judge(&r, &found, mark, BOOT, 2_000_000);
        assert_eq!(ask(heir, None), Ok(Found::Heir));
        assert_eq!(ask(facts(), mark()), Ok(Found::Image));
        // Somebody has taken the image's mark away: that does not make it the heir.
        assert_eq!(ask(facts(), None), Err(Distrust::MarkGone));
        assert_eq!(ask(ImageFacts { inode: 2, ..heir }, None), Err(Distrust::MarkGone));
        assert_eq!(ask(ImageFacts { others: 78, ..heir }, None), Err(Distrust::OtherFiles));
        let device = ImageFacts { block_device: true, sectors_written: Some(5), ..heir };
        assert_eq!(ask(device, None), Err(Distrust::OtherSort));
    }
}
