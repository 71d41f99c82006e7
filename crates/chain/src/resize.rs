//! Changing the size.

use crate::Chain;
use disk::{ByteRange, Preallocation, Result, ZeroMode};

impl Chain {
    /// Changes the top layer's size while no request is under way.
    ///
    /// Two kinds of old bytes must not show where the disk grows: those of a parent that is longer than the
    /// top layer was, and those that an earlier shrink, or another program, left in the rest of a block that the
    /// old size cuts. Zeroes are put over both before the first request is let in again.
    pub(crate) async fn change_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let _exclusive = self.requests.exclude().await;
        let top = self.top();
        let geometry = top.geometry();
        let old = geometry.size;
        top.resize(size, preallocation).await?;
        let parent = self.layers.get(1).map_or(0, |l| l.handle.geometry().size);
        let block = geometry.unit.max(geometry.encoded_unit.unwrap_or(1));
        let rest_of_block = old.checked_next_multiple_of(block).unwrap_or(old);
        let exposed = ByteRange::between(old, size.min(parent.max(rest_of_block)));
        if exposed.is_empty() || self.reads_as_zero(exposed).await? {
            return Ok(());
        }
        let hidden = match self.zero_top(exposed, ZeroMode { unmap: true, fast_only: false }).await {
            Ok(()) => top.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = hidden {
            if let Err(again) = top.resize(old, Preallocation::Off).await {
                tracing::error!(%again, "the old size could not be restored: old bytes show behind it");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Whether the layers say that the range is zero.
    async fn reads_as_zero(&self, range: ByteRange) -> Result<bool> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.map_merged(rest).await?;
            if !extent.zero {
                return Ok(false);
            }
            rest = rest.skip(extent.range.len());
        }
        Ok(true)
    }
}
