//! Who may connect to a unix socket: its file's mode and group.

use crate::EngineError;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

/// Mode when none is given: the owner and the group.
const DEFAULT_MODE: u32 = 0o660;

/// A socket's mode and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    mode: u32,
    /// The process's own when absent.
    group: Option<u32>,
}

impl Default for SocketAccess {
    fn default() -> Self {
        Self { mode: DEFAULT_MODE, group: None }
    }
}

impl SocketAccess {
    /// From an octal mode and a group's name or number.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when the mode is none, or there is no such group.
    pub fn parse(mode: Option<&str>, group: Option<&str>) -> Result<Self, EngineError> {
        let mode = match mode {
            None => DEFAULT_MODE,
            Some(text) => u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| {
                EngineError::Invalid(format!("{text:?} is not a socket's mode: expected octal digits such as 0660"))
            })?,
        };
        Ok(Self { mode, group: group.map(group_number).transpose()? })
    }

    /// Gives a socket this mode and group. It could be opened by its owner alone until then.
    pub(crate) fn apply(&self, socket: &Path) -> io::Result<()> {
        if let Some(group) = self.group {
            chown(socket, None, Some(group))?;
        }
        fs::set_permissions(socket, fs::Permissions::from_mode(self.mode))
    }
}

/// A group's number: as given, or from `/etc/group`.
fn group_number(group: &str) -> Result<u32, EngineError> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let list = fs::read_to_string("/etc/group").map_err(|e| EngineError::file("/etc/group", "read", e))?;
    number_in(&list, group).ok_or_else(|| {
        EngineError::Invalid(format!("there is no group {group:?} in /etc/group; give another name or its number"))
    })
}

fn number_in(list: &str, group: &str) -> Option<u32> {
    list.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_groups() {
        assert_eq!(SocketAccess::parse(None, None).unwrap(), SocketAccess { mode: 0o660, group: None });
        assert_eq!(SocketAccess::parse(Some("0600"), Some("7")).unwrap(), SocketAccess { mode: 0o600, group: Some(7) });
        for mode in ["", "rw", "8", "1777", "-1"] {
            assert!(SocketAccess::parse(Some(mode), None).is_err(), "{mode:?} was accepted");
        }
        assert!(SocketAccess::parse(None, Some("no such group")).is_err());
        assert_eq!(number_in("root:x:0:\nkvm:x:104:a,b\n", "kvm"), Some(104));
        assert_eq!(number_in("root:x:0:\n", "kvm"), None);
    }
}
