//! An image's facts.

use super::gate::FileGate;
use super::offload_format;
use super::report::{BitmapInfo, FormatSpecific, ImageInfo, Qcow2Info, SnapshotInfo};
use super::request::{Options, SourceSpec};
use super::stack::Stack;
use crate::{EngineError, Format, linkage};
use chain::{Access, OpenGate};
use disk::{StorageHandle, StorageId};
use formats::qcow2::{
    AUTOCLEAR_RAW_DATA, BitmapDirectory, COMPATIBLE_LAZY_REFCOUNTS, Compression, Header, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY, SnapshotTable,
};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Images that a chain may have.
const DEEPEST: usize = 256;

/// The facts of one image. Images below it are not opened.
pub(crate) async fn info(source: &SourceSpec) -> Result<ImageInfo, EngineError> {
    let format = offload_format(source.file.clone(), source.format).await?;
    let gate = FileGate { cache: source.cache, force_share: source.force_share };
    let storage = gate.open_storage(&source.file, Access::ReadOnly).await?;
    let mut info = ImageInfo {
        filename: source.file.display().to_string(),
        format,
        virtual_size: storage.size(),
        actual_size: occupied(source.file.clone()).await?,
        cluster_size: None,
        dirty_flag: false,
        encrypted: false,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        snapshots: Vec::new(),
        format_specific: None,
        history: None,
        content: None,
        link: None,
    };
    if format == Format::Qcow2 {
        let header = of_qcow2(&mut info, &source.file, &storage).await?;
        info.content = header.identity().content.map(|id| id.to_string());
        info.link = linkage::link_report(&source.file, &header, source.force_share).await;
    }
    Ok(info)
}

/// The facts of an image and of all below it, top first.
pub(crate) async fn chain(source: &SourceSpec) -> Result<Vec<ImageInfo>, EngineError> {
    let mut all: Vec<ImageInfo> = Vec::new();
    let mut next = Some(source.clone());
    while let Some(source) = next {
        if all.len() == DEEPEST || all.iter().any(|seen| Path::new(&seen.filename) == source.file) {
            return Err(EngineError::Invalid(format!(
                "{}: the chain of backing files has no end",
                source.file.display()
            )));
        }
        let info = info(&source).await?;
        next = match (&info.full_backing_filename, &info.backing_filename_format) {
            (Some(file), Some(format)) => {
                let format = format
                    .parse()
                    .map_err(|e| EngineError::Unsupported(format!("{}: its backing file has an {e}", info.filename)))?;
                Some(SourceSpec { file: file.into(), format: Some(format), snapshot: None, ..source })
            }
            (Some(_), None) => {
                return Err(EngineError::Unsupported(format!(
                    "{} does not record its backing file's format, and formats are not guessed",
                    info.filename
                )));
            }
            (None, _) => None,
        };
        all.push(info);
    }
    Ok(all)
}

/// Bytes that a file occupies.
async fn occupied(file: PathBuf) -> Result<u64, EngineError> {
    dataplane::offload(move || {
        let facts = fs::metadata(&file).map_err(|e| EngineError::file(file, "open", e))?;
        Ok(facts.blocks().saturating_mul(512))
    })
    .await
}

async fn of_qcow2(info: &mut ImageInfo, file: &Path, storage: &StorageHandle) -> Result<Header, EngineError> {
    let header = Header::read(storage).await?;
    let v3 = header.version >= 3;
    info.virtual_size = header.size;
    info.cluster_size = Some(header.cluster_size());
    info.dirty_flag = header.incompatible & INCOMPATIBLE_DIRTY != 0;
    if let Some(backing) = &header.backing {
        info.full_backing_filename = Some(seen_from(file, &backing.name).display().to_string());
        info.backing_filename = Some(backing.name.clone());
        info.backing_filename_format.clone_from(&backing.format);
    }
    let snapshots = SnapshotTable::read(storage, &header).await?;
    info.snapshots = snapshots
        .snapshots
        .iter()
        .map(|s| SnapshotInfo {
            id: s.id_text().into_owned(),
            name: s.name_text().into_owned(),
            vm_state_size: s.vm_state_size,
            date_sec: u64::from(s.date_seconds),
            date_nsec: s.date_nanoseconds,
            vm_clock_sec: s.vm_clock_nanoseconds / 1_000_000_000,
            vm_clock_nsec: (s.vm_clock_nanoseconds % 1_000_000_000) as u32,
            icount: s.icount,
        })
        .collect();
    let bitmaps = BitmapDirectory::read(storage, &header).await?;
    let flags = |bitmap: &formats::qcow2::Bitmap| {
        [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")]
            .into_iter()
            .filter(|(set, _)| *set)
            .map(|(_, word)| word.to_owned())
            .collect()
    };
    info.format_specific = Some(FormatSpecific::Qcow2(Qcow2Info {
        compat: if v3 { "1.1" } else { "0.10" }.to_owned(),
        compression_type: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
        .to_owned(),
        lazy_refcounts: v3.then_some(header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0),
        refcount_bits: header.refcount_bits(),
        corrupt: v3.then_some(header.incompatible & INCOMPATIBLE_CORRUPT != 0),
        extended_l2: v3.then_some(header.extended_l2()),
        data_file: header.data_file.clone(),
        data_file_raw: header.has_data_file().then_some(header.autoclear & AUTOCLEAR_RAW_DATA != 0),
        bitmaps: bitmaps
            .bitmaps
            .iter()
            .map(|b| BitmapInfo {
                flags: flags(b),
                name: b.name_text().into_owned(),
                granularity: 1u64.checked_shl(b.granularity_bits.into()).unwrap_or(0),
            })
            .collect(),
    }));
    Ok(header)
}

/// A name in an image as a path: relative names are seen from the image's directory.
fn seen_from(file: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    match file.parent() {
        Some(directory) => directory.join(name),
        None => PathBuf::from(name),
    }
}

/// How the clusters of an open qcow2 image are compressed.
pub(crate) async fn compression_of(stack: &Stack) -> Result<Compression, EngineError> {
    if stack.format() != Format::Qcow2 {
        return Err(EngineError::Unsupported(format!("{} images do not hold compressed data", stack.format())));
    }
    Ok(Header::read(stack.chain().top().storage(StorageId::IMAGE)).await?.compression)
}

/// Bytes that the image's persistent bitmaps would take in a new image with these options.
pub(crate) async fn bitmap_bytes(stack: &Stack, options: &Options) -> Result<Option<u64>, EngineError> {
    let top = stack.chain().top();
    let storage = top.storage(StorageId::IMAGE);
    let header = Header::read(storage).await?;
    let directory = BitmapDirectory::read(storage, &header).await?;
    if directory.bitmaps.is_empty() {
        return Ok(None);
    }
    let cluster = super::create::qcow2_options(header.size, options)?.cluster_size;
    let (mut bytes, mut entries) = (0u64, 0u64);
    for bitmap in directory.bitmaps.iter().filter(|b| !b.in_use) {
        let granularity = 1u64.checked_shl(bitmap.granularity_bits.into()).unwrap_or(u64::MAX);
        let data = header.size.div_ceil(granularity).div_ceil(8).next_multiple_of(cluster);
        let table = (data / cluster * 8).next_multiple_of(cluster);
        bytes = bytes.saturating_add(data).saturating_add(table);
        entries += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    Ok(Some(bytes.saturating_add(entries.next_multiple_of(cluster))))
}
