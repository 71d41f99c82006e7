//! Which disk of which restore point somebody means.

use super::PointSpec;
use crate::EngineError;
use repository::{Point, PointDisk, Repository, RepositoryError};

/// A disk of a point, and the repository that it is in.
pub(super) struct Opened {
    pub(super) repository: Repository,
    pub(super) point: Point,
    pub(super) disk: PointDisk,
}

impl Opened {
    /// Finds it. Blocks.
    ///
    /// # Errors
    /// When there is none, or several could be meant: the newest point of another machine is nobody's wish.
    pub(super) fn find(wanted: &PointSpec) -> Result<Self, EngineError> {
        let PointSpec { repository: spec, point, machine, disk } = wanted;
        let (machine, disk) = (machine.as_deref(), disk.as_deref());
        let repository = spec.open()?;
        let point = match point.as_str() {
            "latest" => newest(&repository, machine).map_err(|e| spec.failed(e))?,
            name => repository.find_point(name).map_err(|e| spec.failed(e))?,
        };
        if let Some(machine) = machine
            && point.machine != machine
        {
            return Err(EngineError::Invalid(format!("point {} is of {}, not of {machine}", point.id, point.machine)));
        }
        let names = || point.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = match (disk, &point.disks[..]) {
            (None, [one]) => one,
            (None, _) => {
                return Err(EngineError::Invalid(format!(
                    "point {} has several disks; say which one with --disk: {}",
                    point.id,
                    names()
                )));
            }
            (Some(name), _) => point.disk(name).ok_or_else(|| {
                EngineError::Invalid(format!("point {} has no disk {name}; it has {}", point.id, names()))
            })?,
        };
        let disk = found.clone();
        Ok(Self { repository, point, disk })
    }
}

/// The newest point of a machine, or of the only one.
fn newest(repository: &Repository, machine: Option<&str>) -> Result<Point, RepositoryError> {
    let mut newest: Option<Point> = None;
    for id in repository.point_ids()?.into_iter().rev() {
        let point = match repository.point(id) {
            Ok(point) => Point { attachments: Vec::new(), ..point },
            // Of the newest one nobody can say whose it is.
            Err(error) if newest.is_none() => return Err(error),
            Err(_) => continue,
        };
        match (&newest, machine) {
            (_, Some(machine)) if point.machine == machine => return Ok(point),
            (_, Some(_)) => {}
            (None, None) => newest = Some(point),
            (Some(newest), None) if newest.machine != point.machine => {
                return Err(RepositoryError::Invalid(format!(
                    "there are points of several machines, {} and {} among them; say which one is meant with --vm",
                    newest.machine, point.machine
                )));
            }
            (Some(_), None) => {}
        }
    }
    newest.ok_or_else(|| RepositoryError::NoPoint {
        name: machine.map_or_else(|| "latest".to_owned(), |machine| format!("latest of {machine}")),
    })
}
