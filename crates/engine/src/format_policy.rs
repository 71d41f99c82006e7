//! Which format a file is taken for when nobody said so.
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
/// When the name says nothing, or says raw while the content looks like qcow2, or the file cannot be read.
pub fn format_of(file: &Path, given: Option<Format>) -> Result<Format, EngineError> {
    if let Some(format) = given {
        return Ok(format);
    }
    let facts = fs::metadata(file).map_err(|e| EngineError::file(file, "open", e))?;
    let format = if facts.file_type().is_block_device() {
        Format::Raw
    } else {
        by_name(file).ok_or_else(|| EngineError::FormatUnknown { file: file.to_owned() })?
    };
    if format == Format::Raw && begins_like_qcow2(file).map_err(|e| EngineError::file(file, "open", e))? {
        return Err(EngineError::FormatDoubtful { file: file.to_owned() });
    }
    Ok(format)
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
        assert_eq!(format_of(&file("c.QCOW2", b"xy"), None).unwrap(), Format::Qcow2);
        assert!(matches!(format_of(&file("d", b"QFI\xfb"), None), Err(EngineError::FormatUnknown { .. })));
        let missing = format_of(&dir.path().join("e.raw"), None).unwrap_err();
        assert_eq!(missing.class(), crate::ErrorClass::NotFound);
    }
}
