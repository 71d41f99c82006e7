//! SIGKILL of the server while a client writes and marks are taken: every change is told of afterwards.
//!
//! The judge is the disk's content: what each block may have held at a mark, which the writer notes, against what it
//! holds now. `HIGHWATER_ROUNDS` multiplies the kills.

use interop::{Server, highwater, highwater_command, missing, python, qemu_img, qemu_io, script};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How often each of the four images is killed under.
const KILLS: u64 = 3;
/// What a crash may report beyond what was written: `--history-open`.
const OPEN: u64 = 4 << 20;

fn kills() -> u64 {
    let rounds = std::env::var("HIGHWATER_ROUNDS").ok();
    KILLS * rounds.map_or(1, |text| text.parse().expect("HIGHWATER_ROUNDS is a number"))
}

/// An image with its surroundings.
struct Disk {
    directory: TempDir,
    format: &'static str,
    image: PathBuf,
}

impl Disk {
    fn new(format: &'static str, size: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let image = directory.path().join(format!("disk.{format}"));
        qemu_img(&["create", "-q", "-f", format, text(&image), size]);
        Self { directory, format, image }
    }

    fn beside(&self, name: &str) -> String {
        text(&self.directory.path().join(name)).to_owned()
    }

    fn name(&self) -> &str {
        text(&self.image)
    }

    fn serve(&self, args: &[&str]) -> Server {
        let api = self.beside("api.sock");
        let mut all = vec!["-f", self.format, "--api", &api, "--history", "on"];
        all.extend(args);
        Server::start(&self.image, &all)
    }

    /// The highwater verb on the file that nobody serves.
    fn offline(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        all.extend(["-f", self.format]);
        serde_json::from_str(&highwater(&all)).expect("JSON")
    }

