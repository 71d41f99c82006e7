//! The NBD server against real clients, and against hand-made bytes.

mod clients;
mod contexts;
mod hostile;
mod lifecycle;
#[path = "../../src/memory_disk.rs"]
mod memory_disk;
mod raw_client;
mod served;
mod tls;
mod transmission;
