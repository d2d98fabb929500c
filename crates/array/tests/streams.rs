//! Evaluation in the background, through the public door.

use mica_array::graph::Graph;
use mica_array::{Array, Dtype, Stream, ThreadLocalStream, async_eval, clear_streams};

#[test]
fn a_name_is_one_stream() {
    assert_eq!(Stream::named("a"), Stream::named("a"));
    assert_ne!(Stream::named("a"), Stream::named("b"));
    assert_eq!(Stream::current(), Stream::named("default"));
    Stream::named("a").with(|| {
        assert_eq!(Stream::current().name(), "a");
        Stream::named("b").with(|| assert_eq!(Stream::current().name(), "b"));
        assert_eq!(Stream::current().name(), "a");
    });
    assert_eq!(Stream::current().name(), "default");
}

#[test]
fn the_first_failure_is_told_once() {
    let stream = Stream::named("failing");
    // Operators on shapes that do not fit fail when they are evaluated.
    let two = Array::ones(&[2], Dtype::F32);
    let bad = &two + &Array::ones(&[3], Dtype::F32);
    let worse = &two * &Array::ones(&[4], Dtype::F32);
    stream.async_eval(std::slice::from_ref(&bad));
    stream.async_eval(&[worse]);
    stream.async_eval(&[Array::ones(&[2], Dtype::F32)]);
    assert!(stream.synchronize().unwrap_err().to_string().contains("[add]"));
    stream.synchronize().unwrap();
    assert!(bad.eval().unwrap_err().to_string().contains("[add]"));
}

#[test]
fn arrays_are_built_read_and_computed_on_any_thread() {
    let base = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3]).unwrap().exp().unwrap();
    let sums: Vec<f32> = std::thread::scope(|scope| {
        let work = |index: usize| {
            let base = &base;
            move || {
                let stream = Stream::named(&format!("worker {}", index % 2));
                let y = base.multiply(index as f32).unwrap().sum(&[], false).unwrap();
                stream.async_eval(std::slice::from_ref(&y));
                let z = y.add(1.0).unwrap();
                stream.with(|| async_eval(std::slice::from_ref(&z)));
                stream.synchronize().unwrap();
                assert!(y.is_ready() && z.is_ready());
                z.item::<f32>().unwrap()
            }
        };
        let threads: Vec<_> = (0..8).map(|index| scope.spawn(work(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let sum = base.sum(&[], false).unwrap().item::<f32>().unwrap();
    for (index, got) in sums.iter().enumerate() {
        assert!((got - (1.0 + index as f32 * sum)).abs() < 1e-3 * sum, "{index}: {got}");
    }
}

#[test]
fn a_default_is_its_threads_own_until_streams_are_cleared() {
    let work = || {
        let (fresh, again) = (Stream::new("fresh"), Stream::new("fresh"));
        assert_ne!(fresh, again, "a name of a new stream is only a name");
        let here = Stream::named("asked for here");
        let own = ThreadLocalStream::new("own");
        let first = own.get();
        here.set_default();
        assert_eq!(Stream::current(), here);
        fresh.with(|| assert_eq!(Stream::current(), fresh));
        let other = std::thread::spawn(|| Stream::current().name().to_string()).join().unwrap();
        assert_eq!(other, "default", "another thread has its own");
        let x = Array::ones(&[3], Dtype::F32).exp().unwrap();
        async_eval(std::slice::from_ref(&x));
        clear_streams();
        assert_ne!(Stream::named("asked for here"), here);
        assert_ne!(own.get(), first);
        assert_eq!(Stream::current().name(), "default");
        // What is still held goes on, and did its work.
        here.synchronize().unwrap();
        assert!(x.is_ready());
    };
    let elsewhere = Stream::named("asked for elsewhere");
    std::thread::spawn(work).join().unwrap();
    assert_eq!(Stream::named("asked for elsewhere"), elsewhere, "streams of other threads stay");
}

#[test]
fn graphs_are_looked_at_while_others_compute_them() {
    for round in 0..100 {
        let mut y = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3]).unwrap();
        for _ in 0..200 {
            y = y.add(1.0).unwrap();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| y.eval().unwrap());
            scope.spawn(|| {
                // From the whole chain to its value, whatever is left of it at the moment.
                while !y.is_ready() {
                    assert!(Graph::of(std::slice::from_ref(&y)).ops() <= 400);
                }
            });
            scope.spawn(|| {
                let z = y.multiply(2.0).unwrap();
                assert_eq!(z.to_vec::<f32>().unwrap(), [402.0, 404.0, 406.0], "round {round}");
            });
        });
        assert_eq!(y.to_vec::<f32>().unwrap(), [201.0, 202.0, 203.0], "round {round}");
    }
}
