//! Which format a file is taken for when nobody said so, and which files are images at all.
//!
//! A guest can write anything into a raw disk, a qcow2 header with a backing file of its choice included.
//! So content never decides: the name suggests, and content that contradicts it is a question to the user.

use crate::{EngineError, Format};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// The format of `file`: the given one, or the one that its name says.
///
/// # Errors
/// When the name says nothing, or says raw while the content looks like qcow2; when the format is qcow2 and the
/// content is not; when the file cannot be read or is neither a regular file nor a block device.
pub fn format_of(file: &Path, given: Option<Format>) -> Result<Format, EngineError> {
    let failed = |e| EngineError::file(file, "open", e);
    let kind = fs::metadata(file).map_err(failed)?.file_type();
    // A pipe would be waited for without end.
    if !kind.is_file() && !kind.is_block_device() {
        return Err(EngineError::NotAnImageFile { file: file.to_owned(), found: kind.into() });
    }
    let format = match given {
        Some(format) => format,
        None if kind.is_block_device() => Format::Raw,
        None => by_name(file).ok_or_else(|| EngineError::FormatUnknown { file: file.to_owned() })?,
    };
    match format {
        Format::Raw if given.is_none() && begins_like_qcow2(file).map_err(failed)? => {
            Err(EngineError::FormatDoubtful { file: file.to_owned() })
        }
        Format::Qcow2 if !begins_like_qcow2(file).map_err(failed)? => {
            Err(EngineError::NotQcow2 { file: file.to_owned() })
        }
        format => Ok(format),
    }
}

/// What the extension says.
pub fn by_name(file: &Path) -> Option<Format> {
    let extension = file.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "qcow2" | "qcow" | "qc2" => Some(Format::Qcow2),
        "raw" | "img" | "bin" | "iso" | "dd" => Some(Format::Raw),
        _ => None,
    }
}

/// The format of a new image when nobody names one: what the extension says, or raw.
pub fn of_new(file: &Path) -> Format {
    by_name(file).unwrap_or(Format::Raw)
}

fn begins_like_qcow2(file: &Path) -> io::Result<bool> {
    let mut magic = [0; 4];
    match File::open(file)?.read_exact(&mut magic) {
        Ok(()) => Ok(magic == *b"QFI\xfb"),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_never_decides() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let disguised = file("a.raw", b"QFI\xfb\0\0\0\x03");
        assert!(matches!(format_of(&disguised, None), Err(EngineError::FormatDoubtful { .. })));
        assert_eq!(format_of(&disguised, Some(Format::Raw)).unwrap(), Format::Raw);
        assert_eq!(format_of(&file("b.img", b"xy"), None).unwrap(), Format::Raw);
        assert_eq!(format_of(&file("c.QCOW2", b"QFI\xfb"), None).unwrap(), Format::Qcow2);
        for bytes in [&b"xy"[..], b"", b"not an image"] {
            let plain = file("c.qcow2", bytes);
            assert!(matches!(format_of(&plain, None), Err(EngineError::NotQcow2 { .. })));
            assert!(matches!(format_of(&plain, Some(Format::Qcow2)), Err(EngineError::NotQcow2 { .. })));
            assert_eq!(format_of(&plain, Some(Format::Raw)).unwrap(), Format::Raw);
        }
        assert!(matches!(format_of(&file("d", b"QFI\xfb"), None), Err(EngineError::FormatUnknown { .. })));
        let missing = format_of(&dir.path().join("e.raw"), None).unwrap_err();
        assert_eq!(missing.class(), crate::ErrorClass::NotFound);
    }

    #[test]
    fn only_files_and_devices_are_images() {
        let dir = tempfile::tempdir().unwrap();
        let refused = format_of(dir.path(), Some(Format::Raw)).unwrap_err();
        assert!(refused.to_string().contains("is a directory"), "{refused}");
        let refused = format_of(Path::new("/dev/null"), Some(Format::Raw)).unwrap_err();
        assert!(refused.to_string().contains("is a character device"), "{refused}");
    }

    #[test]
    fn new_images_have_the_format_of_their_name() {
        assert_eq!(of_new(Path::new("a.qcow2")), Format::Qcow2);
        assert_eq!(of_new(Path::new("a.img")), Format::Raw);
        assert_eq!(of_new(Path::new("/dev/sdx")), Format::Raw);
    }
}
