//! A client's whole side of a connection: handshake, options, and requests behind them.
#![no_main]

libfuzzer_sys::fuzz_target!(init: fuzz::seeds::write_if_asked("nbd_negotiation"), |bytes: &[u8]| export_nbd::fuzzing::connection(bytes));
