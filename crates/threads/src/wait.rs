//! How workers wait: they look, then offer their core between looks, then sleep.
//!
//! Looking costs nobody anything for some microseconds. For longer it takes a core from others, heat from the cores
//! that compute, and time from a control group's quota. Sleeping costs the sleeper: waking it takes from some
//! microseconds to a millisecond.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a worker looks before it offers its core between looks.
const GRACE: Duration = Duration::from_micros(10);

/// Looking again and again.
#[derive(Default)]
pub(crate) struct Wait {
    looks: u32,
    since: Option<Instant>,
}

impl Wait {
    /// Waits for a moment, or offers the core if it has been long: whoever is waited for may have been woken
    /// on the same one. How long it has been, now and then, since the clock costs more than a look.
    pub fn moment(&mut self) -> Duration {
        std::hint::spin_loop();
        self.looks += 1;
        if !self.looks.is_multiple_of(64) {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let waited = now - *self.since.get_or_insert(now);
        if waited > GRACE {
            std::thread::yield_now();
        }
        waited
    }
}

/// Where workers sleep until something has happened, of which whoever makes it happen tells.
///
/// That costs the teller a look at a flag while nobody sleeps. The flag is raised by each sleeper *before* it looks
/// for the last time whether it happened, and read by the teller *after* it made it happen, both in the one order of
/// `SeqCst`: one of the two sees the other. It is lowered by whoever wakes, so that the next teller does not do so
/// again while they are on their way; who wakes for nothing raises it again.
#[derive(Default)]
pub(crate) struct Sleep {
    flag: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Sleep {
    /// Sleeps until `happened`, which looks with `SeqCst`.
    pub fn until(&self, happened: impl Fn() -> bool) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            self.flag.store(true, Ordering::SeqCst);
            if happened() {
                return;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Wakes who sleeps, after something has happened by a store with `SeqCst`.
    pub fn tell(&self) {
        if self.is_used() {
            // From raising the flag to being asleep a sleeper holds the lock, so all that raised it are woken.
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.flag.store(false, Ordering::SeqCst);
            self.wake.notify_all();
        }
    }

    /// Whether there may be anybody to wake.
    pub fn is_used(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn spin(times: usize) {
        (0..times).for_each(|_| std::hint::spin_loop());
    }

    #[test]
    fn nobody_sleeps_through_what_happens() {
        // Each round ends when all sleepers have seen it: one that is not woken would end the test here.
        const ROUNDS: usize = 20_000;
        for (sleepers, tellers) in [(1, 1), (3, 1), (2, 2)] {
            let (sleep, round) = (Sleep::default(), AtomicUsize::new(0));
            let seen: Vec<AtomicUsize> = (0..sleepers).map(|_| AtomicUsize::new(0)).collect();
            std::thread::scope(|scope| {
                for mine in &seen {
                    let (sleep, round) = (&sleep, &round);
                    scope.spawn(move || {
                        let mut last = 0;
                        while last < ROUNDS {
                            sleep.until(|| {
                                let happened = round.load(Ordering::SeqCst) != last;
                                // Much can happen between the look and what comes of it.
                                spin(last % 50);
                                happened
                            });
                            last = round.load(Ordering::SeqCst);
                            mine.store(last, Ordering::SeqCst);
                        }
                    });
                }
                for teller in 0..tellers {
                    let (sleep, round, seen) = (&sleep, &round, &seen);
                    scope.spawn(move || {
                        for next in (1..=ROUNDS).filter(|next| next % tellers == teller) {
                            // The teller before may still be about to wake whom this one tells.
                            let mut looks = 0;
                            while round.load(Ordering::SeqCst) != next - 1
                                || seen.iter().any(|seen| seen.load(Ordering::SeqCst) != next - 1)
                            {
                                looks += 1;
                                if looks < 1000 { std::hint::spin_loop() } else { std::thread::yield_now() }
                            }
                            // They are on their way to sleep, sometimes asleep.
                            spin(next % 97 * (next % 3));
                            round.store(next, Ordering::SeqCst);
                            sleep.tell();
                        }
                    });
                }
            });
            assert_eq!(round.into_inner(), ROUNDS, "{sleepers} sleepers, {tellers} tellers");
        }
    }
}
