//! Proving the history: what it calls unchanged since a mark is read, and compared with what the disk held at the mark.
//!
//! What the disk held is somebody else's knowledge: a copy that was made at the mark, or a backup's hashes. The guest may
//! write on: a range that differs is asked for again, and only one that is still called unchanged is a failure.

use super::HistorySource;
use super::offline::{name_of, open_with_history};
use super::report::KindOfChange;
use crate::EngineError;
use crate::backup::{PointSpec, Proof};
use crate::images::request::SourceSpec;
use crate::images::stack::Stack;
use crate::images::{Progress, Workshop, closing, open_source};
use disk::{Buf, ByteRange, LocalFuture};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes that are read at a time.
const STEP: u64 = 1 << 20;
/// Changes that one question brings.
const CHANGES: usize = 4096;
/// Failures that are told one by one.
const TOLD: usize = 64;

/// What a disk held at a mark, as far as somebody knows.
pub(crate) trait PointContent {
    /// Whether these bytes stood at `offset` then. `None`: nobody knows.
    fn held<'a>(&'a self, offset: u64, bytes: &'a Buf) -> LocalFuture<'a, Result<Option<bool>, EngineError>>;
}

/// A copy of the disk, made at the mark.
struct Copy(Stack);

impl PointContent for Copy {
    fn held<'a>(&'a self, offset: u64, bytes: &'a Buf) -> LocalFuture<'a, Result<Option<bool>, EngineError>> {
        Box::pin(async move {
            let inside = self.0.disk().geometry().size.saturating_sub(offset).min(bytes.len() as u64) as usize;
            let then = self.0.disk().read(offset, Buf::new(inside)).await?;
            // What lies behind a copy's end was zero, as in every other comparison.
            Ok(Some(then[..] == bytes[..inside] && bytes[inside..].iter().all(|b| *b == 0)))
        })
    }
}

/// An audit of a disk's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AuditSpec {
    /// The disk: one of the daemon, or an image that nobody uses.
    pub source: SourceSpec,
    /// The history's file, if it is not beside the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub history_file: Option<std::path::PathBuf>,
    /// What is called unchanged since this mark is looked at; a restore point has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// A copy of the disk that was made at the mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<SourceSpec>,
    /// Instead of a copy: a restore point that was made at the mark.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<PointSpec>,
    /// How much to look at, in percent of what is called unchanged, chosen at random; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<u8>,
}

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct AuditReport {
    /// Whether everything looked at was as the history says.
    pub proved: bool,
    /// Bytes called unchanged that were compared.
    pub checked: u64,
    /// Bytes called unchanged in all.
    pub unchanged: u64,
    /// Bytes called zero or discarded that were read.
    pub zero: u64,
    /// Bytes of steps that differ though they are called unchanged, or are not zero though they are called so.
    pub wrong: u64,
    /// Where: offsets and lengths of steps, up to a bound.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<(u64, u64)>,
}

impl AuditReport {
    fn fail(&mut self, range: ByteRange) {
        self.wrong += range.len();
        if self.failures.len() < TOLD {
            self.failures.push((range.offset(), range.len()));
        }
    }
}

/// A range of the disk and what the history says of it: `None` for unchanged.
struct Claim {
    range: ByteRange,
    kind: Option<KindOfChange>,
}

/// What the history says of a range now.
async fn claims(stack: &Stack, since: &str, range: ByteRange) -> Result<Vec<Claim>, EngineError> {
    let mut claims = Vec::new();
    let mut at = range.offset();
    let mut next = Some(range.offset());
    while let Some(from) = next.filter(|from| *from < range.end()) {
        let (ranges, then) = stack.changes_between(since, from, range.end(), CHANGES).await?;
        for changed in &ranges {
            let changed_range = ByteRange::new(changed.start, changed.length).intersect(range);
            if changed_range.is_empty() {
                continue;
            }
            if changed_range.offset() > at {
                claims.push(Claim { range: ByteRange::between(at, changed_range.offset()), kind: None });
            }
            claims.push(Claim { range: changed_range, kind: Some(changed.kind) });
            at = changed_range.end();
        }
        next = then;
    }
    if at < range.end() {
        claims.push(Claim { range: ByteRange::between(at, range.end()), kind: None });
    }
    Ok(claims)
}

