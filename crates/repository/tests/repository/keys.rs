//! Keys: several, added, rotated, revoked; a wrong one is told from a damaged one.

use crate::simulation::{SimulatedHost, SimulatedStore, fresh, key, settings};
use repository::{KeyKind, Repository, RepositoryError, Stretch, Unlock, new_key_file};

const QUICK: Stretch = Stretch { memory_kib: 64, passes: 1 };

#[test]
fn each_key_opens_until_it_is_revoked() {
    let (host, store, repository) = fresh(1, true);
    let open = |key: &Unlock| Repository::open(store.clone(), host.clone(), key);
    let phrase = Unlock::Passphrase("correct horse".into());
    let added = repository.add_key(&phrase, QUICK, "Anna").unwrap();
    assert_eq!(open(&phrase).unwrap().id(), repository.id());
    assert!(open(&key()).is_ok());
    let wrong = open(&Unlock::Passphrase("wrong".into())).err().unwrap();
    assert!(matches!(wrong, RepositoryError::WrongKey { count: 1, .. }), "{wrong}");
    assert!(matches!(open(&Unlock::Open).err().unwrap(), RepositoryError::WrongKey { count: 0, .. }));

    let next = Unlock::KeyFile(new_key_file(&repository::SystemHost).unwrap());
    let rotated = repository.rotate_key(added.id, &next, QUICK, "Anna, new").unwrap();
    assert!(open(&next).is_ok());
    assert!(matches!(open(&phrase).err().unwrap(), RepositoryError::WrongKey { count: 0, .. }));
    let mut kinds: Vec<_> =
        repository.keys().unwrap().into_iter().map(|k| k.unwrap()).map(|k| (k.label, k.kind)).collect();
    kinds.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(kinds, [("Anna, new".to_owned(), KeyKind::KeyFile), ("first".to_owned(), KeyKind::KeyFile)]);

    let first = repository.keys().unwrap().into_iter().map(|k| k.unwrap()).find(|k| k.id != rotated.id).unwrap();
    repository.revoke_key(first.id).unwrap();
    assert!(open(&key()).is_err());
    assert!(matches!(repository.revoke_key(rotated.id), Err(RepositoryError::Invalid(_))));
    assert!(open(&next).is_ok());
}

#[test]
fn damage_is_not_called_a_wrong_key() {
    let (host, store, _) = fresh(2, true);
    let name = store.names("keys/").remove(0);
    let good = store.content(&name);
    for bit in (0..good.len() * 8).step_by(7) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        store.replace(&name, Some(bad));
        let error = Repository::open(store.clone(), host.clone(), &key()).err().unwrap();
        assert_eq!(error.damage().map(|d| d.object.as_str()), Some(name.as_str()), "{error}");
    }
    // One good key is enough.
    store.replace(&name, Some(good));
    let repository = Repository::open(store.clone(), host.clone(), &key()).unwrap();
    repository.add_key(&Unlock::Passphrase("x".into()), QUICK, "").unwrap();
    store.replace(&name, Some(b"nothing".to_vec()));
    assert!(Repository::open(store.clone(), host.clone(), &Unlock::Passphrase("x".into())).is_ok());
    assert_eq!(repository.keys().unwrap().iter().filter(|k| k.is_err()).count(), 1);
}

#[test]
fn a_crash_of_init_or_rotation_leaves_a_way_in() {
    for calls in 0..12 {
        let host = SimulatedHost::new(3);
        let store = SimulatedStore::new(calls, host.clone());
        let init = || Repository::init(store.clone(), host.clone(), settings(true), &key(), QUICK, "");
        store.crash_after(calls);
        let made = init();
        store.revive();
        let repository = match made {
            Ok(repository) => repository,
            Err(_) if store.names("config").is_empty() => init().unwrap(),
            Err(_) => Repository::open(store.clone(), host.clone(), &key()).unwrap(),
        };
        assert!(matches!(init().err().unwrap(), RepositoryError::Exists { .. }));
        let old = repository.keys().unwrap().remove(0).unwrap();
        store.crash_after(calls);
        let rotated = repository.rotate_key(old.id, &Unlock::Passphrase("new".into()), QUICK, "");
        store.revive();
        let opens = |key: &Unlock| Repository::open(store.clone(), host.clone(), key).is_ok();
        assert!(opens(&key()) || opens(&Unlock::Passphrase("new".into())));
        assert!(rotated.is_err() || opens(&Unlock::Passphrase("new".into())));
    }
}
