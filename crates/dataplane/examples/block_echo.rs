//! What a request costs without protocol and format: `block_echo FILE DEPTH REQUESTS [threads] [direct] [write]`
//! serves random 4 KiB reads (writes) of FILE over a unix socket pair, to a client on a plain thread that keeps DEPTH
//! requests under way, and prints time and the server's CPU time per request.

use dataplane::file::{self, File};
use dataplane::net::Socket;
use dataplane::{Backend, IoThreads, IoThreadsConfig, spawn_local};
use disk::Buf;
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Offset of the block in 8 bytes, and as many that a protocol would fill.
const REQUEST: usize = 28;
const HEADER: usize = 16;

struct Replies {
    queue: RefCell<Vec<Buf>>,
    sending: Cell<bool>,
}

fn reply(socket: &Rc<Socket>, replies: &Rc<Replies>, header: Buf, data: Buf) {
    replies.queue.borrow_mut().extend([header, data]);
    if replies.sending.replace(true) {
        return;
    }
    let (socket, replies) = (Rc::clone(socket), Rc::clone(replies));
    drop(spawn_local(async move {
        loop {
            let bufs = std::mem::take(&mut *replies.queue.borrow_mut());
            if bufs.is_empty() {
                break;
            }
            if socket.send_all(bufs).await.is_err() {
                break;
            }
        }
        replies.sending.set(false);
    }));
}

async fn serve(socket: Socket, file: File, write: bool) {
    let socket = Rc::new(socket);
    let replies = Rc::new(Replies { queue: RefCell::default(), sending: Cell::new(false) });
    let mut rest = Vec::new();
    let mut buf = Buf::new(1 << 14);
    loop {
        let (n, back) = socket.recv(buf).await;
        buf = back;
        match n {
            Ok(n) if n > 0 => rest.extend_from_slice(&buf[..n]),
            _ => return,
        }
        let whole = rest.len() / REQUEST * REQUEST;
        for request in rest[..whole].chunks_exact(REQUEST) {
            let offset = u64::from_be_bytes(request[..8].try_into().expect("eight bytes"));
            let (socket, replies, file) = (Rc::clone(&socket), Rc::clone(&replies), file.clone());
            drop(spawn_local(async move {
                let data = Buf::new(BLOCK);
                let (n, data) = if write {
                    file::write_at(&file, offset, data).await
                } else {
                    file::read_at(&file, offset, data).await
                };
                assert_eq!(n.expect("transfer"), BLOCK);
                reply(&socket, &replies, Buf::new(HEADER), data);
            }));
        }
        rest.drain(..whole);
    }
}

fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let has = |word: &str| args.iter().any(|arg| arg == word);
    let (depth, requests): (usize, usize) = (args[2].parse().expect("DEPTH"), args[3].parse().expect("REQUESTS"));
    let (direct, write) = (has("direct"), has("write"));
    let mut options = std::fs::File::options();
    options.read(true).write(write).custom_flags(if direct { libc::O_DIRECT } else { 0 });
    let file = options.open(&args[1]).expect("FILE");
    let blocks = file.metadata().expect("its size").len() / BLOCK as u64;
    let backend = if has("threads") { Backend::Threads } else { Backend::Uring };
    let io = IoThreads::start(IoThreadsConfig { threads: 1, backend }).expect("I/O threads");
    let (mut client, server) = UnixStream::pair().expect("a socket pair");
    let file = File::new(file, direct);
    let served = io.pick().spawn(move || async move {
        let before = cpu_time();
        serve(Socket::from_unix(server), file, write).await;
        cpu_time() - before
    });
    let mut state = 1u64;
    let mut request = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = [0; REQUEST];
        bytes[..8].copy_from_slice(&((state >> 20) % blocks * BLOCK as u64).to_be_bytes());
        bytes
    };
    let start = Instant::now();
    for _ in 0..depth {
        client.write_all(&request()).expect("send");
    }
    let mut answer = vec![0; (HEADER + BLOCK) * depth];
    let (mut sent, mut received, mut filled) = (depth, 0, 0);
    while received < requests {
        filled += client.read(&mut answer[filled..]).expect("receive");
        let whole = filled / (HEADER + BLOCK);
        filled -= whole * (HEADER + BLOCK);
        received += whole;
        let more = whole.min(requests - sent);
        let bytes: Vec<u8> = (0..more).flat_map(|_| request()).collect();
        sent += more;
        client.write_all(&bytes).expect("send");
    }
    let wall = start.elapsed();
    drop(client);
    let cpu = served.wait().expect("the server ends with its client");
    let per = |d: Duration| d.as_secs_f64() * 1e6 / requests as f64;
    println!(
        "depth {depth} {backend:?} direct={direct} write={write}: {:.1} µs per request, {:.0} IOPS, server CPU {:.2} µs per request",
        per(wall),
        requests as f64 / wall.as_secs_f64(),
        per(cpu)
    );
}
