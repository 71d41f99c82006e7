//! Repositories with the real binary: made, opened, checked, and what is in them.

use crate::support::{Ended, Place, ended};
use repository::{
    Backup, BackupOptions, Consistency, DiskPlan, LocalStore, Made, Point, PointFacts, Repository, SystemHost, Unlock,
};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const LEAF: usize = 64 << 10;
const DAY: u64 = 86_400_000;
/// Friday, 20 November 2026, 12:00 UTC.
const NOON: u64 = 1_795_176_000_000;

/// Runs highwater with words of which some have spaces, or with settings of the environment before it.
fn words(place: &Place, environment: &[&str], words: &[&str]) -> Ended {
    let program = [env!("CARGO_BIN_EXE_highwater")];
    place.run("env", environment.iter().chain(&program).chain(words))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

/// All files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// A repository without encryption, and its inside.
fn open_repository(place: &Place, name: &str) -> Repository {
    place.hw(&format!("repo init {name} --no-encryption")).ok();
    let store = Arc::new(LocalStore::open(place.path(name)).unwrap());
    Repository::open(store, Arc::new(SystemHost), &Unlock::Open).unwrap()
}

/// Leaves that do not compress.
fn noise(seed: u64, leaves: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..leaves * LEAF).map(|_| step()).collect()
}

/// A point of these disks, in full.
fn point(repository: &Repository, machine: &str, created_ms: u64, disks: &[(&str, &[u8])]) -> Point {
    let plan = |(name, content): &(&str, &[u8])| DiskPlan {
        name: (*name).to_owned(),
        size: content.len() as u64,
        inherit: false,
        made: Made::Full,
        identity: Vec::new(),
    };
    let plans = disks.iter().map(plan).collect();
    let mut session = Backup::begin(repository, &BackupOptions::default(), plans).unwrap();
    for (disk, (_, content)) in disks.iter().enumerate() {
        for (index, leaf) in content.chunks(LEAF).enumerate() {
            session.put_leaf(disk, index as u64, leaf).unwrap();
        }
    }
    let facts = PointFacts {
        machine: machine.to_owned(),
        created_ms,
        consistency: Consistency::FileSystem,
        attachments: Vec::new(),
        note: String::new(),
    };
    session.finish(facts).unwrap().0
}

#[test]
fn a_new_repository_has_a_key_and_says_where() {
    let place = Place::new();
    let made = place.hw("repo init r --json").ok().json();
    let key = place.path("config/highwater/keys").join(format!("{}.key", text(&made, "id")));
    assert_eq!(text(&made, "key-file"), key.to_str().unwrap());
    assert_eq!((mode(&key), mode(key.parent().unwrap())), (0o600, 0o700));
    assert_eq!(files(key.parent().unwrap()), std::slice::from_ref(&key), "the key is there under one name");
    assert_eq!((&made["encrypted"], &made["leaf-size"]), (&Value::Bool(true), &Value::from(64 << 10)));
    assert!(!fs::read_to_string(&key).unwrap().is_empty());
    place.hw("points r").ok();

    let told = place.hw("repo init other --key-file k/key --leaf-size 128k --pack-size 16M").ok().out;
    assert!(told.contains("k/key") && told.contains("save it somewhere else") && told.contains("loses"), "{told}");
    assert_eq!((mode(&place.path("k/key")), mode(&place.path("k"))), (0o600, 0o700));
    let stats = place.hw("repo stats other --key-file k/key --json").ok().json();
    assert_eq!((&stats["leaf-size"], &stats["pack-size"]), (&Value::from(128 << 10), &Value::from(16 << 20)));
    assert!(place.hw("points other").code(1).err.contains("give --key-file"));

    // Without its key a repository is shut.
    fs::rename(&key, place.path("saved")).unwrap();
    assert!(place.hw("points r").code(1).err.contains("its key is not in"));
    place.hw("points r --key-file saved").ok();
    assert!(place.hw("points r --key-file k/key").code(1).err.contains("none of the repository's"));
}

