//! Pages of counters.

use crate::history::History;
use crate::index::{PageBody, PageEntry};
use crate::kind::Counter;
use crate::layout::{self, BLOCK, PAGE_GRANULES};
use crate::{ChangeKind, Damage, HistoryError};
use disk::Buf;

/// The counters of one page.
pub(crate) type Page = Vec<Counter>;

/// What the index is to know of a page with these counters; `None` for the body where they must be stored.
pub(crate) fn summary(counters: &[Counter]) -> (u32, u32, Option<Counter>, bool) {
    let low = counters.iter().map(|c| c.epoch()).min().unwrap_or(0);
    let high = counters.iter().map(|c| c.epoch()).max().unwrap_or(0);
    let uniform = counters.first().copied().filter(|first| counters.iter().all(|c| c == first));
    let all_data = counters.iter().all(|c| c.kind() == ChangeKind::Data);
    (low, high, uniform, all_data)
}

pub(crate) fn encode(counters: &[Counter]) -> Vec<u8> {
    counters.iter().flat_map(|c| c.0.to_le_bytes()).collect()
}

fn decode(bytes: &[u8]) -> Page {
    bytes.as_chunks::<4>().0.iter().map(|word| Counter(u32::from_le_bytes(*word))).collect()
}

impl History {
    /// A page's counters, with all that memory knows.
    pub(crate) async fn page(&self, page: usize) -> Result<Page, HistoryError> {
        loop {
            let entry = self.state.borrow().index[page];
            let loaded = match entry.body {
                PageBody::Uniform(counter) => Some(vec![counter; PAGE_GRANULES as usize]),
                PageBody::Stored { slot, sum, .. } => {
                    let bytes = self.storage.read_new(layout::page(page as u64, slot), BLOCK as usize).await?;
                    (crc32c::crc32c(&bytes) == sum).then(|| decode(&bytes))
                }
            };
            let known = self.state.borrow();
            // A checkpoint may have passed meanwhile: the slot may hold another page now, and memory may have forgotten
            // what the table has learnt.
            if known.index[page] != entry {
                continue;
            }
            let Some(mut counters) = loaded else {
                return Err(HistoryError::Damaged(Damage::Page { page: page as u64 }));
            };
            for marks in known.frozen.iter().chain([&known.current]) {
                marks.overlay(page, &mut counters);
            }
            return Ok(counters);
        }
    }

    /// Writes a page into the slot that does not count, and returns what the index is to say. Nothing is written for a
    /// page of one counter.
    pub(crate) async fn store_page(&self, page: usize, counters: &[Counter]) -> Result<PageEntry, HistoryError> {
        let (low, high, uniform, all_data) = summary(counters);
        if let Some(counter) = uniform {
            return Ok(PageEntry { low, high, body: PageBody::Uniform(counter) });
        }
        let slot = self.state.borrow().index[page].other_slot();
        let bytes = encode(counters);
        let sum = crc32c::crc32c(&bytes);
        self.storage.write(layout::page(page as u64, slot), Buf::copy_of(&bytes)).await?;
        Ok(PageEntry { low, high, body: PageBody::Stored { slot, sum, all_data } })
    }
}