/// Audits a stack against what somebody knows.
pub(crate) async fn audit(
    stack: &Stack,
    since: &str,
    content: &dyn PointContent,
    sample: Option<u8>,
    progress: &Progress,
) -> Result<AuditReport, EngineError> {
    let size = stack.disk().geometry().size;
    let mut report = AuditReport::default();
    progress.set_total(size);
    let mut dice = Dice::new();
    let mut rest = ByteRange::new(0, size);
    while !rest.is_empty() {
        progress.pace(0).await?;
        let step = rest.prefix(STEP);
        for Claim { range, kind } in claims(stack, since, step).await? {
            match kind {
                Some(KindOfChange::Data) => {}
                Some(KindOfChange::Zero | KindOfChange::Discarded) => {
                    report.zero += range.len();
                    progress.pace(range.len()).await?;
                    let bytes = stack.disk().read(range.offset(), Buf::new(range.len() as usize)).await?;
                    if bytes.iter().any(|b| *b != 0) && still_claimed(stack, since, range, kind).await? {
                        report.fail(range);
                    }
                }
                None => {
                    report.unchanged += range.len();
                    if sample.is_some_and(|percent| !dice.hits(percent)) {
                        continue;
                    }
                    progress.pace(range.len()).await?;
                    let bytes = stack.disk().read(range.offset(), Buf::new(range.len() as usize)).await?;
                    let held = content.held(range.offset(), &bytes).await?;
                    report.checked += if held.is_some() { range.len() } else { 0 };
                    if held == Some(false) && still_claimed(stack, since, range, kind).await? {
                        report.fail(range);
                    }
                }
            }
        }
        progress.advance(step.len());
        rest = rest.skip(step.len());
    }
    report.proved = report.wrong == 0;
    Ok(report)
}

/// Whether the history says the same of all of the range as before it was read.
async fn still_claimed(
    stack: &Stack,
    since: &str,
    range: ByteRange,
    kind: Option<KindOfChange>,
) -> Result<bool, EngineError> {
    let now = claims(stack, since, range).await?;
    Ok(matches!(&now[..], [one] if one.range == range && one.kind == kind))
}

/// Chance, without a need for quality.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        let seed = super::host::random_id().0;
        Self(u64::from_le_bytes([seed[0], seed[1], seed[2], seed[3], seed[4], seed[5], seed[6], seed[7]]) | 1)
    }

    fn hits(&mut self, percent: u8) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % 100 < u64::from(percent)
    }
}

impl Workshop {
    /// Compares what a history calls unchanged since a mark with a copy that was made at the mark.
    ///
    /// # Errors
    /// When a mark is missing or refused, or something cannot be read.
    pub async fn audit(&self, spec: AuditSpec, progress: Progress) -> Result<AuditReport, EngineError> {
        if spec.sample.is_some_and(|percent| !(1..=100).contains(&percent)) {
            return Err(EngineError::Invalid("a sample is 1 to 100 percent".to_owned()));
        }
        if let Some(live) = spec.source.live.clone() {
            // Beside the disk, as its guest's requests are.
            return live.home.with(move |stack| async move { against(&stack, &spec, &progress).await }).await;
        }
        self.run(move || async move {
            let history = super::HistorySpec { file: spec.history_file.clone(), ..super::HistorySpec::default() };
            let source = HistorySource { file: spec.source.file.clone(), format: spec.source.format, history };
            let stack = open_with_history(&source, false).await?;
            tracing::debug!(image = name_of(&source), "audited");
            let report = against(&stack, &spec, &progress).await;
            closing(&stack, report).await
        })
        .await
    }
}

async fn against(stack: &Stack, spec: &AuditSpec, progress: &Progress) -> Result<AuditReport, EngineError> {
    match (&spec.against, &spec.point, &spec.since) {
        (Some(copy), None, Some(since)) => {
            let copy = Copy(open_source(copy).await?);
            let report = audit(stack, since, &copy, spec.sample, progress).await;
            closing(&copy.0, report).await
        }
        (None, Some(point), None) => {
            let proof = Proof::open(point.clone()).await?;
            let invalid =
                |why: &str| EngineError::Invalid(format!("{}: {why}; it proves nothing of changes", point.point));
            let (name, id) = proof.mark.clone().ok_or_else(|| invalid("no mark was taken for this restore point"))?;
            match stack.mark_named("", &name) {
                Ok(mark) if mark.id == id => audit(stack, &name, &proof, spec.sample, progress).await,
                _ => Err(invalid("the disk's history does not have the mark that was taken for this restore point")),
            }
        }
        _ => Err(EngineError::Invalid(
            "an audit is against a copy that was made at a mark (--since, --against), or against a restore point \
             (--repository)"
                .to_owned(),
        )),
    }
}
