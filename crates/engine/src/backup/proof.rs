//! What a disk held at a restore point, as its leaves' hashes tell: what a history calls unchanged since is proven by it.

use super::RepositorySpec;
use super::find::Opened;
use super::plan::mark_of;
use crate::EngineError;
use crate::history::PointContent;
use disk::{Buf, LocalFuture};
use repository::{DiskReader, Extent, Repository, RepositoryError};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use utoipa::ToSchema;

/// A disk of a restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PointSpec {
    /// Where it is.
    pub repository: RepositorySpec,
    /// The point: its id, as many of its first digits as tell it from others, or `latest`.
    pub point: String,
    /// Of which machine, when `latest` could be of several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Which disk of it, if it has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// It is open.
pub(crate) struct Proof {
    spec: RepositorySpec,
    repository: Repository,
    reader: Arc<DiskReader>,
    /// Name and id of the mark that was taken for it, if one was.
    pub(crate) mark: Option<(String, String)>,
}

impl Proof {
    pub(crate) async fn open(spec: PointSpec) -> Result<Self, EngineError> {
        dataplane::offload_remote(move || {
            let Opened { repository, disk, .. } = Opened::find(&spec)?;
            let reader = Arc::new(repository.disk(&disk, 0));
            Ok(Self { spec: spec.repository, repository, reader, mark: mark_of(&disk) })
        })
        .await
    }
}

impl PointContent for Proof {
    fn held<'a>(&'a self, offset: u64, bytes: &'a Buf) -> LocalFuture<'a, Result<Option<bool>, EngineError>> {
        let (repository, reader, bytes) = (self.repository.clone(), Arc::clone(&self.reader), Buf::copy_of(bytes));
        let compared = dataplane::offload_remote(move || is_equal(&repository, &reader, offset, &bytes));
        Box::pin(async move { compared.await.map(Some).map_err(|e| self.spec.failed(e)) })
    }
}

/// Whether the disk of the point holds these bytes; behind its end it held zeroes.
pub(super) fn is_equal(
    repository: &Repository,
    reader: &DiskReader,
    offset: u64,
    bytes: &[u8],
) -> Result<bool, RepositoryError> {
    let inside = reader.size().saturating_sub(offset).min(bytes.len() as u64);
    let (bytes, behind) = bytes.split_at(inside as usize);
    if behind.iter().any(|byte| *byte != 0) {
        return Ok(false);
    }
    let end = offset + inside;
    for extent in reader.extents(offset..end) {
        let (range, id) = match extent {
            Extent::Zero(range) => (range, None),
            Extent::Data(range, id) => (range, Some(id)),
            Extent::Lost(_, error) => return Err(error),
        };
        let (from, to) = (range.start.max(offset), range.end.min(end));
        let held = &bytes[(from - offset) as usize..(to - offset) as usize];
        let equal = match id {
            None => held.iter().all(|byte| *byte == 0),
            Some(id) if (from, to) == (range.start, range.end) => repository.leaf_id(held) == id,
            Some(_) => {
                let mut then = vec![0; held.len()];
                reader.read(from, &mut then)?;
                then == held
            }
        };
        if !equal {
            return Ok(false);
        }
    }
    Ok(true)
}
