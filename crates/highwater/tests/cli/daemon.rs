//! The daemon and its API.

use crate::support::{Place, Server, ended, until};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;

pub(crate) struct Daemon {
    pub(crate) place: Place,
    pub(crate) server: Option<Server>,
}

impl Daemon {
    pub(crate) fn new() -> Self {
        let mut this = Self { place: Place::new(), server: None };
        this.start();
        this
    }

    pub(crate) fn start(&mut self) {
        self.server = Some(self.place.start("daemon --state state --api api.sock"));
    }

    pub(crate) fn end(&mut self) {
        let server = self.server.take().expect("it runs");
        assert!(server.end().success());
    }

    pub(crate) fn hw(&self, line: &str) -> crate::support::Ended {
        self.place.hw(&format!("--api api.sock {line}"))
    }

    /// Speaks HTTP without our client.
    pub(crate) fn curl(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        let url = format!("http://x{path}");
        let mut args = vec!["-s", "--unix-socket", "api.sock", "-X", method, "-w", "\n%{http_code}", &url];
        if let Some(body) = body {
            args.extend(["-H", "content-type: application/json", "-d", body]);
        }
        let ended = self.place.run("curl", args).ok();
        let (text, code) = ended.out.rsplit_once('\n').expect("a status");
        (code.parse().expect("a number"), text.to_owned())
    }
}

