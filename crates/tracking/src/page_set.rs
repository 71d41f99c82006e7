//! A set of pages.

/// Pages by number, as bits.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub(crate) fn insert(&mut self, page: usize) {
        if page / 64 >= self.words.len() {
            self.words.resize(page / 64 + 1, 0);
        }
        self.words[page / 64] |= 1 << (page % 64);
    }

    pub(crate) fn contains(&self, page: usize) -> bool {
        self.words.get(page / 64).is_some_and(|word| word & 1 << (page % 64) != 0)
    }

    /// In ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(n, word)| {
            let mut word = *word;
            std::iter::from_fn(move || {
                if word == 0 {
                    return None;
                }
                let bit = word.trailing_zeros() as usize;
                word &= word - 1;
                Some(n * 64 + bit)
            })
        })
    }

    pub(crate) fn add(&mut self, other: &Self) {
        other.iter().for_each(|page| self.insert(page));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members() {
        let mut set = PageSet::default();
        for page in [300, 3, 64, 3] {
            set.insert(page);
        }
        assert_eq!(set.iter().collect::<Vec<_>>(), [3, 64, 300]);
        assert!(set.contains(64) && !set.contains(65) && !set.contains(1 << 20));
    }
}
