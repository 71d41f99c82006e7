//! Real clients: libnbd's tools and Python module, QEMU's tools, fio. All are required.

use crate::served::{MIB, Served, Setup};
use export_nbd::RequestKind;
use std::process::{Command, Output};

/// Debian's names.
const PACKAGES: &str = "install libnbd-bin, python3-libnbd, qemu-utils and fio";

/// Runs a client; it must succeed. Returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = try_run(program, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Runs a client for at most two minutes.
pub(crate) fn try_run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["120", program]).args(arguments);
    let output = command.output().expect("timeout(1) is everywhere");
    assert_ne!(output.status.code(), Some(127), "{program} is missing: {PACKAGES}");
    output
}

/// Runs a program for libnbd's Python module, which knows the server as `uri`.
fn python(served: &Served, program: &str) -> String {
    let has_module =
        |python: &&str| Command::new(python).args(["-c", "import nbd"]).output().is_ok_and(|o| o.status.success());
    let python = ["python3", "/usr/bin/python3"].into_iter().find(has_module).expect(PACKAGES);
    let program = format!("import nbd\nuri = {:?}\nh = nbd.NBD()\n{program}", served.uri());
    run(python, &["-c", &program])
}

/// A file of `mib` MiB with islands of noise.
fn islands(path: &str, mib: u64) {
    let mut bytes = vec![0u8; (mib * MIB) as usize];
    let mut state = 88172645463325252u64;
    for start in (0..bytes.len()).step_by(3_333_333) {
        let end = (start + 700_001).min(bytes.len());
        for byte in &mut bytes[start..end] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn nbdinfo() {
    let served = Served::new(Setup { export: |export| export.description = "a test".into(), ..Setup::default() });
    let json = run("nbdinfo", &["--json", &served.uri()]);
    for expected in [
        "\"export-size\": 67108864",
        "\"description\": \"a test\"",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"can_cache\": true",
        "\"is_read_only\": false",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(json.contains(expected), "{expected} in {json}");
    }
    assert_eq!(run("nbdinfo", &["--size", &served.uri()]).trim(), "67108864");
    let list = run("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", served.socket().display())]);
    assert!(list.contains("export=\"disk\"") && list.contains("a test"), "{list}");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 1M 64k", &served.uri()]);
    let map = run("nbdinfo", &["--map", &served.uri()]);
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..3], ["0", "1048576", "3"], "{map}");
    assert_eq!(lines[1][..3], ["1048576", "65536", "0"], "{map}");
}

#[test]
fn nbdcopy_both_ways() {
    let served = Served::plain();
    let (from, to) = (served.file("from"), served.file("to"));
    islands(&from, 64);
    run("nbdcopy", &[&from, &served.uri()]);
    run("nbdcopy", &[&served.uri(), &to]);
    assert!(std::fs::read(from).unwrap() == std::fs::read(to).unwrap());
    assert!(served.stats.connections_total() > 2, "nbdcopy uses several connections");
}

#[test]
fn qemu_img_convert_compare_and_map() {
    let served = Served::plain();
    let (from, qcow2) = (served.file("from"), served.file("copy.qcow2"));
    islands(&from, 64);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &from, &served.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &served.uri()]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &served.uri(), &qcow2]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &qcow2, &served.uri()]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 5000 10", &served.uri()]);
    assert_eq!(
        try_run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &served.uri()]).status.code(),
        Some(1)
    );
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &served.uri()]);
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
}

#[test]
fn qemu_io_does_everything() {
    let served = Served::plain();
    let script = [
        "write -P 5 0 1M",
        "read -P 5 0 1M",
        "write -P 7 100 5000",
        "read -P 7 100 5000",
        "write -f -P 8 2M 4k",
        "write -z 4096 8192",
        "read -P 0 4096 8192",
        "write -z -u 65536 65536",
        "read -P 0 65536 65536",
        "write -z -n 512k 64k",
        "discard 256k 64k",
        "flush",
        "aio_write -P 9 4M 1M",
        "aio_write -P 10 6M 300",
        "aio_flush",
        "read -P 9 4M 1M",
        "read -P 10 6M 300",
        "read -P 5 1044480 4096",
    ];
    let mut arguments = vec!["-f", "raw"];
    script.iter().for_each(|line| arguments.extend(["-c", line]));
    let uri = served.uri();
    arguments.push(&uri);
    let output = run("qemu-io", &arguments);
    assert!(!output.contains("verification failed") && !output.contains("error"), "{output}");
    for kind in [RequestKind::Read, RequestKind::Write, RequestKind::WriteZeroes, RequestKind::Trim, RequestKind::Flush]
    {
        let counted = served.stats.read(kind);
        assert!(counted.requests > 0 && counted.errors == 0, "{kind:?}: {counted:?}");
    }
}

