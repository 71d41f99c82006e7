//! What a history is asked.

use super::report::{ChangedRange, ChangesReport, HistoryReport, MarkReport};
use crate::EngineError;
use crate::images::stack::Stack;
use tracking::{Change, HistoryError};

impl Stack {
    fn failed(&self, error: HistoryError) -> EngineError {
        match self.kept() {
            Ok(kept) => EngineError::History { file: kept.file.clone(), source: error },
            Err(none) => none,
        }
    }

    /// The history's facts.
    pub(crate) fn history_report(&self) -> HistoryReport {
        match self.history() {
            Ok(kept) => {
                let (history, file) = (kept.history(), kept.file.display().to_string());
                HistoryReport::of(history.info(), &history.points(), file, kept.distrust.clone())
            }
            Err(reason) => HistoryReport::none(reason),
        }
    }

    fn granule(&self) -> Result<u64, EngineError> {
        Ok(self.kept()?.history().info().granule)
    }

    /// All marks, oldest first.
    pub(crate) fn marks(&self, disk: &str) -> Result<Vec<MarkReport>, EngineError> {
        let granule = self.granule()?;
        Ok(self.kept()?.history().points().iter().map(|point| MarkReport::of(disk, point, granule)).collect())
    }

    /// One mark.
    pub(crate) fn mark_named(&self, disk: &str, name: &str) -> Result<MarkReport, EngineError> {
        let granule = self.granule()?;
        let point = self.kept()?.history().point(name).map_err(|e| self.failed(e))?;
        Ok(MarkReport::of(disk, &point, granule))
    }

    /// Forgets a mark.
    pub(crate) async fn delete_mark(&self, name: &str) -> Result<(), EngineError> {
        self.kept()?.history().delete_point(name).await.map_err(|e| self.failed(e))
    }

    /// Trusts all marks again, on the user's word.
    pub(crate) async fn trust_history(&self) -> Result<(), EngineError> {
        self.kept()?.history().trust().await.map_err(|e| self.failed(e))
    }

    /// What changed in `from..end`, up to about `most` ranges.
    pub(crate) async fn changes_between(
        &self,
        since: &str,
        from: u64,
        end: u64,
        most: usize,
    ) -> Result<(Vec<ChangedRange>, Option<u64>), EngineError> {
        let history = self.kept()?.history();
        let query = history.changes(since, None).map_err(|e| self.failed(e))?.up_to(end);
        let span = history.next_changes(&query, from, most).await.map_err(|e| self.failed(e))?;
        Ok((span.changes.iter().map(changed).collect(), span.next))
    }

    /// What changed, from byte `from` on, up to about `most` ranges.
    pub(crate) async fn changes(
        &self,
        disk: &str,
        since: &str,
        until: Option<&str>,
        from: u64,
        most: usize,
    ) -> Result<ChangesReport, EngineError> {
        let history = self.kept()?.history();
        let query = history.changes(since, until).map_err(|e| self.failed(e))?;
        let span = history.next_changes(&query, from, most).await.map_err(|e| self.failed(e))?;
        let info = history.info();
        Ok(ChangesReport {
            disk: disk.to_owned(),
            since: MarkReport::of(disk, &query.since, info.granule),
            until: query.until.as_ref().map(|point| MarkReport::of(disk, point, info.granule)),
            lineage: info.lineage.to_string(),
            size: query.size,
            granule: info.granule,
            ranges: span.changes.iter().map(changed).collect(),
            next: span.next,
        })
    }
}

fn changed(change: &Change) -> ChangedRange {
    ChangedRange { start: change.range.offset(), length: change.range.len(), kind: change.kind.into() }
}
