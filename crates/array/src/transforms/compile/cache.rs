//! Plans by signature, bounded: the one that was not used for the longest time goes first.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Mutex;

/// A bounded map from signatures to plans.
pub(crate) struct Cache<K, V> {
    bound: usize,
    entries: Mutex<Entries<K, V>>,
}

struct Entries<K, V> {
    map: HashMap<K, (V, u64)>,
    clock: u64,
}

impl<K: Eq + Hash + Clone, V: Clone> Cache<K, V> {
    pub(crate) fn new(bound: usize) -> Cache<K, V> {
        Cache { bound, entries: Mutex::new(Entries { map: HashMap::new(), clock: 0 }) }
    }

    /// The plan of this signature. If there is none, `make` makes it, without the lock: it may
    /// run code that comes here again. Two threads that miss at once both make one.
    pub(crate) fn get_or_make<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(value) = self.find(&key) {
            return Ok(value);
        }
        let value = make()?;
        let mut entries = self.lock();
        let clock = entries.tick();
        let kept = entries.map.entry(key).or_insert((value, clock)).0.clone();
        let oldest = |entries: &Entries<K, V>| {
            let (key, _) = entries.map.iter().min_by_key(|(_, (_, used))| *used)?;
            Some(key.clone())
        };
        while entries.map.len() > self.bound
            && let Some(key) = oldest(&entries)
        {
            entries.map.remove(&key);
        }
        Ok(kept)
    }

    /// How many plans there are.
    pub(crate) fn len(&self) -> usize {
        self.lock().map.len()
    }

    fn find(&self, key: &K) -> Option<V> {
        let mut entries = self.lock();
        let clock = entries.tick();
        let (value, used) = entries.map.get_mut(key)?;
        *used = clock;
        Some(value.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Entries<K, V>> {
        self.entries.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<K, V> Entries<K, V> {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_first() {
        let cache: Cache<u32, u32> = Cache::new(3);
        let get = |key: u32| {
            let mut made = false;
            let value = cache.get_or_make::<()>(key, || {
                made = true;
                Ok(key * 10)
            });
            assert_eq!(value, Ok(key * 10));
            made
        };
        // (key, whether it has to be made)
        for (step, (key, made)) in
            [(1, true), (2, true), (3, true), (1, false), (4, true), (1, false), (2, true), (4, false)]
                .into_iter()
                .enumerate()
        {
            assert_eq!(get(key), made, "step {step}, key {key}");
            assert!(cache.len() <= 3);
        }
        assert_eq!(cache.get_or_make(9, || Err("no")), Err("no"));
        assert!(cache.find(&9).is_none(), "a failure is not kept");
    }
}
