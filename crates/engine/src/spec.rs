//! A disk as plain data: what the API accepts, what the catalogue stores, what start-up replays.

use crate::{EngineError, HistorySpec, SocketAccess};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use utoipa::ToSchema;

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// The name that options and reports use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl From<Format> for formats::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<formats::Format> for Format {
    fn from(format: formats::Format) -> Self {
        match format {
            formats::Format::Raw => Self::Raw,
            formats::Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|f| f.name() == name)
            .ok_or_else(|| format!("unknown format {name:?}: expected raw or qcow2"))
    }
}

/// How the host's cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Direct I/O past the host's page cache.
    None,
    /// Through the page cache; a guest's flush reaches the disk.
    #[default]
    Writeback,
    /// Through the page cache; flushes are ignored: a host crash may lose the image.
    Unsafe,
}

impl FromStr for CacheMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "writeback" => Ok(Self::Writeback),
            "unsafe" => Ok(Self::Unsafe),
            _ => Err(format!("unknown cache mode {name:?}: expected none, writeback or unsafe")),
        }
    }
}

/// One disk: which image, how it is opened, how it is exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// 1 to 64 of the characters `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// The image.
    pub image: ImageSpec,
    /// How the host's cache is used.
    #[serde(default)]
    pub cache: CacheMode,
    /// Whether writes are refused.
    #[serde(default)]
    pub read_only: bool,
    /// Whether it is opened though a parent is not what its child was bound to; a read-only disk alone may be. What is read
    /// from there may be wrong.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub despite_fault: bool,
    /// Whether and how its history is kept.
    #[serde(default)]
    pub history: HistorySpec,
    /// The virtual machine that it belongs to: marks may be taken of all disks of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The ways in.
    #[serde(default)]
    pub exports: Vec<ExportSpec>,
}

impl DiskSpec {
    /// Checks what can be checked without touching a file.
    ///
    /// # Errors
    /// [`EngineError::BadName`], [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        validate_name(&self.name)?;
        self.image.validate()?;
        self.history.validate()?;
        if self.despite_fault && !self.read_only && self.image.snapshot.is_none() {
            return Err(EngineError::Invalid(
                "a disk over a parent that is not what it was bound to can be read, but not written: make it read-only"
                    .to_owned(),
            ));
        }
        if let Some(vm) = &self.vm {
            validate_name(vm)?;
        }
        for export in &self.exports {
            export.validate()?;
        }
        Ok(())
    }
}

/// Which image a disk shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ImageSpec {
    /// Absolute path of the file or block device.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format; by the file's extension when absent, never by its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// An internal snapshot (name or id) to show instead of the present state; the disk is read-only then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The parent, instead of the one that the image names; its format must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(no_recursion)]
    pub parent: Option<Box<ImageSpec>>,
    /// The external data file, instead of the one that the image names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub data_file: Option<PathBuf>,
}

impl ImageSpec {
    /// The present state of that file, over the parent that it names.
    pub fn of(file: impl Into<PathBuf>, format: Option<Format>) -> Self {
        Self { file: file.into(), format, snapshot: None, parent: None, data_file: None }
    }

    fn validate(&self) -> Result<(), EngineError> {
        for file in std::iter::once(&self.file).chain(&self.data_file) {
            if !file.is_absolute() {
                return Err(EngineError::Invalid(format!(
                    "the path {} is not absolute; name it from the root, as the daemon has its own working directory",
                    file.display()
                )));
            }
        }
        self.parent.as_ref().map_or(Ok(()), |parent| parent.validate())
    }
}

/// One NBD export of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ExportSpec {
    /// The export's name, up to 4,096 bytes; the disk's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Unix socket to listen on. When neither this nor `listen` is given, the daemon's own NBD socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// Mode of that socket, in octal digits; `0660` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<String>,
    /// Group of that socket, by name or number; the daemon's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// TCP address to listen on, as `HOST:PORT` or `[IPV6]:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// TLS, if connections may or must be encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsSpec>,
    /// Whether this export refuses writes though the disk may take them.
    #[serde(default)]
    pub read_only: bool,
}

