//! Measures a full backup and its reading and verifying: `throughput FOLDER MIB THREADS random|text [aes|open]`. Prints one line.

use repository::{
    Backup, BackupOptions, Consistency, DiskPlan, LocalStore, Made, PointFacts, Repository, Settings, Stretch,
    SystemHost, Unlock, VerifyOptions,
};
use std::sync::Arc;
use std::time::Instant;

fn fill(leaf: &mut [u8], random: &mut fastrand::Rng, text: bool) {
    if !text {
        return random.fill(leaf);
    }
    // Words of a small dictionary: zstd shortens it to about a third.
    let mut at = 0;
    while at < leaf.len() {
        let mut word = fastrand::Rng::with_seed(random.u64(..3000).min(random.u64(..3000)));
        for _ in 0..word.usize(2..9) {
            if at < leaf.len() {
                leaf[at] = word.u8(b'a'..=b'z');
                at += 1;
            }
        }
        if at < leaf.len() {
            leaf[at] = b' ';
            at += 1;
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, mib, threads, kind, rest @ ..] = arguments.as_slice() else {
        panic!("FOLDER MIB THREADS random|text [open]")
    };
    let (mib, threads): (usize, usize) = (mib.parse().expect("MIB"), threads.parse().expect("THREADS"));
    let settings = Settings { encrypted: rest.first().is_none_or(|r| r != "open"), ..Settings::default() };
    let key = if settings.encrypted {
        Unlock::KeyFile(repository::new_key_file(&SystemHost).expect("a key"))
    } else {
        Unlock::Open
    };
    let store = Arc::new(LocalStore::open(folder.as_str()).expect("a folder"));
    let host = Arc::new(SystemHost);
    let repository = Repository::init(store, host, settings, &key, Stretch::default(), "").expect("a new repository");
    let leaf = settings.leaf_bytes as usize;
    let mut content = vec![0; mib << 20];
    let mut random = fastrand::Rng::with_seed(1);
    content.chunks_mut(leaf).for_each(|chunk| fill(chunk, &mut random, kind == "text"));
    let rate = |since: Instant| mib as f64 / since.elapsed().as_secs_f64();

    let begun = Instant::now();
    let plan = DiskPlan {
        name: "disk".into(),
        size: content.len() as u64,
        inherit: false,
        made: Made::Full,
        identity: Vec::new(),
    };
    let options = BackupOptions { threads, ..BackupOptions::default() };
    let mut backup = Backup::begin(&repository, &options, vec![plan]).expect("a session");
    for (n, chunk) in content.chunks(leaf).enumerate() {
        backup.put_leaf(0, n as u64, chunk).expect("a leaf");
    }
    let facts = PointFacts {
        machine: "bench".into(),
        created_ms: 0,
        consistency: Consistency::Off,
        attachments: Vec::new(),
        note: String::new(),
    };
    let (point, counts) = backup.finish(facts).expect("a point");
    let write = rate(begun);

    let begun = Instant::now();
    let readers = threads.max(1);
    std::thread::scope(|scope| {
        for part in 0..readers {
            let (repository, disk, content) = (&repository, &point.disks[0], &content);
            scope.spawn(move || {
                let reader = repository.disk(disk, 0);
                let mut out = vec![0; 4 << 20];
                for n in (part..content.len() / out.len()).step_by(readers) {
                    let from = n * out.len();
                    reader.read(from as u64, &mut out).expect("bytes");
                    assert!(out == content[from..from + out.len()]);
                }
            });
        }
    });
    let read = rate(begun);
    let begun = Instant::now();
    let report = repository.verify(VerifyOptions { threads: readers, ..VerifyOptions::default() }).expect("a report");
    assert!(report.findings.is_empty());
    println!(
        "{kind} threads={threads} encrypted={} write={write:.0} MiB/s read={read:.0} MiB/s verify={:.0} MiB/s stored={} MiB",
        settings.encrypted,
        rate(begun),
        counts.pack_bytes >> 20
    );
}
