//! Questions to a history, and what their answers must be.

use tracking::{Change, ChangeKind, History};

/// All changes between two points, asked for in parts of at most about `most`.
pub(crate) async fn all_changes(history: &History, since: &str, until: Option<&str>, most: usize) -> Vec<Change> {
    let query = history.changes(since, until).expect("trusted");
    let mut changes = Vec::new();
    let mut next = Some(0);
    while let Some(from) = next {
        let span = history.next_changes(&query, from, most).await.expect("readable");
        changes.extend(span.changes);
        next = span.next;
    }
    changes
}

/// Every byte that differs is in a change; what is called zero is zero.
pub(crate) fn judge(before: &[u8], after: &[u8], changes: &[Change], what: &str) {
    let same = |from: usize, to: usize| {
        if before[from..to] != after[from..to] {
            let byte = (from..to).find(|at| before[*at] != after[*at]);
            panic!("{what}: the change of byte {byte:?} was missed");
        }
    };
    let mut at = 0;
    for Change { range, kind } in changes {
        let (start, end) = (range.offset() as usize, range.end() as usize);
        assert!(at <= start && start < end, "{what}: changes are in order");
        same(at, start);
        if *kind != ChangeKind::Data {
            let byte = after[start..end].iter().position(|byte| *byte != 0);
            assert_eq!(byte, None, "{what}: {range} is called {kind}, and this byte of it is not zero");
        }
        at = end;
    }
    same(at, after.len());
}

/// The changes since a point as letters, one for each granule of so many bytes: data, zero, discarded, `.` for none.
pub(crate) async fn letters(history: &History, since: &str, until: Option<&str>, granule: u64, size: u64) -> String {
    let mut letters = vec!['.'; size.div_ceil(granule) as usize];
    for Change { range, kind } in all_changes(history, since, until, 3).await {
        let letter = match kind {
            ChangeKind::Data => 'd',
            ChangeKind::Zero => 'z',
            ChangeKind::Discarded => 'x',
        };
        letters[(range.offset() / granule) as usize..range.end().div_ceil(granule) as usize].fill(letter);
    }
    letters.into_iter().collect()
}
