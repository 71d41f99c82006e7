//! `highwater chain …`: which images a disk is made of, and whether they are what they were bound to.

use super::Outcome;
use super::target::{self, Target};
use crate::args::{ChainVerb, DiskArg, Global};
use crate::exit::{self, Failure};
use crate::output;
use crate::progress;
use anyhow::anyhow;
use api::{ChainReport, ChildState, HashReport, LayerReport, LinkReport, LinkState};
use engine::images::Progress;
use engine::images::request::SourceSpec;
use engine::linkage::RebaseSpec;
use engine::utc_text;
use std::path::{Path, PathBuf};

pub(crate) async fn run(global: &Global, verb: ChainVerb) -> Outcome {
    match verb {
        ChainVerb::Show { disk } => {
            let report = match find(global, &disk).await? {
                Found::Report(report) => report,
                Found::File(source) => target::workshop()?.show_chain(source).await?,
            };
            print(global, &report)?;
            Ok(exit::OK)
        }
        ChainVerb::Verify { disk, hash } => {
            let report = verified(global, &disk, hash).await.map_err(|e| e.with_code(exit::FAILED))?;
            print(global, &report)?;
            Ok(if report.sound { exit::OK } else { exit::LINK_FAULT })
        }
        ChainVerb::Accept { file, format } => {
            let source = SourceSpec::of(at_rest(global, &file).await?, format);
            changed(global, &target::workshop()?.accept_chain(source).await?)
        }
        ChainVerb::Repair { file, format } => {
            let source = SourceSpec::of(at_rest(global, &file).await?, format);
            let (workshop, progress) = (target::workshop()?, Progress::new());
            let work = workshop.repair_chain(source, progress.clone());
            changed(global, &progress::watch(progress, global.quiet, work).await?)
        }
        ChainVerb::Rebase { file, format, parent, parent_format, name_only } => {
            let parent = match (parent.as_str(), parent_format) {
                ("", _) => None,
                (_, Some(format)) => Some((parent, format)),
                (_, None) => {
                    return Err(Failure::from(anyhow!(
                        "{}: give the parent's format with -F; formats are not guessed",
                        file.display()
                    ))
                    .with_code(exit::USAGE));
                }
            };
            let spec = RebaseSpec { file: at_rest(global, &file).await?, format, parent, name_only };
            let (workshop, progress) = (target::workshop()?, Progress::new());
            let work = workshop.rebase(spec, progress.clone());
            changed(global, &progress::watch(progress, global.quiet, work).await?)
        }
        ChainVerb::Forget { parent, child } => {
            target::workshop()?.forget_child(at_rest(global, &parent).await?, child.clone()).await?;
            if !global.quiet && !global.wants_json() {
                output::line(&format!(
                    "{}: {} is forgotten; it will find its parent changed when that is written to",
                    parent.display(),
                    child.display()
                ))?;
            }
            Ok(exit::OK)
        }
    }
}

/// What a DISK argument has led to.
enum Found {
    /// The report of a disk of the daemon.
    Report(ChainReport),
    /// A file to look at.
    File(SourceSpec),
}

async fn find(global: &Global, disk: &DiskArg) -> Result<Found, Failure> {
    match target::find(global, &disk.disk).await? {
        Target::Disk(client, name) => {
            target::refuse_file_options(&name, &[("-f", disk.format.is_some()), ("-U", disk.force_share)])?;
            Ok(Found::Report(client.linkage(&name).await?))
        }
        Target::File(file) => {
            Ok(Found::File(SourceSpec { force_share: disk.force_share, ..SourceSpec::of(file, disk.format) }))
        }
    }
}

async fn verified(global: &Global, disk: &DiskArg, hash: bool) -> Result<ChainReport, Failure> {
    match find(global, disk).await? {
        Found::Report(report) if !hash => Ok(report),
        Found::Report(report) => Err(anyhow!(
            "disk {:?} is in use, and hashes are taken of images at rest; close it with `highwater disk remove {}`, or \
             leave --hash out",
            report.disk,
            report.disk
        )
        .into()),
        Found::File(source) if !hash => Ok(target::workshop()?.show_chain(source).await?),
        Found::File(source) if source.force_share => {
            Err(anyhow!("{}: -U and --hash exclude each other, as bytes may change meanwhile", source.file.display())
                .into())
        }
        Found::File(source) => {
            let (workshop, progress) = (target::workshop()?, Progress::new());
            let work = workshop.prove_chain(source, progress.clone());
            Ok(progress::watch(progress, global.quiet, work).await?)
        }
    }
}

