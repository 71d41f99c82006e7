//! Serves an empty disk in memory: `memory SOCKET BYTES [THREADS]`, until standard input ends.

#[path = "../src/memory_disk.rs"]
mod memory_disk;

use dataplane::{Backend, IoThreads, IoThreadsConfig};
use disk::DiskHandle;
use export_nbd::{Export, Server, ServerConfig, Tls};
use memory_disk::MemoryDisk;
use std::cell::RefCell;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

thread_local! {
    static DISK: RefCell<Option<DiskHandle>> = const { RefCell::new(None) };
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), Some(size)) = (arguments.next(), arguments.next()) else {
        return Err("usage: memory SOCKET BYTES [THREADS]".into());
    };
    let size: u64 = size.parse()?;
    let threads = arguments.next().map_or(Ok(1), |n| n.parse())?;
    let threads = IoThreads::start(IoThreadsConfig { threads, backend: Backend::Auto })?;
    let home = threads.pick();
    home.spawn(move || async move {
        DISK.with(|slot| *slot.borrow_mut() = Some(DiskHandle::new(MemoryDisk::new(size))));
    })
    .wait()?;
    let server = Server::new(ServerConfig::default(), threads.all());
    let source = Arc::new(|| DISK.with(|slot| slot.borrow().clone()));
    server.add_export(Export::new("disk", home, source))?;
    server.listen_unix(Path::new(&socket), Tls::Off)?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let drained = server.shutdown(Duration::from_secs(5)).wait()?;
    println!("{drained:?}");
    Ok(())
}
