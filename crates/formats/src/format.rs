//! The formats by name.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// An image format that this crate speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The guest's bytes and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// The name that people and images use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// What a file of this name is likely to be. A suggestion for people: the name proves nothing, so
    /// nothing that a guest can write to is opened by it.
    pub fn suggested_by(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "qcow2" | "qcow" | "qc2" => Some(Self::Qcow2),
            "raw" | "img" | "iso" | "bin" | "dd" => Some(Self::Raw),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that belongs to no format of this crate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown format {0:?}; expected raw or qcow2")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        Self::ALL.into_iter().find(|f| f.name() == name).ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!("vdi".parse::<Format>().unwrap_err().to_string(), "unknown format \"vdi\"; expected raw or qcow2");
    }

    #[test]
    fn suggestions() {
        assert_eq!(Format::suggested_by(Path::new("a/b.QCOW2")), Some(Format::Qcow2));
        assert_eq!(Format::suggested_by(Path::new("b.img")), Some(Format::Raw));
        assert_eq!(Format::suggested_by(Path::new("/dev/sda")), None);
    }
}
