//! The same tests on both backends.

use dataplane::file::{self, File};
use dataplane::net::{Listener, Socket};
use dataplane::{Backend, IoThreads, IoThreadsConfig, Stopped, block_on, current, offload, sleep, spawn_local};
use disk::Buf;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

fn threads(backend: Backend, threads: usize) -> IoThreads {
    IoThreads::start(IoThreadsConfig { threads, backend }).expect("I/O threads start")
}

fn scratch(len: u64) -> File {
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(len).expect("its size");
    File::new(file, false)
}

fn pair() -> (Socket, Socket) {
    let (a, b) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    (Socket::from_unix(a), Socket::from_unix(b))
}

fn pattern(seed: u64, len: usize) -> Buf {
    Buf::copy_of(&(0..len).map(|i| (seed as usize * 31 + i * 7 + i / 251) as u8).collect::<Vec<_>>())
}

/// Polls once, so that the operation starts, and drops the future.
async fn start_and_drop(future: impl Future) -> bool {
    let mut future = pin!(future);
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

async fn files() {
    let file = scratch(0);
    let (n, _) = file::write_at(&file, 4096, pattern(1, 10_000)).await;
    assert_eq!(n.expect("write"), 10_000);
    file::fdatasync(&file).await.expect("sync");
    let (n, buf) = file::read_full(&file, 4096, Buf::new(20_000), 1).await;
    assert_eq!(n.expect("read"), 10_000, "ends with the file");
    assert_eq!(buf[..10_000], pattern(1, 10_000)[..]);
    assert_eq!(buf.len(), 20_000);
    let (n, _) = file::read_at(&file, 1 << 30, Buf::new(10)).await;
    assert_eq!(n.expect("read beyond the end"), 0);
    file::fallocate(&file, 0, 0, 1 << 20).await.expect("fallocate");
    assert_eq!(file.std().metadata().expect("metadata").len(), 1 << 20);
    let read_only = File::new(std::fs::File::open("/proc/self/exe").expect("open"), false);
    let (result, buf) = file::write_at(&read_only, 0, pattern(2, 5)).await;
    assert_eq!(result.expect_err("not writable").raw_os_error(), Some(libc::EBADF));
    assert_eq!(buf[..], pattern(2, 5)[..], "the buffer comes back with an error, too");
    let (result, _) = file::read_at(&file, u64::MAX - 3, Buf::new(3)).await;
    assert!(result.is_err());
}

async fn more_operations_than_the_ring_holds() {
    let file = scratch(0);
    let done = Rc::new(Cell::new(0));
    let tasks: Vec<_> = (0..6000u64)
        .map(|i| {
            let (file, done) = (file.clone(), Rc::clone(&done));
            spawn_local(async move {
                let (n, _) = file::write_at(&file, i * 512, pattern(i, 512)).await;
                assert_eq!(n.expect("write"), 512);
                done.set(done.get() + 1);
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    assert_eq!(done.get(), 6000);
    for i in (0..6000).step_by(97) {
        let (n, buf) = file::read_full(&file, i * 512, Buf::new(512), 1).await;
        assert_eq!((n.expect("read"), &buf[..]), (512, &pattern(i, 512)[..]));
    }
}

async fn many_receives_at_once() {
    let pairs: Vec<_> = (0..400).map(|_| pair()).collect();
    let (mut near, mut receives) = (Vec::new(), Vec::new());
    for (a, b) in pairs {
        near.push(a);
        receives.push(spawn_local(async move { b.recv_exact(Buf::new(5)).await }));
    }
    dataplane::yield_now().await;
    for (n, a) in near.iter().enumerate() {
        a.send_all(vec![pattern(n as u64, 5)]).await.expect("send");
    }
    for (n, receive) in receives.into_iter().enumerate() {
        let (result, buf) = receive.await;
        result.expect("receive");
        assert_eq!(buf[..], pattern(n as u64, 5)[..]);
    }
}

async fn echo(client: Socket, server: Socket) {
    let server = spawn_local(async move {
        loop {
            let (n, buf) = server.recv(Buf::new(1 << 16)).await;
            match n.expect("receive") {
                0 => return,
                n => server.send_all(vec![Buf::copy_of(&buf[..n])]).await.expect("send"),
            }
        }
    });
    let client = Rc::new(client);
    let len = 5 << 20; // Far more than the sockets hold: short sends and receives.
    let sender = Rc::clone(&client);
    let send = spawn_local(async move {
        let mut whole = pattern(9, len);
        let mut bufs = vec![Buf::new(0)];
        while !whole.is_empty() {
            bufs.push(whole.split_to(whole.len().min(3333)));
        }
        sender.send_all(bufs).await.expect("send");
    });
    let (result, buf) = client.recv_exact(Buf::new(len)).await;
    result.expect("receive");
    assert!(buf[..] == pattern(9, len)[..], "bytes come back as they were sent");
    send.await;
    client.shutdown_send();
    server.await;
    let (n, _) = client.recv(Buf::new(10)).await;
    assert_eq!(n.expect("the peer closed"), 0);
    let (result, _) = client.recv_exact(Buf::new(10)).await;
    assert_eq!(result.expect_err("no bytes").kind(), io::ErrorKind::UnexpectedEof);
}

async fn unix_sockets() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale socket"));
    let listener = Listener::bind_unix(&path).expect("a stale socket is replaced");
    assert_eq!(Listener::bind_unix(&path).expect_err("somebody listens").kind(), io::ErrorKind::AddrInUse);
    drop(listener.accept().await.expect("the second one's question whether somebody listens"));
    let stream = std::os::unix::net::UnixStream::connect(&path).expect("connect");
    let accepted = listener.accept().await.expect("accept");
    assert!(accepted.peer().contains(&std::process::id().to_string()), "{}", accepted.peer());
    echo(Socket::from_unix(stream), accepted).await;
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "precious").expect("a file");
    assert_eq!(Listener::bind_unix(&path).expect_err("no socket").kind(), io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
}

async fn tcp_sockets() {
    let listener = Rc::new(Listener::bind_tcp("127.0.0.1:0").expect("bind"));
    let address = listener.local_addr().expect("address");
    let acceptor = Rc::clone(&listener);
    let accepted = spawn_local(async move { acceptor.accept().await.expect("accept") }); // Waits for the client.
    let stream = offload(move || std::net::TcpStream::connect(address).expect("connect")).await;
    echo(Socket::from_tcp(stream), accepted.await).await;
}

async fn timers() {
    let order = Rc::new(RefCell::new(Vec::new()));
    let tasks: Vec<_> = [30, 10, 20, 10]
        .into_iter()
        .map(|ms| {
            let order = Rc::clone(&order);
            spawn_local(async move {
                sleep(Duration::from_millis(ms)).await;
                order.borrow_mut().push(ms);
            })
        })
        .collect();
    assert_eq!(dataplane::timeout(Duration::from_millis(1), sleep(Duration::MAX)).await, None);
    assert_eq!(dataplane::timeout(Duration::from_secs(3600), async { 5 }).await, Some(5));
    for task in tasks {
        task.await;
    }
    assert_eq!(*order.borrow(), [10, 10, 20, 30]);
}

async fn dropped_futures() {
    // The buffers are the kernel's until it is done: a peer that sends later must not write into memory that
    // has another owner by then.
    for round in 0..50u8 {
        let (a, b) = pair();
        assert!(start_and_drop(b.recv(Buf::zeroed(4096))).await, "nothing to receive yet");
        let mut bufs: Vec<_> = (0..4).map(|_| Buf::copy_of(&[round; 4096])).collect();
        a.send_all(vec![Buf::copy_of(&[0xee; 4096])]).await.expect("send");
        sleep(Duration::from_micros(100)).await;
        assert!(bufs.iter_mut().all(|buf| buf.iter().all(|byte| *byte == round)));
    }
    let file = scratch(1 << 20);
    for i in 0..200 {
        start_and_drop(file::write_at(&file, i * 4096, Buf::copy_of(&[7; 4096]))).await;
        start_and_drop(file::read_at(&file, i * 4096, Buf::new(4096))).await;
    }
    // What was started runs to its end, though nobody waits.
    let mut reads = 0;
    loop {
        let (n, buf) = file::read_full(&file, 0, Buf::new(200 * 4096), 1).await;
        assert_eq!(n.expect("read"), 200 * 4096);
        if buf.iter().all(|byte| *byte == 7) {
            break;
        }
        reads += 1;
        assert!(reads < 10_000, "writes whose futures were dropped never arrived");
        sleep(Duration::from_millis(1)).await;
    }
    // The descriptor of an accept that was dropped is closed with its listener.
    let listener = Listener::bind_tcp("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    assert!(start_and_drop(listener.accept()).await);
    drop(listener);
    let mut tries = 0;
    while Listener::bind_tcp(address).is_err() {
        tries += 1;
        assert!(tries < 10_000, "the listening descriptor is kept open");
        sleep(Duration::from_millis(1)).await;
    }
}

async fn shutdown_ends_a_receive() {
    let (_a, b) = pair();
    let b = Rc::new(b);
    let receiver = Rc::clone(&b);
    let receive = spawn_local(async move { receiver.recv(Buf::new(100)).await });
    dataplane::yield_now().await;
    b.shutdown();
    let (n, buf) = receive.await;
    assert_eq!((n.expect("an orderly end"), buf.len()), (0, 100));
    assert_eq!(b.send_all(vec![pattern(1, 10)]).await.expect_err("closed").kind(), io::ErrorKind::BrokenPipe);
}

async fn panics_stay_in_their_task() {
    let quiet = spawn_local(async { panic!("on purpose") });
    drop(quiet);
    dataplane::yield_now().await;
    let joined = spawn_local(async {
        let inner = spawn_local(async {
            dataplane::yield_now().await;
            panic!("on purpose, too");
        });
        let () = inner.await;
    });
    drop(joined);
    let ten: Vec<_> = (0..10).map(|i| spawn_local(async move { i })).collect();
    for (i, task) in ten.into_iter().enumerate() {
        assert_eq!(task.await, i);
    }
}

fn across_threads(backend: Backend) {
    let threads = threads(backend, 2);
    assert_eq!(threads.backend(), backend);
    assert!(current().is_none());
    let [a, b] = threads.all() else { panic!("two threads") };
    let (first, other) = (a.clone(), b.clone());
    let sum = a.spawn(move || async move {
        assert_eq!(current(), Some(first));
        let local = Rc::new(Cell::new(0)); // Not Send, kept across an await.
        for i in 0..100 {
            let n = other
                .spawn(move || async move {
                    dataplane::yield_now().await;
                    i
                })
                .await
                .expect("the other thread");
            local.set(local.get() + n);
        }
        local.get()
    });
    assert_eq!(sum.wait(), Ok(4950));
    // A socket moves to another thread between operations.
    let (near, far) = pair();
    let near = a.spawn(move || async move { near.send_all(vec![pattern(3, 10)]).await.map(|()| near) });
    let near = near.wait().expect("task").expect("send");
    let moved = b.spawn(move || async move {
        let (result, buf) = far.recv_exact(Buf::new(10)).await;
        result.expect("receive");
        far.send_all(vec![buf]).await.expect("send");
    });
    moved.wait().expect("task");
    let back = b.spawn(move || async move { near.recv_exact(Buf::new(10)).await });
    let (result, buf) = back.wait().expect("task");
    result.expect("receive");
    assert_eq!(buf[..], pattern(3, 10)[..]);
    // Panics: of the future and of what makes it.
    assert_eq!(a.spawn(|| async { panic!("on purpose") }).wait(), Err::<(), _>(Stopped));
    fn fails() -> std::future::Ready<()> {
        panic!("on purpose")
    }
    assert_eq!(a.spawn(fails).wait(), Err(Stopped));
    assert_eq!(a.spawn(|| async { 1 }).wait(), Ok(1), "the thread goes on");
    // Tasks are spread.
    let held: Vec<_> =
        (0..4).map(|_| threads.pick()).map(|t| (t.clone(), t.spawn(std::future::pending::<()>))).collect();
    assert_eq!(held.iter().filter(|(t, _)| t == a).count(), 2);
}

fn stops_with_tasks_pending(backend: Backend) {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let io = threads(backend, 2);
    let handle = io.pick();
    let mut near = Vec::new();
    let mut remotes = Vec::new();
    for i in 0..20 {
        let counted = Counted(Arc::clone(&dropped));
        let (a, far) = pair();
        near.push(a);
        remotes.push(io.pick().spawn(move || async move {
            let _counted = counted;
            match i % 3 {
                0 => drop(far.recv(Buf::new(4096)).await),
                1 => sleep(Duration::from_secs(3600)).await,
                _ => std::future::pending().await,
            }
        }));
    }
    for thread in io.all() {
        thread.spawn(|| async {}).wait().expect("it runs"); // The others have started by now.
    }
    io.shutdown();
    assert_eq!(dropped.load(Ordering::SeqCst), 20, "tasks are dropped on their thread before it ends");
    assert!(remotes.into_iter().all(|remote| remote.wait() == Err(Stopped)));
    assert_eq!(handle.spawn(|| async { 1 }).wait(), Err(Stopped), "a stopped thread takes nothing");
}

fn block_on_is_not_nested(backend: Backend) {
    let inner = block_on(backend, async { block_on(Backend::Threads, async {}).is_err() });
    assert!(inner.expect("the outer one runs"));
    // What it spawned and nobody awaited is dropped, with operations under way.
    let (_a, b) = pair();
    let file = scratch(4096);
    let left = block_on(backend, async move {
        drop(spawn_local(async move { b.recv(Buf::new(10)).await }));
        dataplane::yield_now().await;
        start_and_drop(file::fdatasync(&file)).await
    });
    assert!(left.expect("it runs"));
}

macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod uring { $(#[test] fn $name() {
            super::block_on(super::Backend::Uring, super::$name()).expect("io_uring");
        })* }
        mod threads { $(#[test] fn $name() {
            super::block_on(super::Backend::Threads, super::$name()).expect("threads");
        })* }
    };
}

on_both!(
    files,
    more_operations_than_the_ring_holds,
    many_receives_at_once,
    unix_sockets,
    tcp_sockets,
    timers,
    dropped_futures,
    shutdown_ends_a_receive,
    panics_stay_in_their_task,
);

macro_rules! called_on_both {
    ($($name:ident),* $(,)?) => {
        mod uring_threads { $(#[test] fn $name() { super::$name(super::Backend::Uring); })* }
        mod poll_threads { $(#[test] fn $name() { super::$name(super::Backend::Threads); })* }
    };
}

called_on_both!(across_threads, stops_with_tasks_pending, block_on_is_not_nested);

/// However many operations one turn queues, the thread does not sleep on what they have made ready.
#[test]
fn a_full_queue_is_no_reason_to_sleep() {
    let threads = threads(Backend::Auto, 1);
    for count in 250..260 {
        // Not asked of the page cache first, so that each goes through the ring; there it is done at once.
        let file = File::new(scratch(1 << 20).std().try_clone().expect("a clone"), true);
        std::thread::sleep(Duration::from_millis(2)); // The thread is asleep, and wakes by its eventfd.
        let done = threads.pick().spawn(move || async move {
            let reads: Vec<_> = (0..count)
                .map(|n| {
                    let file = file.clone();
                    spawn_local(async move { file::read_at(&file, n * 4096 % (1 << 20), Buf::new(4096)).await.0 })
                })
                .collect();
            let (own, _) = file::read_at(&file, 0, Buf::new(4096)).await;
            own.expect("read");
            for read in reads {
                assert_eq!(read.await.expect("read"), 4096);
            }
        });
        let (send, receive) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || send.send(done.wait()));
        receive.recv_timeout(Duration::from_secs(20)).expect("not asleep").expect("the thread runs");
        waiter.join().expect("no panic").expect("sent");
    }
}

#[test]
fn a_task_that_need_not_wait_ends_before_its_start_returns() {
    block_on(Backend::Auto, async {
        let ended = Rc::new(Cell::new(false));
        let flag = Rc::clone(&ended);
        assert!(dataplane::start_local(async move { flag.set(true) }));
        assert!(ended.get());
        let flag = Rc::clone(&ended);
        assert!(!dataplane::start_local(async move {
            dataplane::yield_now().await;
            flag.set(false);
        }));
        assert!(ended.get(), "it waits for its turn");
        sleep(Duration::from_millis(1)).await;
        assert!(!ended.get());
        assert!(dataplane::start_local(async { panic!("on purpose") }), "a panic ends the task alone");
    })
    .expect("runs");
}

/// A task that copies what is cached and wakes itself does not keep the others from what has completed for them.
#[test]
fn a_copying_task_lets_others_have_their_completions() {
    const PIECE: usize = 256 << 10;
    block_on(Backend::Auto, async {
        let file = scratch(PIECE as u64);
        let (copied, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        let (count, end) = (Rc::clone(&copied), Rc::clone(&ended));
        let copying = spawn_local(async move {
            while !end.get() {
                let (read, _) = file::read_at(&file, 0, Buf::new(PIECE)).await;
                count.set(count.get() + read.expect("read"));
                dataplane::yield_now().await;
            }
        });
        for _ in 0..20 {
            let before = copied.get();
            // Due soon: what completes is seen in the next turn.
            sleep(Duration::from_micros(50)).await;
            assert!(copied.get() - before <= 16 * PIECE, "{} bytes were copied meanwhile", copied.get() - before);
        }
        assert!(copied.get() > 0);
        ended.set(true);
        copying.await;
    })
    .expect("runs");
}
