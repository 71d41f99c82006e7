//! A client's requests; the first byte chooses what was negotiated.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::seeds::write_if_asked("nbd_transmission"), |bytes: &[u8]| export_nbd::fuzzing::requests(bytes));