    /// What has changed since each mark, asked on the file.
    fn offline_changes(&self) -> Vec<(String, Value)> {
        let listed = self.offline(&["marks", "list", self.name()]);
        let marks = listed["marks"].as_array().expect("a list");
        let names = marks.iter().map(|mark| mark["name"].as_str().expect("a name").to_owned());
        names
            .map(|name| {
                let report = self.offline(&["changes", self.name(), "--since", &name]);
                (name, report)
            })
            .collect()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// The middle one and the largest.
fn spread(mut numbers: Vec<u64>) -> (u64, u64) {
    numbers.sort_unstable();
    let middle = numbers.get(numbers.len() / 2).copied().unwrap_or(0);
    (middle, numbers.last().copied().unwrap_or(0))
}

fn kill_rounds(format: &'static str, serve: &[&str], seed: u64) {
    if missing(&["python3-libnbd", "qemu-img"]).is_some() {
        return;
    }
    let disk = Disk::new(format, "256M");
    let [api, state, offline] = ["api.sock", "state", "offline.json"].map(|name| disk.beside(name));
    // The judge knows by the name that nothing of a raw image was in the server's memory alone.
    let copy = disk.beside(&format!("{format}.copy"));
    let open = OPEN.to_string();
    let serve: Vec<&str> = serve.iter().copied().chain(["--history-open", &open]).collect();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut rows = Vec::new();
    for round in 0..kills() {
        let server = disk.serve(&serve);
        let seed = (seed * 1000 + round).to_string();
        let mut writer = script("tracked_writer.py", &["write", &server.uri, &api, &state, &seed]);
        let mut writer = writer.spawn().expect("Python starts");
        // The first requests take a while; then any moment will do.
        std::thread::sleep(Duration::from_millis(500 + random.u64(0..1000)));
        server.kill();
        assert!(writer.wait().expect("our child").success(), "round {round}: the writer failed");

        let told = serde_json::json!(disk.offline_changes());
        std::fs::write(&offline, told.to_string()).expect("the directory can be written to");
        // What the file holds now; writes that were answered and not done yet come back with the server.
        qemu_img(&["convert", "-f", format, "-O", "raw", disk.name(), &copy]);
        let server = disk.serve(&serve);
        let judged = python("tracked_writer.py", &["verify", &server.uri, &api, &state, &offline, &copy]);
        // Half of the kills come upon a history that was closed before, half upon one that has seen a crash.
        if random.bool() {
            server.stop();
        } else {
            server.kill();
        }
        let judged: Vec<Value> = serde_json::from_str(&judged).expect("JSON");
        rows.extend(judged);
    }
    let column = |name: &str| rows.iter().map(|row| row[name].as_u64().expect("a number")).collect::<Vec<_>>();
    let once = |row: &&Value| row["kills"] == 1;
    let over_once = rows.iter().filter(once).map(|row| row["over"].as_u64().expect("a number")).collect();
    let ((over, most), (first, first_most)) = (spread(column("over")), spread(over_once));
    println!(
        "{format} {serve:?}: {} kills, {} comparisons with marks, 0 misses; changed {} bytes in the middle; told beyond \
         what was written: {over} in the middle, {most} at most; after one kill: {first} and {first_most}",
        kills(),
        rows.len(),
        spread(column("changed")).0,
    );
    assert!(rows.len() as u64 >= kills(), "too few marks to show anything: {}", rows.len());
    for row in &rows {
        let allowed = OPEN * row["kills"].as_u64().expect("a number");
        assert!(
            row["over"].as_u64() <= Some(allowed),
            "more than {allowed} bytes are told beyond what was written: {row}"
        );
    }
}

#[test]
fn no_change_of_a_raw_image_is_missed() {
    kill_rounds("raw", &["--cache", "writeback"], 1);
}

#[test]
fn no_change_of_a_raw_image_is_missed_with_direct_io() {
    kill_rounds("raw", &["--cache", "none", "--io-backend", "threads"], 2);
}

#[test]
fn no_change_of_a_qcow2_image_is_missed() {
    kill_rounds("qcow2", &["--cache", "writeback", "--history-granule", "16k"], 3);
}

#[test]
fn no_change_of_a_qcow2_image_is_missed_with_direct_io() {
    kill_rounds("qcow2", &["--cache", "none"], 4);
}

/// Who writes to an image unseen by its history.
#[derive(Clone, Copy, Debug)]
enum Unseen {
    HistoryOff,
    QemuIo,
}

/// How the server ended before.
#[derive(Clone, Copy, Debug)]
enum End {
    Stopped,
    Killed,
}

fn marks_are_refused(format: &'static str, unseen: Unseen, end: End) {
    let disk = Disk::new(format, "16M");
    let api = disk.beside("api.sock");
    let of_daemon = |args: &[&str]| -> Value {
        let mut all = vec!["--json", "--api", &api];
        all.extend(args);
        serde_json::from_str(&highwater(&all)).expect("JSON")
    };
    let context = format!("{format}, {unseen:?} after {end:?}");
    let server = disk.serve(&[]);
    qemu_io("raw", &server.uri, &["write -P 1 0 1M"]);
    of_daemon(&["mark", "disk", "before"]);
    qemu_io("raw", &server.uri, &["write -P 2 4M 64k", "flush"]);
    match end {
        End::Stopped => server.stop(),
        End::Killed => {
            server.kill();
            // Of a raw image nothing but its time tells who wrote last, and the last sign of life is a second old. We
            // ourselves leave no such doubt.
            if format == "raw" && matches!(unseen, Unseen::QemuIo) {
                std::thread::sleep(Duration::from_millis(4_500));
            }
        }
    }
    let report = disk.offline(&["changes", disk.name(), "--since", "before"]);
    assert_eq!(report["summary"]["changed"], 64 << 10, "{context}: {report}");
    match unseen {
        Unseen::HistoryOff => {
            let server = Server::start(&disk.image, &["-f", format, "--history", "off"]);
            qemu_io("raw", &server.uri, &["write -P 3 8M 4k"]);
            server.stop();
        }
        Unseen::QemuIo => drop(qemu_io(format, disk.name(), &["write -P 3 8M 4k"])),
    }
    let refused = |args: &[&str]| {
        let output = highwater_command(args).output().expect("highwater runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{context}: {args:?} told changes that cannot be known");
        assert!(said.contains("before"), "{context}: {said}");
    };
    refused(&["changes", disk.name(), "--since", "before", "-f", format]);
    let server = disk.serve(&[]);
    refused(&["--api", &api, "changes", "disk", "--since", "before"]);
    let listed = of_daemon(&["marks", "list", "disk"]).to_string();
    assert!(listed.contains("\"refused\":"), "{context}: {listed}");
    of_daemon(&["mark", "disk", "after"]);
    qemu_io("raw", &server.uri, &["write -P 4 12M 4k"]);
    let report = of_daemon(&["changes", "disk", "--since", "after"]);
    assert_eq!(report["summary"]["changed"], 64 << 10, "{context}: {report}");
    server.stop();
    refused(&["changes", disk.name(), "--since", "before", "-f", format]);
}

#[test]
fn marks_are_refused_when_somebody_wrote_unseen() {
    if missing(&["qemu-img", "qemu-io"]).is_some() {
        return;
    }
    std::thread::scope(|scope| {
        for format in ["raw", "qcow2"] {
            for unseen in [Unseen::HistoryOff, Unseen::QemuIo] {
                for end in [End::Stopped, End::Killed] {
                    scope.spawn(move || marks_are_refused(format, unseen, end));
                }
            }
        }
    });
}
