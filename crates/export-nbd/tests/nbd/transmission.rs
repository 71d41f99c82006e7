//! What requests do, byte by byte, in all three styles.

use crate::raw_client::*;
use crate::served::{MIB, Served, Setup};
use dataplane::Backend;
use export_nbd::RequestKind;
use std::io::Write;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

/// The bytes of a read in any style.
fn read(client: &mut RawClient, offset: u64, len: usize) -> Vec<u8> {
    let reply = client.request(READ, 0, offset, len as u64);
    match (&client.style, &reply.parts[..]) {
        (Style::Simple, [Part::Data { bytes, .. }]) => bytes.clone(),
        _ => reply.bytes(offset, len),
    }
}

#[test]
fn writes_are_read_back_in_all_styles_and_on_both_backends() {
    for backend in [Backend::Auto, Backend::Threads] {
        let served = Served::new(Setup { backend, ..Setup::default() });
        for style in STYLES {
            let client = &mut RawClient::transmitting(&served.socket(), style);
            for (offset, len) in [(0, 512), (4096, 4096), (12345, 77), (MIB, 300_000), (3 * MIB + 1, 5 << 20)] {
                let bytes = pattern(len);
                assert_eq!(client.send(WRITE, 0, offset, &bytes).error(), 0);
                assert!(read(client, offset, len) == bytes, "{style:?} {offset}+{len}");
            }
            for offset in [100, 0, 64 * MIB - 1] {
                assert_eq!(client.send(WRITE, 0, offset, &[]).error(), 0, "an empty write does nothing");
                assert_eq!(read(client, offset, 0), [], "nor does an empty read");
            }
            client.stream.write_all(&client.header(DISC, 0, 0, 0, 0)).unwrap();
            assert!(client.is_closed());
        }
    }
}

#[test]
fn refused_requests_leave_the_connection_alive() {
    let served = Served::plain();
    let end = 64 * MIB;
    for style in STYLES {
        let client = &mut RawClient::transmitting(&served.socket(), style);
        assert_eq!(client.request(READ, 0, end, 1).error(), EINVAL);
        assert_eq!(client.send(WRITE, 0, end - 1, &[1, 2]).error(), ENOSPC);
        assert_eq!(client.request(TRIM, 0, end - 1, 2).error(), EINVAL);
        assert_eq!(client.request(WRITE_ZEROES, 0, end - 1, 2).error(), ENOSPC);
        assert_eq!(client.request(CACHE, 0, u64::MAX, 2).error(), EINVAL);
        assert_eq!(client.request(99, 0, 0, 0).error(), EINVAL);
        assert_eq!(client.request(READ, FAST_ZERO, 0, 512).error(), EINVAL);
        assert_eq!(client.request(FLUSH, 0, 5, 0).error(), EINVAL);
        let expected = if style == Style::Simple { EINVAL } else { EOVERFLOW };
        assert_eq!(client.request(READ, 0, 0, 33 * MIB).error(), expected);
        if style != Style::Extended {
            assert_eq!(client.send(WRITE, 0, 0, &vec![1; 33 << 20]).error(), EINVAL, "dropped, then refused");
            assert_eq!(client.request(READ, PAYLOAD_LEN, 0, 512).error(), EINVAL);
        } else {
            assert_eq!(client.send(READ, 0, 0, &[1; 100]).error(), EINVAL, "dropped, then refused");
        }
        assert_eq!(read(client, 0, 512), [0; 512]);
    }
    let wrong = served.stats.read(RequestKind::Unknown);
    assert_eq!((wrong.requests, wrong.errors), (3, 3));
}

#[test]
fn payloads_beyond_reason_end_the_connection() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    client.stream.write_all(&client.header(WRITE, 0, 1, 0, 65 * MIB)).unwrap();
    assert!(client.is_closed());
    let client = &mut RawClient::transmitting(&served.socket(), Style::Extended);
    client.stream.write_all(&client.header(WRITE, PAYLOAD_LEN, 1, 0, 33 * MIB)).unwrap();
    assert!(client.is_closed());
}

