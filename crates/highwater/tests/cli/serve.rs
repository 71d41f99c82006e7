//! `highwater serve`, with real NBD clients.

use crate::support::Place;

const SIZE: u64 = 24 << 20;

#[test]
fn serves_raw_and_qcow2() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    place.hw("convert -O qcow2 a.raw b.qcow2").ok();
    place.hw("convert -c -O qcow2 a.raw c.qcow2").ok();
    for (file, more) in
        [("a.raw", ""), ("b.qcow2", "--io-backend threads --threads 1"), ("c.qcow2", "--cache unsafe --name other")]
    {
        let socket = place.path("s.sock");
        let server = place.start(&format!("serve {file} --socket {} {more}", socket.display()));
        let facts = place.run("nbdinfo", ["--json", server.uri()]).ok().json();
        assert_eq!(facts["exports"][0]["export-size"], SIZE);
        place.run("nbdcopy", [server.uri(), "copy.raw"]).ok();
        place.tool("qemu-img compare -f raw -U copy.raw a.raw").ok();
        place.qemu_io("raw", server.uri(), &["write -P 9 5M 100k", "read -P 9 5M 100k", "flush"]);
        place.qemu_io("raw", server.uri(), &["write -z 5M 100k", "read -P 0 5M 100k", "discard 5M 64k"]);
        assert!(server.end().success(), "{file}");
        assert!(!socket.exists(), "the socket of {file} was left");
        if file != "a.raw" {
            place.tool(&format!("qemu-img check {file}")).ok();
        }
        // As a.raw was changed like the others.
        place.tool(&format!("qemu-img compare {file} a.raw")).ok();
    }
}

