//! Metadata contexts that come and go while their export is open, and that work out something for each connection.

use crate::clients::run;
use crate::raw_client::*;
use crate::served::{MIB, Served, Setup};
use disk::{ByteRange, DiskHandle, LocalFuture, Result};
use export_nbd::{ContextSource, MetaContext, StatusRun};
use std::cell::RefCell;
use std::io::Write;
use std::sync::{Arc, Mutex};

/// What the home thread knows: the marks there are, and where the disk was changed since.
#[derive(Default)]
struct Tracking {
    marks: Vec<String>,
    /// Sorted.
    changed: Vec<ByteRange>,
    /// Snapshots made so far.
    snapshots: usize,
}

thread_local! {
    // A test has its own threads, and thereby its own tracking.
    static TRACKING: RefCell<Tracking> = RefCell::default();
}

/// A context that answers from what was changed when it was first asked.
struct Dirty {
    name: String,
    snapshot: Mutex<Option<Vec<ByteRange>>>,
}

impl MetaContext for Dirty {
    fn name(&self) -> &str {
        &self.name
    }

    fn status<'a>(&'a self, _: &'a DiskHandle, range: ByteRange) -> LocalFuture<'a, Result<StatusRun>> {
        Box::pin(async move {
            let mut snapshot = self.snapshot.lock().unwrap();
            let changed = snapshot.get_or_insert_with(|| {
                TRACKING.with_borrow_mut(|tracking| {
                    tracking.snapshots += 1;
                    tracking.changed.clone()
                })
            });
            let next = changed.get(changed.partition_point(|run| run.end() <= range.offset()));
            let (end, status) = match next {
                Some(run) if run.offset() <= range.offset() => (run.end(), 1),
                Some(run) => (run.offset(), 0),
                None => (range.end(), 0),
            };
            Ok(StatusRun { len: end.min(range.end()) - range.offset(), status })
        })
    }
}

fn source() -> ContextSource {
    Arc::new(|| {
        TRACKING.with_borrow(|tracking| {
            let context = |mark: &String| {
                let name = format!("qemu:dirty-bitmap:{mark}");
                Arc::new(Dirty { name, snapshot: Mutex::default() }) as Arc<dyn MetaContext>
            };
            tracking.marks.iter().map(context).collect()
        })
    })
}

fn tracked() -> Served {
    Served::new(Setup { export: |export| export.contexts = source(), ..Setup::default() })
}

fn track<T: Send + 'static>(served: &Served, change: impl FnOnce(&mut Tracking) -> T + Send + 'static) -> T {
    served.home.spawn(move || async move { TRACKING.with_borrow_mut(change) }).wait().unwrap()
}

fn structured(served: &Served) -> RawClient {
    let mut client = RawClient::greeted(&served.socket());
    client.style = Style::Structured;
    client.option(OPT_STRUCTURED, &[]);
    client
}

/// The names in the replies to an option that lists or selects.
fn names(replies: &[(u32, Vec<u8>)]) -> Vec<String> {
    let (ack, contexts) = replies.split_last().unwrap();
    assert_eq!(ack.0, REP_ACK);
    assert!(contexts.iter().all(|(kind, _)| *kind == REP_META_CONTEXT));
    contexts.iter().map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect()
}

/// Offset, length and status of each line of `nbdinfo --map`.
fn map(served: &Served, context: &str) -> Vec<[u64; 3]> {
    let text = run("nbdinfo", &[&format!("--map={context}"), &served.uri()]);
    let numbers = |line: &str| {
        let mut words = line.split_whitespace().map(|word| word.parse().unwrap());
        [words.next().unwrap(), words.next().unwrap(), words.next().unwrap()]
    };
    text.lines().map(numbers).collect()
}

#[test]
fn a_context_appears_between_two_connections() {
    let served = tracked();
    let listed = |served: &Served| run("nbdinfo", &["--json", &served.uri()]).contains("qemu:dirty-bitmap:x");
    assert!(!listed(&served));
    let mut before = structured(&served);
    assert!(names(&before.option(OPT_LIST_META, &meta_data(&["qemu:dirty-bitmap:"]))).is_empty());
    track(&served, |tracking| {
        tracking.marks = vec!["x".into(), "x".into()];
        tracking.changed = vec![ByteRange::new(MIB, 2 * MIB), ByteRange::new(63 * MIB, MIB)];
    });
    assert!(listed(&served));
    let found = names(&before.option(OPT_LIST_META, &meta_data(&["qemu:dirty-bitmap:"])));
    assert_eq!(found, ["qemu:dirty-bitmap:x"], "also in a handshake that began before, and once");
    let expected = [[0, MIB, 0], [MIB, 2 * MIB, 1], [3 * MIB, 60 * MIB, 0], [63 * MIB, MIB, 1]];
    assert_eq!(map(&served, "qemu:dirty-bitmap:x"), expected);
    track(&served, |tracking| tracking.marks.clear());
    assert!(!listed(&served));
}

