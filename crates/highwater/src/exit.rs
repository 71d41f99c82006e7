//! Exit codes, as docs/cli.md has them.

use std::fmt::Write;

/// Done.
pub(crate) const OK: u8 = 0;
/// Failed; for `compare`: different.
pub(crate) const FAILED: u8 = 1;
/// The command line was not understood; for `compare`: failed.
pub(crate) const USAGE: u8 = 2;
/// `compare`: the images differ.
pub(crate) const DIFFERENT: u8 = 1;
/// `compare`: failed.
pub(crate) const COMPARE_FAILED: u8 = 2;
/// `check`: the format has nothing to check.
pub(crate) const CHECK_UNSUPPORTED: u8 = 63;

/// An error on its way to the user, with the exit code that it means.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    code: u8,
}

impl Failure {
    /// The same error with another exit code.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// The whole chain of causes in one line; a cause that its effect has quoted is not said twice.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for cause in self.error.chain() {
            let words = cause.to_string();
            if text.ends_with(&words) {
                continue;
            }
            if !text.is_empty() {
                text.push_str(": ");
            }
            let _ = write!(text, "{words}");
        }
        text
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), code: FAILED }
    }
}
