//! A session of the repository, for I/O threads: its calls block, so each goes through the blocking pool.

use super::RepositorySpec;
use crate::EngineError;
use disk::Buf;
use repository::{Backup, BackupOptions, Counts, DiskPlan, Point, PointFacts, Repository};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// A session that makes one point; clones are the same one.
#[derive(Clone)]
pub(crate) struct Session {
    spec: RepositorySpec,
    leaf: u64,
    backup: Arc<Mutex<Option<Backup>>>,
}

impl Session {
    pub(super) async fn begin(
        spec: &RepositorySpec,
        repository: Repository,
        options: BackupOptions,
        plans: Vec<DiskPlan>,
    ) -> Result<Self, EngineError> {
        let leaf = u64::from(repository.settings().leaf_bytes);
        let begun = dataplane::offload_remote(move || Backup::begin(&repository, &options, plans)).await;
        let backup = begun.map_err(|e| spec.failed(e))?;
        Ok(Self { spec: spec.clone(), leaf, backup: Arc::new(Mutex::new(Some(backup))) })
    }

    pub(super) fn leaf_bytes(&self) -> u64 {
        self.leaf
    }

    async fn with<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Backup) -> Result<T, repository::RepositoryError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let backup = Arc::clone(&self.backup);
        let done = dataplane::offload_remote(move || {
            let mut backup = backup.lock().expect("no panic while the session is locked");
            backup.as_mut().map(call)
        });
        match done.await {
            Some(done) => done.map_err(|e| self.spec.failed(e)),
            None => Err(EngineError::Invalid("the backup has ended".to_owned())),
        }
    }

    /// Gives whole leaves of a disk, the first of which is `first`; only the disk's last one may be shorter.
    pub(super) async fn put(&self, disk: usize, first: u64, bytes: Buf) -> Result<(), EngineError> {
        let leaf = self.leaf as usize;
        let give = move |backup: &mut Backup| {
            let leaves = bytes.chunks(leaf).zip(first..);
            leaves.into_iter().try_for_each(|(bytes, index)| backup.put_leaf(disk, index, bytes))
        };
        self.with(give).await
    }

    /// Says that leaves are zero.
    pub(super) async fn zero(&self, disk: usize, leaves: Range<u64>) -> Result<(), EngineError> {
        self.with(move |backup| backup.zero(disk, leaves)).await
    }

    fn take(&self) -> Option<Backup> {
        self.backup.lock().expect("no panic while the session is locked").take()
    }

    /// Makes the point.
    pub(super) async fn finish(&self, facts: PointFacts) -> Result<(Point, Counts), EngineError> {
        let Some(backup) = self.take() else { return Err(EngineError::Invalid("the backup has ended".to_owned())) };
        dataplane::offload_remote(move || backup.finish(facts)).await.map_err(|e| self.spec.failed(e))
    }

    /// Makes none; what was stored is found by the next session.
    pub(super) async fn abandon(&self) {
        let Some(backup) = self.take() else { return };
        if let Err(error) = dataplane::offload_remote(move || backup.abandon()).await {
            tracing::debug!(%error, "the lease of a backup that was given up runs out by itself");
        }
    }
}
