//! What is told about a job.

use crate::JobKind;
use crate::images::ProgressUnit;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// At work.
    Running,
    /// Held up on request, until it is resumed.
    Paused,
    /// Ended well; `result` says what came out.
    Done,
    /// Ended badly; `error` says why.
    Failed,
    /// Stopped on request.
    Cancelled,
    /// The daemon ended while it was at work. `error` says whether it goes on.
    Interrupted,
}

impl JobState {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether nothing works on it any more.
    pub const fn has_ended(self) -> bool {
        !matches!(self, Self::Running | Self::Paused)
    }
}

/// One job, as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct JobStatus {
    /// Its number.
    pub id: u64,
    /// What it is to do.
    pub kind: JobKind,
    /// Where it is in its life.
    pub state: JobState,
    /// Part done, 0 to 100.
    pub percent: u8,
    /// How much is done.
    #[serde(default)]
    pub done: u64,
    /// How much there is to do in all; 0 while that is not known.
    #[serde(default)]
    pub total: u64,
    /// What `done` and `total` count.
    #[serde(default)]
    pub unit: ProgressUnit,
    /// How much is done in a second, of late; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Seconds until it is done if it goes on at that rate; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// How many bytes a second it may move; absent when there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<u64>,
    /// When it began, in seconds since 1970.
    #[serde(default)]
    pub started: u64,
    /// When it ended, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// What came out, as the command of the same name shows it with `--json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
