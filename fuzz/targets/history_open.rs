//! A history's sidecar opened, asked, written and closed.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::seeds::write_if_asked("history_open"), |bytes: &[u8]| fuzz::history(bytes));
