//! A history's surroundings, made up.

use chain::{Chain, LayerInfo};
use disk::{LayerHandle, LocalFuture, Result, StorageHandle};
use formats::Format;
use formats::raw::{OpenOptions, RawLayer};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use tracking::{Boot, Host, Id, ImageFacts, ImageMark};

/// Clock, randomness and the image's outside, as the test sets them.
pub(crate) struct TestHost {
    pub(crate) clock: Cell<u64>,
    pub(crate) boot: Cell<Boot>,
    pub(crate) facts: Cell<ImageFacts>,
    pub(crate) mark: Cell<Option<ImageMark>>,
    /// Whether the image can bear a mark.
    pub(crate) bears: Cell<bool>,
    pub(crate) removed: Cell<bool>,
    random: RefCell<fastrand::Rng>,
}

impl TestHost {
    pub(crate) fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            clock: Cell::new(1_000_000),
            boot: Cell::new(Boot { id: Id([1; 16]), began: 1 }),
            facts: Cell::default(),
            mark: Cell::default(),
            bears: Cell::new(false),
            removed: Cell::default(),
            random: RefCell::new(fastrand::Rng::with_seed(seed)),
        })
    }

    /// The machine is started anew.
    pub(crate) fn restart(&self) {
        self.boot.set(Boot { id: self.random_id(), began: self.clock.get() });
    }
}

impl Host for TestHost {
    fn now(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    fn boot(&self) -> Boot {
        self.boot.get()
    }

    fn random_id(&self) -> Id {
        Id(self.random.borrow_mut().u128(1..).to_le_bytes())
    }

    fn facts(&self) -> LocalFuture<'_, Result<ImageFacts>> {
        Box::pin(async { Ok(self.facts.get()) })
    }

    fn mark(&self) -> Option<ImageMark> {
        self.mark.get()
    }

    fn set_mark(&self, mark: ImageMark) -> LocalFuture<'_, Result<bool>> {
        Box::pin(async move {
            if self.bears.get() {
                self.mark.set(Some(mark));
            }
            Ok(self.bears.get())
        })
    }

    fn let_time_pass(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn remove_sidecar(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            self.removed.set(true);
            Ok(())
        })
    }
}

/// A raw disk on that storage.
pub(crate) fn raw(storage: StorageHandle) -> Rc<Chain> {
    let handle = LayerHandle::new(RawLayer::open(storage, OpenOptions::default()));
    Rc::new(Chain::new(vec![LayerInfo { path: PathBuf::from("disk.raw"), format: Format::Raw, handle }]))
}
