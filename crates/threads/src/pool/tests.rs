use std::sync::Barrier;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::FnTask;

#[test]
fn every_chunk_runs_once_and_tasks_are_ordered() {
    for threads in [1, 2, 3, 7] {
        let pool = Pool::new(threads);
        let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        let list: Vec<Box<dyn Task + '_>> = (0..5)
            .map(|round| {
                let counts = &counts;
                let count_all = move |chunk: usize, _: &mut Scratch| {
                    assert_eq!(counts[chunk].fetch_add(1, Ordering::Relaxed), round);
                };
                Box::new(FnTask::new("count", 1000, count_all)) as Box<dyn Task + '_>
            })
            .collect();
        pool.run(&list).unwrap();
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 5), "{threads} threads");
    }
}

#[test]
fn a_panic_comes_back_and_the_pool_still_works() {
    let pool = Pool::new(3);
    let ran_after = AtomicBool::new(false);
    let list: Vec<Box<dyn Task + '_>> = vec![
        Box::new(FnTask::new("bad", 10, |chunk, _: &mut Scratch| assert!(chunk != 4, "chunk four"))),
        Box::new(FnTask::new("after", 1, |_, _: &mut Scratch| ran_after.store(true, Ordering::Relaxed))),
    ];
    let error = pool.run(&list).unwrap_err();
    assert_eq!(error.to_string(), "bad panicked: chunk four");
    assert!(!ran_after.load(Ordering::Relaxed));
    for _ in 0..100 {
        pool.run(&[Box::new(FnTask::new("fine", 8, |_, _: &mut Scratch| ()))]).unwrap();
    }
}

#[test]
fn every_chunk_runs_once_whether_workers_sleep_or_not() {
    // Lists of tasks of all sizes, after pauses in which workers fall asleep and without.
    let pool = Pool::new(4);
    for round in 0..200 {
        let ran: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        let list: Vec<Box<dyn Task + '_>> = [64, 1, 0, 3, 64]
            .into_iter()
            .map(|chunks| {
                let ran = &ran;
                let count = move |chunk: usize, _: &mut Scratch| {
                    ran[chunk].fetch_add(1, Ordering::Relaxed);
                };
                Box::new(FnTask::new("count", chunks, count)) as Box<dyn Task + '_>
            })
            .collect();
        pool.run(&list).unwrap();
        let total: usize = ran.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        assert_eq!(total, 64 + 1 + 3 + 64, "round {round}");
        if round % 20 == 0 {
            // Long enough for all to park.
            std::thread::sleep(PATIENCE * 20);
        }
    }
}

#[test]
fn what_one_task_wrote_the_next_reads() {
    let pool = Pool::new(3);
    let cells: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
    for _ in 0..300 {
        cells.iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
        let list: Vec<Box<dyn Task + '_>> = (0..20)
            .map(|step| {
                let cells = &cells;
                // Each chunk reads what another chunk of the task before has written.
                let shift = move |chunk: usize, _: &mut Scratch| {
                    if step % 2 == 0 {
                        cells[chunk].fetch_add(1, Ordering::Relaxed);
                    } else {
                        let other = cells[(chunk * 31 + 7) % 97].load(Ordering::Relaxed);
                        assert_eq!(other, step / 2 + 1);
                    }
                };
                Box::new(FnTask::new("shift", 97, shift)) as Box<dyn Task + '_>
            })
            .collect();
        pool.run(&list).unwrap();
    }
}

