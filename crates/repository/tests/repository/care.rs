//! Differences, extents, statistics, samples, and packing anew.

use crate::seeds::restored;
use crate::sessions::{back_up, noise};
use crate::simulation::{LEAF, fresh};
use repository::{ContentId, Extent, PruneOptions, RepositoryError, VerifyOptions};

#[test]
fn differences_are_those_of_the_contents() {
    testkit::seeds::each(30, |seed| {
        let (host, _, repository) = fresh(seed, true);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut content = noise(seed, 280);
        let (mut before, _) = back_up(&repository, &host, None, &content, 0..280);
        for _ in 0..4 {
            let old = content.clone();
            if random.u8(..3) == 0 {
                content.resize(random.usize(LEAF..LEAF * 300), 0);
            }
            let leaves = content.len().div_ceil(LEAF);
            let changed: Vec<usize> = (0..random.usize(..6)).map(|_| random.usize(..leaves)).collect();
            for n in &changed {
                let end = content.len().min((n + 1) * LEAF);
                content[n * LEAF..end].fill(random.u8(..3));
            }
            let (point, _) = back_up(&repository, &host, Some(&before), &content, changed);
            let found: Vec<_> = repository.differences(&before.disks[0], &point.disks[0]).map(|d| d.unwrap()).collect();
            let size = old.len().max(content.len());
            let leaf = |content: &[u8], n: usize| {
                let mut leaf = content.get(n * LEAF..content.len().min((n + 1) * LEAF)).unwrap_or_default().to_vec();
                leaf.resize(LEAF, 0);
                leaf
            };
            let expected: Vec<_> = (0..size.div_ceil(LEAF))
                .filter(|n| leaf(&old, *n) != leaf(&content, *n))
                .map(|n| {
                    ((n * LEAF) as u64..size.min((n + 1) * LEAF) as u64, leaf(&content, n).iter().all(|b| *b == 0))
                })
                .collect();
            assert_eq!(found, expected);
            let reader = repository.disk(&point.disks[0], 0);
            for extent in reader.extents(0..content.len() as u64) {
                match extent {
                    Extent::Zero(range) => {
                        assert!(content[range.start as usize..range.end as usize].iter().all(|b| *b == 0))
                    }
                    Extent::Data(range, id) => {
                        let leaf = leaf(&content, range.start as usize / LEAF);
                        assert_eq!(repository.leaf_id(&leaf), id);
                        assert_ne!(id, ContentId::ZERO);
                    }
                    Extent::Lost(_, e) => panic!("{e}"),
                }
            }
            before = point;
        }
    });
}

#[test]
fn what_is_little_needed_is_packed_anew() {
    let (host, store, repository) = fresh(1, true);
    let mut content = noise(1, 200);
    let (first, _) = back_up(&repository, &host, None, &content, 0..200);
    // Three of four leaves change, so that each old pack is needed a little.
    let changed: Vec<usize> = (0..200).filter(|n| n % 4 > 0).collect();
    let new = noise(2, 200);
    for n in &changed {
        content[n * LEAF..][..LEAF].copy_from_slice(&new[n * LEAF..][..LEAF]);
    }
    let (second, _) = back_up(&repository, &host, Some(&first), &content, changed);
    repository.forget(first.id).unwrap();
    let options = PruneOptions { grace_ms: 0, young_ms: 0, ..PruneOptions::default() };
    let before: usize = store.names("packs/").iter().map(|name| store.content(name).len()).sum();
    let mut repacked = 0;
    for _ in 0..6 {
        host.pass(10);
        repacked += repository.prune(&options).unwrap().repacked;
    }
    let after: usize = store.names("packs/").iter().map(|name| store.content(name).len()).sum();
    assert!(repacked > 10 && after < content.len() * 12 / 10 && before > after, "{repacked} {before} {after}");
    let mut random = fastrand::Rng::with_seed(3);
    assert!(restored(&repository, &second, &mut random).unwrap()[0].1 == content);
    assert!(repository.check().unwrap().findings.is_empty());
    // Building upon it works, also where leaves have moved.
    content[..LEAF].fill(5);
    let (third, _) = back_up(&repository, &host, Some(&second), &content, [0]);
    for _ in 0..6 {
        host.pass(10);
        repository.prune(&options).unwrap();
    }
    assert!(restored(&repository, &third, &mut random).unwrap()[0].1 == content);
}

#[test]
fn numbers_names_and_samples() {
    let (host, _, repository) = fresh(2, true);
    let content = noise(1, 400);
    let (first, counts) = back_up(&repository, &host, None, &content, 0..400);
    let stats = repository.stats().unwrap();
    assert_eq!((stats.points, stats.disk_bytes, stats.packs), (1, content.len() as u64, counts.packs));
    assert_eq!((stats.pack_bytes, stats.leases), (counts.pack_bytes, 0));
    let all = repository.verify(VerifyOptions::default()).unwrap();
    assert_eq!((all.frames, all.bytes), (400, content.len() as u64));
    let sample = repository.verify(VerifyOptions { one_in: 10, seed: 3, threads: 1 }).unwrap();
    assert!((10..90).contains(&sample.frames), "{}", sample.frames);
    assert_eq!(repository.find_point("latest").unwrap(), first);
    assert_eq!(repository.find_point(&first.id.to_string()[..14]).unwrap(), first);
    assert!(matches!(repository.find_point("ffff"), Err(RepositoryError::NoPoint { .. })));
    assert_eq!(first.attachments[0].1, b"cpus = 2");
}
