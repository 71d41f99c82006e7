//! A history's surroundings, made up.

use chain::{Chain, LayerInfo};
use disk::{DiskError, ErrorKind, LayerHandle, LocalFuture, Operation, Result, StorageHandle};
use formats::Format;
use formats::raw::{OpenOptions, RawLayer};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use tracking::{Boot, CreateOptions, History, Host, Id, ImageFacts, ImageMark, NewPoint, Tracked};

/// Clock, randomness and the image's outside, as the test sets them.
pub(crate) struct TestHost {
    pub(crate) clock: Cell<u64>,
    pub(crate) boot: Cell<Boot>,
    pub(crate) facts: Cell<ImageFacts>,
    pub(crate) mark: Cell<Option<ImageMark>>,
    /// Whether the image can bear a mark.
    pub(crate) bears: Cell<bool>,
    /// Putting a mark into the image fails; `true`: after it has been put there.
    pub(crate) mark_fails: Cell<Option<bool>>,
    pub(crate) removed: Cell<bool>,
    /// Whether the sidecar can be removed.
    pub(crate) removable: Cell<bool>,
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
            mark_fails: Cell::default(),
            removed: Cell::default(),
            removable: Cell::new(true),
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
            let fails = self.mark_fails.get();
            if self.bears.get() && fails != Some(false) {
                self.mark.set(Some(mark));
            }
            match fails {
                Some(_) => Err(DiskError::new(ErrorKind::Io, Operation::Write)),
                None => Ok(self.bears.get()),
            }
        })
    }

    fn let_time_pass(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn remove_sidecar(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async {
            if !self.removable.get() {
                return Err(DiskError::new(ErrorKind::Io, Operation::Write));
            }
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

/// A raw disk on `image`, recorded in the history that `sidecar` holds; the history must be trusted.
pub(crate) async fn tracked(image: StorageHandle, sidecar: StorageHandle, host: &Rc<TestHost>) -> Rc<Tracked<Chain>> {
    let (history, distrust) = History::open(sidecar, Rc::clone(host) as _).await.expect("readable");
    assert_eq!(distrust, None);
    Tracked::new(raw(image), Rc::new(history)).await.expect("no faults")
}

/// The same with a new history.
pub(crate) async fn created(
    image: StorageHandle,
    sidecar: StorageHandle,
    host: &Rc<TestHost>,
    granule: u64,
) -> Rc<Tracked<Chain>> {
    let options = CreateOptions { granule, size: image.size() };
    let history = History::create(sidecar, Rc::clone(host) as _, options).await.expect("no faults");
    Tracked::new(raw(image), Rc::new(history)).await.expect("no faults")
}

/// A point of that name and no set.
pub(crate) fn named(name: &str) -> NewPoint {
    NewPoint { name: name.to_owned(), set: Id::NONE }
}