#[test]
fn a_list_that_was_begun_runs_meanwhile_and_is_finished() {
    let mut pool = Pool::new(3);
    for round in 0..100 {
        let ran: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        let count = |chunk: usize, _: &mut Scratch| {
            ran[chunk].fetch_add(1, Ordering::Relaxed);
        };
        let tasks = [1, 64, 1, 5].map(|chunks| FnTask::new("count", chunks, count));
        let list: Vec<&dyn Task> = tasks.iter().map(|task| task as &dyn Task).collect();
        // SAFETY: the list is finished below.
        assert!(unsafe { pool.begin(&list) }.unwrap());
        if round % 2 == 0 {
            // The others do all of it.
            while ran.iter().map(|count| count.load(Ordering::Relaxed)).sum::<usize>() < 71 {
                std::thread::yield_now();
            }
        }
        pool.finish().unwrap();
        assert_eq!(ran.iter().map(|count| count.load(Ordering::Relaxed)).sum::<usize>(), 71);
        pool.finish().unwrap();
        pool.run_all(&list).unwrap();
    }
    let fail = FnTask::new("bad", 4, |chunk, _: &mut Scratch| assert!(chunk != 2, "chunk two"));
    // SAFETY: the list is finished in the next line.
    assert!(unsafe { pool.begin(&[&fail]) }.unwrap());
    assert_eq!(pool.finish().unwrap_err().to_string(), "bad panicked: chunk two");
}

#[test]
fn a_pool_ends_what_was_begun_before_it_goes_and_one_thread_begins_nothing() {
    let ran = AtomicUsize::new(0);
    let count = |_: usize, _: &mut Scratch| {
        ran.fetch_add(1, Ordering::Relaxed);
    };
    let task = FnTask::new("count", 9, count);
    let list: [&dyn Task; 2] = [&task, &task];
    let mut pool = Pool::new(2);
    // SAFETY: the pool is dropped before the list.
    assert!(unsafe { pool.begin(&list) }.unwrap());
    drop(pool);
    assert_eq!(ran.load(Ordering::Relaxed), 18);
    let mut alone = Pool::new(1);
    // SAFETY: as above.
    assert!(!unsafe { alone.begin(&list) }.unwrap());
    alone.finish().unwrap();
    assert_eq!(ran.load(Ordering::Relaxed), 18);
}

#[test]
fn several_threads_take_turns() {
    let pool = Pool::new(2);
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let add = |_: usize, _: &mut Scratch| {
                        total.fetch_add(1, Ordering::Relaxed);
                    };
                    pool.run(&[Box::new(FnTask::new("add", 3, add))]).unwrap();
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 600);
}

#[test]
fn threads_that_do_not_start_are_an_error_and_those_that_did_end() {
    for fails in 1..5 {
        let (started, ended) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
        let spawn = |worker, work: Box<dyn FnOnce() + Send>| {
            if worker == fails {
                return Err(std::io::Error::other("no more"));
            }
            started.fetch_add(1, Ordering::SeqCst);
            let ended = ended.clone();
            std::thread::Builder::new().spawn(move || {
                work();
                ended.fetch_add(1, Ordering::SeqCst);
            })
        };
        let error = Pool::start(5, spawn).err().unwrap();
        assert_eq!((error.asked, error.possible), (5, fails), "{error}");
        assert!(
            error.to_string().starts_with(&format!("5 threads can't be started, {fails} can ")),
            "{error}"
        );
        let counts = [&started, &ended].map(|count| count.load(Ordering::SeqCst));
        assert_eq!(counts, [fails - 1; 2], "worker {fails} fails");
    }
    let error = Pool::try_new(CREW as usize + 1).err().unwrap();
    assert!(error.to_string().contains("65535"), "{error}");
    assert_eq!(Pool::try_new(0).unwrap().threads(), 1);
    let (pool, error) = Pool::up_to(3);
    assert!(pool.threads() == 3 && error.is_none());
    for (limit, threads) in [(5, 5), (4, 3), (2, 1), (1, 1)] {
        let spawn = |worker, work| match worker {
            _ if worker >= limit => Err(std::io::Error::other("no more")),
            _ => std::thread::Builder::new().spawn(work),
        };
        let (pool, error) = Pool::most(5, |threads| Pool::start(threads, spawn));
        assert_eq!(pool.threads(), threads, "with {limit} of 5");
        assert_eq!(error.map(|error| error.possible), (limit < 5).then_some(limit), "with {limit} of 5");
    }
}

