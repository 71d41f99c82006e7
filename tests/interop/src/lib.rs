//! Real clients against the real binary: what the tests under `tests/` share.
//!
//! The tests drive QEMU's tools, libnbd's, fio and whole guests against `highwater serve`. `scripts/setup-tests`
//! installs them all. A test whose tool is missing says so and passes only when `allowed-skips.txt` lists the tool,
//! so that nothing is skipped in silence.

mod program;
mod server;
mod tools;

pub use program::{highwater, highwater_command};
pub use server::Server;
pub use tools::{
    assert_equal, assert_no_worse_than_leaks, assert_sound, missing, pattern_file, python, qemu_img, qemu_io, run,
    run_for_status, script,
};