impl ExportSpec {
    /// The export's name for a disk of that name.
    pub fn name_for<'a>(&'a self, disk: &'a str) -> &'a str {
        self.name.as_deref().unwrap_or(disk)
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        if self.name.as_ref().is_some_and(|name| name.len() > 4096) {
            return Err(EngineError::Invalid("an export's name has at most 4096 bytes".to_owned()));
        }
        if let Some(socket) = &self.socket
            && !socket.is_absolute()
        {
            return Err(EngineError::Invalid(format!("the socket path {} is not absolute", socket.display())));
        }
        if self.socket.is_none() && (self.socket_mode.is_some() || self.socket_group.is_some()) {
            return Err(EngineError::Invalid(
                "a socket's mode and group go with its path; give socket as well".to_owned(),
            ));
        }
        SocketAccess::parse(self.socket_mode.as_deref(), None)?;
        if let Some(tls) = &self.tls
            && !tls.dir.is_absolute()
        {
            return Err(EngineError::Invalid(format!("the TLS directory {} is not absolute", tls.dir.display())));
        }
        Ok(())
    }
}

/// TLS with X.509 certificates from a directory laid out as QEMU's `tls-creds-x509` has it:
/// `server-cert.pem`, `server-key.pem`, and `ca-cert.pem` for client certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TlsSpec {
    /// Absolute path of the directory.
    #[schema(value_type = String)]
    pub dir: PathBuf,
    /// Whether plain connections are refused.
    #[serde(default = "yes")]
    pub required: bool,
    /// Whether clients must show a certificate that `ca-cert.pem` signed.
    #[serde(default)]
    pub verify: bool,
}

fn yes() -> bool {
    true
}

/// Whether a disk may bear that name.
///
/// # Errors
/// [`EngineError::BadName`].
pub fn validate_name(name: &str) -> Result<(), EngineError> {
    let good = (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name != "."
        && name != "..";
    if good { Ok(()) } else { Err(EngineError::BadName(name.chars().take(80).collect())) }
}

/// A disk's name made from a file's stem: what a name may not hold becomes `_`.
pub fn name_of_file(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let name: String = stem
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
        .take(64)
        .collect();
    if name.is_empty() { "disk".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "disk-1.old_x", &"n".repeat(64)] {
            validate_name(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", &"n".repeat(65)] {
            assert!(matches!(validate_name(bad), Err(EngineError::BadName(_))), "{bad:?} was accepted");
        }
        assert_eq!(name_of_file(Path::new("/x/My disk.qcow2")), "My_disk");
        assert_eq!(name_of_file(Path::new("/")), "disk");
        assert!(validate_name(&name_of_file(Path::new("/x/größe.raw"))).is_ok());
    }

    #[test]
    fn spec_is_plain_data() {
        let text = r#"{"name":"a","image":{"file":"/x/a.qcow2"},"exports":[{"listen":"[::1]:10809"}]}"#;
        let spec: DiskSpec = serde_json::from_str(text).unwrap();
        assert_eq!(spec.cache, CacheMode::Writeback);
        assert_eq!(spec.exports[0].name_for("a"), "a");
        spec.validate().unwrap();
        let again: DiskSpec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
        assert_eq!(spec, again);
        let unknown = r#"{"name":"a","image":{"file":"/x"},"cahce":"none"}"#;
        assert!(serde_json::from_str::<DiskSpec>(unknown).unwrap_err().to_string().contains("cahce"));
        let relative: DiskSpec = serde_json::from_str(r#"{"name":"a","image":{"file":"x.raw"}}"#).unwrap();
        assert!(matches!(relative.validate(), Err(EngineError::Invalid(_))));
    }
}
