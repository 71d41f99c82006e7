//! The API's unix socket.

use anyhow::{Context, bail};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
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
    /// Listens on `path`. A socket that a dead daemon left there is replaced; nothing else is, and a living daemon
    /// is not disturbed.
    pub(crate) async fn bind(path: &Path) -> anyhow::Result<Self> {
        let listening = || format!("cannot listen on {}", path.display());
        remove_dead_socket(path).await?;
        if let Some(parent) = path.parent() {
            make_private_directory(parent)?;
        }
        // Made under another name and given its mode before anybody can find it.
        let fresh = path.with_file_name(format!(".{}", std::process::id()));
        remove_dead_socket(&fresh).await?;
        let listener = UnixListener::bind(&fresh).with_context(listening)?;
        // A link, unlike a renamed file, replaces nothing.
        let named = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::hard_link(&fresh, path))
            .and_then(|()| inode(path));
        let _ = fs::remove_file(&fresh);
        let inode = named.with_context(listening)?;
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), inode } })
    }

    pub(crate) fn into_listener(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

/// Removes a socket on which nobody listens.
async fn remove_dead_socket(path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("cannot listen on {}", path.display())),
        Ok(facts) if !facts.file_type().is_socket() => {
            bail!("{} exists and is not a socket; remove it or give another path with --api", path.display());
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Ok(_) => bail!("another daemon answers on {}; stop it or give another socket with --api", path.display()),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => {
            return Err(e).with_context(|| {
                format!("cannot find out whether a daemon listens on {}; give another path with --api", path.display())
            });
        }
    }
    fs::remove_file(path).with_context(|| format!("cannot replace the socket {}", path.display()))
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
