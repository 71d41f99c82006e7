//! Exit codes, as docs/cli.md has them.

use api::ClientError;
use engine::{EngineError, ErrorClass};
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
/// `chain verify`: a parent is not what its child was bound to.
pub(crate) const LINK_FAULT: u8 = 2;
/// `repo check`, `repo verify`: something is damaged.
pub(crate) const DAMAGED: u8 = 2;
/// `check`: the format has nothing to check.
pub(crate) const CHECK_UNSUPPORTED: u8 = 63;
/// Stopped by Ctrl-C.
pub(crate) const INTERRUPTED: u8 = 130;

/// An error on its way to the user, with the exit code that it means.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    code: u8,
}

impl Failure {
    /// The same error with another exit code, unless it was Ctrl-C that ended the work.
    pub(crate) fn with_code(mut self, code: u8) -> Self {
        if self.code != INTERRUPTED {
            self.code = code;
        }
        self
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// The whole chain of causes in one line, and the next step; a cause that its effect has quoted is not said twice.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let client = self.error.chain().find_map(|cause| cause.downcast_ref::<ClientError>());
        let causes = self.error.chain().count();
        for (n, cause) in self.error.chain().enumerate() {
            // Of a daemon that is not there, the HTTP library has nothing to tell but the last cause.
            if matches!(client, Some(ClientError::NoDaemon { .. }))
                && n + 1 < causes
                && !matches!(cause.downcast_ref(), Some(ClientError::NoDaemon { .. }))
                && n > 0
            {
                continue;
            }
            let words = cause.to_string();
            if text.ends_with(&words) {
                continue;
            }
            if !text.is_empty() {
                text.push_str(": ");
            }
            let _ = write!(text, "{words}");
        }
        let step = match client {
            Some(ClientError::Refused { body, .. }) => body.next_step.clone(),
            _ => {
                let engine = self.error.chain().find_map(|cause| cause.downcast_ref::<EngineError>());
                engine.and_then(EngineError::next_step)
            }
        };
        if let Some(step) = step {
            let _ = write!(text, "; {step}");
        }
        text
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let class = error.downcast_ref::<EngineError>().map(EngineError::class);
        Self { error, code: if class == Some(ErrorClass::Cancelled) { INTERRUPTED } else { FAILED } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn the_next_step_comes_last() {
        let body = api::ErrorBody { error: "a: no space left".into(), kind: "no-space".into(), next_step: None };
        let refused = |next_step: Option<&str>| {
            let body = api::ErrorBody { next_step: next_step.map(str::to_owned), ..body.clone() };
            Failure::from(ClientError::Refused { status: 507, body })
        };
        assert_eq!(refused(None).text(), "a: no space left");
        assert_eq!(refused(Some("make room")).text(), "a: no space left; make room");
        assert_eq!(Failure::from(anyhow!("b").context("a")).text(), "a: b");
    }

    #[test]
    fn ctrl_c_has_a_code_of_its_own() {
        assert_eq!(Failure::from(EngineError::Cancelled).with_code(COMPARE_FAILED).code(), INTERRUPTED);
        assert_eq!(Failure::from(anyhow!("other")).with_code(COMPARE_FAILED).code(), COMPARE_FAILED);
    }
}
