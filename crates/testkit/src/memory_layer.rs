//! A layer in memory: the reference implementation of the contract, and as adversarial as it allows.

use crate::MemoryStorage;
use crate::executor::yield_now;
use disk::{
    Below, Buf, ByteRange, ContentId, DiskError, ErrorKind, Fill, HistoryMark, Layer, LayerExtent, LayerGeometry,
    LayerHandle, LayerIdentity, Operation, ParentLink, Preallocation, Presence, Result, StorageHandle, StorageId,
    Ticket, TicketId, WritePlan, ZeroMode,
};
use event_listener::Event;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

/// What a [`MemoryLayer`] is like.
#[derive(Clone, Copy, Debug)]
pub struct MemoryLayerOptions {
    /// Allocation unit in bytes; a power of two.
    pub unit: u64,
    /// Refuse writes.
    pub read_only: bool,
    /// Whether it can hold "zero" over a parent.
    pub zero_over_parent: bool,
    /// Whether it stores encoded bytes.
    pub encodes: bool,
    /// `Some`: waits random turns, forgets what it has cached, cuts its answers short.
    pub erratic: Option<u64>,
}

impl Default for MemoryLayerOptions {
    fn default() -> Self {
        Self { unit: 4096, read_only: false, zero_over_parent: true, encodes: true, erratic: None }
    }
}

/// A layer whose tables are in memory and whose data is in a [`MemoryStorage`].
///
/// Space that was given back is overwritten with a pattern as soon as no guard protects it, and new space
/// holds that pattern unless the ticket says [`Fill::Nothing`]: who breaks the contract reads garbage.
pub struct MemoryLayer {
    memory: MemoryStorage,
    storage: StorageHandle,
    options: MemoryLayerOptions,
    state: RefCell<State>,
    unlocked: Event,
    poisoned: Cell<bool>,
    mark: Cell<Option<HistoryMark>>,
    /// The mark was set by whoever has the layer now.
    tracked: Cell<bool>,
    identity: Cell<LayerIdentity>,
    /// The content's id has been changed since the layer was opened.
    renewed: Cell<bool>,
    link_to_set: Cell<Option<ParentLink>>,
}

struct State {
    size: u64,
    units: BTreeMap<u64, Unit>,
    /// Units for which a ticket is out.
    locked: BTreeSet<u64>,
    tickets: HashMap<TicketId, Pending>,
    next_ticket: u64,
    /// End of the space in use.
    end: u64,
    free: Vec<u64>,
    /// Given back at an epoch, and not reusable while a guard of that epoch or an earlier one lives.
    retired: Vec<(u64, u64)>,
    epoch: u64,
    guards: BTreeMap<u64, usize>,
    random: fastrand::Rng,
}

enum Unit {
    Data(u64),
    Zero(Option<u64>),
    Encoded(Vec<u8>),
}

struct Pending {
    first: u64,
    count: u64,
    offset: u64,
}

/// Garbage that nobody may read.
const GARBAGE: u8 = 0xdd;

impl State {
    /// Gives a unit's space back.
    fn retire(&mut self, offset: u64) {
        self.retired.push((self.epoch, offset));
        self.epoch += 1;
    }

    /// Makes retired space reusable where no guard protects it.
    fn reclaim(&mut self, memory: &MemoryStorage, unit: u64) {
        let oldest = self.guards.keys().next().copied().unwrap_or(u64::MAX);
        let free = &mut self.free;
        self.retired.retain(|(epoch, offset)| {
            let protected = oldest <= *epoch;
            if !protected {
                memory.tamper(|bytes| bytes.write(*offset, &vec![GARBAGE; unit as usize]));
                free.push(*offset);
            }
            protected
        });
    }

    fn retire_unit(&mut self, unit: Option<Unit>) {
        if let Some(Unit::Data(offset) | Unit::Zero(Some(offset))) = unit {
            self.retire(offset);
        }
    }
}