#[test]
fn disks_survive_a_restart() {
    let mut daemon = Daemon::new();
    daemon.place.raw("a.raw", 8 << 20);
    daemon.place.hw("create -f qcow2 b.qcow2 64M").ok();
    daemon.hw("disk add a.raw --read-only").ok();
    let added = daemon.hw("--json disk add b.qcow2 --name second --cache unsafe").ok().json();
    assert_eq!(added["spec"]["name"], "second");
    let uri = added["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    daemon.place.qemu_io("raw", &uri, &["write -P 7 1M 1M"]);
    let twice = daemon.hw("disk add b.qcow2 --name third").code(1);
    assert!(twice.err.contains("is the image of disk \"second\""), "{twice:?}");
    // Two names on one socket.
    let list = daemon.place.run("nbdinfo", ["--list", "--json", &uri.replace("/second?", "/?")]).ok().json();
    assert_eq!(list["exports"].as_array().unwrap().len(), 2);
    daemon.end();

    daemon.start();
    let list = daemon.hw("--json disk list").ok().json();
    let names: Vec<&Value> = list["disks"].as_array().unwrap().iter().map(|d| &d["spec"]["name"]).collect();
    assert_eq!(names, ["a", "second"]);
    daemon.place.qemu_io("raw", &uri, &["read -P 7 1M 1M"]);

    // An image that has gone does not stop the others.
    daemon.end();
    std::fs::rename(daemon.place.path("a.raw"), daemon.place.path("gone.raw")).unwrap();
    daemon.start();
    let failed = daemon.hw("--json disk show a").ok().json();
    assert_eq!(failed["state"], "failed");
    assert!(failed["error"].as_str().unwrap().contains("a.raw"), "{failed}");
    daemon.place.qemu_io("raw", &uri, &["read -P 7 1M 1M"]);
    daemon.hw("disk remove a").ok();
    daemon.hw("disk remove second").ok();
    let refused = daemon.hw("disk remove second").code(1);
    assert!(refused.err.contains("no disk \"second\""), "{refused:?}");
    daemon.end();
    daemon.start();
    assert_eq!(daemon.hw("--json disk list").ok().json(), json!({"disks": []}));
    daemon.end();
    daemon.place.tool("qemu-img check b.qcow2").ok();
}

#[test]
fn disks_survive_a_kill() {
    let mut daemon = Daemon::new();
    daemon.place.hw("create -f qcow2 a.qcow2 64M").ok();
    let added = daemon.hw("--json disk add a.qcow2").ok().json();
    let uri = added["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    daemon.place.qemu_io("raw", &uri, &["write -P 5 0 1M", "flush"]);
    daemon.server.take().unwrap().kill();
    assert!(daemon.place.path("api.sock").exists(), "a killed daemon leaves its socket");
    daemon.start();
    let status = daemon.hw("--json disk show a").ok().json();
    assert!(status["error"].is_null() && status["exports"][0]["error"].is_null(), "{status}");
    daemon.place.qemu_io("raw", &uri, &["read -P 5 0 1M"]);
    daemon.end();
    assert!(!daemon.place.path("api.sock").exists());
    let check = daemon.place.tool("qemu-img check a.qcow2");
    assert!(matches!(check.code, Some(0 | 3)), "{check:?}");
}

#[test]
fn one_daemon_per_socket_and_state() {
    let daemon = Daemon::new();
    let mode = std::fs::metadata(daemon.place.path("api.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let refused = daemon.place.hw("daemon --state other --api api.sock").code(1);
    assert!(refused.err.contains("another daemon answers"), "{refused:?}");
    let refused = daemon.place.hw("daemon --state state --api other.sock").code(1);
    assert!(refused.err.contains("another daemon uses"), "{refused:?}");
    assert!(daemon.place.hw("--api missing.sock disk list").code(1).err.contains("no daemon answers"));
}

#[test]
fn a_disk_is_a_name_or_a_file() {
    let daemon = Daemon::new();
    daemon.place.hw("create -f qcow2 a.qcow2 64M").ok();
    daemon.hw("disk add a.qcow2 --name d").ok();
    assert_eq!(daemon.hw("--json info d").ok().json()["virtual-size"], 64 << 20);
    let map = daemon.hw("--json map d").ok().json();
    assert_eq!((&map[0]["start"], &map[0]["length"]), (&json!(0), &json!(64 << 20)));
    daemon.hw("resize d +64M").ok();
    let uri = daemon.hw("--json disk show d").ok().json()["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    assert_eq!(daemon.place.run("nbdinfo", ["--size", &uri]).ok().out.trim(), (128 << 20).to_string());
    let refused = daemon.hw("resize d 1M").code(1);
    assert!(refused.err.contains("--shrink"), "{refused:?}");
    // Files of this name are seen as well.
    daemon.place.hw("create -f raw x.raw 1M").ok();
    assert_eq!(daemon.hw("--json info x.raw").ok().json()["virtual-size"], 1 << 20);
    assert!(daemon.hw("info nothing").code(1).err.contains("nothing"));
}

#[test]
fn exports_come_and_go() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 1 << 20);
    daemon.hw("disk add a.raw --no-export").ok();
    let socket = daemon.place.path("more.sock");
    let export =
        daemon.hw(&format!("--json disk export a --name x --read-only --socket {}", socket.display())).ok().json();
    let uri = export["uris"][0].as_str().unwrap();
    let facts = daemon.place.run("nbdinfo", ["--json", uri]).ok().json();
    assert_eq!(facts["exports"][0]["is_read_only"], true);
    let taken = daemon.hw(&format!("disk export a --name x --socket {}", socket.display())).code(1);
    assert!(taken.err.contains("already"), "{taken:?}");
    daemon.hw(&format!("disk export a --name y --socket {}", socket.display())).ok();
    assert_eq!(daemon.hw("--json disk show a").ok().json()["exports"].as_array().unwrap().len(), 2);
    daemon.hw("disk unexport a x").ok();
    assert_ne!(daemon.place.run("nbdinfo", [uri]).code, Some(0));
    assert!(daemon.hw("disk unexport a x").code(1).err.contains("no export"));
    daemon.hw("disk unexport a").code(2);
    daemon.hw("disk unexport a --all").ok();
    assert!(!socket.exists(), "the last export leaves no socket");
}

#[test]
fn attach_flags_work_in_qemu() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 1 << 20);
    daemon.place.tool("cp a.raw copy.raw").ok();
    daemon.hw("disk add a.raw").ok();
    let attach = daemon.hw("--json attach a").ok().json();
    let blockdev = attach["qemu"]["blockdev"].to_string();
    let image = format!("json:{blockdev}").replace("\"node-name\":\"hw-a\",", "");
    daemon.place.run("qemu-img", ["compare", "-F", "raw", &image, "copy.raw"]).ok();
    assert!(attach["libvirt"].as_str().unwrap().contains("<source protocol='nbd' name='a'>"));
    assert!(daemon.hw("attach a").ok().out.contains("-device virtio-blk-pci,drive=hw-a"));
}

#[test]
fn http_by_hand() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 1 << 20);
    let file = daemon.place.path("a.raw").display().to_string();
    let (code, text) = daemon.curl("GET", "/openapi.json", None);
    assert_eq!(code, 200);
    let document: Value = serde_json::from_str(&text).unwrap();
    assert!(document["paths"]["/v1/disks"]["post"].is_object());

    let spec = json!({"name": "d", "image": {"file": file}, "exports": [{}]}).to_string();
    let (code, text) = daemon.curl("POST", "/v1/disks", Some(&spec));
    assert_eq!(code, 201, "{text}");
    let (code, text) = daemon.curl("POST", "/v1/disks", Some(&spec));
    assert_eq!(code, 409, "{text}");
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(error["kind"], "conflict");
    for (body, code, word) in [
        ("{", 400, "eof"),
        ("{\"name\":\"x\"}", 400, "image"),
        ("{\"name\":\"x/y\",\"image\":{\"file\":\"/x\"}}", 400, "not a disk name"),
        ("{\"name\":\"x\",\"image\":{\"file\":\"x\"}}", 400, "not absolute"),
        ("{\"name\":\"x\",\"image\":{\"file\":\"/missing.raw\"}}", 404, "/missing.raw"),
        ("{\"name\":\"x\",\"image\":{\"file\":\"/missing.raw\",\"extra\":1}}", 400, "extra"),
    ] {
        let (found, text) = daemon.curl("POST", "/v1/disks", Some(body));
        assert_eq!(found, code, "{body}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"].as_str().unwrap().to_lowercase().contains(word), "{body}: {text}");
    }
    assert_eq!(daemon.curl("GET", "/v1/nothing", None).0, 404);
    let (code, text) = daemon.curl("GET", "/v1/disks/d/map?start=0&length=1000000000000", None);
    assert_eq!(code, 200);
    assert!(!serde_json::from_str::<Value>(&text).unwrap()["entries"].as_array().unwrap().is_empty());
    for (method, path, code) in [
        ("GET", "/v1/disks/d/map?start=x", 400),
        ("GET", "/v1/disks/d/map?begin=1", 400),
        ("GET", "/v1/jobs/abc", 400),
        ("GET", "/v1/disks/%ff", 400),
        ("PUT", "/v1/disks", 405),
        // A misspelt name is not the wish to close all.
        ("DELETE", "/v1/disks/d/exports?export=d", 400),
        ("DELETE", "/v1/disks/d/exports", 400),
        ("DELETE", "/v1/disks/d/exports?name=d&all=true", 400),
    ] {
        let (found, text) = daemon.curl(method, path, None);
        assert_eq!(found, code, "{method} {path}: {text}");
        assert!(serde_json::from_str::<Value>(&text).unwrap()["error"].is_string(), "{method} {path}: {text}");
    }
    let disk = daemon.hw("--json disk show d").ok().json();
    assert_eq!(disk["exports"].as_array().unwrap().len(), 1, "{disk}");
    let relative = json!({"job": "create", "file": "rel.qcow2", "format": "qcow2", "size": 1 << 20}).to_string();
    let (code, text) = daemon.curl("POST", "/v1/jobs", Some(&relative));
    assert_eq!(code, 400, "{text}");
    assert!(text.contains("not absolute"), "{text}");
    let (code, text) = daemon.curl("GET", "/metrics", None);
    assert_eq!(code, 200);
    assert!(text.contains("highwater_nbd_requests_total{disk=\"d\",export=\"d\",request=\"read\"} 0"), "{text}");
    assert_eq!(daemon.curl("DELETE", "/v1/disks/d", None).0, 204);
    assert_eq!(daemon.curl("DELETE", "/v1/disks/d", None).0, 404);
}