#[test]
fn what_is_there_is_not_replaced() {
    let place = Place::new();
    place.hw("repo init r --key-file key").ok();
    let (key, config) = (fs::read(place.path("key")).unwrap(), fs::read(place.path("r/config")).unwrap());
    let twice = place.hw("repo init r").code(1);
    assert!(twice.err.contains("there is a repository here already"), "{twice:?}");
    assert!(!place.path("config").exists(), "a key of nothing was made");
    let taken = place.hw("repo init s --key-file key").code(1);
    assert!(taken.err.contains("not replaced by a new key"), "{taken:?}");
    assert_eq!((fs::read(place.path("key")).unwrap(), fs::read(place.path("r/config")).unwrap()), (key, config));
    assert!(!place.path("s/config").exists());
    place.hw("repo init s --key-file another").ok();
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/.file"), "x").unwrap();
    assert!(place.hw("repo init full").code(1).err.contains("not empty"));
    assert_eq!(files(&place.path("full")).len(), 1);
    fs::create_dir(place.path("empty")).unwrap();
    place.hw("repo init empty").ok();
    assert!(place.hw("repo init t --key-file t/key").code(1).err.contains("protects nothing"));
    assert!(place.hw("repo init t --leaf-size 5k --key-file k").code(1).err.contains("16 KiB to 1 MiB"));
    assert!(!place.path("k").exists());
    for line in ["points full", "points nowhere", "repo check nowhere", "forget nowhere latest", "repo prune full"] {
        let none = place.hw(line).code(1);
        assert!(none.err.contains("no repository is there") && none.err.contains("repo init"), "{line}: {none:?}");
    }
    assert!(!place.path("nowhere").exists());
    for line in ["points s3://a/b", "repo init s3://a/b", "diff s3://a/b 1 2"] {
        assert!(place.hw(line).code(1).err.contains("S3 are not there yet"), "{line}");
    }
    // 2 is for what is damaged.
    place.hw("repo check").code(1);
    place.hw("points").code(2);
}

#[test]
fn passphrases_and_the_environment() {
    let place = Place::new();
    fs::write(place.path("phrase"), "correct horse\nsecond line\n").unwrap();
    fs::write(place.path("same"), "correct horse").unwrap();
    fs::write(place.path("wrong"), "battery\n").unwrap();
    fs::write(place.path("empty"), "\n").unwrap();
    assert!(place.hw("repo init e --passphrase-file empty").code(1).err.contains("is empty"));
    assert!(!place.path("e").exists());
    assert!(place.hw("repo init r --passphrase-file phrase").ok().out.contains("opened by the passphrase"));
    assert!(!place.path("config").exists(), "a key was made besides");
    place.hw("points r --passphrase-file same").ok();
    let wrong = place.hw("points r --passphrase-file wrong").code(1);
    assert!(wrong.err.contains("opens with this passphrase") && !wrong.err.contains("battery"), "{wrong:?}");
    words(&place, &["HIGHWATER_PASSPHRASE_FILE=same"], &["points", "r"]).ok();
    words(&place, &["HIGHWATER_PASSPHRASE_FILE=wrong"], &["points", "r", "--passphrase-file", "same"]).ok();
    words(&place, &["HIGHWATER_KEY_FILE=wrong"], &["points", "r", "--passphrase-file", "same"]).ok();
    let both = words(&place, &["HIGHWATER_KEY_FILE=k", "HIGHWATER_PASSPHRASE_FILE=same"], &["points", "r"]).code(1);
    assert!(both.err.contains("both set"), "{both:?}");
    words(&place, &["HIGHWATER_KEY_FILE=k"], &["repo", "init", "s"]).ok();
    assert!(place.path("k").exists() && !place.path("config").exists());
    words(&place, &["HIGHWATER_KEY_FILE=k"], &["repo", "check", "s"]).ok();
    place.hw("repo init open --no-encryption").ok();
    assert!(place.hw("repo stats open").ok().out.contains("encrypted: no"));
    assert!(place.hw("repo key add open --new-key-file k2").code(1).err.contains("not encrypted"));
    assert!(!place.path("k2").exists());
}