impl MemoryLayer {
    /// An empty layer for a disk of `size` bytes.
    pub fn new(size: u64, options: MemoryLayerOptions) -> Self {
        let memory = MemoryStorage::new(0).named("memory-layer");
        let memory = match options.erratic {
            Some(seed) => memory.yielding(seed),
            None => memory,
        };
        Self {
            storage: memory.handle(),
            memory,
            options,
            state: RefCell::new(State {
                size,
                units: BTreeMap::new(),
                locked: BTreeSet::new(),
                tickets: HashMap::new(),
                next_ticket: 0,
                end: 0,
                free: Vec::new(),
                retired: Vec::new(),
                epoch: 0,
                guards: BTreeMap::new(),
                random: fastrand::Rng::with_seed(options.erratic.unwrap_or(0)),
            }),
            unlocked: Event::new(),
            poisoned: Cell::new(false),
            mark: Cell::new(None),
            tracked: Cell::new(false),
            identity: Cell::default(),
            renewed: Cell::new(false),
            link_to_set: Cell::default(),
        }
    }

    /// As if the layer were opened anew, by somebody who has set no mark yet.
    pub fn reopen(&self) {
        self.tracked.set(false);
        self.renewed.set(false);
        self.link_to_set.set(None);
    }

    /// A change of the guest's bytes is about to happen.
    fn announce(&self) {
        if !self.tracked.get() {
            self.mark.set(None);
        }
        if !self.renewed.get() {
            self.renew(None);
        }
        if let Some(link) = self.link_to_set.take() {
            self.identity.set(LayerIdentity { link: Some(link), ..self.identity.get() });
        }
    }

    /// Another id for the content: the next one, unless it is given.
    fn renew(&self, id: Option<ContentId>) {
        let present = self.identity.get();
        let next = match present.content {
            Some(content) => content.successor(
                (u64::from_be_bytes(content.to_bytes()[8..].try_into().expect("eight bytes")) + 1).to_be_bytes(),
            ),
            None => ContentId::from_bytes([1; 16]).expect("an id"),
        };
        self.identity.set(LayerIdentity { content: Some(id.unwrap_or(next)), ..present });
        self.renewed.set(true);
    }

    fn require_sound(&self) -> Result<()> {
        match self.poisoned.get() {
            true => Err(DiskError::new(ErrorKind::Poisoned, Operation::Write)),
            false => Ok(()),
        }
    }

    /// The handle that everybody but the test holds.
    pub fn handle(self: &Rc<Self>) -> LayerHandle {
        LayerHandle::from_rc(Rc::clone(self))
    }

    /// The storage, for faults and counters.
    pub fn memory(&self) -> &MemoryStorage {
        &self.memory
    }

    /// Tickets that were neither committed nor aborted.
    pub fn open_tickets(&self) -> usize {
        self.state.borrow().tickets.len()
    }

    /// How a unit's bytes are encoded.
    pub fn encode(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().rev().map(|b| b ^ 0xa5).collect()
    }

    fn decode(encoded: &[u8]) -> Vec<u8> {
        Self::encode(encoded)
    }

    /// Whether to be difficult this time.
    fn whim(&self, one_in: u32) -> bool {
        self.options.erratic.is_some() && self.state.borrow_mut().random.u32(..one_in) == 0
    }

    async fn turns(&self) {
        while self.whim(2) {
            yield_now().await;
        }
    }

    fn alive(&self, operation: Operation) -> Result<()> {
        match self.poisoned.get() {
            true => Err(DiskError::new(ErrorKind::Poisoned, operation)),
            false => {
                if operation != Operation::Flush {
                    self.announce();
                }
                Ok(())
            }
        }
    }

    fn first_unit(&self, range: ByteRange) -> u64 {
        range.offset() / self.options.unit
    }

    fn last_unit(&self, range: ByteRange) -> u64 {
        (range.end() - 1) / self.options.unit
    }

    /// Waits until no ticket is out for any unit of the range.
    async fn wait_unlocked(&self, range: ByteRange) {
        let units = self.first_unit(range)..=self.last_unit(range);
        while self.state.borrow().locked.range(units.clone()).next().is_some() {
            self.unlocked.listen().await;
        }
    }

