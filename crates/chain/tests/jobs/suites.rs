//! A disk beside which a job works passes the suite that every disk owes.

use super::*;
use chain::Mirror;
use testkit::{conformance, seeds};

async fn memory_layers(random: &mut fastrand::Rng, sizes: &[u64]) -> Vec<LayerInfo> {
    let mut layers = Vec::new();
    for size in sizes {
        layers.push(Made::memory(random, *size).open().await);
    }
    layers
}

#[test]
fn beside_a_mirror() {
    seeds::each(4, |seed| {
        let make = |size| async move {
            let mut random = fastrand::Rng::with_seed(seed);
            let chain = Rc::new(Chain::new(memory_layers(&mut random, &[size, size / 2]).await));
            let target = memory_layers(&mut random, &[size]).await;
            let mirror = Mirror::new(DiskHandle::new(Chain::new(target)), []);
            chain.attach_mirror(&mirror).await.expect("attach");
            chain.copy_to_mirror(&mirror, CopyPass::default(), &Pace::new(&mut random)).await.expect("copy");
            DiskHandle::from_rc(chain)
        };
        executor::run(seed, conformance::disk(make, true));
    });
}

#[test]
fn beside_an_infill() {
    seeds::each(4, |seed| {
        let make = |size| async move {
            let mut random = fastrand::Rng::with_seed(seed);
            let layers = memory_layers(&mut random, &[size, size / 2, size * 2]).await;
            let chain = Rc::new(Chain::new(layers));
            let infill = chain.begin_infill(1..2).await.expect("begin");
            if seed % 2 == 0 {
                chain.infill(&infill, CopyPass::default(), &Pace::new(&mut random)).await.expect("infill");
            }
            DiskHandle::from_rc(chain)
        };
        executor::run(seed, conformance::disk(make, true));
    });
}
