//! Clients that are slow, greedy or insane.

use crate::raw_client::*;
use crate::served::{MIB, Served, Setup};
use export_nbd::{RequestKind, ServerConfig};
use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

/// The server still serves.
fn assert_alive(served: &Served) {
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    assert_eq!(client.send(WRITE, 0, 0, &[1; 512]).error(), 0);
}

#[test]
fn garbage_in_every_phase() {
    let served = Served::plain();
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..300 {
        let mut client = match round % 4 {
            0 => RawClient::connect(&served.socket()),
            1 => RawClient::greeted(&served.socket()),
            2 => RawClient::transmitting(&served.socket(), Style::Structured),
            _ => RawClient::transmitting(&served.socket(), Style::Extended),
        };
        let mut bytes: Vec<u8> = (0..random() % 200).map(|_| random() as u8).collect();
        if round % 4 == 1 {
            let mut option = option_bytes((random() % 14) as u32, &bytes);
            option.truncate(random() as usize % (option.len() + 1));
            bytes = option;
        } else if round % 4 > 1 && round % 8 > 3 {
            // A plausible header with garbage in one place.
            let mut header = client.header((random() % 9) as u16, 0, 1, random() % MIB, random() % 4096);
            let at = random() as usize % header.len();
            header[at] = random() as u8;
            header.extend(bytes);
            bytes = header;
        }
        let _ = client.stream.write_all(&bytes); // The server may have hung up already.
    }
    served.wait_until(|served| served.server.connections().is_empty());
    assert_alive(&served);
}

#[test]
fn everything_in_one_send() {
    let served = Served::plain();
    let mut client = RawClient::connect(&served.socket());
    client.style = Style::Extended;
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(OPT_EXTENDED, &[]));
    bytes.extend(option_bytes(OPT_GO, &go_data("disk")));
    for n in 0..100 {
        bytes.extend(client.header(WRITE, PAYLOAD_LEN, n, n * 4096, 4096));
        bytes.extend([n as u8 + 1; 4096]);
    }
    bytes.extend(client.header(FLUSH, 0, 100, 0, 0));
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || sender.write_all(&bytes).unwrap());
    client.take(18);
    client.option_replies(OPT_EXTENDED);
    client.option_replies(OPT_GO);
    let mut cookies: Vec<u64> = (0..=100)
        .map(|_| {
            let reply = client.reply(0);
            assert_eq!(reply.error(), 0);
            reply.cookie
        })
        .collect();
    sending.join().unwrap();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..=100));
    let read = client.request(READ, 0, 99 * 4096, 4096).bytes(99 * 4096, 4096);
    assert_eq!(read, [100; 4096]);
}

#[test]
fn byte_by_byte() {
    let served = Served::plain();
    let mut client = RawClient::connect(&served.socket());
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(OPT_GO, &go_data("disk")));
    bytes.extend(client.header(WRITE, 0, 1, 0, 40));
    bytes.extend([7; 40]);
    bytes.extend(client.header(READ, 0, 2, 0, 40));
    for byte in bytes {
        client.stream.write_all(&[byte]).unwrap();
    }
    client.take(18);
    client.option_replies(OPT_GO);
    assert_eq!(client.reply(0).error(), 0);
    assert_eq!(client.reply(40).parts, [Part::Data { offset: u64::MAX, bytes: vec![7; 40] }]);
}

/// A client that sends reads and takes no replies is stopped before it has asked for more than the bound.
#[test]
fn deaf_clients_are_not_listened_to() {
    let config = ServerConfig { max_bytes: 4 * MIB, max_requests: 64, ..ServerConfig::default() };
    let served = Served::new(Setup { config, ..Setup::default() });
    let mut client = RawClient::transmitting(&served.socket(), Style::Simple);
    let header = client.header(READ, 0, 1, 0, MIB);
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut sent = 0u64;
    let mut batch = header.repeat(1000);
    while let Ok(n) = client.stream.write(&batch) {
        sent += n as u64;
        batch.rotate_left(n % header.len());
        assert!(sent < 64 * MIB, "the server takes requests without end");
    }
    // What the disk was asked is bounded: the limit, and what the socket itself took.
    let read = served.stats.read(RequestKind::Read);
    assert!(read.requests <= 64, "{} requests were begun", read.requests);
    let other = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    assert_eq!(other.request(READ, 0, 0, 4096).error(), 0, "others are served meanwhile");
    // When it listens at last, everything is there.
    client.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    for _ in 0..sent / header.len() as u64 / 1000 * 10 {
        assert_eq!(client.reply(MIB).error(), 0);
    }
}

