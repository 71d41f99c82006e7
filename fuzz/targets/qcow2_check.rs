//! An image checked, repaired in both ways, and checked again.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::seeds::write_if_asked("qcow2_check"), |bytes: &[u8]| fuzz::check_and_repair(&fuzz::Input::parse(bytes)));
