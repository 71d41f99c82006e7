//! Where io_uring is forbidden, as a container's seccomp filter does it.
#![allow(unsafe_code)] // Installs the filter; argued at its block.

use dataplane::{Backend, block_on, file};
use disk::Buf;

/// Makes `io_uring_setup` fail with EPERM on this thread, for good.
fn forbid() {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0), // The system call's number.
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: libc::SYS_io_uring_setup as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls change this thread only; the program lives across the second, which copies it.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}

#[test]
fn threads_take_over() {
    let forbidden = std::thread::spawn(|| {
        forbid();
        assert_eq!(Backend::Auto.resolve().expect("a way is found"), Backend::Threads);
        let error = Backend::Uring.resolve().expect_err("forbidden");
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("threads backend"), "{error}");
        let read = block_on(Backend::Auto, async {
            let exe = file::File::new(std::fs::File::open("/proc/self/exe").expect("open"), false);
            file::read_full(&exe, 0, Buf::new(4), 1).await
        });
        let (n, buf) = read.expect("it runs");
        assert_eq!((n.expect("read"), &buf[..]), (4, &b"\x7fELF"[..]));
    });
    forbidden.join().expect("the thread's assertions hold");
    assert_eq!(Backend::Auto.resolve().expect("io_uring is allowed here"), Backend::Uring);
}