#[test]
fn single_requests_beyond_the_bound_are_served() {
    let config = ServerConfig { max_bytes: MIB, ..ServerConfig::default() };
    let served = Served::new(Setup { config, ..Setup::default() });
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    for _ in 0..3 {
        client.stream.write_all(&client.header(READ, 0, 1, 0, 32 * MIB)).unwrap();
    }
    for _ in 0..3 {
        assert_eq!(client.reply(32 * MIB).error(), 0);
    }
    assert_eq!(client.send(WRITE, 0, 0, &vec![5; 32 << 20]).error(), 0);
}

#[test]
fn silent_clients_are_put_out() {
    let config = ServerConfig { handshake_timeout: Duration::from_millis(50), ..ServerConfig::default() };
    let served = Served::new(Setup { config, ..Setup::default() });
    let mut client = RawClient::connect(&served.socket());
    client.take(18);
    assert!(client.is_closed());
    let mut client = RawClient::greeted(&served.socket());
    client.stream.write_all(b"IHAVE").unwrap();
    assert!(client.is_closed());
    // Behind the handshake nobody is in a hurry.
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(client.request(READ, 0, 0, 512).error(), 0);
}

#[test]
fn connections_are_counted() {
    let config = ServerConfig { max_connections: 3, ..ServerConfig::default() };
    let served = Served::new(Setup { config, ..Setup::default() });
    let clients: Vec<_> = (0..3).map(|_| RawClient::greeted(&served.socket())).collect();
    served.wait_until(|served| served.server.connections().len() == 3);
    let mut fourth = RawClient::connect(&served.socket());
    assert_eq!(fourth.stream.read(&mut [0; 1]).unwrap(), 0);
    drop(clients);
    served.wait_until(|served| served.server.connections().is_empty());
    assert_alive(&served);
}

#[test]
fn hang_ups_within_requests() {
    let served = Served::plain();
    for len in [0, 10, 28, 29, 5000] {
        let mut client = RawClient::transmitting(&served.socket(), Style::Simple);
        let mut bytes = client.header(WRITE, 0, 1, 0, 100_000);
        bytes.resize(6000, 1);
        client.stream.write_all(&bytes[..len]).unwrap();
    }
    served.wait_until(|served| served.server.connections().is_empty());
    assert_eq!(served.stats.read(RequestKind::Write).requests, 0, "a write that did not arrive is none");
    assert_alive(&served);
}

#[test]
fn vanishing_with_requests_under_way() {
    let served = Served::plain();
    served.with_disk(|disk| disk.hold.set(true));
    let mut client = RawClient::transmitting(&served.socket(), Style::Simple);
    for cookie in 0..20 {
        let mut bytes = client.header(WRITE, 0, cookie, 4096 * cookie, 4096);
        bytes.resize(bytes.len() + 4096, 9);
        client.stream.write_all(&bytes).unwrap();
    }
    served.wait_until(|served| served.with_disk(|disk| disk.holding() == 20));
    drop(client);
    served.with_disk(|disk| disk.release());
    served.wait_until(|served| served.server.connections().is_empty());
    assert_eq!(served.stats.read(RequestKind::Write).requests, 20, "what reached the disk is finished");
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    assert_eq!(client.request(READ, 0, 19 * 4096, 4096).bytes(19 * 4096, 4096), [9; 4096]);
}

#[test]
fn wrong_magic_ends_one_connection_only() {
    let served = Served::plain();
    let good = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    let mut bad = RawClient::transmitting(&served.socket(), Style::Simple);
    bad.stream.write_all(&[0x55; 28]).unwrap();
    assert!(bad.is_closed());
    assert_eq!(good.request(READ, 0, 0, 512).error(), 0);
    let mut compact = RawClient::transmitting(&served.socket(), Style::Extended);
    compact.style = Style::Simple;
    compact.stream.write_all(&compact.header(READ, 0, 1, 0, 512)).unwrap();
    compact.stream.write_all(&[0; 4]).unwrap();
    assert!(compact.is_closed());
    compact.stream.set_nonblocking(true).unwrap();
    assert_ne!(compact.stream.read(&mut [0]).err().map(|e| e.kind()), Some(ErrorKind::WouldBlock));
}
