//! Writing to the top layer: in place, or into new blocks that are filled first.

use crate::stack::Stack;
use disk::{
    Buf, ByteRange, DiskError, ErrorKind, Fill, LayerHandle, Operation, PreparedWrite, Result, StorageHandle, Ticket,
    WriteFlags, ZeroMode,
};
use futures_util::future::{Either, join3, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::pin::pin;

/// Plans of one request that are carried out at the same time.
const PLANS_AT_ONCE: usize = 32;
/// Up to this many bytes a write is copied into one buffer with its fill, which then goes out as one
/// request; longer ones are written where they stand, beside their fill.
const COPIED_MAX: u64 = 128 << 10;
/// From this many bytes on, zeroes around a write are left to the storage instead of being written.
const ZEROED_MIN: u64 = 256 << 10;

impl Stack<'_> {
    /// Writes all of `buf` from `offset`.
    pub(crate) async fn write_top(self, offset: u64, buf: Buf) -> Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let top = self.top();
        let guard = top.guard();
        let result = match top.prepare_cached(range) {
            Some(plan) if plan.range == range => top.storage(plan.storage).write(plan.offset, buf).await.map(drop),
            _ => Box::pin(self.write_planned(top, range, buf)).await,
        };
        drop(guard);
        result
    }

    /// Makes a write durable if its flags ask for it.
    pub(crate) async fn finish_write(self, flags: WriteFlags) -> Result<()> {
        match flags.fua {
            true => self.top().flush().await,
            false => Ok(()),
        }
    }

    /// Plans the write piece by piece. Earlier pieces are carried out while later ones are planned: a later
    /// one may have to wait for an earlier one's commit. A guard of the layer is held.
    async fn write_planned(self, top: &LayerHandle, range: ByteRange, mut buf: Buf) -> Result<()> {
        let first = top.prepare_write(range, self.below(range)).await?;
        let planned = first.plan().range;
        if planned == range {
            return self.carry_out(top, first, buf).await;
        }
        let mut running = FuturesUnordered::new();
        running.push(self.carry_out(top, first, buf.split_to(planned.len() as usize)));
        let mut rest = range.skip(planned.len());
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            let prepared = {
                let mut prepare = pin!(top.prepare_write(rest, self.below(rest)));
                loop {
                    if running.is_empty() {
                        break prepare.await;
                    }
                    match select(prepare.as_mut(), running.next()).await {
                        Either::Left((prepared, _)) => break prepared,
                        Either::Right((done, _)) => result = result.and(done.unwrap_or(Ok(()))),
                    }
                }
            };
            match prepared {
                Ok(prepared) => {
                    let planned = prepared.plan().range;
                    let piece = buf.split_to(planned.len() as usize);
                    rest = rest.skip(planned.len());
                    running.push(self.carry_out(top, prepared, piece));
                }
                Err(error) => result = result.and(Err(error)),
            }
            if running.len() >= PLANS_AT_ONCE {
                result = result.and(running.next().await.unwrap_or(Ok(())));
            }
        }
        // Also after a failure: what was begun is awaited, so that no ticket is rolled back under a write.
        while let Some(done) = running.next().await {
            result = result.and(done);
        }
        result
    }

    /// Fills, writes, commits. Every storage request has ended before the plan is committed or rolled back.
    async fn carry_out(self, top: &LayerHandle, prepared: PreparedWrite, buf: Buf) -> Result<()> {
        let plan = *prepared.plan();
        let storage = top.storage(plan.storage);
        match plan.ticket {
            Some(ticket) => self.write_with_fill(storage, plan.range, plan.offset, ticket, buf).await?,
            None => storage.write(plan.offset, buf).await.map(drop)?,
        }
        prepared.commit().await
    }

    /// Writes the range's bytes at `offset` of the storage, and what belongs around them into new blocks.
    async fn write_with_fill(
        self,
        storage: &StorageHandle,
        range: ByteRange,
        offset: u64,
        ticket: Ticket,
        buf: Buf,
    ) -> Result<()> {
        let blocks = ticket.blocks;
        if ticket.fill == Fill::Nothing || blocks == range {
            return storage.write(offset, buf).await.map(drop);
        }
        let Some(start) = offset.checked_sub(range.offset() - blocks.offset()) else {
            return Err(DiskError::new(ErrorKind::Corrupt, Operation::Write)
                .on(storage.name())
                .at(range)
                .because("new blocks were placed before the start of the storage"));
        };
        let head = ByteRange::between(blocks.offset(), range.offset());
        let tail = ByteRange::between(range.end(), blocks.end());
        if ticket.fill == Fill::Zeroes && head.len() + tail.len() >= ZEROED_MIN {
            let at = |part: ByteRange| ByteRange::new(start + (part.offset() - blocks.offset()), part.len());
            let (a, b, c) = join3(
                storage.write_zeroes(at(head), ZeroMode::default()),
                storage.write(offset, buf),
                storage.write_zeroes(at(tail), ZeroMode::default()),
            )
            .await;
            return a.and(b.map(drop)).and(c);
        }
        if range.len() > COPIED_MAX {
            let (a, b, c) = join3(
                self.copy_fill(storage, start, head, ticket.fill),
                storage.write(offset, buf),
                self.copy_fill(storage, offset + range.len(), tail, ticket.fill),
            )
            .await;
            return a.and(b.map(drop)).and(c);
        }
        let mut before = Buf::new(blocks.len() as usize);
        let mut middle = before.split_off(head.len() as usize);
        let after = middle.split_off(range.len() as usize);
        middle.copy_from_slice(&buf);
        let (before, after) = futures_util::future::join(
            self.fill_bytes(head, ticket.fill, before),
            self.fill_bytes(tail, ticket.fill, after),
        )
        .await;
        storage.write(start, before?.join(middle).join(after?)).await.map(drop)
    }

    /// Writes a part of the fill by itself.
    async fn copy_fill(self, storage: &StorageHandle, offset: u64, part: ByteRange, fill: Fill) -> Result<()> {
        let bytes = self.fill_bytes(part, fill, Buf::new(part.len() as usize)).await?;
        storage.write(offset, bytes).await.map(drop)
    }

    /// Brings the bytes of a part of the fill.
    async fn fill_bytes(self, part: ByteRange, fill: Fill, mut buf: Buf) -> Result<Buf> {
        match fill {
            Fill::Present if !part.is_empty() => self.read_layers(0, part.offset(), buf).await,
            Fill::Present | Fill::Zeroes | Fill::Nothing => {
                buf.fill(0);
                Ok(buf)
            }
        }
    }
}