#[test]
fn qemu_and_highwater_see_each_others_locks() {
    let place = Place::new();
    place.hw("create -f qcow2 a.qcow2 8M").ok();
    let server = place.start("serve a.qcow2");
    let refused = place.tool("qemu-io -f qcow2 -c quit a.qcow2");
    assert!(refused.err.contains("lock"), "{refused:?}");
    place.tool("qemu-img info -U a.qcow2").ok();
    for line in ["info a.qcow2", "resize a.qcow2 16M", "check a.qcow2", "create -f qcow2 a.qcow2 1M", "serve a.qcow2"] {
        let refused = place.hw(line).code(1);
        assert!(refused.err.contains("in use by process"), "{line}: {refused:?}");
        assert!(refused.err.contains(&server.pid().to_string()), "{line}: {refused:?}");
    }
    place.hw("info -U a.qcow2").ok();
    assert!(server.end().success());
    assert_eq!(place.hw("info --json a.qcow2").ok().json()["virtual-size"], 8 << 20);

    // And the other way round.
    let nbd = place.path("q.sock");
    let mut qemu = std::process::Command::new("qemu-nbd")
        .args(["-t", "-f", "qcow2", "-k"])
        .arg(&nbd)
        .arg("a.qcow2")
        .current_dir(place.dir())
        .spawn()
        .expect("qemu-nbd starts");
    for _ in 0..600 {
        if nbd.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let refused = place.hw("serve a.qcow2");
    let read_only = place.hw("info a.qcow2");
    qemu.kill().expect("kill");
    qemu.wait().expect("wait");
    assert!(refused.code(1).err.contains("qemu-nbd"));
    assert!(read_only.code(1).err.contains("qemu-nbd"));
}

#[test]
fn read_only_and_snapshots() {
    let place = Place::new();
    place.tool("qemu-img create -q -f qcow2 a.qcow2 4M").ok();
    place.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M"]);
    place.tool("qemu-img snapshot -c before a.qcow2").ok();
    place.qemu_io("qcow2", "a.qcow2", &["write -P 2 0 2M"]);
    let snapshot = place.start("serve a.qcow2 --snapshot before");
    // Readers share.
    let present = place.start("serve a.qcow2 --read-only");
    assert_eq!(present.ready["read-only"], true);
    for (uri, first, second) in [(snapshot.uri(), 1, 0), (present.uri(), 2, 2)] {
        let read = place.run(
            "qemu-io",
            ["-r", "-f", "raw", "-c", &format!("read -P {first} 0 1M"), "-c", &format!("read -P {second} 1M 1M"), uri],
        );
        assert!(!read.ok().out.contains("failed"), "{uri}");
        let written = place.run("qemu-io", ["-f", "raw", "-c", "write 0 4k", uri]);
        assert_ne!(written.code, Some(0), "{written:?}");
    }
    assert!(snapshot.end().success() && present.end().success());
}

#[test]
fn one_unix_socket_one_tcp_port() {
    let place = Place::new();
    place.hw("create -f raw a.raw 1M").ok();
    let port = {
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        probe.local_addr().unwrap().port()
    };
    let socket = place.path("s.sock");
    let server = place.start(&format!("serve a.raw --listen 127.0.0.1:{port} --socket {}", socket.display()));
    let uris = server.ready["uris"].as_array().unwrap();
    assert_eq!(uris.len(), 2, "{}", server.ready);
    for uri in uris {
        place.run("nbdinfo", ["--size", uri.as_str().unwrap()]).ok();
    }
    // Somebody else's port.
    let refused = place.hw(&format!("serve a.raw -r --listen 127.0.0.1:{port}")).code(1);
    assert!(refused.err.contains("in use"), "{refused:?}");
    assert!(server.end().success());
}

#[test]
fn tls_required() {
    let place = Place::new();
    place.raw("a.raw", SIZE);
    std::fs::create_dir(place.path("tls")).unwrap();
    for line in [
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca -keyout tls/ca-key.pem -out tls/ca-cert.pem",
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout tls/server-key.pem -out tls/server.csr",
        "openssl x509 -req -in tls/server.csr -CA tls/ca-cert.pem -CAkey tls/ca-key.pem -days 2 -copy_extensions copy -out tls/server-cert.pem",
    ] {
        place.tool(line).ok();
    }
    let socket = place.path("s.sock");
    let server = place.start(&format!("serve a.raw --tls tls --socket {}", socket.display()));
    assert!(server.uri().starts_with("nbds+unix:///a?socket="), "{}", server.ready);
    let plain = place.run("nbdinfo", [format!("nbd+unix:///a?socket={}", socket.display())]);
    assert_ne!(plain.code, Some(0), "a plain connection was served");
    let uri = format!("{}&tls-certificates={}&tls-hostname=localhost", server.uri(), place.path("tls").display());
    let read = place.run("nbdcopy", [uri.as_str(), "copy.raw"]);
    read.ok();
    place.tool("qemu-img compare -f raw copy.raw a.raw").ok();
    assert!(server.end().success());
    let refused = place.hw("serve a.raw --tls missing").code(1);
    assert!(refused.err.contains("server-cert.pem"), "{refused:?}");
}

#[test]
fn a_signal_lets_requests_finish() {
    let place = Place::new();
    place.hw("create -f qcow2 a.qcow2 64M").ok();
    let server = place.start("serve a.qcow2");
    // A client that writes all the time; whatever was answered and flushed is there afterwards.
    let script = "
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
n = 0
try:
    while True:
        h.pwrite(bytes([n % 255 + 1]) * 65536, n % 1024 * 65536)
        h.flush()
        n += 1
        print(n, flush=True)
except nbd.Error:
    pass
";
    let mut client = std::process::Command::new("/usr/bin/python3")
        .args(["-c", script, server.uri()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python3 with libnbd");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(client.stdout.take().unwrap()));
    for _ in 0..20 {
        lines.next().expect("the client writes").unwrap();
    }
    assert!(server.end().success());
    let done: u64 = lines.last().map_or(20, |line| line.unwrap().parse().unwrap());
    client.wait().unwrap();
    assert!((20..1024).contains(&done), "{done} writes");
    place.tool("qemu-img check a.qcow2").ok();
    let commands: Vec<String> = (0..done).map(|n| format!("read -P {} {} 64k", n % 255 + 1, n * 65536)).collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    place.qemu_io("qcow2", "a.qcow2", &commands);
}

#[test]
fn who_may_connect_is_said() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    place.hw("create a.raw 1M").ok();
    let socket = place.path("s.sock");
    for (options, mode) in [("", 0o660), ("--socket-mode 0600", 0o600), ("--socket-mode 666 --socket-group 0", 0o666)] {
        let server = place.start(&format!("serve a.raw --socket {} {options}", socket.display()));
        let found = std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
        assert_eq!(found, mode, "{options}: {found:o}");
        assert!(server.end().success());
    }
    for (options, words) in [("--socket-mode rw", "octal"), ("--socket-group no-such-group", "no-such-group")] {
        let refused = place.hw(&format!("serve a.raw --socket {} {options}", socket.display())).code(1);
        assert!(refused.err.contains(words), "{options}: {refused:?}");
        assert!(!socket.exists(), "{options} left a socket");
    }
}

#[test]
fn a_hang_up_is_an_orderly_end() {
    let place = Place::new();
    place.hw("create a.qcow2 8M").ok();
    let socket = place.path("s.sock");
    let server = place.start(&format!("serve a.qcow2 --socket {}", socket.display()));
    place.qemu_io("raw", server.uri(), &["write -P 1 0 1M"]);
    assert!(server.end_by("HUP").success());
    assert!(!socket.exists(), "the socket was left");
    place.tool("qemu-img check a.qcow2").ok();
}

#[test]
fn the_disk_of_serve_stays() {
    let place = Place::new();
    place.hw("create a.raw 1M").ok();
    let server = place.start("--api api.sock serve a.raw");
    let refused = place.hw("--api api.sock disk remove a").code(1);
    assert!(refused.err.contains("end that process"), "{refused:?}");
    place.run("nbdinfo", ["--size", server.uri()]).ok();
    assert!(server.end().success());
    for listen in ["10809", "127.0.0.1", ":10809"] {
        let refused = place.hw(&format!("serve a.raw --listen {listen}")).code(1);
        assert!(refused.err.contains("expected HOST:PORT"), "{refused:?}");
    }
}