    fn unlock(&self, pending: &Pending) {
        let mut state = self.state.borrow_mut();
        for unit in pending.first..pending.first + pending.count {
            assert!(state.locked.remove(&unit), "units of a ticket are locked");
        }
        drop(state);
        self.unlocked.notify(usize::MAX);
    }

    fn lookup(&self, range: ByteRange) -> LayerExtent {
        let unit = self.options.unit;
        let first = self.first_unit(range);
        let short = self.whim(4);
        let state = self.state.borrow();
        let within = range.offset() % unit;
        let presence = |at: u64, ahead: u64| match state.units.get(&at) {
            None => Presence::Absent,
            Some(Unit::Zero(space)) => Presence::Zero { allocated: space.is_some() },
            Some(Unit::Encoded(_)) => Presence::Encoded { offset: 0 },
            Some(Unit::Data(offset)) => {
                Presence::Data { storage: StorageId::IMAGE, offset: offset.wrapping_sub(ahead).wrapping_add(within) }
            }
        };
        let found = presence(first, 0);
        let mut end = first + 1;
        while !short && end <= self.last_unit(range) && presence(end, (end - first) * unit) == found {
            end += 1;
        }
        LayerExtent { range: range.intersect(ByteRange::between(range.offset(), end * unit)), presence: found }
    }

    /// Space for `count` units in a row.
    fn allocate(&self, count: u64, zeroed: bool) -> u64 {
        let unit = self.options.unit;
        let mut state = self.state.borrow_mut();
        state.reclaim(&self.memory, unit);
        let offset = match state.free.pop().filter(|_| count == 1) {
            Some(offset) => offset,
            None => {
                state.end += count * unit;
                state.end - count * unit
            }
        };
        let byte = if zeroed { 0 } else { GARBAGE };
        self.memory.tamper(|bytes| bytes.write(offset, &vec![byte; (count * unit) as usize]));
        offset
    }
}

impl Layer for MemoryLayer {
    fn geometry(&self) -> LayerGeometry {
        LayerGeometry {
            size: self.state.borrow().size,
            unit: self.options.unit,
            block: self.options.unit,
            read_only: self.options.read_only,
            storage_holes: false,
            zero_over_parent: self.options.zero_over_parent,
            encoded_unit: self.options.encodes.then_some(self.options.unit),
        }
    }

    fn storage(&self, id: StorageId) -> &StorageHandle {
        assert_eq!(id, StorageId::IMAGE, "a memory layer has one storage");
        &self.storage
    }

    fn begin_io(&self) -> u64 {
        let mut state = self.state.borrow_mut();
        let epoch = state.epoch;
        *state.guards.entry(epoch).or_default() += 1;
        epoch
    }

    fn end_io(&self, epoch: u64) {
        let mut state = self.state.borrow_mut();
        let guards = state.guards.get_mut(&epoch).expect("the span was begun");
        *guards -= 1;
        if *guards == 0 {
            state.guards.remove(&epoch);
            state.reclaim(&self.memory, self.options.unit);
        }
    }

    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent> {
        (!self.whim(3)).then(|| self.lookup(range))
    }

    async fn map(&self, range: ByteRange) -> Result<LayerExtent> {
        self.turns().await;
        Ok(self.lookup(range))
    }

