//! Zeroes and discards: whole units by the layer, the rest as written bytes.

use crate::stack::Stack;
use disk::{Buf, ByteRange, DiskError, ErrorKind, LayerHandle, Operation, Result, ZeroMode};

/// Zero bytes that are written at a time.
const STEP: u64 = 1 << 20;

impl Stack<'_> {
    /// Makes the range read as zero.
    pub(crate) async fn zero_top(self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let top = self.top();
        let whole = whole_units(top, range);
        if whole.is_empty() {
            return match mode.fast_only {
                true => Err(DiskError::new(ErrorKind::NotFast, Operation::WriteZeroes).at(range)),
                false => self.write_zero_bytes(range).await,
            };
        }
        // The units first: when they cannot be zeroed fast, nothing has been changed.
        match top.write_zeroes(whole, self.below(whole), mode).await {
            Err(error) if error.kind() == ErrorKind::Unsupported && mode.fast_only => {
                return Err(DiskError::new(ErrorKind::NotFast, Operation::WriteZeroes).at(range).caused_by(error));
            }
            Err(error) if error.kind() == ErrorKind::Unsupported => self.write_zero_bytes(whole).await?,
            other => other?,
        }
        for edge in [ByteRange::between(range.offset(), whole.offset()), ByteRange::between(whole.end(), range.end())] {
            let is_so = edge.is_empty() || mode.unmap && self.is_zero_cached(0, edge);
            if !is_so {
                self.write_zero_bytes(edge).await?;
            }
        }
        Ok(())
    }

    /// Gives back the whole units of the range; the rest stays as it is.
    pub(crate) async fn discard_top(self, range: ByteRange) -> Result<()> {
        let top = self.top();
        let whole = whole_units(top, range);
        if whole.is_empty() {
            return Ok(());
        }
        match top.discard(whole, self.below(whole)).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()), // Staying as before is allowed.
            other => other,
        }
    }

    pub(crate) async fn write_zero_bytes(self, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let step = rest.prefix(STEP);
            self.write_top(step.offset(), Buf::zeroed(step.len() as usize)).await?;
            rest = rest.skip(step.len());
        }
        Ok(())
    }
}

/// The whole units of the range; the disk's last one counts as whole when the range reaches its end.
pub(crate) fn whole_units(layer: &LayerHandle, range: ByteRange) -> ByteRange {
    let geometry = layer.geometry();
    let inner = range.align_in(geometry.unit);
    if range.end() != geometry.size || range.end().is_multiple_of(geometry.unit) {
        return inner;
    }
    match range.offset().checked_next_multiple_of(geometry.unit) {
        Some(start) if start < range.end() => ByteRange::between(start, range.end()),
        _ => inner,
    }
}
