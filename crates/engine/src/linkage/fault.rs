//! What is wrong between a child and its parent.

use super::fingerprint::Fingerprint;
use super::report::LinkReport;
use crate::utc::utc_text;
use disk::{ContentId, LayerIdentity, ParentLink};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use utoipa::ToSchema;

/// By what a parent is not what its child was bound to, as far as that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// A program that does not know of identities opened it for writing.
    OpenedForWriting,
    /// Highwater wrote to it: the id is that of another content of the same image.
    WrittenByHighwater,
    /// It is another image.
    OtherImage,
    /// It bore an id, and bears none.
    IdentityGone,
    /// Its file is longer.
    Grown,
    /// Its file is shorter.
    Truncated,
    /// It was modified by nobody knows whom.
    Modified,
    /// It is older than it was.
    Older,
    /// The hash of its content is another, though id, size and time are the same.
    OtherContent,
}

/// A child whose parent is not what it was bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkFault {
    /// The child's file.
    pub child: PathBuf,
    /// The parent's file.
    pub parent: PathBuf,
    /// By what.
    pub kind: FaultKind,
    /// What the child remembers.
    pub link: ParentLink,
    /// What the parent says of its content now.
    pub(crate) found: LayerIdentity,
    /// Size and time of the parent now.
    pub(crate) print: Fingerprint,
    /// How many bytes of the disk are read from that parent or from below it; `None` when that was not looked at.
    pub exposed: Option<u64>,
    /// Bytes of the disk.
    pub size: u64,
}

/// Judges a parent that was found against what its child remembers; `None` when it is sound. `times`: whether size and time
/// count, which they do not while somebody may be writing.
pub(crate) fn judge(link: &ParentLink, found: &LayerIdentity, print: &Fingerprint, times: bool) -> Option<FaultKind> {
    let earlier = print.modified != 0 && print.modified < link.modified;
    let by_file = match () {
        _ if !times => None,
        _ if print.size > link.size => Some(FaultKind::Grown),
        _ if print.size < link.size => Some(FaultKind::Truncated),
        _ if print.same_time(link.modified) => None,
        _ if earlier => Some(FaultKind::Older),
        _ => Some(FaultKind::Modified),
    };
    match (link.parent, found.content) {
        // What is written into the parent is the child's own.
        (_, Some(content)) if link.second == Some(content) => None,
        (Some(parent), Some(content)) if parent == content => by_file,
        (Some(parent), Some(content)) => Some(match parent.same_image(content) {
            true if earlier => FaultKind::Older,
            true => FaultKind::WrittenByHighwater,
            false => FaultKind::OtherImage,
        }),
        (Some(parent), None) => Some(match found.lapsed {
            Some(lapsed) if !parent.same_image(lapsed) => FaultKind::OtherImage,
            Some(_) if earlier => FaultKind::Older,
            Some(_) => FaultKind::OpenedForWriting,
            None => FaultKind::IdentityGone,
        }),
        // It bore no id, and got one with a write: its time tells, or whoever looks without times is told of the id.
        (None, Some(_)) => match by_file {
            Some(FaultKind::Modified | FaultKind::Grown) => Some(FaultKind::WrittenByHighwater),
            None if !times => Some(FaultKind::WrittenByHighwater),
            other => other,
        },
        (None, None) => by_file,
    }
}

fn id_text(id: Option<ContentId>) -> String {
    id.map_or_else(|| "none".to_owned(), |id| id.to_string())
}

/// To the millisecond, as what is told apart may have happened in one second.
fn time_text(nanoseconds: i64) -> String {
    let milliseconds = u64::try_from(nanoseconds / 1_000_000).unwrap_or(0);
    utc_text(milliseconds / 1000).replace(" UTC", &format!(".{:03} UTC", milliseconds % 1000))
}

