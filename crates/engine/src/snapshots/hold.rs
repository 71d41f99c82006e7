//! Holding a disk's changes while something below them is exchanged.

use crate::EngineError;
use crate::images::stack::Stack;
use chain::{Chain, HeldWrites};
use std::time::Duration;
use tracking::Still;

/// How long a disk's requests under way are waited for; meanwhile its guest waits, too.
const HOLD_LIMIT: Duration = Duration::from_secs(10);

/// No byte of the disk changes while it lives, and nothing is parked; reads go on.
#[must_use = "the disk goes on when this is dropped"]
pub(crate) enum Hold {
    /// Of a disk with a history.
    Tracked { still: Still<Chain> },
    /// Of a disk without one.
    Plain { _held: HeldWrites },
}

impl Stack {
    /// Has the guest's changes wait, and waits for those under way.
    ///
    /// # Errors
    /// When they do not end; `otherwise` says what has become of the work then.
    pub(crate) async fn hold_changes(&self, otherwise: &str) -> Result<Hold, EngineError> {
        // It may be given up half-way, so it does nothing but wait.
        let hold = async {
            Ok::<_, EngineError>(match self.kept() {
                Ok(kept) => Hold::Tracked { still: kept.disk.hold_still().await },
                Err(_) => Hold::Plain { _held: self.chain().hold_writes().await? },
            })
        };
        let hold = dataplane::timeout(HOLD_LIMIT, hold).await.ok_or_else(|| {
            EngineError::Invalid(format!(
                "{}: requests under way did not end within {} s, so {otherwise}; its storage may hang",
                self.image().display(),
                HOLD_LIMIT.as_secs()
            ))
        })??;
        if let Hold::Tracked { still } = &hold {
            still.wait_for_parked().await?;
        }
        Ok(hold)
    }
}
