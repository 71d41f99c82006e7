//! `highwater tree`: which images depend on which, as a picture.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{Global, TreeArgs};
use crate::change_picture::chart::colour_wanted;
use crate::exit::{self, Failure};
use crate::output;
use crate::tree_picture::text::{Style, ascii_wanted, draw};
use crate::tree_picture::{Finding, Forest, Layer, Link, Marks, Snapshot, png_file, svg};
use anyhow::{Context, anyhow};
use api::{
    ChainReport, Client, DiskStatus, Format, FormatSpecific, HistoryReport, ImageInfo, LayerReport, LinkState,
    MarkReport, SnapshotConsistency,
};
use engine::history::HistorySource;
use engine::images::Workshop;
use engine::images::request::SourceSpec;
use engine::{HistorySpec, chain_text};
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a picture is written as.
#[derive(Clone, Copy)]
enum Kind {
    Svg,
    Png,
}

pub(crate) async fn run(global: &Global, args: TreeArgs) -> Outcome {
    // Before any work is done for a picture that cannot be.
    let picture = args.picture.as_deref().map(|file| kind_of(file).map(|kind| (file, kind))).transpose()?;
    let forest = read(global, &args).await?;
    if let Some((file, kind)) = picture {
        write(file, kind, &forest)?;
    }
    if global.wants_json() {
        output::json(&forest.report())?;
    } else if let Some((file, _)) = picture {
        if !global.quiet {
            output::line(&format!("{}: a picture of {} images", file.display(), forest.count()))?;
        }
    } else {
        let ascii = args.ascii || ascii_wanted(|name| std::env::var_os(name));
        let colour = colour_wanted(std::io::stdout().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
        output::line(draw(&forest, Style { ascii, colour }).trim_end())?;
    }
    Ok(exit::OK)
}

fn kind_of(file: &Path) -> Result<Kind, Failure> {
    match file.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("svg") => Ok(Kind::Svg),
        Some("png") => Ok(Kind::Png),
        _ => {
            Err(Failure::from(anyhow!("{}: a picture is a .svg or a .png file", file.display())).with_code(exit::USAGE))
        }
    }
}

fn write(file: &Path, kind: Kind, forest: &Forest) -> Result<(), Failure> {
    let named = || format!("{}: the picture cannot be written", file.display());
    let mut out = BufWriter::new(File::create(file).with_context(named)?);
    match kind {
        Kind::Svg => out.write_all(svg::draw(forest).as_bytes()).with_context(named)?,
        Kind::Png => png_file::write_png(&mut out, forest).with_context(named)?,
    }
    out.flush().with_context(named)?;
    Ok(())
}

async fn read(global: &Global, args: &TreeArgs) -> Result<Forest, Failure> {
    let mut forest = Forest::default();
    if args.disks.is_empty() {
        let client = target::client(global)?;
        for disk in client.disks().await?.disks {
            let chain = of_disk(&client, &disk).await?;
            add(&mut forest, chain, client.linkage(&disk.spec.name).await.ok());
        }
        return Ok(forest);
    }
    let mut workshop: Option<Workshop> = None;
    for argument in &args.disks {
        match target::find(global, argument).await? {
            Target::Disk(client, name) => {
                target::refuse_file_options(&name, &[("-f", args.format.is_some()), ("-U", args.force_share)])?;
                let disk = client.disk(&name).await?;
                let chain = of_disk(&client, &disk).await?;
                add(&mut forest, chain, client.linkage(&name).await.ok());
            }
            Target::File(file) => {
                let source = SourceSpec {
                    force_share: args.force_share,
                    ..SourceSpec::of(target::absolute(&file)?, args.format)
                };
                let workshop = match &mut workshop {
                    Some(workshop) => workshop,
                    none => none.insert(target::workshop()?),
                };
                let chain = of_file(workshop, source.clone()).await?;
                // A chain that cannot be opened as a whole has told so already.
                add(&mut forest, chain, workshop.show_chain(source).await.ok());
            }
        }
    }
    Ok(forest)
}