#[test]
fn read_only_exports() {
    let served = Served::new(Setup { export: |export| export.read_only = true, ..Setup::default() });
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    assert_eq!(client.send(WRITE, 0, 0, &[1; 512]).error(), EPERM);
    assert_eq!(client.request(TRIM, 0, 0, 512).error(), EPERM);
    assert_eq!(client.request(WRITE_ZEROES, 0, 0, 512).error(), EPERM);
    assert_eq!(client.request(FLUSH, 0, 0, 0).error(), 0);
    assert_eq!(read(client, 0, 512), [0; 512]);
}

#[test]
fn zeroing_discarding_and_caching() {
    let served = Served::plain();
    for style in STYLES {
        let client = &mut RawClient::transmitting(&served.socket(), style);
        assert_eq!(client.send(WRITE, 0, 0, &[9; 16384]).error(), 0);
        assert_eq!(client.request(WRITE_ZEROES, FAST_ZERO, 100, 4096).error(), ENOTSUP);
        assert_eq!(read(client, 0, 4096), [9; 4096], "a refused fast zeroing changes nothing");
        assert_eq!(client.request(WRITE_ZEROES, FAST_ZERO, 4096, 4096).error(), 0);
        assert_eq!(client.request(WRITE_ZEROES, NO_HOLE, 100, 200).error(), 0);
        assert_eq!(client.request(TRIM, 0, 8192, 4096).error(), 0);
        assert_eq!(client.request(CACHE, 0, 0, 32 * MIB).error(), 0);
        let mut expected = vec![9; 16384];
        expected[100..300].fill(0);
        expected[4096..12288].fill(0);
        assert!(read(client, 0, 16384) == expected);
        assert_eq!(client.request(TRIM, 0, 0, 64 * MIB).error(), 0);
    }
}

#[test]
fn flush_and_fua_reach_the_disk() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Simple);
    let flushes = |served: &Served| served.with_disk(|disk| disk.flushes.get());
    client.send(WRITE, 0, 0, &[1; 512]);
    assert_eq!(flushes(&served), 0);
    client.request(FLUSH, 0, 0, 0);
    assert_eq!(flushes(&served), 1);
    client.send(WRITE, FUA, 0, &[1; 512]);
    client.request(WRITE_ZEROES, FUA, 0, 512);
    client.request(TRIM, FUA, 0, 4096);
    assert_eq!(flushes(&served), 4);
    assert_eq!(client.request(READ, FUA, 0, 512).error(), 0, "allowed everywhere, without effect");
    assert_eq!(flushes(&served), 4);
}

#[test]
fn failed_reads_are_errors_without_data() {
    let served = Served::new(Setup { prepare: |disk| disk.bad_page = Some(2), ..Setup::default() });
    for style in STYLES {
        let client = &mut RawClient::transmitting(&served.socket(), style);
        assert_eq!(client.send(WRITE, 0, 8192, &[1; 4096]).error(), 0);
        assert_eq!(client.request(READ, 0, 8192, 4096).error(), EIO);
        assert_eq!(client.request(READ, 0, 0, MIB).error(), EIO, "a long read with a bad place");
        assert_eq!(read(client, 0, 8192), [0; 8192]);
    }
    assert_eq!(served.stats.read(RequestKind::Read).errors, 6);
}

#[test]
fn long_reads_name_holes_unless_told_not_to() {
    let served = Served::plain();
    for style in [Style::Structured, Style::Extended] {
        let client = &mut RawClient::transmitting(&served.socket(), style);
        client.request(TRIM, 0, 0, 64 * MIB);
        let bytes = pattern(65536);
        client.send(WRITE, 0, MIB, &bytes);
        let reply = client.request(READ, 0, 0, 2 * MIB);
        assert_eq!(reply.parts[0], Part::Hole { offset: 0, len: MIB });
        assert_eq!(reply.parts[1], Part::Data { offset: MIB, bytes: bytes.clone() });
        assert_eq!(reply.parts[2], Part::Hole { offset: MIB + 65536, len: MIB - 65536 });
        let whole = client.request(READ, DF, 0, 2 * MIB);
        assert_eq!(whole.parts.len(), 1);
        assert!(whole.bytes(0, 2 << 20) == reply.bytes(0, 2 << 20));
        let small = client.request(READ, 0, 0, 4096);
        assert_eq!(small.parts, [Part::Data { offset: 0, bytes: vec![0; 4096] }], "small reads are not asked");
    }
}