impl fmt::Display for LinkFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (child, parent) = (self.child.display(), self.parent.display());
        write!(f, "{child}: its parent {parent} is not what it was made over: ")?;
        let Self { link, print, found, .. } = self;
        match self.kind {
            FaultKind::OpenedForWriting => write!(
                f,
                "another program, which knows nothing of identities, opened it for writing and may have changed it"
            ),
            FaultKind::WrittenByHighwater => write!(f, "Highwater wrote to it"),
            FaultKind::OtherImage => write!(f, "it is another image"),
            FaultKind::IdentityGone => write!(
                f,
                "it bore an identity and bears none: it was made anew by another program, or is another image"
            ),
            FaultKind::Grown => write!(f, "the file has grown from {} to {} bytes", link.size, print.size),
            FaultKind::Truncated => write!(f, "the file was cut from {} to {} bytes", link.size, print.size),
            FaultKind::Modified => write!(f, "an unknown program modified it, or it was copied without its times"),
            FaultKind::Older => write!(f, "it is older than it was: an earlier copy was put back, or another file"),
            FaultKind::OtherContent => write!(
                f,
                "the hash of its content is not the recorded one, though identity, size and time are the same"
            ),
        }?;
        if print.modified != 0 && link.modified != 0 {
            let (now, then) = (time_text(print.modified), time_text(link.modified));
            write!(f, " (modified {now}; {then} when they were bound")?;
            match link.linked {
                0 => write!(f, ")")?,
                linked => write!(f, " on {})", utc_text(linked / 1000))?,
            }
        }
        match (link.parent, found.content.or(found.lapsed)) {
            (None, None) => {}
            (expected, _) => {
                write!(f, "; content {} expected, {} found", id_text(expected), id_text(found.content))?;
                if let Some(lapsed) = found.lapsed.filter(|lapsed| Some(*lapsed) != expected) {
                    write!(f, " (it was {lapsed} before)")?;
                }
            }
        }
        match self.exposed {
            Some(0) => write!(f, "; nothing of it shows through its child"),
            Some(exposed) => write!(f, "; {exposed} of the disk's {} bytes are read from it", self.size),
            None => Ok(()),
        }
    }
}

impl LinkFault {
    /// What to do next.
    pub fn next_step(&self) -> String {
        format!(
            "put the right parent back; or give `highwater chain repair {}`, which proves that it is sound, `chain rebase` for \
             another parent, or `chain accept` to take it as it is",
            self.child.display()
        )
    }