/// The file of an argument that must be one.
async fn at_rest(global: &Global, argument: &Path) -> Result<PathBuf, Failure> {
    match target::find(global, argument).await? {
        Target::File(file) => Ok(file),
        Target::Disk(_, name) => Err(anyhow!(
            "disk {name:?} is in use, and links are changed of images at rest; close it with `highwater disk remove \
             {name}` and name its file"
        )
        .into()),
    }
}

fn changed(global: &Global, report: &ChainReport) -> Outcome {
    print(global, report)?;
    Ok(exit::OK)
}

fn print(global: &Global, report: &ChainReport) -> anyhow::Result<()> {
    if global.wants_json() {
        return output::json(report);
    }
    if global.quiet {
        return Ok(());
    }
    let heading = ["layer", "format", "content", "parent", "bound", "snapshot"];
    output::table(&heading, report.layers.iter().map(row))?;
    for layer in &report.layers {
        for line in notes(layer) {
            output::line(&line)?;
        }
    }
    Ok(())
}

fn row(layer: &LayerReport) -> Vec<String> {
    let content = match (&layer.content, &layer.lapsed) {
        (Some(id), _) => id.clone(),
        (None, Some(_)) => "lapsed".to_owned(),
        (None, None) => "-".to_owned(),
    };
    let (state, bound) = match &layer.link {
        None => ("-", None),
        Some(link) => (state_word(link), link.bound),
    };
    vec![
        layer.file.display().to_string(),
        layer.format.to_string(),
        content,
        state.to_owned(),
        bound.map_or_else(|| "-".to_owned(), |ms| utc_text(ms / 1000)),
        layer.snapshot.as_ref().map_or_else(|| "-".to_owned(), |snapshot| snapshot.name.clone()),
    ]
}

/// How a link is, in one word or two.
pub(super) fn state_word(link: &LinkReport) -> &'static str {
    match link.state {
        LinkState::Unbound => "not bound",
        LinkState::Sound => "sound",
        LinkState::Fault => "FAULT",
    }
}

/// What is to be said of a layer beside its row.
fn notes(layer: &LayerReport) -> Vec<String> {
    let file = layer.file.display();
    let mut notes = Vec::new();
    if let Some(link) = &layer.link {
        notes.extend(link.text.as_ref().map(|text| format!("fault: {text}")));
        notes.extend(link.hash.and_then(|hash| hash_text(hash, link)));
    }
    for child in &layer.children {
        let child_file = child.file.display();
        notes.push(match child.state {
            ChildState::There => format!("{file}: child {child_file}"),
            ChildState::Unreadable => format!("{file}: child {child_file}, which cannot be looked at"),
            ChildState::Gone => format!("{file}: child {child_file} is gone"),
            ChildState::NamesAnother => format!("{file}: {child_file} names another parent now"),
        });
    }
    if let Some(place) = &layer.moved_to {
        notes.push(format!("{file}: the disk was moved to {}", place.display()));
    }
    if let Some(reason) = &layer.identity_file_error {
        notes.push(format!("{file}.identity cannot be used: {reason}"));
    }
    notes
}

fn hash_text(hash: HashReport, link: &LinkReport) -> Option<String> {
    let parent = link.parent.display();
    let said = match (hash, link.state) {
        (HashReport::Recorded, _) => "the hash of its content was taken and recorded",
        (HashReport::NotRecorded, _) => "the hash of its content was taken, and cannot be recorded",
        (HashReport::Same, LinkState::Fault) => {
            "the hash of its content is the recorded one: what the child was bound to is there (`chain repair` binds it)"
        }
        (HashReport::Same, _) => "the hash of its content is the recorded one",
        (HashReport::Different, LinkState::Fault) => "the hash of its content is not the recorded one: it was changed",
        (HashReport::Different, _) => return None, // The fault says it.
        (HashReport::Unknown, _) => "no hash was recorded of what the child was bound to",
    };
    Some(format!("{parent}: {said}"))
}
