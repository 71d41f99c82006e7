//! Forgetting restore points: those that are named, or those that a policy does not keep.

use super::place::RepositorySpec;
use super::points::{PointReport, reports};
use crate::EngineError;
use repository::{Id, Kept, Policy, Repository, keep};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use utoipa::ToSchema;

/// How many points of each machine are kept: the newest ones, and the newest of each of the latest hours, days and so on that have any, by UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct KeepSpec {
    /// The newest ones.
    pub last: u32,
    /// Hours.
    pub hourly: u32,
    /// Days.
    pub daily: u32,
    /// Weeks, from Monday on.
    pub weekly: u32,
    /// Months.
    pub monthly: u32,
    /// Years.
    pub yearly: u32,
}

impl KeepSpec {
    fn policy(self) -> Result<Policy, EngineError> {
        let Self { last, hourly, daily, weekly, monthly, yearly } = self;
        if self == Self::default() {
            let text = "a policy that keeps no point at all is taken for a mistake; name the points that are to go";
            return Err(EngineError::Invalid(text.to_owned()));
        }
        Ok(Policy { last, hourly, daily, weekly, monthly, yearly, zone_minutes: 0 })
    }
}

/// Which points are to be forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForgetSpec {
    /// These: names, or the first digits of names.
    Points(Vec<String>),
    /// What a policy does not keep, of each machine by itself, or of this one alone.
    Policy(KeepSpec, Option<String>),
}

/// Why a point is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeptReason {
    /// One of the newest.
    Last,
    /// The newest of its hour.
    Hourly,
    /// The newest of its day.
    Daily,
    /// The newest of its week.
    Weekly,
    /// The newest of its month.
    Monthly,
    /// The newest of its year.
    Yearly,
    /// It is damaged, so that its machine is not known, and no policy judges it; it can be forgotten by name.
    Damaged,
}

impl KeptReason {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::Damaged => "damaged, forget it by name",
        }
    }
}

impl From<Kept> for KeptReason {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept::Last => Self::Last,
            Kept::Hourly => Self::Hourly,
            Kept::Daily => Self::Daily,
            Kept::Weekly => Self::Weekly,
            Kept::Monthly => Self::Monthly,
            Kept::Yearly => Self::Yearly,
        }
    }
}

/// A point that is kept, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct KeptPoint {
    /// The point.
    pub point: PointReport,
    /// Why.
    pub reasons: Vec<KeptReason>,
}

/// What is kept, and what goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ForgetReport {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The points that a policy keeps, oldest first; empty when points were named.
    pub kept: Vec<KeptPoint>,
    /// The points that were forgotten, or would be, oldest first.
    pub forgotten: Vec<PointReport>,
}

/// Forgets points. Their space is given back by prunes. Blocks.
///
/// Crash: each point is forgotten by itself; what was not yet is there, and the same command goes on.
///
/// # Errors
/// When the repository cannot be opened, a point or a machine is not there, or the store fails. Nothing is forgotten unless all that is named is there.
pub fn forget(spec: &RepositorySpec, what: &ForgetSpec, dry_run: bool) -> Result<ForgetReport, EngineError> {
    let keep = match what {
        ForgetSpec::Points(_) => None,
        ForgetSpec::Policy(keep, _) => Some(keep.policy()?),
    };
    let repository = spec.open()?;
    let all = reports(&repository).map_err(|e| spec.failed(e))?;
    let (kept, forgotten) = match (what, keep) {
        (ForgetSpec::Points(names), _) => (Vec::new(), named(spec, all, names)?),
        (ForgetSpec::Policy(_, machine), policy) => {
            let policy = policy.unwrap_or_default();
            judged(spec, all, &policy, machine.as_deref())?
        }
    };
    if !dry_run {
        forget_all(&repository, &forgotten).map_err(|e| spec.failed(e))?;
    }
    Ok(ForgetReport { dry_run, kept, forgotten })
}

fn forget_all(repository: &Repository, points: &[PointReport]) -> Result<(), repository::RepositoryError> {
    points.iter().filter_map(|point| Id::parse(&point.id)).try_for_each(|id| repository.forget(id))
}

/// The points of these names. Damaged ones have names like others, so they are not read for it.
fn named(spec: &RepositorySpec, all: Vec<PointReport>, names: &[String]) -> Result<Vec<PointReport>, EngineError> {
    let mut chosen = vec![false; all.len()];
    for name in names {
        let fits = |point: &PointReport| !name.is_empty() && point.id.starts_with(name.as_str());
        let fitting: Vec<usize> = match name.as_str() {
            "latest" => (0..all.len()).next_back().into_iter().collect(),
            _ => (0..all.len()).filter(|n| fits(&all[*n])).collect(),
        };
        match fitting[..] {
            [n] => chosen[n] = true,
            [] => return Err(spec.failed(repository::RepositoryError::NoPoint { name: name.clone() })),
            _ => {
                return Err(EngineError::Invalid(format!(
                    "repository {}: the names of {} points begin with {name}; give more of it",
                    spec.directory.display(),
                    fitting.len()
                )));
            }
        }
    }
    Ok(all.into_iter().zip(chosen).filter_map(|(point, chosen)| chosen.then_some(point)).collect())
}

