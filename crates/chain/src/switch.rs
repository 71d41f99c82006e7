//! Exchanging the layers while the disk is in use.

use crate::background::Background;
use crate::{Chain, LayerInfo};
use disk::{DiskError, ErrorKind, Operation};
use std::rc::Rc;

impl Chain {
    /// Exchanges the layers for others, through which the guest sees the same bytes. No request is under way meanwhile,
    /// flushes included: those that were are awaited, new ones wait.
    ///
    /// `change` gets the present layers, top first, and says which follow. It may write to layers and flush or close
    /// them by their own handles; a request of its own to this disk would wait for ever. What it closed can still be
    /// read, and written again. Layers that are dropped from the list are the caller's to close.
    ///
    /// After an error the layers are those from before, so what `change` cannot take back it does last.
    ///
    /// # Errors
    /// What `change` reports; `InUse` while an infill, or a mirror into a parent, is attached; `Closed` when the disk is being closed (`change` is not called then); `Invalid` for no
    /// layer at all, and for a top layer of another size: a size is changed by [`Chain::resize_with`] alone, which sees to
    /// it that nothing old shows.
    pub async fn switch<E: From<DiskError>>(
        &self,
        change: impl AsyncFnOnce(Rc<[LayerInfo]>) -> Result<Vec<LayerInfo>, E>,
    ) -> Result<(), E> {
        let _exclusive = self.requests.exclude().await;
        let moving = match self.background() {
            Some(Background::Infill(_)) => true,
            Some(Background::Mirror(mirror)) => mirror.leads_into_parent(),
            None => false,
        };
        if moving {
            return Err(DiskError::new(ErrorKind::InUse, Operation::Open)
                .on(self.layers()[0].path.display().to_string())
                .because("layers of this disk are about to vanish into others; wait for the end of that, or cancel it")
                .into());
        }
        self.switch_excluded(change).await
    }

    /// As [`Chain::switch`], when requests are excluded already.
    pub(crate) async fn switch_excluded<E: From<DiskError>>(
        &self,
        change: impl AsyncFnOnce(Rc<[LayerInfo]>) -> Result<Vec<LayerInfo>, E>,
    ) -> Result<(), E> {
        if self.requests.is_closed() {
            return Err(DiskError::new(ErrorKind::Closed, Operation::Open).into());
        }
        let old = self.layers();
        let size = old[0].handle.geometry().size;
        let new = change(Rc::clone(&old)).await?;
        let refuse = |why: String| {
            let image = old[0].path.display().to_string();
            E::from(DiskError::new(ErrorKind::Invalid, Operation::Open).on(image).because(why))
        };
        let Some(top) = new.first() else {
            return Err(refuse("the disk was to go on without any layer; it stays with those it has".to_owned()));
        };
        let offered = top.handle.geometry().size;
        if offered != size {
            return Err(refuse(format!(
                "the disk has {size} bytes, and {} has {offered}; resize it first, the disk stays as it was",
                top.path.display()
            )));
        }
        self.replace_layers(new);
        Ok(())
    }
}
