//! Reference counts of 1 to 64 bits in a row of bytes. Specification: "Refcount block entry".

/// The count at `index`; `order` is the logarithm of its width in bits.
pub(super) fn get(bytes: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = (1u16 << (1 << order)) - 1;
            u64::from(u16::from(bytes[bit / 8]) >> (bit % 8) & mask)
        }
        _ => {
            let width = 1usize << (order - 3);
            bytes[index * width..(index + 1) * width].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        }
    }
}

/// Sets the count at `index`, which fits into the width.
pub(super) fn set(bytes: &mut [u8], order: u32, index: usize, count: u64) {
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = ((1u16 << (1 << order)) - 1) as u8;
            let byte = &mut bytes[bit / 8];
            *byte = *byte & !(mask << (bit % 8)) | (count as u8 & mask) << (bit % 8);
        }
        _ => {
            let width = 1usize << (order - 3);
            let start = index * width;
            bytes[start..start + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
        }
    }
}

/// Sets the first `count` counts to 1.
pub(super) fn fill_with_ones(bytes: &mut [u8], order: u32, count: u64) {
    for index in 0..count as usize {
        set(bytes, order, index, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let count = (64 * 8) >> order;
            let mut bytes = vec![0; 64];
            for index in 0..count {
                set(&mut bytes, order, index, (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max);
            }
            for index in 0..count {
                assert_eq!(get(&bytes, order, index), (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max);
            }
        }
    }

    #[test]
    fn bit_zero_is_the_least_significant() {
        let mut bytes = [0; 2];
        set(&mut bytes, 1, 1, 2);
        assert_eq!(bytes, [0b1000, 0]);
        set(&mut bytes, 4, 0, 0x0102);
        assert_eq!(bytes, [1, 2]);
    }
}