    /// The fault in a report.
    pub(crate) fn report(&self, report: &mut LinkReport) {
        report.fault = Some(self.kind);
        report.exposed = self.exposed;
        report.text = Some(self.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn id(image: u8, content: u8) -> ContentId {
        let mut bytes = [image; 16];
        bytes[8..].fill(content);
        ContentId::from_bytes(bytes).expect("an id")
    }

    fn link() -> ParentLink {
        ParentLink { parent: Some(id(1, 1)), second: None, size: 4096, modified: 100 * SECOND + 5, linked: 100_000 }
    }

    fn bears(content: ContentId) -> LayerIdentity {
        LayerIdentity { content: Some(content), ..LayerIdentity::default() }
    }

    fn lapsed(content: ContentId) -> LayerIdentity {
        LayerIdentity { lapsed: Some(content), ..LayerIdentity::default() }
    }

    fn print(size: u64, modified: i64) -> Fingerprint {
        Fingerprint { size, modified }
    }

    #[test]
    fn a_parent_with_an_id() {
        let same = print(4096, link().modified);
        let later = print(4096, link().modified + SECOND);
        let earlier = print(4096, link().modified - SECOND);
        let none = LayerIdentity::default();
        for (found, print, expected) in [
            (bears(id(1, 1)), same, None),
            (bears(id(1, 1)), super::tests::print(4096, 100 * SECOND), None),
            (bears(id(1, 1)), later, Some(FaultKind::Modified)),
            (bears(id(1, 1)), earlier, Some(FaultKind::Older)),
            (bears(id(1, 1)), super::tests::print(4097, link().modified), Some(FaultKind::Grown)),
            (bears(id(1, 1)), super::tests::print(1, link().modified), Some(FaultKind::Truncated)),
            (bears(id(1, 2)), later, Some(FaultKind::WrittenByHighwater)),
            (bears(id(1, 2)), same, Some(FaultKind::WrittenByHighwater)),
            (bears(id(1, 2)), earlier, Some(FaultKind::Older)),
            (bears(id(2, 1)), same, Some(FaultKind::OtherImage)),
            (lapsed(id(1, 1)), later, Some(FaultKind::OpenedForWriting)),
            (lapsed(id(1, 1)), same, Some(FaultKind::OpenedForWriting)),
            (lapsed(id(1, 1)), earlier, Some(FaultKind::Older)),
            (lapsed(id(2, 1)), later, Some(FaultKind::OtherImage)),
            (none, same, Some(FaultKind::IdentityGone)),
        ] {
            assert_eq!(judge(&link(), &found, &print, true), expected, "{found:?}, {print:?}");
        }
        assert_eq!(judge(&link(), &bears(id(1, 1)), &later, false), None, "somebody may be writing");
        assert_eq!(judge(&link(), &bears(id(1, 2)), &later, false), Some(FaultKind::WrittenByHighwater));
    }

    #[test]
    fn a_parent_without_an_id() {
        let link = ParentLink { parent: None, ..link() };
        let (none, later) = (LayerIdentity::default(), print(4096, link.modified + SECOND));
        for (found, print, expected) in [
            (none, print(4096, link.modified), None),
            (none, later, Some(FaultKind::Modified)),
            (none, print(4096, link.modified - SECOND), Some(FaultKind::Older)),
            (none, print(8192, link.modified), Some(FaultKind::Grown)),
            (none, print(0, link.modified), Some(FaultKind::Truncated)),
            (none, print(4096, 0), None),
            (bears(id(1, 1)), later, Some(FaultKind::WrittenByHighwater)),
            (lapsed(id(1, 1)), print(4096, link.modified), None),
            (lapsed(id(1, 1)), later, Some(FaultKind::Modified)),
        ] {
            assert_eq!(judge(&link, &found, &print, true), expected, "{found:?}, {print:?}");
        }
        assert_eq!(judge(&link, &none, &later, false), None);
        assert_eq!(judge(&link, &bears(id(1, 1)), &later, false), Some(FaultKind::WrittenByHighwater));
    }

    #[test]
    fn a_parent_into_which_its_child_is_brought() {
        let link = ParentLink { second: Some(id(1, 9)), ..link() };
        let later = print(9000, link.modified + SECOND);
        assert_eq!(judge(&link, &bears(id(1, 9)), &later, true), None);
        assert_eq!(judge(&link, &bears(id(1, 1)), &print(4096, link.modified), true), None, "not begun yet");
        assert_eq!(judge(&link, &bears(id(1, 3)), &later, true), Some(FaultKind::WrittenByHighwater));
        assert_eq!(judge(&link, &lapsed(id(1, 9)), &later, true), Some(FaultKind::OpenedForWriting));
    }

    #[test]
    fn a_fault_says_which_files_when_and_by_what() {
        let fault = LinkFault {
            child: "c.qcow2".into(),
            parent: "b.qcow2".into(),
            kind: FaultKind::OpenedForWriting,
            link: link(),
            found: lapsed(id(1, 1)),
            print: print(4096, 200 * SECOND),
            exposed: Some(1024),
            size: 4096,
        };
        let text = fault.to_string();
        for part in [
            "c.qcow2: its parent b.qcow2",
            "another program",
            "1970-01-01 00:03:20.000 UTC",
            "1970-01-01 00:01:40.000 UTC when they were bound",
            "content 01010101010101010101010101010101 expected, none found",
            "1024 of the disk's 4096 bytes",
        ] {
            assert!(text.contains(part), "{part:?} in {text:?}");
        }
        assert!(fault.next_step().contains("chain repair c.qcow2"));
    }
}
