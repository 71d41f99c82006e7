//! The Hilbert curve through a square.

/// Column and row of the `n`th place on the curve through a square of `2^order` by `2^order` places (`order` at most
/// 16, `n` inside the square).
pub(super) fn place(order: u32, n: u32) -> (u32, u32) {
    let (mut x, mut y) = (0, 0);
    let mut rest = n;
    for level in 0..order {
        let side = 1 << level;
        let right = (rest >> 1) & 1;
        let down = (rest ^ right) & 1;
        // The curve through a quarter begins and ends at corners that the quarters around it reach.
        if down == 0 {
            if right == 1 {
                (x, y) = (side - 1 - x, side - 1 - y);
            }
            (x, y) = (y, x);
        }
        x += side * right;
        y += side * down;
        rest >>= 2;
    }
    (x, y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_smallest_curves() {
        assert_eq!(place(0, 0), (0, 0));
        assert_eq!([0, 1, 2, 3].map(|n| place(1, n)), [(0, 0), (0, 1), (1, 1), (1, 0)]);
    }

    #[test]
    fn each_step_is_to_a_neighbour_and_no_place_comes_twice() {
        for order in 1..=6 {
            let places: Vec<(u32, u32)> = (0..1 << (2 * order)).map(|n| place(order, n)).collect();
            for pair in places.windows(2) {
                let distance = pair[0].0.abs_diff(pair[1].0) + pair[0].1.abs_diff(pair[1].1);
                assert_eq!(distance, 1, "order {order}: {pair:?}");
            }
            assert!(places.iter().all(|(x, y)| *x < 1 << order && *y < 1 << order));
            assert_eq!(places.iter().collect::<HashSet<_>>().len(), places.len());
        }
    }
}