    async fn read_encoded(&self, offset: u64, mut buf: Buf) -> Result<Buf> {
        self.turns().await;
        let unit = self.options.unit;
        let range = ByteRange::new(offset, buf.len() as u64);
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(unit - rest.offset() % unit);
            rest = rest.skip(piece.len());
            let within = (piece.offset() % unit) as usize;
            let into = (piece.offset() - offset) as usize..(piece.end() - offset) as usize;
            // A write may have come between the caller's question and this: then its bytes are right.
            let moved = match self.state.borrow().units.get(&self.first_unit(piece)) {
                Some(Unit::Encoded(encoded)) => {
                    let mut plain = Self::decode(encoded);
                    plain.resize(unit as usize, 0);
                    buf[into.clone()].copy_from_slice(&plain[within..within + piece.len() as usize]);
                    None
                }
                Some(Unit::Data(at)) => Some(*at + within as u64),
                Some(Unit::Zero(_)) | None => {
                    buf[into.clone()].fill(0);
                    None
                }
            };
            if let Some(at) = moved {
                let bytes = self.storage.read_new(at, piece.len() as usize).await?;
                buf[into].copy_from_slice(&bytes);
            }
        }
        Ok(buf)
    }

    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan> {
        if self.whim(3) || self.poisoned.get() {
            return None;
        }
        match self.lookup(range) {
            LayerExtent { range, presence: Presence::Data { storage, offset } } => {
                self.announce();
                Some(WritePlan { range, storage, offset, ticket: None })
            }
            _ => None,
        }
    }

    async fn prepare_write(&self, range: ByteRange, below: Below) -> Result<WritePlan> {
        self.turns().await;
        self.alive(Operation::Write)?;
        let unit = self.options.unit;
        let first = self.first_unit(range);
        self.wait_unlocked(range.prefix(1)).await;
        let found = self.lookup(range);
        if let Presence::Data { storage, offset } = found.presence {
            return Ok(WritePlan { range: found.range, storage, offset, ticket: None });
        }
        let mut count = 1;
        let short = self.whim(3);
        {
            let state = self.state.borrow();
            let free = |at: u64| !matches!(state.units.get(&at), Some(Unit::Data(_))) && !state.locked.contains(&at);
            while !short && first + count <= self.last_unit(range) && free(first + count) {
                count += 1;
            }
        }
        let blocks = ByteRange::new(first * unit, count * unit);
        let range = range.intersect(blocks);
        let zeroed = {
            let state = self.state.borrow();
            let reads_zero = |at: u64| match state.units.get(&at) {
                None => below == Below::Zeroes,
                Some(Unit::Zero(_)) => true,
                Some(Unit::Data(_) | Unit::Encoded(_)) => false,
            };
            let head = range.offset() == blocks.offset() || reads_zero(first);
            let tail = range.end() == blocks.end() || reads_zero(first + count - 1);
            head && tail
        };
        let fill = match zeroed {
            true if self.whim(2) => Fill::Nothing,
            true => Fill::Zeroes,
            false => Fill::Present,
        };
        let offset = self.allocate(count, fill == Fill::Nothing);
        let mut state = self.state.borrow_mut();
        state.locked.extend(first..first + count);
        let id = TicketId(state.next_ticket);
        state.next_ticket += 1;
        state.tickets.insert(id, Pending { first, count, offset });
        Ok(WritePlan {
            range,
            storage: StorageId::IMAGE,
            offset: offset + (range.offset() - blocks.offset()),
            ticket: Some(Ticket { id, blocks, fill }),
        })
    }

    async fn commit_write(&self, ticket: TicketId) -> Result<()> {
        let pending = self.state.borrow_mut().tickets.remove(&ticket).expect("the ticket is out");
        self.turns().await;
        let result = self.alive(Operation::Write);
        for at in 0..pending.count {
            let mut state = self.state.borrow_mut();
            let new = pending.offset + at * self.options.unit;
            if result.is_ok() {
                let old = state.units.insert(pending.first + at, Unit::Data(new));
                state.retire_unit(old);
            } else {
                state.retire(new);
            }
        }
        self.unlock(&pending);
        result
    }

    fn abort_write(&self, ticket: TicketId) {
        let pending = self.state.borrow_mut().tickets.remove(&ticket).expect("the ticket is out");
        for at in 0..pending.count {
            self.state.borrow_mut().retire(pending.offset + at * self.options.unit);
        }
        self.unlock(&pending);
    }

    async fn write_encoded(&self, range: ByteRange, encoded: &[u8]) -> Result<()> {
        self.turns().await;
        self.alive(Operation::Write)?;
        self.wait_unlocked(range).await;
        let mut state = self.state.borrow_mut();
        let old = state.units.insert(range.offset() / self.options.unit, Unit::Encoded(encoded.to_vec()));
        state.retire_unit(old);
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> Result<()> {
        self.turns().await;
        self.alive(Operation::WriteZeroes)?;
        if !self.options.zero_over_parent && below == Below::Parent {
            return Err(DiskError::new(ErrorKind::Unsupported, Operation::WriteZeroes).at(range));
        }
        self.wait_unlocked(range).await;
        let forget = !self.options.zero_over_parent || below == Below::Zeroes && mode.unmap && self.whim(2);
        let mut state = self.state.borrow_mut();
        for at in self.first_unit(range)..=self.last_unit(range) {
            let old = state.units.remove(&at);
            let keep = match old {
                Some(Unit::Data(offset)) if !mode.unmap && !forget => Some(offset),
                other => {
                    state.retire_unit(other);
                    None
                }
            };
            if !forget {
                state.units.insert(at, Unit::Zero(keep));
            }
        }
        Ok(())
    }

    async fn discard(&self, range: ByteRange, below: Below) -> Result<()> {
        self.turns().await;
        self.alive(Operation::Discard)?;
        if !self.options.zero_over_parent && below == Below::Parent {
            return Ok(());
        }
        self.wait_unlocked(range).await;
        let mut state = self.state.borrow_mut();
        for at in self.first_unit(range)..=self.last_unit(range) {
            let old = state.units.remove(&at);
            state.retire_unit(old);
            if self.options.zero_over_parent {
                state.units.insert(at, Unit::Zero(None));
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.alive(Operation::Flush)?;
        self.storage.sync().await.inspect_err(|_| self.poisoned.set(true))
    }

    async fn extend(&self, size: u64) -> Result<()> {
        self.turns().await;
        self.alive(Operation::Resize)?;
        self.state.borrow_mut().size = size;
        Ok(())
    }

    async fn resize(&self, size: u64, _preallocation: Preallocation) -> Result<()> {
        self.turns().await;
        self.alive(Operation::Resize)?;
        let unit = self.options.unit;
        let mut state = self.state.borrow_mut();
        let cut: Vec<u64> = state.units.range(size.div_ceil(unit)..).map(|(at, _)| *at).collect();
        for at in cut {
            let old = state.units.remove(&at);
            state.retire_unit(old);
        }
        let within = size % unit;
        if within > 0 && size < state.size {
            match state.units.get_mut(&(size / unit)) {
                Some(Unit::Data(offset)) => {
                    let tail = ByteRange::new(*offset + within, unit - within);
                    self.memory.tamper(|bytes| bytes.zero(tail, false));
                }
                Some(Unit::Encoded(encoded)) => {
                    let mut plain = Self::decode(encoded);
                    plain.resize(unit as usize, 0);
                    plain[within as usize..].fill(0);
                    *encoded = Self::encode(&plain);
                }
                Some(Unit::Zero(_)) | None => {}
            }
        }
        state.size = size;
        Ok(())
    }

    fn history_mark(&self) -> Option<HistoryMark> {
        self.mark.get()
    }

    async fn set_history_mark(&self, mark: Option<HistoryMark>) -> Result<bool> {
        self.turns().await;
        self.require_sound()?;
        self.mark.set(mark);
        self.tracked.set(mark.is_some());
        Ok(true)
    }

    fn identity(&self) -> LayerIdentity {
        self.identity.get()
    }

    async fn set_parent_link(&self, link: Option<ParentLink>) -> Result<bool> {
        self.turns().await;
        self.require_sound()?;
        if self.identity.get().content.is_none() {
            self.renew(None);
            self.renewed.set(false); // Its first write has not been yet.
        }
        self.identity.set(LayerIdentity { link, ..self.identity.get() });
        Ok(true)
    }

    fn link_with_first_write(&self, link: ParentLink) {
        if !self.renewed.get() {
            self.link_to_set.set(Some(link));
        }
    }

    async fn renew_content_id(&self, id: ContentId) -> Result<bool> {
        self.turns().await;
        self.require_sound()?;
        self.renew(Some(id));
        Ok(true)
    }

    async fn close(&self) -> Result<()> {
        if !self.options.read_only {
            Layer::flush(self).await?;
            self.renewed.set(false);
        }
        Ok(())
    }
}