#[test]
fn keys_are_added_rotated_and_revoked() {
    let place = Place::new();
    let made = place.hw("repo init r --json").ok().json();
    let usual = text(&made, "key-file").to_owned();
    let keys = |more: &str| {
        let keys = place.hw(&format!("repo key list r --json {more}")).ok().json()["keys"].take();
        keys.as_array().unwrap().clone()
    };
    let first = text(&keys("")[0], "id").to_owned();
    assert!(place.hw(&format!("repo key revoke r {first}")).code(1).err.contains("the last one"));
    let added = words(&place, &[], &["repo", "key", "add", "r", "--new-key-file", "k", "--label", "in the safe"]).ok();
    assert!(added.out.contains("save it somewhere else"), "{added:?}");
    assert_eq!(mode(&place.path("k")), 0o600);
    fs::write(place.path("phrase"), "correct horse\n").unwrap();
    let phrase = place.hw("repo key add r --new-passphrase-file phrase --json").ok().json();
    assert_eq!(text(&phrase["added"], "opened-by"), "passphrase");
    assert_eq!(keys("--key-file k").len(), 3);
    let table = place.hw("repo key list r --passphrase-file phrase").ok().out;
    for word in ["in the safe", "first", "passphrase", "key file", &first] {
        assert!(table.contains(word), "{word} is not in {table}");
    }
    assert!(place.hw("repo key revoke r 0123456789abcdef").code(1).err.contains("repo key list"));
    // The generated key goes, and is told to be of no use where it is.
    let rotated = place.hw(&format!("repo key rotate r {} --new-key-file k2 --json", &first[..12])).ok().json();
    assert_eq!((text(&rotated, "revoked"), text(&rotated, "lapsed-file")), (&*first, &*usual));
    assert_eq!(text(&rotated["added"], "label"), "first", "the label stays");
    place.hw("points r").code(1);
    place.hw("points r --key-file k2").ok();
    fs::rename(place.path("k2"), &usual).unwrap();
    place.hw("points r").ok();
    // A damaged key is told, and is no obstacle.
    let id = text(&phrase["added"], "id");
    fs::write(place.path(&format!("r/keys/{id}")), "nothing").unwrap();
    let damaged = keys("").into_iter().find(|key| key["id"] == id).unwrap();
    assert!(damaged["damaged"].as_str().is_some_and(|reason| reason.contains("expected")), "{damaged}");
    let check = place.hw("repo check r --json").code(2).json();
    assert_eq!(text(&check["findings"][0], "object"), format!("keys/{id}"));
    place.hw(&format!("repo key revoke r {id}")).ok();
    place.hw("repo check r").ok();
    assert_eq!(keys("").len(), 2);
}

#[test]
fn a_killed_init_loses_no_key() {
    let place = Place::new();
    for round in 0..40_u64 {
        let name = format!("r{round}");
        let mut child = place.spawn(&format!("repo init {name}"));
        std::thread::sleep(Duration::from_micros(round * 400));
        let _ = child.kill();
        ended(child);
        if !place.path(&format!("{name}/config")).exists() {
            place.hw(&format!("repo init {name}")).ok();
            let keys = place.hw(&format!("repo key list {name} --json")).ok().json();
            assert_eq!(keys["keys"].as_array().unwrap().len(), 1, "what was left is no key of it");
        }
        let opens = place.hw(&format!("points {name}")).code == Some(0)
            || files(&place.path("config/highwater/keys")).iter().any(|key| {
                key.to_str().unwrap().contains("/new-")
                    && place.hw(&format!("points {name} --key-file {}", key.display())).code == Some(0)
            });
        assert!(opens, "round {round}: no key opens it");
    }
}

#[test]
fn points_are_listed_and_those_that_are_damaged_too() {
    let place = Place::new();
    let repository = open_repository(&place, "r");
    let content = noise(1, 3);
    let first = point(&repository, "web", NOON, &[("root", &content), ("data", &content[..LEAF + 512])]);
    let second = point(&repository, "db", NOON + DAY, &[("root", &content)]);
    let table = place.hw("points r").ok().out;
    for word in
        [&*first.id.to_string(), "2026-11-20 12:00:00 UTC", "web", "root 192 KiB full, data 64.5 KiB full", "db"]
    {
        assert!(table.contains(word), "{word} is not in {table}");
    }
    let json = place.hw("points r --json").ok().json();
    let listed = json["points"].as_array().unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!((text(&listed[0], "id"), text(&listed[0], "consistency")), (&*first.id.to_string(), "application"));
    assert_eq!(listed[0]["disks"][1]["size"], LEAF + 512);
    assert_eq!(listed[0]["disks"][0]["content"], listed[1]["disks"][0]["content"]);

    let file = place.path(&format!("r/points/{}", first.id));
    let mut bytes = fs::read(&file).unwrap();
    bytes[60] ^= 1;
    fs::write(&file, bytes).unwrap();
    let table = place.hw("points r").ok().out;
    let line = table.lines().find(|line| line.contains(&first.id.to_string())).unwrap();
    assert!(line.contains("damaged: ") && line.contains("2026-11-20 12:00:00"), "{table}");
    let json = place.hw("points r --json").ok().json();
    assert!(text(&json["points"][0], "damaged").contains("tag"), "{json}");
    assert_eq!(json["points"][0]["time"], NOON);
    assert!(json["points"][1]["damaged"].is_null());
    let found = place.hw("repo check r --json").code(2).json();
    assert_eq!(text(&found["findings"][0], "point"), first.id.to_string());
    // No policy judges it, and by its name it goes.
    let kept = place.hw("forget r --keep-last 1 --json").ok().json();
    assert_eq!((&kept["kept"][0]["reasons"][0], &kept["forgotten"]), (&"damaged".into(), &Value::Array(Vec::new())));
    place.hw(&format!("forget r {}", first.id)).ok();
    place.hw("repo check r").ok();
    assert_eq!(place.hw("points r --json").ok().json()["points"][0]["id"], second.id.to_string());
}

