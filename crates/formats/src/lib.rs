//! Image formats: each answers where a guest's bytes are.

mod format;
pub mod qcow2;
pub mod raw;

pub use format::{Format, UnknownFormat};
