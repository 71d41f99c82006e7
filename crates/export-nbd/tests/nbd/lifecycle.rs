//! Exports that come, go and grow; servers that end.

use crate::memory_disk::MemoryDisk;
use crate::raw_client::*;
use crate::served::{MIB, Served, Setup};
use disk::DiskHandle;
use export_nbd::{Export, ExportError, Tls};
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

const PLENTY: Duration = Duration::from_secs(60);
const NOTHING: Duration = Duration::from_millis(1);

fn hold_writes(served: &Served) {
    served.with_disk(|disk| disk.hold.set(true));
}

#[test]
fn shutdown_lets_requests_finish_and_flushes() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    hold_writes(&served);
    let mut bytes = client.header(WRITE, 0, 5, 0, 4096);
    bytes.extend_from_slice(&[1; 4096]);
    client.stream.write_all(&bytes).unwrap();
    served.wait_until(|served| served.with_disk(|disk| disk.holding() == 1));
    let shutdown = served.server.shutdown(PLENTY);
    served.wait_until(|served| !served.socket().exists());
    served.with_disk(MemoryDisk::release);
    let drained = shutdown.wait().unwrap();
    assert_eq!((drained.aborted, drained.stuck, drained.failed_flushes.len()), (0, 0, 0));
    assert_eq!(client.reply(0), Reply { cookie: 5, parts: vec![Part::Done] });
    assert!(client.is_closed());
    assert_eq!(served.with_disk(|disk| disk.flushes.get()), 1);
    assert!(served.server.connections().is_empty());
    let export = Export::new("late", served.home.clone(), Arc::new(|| None));
    assert_eq!(served.server.add_export(export), Err(ExportError::ShuttingDown));
    assert!(served.server.listen_unix(&served.socket(), Tls::Off).is_err());
}

#[test]
fn shutdown_ends_idle_and_negotiating_clients() {
    let served = Served::plain();
    let idle = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    let negotiating = &mut RawClient::greeted(&served.socket());
    served.wait_until(|served| served.server.connections().len() == 2);
    let drained = served.server.shutdown(PLENTY).wait().unwrap();
    assert_eq!(drained.aborted, 0);
    assert!(idle.is_closed() && negotiating.is_closed());
}

#[test]
fn shutdown_does_not_wait_for_ever() {
    let served = Served::plain();
    // One client does not read its replies, the other's write hangs.
    let deaf = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    for cookie in 0..4 {
        deaf.stream.write_all(&deaf.header(READ, 0, cookie, 0, 8 * MIB)).unwrap();
    }
    let hanging = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    hold_writes(&served);
    hanging.stream.write_all(&hanging.header(WRITE, 0, 5, 0, 512)).unwrap();
    hanging.stream.write_all(&[1; 512]).unwrap();
    served.wait_until(|served| served.with_disk(|disk| disk.holding() == 1));
    let drained = served.server.shutdown(NOTHING).wait().unwrap();
    assert_eq!((drained.aborted, drained.stuck), (2, 1));
    served.with_disk(MemoryDisk::release);
    served.wait_until(|served| served.server.connections().is_empty());
}

#[test]
fn removed_exports_are_gone() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    served.wait_until(|served| served.stats.connections() == 1);
    let removal = served.server.remove_export("disk", PLENTY).unwrap();
    assert_eq!(served.server.remove_export("disk", PLENTY).err(), Some(ExportError::Unknown("disk".into())));
    assert_eq!(removal.wait().unwrap().aborted, 0);
    assert!(client.is_closed());
    assert_eq!(served.stats.connections(), 0);
    let late = &mut RawClient::greeted(&served.socket());
    assert_eq!(late.option(OPT_GO, &go_data("disk"))[0].0, REP_ERR_UNKNOWN);
}

#[test]
fn closed_disks_are_unknown() {
    let served = Served::plain();
    served.forget_disk();
    let client = &mut RawClient::greeted(&served.socket());
    assert_eq!(client.option(OPT_GO, &go_data("disk"))[0].0, REP_ERR_UNKNOWN);
}

#[test]
fn many_exports() {
    let served = Served::plain();
    for n in 0..300 {
        let home = served.home.clone();
        let source = Arc::new(move || Some(DiskHandle::new(MemoryDisk::new(n * 512))));
        let mut export = Export::new(format!("export-{n}"), home, source);
        export.description = "d".repeat(5000);
        served.server.add_export(export).unwrap();
    }
    let again = Export::new("export-7", served.home.clone(), Arc::new(|| None));
    assert_eq!(served.server.add_export(again), Err(ExportError::Exists("export-7".into())));
    for bad in ["a\0b".to_owned(), "n".repeat(4097)] {
        let export = Export::new(bad, served.home.clone(), Arc::new(|| None));
        assert_eq!(served.server.add_export(export), Err(ExportError::BadName));
    }
    let client = &mut RawClient::greeted(&served.socket());
    let list = client.option(3, &[]);
    assert_eq!(list.len(), 302);
    let info = client.option(6, &go_data("export-9"));
    assert_eq!(info[0].1[2..10], (9u64 * 512).to_be_bytes());
    assert_eq!(client.option(6, &go_data(""))[0].0, REP_ERR_UNKNOWN, "no default among many");
}

#[test]
fn new_connections_see_the_new_size() {
    let served = Served::plain();
    let before = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    served
        .home
        .spawn({
            let disk = served.disk_source();
            move || async move { disk().unwrap().resize(128 * MIB).await }
        })
        .wait()
        .unwrap()
        .unwrap();
    let after = &mut RawClient::greeted(&served.socket());
    let info = after.option(OPT_GO, &go_data("disk"));
    assert_eq!(info[0].1[2..10], (128 * MIB).to_be_bytes());
    assert_eq!(after.send(WRITE, 0, 127 * MIB, &[1; 512]).error(), 0);
    assert_eq!(before.request(READ, 0, 0, 512).error(), 0, "older connections go on");
}

#[test]
fn connections_are_listed_and_can_be_ended() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    served.wait_until(|served| served.server.connections().iter().any(|info| info.export.is_some()));
    let info = served.server.connections().remove(0);
    assert_eq!(info.export.as_deref(), Some("disk"));
    assert!(info.peer.contains(&std::process::id().to_string()), "{}", info.peer);
    assert!(!info.encrypted);
    assert!(served.server.disconnect(info.id));
    assert!(client.is_closed());
    served.wait_until(|served| served.server.connections().is_empty());
    assert!(!served.server.disconnect(info.id));
}

#[test]
fn tcp() {
    let served = Served::new(Setup { size: MIB, ..Setup::default() });
    let address = served.server.listen_tcp("127.0.0.1:0".parse().unwrap(), Tls::Off).unwrap();
    let client = &mut RawClient { stream: std::net::TcpStream::connect(address).unwrap(), style: Style::Simple };
    client.greet();
    client.option(OPT_GO, &go_data(""));
    assert_eq!(client.send(WRITE, 0, 0, &[3; 512]).error(), 0);
    let peer = client.stream.local_addr().unwrap().to_string();
    assert!(served.server.connections().iter().any(|info| info.peer == peer));
}
