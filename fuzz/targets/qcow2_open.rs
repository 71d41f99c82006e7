//! An image opened, read, written, discarded, resized and closed.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::seeds::write_if_asked("qcow2_open"), |bytes: &[u8]| {
    let mut input = fuzz::Input::parse(bytes);
    fuzz::look(&input);
    fuzz::work(&mut input);
});