/// Adds a chain, with what is known of how its images are bound, and of others that stand on them.
fn add(forest: &mut Forest, mut chain: Vec<Layer>, linkage: Option<ChainReport>) {
    let reports = linkage.map(|report| report.layers).unwrap_or_default();
    for report in &reports {
        let file = same_for_all(&report.file);
        if let Some(layer) = chain.iter_mut().find(|layer| layer.file == file) {
            add_linkage(layer, report);
        }
    }
    forest.add_chain(chain);
    for report in &reports {
        for child in report.children.iter().filter(|child| child.counts()) {
            let file = same_for_all(&child.file);
            // Only qcow2 images name parents.
            let actual_size = file.metadata().ok().map(|facts| facts.blocks() * 512);
            forest.add_child(
                &same_for_all(&report.file),
                Layer { file, format: Some(Format::Qcow2.to_string()), actual_size, ..Layer::default() },
            );
        }
    }
}

fn add_linkage(layer: &mut Layer, report: &LayerReport) {
    layer.content_id.clone_from(&report.content);
    layer.link = report.link.as_ref().map(|link| match link.state {
        LinkState::Sound => Link::Sound,
        LinkState::Unbound => Link::Unbound,
        LinkState::Fault => Link::Fault,
    });
    if let Some(text) =
        report.link.as_ref().filter(|link| link.state == LinkState::Fault).and_then(|link| link.text.as_ref())
    {
        layer.findings.push(Finding::fault(text.clone()));
    }
    layer.snapshot = report.snapshot.as_ref().map(|snapshot| Snapshot {
        name: snapshot.name.clone(),
        time: Some(snapshot.time / 1000),
        consistency: Some(
            match snapshot.consistency {
                SnapshotConsistency::Crash => "crash",
                SnapshotConsistency::Frozen => "frozen",
                SnapshotConsistency::Offline => "offline",
            }
            .to_owned(),
        ),
    });
    if let Some(place) = &report.moved_to {
        layer.findings.push(Finding::warning(format!("the disk has moved to {}", place.display())));
    }
    if let Some(reason) = &report.identity_file_error {
        layer.findings.push(Finding::warning(format!("what is known of it cannot be used: {reason}")));
    }
}