#[test]
fn damage_is_told_with_point_disk_and_range() {
    let place = Place::new();
    let repository = open_repository(&place, "r");
    let content = noise(2, 40);
    let whole = point(&repository, "m", NOON, &[("root", &content[..10 * LEAF])]);
    let hit = point(&repository, "m", NOON + DAY, &[("root", &content)]);
    let sound = place.hw("repo check r").ok().out;
    assert!(sound.contains("2 points"), "{sound}");
    let proven = place.hw("repo verify r --threads 3").ok().out;
    assert!(proven.starts_with("proven: 2 points, ") && proven.contains(" leaves"), "{proven}");
    let sample = place.hw("repo verify r --sample 10 --json").ok().json();
    assert_eq!((&sample["one-in"], &sample["sound"]), (&10.into(), &true.into()));
    assert!(sample["frames"].as_u64().unwrap() < 40);

    // The second point's pack has what the first one has not: leaves 10 to 39.
    let mut packs = files(&place.path("r/packs"));
    packs.sort_by_key(|pack| fs::metadata(pack).unwrap().len());
    let pack = packs.pop().unwrap();
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 0x10;
    fs::write(&pack, &bad).unwrap();
    place.hw("repo check r").ok(); // The structure is whole; the data is not.
    let found = place.hw("repo verify r --json").code(2).json();
    let findings = found["findings"].as_array().unwrap();
    assert_eq!((findings.len(), &found["sound"]), (1, &false.into()), "{found}");
    let finding = &findings[0];
    assert_eq!((text(finding, "point"), text(finding, "disk")), (&*hit.id.to_string(), "root"));
    assert_eq!(finding["length"], LEAF);
    let start = finding["start"].as_u64().unwrap();
    assert!(start.is_multiple_of(LEAF as u64) && (10 * LEAF as u64..40 * LEAF as u64).contains(&start), "{finding}");
    let listed = place.hw("repo verify r").code(2).out;
    assert!(listed.contains(&format!("{start:#x}")) && listed.contains("1 finding:"), "{listed}");
    let told = text(finding, "reason");
    assert!(told.contains("packs/") && told.contains("expected") && !told.contains("run verify"), "{told}");

    fs::remove_file(&pack).unwrap();
    let lost = place.hw("repo check r --json").code(2).json();
    let findings = lost["findings"].as_array().unwrap();
    assert!(!findings.is_empty() && findings.iter().all(|f| text(f, "point") == hit.id.to_string()), "{lost}");
    assert!(!lost.to_string().contains(&whole.id.to_string()), "{lost}");
    fs::write(&pack, &good).unwrap();
    place.hw("repo verify r").ok();
    // What cannot be looked at at all is no finding.
    fs::write(place.path("r/config"), "x").unwrap();
    assert!(place.hw("repo check r").code(1).err.contains("config"));
}

