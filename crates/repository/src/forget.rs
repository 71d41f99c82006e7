//! Which points to keep: a pure function of their times.

use crate::error::Result;
use crate::id::Id;
use crate::records::{self, forgotten_name};
use crate::repository::Repository;
use std::collections::HashMap;

/// How many points to keep: the newest ones, and the newest of each of the latest hours, days and so on that have any.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
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
    /// Minutes by which the local time is ahead of UTC: where a day begins.
    pub zone_minutes: i32,
}

/// Why a point is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
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
}

/// For each point (name and time in milliseconds since 1970, in any order), newest first, why it is kept; no reason: it may go. A policy that keeps
/// nothing keeps everything for `last`: an empty policy is taken for a mistake.
#[must_use]
pub fn keep(points: &[(Id, u64)], policy: &Policy) -> Vec<(Id, Vec<Kept>)> {
    let mut points = points.to_vec();
    points.sort_unstable_by_key(|(id, ms)| std::cmp::Reverse((*ms, *id)));
    let Policy { last, hourly, daily, weekly, monthly, yearly, zone_minutes } = *policy;
    let empty = [last, hourly, daily, weekly, monthly, yearly] == [0; 6];
    let mut left = HashMap::new();
    let rules = [
        (Kept::Hourly, hourly),
        (Kept::Daily, daily),
        (Kept::Weekly, weekly),
        (Kept::Monthly, monthly),
        (Kept::Yearly, yearly),
    ];
    let mut kept = Vec::with_capacity(points.len());
    for (n, (id, ms)) in points.iter().enumerate() {
        let mut why = Vec::new();
        if empty || n < last as usize {
            why.push(Kept::Last);
        }
        for (rule, most) in rules {
            let bucket = bucket(rule, *ms, zone_minutes);
            let (used, latest) = left.entry(rule as u8).or_insert((0, None));
            // Points come newest first, so a bucket's points are together.
            if *used < most && *latest != Some(bucket) {
                (*used, *latest) = (*used + 1, Some(bucket));
                why.push(rule);
            }
        }
        kept.push((*id, why));
    }
    kept
}

fn bucket(rule: Kept, ms: u64, zone_minutes: i32) -> i64 {
    let seconds = (ms / 1000) as i64 + i64::from(zone_minutes) * 60;
    let days = seconds.div_euclid(86_400);
    match rule {
        Kept::Last => 0,
        Kept::Hourly => seconds.div_euclid(3600),
        Kept::Daily => days,
        Kept::Weekly => (days + 3).div_euclid(7), // 1970 began on a Thursday.
        Kept::Monthly => month_of(days),
        Kept::Yearly => month_of(days).div_euclid(12),
    }
}

/// Months since the year 0, from days since 1970 (Gregorian).
fn month_of(days: i64) -> i64 {
    // Years from March on, so that the leap day is the last: 400 years have 146,097 days.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day = shifted.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let in_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * in_year + 2) / 153;
    (era * 400 + year) * 12 + month + 2
}

impl Repository {
    /// Forgets a point, readable or not: it is not listed any more, and its space goes by later prunes.
    ///
    /// Crash: one record, by `put_new`. The point's object stays until a prune finds the record old enough, so that a backup that builds upon the
    /// point is seen before anything of it goes.
    pub fn forget(&self, id: Id) -> Result<()> {
        let inner = &*self.inner;
        let name = forgotten_name(id);
        match inner.store.look(&name) {
            Ok(_) => return Ok(()),
            Err(e) if e.kind == crate::StoreErrorKind::Missing => {}
            Err(e) => return Err(crate::RepositoryError::store(&name, "look at")(e)),
        }
        let mark = records::forgotten_bytes(id, inner.host.now_ms());
        records::put_new(&*inner.store, &*inner.host, &inner.secret, &name, mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    fn id(n: u64) -> Id {
        Id(u128::from(n).to_be_bytes())
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        let month = |days: i64| (month_of(days).div_euclid(12), month_of(days).rem_euclid(12) + 1);
        assert_eq!(month(0), (1970, 1));
        assert_eq!(month(-1), (1969, 12));
        assert_eq!(month(58), (1970, 2));
        assert_eq!(month(59), (1970, 3));
        assert_eq!(month(11_016), (2000, 2)); // 29 February
        assert_eq!(month(11_017), (2000, 3));
        assert_eq!(month(20_782), (2026, 11));
    }

    #[test]
    fn newest_of_each_bucket_is_kept() {
        // Every hour for 60 days.
        let points: Vec<_> = (0..60 * 24).map(|n| (id(n), 1_700_000_000_000 + n * HOUR)).collect();
        let policy = Policy { last: 2, hourly: 3, daily: 4, weekly: 2, monthly: 5, yearly: 1, zone_minutes: 60 };
        let kept = keep(&points, &policy);
        let count = |rule| kept.iter().filter(|(_, why)| why.contains(&rule)).count();
        assert_eq!([count(Kept::Last), count(Kept::Hourly), count(Kept::Daily), count(Kept::Weekly)], [2, 3, 4, 2]);
        assert_eq!([count(Kept::Monthly), count(Kept::Yearly)], [3, 1]); // No more months have any.
        assert_eq!(kept[0].0, id(60 * 24 - 1));
        assert_eq!(kept[0].1.len(), 6);
        assert!(keep(&points, &Policy::default()).iter().all(|(_, why)| !why.is_empty()));
        // What is kept stays kept when the others have gone.
        let rest: Vec<_> =
            points.iter().copied().filter(|(p, _)| kept.iter().any(|(k, why)| k == p && !why.is_empty())).collect();
        assert!(keep(&rest, &policy).iter().all(|(_, why)| !why.is_empty()));
    }
}