#[test]
fn jobs_do_what_the_commands_do() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 24 << 20);
    let (source, target) = (daemon.place.path("a.raw"), daemon.place.path("b.qcow2"));
    let job = json!({"job": "convert", "source": {"file": source}, "target": target, "format": "qcow2"});
    std::fs::write(daemon.place.path("job.json"), job.to_string()).unwrap();
    let id = daemon.hw("--json job start job.json").ok().json()["id"].as_u64().unwrap();
    let mut status = Value::Null;
    for _ in 0..600 {
        status = daemon.hw(&format!("--json jobs show {id}")).ok().json();
        if status["state"] != "running" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(status["state"], "done", "{status}");
    assert_eq!(status["percent"], 100);
    assert_eq!(status["result"]["virtual-size"], 24 << 20);
    daemon.place.tool("qemu-img compare a.raw b.qcow2").ok();
    assert!(status["ended"].as_u64().unwrap() >= status["started"].as_u64().unwrap());
    let refused = daemon.hw(&format!("jobs cancel {id}")).code(1);
    assert!(refused.err.contains("has ended"), "{refused:?}");
    assert_eq!(daemon.hw(&format!("--json job wait {id}")).ok().json()["state"], "done");
    daemon.hw(&format!("jobs forget {id}")).ok();
    daemon.hw(&format!("jobs show {id}")).code(1);
}

#[test]
fn events_are_told() {
    let daemon = Daemon::new();
    daemon.place.raw("a.raw", 1 << 20);
    let mut reader = std::process::Command::new("curl")
        .args(["-sN", "--unix-socket", "api.sock", "http://x/v1/events"])
        .current_dir(daemon.place.dir())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("curl");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(reader.stdout.take().unwrap()));
    // The first line says that we are subscribed.
    assert!(lines.next().unwrap().unwrap().starts_with(':'));
    daemon.hw("disk add a.raw").ok();
    daemon.hw("disk remove a").ok();
    let mut seen = Vec::new();
    for line in lines.by_ref() {
        if let Some(name) = line.unwrap().strip_prefix("event: ") {
            seen.push(name.to_owned());
            if name == "disk-removed" {
                break;
            }
        }
    }
    assert_eq!(seen, ["disk-opened", "disk-removed"]);
    // An endless answer does not hold up the end.
    let mut daemon = daemon;
    daemon.end();
    reader.wait().unwrap();
}