/// What a policy keeps, with the reasons, and what not.
fn judged(
    spec: &RepositorySpec,
    all: Vec<PointReport>,
    policy: &Policy,
    machine: Option<&str>,
) -> Result<(Vec<KeptPoint>, Vec<PointReport>), EngineError> {
    let mut machines: BTreeMap<&str, Vec<(Id, u64)>> = BTreeMap::new();
    for point in &all {
        if let (Some(of), Some(id)) = (point.machine.as_deref(), Id::parse(&point.id)) {
            machines.entry(of).or_default().push((id, point.time));
        }
    }
    if let Some(machine) = machine
        && !machines.contains_key(machine)
    {
        let directory = spec.directory.display();
        return Err(EngineError::Invalid(format!(
            "repository {directory} has no point of a machine {machine:?}; `highwater points {directory}` shows all"
        )));
    }
    let mut reasons: HashMap<String, Vec<Kept>> = HashMap::new();
    for points in machines.values() {
        reasons.extend(keep(points, policy).into_iter().map(|(id, why)| (id.to_string(), why)));
    }
    let (mut kept, mut forgotten) = (Vec::new(), Vec::new());
    for point in all {
        // Damaged ones are told with any machine: they may be of it.
        if machine.is_some() && point.machine.is_some() && point.machine.as_deref() != machine {
            continue;
        }
        match reasons.get(&point.id) {
            None => kept.push(KeptPoint { point, reasons: vec![KeptReason::Damaged] }),
            Some(why) if why.is_empty() => forgotten.push(point),
            Some(why) => {
                let reasons = why.iter().map(|kept| KeptReason::from(*kept)).collect();
                kept.push(KeptPoint { point, reasons });
            }
        }
    }
    Ok((kept, forgotten))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400_000;

    fn point(n: u8, day: u64, machine: Option<&str>) -> PointReport {
        PointReport {
            id: Id([n; 16]).to_string(),
            time: day * DAY,
            machine: machine.map(str::to_owned),
            consistency: None,
            disks: Vec::new(),
            predecessor: None,
            note: String::new(),
            damaged: None,
        }
    }

    fn ids(points: &[PointReport]) -> Vec<u8> {
        points.iter().map(|point| Id::parse(&point.id).unwrap().0[0]).collect()
    }

    #[test]
    fn machines_are_judged_each_by_itself() {
        let spec = RepositorySpec::of("/r");
        let all = || vec![point(1, 1, Some("a")), point(2, 2, None), point(3, 3, Some("a")), point(4, 1, Some("b"))];
        let policy = KeepSpec { last: 1, ..KeepSpec::default() }.policy().unwrap();
        let (kept, gone) = judged(&spec, all(), &policy, None).unwrap();
        let told = |kept: &[KeptPoint]| {
            kept.iter().map(|k| (ids(std::slice::from_ref(&k.point))[0], k.reasons[0])).collect::<Vec<_>>()
        };
        assert_eq!(told(&kept), [(2, KeptReason::Damaged), (3, KeptReason::Last), (4, KeptReason::Last)]);
        assert_eq!(ids(&gone), [1]);
        let (kept, gone) = judged(&spec, all(), &policy, Some("b")).unwrap();
        assert_eq!(told(&kept), [(2, KeptReason::Damaged), (4, KeptReason::Last)]);
        assert!(gone.is_empty());
        assert!(judged(&spec, all(), &policy, Some("c")).unwrap_err().to_string().contains("\"c\""));
        assert!(KeepSpec::default().policy().is_err());
    }

    #[test]
    fn names_are_all_there_or_nothing_goes() {
        let spec = RepositorySpec::of("/r");
        let all = || vec![point(0x11, 1, Some("a")), point(0x12, 2, None), point(0x33, 3, Some("a"))];
        let chosen = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            named(&spec, all(), &names)
        };
        assert_eq!(ids(&chosen(&["12", "latest", "33"]).unwrap()), [0x12, 0x33]);
        for (names, words) in
            [(["11", "4"], "no restore point 4"), (["11", "1"], "2 points"), (["11", ""], "no restore")]
        {
            let error = crate::chain_text(&chosen(&names).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }
}
