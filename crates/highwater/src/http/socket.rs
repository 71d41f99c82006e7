//! The API's unix socket.

use anyhow::{Context, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// A socket that listens already, with mode 0600.
#[derive(Debug)]
pub(crate) struct ApiSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// Removes the socket's file when the daemon ends.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl ApiSocket {
    /// Listens on `path`. A file that a dead daemon left there is replaced; a living daemon is not disturbed.
    pub(crate) async fn bind(path: &Path) -> anyhow::Result<Self> {
        if UnixStream::connect(path).await.is_ok() {
            bail!("another daemon answers on {}; stop it or give another socket with --api", path.display());
        }
        if let Some(parent) = path.parent() {
            make_private_directory(parent)?;
        }
        // Made under another name and given its mode before anybody can find it.
        let fresh = path.with_extension(format!("{}.tmp", std::process::id()));
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh).with_context(|| format!("cannot listen on {}", path.display()))?;
        let named = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&fresh, path))
            .and_then(|()| inode(path));
        let inode = match named {
            Ok(inode) => inode,
            Err(e) => {
                let _ = fs::remove_file(&fresh);
                return Err(e).with_context(|| format!("cannot listen on {}", path.display()));
            }
        };
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), inode } })
    }

    pub(crate) fn into_listener(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Not when another daemon has put its own there meanwhile.
        if inode(&self.path).is_ok_and(|inode| inode == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> std::io::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::ino(&fs::symlink_metadata(path)?))
}

/// Makes a directory that only its owner can enter; one that is there is left as it is.
pub(crate) fn make_private_directory(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}