#[test]
fn workers_sleep_through_a_long_task_and_come_back() {
    let pool = Pool::new(3);
    let shared = &pool.shared;
    let all = Barrier::new(3);
    let ran = AtomicUsize::new(0);
    let count = || {
        ran.fetch_add(1, Ordering::Relaxed);
    };
    // A long task of one chunk, and a long last chunk of a task of several: each goes on until others sleep.
    let until_they_sleep = || {
        while !shared.late.is_used() {
            std::thread::yield_now();
        }
    };
    let alone = FnTask::new("alone", 1, |_, _: &mut Scratch| {
        until_they_sleep();
        count();
    });
    let last = FnTask::new("last", 8, |chunk, _: &mut Scratch| {
        if chunk == 7 {
            until_they_sleep();
        }
        count();
    });
    // Only three workers at once get through this.
    let together = FnTask::new("together", 3, |_, _: &mut Scratch| {
        all.wait();
        count();
    });
    let list: [&dyn Task; 6] = [&together, &alone, &together, &last, &together, &alone];
    for round in 0..20 {
        pool.run_all(&list).unwrap();
        assert_eq!(ran.swap(0, Ordering::Relaxed), 3 * 3 + 2 + 8, "round {round}");
    }
}

#[test]
fn no_worker_sleeps_for_good_whenever_a_task_ends() {
    let pool = Pool::new(4);
    let ran = AtomicUsize::new(0);
    for round in 0..300u32 {
        // Tasks end about when the others are going to sleep, some microseconds before or after.
        let end = LONG + Duration::from_micros(10) * (round % 30) - Duration::from_micros(150);
        let take = |length: Duration| {
            let begun = std::time::Instant::now();
            while begun.elapsed() < length {
                std::hint::spin_loop();
            }
            ran.fetch_add(1, Ordering::Relaxed);
        };
        let alone = FnTask::new("alone", 1, |_, _: &mut Scratch| take(end));
        let short = FnTask::new("short", 9, |_, _: &mut Scratch| take(Duration::ZERO));
        let last = FnTask::new("last", 5, |chunk, _: &mut Scratch| {
            take(if chunk == 4 { end } else { Duration::ZERO });
        });
        let list: [&dyn Task; 7] = [&short, &alone, &short, &short, &last, &short, &short];
        pool.run_all(&list).unwrap();
        assert_eq!(ran.swap(0, Ordering::Relaxed), 5 * 9 + 1 + 5, "round {round}");
    }
}

#[test]
fn a_meter_says_what_workers_did() {
    for threads in [1, 2, 3] {
        let pool = Pool::new(threads);
        let length = Duration::from_millis(2);
        let take = || {
            let begun = std::time::Instant::now();
            while begun.elapsed() < length {
                std::hint::spin_loop();
            }
        };
        let many = FnTask::new("many", 5, |_, _: &mut Scratch| take());
        let alone = FnTask::new("alone", 1, |_, _: &mut Scratch| take());
        let list: [&dyn Task; 3] = [&many, &alone, &many];
        let in_tasks = |pool: &Pool| {
            let spent = pool.spent();
            assert_eq!(spent.len(), threads);
            spent.iter().map(|spent| spent.tasks).sum::<Duration>()
        };
        pool.run_all(&list).unwrap();
        assert_eq!(in_tasks(&pool), Duration::ZERO, "nobody has asked");
        for _ in 0..2 {
            pool.measure();
            let begun = std::time::Instant::now();
            pool.run_all(&list).unwrap();
            let all = begun.elapsed();
            let tasks = in_tasks(&pool);
            assert!(tasks >= 11 * length && tasks <= all * threads as u32, "{threads} threads, {tasks:?}");
        }
        let before = in_tasks(&pool);
        pool.run_all(&list).unwrap();
        assert_eq!(in_tasks(&pool), before, "it stands still");
    }
}
