//! Random lives of a disk and its two repositories, with the real daemon: writes, zeroes, discards, resizes, backups, kills, forgotten
//! points and prunes. Every point that is kept shows what the disk held at its instant.
//!
//! `HIGHWATER_ROUNDS` multiplies the lives, `HIGHWATER_SEED` replays one.

use crate::daemon::Daemon;
use crate::snapshots::{equal, uri};
use crate::support::until;
use std::collections::BTreeMap;
use std::fs;

const LIVES: u64 = 2;
const STEPS: usize = 30;
const MIB: u64 = 1 << 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn every_kept_point_shows_its_instant() {
    let lives = match number("HIGHWATER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..LIVES * number("HIGHWATER_ROUNDS").unwrap_or(1),
    };
    for seed in lives {
        println!("HIGHWATER_SEED={seed}");
        live(seed);
    }
}

struct Life {
    daemon: Daemon,
    dice: fastrand::Rng,
    /// Bytes of the disk.
    size: u64,
    /// What each point of each repository holds.
    points: BTreeMap<(usize, String), String>,
    truths: usize,
}

impl Life {
    fn change(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..self.dice.usize(1..12) {
            let most = if self.dice.bool() { 40 } else { 4000 };
            let len = 512 * self.dice.u64(1..most);
            let offset = 512 * self.dice.u64(0..self.size / 512);
            let len = len.min(self.size - offset);
            commands.push(match self.dice.u8(0..6) {
                0 => format!("write -z {offset} {len}"),
                1 => format!("write -z -u {offset} {len}"),
                _ => format!("write -P {} {offset} {len}", self.dice.u8(1..)),
            });
        }
        commands.push("flush".to_owned());
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let uri = uri(&self.daemon, "d");
        self.daemon.place.qemu_io("raw", &uri, &commands);
        self.daemon.place.qemu_io("raw", "truth.raw", &commands);
    }

    fn resize(&mut self) {
        self.size = MIB * self.dice.u64(4..24) + 512 * self.dice.u64(0..200);
        self.daemon.hw(&format!("resize d {} --shrink", self.size)).ok();
        fs::File::options().write(true).open(self.daemon.place.path("truth.raw")).unwrap().set_len(self.size).unwrap();
    }

    fn back_up(&mut self) {
        let repository = self.dice.usize(0..2);
        let more = if self.dice.u8(0..6) == 0 { "--compare" } else { "" };
        if self.dice.u8(0..4) == 0 {
            // Killed in the midst of it; begun again, and the guest has not written meanwhile.
            let directory = self.daemon.place.path(&format!("repo{repository}"));
            let job =
                format!(r#"{{"job":"backup","disks":["d"],"repository":{{"directory":"{}"}}}}"#, directory.display());
            fs::write(self.daemon.place.path("job.json"), job).unwrap();
            self.daemon.hw("jobs start job.json").ok();
            std::thread::sleep(std::time::Duration::from_millis(self.dice.u64(0..80)));
            self.daemon.server.take().unwrap().kill();
            self.daemon.start();
            until("the jobs have ended", || {
                let jobs = self.daemon.hw("--json jobs list").ok().json();
                jobs["jobs"].as_array().unwrap().iter().all(|job| job["state"] != "running")
            });
            for job in self.daemon.hw("--json jobs list").ok().json()["jobs"].as_array().unwrap() {
                assert_eq!(job["state"], "done", "{job}");
                self.daemon.hw(&format!("jobs forget {}", job["id"])).ok();
            }
        } else {
            self.daemon.hw(&format!("backup d repo{repository} {more}")).ok();
        }
        let truth = format!("truth{}.raw", self.truths);
        self.truths += 1;
        fs::copy(self.daemon.place.path("truth.raw"), self.daemon.place.path(&truth)).unwrap();
        for point in self.listed(repository) {
            // One that a killed job had made, and the one that was made after it, hold the same.
            self.points.entry((repository, point)).or_insert_with(|| truth.clone());
        }
    }

    fn listed(&self, repository: usize) -> Vec<String> {
        let points = self.daemon.place.hw(&format!("--json points repo{repository}")).ok().json();
        let points = points["points"].as_array().unwrap();
        points.iter().map(|point| point["id"].as_str().expect("an id").to_owned()).collect()
    }

    fn forget(&mut self) {
        let Some(gone) = self.points.keys().nth(self.dice.usize(0..self.points.len().max(1))).cloned() else { return };
        self.daemon.place.hw(&format!("forget repo{} {}", gone.0, gone.1)).ok();
        self.points.remove(&gone);
        if self.dice.bool() {
            self.daemon.place.hw(&format!("repo prune repo{} --grace 0s", gone.0)).ok();
        }
    }

    fn judge(&self) {
        for ((repository, point), truth) in &self.points {
            self.daemon.place.hw(&format!("restore repo{repository} {point} t.qcow2 -O qcow2")).ok();
            equal(&self.daemon.place, ("raw", truth), ("qcow2", "t.qcow2"));
            fs::remove_file(self.daemon.place.path("t.qcow2")).unwrap();
        }
        for repository in 0..2 {
            let kept: Vec<&String> = self.points.keys().filter(|(r, _)| *r == repository).map(|(_, id)| id).collect();
            let listed = self.listed(repository);
            assert_eq!(listed.iter().collect::<Vec<_>>(), kept);
            self.daemon.place.hw(&format!("repo verify repo{repository}")).ok();
        }
    }
}

fn live(seed: u64) {
    let daemon = Daemon::new();
    let size = 16 * MIB;
    daemon.place.raw("truth.raw", size);
    daemon.place.hw("convert truth.raw d.qcow2").ok();
    daemon.hw("disk add d.qcow2").ok();
    for repository in 0..2 {
        let leaf = ["16k", "64k"][repository];
        daemon.place.hw(&format!("repo init repo{repository} --leaf-size {leaf}")).ok();
    }
    let dice = fastrand::Rng::with_seed(seed);
    let mut life = Life { daemon, dice, size, points: BTreeMap::new(), truths: 0 };
    for _ in 0..STEPS {
        match life.dice.u8(0..10) {
            0..4 => life.change(),
            4..8 => life.back_up(),
            8 => life.resize(),
            _ => life.forget(),
        }
    }
    life.judge();
    life.daemon.end();
}