#[test]
fn the_format_is_decided_once() {
    let mut daemon = Daemon::new();
    daemon.place.hw("create g.img 8M").ok();
    daemon.place.hw("create nested.qcow2 1M").ok();
    let uri = daemon.hw("--json disk add g.img").ok().json()["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    // A guest may put an image onto its disk.
    daemon.place.run("nbdcopy", ["nested.qcow2", uri.as_str()]).ok();
    daemon.end();
    daemon.start();
    let status = daemon.hw("--json disk show g").ok().json();
    assert_eq!((&status["state"], &status["format"]), (&json!("open"), &json!("raw")), "{status}");
    let catalogue = std::fs::read_to_string(daemon.place.path("state/catalogue.json")).unwrap();
    assert!(catalogue.contains("\"format\": \"raw\""), "{catalogue}");
}

#[test]
fn a_refused_disk_does_not_come_back() {
    let mut daemon = Daemon::new();
    daemon.place.hw("create a.qcow2 1M").ok();
    daemon.place.hw("create b.qcow2 1M").ok();
    let mut holder = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "sleep 60000", "a.qcow2"])
        .current_dir(daemon.place.dir())
        .spawn()
        .expect("qemu-io");
    let held = || daemon.place.tool("qemu-img info a.qcow2").code != Some(0);
    until("qemu-io holds the image", held);
    // It is tried for half a second; meanwhile the catalogue is written for another disk.
    let mut refused = daemon.place.spawn("--api api.sock disk add a.qcow2");
    until("the first is seen on its way", || {
        if refused.try_wait().unwrap().is_some() {
            refused = daemon.place.spawn("--api api.sock disk add a.qcow2");
        }
        daemon.hw("--json disk list").out.contains("\"opening\"")
    });
    daemon.hw("disk add b.qcow2").ok();
    let refused = ended(refused).code(1);
    assert!(refused.err.contains("in use by process"), "{refused:?}");
    holder.kill().unwrap();
    holder.wait().unwrap();
    daemon.end();
    daemon.start();
    let list = daemon.hw("--json disk list").ok().json();
    let names: Vec<&Value> = list["disks"].as_array().unwrap().iter().map(|d| &d["spec"]["name"]).collect();
    assert_eq!(names, ["b"]);
}

#[test]
fn a_failed_disk_is_opened_again() {
    let mut daemon = Daemon::new();
    daemon.place.raw("a.raw", 1 << 20);
    let uri = daemon.hw("--json disk add a.raw").ok().json()["exports"][0]["uris"][0].as_str().unwrap().to_owned();
    daemon.end();
    std::fs::rename(daemon.place.path("a.raw"), daemon.place.path("gone.raw")).unwrap();
    daemon.start();
    let refused = daemon.hw("map a").code(1);
    assert!(refused.err.contains("highwater disk open a"), "{refused:?}");
    assert!(daemon.hw("attach a").code(1).err.contains("highwater disk open a"));
    daemon.hw("disk open a").code(1);
    std::fs::rename(daemon.place.path("gone.raw"), daemon.place.path("a.raw")).unwrap();
    assert_eq!(daemon.hw("--json disk open a").ok().json()["state"], "open");
    daemon.place.run("nbdinfo", ["--size", uri.as_str()]).ok();
    // What is open stays as it is.
    assert_eq!(daemon.hw("--json disk open a").ok().json()["state"], "open");
}

#[test]
fn a_daemon_is_found_without_being_named() {
    let daemon = Daemon::new();
    let binary = env!("CARGO_BIN_EXE_highwater");
    let status = daemon.place.run("env", ["HIGHWATER_API=api.sock", binary, "--json", "status"]).ok().json();
    assert_eq!(status["disks"]["open"], 0);
    assert_eq!(status["daemon"]["pid"], daemon.server.as_ref().unwrap().pid());
    let missing = daemon.place.run("env", ["HIGHWATER_API=none.sock", binary, "status"]).code(1);
    assert!(missing.err.contains("no daemon answers on none.sock"), "{missing:?}");
    assert!(missing.err.contains("No such file") && !missing.err.contains("http://"), "{missing:?}");
    assert!(daemon.hw("metrics").ok().out.contains("highwater_disks"));
}
