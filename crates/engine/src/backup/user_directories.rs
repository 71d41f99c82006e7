//! Where this user's files of a kind are kept, as the XDG base directory specification says.

use std::path::PathBuf;

/// `$XDG_CONFIG_HOME/highwater`, or `~/.config/highwater`, or `/etc/highwater` for who has no home.
pub(super) fn config() -> PathBuf {
    of("XDG_CONFIG_HOME", ".config", "/etc")
}

/// `$XDG_CACHE_HOME/highwater`, or `~/.cache/highwater`, or `/var/cache/highwater` for who has no home.
pub(super) fn cache() -> PathBuf {
    of("XDG_CACHE_HOME", ".cache", "/var/cache")
}

fn of(variable: &str, in_home: &str, without: &str) -> PathBuf {
    // A relative path is to be ignored, says the specification.
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable)
        .or_else(|| absolute("HOME").map(|home| home.join(in_home)))
        .unwrap_or_else(|| PathBuf::from(without))
        .join("highwater")
}