#[test]
fn reads_of_many_small_holes_are_whole() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    let mut expected = vec![0; 4 << 20];
    for n in (0..1024).step_by(3) {
        client.send(WRITE, 0, n * 4096, &[n as u8 | 1; 4096]);
        expected[n as usize * 4096..][..4096].fill(n as u8 | 1);
    }
    assert!(client.request(READ, 0, 0, 4 * MIB).bytes(0, 4 << 20) == expected);
    assert!(client.request(READ, 0, 4097, 3 * MIB).bytes(4097, 3 << 20) == expected[4097..][..3 << 20]);
}

#[test]
fn block_status_in_32_bits() {
    let served = Served::plain();
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    client.send(WRITE, 0, MIB, &[1; 65536]);
    let reply = client.request(BLOCK_STATUS, 0, 0, 2 * MIB);
    let rest = MIB - 65536;
    assert_eq!(
        reply.parts,
        [
            Part::Status { context: 0, runs: vec![(MIB, 3), (65536, 0), (rest, 3)] },
            Part::Status { context: 1, runs: vec![(MIB, 0), (65536, 1), (rest, 0)] },
        ]
    );
    let one = client.request(BLOCK_STATUS, REQ_ONE, MIB + 4096, 2 * MIB);
    assert_eq!(one.parts[0], Part::Status { context: 0, runs: vec![(61440, 0)] });
    assert_eq!(client.request(BLOCK_STATUS, 0, 0, 0).error(), EINVAL);
    assert_eq!(client.request(BLOCK_STATUS, 0, 64 * MIB, 1).error(), EINVAL);
}

#[test]
fn block_status_in_64_bits() {
    let served = Served::new(Setup { size: 1 << 45, ..Setup::default() });
    let client = &mut RawClient::transmitting(&served.socket(), Style::Extended);
    client.send(WRITE, 0, 1 << 44, &[1; 4096]);
    let runs = vec![(1 << 44, 3), (4096, 0), ((1 << 44) - 4096, 3)];
    let reply = client.request(BLOCK_STATUS, 0, 0, 1 << 45);
    assert_eq!(reply.parts[0], Part::Status { context: 0, runs: runs.clone() });
    assert_eq!(reply.parts.len(), 2);
    // The payload form: effect length, then the contexts wanted.
    let mut payload = (1u64 << 45).to_be_bytes().to_vec();
    payload.extend_from_slice(&1u32.to_be_bytes());
    let reply = client.send(BLOCK_STATUS, 0, 0, &payload);
    assert!(matches!(&reply.parts[..], [Part::Status { context: 1, .. }]), "{reply:?}");
    payload.extend_from_slice(&9u32.to_be_bytes());
    assert_eq!(client.send(BLOCK_STATUS, 0, 0, &payload).error(), EINVAL);
    assert_eq!(client.request(WRITE_ZEROES, 0, 0, 1 << 45).error(), 0, "zeroes beyond 4 GiB");
    let reply = client.request(BLOCK_STATUS, REQ_ONE, 0, 1 << 45);
    assert_eq!(reply.parts[0], Part::Status { context: 0, runs: vec![(1 << 45, 3)] });
}

#[test]
fn block_status_is_bounded() {
    let served = Served::new(Setup { size: 256 * MIB, ..Setup::default() });
    let client = &mut RawClient::transmitting(&served.socket(), Style::Structured);
    served.with_disk(|disk| {
        // 65,536 pages, every other one allocated.
        for page in (0..65536).step_by(2) {
            disk.allocate_page(page);
        }
    });
    let reply = client.request(BLOCK_STATUS, 0, 0, 256 * MIB);
    let Part::Status { runs, .. } = &reply.parts[0] else { panic!("{reply:?}") };
    assert!((1..=8192).contains(&runs.len()));
    assert!(runs.iter().all(|(len, _)| *len == 4096));
}

#[test]
fn without_contexts_there_is_no_status() {
    let served = Served::plain();
    let client = &mut RawClient::greeted(&served.socket());
    client.style = Style::Structured;
    client.option(OPT_STRUCTURED, &[]);
    client.option(OPT_GO, &go_data("disk"));
    assert_eq!(client.request(BLOCK_STATUS, 0, 0, 512).error(), EINVAL);
}
