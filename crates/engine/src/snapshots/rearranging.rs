//! Who is rearranging a disk's layers: places in the list of layers mean something to whoever is at work on them.

use crate::EngineError;
use crate::images::stack::Stack;

/// What is done to the layers over a longer time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rearranging {
    #[default]
    Nothing,
    /// All of them are about to be exchanged for another image; which they are does not matter.
    Promotion,
    /// Some of them are about to become one.
    Consolidation,
}

/// While it lives nobody else rearranges the layers.
pub(crate) struct Rearranged<'a>(&'a Stack);

impl Drop for Rearranged<'_> {
    fn drop(&mut self) {
        self.0.rearranging.set(Rearranging::Nothing);
    }
}

impl Stack {
    /// Begins to rearrange the layers.
    ///
    /// # Errors
    /// When somebody does so already.
    pub(crate) fn rearrange(&self, what: Rearranging) -> Result<Rearranged<'_>, EngineError> {
        self.refuse_while(&[Rearranging::Promotion, Rearranging::Consolidation])?;
        self.rearranging.set(what);
        Ok(Rearranged(self))
    }

    /// Refuses work on the layers that would meet other work.
    pub(crate) fn refuse_while(&self, others: &[Rearranging]) -> Result<(), EngineError> {
        let under_way = self.rearranging.get();
        let word = match under_way {
            _ if !others.contains(&under_way) => return Ok(()),
            Rearranging::Nothing => return Ok(()),
            Rearranging::Promotion => "is being promoted",
            Rearranging::Consolidation => "has layers that are being merged",
        };
        Err(EngineError::Rearranging { image: self.image(), word })
    }
}
