//! What the reports about one marker say: whose content is right. A pure function of them.

use blake3::Hash;

use super::Reports;

/// What the reports so far come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No two nodes differ, and most members have not spoken yet.
    Open,
    /// More than half of the members hold this. Whoever holds something else is wrong.
    Majority(Hash),
    /// Nodes differ, and no content is that of most members.
    Split,
}

/// Compares the reports of a cluster of so many members.
pub fn verdict(reports: &Reports, members: usize) -> Verdict {
    let holders = |hash: &Hash| reports.values().filter(|other| *other == hash).count();
    if let Some(hash) = reports.values().find(|hash| 2 * holders(hash) > members) {
        return Verdict::Majority(*hash);
    }
    let all_the_same = reports.values().all(|hash| Some(hash) == reports.values().next());
    if all_the_same { Verdict::Open } else { Verdict::Split }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(contents: &[(u64, &str)]) -> Reports {
        contents.iter().map(|(node, content)| (*node, blake3::hash(content.as_bytes()))).collect()
    }

    #[test]
    fn what_more_than_half_of_the_members_hold_is_right() {
        let right = Verdict::Majority(blake3::hash(b"a"));
        assert_eq!(verdict(&reports(&[(1, "a")]), 1), right);
        assert_eq!(verdict(&reports(&[(1, "a"), (2, "a")]), 3), right, "whatever the third will say");
        assert_eq!(verdict(&reports(&[(1, "a"), (2, "b"), (3, "a")]), 3), right);
        assert_eq!(verdict(&reports(&[(1, "b"), (2, "a"), (3, "a"), (4, "c"), (5, "a")]), 5), right);
    }

    #[test]
    fn without_a_majority_a_difference_condemns_nobody() {
        assert_eq!(verdict(&reports(&[(1, "a"), (2, "b")]), 2), Verdict::Split);
        assert_eq!(verdict(&reports(&[(1, "a"), (2, "b"), (3, "c")]), 3), Verdict::Split);
        assert_eq!(verdict(&reports(&[(1, "a"), (2, "a"), (3, "b"), (4, "b")]), 4), Verdict::Split);
        assert_eq!(
            verdict(&reports(&[(1, "a"), (2, "b")]), 3),
            Verdict::Split,
            "the third may be gone for good"
        );
    }

    #[test]
    fn those_who_have_not_spoken_are_waited_for() {
        assert_eq!(verdict(&reports(&[]), 3), Verdict::Open);
        assert_eq!(verdict(&reports(&[(2, "a")]), 3), Verdict::Open);
        assert_eq!(verdict(&reports(&[(2, "a"), (3, "a")]), 5), Verdict::Open);
    }
}