#[test]
fn policies_forget_and_prunes_give_space_back() {
    let place = Place::new();
    let repository = open_repository(&place, "r");
    let mut ids = Vec::new();
    for day in 0..6 {
        ids.push(point(&repository, "web", NOON + day * DAY, &[("root", &noise(day + 10, 8))]).id.to_string());
    }
    let other = point(&repository, "db", NOON, &[("root", &noise(9, 4))]).id.to_string();
    let stored = || place.hw("repo stats r --json").ok().json()["pack-bytes"].as_u64().unwrap();
    let listed = || -> Vec<String> {
        let json = place.hw("points r --json").ok().json();
        json["points"].as_array().unwrap().iter().map(|point| text(point, "id").to_owned()).collect()
    };
    let before = stored();
    let policy = "forget r --keep-last 1 --keep-daily 3 --keep-weekly 2";
    let dry = place.hw(&format!("{policy} --dry-run")).ok().out;
    assert_eq!(listed().len(), 7, "nothing is done");
    // The 20th is a Friday: weeks end with the 22nd and go on to the 25th.
    let verdicts = [
        (&ids[0], "would be forgotten"),
        (&ids[1], "would be forgotten"),
        (&ids[2], "kept: weekly"),
        (&ids[3], "kept: daily"),
        (&ids[4], "kept: daily"),
        (&ids[5], "kept: last, daily, weekly"),
        (&other, "kept: last, daily, weekly"),
    ];
    for (id, verdict) in verdicts {
        let line = dry.lines().find(|line| line.contains(id.as_str())).unwrap();
        assert!(line.contains(verdict), "{verdict}: {dry}");
    }
    // Another machine is not touched, whatever the policy.
    let vm = place.hw("forget r --keep-last 6 --vm web --json").ok().json();
    assert_eq!((vm["kept"].as_array().unwrap().len(), vm["forgotten"].as_array().unwrap().len()), (6, 0));
    assert!(place.hw("forget r --keep-last 1 --vm wbe").code(1).err.contains("\"wbe\""));
    assert!(place.hw("forget r --keep-last 0").code(1).err.contains("keeps no point"));
    let done = place.hw(policy).ok().out;
    assert!(done.contains(" forgotten") && done.contains("repo prune"), "{done}");
    assert_eq!(listed().len(), 5);

    // Named ones: all or none.
    let missing = place.hw(&format!("forget r {} ffff", ids[2])).code(1);
    assert!(missing.err.contains("no restore point ffff"), "{missing:?}");
    assert_eq!(listed().len(), 5);
    place.hw(&format!("forget r {}", &ids[2][..20])).ok();
    assert_eq!(listed().len(), 4);

    // Within the grace nothing goes; without one, it goes with the second prune.
    let waiting = place.hw("repo prune r --json").ok().json();
    assert_eq!((&waiting["points"], &waiting["packs"]), (&0.into(), &0.into()));
    assert_eq!(stored(), before);
    place.hw("repo prune r --grace 0").ok();
    let gone = place.hw("repo prune r --grace 0 --json").ok().json();
    assert!(gone["packs"].as_u64().unwrap() > 0, "{gone}");
    let after = stored();
    assert!(after < before * 30 / 52 + (1 << 20) && after > 0, "{before} became {after}");
    place.hw("repo verify r").ok();
    place.hw("repo check r").ok();
    place.hw("repo prune r --grace 1").code(1);
}

#[test]
fn two_points_differ_where_they_do() {
    let place = Place::new();
    let repository = open_repository(&place, "r");
    let old = noise(3, 20);
    let mut new = old.clone();
    new[2 * LEAF..4 * LEAF].copy_from_slice(&noise(4, 2));
    new[7 * LEAF..8 * LEAF].fill(0);
    new[8 * LEAF] ^= 1;
    new.extend(noise(5, 1));
    let a = point(&repository, "m", NOON, &[("root", &old), ("same", &old), ("old", &old)]).id.to_string();
    let b = point(&repository, "m", NOON + DAY, &[("root", &new), ("same", &old), ("new", &old)]).id.to_string();
    let json = place.hw(&format!("diff r {a} latest --json")).ok().json();
    assert_eq!((text(&json["old"], "id"), text(&json["new"], "id")), (&*a, &*b));
    let disk = |name: &str| json["disks"].as_array().unwrap().iter().find(|d| d["disk"] == name).unwrap().clone();
    let leaf = LEAF as u64;
    let range = |start: u64, leaves: u64, kind: &str| serde_json::json!({ "start": start * leaf, "length": leaves * leaf, "kind": kind });
    let root = disk("root");
    let expected = [range(2, 2, "data"), range(7, 1, "zero"), range(8, 1, "data"), range(20, 1, "data")];
    assert_eq!(root["ranges"].as_array().unwrap().as_slice(), expected);
    assert_eq!((&root["data"], &root["zero"]), (&(4 * leaf).into(), &leaf.into()));
    assert_eq!((&root["old-size"], &root["new-size"]), (&(20 * leaf).into(), &(21 * leaf).into()));
    assert_eq!(disk("same")["ranges"], Value::Array(Vec::new()));
    assert_eq!((text(&disk("old"), "presence"), text(&disk("new"), "presence")), ("removed", "added"));
    let table = place.hw(&format!("diff r {a} {b}")).ok().out;
    let line = |name: &str| table.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
    assert!(line("root").contains("256 KiB") && line("root").contains("64 KiB"), "{table}");
    assert!(line("same").contains("equal"), "{table}");
    assert!(line("old").contains("in A alone") && line("new").contains("in B alone"), "{table}");
    let back = place.hw(&format!("diff r {b} {a} --disk root --json")).ok().json();
    assert_eq!(back["disks"].as_array().unwrap().len(), 1);
    assert_eq!(back["disks"][0]["ranges"].as_array().unwrap().last().unwrap(), &range(20, 1, "zero"));
    assert!(place.hw(&format!("diff r {a} {b} --disk x")).code(1).err.contains("neither point has a disk \"x\""));
    assert!(place.hw(&format!("diff r {a} 0000")).code(1).err.contains("no restore point 0000"));
}