#[test]
fn qemu_refuses_to_write_to_read_only_exports() {
    let served = Served::new(Setup { export: |export| export.read_only = true, ..Setup::default() });
    let denied = try_run("qemu-io", &["-f", "raw", "-c", "write 0 512", &served.uri()]);
    assert!(!denied.status.success());
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 512", &served.uri()]);
}

#[test]
fn fio_with_verify() {
    let served = Served::plain();
    let uri = format!("--uri={}", served.uri());
    let common = ["--name=verify", "--ioengine=nbd", &uri, "--size=32m", "--verify=crc32c", "--verify_fatal=1"];
    for shape in [["--rw=randrw", "--bs=4k", "--iodepth=32"], ["--rw=randwrite", "--bsrange=512-200k", "--iodepth=16"]]
    {
        let output = run("fio", &[&common[..], &shape].concat());
        assert!(output.contains("err= 0"), "{output}");
    }
    assert_eq!(served.stats.read(RequestKind::Write).errors, 0);
}

#[test]
fn libnbd_sees_chunks_and_status() {
    let served = Served::plain();
    let output = python(
        &served,
        r#"
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(uri)
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation") and h.can_meta_context("qemu:allocation-depth")
h.pwrite(b"x" * 65536, 1 << 20)
h.pwrite(b"y" * 512, 4 << 20, nbd.CMD_FLAG_FUA)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
data = h.pread_structured(2 << 20, 0, chunk)
assert data == bytes(1 << 20) + b"x" * 65536 + bytes((1 << 20) - 65536)
assert [c[2] for c in sorted(chunks)] == [nbd.READ_HOLE, nbd.READ_DATA, nbd.READ_HOLE], chunks
chunks.clear()
h.pread_structured(2 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert [c[2] for c in chunks] == [nbd.READ_DATA], chunks
status = {}
h.block_status(2 << 20, 0, lambda context, offset, entries, error: status.__setitem__(context, entries))
assert status["base:allocation"][:4] == [1 << 20, 3, 65536, 0], status
assert status["qemu:allocation-depth"][:4] == [1 << 20, 0, 65536, 1], status
h.zero(4096, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, (1 << 20) + 8192)
h.cache(1 << 20, 0)
h.flush()
# Requests that the library would refuse to send.
h.set_strict_mode(0)
for call, expected in [
    (lambda: h.pread(512, 64 << 20), "Invalid argument"),
    (lambda: h.pwrite(b"z" * 512, (64 << 20) - 256), "No space left"),
    (lambda: h.zero(100, 5, nbd.CMD_FLAG_FAST_ZERO), "not supported"),
    (lambda: h.flush(nbd.CMD_FLAG_DF), "Invalid argument"),
]:
    try:
        call()
        raise SystemExit("no error")
    except nbd.Error as error:
        assert expected in str(error), error
assert h.pread(512, 4 << 20) == b"y" * 512
# Many requests under way at once.
cookies = []
for n in range(200):
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n + 1]) * 8192), n * 8192))
while cookies:
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
    if cookies:
        h.poll(-1)
for n in range(200):
    assert h.pread(8192, n * 8192) == bytes([n + 1]) * 8192
h.shutdown()
print("done")
"#,
    );
    assert_eq!(output.trim(), "done");
}

#[test]
fn flushes_cover_all_connections() {
    let served = Served::plain();
    python(
        &served,
        r#"
h.connect_uri(uri)
assert h.can_multi_conn()
g = nbd.NBD()
g.connect_uri(uri)
h.pwrite(b"a" * 4096, 0)
g.flush()
assert g.pread(4096, 0) == b"a" * 4096
"#,
    );
    assert_eq!(served.with_disk(|disk| disk.flushes.get()), 1);
}
