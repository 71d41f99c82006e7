//! Layers below the top that are written to.

use crate::images::gate::FileGate;
use crate::images::stack::Stack;
use crate::snapshots::open_layer;
use crate::{EngineError, Format, chain_text};
use std::path::PathBuf;
use storage::lock::Demand;
use storage::{FileStorage, WritingBehind};

/// A layer that is written to though it stands below others.
pub(super) struct Reopened {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    pub(super) file: FileStorage,
    /// As it was.
    old_file: FileStorage,
    /// What is written to it is made durable before the images are exchanged.
    _writing_behind: WritingBehind,
}

impl Reopened {
    /// Opens the layer at `depth` for writing, in its place.
    ///
    /// The lock goes over from the old file to the new one; if somebody else reads the image, that fails, and the old one
    /// is left as it was.
    pub(super) async fn for_writing(stack: &Stack, depth: usize) -> Result<Self, EngineError> {
        let layers = stack.chain().layers();
        let files = stack.files();
        if files.len() != layers.len() {
            return Err(EngineError::Unsupported(format!(
                "{}: an image of the chain keeps its data in another file; such a chain is not consolidated",
                stack.image().display()
            )));
        }
        let (path, format) = (layers[depth].path.clone(), Format::from(layers[depth].format));
        let old_file = files[depth].clone();
        let direct = layers[depth].handle.storage(disk::StorageId::IMAGE).limits().alignment > 1;
        let (opened, old) = (path.clone(), old_file.clone());
        let file = dataplane::offload(move || {
            let file = FileStorage::open(&opened, &FileGate::unlocked(direct))?;
            // Readers do not exclude each other, so at no moment is it without a lock.
            file.relock(Demand::READER)?;
            old.relock(Demand::NOTHING)?;
            if let Err(error) = file.relock(Demand::WRITER) {
                old.relock(Demand::READER)?;
                return Err(error);
            }
            Ok(file)
        })
        .await?;
        let this = Self { path, format, _writing_behind: file.write_behind(), file, old_file };
        this.put(stack, &this.file, false).await.inspect_err(|_| {
            let _back = this.give_lock_back();
        })?;
        Ok(this)
    }

    /// Puts the layer over that file in its place.
    async fn put(&self, stack: &Stack, file: &FileStorage, read_only: bool) -> Result<(), EngineError> {
        let mut files = stack.files();
        stack
            .chain()
            .switch(async |layers| {
                let Some(depth) = layers.iter().position(|layer| layer.path == self.path) else {
                    return Err(EngineError::Invalid(format!("{}: is no layer any more", self.path.display())));
                };
                layers[depth].handle.close().await?;
                let mut layers = layers.to_vec();
                layers[depth].handle = open_layer(file.clone(), self.format, read_only).await?;
                files[depth] = file.clone();
                Ok::<_, EngineError>(layers)
            })
            .await?;
        stack.set_files(files);
        Ok(())
    }

    /// The old file has its lock again, and the new one none.
    fn give_lock_back(&self) -> disk::Result<()> {
        self.file.relock(Demand::READER)?;
        self.old_file.relock(Demand::READER)?;
        self.file.relock(Demand::NOTHING)
    }

    /// Nobody writes to it any more, whatever becomes of this.
    pub(super) fn rest(&self) {
        if let Err(error) = self.file.relock(Demand::READER) {
            tracing::warn!(%error, "a frozen layer stays locked as if it were written to; clones have to wait");
        }
    }

    /// Takes it back; the file is as it is.
    pub(super) async fn for_reading(&self, stack: &Stack) {
        let back = async {
            self.put(stack, &self.old_file, true).await?;
            Ok::<_, EngineError>(self.give_lock_back()?)
        };
        if let Err(error) = back.await {
            tracing::warn!(image = %self.path.display(), error = chain_text(&error), "stays open for writing");
        }
    }
}
