//! Names of other files as images record them.

use std::path::{Path, PathBuf};

/// Why a recorded name is not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadName {
    #[error("the recorded name is empty")]
    Empty,
    #[error("the recorded name {0:?} is a json: description; only names of files are followed")]
    Json(String),
    #[error("the recorded name {name:?} asks for the protocol {protocol:?}; only names of files are followed")]
    Protocol { name: String, protocol: String },
    #[error("the recorded name {0:?} holds a zero byte")]
    ZeroByte(String),
}

/// The file that an image at `child` means by `name`: relative names begin in the child's directory.
///
/// As QEMU reads them, a name with a colon before its first slash belongs to a protocol.
pub(crate) fn resolve(child: &Path, name: &str) -> Result<PathBuf, BadName> {
    if name.is_empty() {
        return Err(BadName::Empty);
    }
    if name.contains('\0') {
        return Err(BadName::ZeroByte(name.to_owned()));
    }
    if name.starts_with("json:") {
        return Err(BadName::Json(name.to_owned()));
    }
    let plain = match name.split_once(':') {
        Some((protocol, _)) if protocol.contains('/') => name,
        Some(("file", rest)) if !rest.is_empty() && !rest.starts_with("//") => rest,
        Some((protocol, _)) => {
            return Err(BadName::Protocol { name: name.to_owned(), protocol: protocol.to_owned() });
        }
        None => name,
    };
    Ok(child.parent().unwrap_or(Path::new("")).join(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_begin_beside_the_child() {
        let child = Path::new("/vms/a/disk.qcow2");
        for (name, path) in [
            ("base.raw", "/vms/a/base.raw"),
            ("../b/base.raw", "/vms/a/../b/base.raw"),
            ("/golden/base.raw", "/golden/base.raw"),
            ("./odd:name", "/vms/a/./odd:name"),
            ("dir/odd:name", "/vms/a/dir/odd:name"),
            ("file:base.raw", "/vms/a/base.raw"),
            ("file:/golden/base.raw", "/golden/base.raw"),
        ] {
            assert_eq!(resolve(child, name).unwrap(), Path::new(path), "{name}");
        }
        assert_eq!(resolve(Path::new("disk.qcow2"), "base").unwrap(), Path::new("base"));
    }

    #[test]
    fn everything_but_files_is_refused_by_name() {
        let child = Path::new("/vms/disk.qcow2");
        for (name, word) in [
            ("json:{\"driver\":\"nbd\"}", "json:"),
            ("nbd://host/export", "protocol \"nbd\""),
            ("nbd+unix:///x?socket=/s", "protocol \"nbd+unix\""),
            ("http://host/x.raw", "protocol \"http\""),
            ("file:///golden/base.raw", "protocol \"file\""),
            ("fat:rw:/etc", "protocol \"fat\""),
            ("host_device:/dev/sda", "protocol \"host_device\""),
            ("", "empty"),
            ("a\0b", "zero byte"),
        ] {
            let error = resolve(child, name).unwrap_err().to_string();
            assert!(error.contains(word), "{name}: {error}");
        }
    }
}
