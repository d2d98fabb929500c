//! Which row comes when.
//!
//! An epoch's order is a pure function of (seed, epoch, number of rows), so a checkpoint needs no list:
//! epoch and position are enough to go on exactly where the run was.

use crate::rng::Rng;
use crate::{Error, Result};

/// Names the random stream of row orders, apart from others with the same seed.
const ROWS: u64 = 0x726f_7773;

/// The rows of one epoch in their order: a permutation of `0..rows`, or `0..rows` itself.
///
/// Costs 4 bytes a row while it is held (the index of the file costs 16).
pub fn epoch_order(rows: usize, seed: u64, epoch: u64, shuffle: bool) -> Result<Vec<u32>> {
    let count = u32::try_from(rows).map_err(|_| {
        Error::Config(format!(
            "{rows} rows are more than the 4,294,967,295 that one run can order; split the data"
        ))
    })?;
    let mut order: Vec<u32> = (0..count).collect();
    if shuffle {
        Rng::new(seed, &[ROWS, epoch]).shuffle(&mut order);
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_permutations_that_differ_by_seed_and_epoch() {
        let order = |seed, epoch| epoch_order(50, seed, epoch, true).unwrap();
        let mut seen = Vec::new();
        for (seed, epoch) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let this = order(seed, epoch);
            assert_eq!(this, order(seed, epoch));
            let mut sorted = this.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<u32>>());
            assert!(!seen.contains(&this));
            seen.push(this);
        }
        assert_eq!(epoch_order(3, 9, 9, false).unwrap(), [0, 1, 2]);
        assert!(epoch_order(0, 0, 0, true).unwrap().is_empty());
    }
}
