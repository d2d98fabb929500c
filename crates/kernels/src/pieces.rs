//! Work that may fail, cut into pieces: how files are read on all threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mica_threads::{FnTask, Pool, Scratch};

use crate::KernelError;

const NAME: &str = "read";

/// Does `work` for each piece, on all threads of the pool. Of several that fail, the first in order counts; those
/// after it may be left out.
///
/// # Errors
/// Outside a panic or too little memory, inside what `work` failed with.
pub fn in_pieces<E: Send>(
    pool: &Pool,
    pieces: usize,
    work: impl Fn(usize, &mut Scratch) -> Result<(), E> + Sync + Send,
) -> Result<Result<(), E>, KernelError> {
    let failure: Mutex<Option<(usize, E)>> = Mutex::new(None);
    let first = AtomicUsize::new(usize::MAX);
    let run = |piece: usize, scratch: &mut Scratch| {
        if piece > first.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = work(piece, scratch) {
            let mut failure = failure.lock().expect("no code panics while it holds the failure");
            if piece < first.load(Ordering::Relaxed) {
                first.store(piece, Ordering::Relaxed);
                *failure = Some((piece, error));
            }
        }
    };
    pool.run(&[Box::new(FnTask::new(NAME, pieces, run))])
        .map_err(|panic| KernelError::new(NAME, panic.to_string()))?;
    let failure = failure.into_inner().expect("no code panics while it holds the failure");
    Ok(failure.map_or(Ok(()), |(_, error)| Err(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_in_order_counts() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            let done = AtomicUsize::new(0);
            let count = |piece: usize, bad: &[usize]| {
                done.fetch_add(1, Ordering::Relaxed);
                if bad.contains(&piece) { Err(piece) } else { Ok(()) }
            };
            assert_eq!(in_pieces(&pool, 100, |piece, _| count(piece, &[])).unwrap(), Ok(()));
            assert_eq!(done.load(Ordering::Relaxed), 100);
            for _ in 0..20 {
                let outcome = in_pieces(&pool, 100, |piece, _| count(piece, &[97, 34, 35, 66])).unwrap();
                assert_eq!(outcome, Err(34), "{threads} threads");
            }
            assert!(in_pieces::<()>(&pool, 2, |_, _| panic!("a bug")).is_err());
        }
    }
}
