//! Images that were mended by somebody who knows of their history.

use crate::host::{TestHost, raw};
use disk::{Buf, Disk, StorageHandle, WriteFlags};
use std::rc::Rc;
use testkit::MemoryStorage;
use testkit::executor;
use tracking::{CreateOptions, History, Id, ImageFacts, NewPoint, Tracked};

const SIZE: u64 = 1 << 20;

async fn with_a_point(sidecar: &StorageHandle, image: &StorageHandle, host: &Rc<TestHost>) {
    let history = History::create(sidecar.clone(), host.clone(), CreateOptions { granule: 4096, size: SIZE }).await;
    let history = Rc::new(history.expect("no faults"));
    let disk = Rc::new(Tracked::new(raw(image.clone()), history).await.expect("no faults"));
    disk.mark(NewPoint { name: "before".to_owned(), set: Id([1; 16]) }).await.expect("no faults");
    disk.write(0, Buf::zeroed(4096), WriteFlags::default()).await.expect("no faults");
    disk.close().await.expect("no faults");
}

fn mend(host: &TestHost) {
    host.facts.set(ImageFacts { modified: host.facts.get().modified + 5_000_000_000, ..host.facts.get() });
}

#[test]
fn a_resealed_history_is_trusted_and_one_that_is_not_is_refused() {
    executor::run(1, async {
        for resealed in [true, false] {
            let host = TestHost::new(7);
            let [sidecar, image] = [0, SIZE].map(|size| StorageHandle::new(MemoryStorage::new(size)));
            with_a_point(&sidecar, &image, &host).await;
            let (history, distrust) = History::open(sidecar.clone(), host.clone()).await.expect("whole");
            assert_eq!(distrust, None);
            mend(&host);
            if resealed {
                history.reseal().await.expect("no faults");
            }
            drop(history);
            let (history, distrust) = History::open(sidecar, host).await.expect("whole");
            assert_eq!(distrust.is_none(), resealed, "{distrust:?}");
            assert_eq!(history.changes("before", None).is_ok(), resealed);
        }
    });
}

#[test]
fn a_reason_stays() {
    executor::run(2, async {
        let host = TestHost::new(8);
        let [sidecar, image] = [0, SIZE].map(|size| StorageHandle::new(MemoryStorage::new(size)));
        with_a_point(&sidecar, &image, &host).await;
        let (history, _) = History::open(sidecar.clone(), host.clone()).await.expect("whole");
        let lineage = history.info().lineage;
        mend(&host);
        history.distrust("it was mended").await.expect("no faults");
        drop(history);
        let (history, distrust) = History::open(sidecar.clone(), host).await.expect("whole");
        assert_eq!(distrust, None, "what is there now is the new beginning");
        assert_ne!(history.info().lineage, lineage);
        let refused = history.point("before").expect("there").refused.expect("refused");
        assert_eq!(refused.reason, "it was mended");
        let first = sidecar.read_new(0, 8192).await.expect("whole");
        assert!(History::is_one(&first) && !History::is_one(&[0; 8192]) && !History::is_one(&first[8..100]));
    });
}