/// The chain of a daemon's disk, top first. One that is not open is shown with the reason.
async fn of_disk(client: &Client, disk: &DiskStatus) -> Result<Vec<Layer>, Failure> {
    let name = &disk.spec.name;
    let mut chain = match client.chain(name).await {
        Ok(chain) => chain.iter().map(layer_of_image).collect(),
        Err(error) if error.kind().is_some() => {
            let reason = disk.error.clone().unwrap_or_else(|| error.to_string());
            vec![Layer {
                file: same_for_all(&disk.spec.image.file),
                format: disk.format.map(|format| format.to_string()),
                virtual_size: disk.virtual_size,
                findings: vec![Finding::fault(format!("disk {name:?} is not open: {reason}"))],
                ..Layer::default()
            }]
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(top) = chain.first_mut() {
        top.asked = true;
        top.disks = vec![name.clone()];
        // It is open: that its image says so is no finding.
        top.findings.retain(|finding| finding.text != NOT_CLOSED);
        if top.marks.as_ref().is_some_and(|marks| marks.count > 0) {
            // Counted they are already.
            name_marks(top, &client.marks(name).await.unwrap_or_default());
        }
    }
    Ok(chain)
}

/// The chain of a file, top first. An image below that cannot be read is shown with the reason, and ends the chain.
async fn of_file(workshop: &Workshop, source: SourceSpec) -> Result<Vec<Layer>, Failure> {
    let top = source.clone();
    let mut chain: Vec<Layer> = Vec::new();
    let mut next = Some(source);
    while let Some(source) = next.take() {
        let (file, format) = (source.file.clone(), source.format);
        let info = match workshop.info(source, false).await {
            Ok(mut info) => info.swap_remove(0),
            Err(error) if chain.is_empty() => return Err(error.into()),
            Err(error) => {
                chain.push(unreadable(&file, format, chain_text(&error)));
                break;
            }
        };
        let mut layer = layer_of_image(&info);
        let parent = info.full_backing_filename.as_ref().map(PathBuf::from);
        let format = info.backing_filename_format.as_deref().map(str::parse::<Format>);
        match (parent, format) {
            (None, _) => {}
            (Some(parent), _) if chain.iter().any(|seen| seen.file == same_for_all(&parent)) => {
                layer.findings.push(Finding::fault("the chain has no end: its parent depends on it"));
            }
            (Some(parent), Some(Ok(format))) => {
                next = Some(SourceSpec { file: parent, format: Some(format), snapshot: None, ..top.clone() });
            }
            (Some(parent), format) => {
                let (file, format) =
                    (layer.file.display(), format.and_then(Result::err).map(|error| error.to_string()));
                let text = match format {
                    Some(error) => format!("{file} says of it: {error}"),
                    None => format!("{file} does not record its format, and formats are not guessed"),
                };
                chain.push(layer);
                chain.push(unreadable(&parent, None, text));
                break;
            }
        }
        chain.push(layer);
    }
    let whole = chain.iter().all(|layer| layer.health() < crate::tree_picture::Health::Fault);
    if let Some(layer) = chain.first_mut() {
        layer.asked = true;
        // Which opens the chain.
        if whole && let Some(history) = workshop.history_of(top.clone(), None).await? {
            add_history(layer, &history);
            if layer.marks.as_ref().is_some_and(|marks| marks.count > 0) {
                let source =
                    HistorySource { file: top.file.clone(), format: top.format, history: HistorySpec::default() };
                let marks = workshop.marks(source).await.map(|(_, marks)| marks);
                name_marks(layer, &marks.unwrap_or_default());
            }
        }
    }
    Ok(chain)
}

fn unreadable(file: &Path, format: Option<Format>, reason: String) -> Layer {
    Layer {
        file: same_for_all(file),
        format: format.map(|format| format.to_string()),
        findings: vec![Finding::fault(reason)],
        ..Layer::default()
    }
}

const NOT_CLOSED: &str = "it was not closed cleanly, or somebody writes to it";

/// What a picture shows of an image by itself; [`add_linkage`] has how it stands to others.
fn layer_of_image(info: &ImageInfo) -> Layer {
    let mut layer = Layer {
        file: same_for_all(Path::new(&info.filename)),
        format: Some(info.format.to_string()),
        virtual_size: Some(info.virtual_size),
        actual_size: Some(info.actual_size),
        ..Layer::default()
    };
    if info.dirty_flag {
        layer.findings.push(Finding::warning(NOT_CLOSED));
    }
    if info.encrypted {
        layer.findings.push(Finding::fault("it is encrypted, which cannot be read"));
    }
    if let Some(FormatSpecific::Qcow2(own)) = &info.format_specific
        && own.corrupt == Some(true)
    {
        layer.findings.push(Finding::fault("it is marked as corrupt; see `highwater check`"));
    }
    if let Some(history) = &info.history {
        add_history(&mut layer, history);
    }
    layer
}

fn add_history(layer: &mut Layer, history: &HistoryReport) {
    layer.marks = Some(Marks { count: history.marks, refused: history.refused, names: Vec::new() });
    if let Some(reason) = history.reason.as_ref().filter(|_| history.file.is_some()) {
        layer.findings.push(Finding::warning(match (history.kept, history.refused) {
            (false, _) => format!("history: {reason}"),
            (true, 0) => format!("its history has begun anew: {reason}"),
            (true, _) => format!("marks are refused: {reason}"),
        }));
    }
}

fn name_marks(layer: &mut Layer, found: &[MarkReport]) {
    if let Some(marks) = &mut layer.marks {
        marks.names = found.iter().map(|mark| mark.name.clone()).collect();
    }
}

/// The one path that all names of a file lead to, so that chains meet in it; the name itself when nothing is there.
fn same_for_all(file: &Path) -> PathBuf {
    file.canonicalize().unwrap_or_else(|_| std::path::absolute(file).unwrap_or_else(|_| file.to_owned()))
}
