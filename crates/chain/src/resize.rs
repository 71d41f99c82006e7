//! Changing the size.

use crate::Chain;
use crate::background::Background;
use crate::stack::Stack;
use disk::{ByteRange, DiskError, ErrorKind, Operation, Preallocation, Result, ZeroMode};

impl Chain {
    /// Changes the top layer's size while no request is under way, and changes are not held.
    ///
    /// Two kinds of old bytes must not show where the disk grows: those of a parent that is longer than the
    /// top layer was, and those that an earlier shrink, or another program, left in the rest of a block that the
    /// old size cuts. Zeroes are put over both before the new size is durable.
    ///
    /// Crash: the old size, with zeroes out of reach behind it, or the new size with zeroes in what was added.
    pub(crate) async fn change_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let _exclusive = self.requests.exclude_to_change().await;
        if self.requests.is_closed() {
            return Err(DiskError::new(ErrorKind::Closed, Operation::Resize));
        }
        let layers = self.layers();
        let done = self.stack(&layers).change_size(size, preallocation).await;
        // The job beside the guest gets to know what became of it, also after a failure.
        let size = layers[0].handle.geometry().size;
        match self.background() {
            Some(Background::Mirror(mirror)) => mirror.follow_size(size).await,
            Some(Background::Infill(infill)) => infill.follow_size(size),
            None => {}
        }
        done
    }
}

impl Stack<'_> {
    async fn change_size(self, size: u64, preallocation: Preallocation) -> Result<()> {
        let top = self.top();
        let geometry = top.geometry();
        let old = geometry.size;
        let parent = self.layer(1).map_or(0, |layer| layer.geometry().size);
        let rest_of_block = old.checked_next_multiple_of(geometry.block).unwrap_or(old);
        let exposed = ByteRange::between(old, size.min(parent.max(rest_of_block)));
        if exposed.is_empty() {
            return top.resize(size, preallocation).await;
        }
        let done = match self.hide(size, exposed).await {
            Ok(()) => top.resize(size, preallocation).await,
            Err(error) => Err(error),
        };
        if done.is_err()
            && let Err(error) = top.extend(old).await
        {
            tracing::error!(%error, "the disk shows a size that it does not have; close and open it again");
        }
        done
    }

    /// Shows the new size, and puts zeroes over what must not be seen.
    async fn hide(self, size: u64, exposed: ByteRange) -> Result<()> {
        self.top().extend(size).await?;
        if self.reads_as_zero(exposed).await? {
            return Ok(());
        }
        self.zero_top(exposed, ZeroMode { unmap: true, fast_only: false }).await?;
        self.top().flush().await
    }

    /// Whether the layers say that the range is zero.
    async fn reads_as_zero(self, range: ByteRange) -> Result<bool> {
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