#[test]
fn qemu_reads_a_dirty_bitmap() {
    let served = tracked();
    track(&served, |tracking| {
        tracking.marks.push("x".into());
        tracking.changed = vec![ByteRange::new(MIB, 65536)];
    });
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:x",
        served.socket().display()
    );
    let text = run("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    // What is dirty is shown as not data: QEMU takes the flag for that of a hole.
    let lines: Vec<(bool, bool)> = text
        .lines()
        .map(|line| (line.contains("\"start\": 1048576, \"length\": 65536"), line.contains("\"data\": false")))
        .collect();
    assert_eq!(lines, [(false, false), (true, true), (false, false)], "{text}");
}

#[test]
fn each_connection_has_its_own_snapshot() {
    let served = tracked();
    track(&served, |tracking| {
        tracking.marks.push("x".into());
        tracking.changed = vec![ByteRange::new(0, MIB)];
    });
    let connect = || {
        let mut client = structured(&served);
        let selected = names(&client.option(OPT_SET_META, &meta_data(&["qemu:dirty-bitmap:x"])));
        assert_eq!(selected, ["qemu:dirty-bitmap:x"]);
        client.option(OPT_GO, &go_data("disk"));
        client
    };
    let dirty = |client: &mut RawClient| client.request(BLOCK_STATUS, 0, 0, 4 * MIB).parts.remove(0);
    let one = Part::Status { context: 0, runs: vec![(MIB, 1), (3 * MIB, 0)] };
    let (mut first, mut second) = (connect(), connect());
    assert_eq!(track(&served, |tracking| tracking.snapshots), 0, "nothing is worked out before it is asked for");
    assert_eq!(dirty(&mut first), one);
    track(&served, |tracking| tracking.changed.push(ByteRange::new(2 * MIB, MIB)));
    let two = Part::Status { context: 0, runs: vec![(MIB, 1), (MIB, 0), (MIB, 1), (MIB, 0)] };
    assert_eq!(dirty(&mut second), two);
    // A mark that goes takes nothing from those who selected it.
    track(&served, |tracking| tracking.marks.clear());
    assert_eq!((dirty(&mut first), dirty(&mut second)), (one, two));
    assert_eq!(track(&served, |tracking| tracking.snapshots), 2);
}

#[test]
fn thousands_of_contexts() {
    let served = tracked();
    track(&served, |tracking| tracking.marks = (0..2500).map(|n| format!("nightly-{n:04}")).collect());
    let client = &mut structured(&served);
    let all = names(&client.option(OPT_LIST_META, &meta_data(&["qemu:dirty-bitmap:"])));
    assert_eq!((all.len(), all[2499].as_str()), (2500, "qemu:dirty-bitmap:nightly-2499"));
    assert_eq!(names(&client.option(OPT_LIST_META, &meta_data(&[""; 0]))).len(), 2502);
    let last = client.option(OPT_SET_META, &meta_data(&all[65..130])).pop();
    assert_eq!(last.map(|(kind, _)| kind), Some(REP_ERR_TOO_BIG), "65 are too many for one connection");
    assert_eq!(names(&client.option(OPT_SET_META, &meta_data(&all[2436..]))), all[2436..]);
    client.option(OPT_GO, &go_data("disk"));
    let reply = client.request(BLOCK_STATUS, 0, 0, 64 * MIB);
    assert_eq!(reply.parts.len(), 64);
    assert!(reply.parts.iter().all(|part| matches!(part, Part::Status { runs, .. } if runs == &[(64 * MIB, 0)])));
    // Real clients.
    let list = run("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", served.socket().display())]);
    assert_eq!(list.matches("qemu:dirty-bitmap:nightly-").count(), 2500);
    assert_eq!(map(&served, "qemu:dirty-bitmap:nightly-2499"), [[0, 64 * MIB, 0]]);
}

#[test]
fn the_most_contexts_stay_within_the_bound() {
    let served = tracked();
    track(&served, |tracking| {
        tracking.marks = (0..64).map(|n| n.to_string()).collect();
        // More runs than a reply takes.
        tracking.changed = (0..10000).map(|n| ByteRange::new(n * 4096, 2048)).collect();
    });
    let names: Vec<String> = (0..64).map(|n| format!("qemu:dirty-bitmap:{n}")).collect();
    let client = &mut structured(&served);
    client.option(OPT_SET_META, &meta_data(&names));
    client.option(OPT_GO, &go_data("disk"));
    // Each takes 8 MiB of the connection's 64; those that do not fit wait, and all are answered.
    let requests: Vec<u8> = (0..10).flat_map(|n| client.header(BLOCK_STATUS, 0, n, 0, 64 * MIB)).collect();
    client.stream.write_all(&requests).unwrap();
    for _ in 0..10 {
        let reply = client.reply(0);
        assert_eq!(reply.parts.len(), 64);
        assert!(reply.parts.iter().all(|part| matches!(part, Part::Status { runs, .. } if runs.len() == 8192)));
    }
}
