//! Computations that are run again: the bits of a graph that is built for the same values.

use std::sync::{Mutex, MutexGuard};

use mica_array::backend::reference::Reference;
use mica_array::kv::{KvCache, KvFormat, KvSpec, PAGE, PagedSpec};
use mica_array::{
    Array, Dtype, PackedWeight, Precision, Record, Replay, Result, eval, linalg, memory, profile,
    set_backend, set_check_nan, set_threads,
};
use mica_testkit::{Rng, assert_bits_eq};

const WIDTH: usize = 64;

/// The backend is the process's, and what it has kept is gone when another one is set.
fn alone(threads: usize) -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    set_threads(threads).unwrap();
    guard
}

fn weight(rows: usize, rng: &mut Rng) -> Array {
    let values: Vec<f32> = (0..rows * WIDTH).map(|_| rng.uniform(-1.0, 1.0)).collect();
    let weight = Array::from_slice(&values, &[rows, WIDTH]).unwrap();
    Array::from_packed(PackedWeight::quantize(&weight, Default::default()).unwrap())
}

fn values(rng: &mut Rng) -> Vec<f32> {
    (0..WIDTH).map(|_| rng.uniform(-1.0, 1.0)).collect()
}

fn input(values: &[f32]) -> Array {
    Array::from_slice(values, &[1, WIDTH]).unwrap()
}

fn again(record: Record) -> Box<Replay> {
    match record {
        Record::Again(replay) => replay,
        Record::Shared(_) => panic!("should be nobody else's"),
        Record::Once(_) => panic!("should be kept"),
    }
}

fn read(replay: &mut Replay, output: usize) -> Vec<f32> {
    let values = replay.values::<f32>(output).unwrap();
    // They are the caller's.
    let copy = values.to_vec();
    values.fill(f32::NAN);
    copy
}

/// Products, ops in place, memory that dies and is used again, numbers that die with the graph, more steps than
/// threads are left waiting for.
fn network(x: &Array, weights: &[Array]) -> Result<Vec<Array>> {
    let mut x = x.clone();
    for (index, weight) in weights.iter().enumerate() {
        // Nobody has it but the graph.
        let bias = Array::from_slice(&[index as f32 * 0.1; WIDTH], &[WIDTH])?;
        let y = x.linear(weight, None, Precision::Fast)?;
        x = (y.add(&bias)?.tanh()? + &x).exp()? * 0.1;
    }
    Ok(vec![x.sum(&[1], false)?, x])
}

fn record_network(x: &[f32], weights: &[Array]) -> Result<Record> {
    Replay::record(vec![input(x)], |x| Ok((network(&x[0], weights)?, Vec::new())))
}

#[test]
fn other_values_give_what_a_new_graph_gives() {
    for threads in [1, 2, 3] {
        let _alone = alone(threads);
        let mut rng = Rng::new(3);
        let weights: Vec<Array> = (0..20).map(|_| weight(WIDTH, &mut rng)).collect();
        let first = values(&mut rng);
        let record = record_network(&first, &weights);
        let mut replay = again(record.unwrap());
        let all: Vec<Vec<f32>> = (0..5).map(|_| values(&mut rng)).collect();
        let expected = |x: &[f32]| {
            let outputs = network(&input(x), &weights).unwrap();
            eval(&outputs).unwrap();
            outputs.iter().map(|output| output.to_vec().unwrap()).collect::<Vec<Vec<f32>>>()
        };
        let check = |replay: &mut Replay, x: &[f32], name: &str| {
            for (index, expected) in expected(x).iter().enumerate() {
                assert_bits_eq(
                    &format!("{name}, {threads} threads, output {index}"),
                    &read(replay, index),
                    expected,
                );
            }
        };
        check(&mut replay, &first, "recorded");
        for (run, x) in all.iter().chain([&first]).enumerate() {
            assert!(replay.run(&[input(x)], None).unwrap());
            check(&mut replay, x, &format!("run {run}"));
        }
    }
}

#[test]
fn what_others_would_see_written_is_not_kept() {
    let _alone = alone(2);
    let mut rng = Rng::new(4);
    let weights = [weight(WIDTH, &mut rng)];
    let x = values(&mut rng);
    let mut kept = Vec::new();
    let mut record = |build: &mut dyn FnMut(&Array, &mut Vec<Array>) -> Result<Vec<Array>>| {
        kept.clear();
        let record = Replay::record(vec![input(&x)], |x| Ok((build(&x[0], &mut kept)?, Vec::new())));
        match record.unwrap() {
            Record::Again(_) => None,
            Record::Once(_) => panic!("should be found to be seen by others"),
            Record::Shared(outputs) => Some(outputs[0].to_vec::<f32>().unwrap()),
        }
    };
    assert!(record(&mut |x, _| network(x, &weights)).is_none(), "nobody sees anything");
    let expected = network(&input(&x), &weights).unwrap()[0].to_vec::<f32>().unwrap();
    let mut check = |name: &str, build: &mut dyn FnMut(&Array, &mut Vec<Array>) -> Result<Vec<Array>>| {
        let got = record(build).unwrap_or_else(|| panic!("{name}: should not be kept"));
        assert_bits_eq(name, &got, &expected);
    };
    check("an input", &mut |x, kept| {
        kept.push(x.clone());
        network(x, &weights)
    });
    check("a view of an input", &mut |x, kept| {
        kept.push(x.reshape(&[WIDTH as i64])?);
        eval(kept)?;
        network(x, &weights)
    });
    check("an output", &mut |x, kept| {
        let outputs = network(x, &weights)?;
        kept.push(outputs[0].clone());
        Ok(outputs)
    });
    check("something on the way", &mut |x, kept| {
        kept.push(x.linear(&weights[0], None, Precision::Fast)?);
        let y = kept[0].add(Array::from_slice(&[0.0f32; WIDTH], &[WIDTH])?)?;
        let x = (y.tanh()? + x).exp()? * 0.1;
        Ok(vec![x.sum(&[1], false)?])
    });
    check("an input that nothing reads", &mut |_, _| network(&input(&x), &weights));
}

#[test]
fn long_plans_are_kept_and_longer_ones_are_not() {
    let _alone = alone(2);
    let x = values(&mut Rng::new(8));
    let build = |x: &Array, steps: usize| (0..steps).try_fold(x.clone(), |sum, _| sum.add(x));
    for (steps, is_kept) in [(5_000, true), (20_000, false)] {
        let record = Replay::record(vec![input(&x)], |x| Ok((vec![build(&x[0], steps)?], Vec::new())));
        let got = match record.unwrap() {
            Record::Again(mut replay) if is_kept => {
                assert!(replay.run(&[input(&x)], None).unwrap());
                read(&mut replay, 0)
            }
            Record::Once(outputs) if !is_kept => outputs[0].to_vec().unwrap(),
            _ => panic!("{steps} steps"),
        };
        assert_bits_eq("sum", &got, &build(&input(&x), steps).unwrap().to_vec::<f32>().unwrap());
    }
}

#[test]
fn a_run_that_fails_is_the_last() {
    for threads in [1, 2] {
        let _alone = alone(threads);
        let matrix = |values: [f32; 4]| Array::from_slice(&values, &[2, 2]).unwrap();
        let record = Replay::record(vec![matrix([2.0, 0.0, 0.0, 4.0])], |x| {
            Ok((vec![linalg::inv(&x[0])?.add(&x[0])?], Vec::new()))
        });
        let mut replay = again(record.unwrap());
        assert_eq!(replay.values::<f32>(0).unwrap(), [2.5, 0.0, 0.0, 4.25]);
        assert!(replay.run(&[matrix([1.0, 0.0, 0.0, 2.0])], None).unwrap());
        assert_eq!(replay.values::<f32>(0).unwrap(), [2.0, 0.0, 0.0, 2.5]);
        let error = replay.run(&[matrix([1.0, 2.0, 2.0, 4.0])], None).expect_err("no inverse").to_string();
        assert!(error.contains("singular"), "{error}");
        let error = replay.values::<f32>(0).expect_err("no values").to_string();
        assert!(error.contains("the last run failed"), "{error}");
        assert!(replay.output(0).is_err());
        assert!(!replay.run(&[matrix([1.0, 0.0, 0.0, 2.0])], None).unwrap());
        // Others are computed as ever.
        assert_eq!(
            linalg::inv(&matrix([1.0, 0.0, 0.0, 2.0])).unwrap().to_vec::<f32>().unwrap(),
            [1.0, 0.0, 0.0, 0.5]
        );
    }
}

#[test]
fn it_is_told_when_it_can_not_be_run() {
    let _alone = alone(2);
    let mut rng = Rng::new(5);
    let weights = [weight(WIDTH, &mut rng)];
    let x = values(&mut rng);
    let record = || record_network(&x, &weights);
    let mut replay = again(record().unwrap());
    for (name, result) in [
        ("too few", replay.run(&[Array::from_slice(&x[1..], &[1, WIDTH - 1]).unwrap()], None)),
        ("too many", replay.run(&[input(&x), input(&x)], None)),
        ("another shape", replay.run(&[Array::from_slice(&x, &[WIDTH]).unwrap()], None)),
        ("another dtype", replay.run(&[Array::ones(&[1, WIDTH], Dtype::I32)], None)),
    ] {
        let error = result.expect_err(name).to_string();
        assert!(error.contains("needs values for float32[1, 64], got"), "{name}: {error}");
    }
    {
        let _session = profile::start();
        assert!(!replay.run(&[input(&x)], None).unwrap(), "ops are looked at one by one");
        assert!(matches!(record().unwrap(), Record::Once(_)));
    }
    set_check_nan(true);
    let (ran, recorded) = (replay.run(&[input(&x)], None), record());
    set_check_nan(false);
    assert!(!ran.unwrap() && matches!(recorded.unwrap(), Record::Once(_)), "looked at one by one");
    assert!(replay.run(&[input(&x)], None).unwrap());
    set_threads(2).unwrap();
    assert!(!replay.run(&[input(&x)], None).unwrap(), "another pool");
    set_backend(Box::new(Reference));
    assert!(matches!(record().unwrap(), Record::Once(_)), "a backend that keeps nothing");
}

#[test]
fn memory_is_given_back() {
    let _alone = alone(2);
    let mut rng = Rng::new(6);
    let weights: Vec<Array> = (0..4).map(|_| weight(WIDTH, &mut rng)).collect();
    let x = values(&mut rng);
    let mut before = 0;
    for round in 0..4 {
        let record = record_network(&x, &weights);
        let mut replay = again(record.unwrap());
        assert!(replay.run(&[input(&x)], None).unwrap());
        let with = memory::active();
        drop(replay);
        let without = memory::active();
        assert!(without < with, "round {round}: {without} after {with}");
        assert!(round == 0 || without == before, "round {round}: {without} after {before}");
        before = without;
    }
}

const LAYERS: usize = 2;
const HEAD: usize = 32;

/// Layers that attend, each over what the one before gave: [batch, 1, 2, HEAD].
fn attend(x: &Array, cache: &mut KvCache, precision: Precision) -> Result<Array> {
    attend_in(0..LAYERS, x, cache, precision)
}

fn attend_in(
    mut layers: std::ops::Range<usize>,
    x: &Array,
    cache: &mut KvCache,
    precision: Precision,
) -> Result<Array> {
    let spec = PagedSpec { scale: 0.2, window: None, softcap: None, precision };
    layers.try_fold(x.clone(), |x, layer| {
        let [k, v] = [x.narrow(2, 0, 1)?, x.narrow(2, 1, 2)?];
        x.add(cache.attend(layer, &x, &k, &v, spec)?)?.tanh()
    })
}

#[test]
fn pages_are_those_of_the_cache_that_is_given() {
    for (threads, format) in [(1, KvFormat::F32), (2, KvFormat::Bf16), (3, KvFormat::Bf16)] {
        let _alone = alone(threads);
        for batch in [1, 3] {
            let mut rng = Rng::new(7);
            let wide: Vec<f32> = (0..2048 * WIDTH).map(|_| rng.uniform(-0.01, 0.01)).collect();
            let wide = Array::from_slice(&wide, &[2048, WIDTH]).unwrap();
            let spec = KvSpec { layers: LAYERS, kv_heads: 1, head_dim: HEAD, format };
            let precision = if format == KvFormat::F32 { Precision::Exact } else { Precision::Fast };
            let shape = [batch, 1, 2, HEAD];
            let mut token =
                || -> Vec<f32> { (0..batch * 2 * HEAD).map(|_| rng.uniform(-2.0, 2.0)).collect() };
            // Of several chunks: other threads begin with it.
            let weight = Array::from_packed(PackedWeight::quantize(&wide, Default::default()).unwrap());
            let build = |x: &Array, cache: &mut KvCache| -> Result<Array> {
                let rows =
                    x.reshape(&[batch as i64, WIDTH as i64])?.linear(&weight, None, Precision::Fast)?;
                let x = x.add(rows.sum(&[1], false)?.reshape(&[batch as i64, 1, 1, 1])?)?;
                attend(&x, cache, precision)
            };
            let plain = |cache: &mut KvCache, token: &[f32]| {
                cache.reserve(1).unwrap();
                let out = build(&Array::from_slice(token, &shape).unwrap(), cache).unwrap();
                cache.advance(1);
                let mut roots = cache.pending();
                roots.push(out.clone());
                eval(&roots).unwrap();
                out.to_vec::<f32>().unwrap()
            };
            let mut expected = KvCache::new(spec.clone(), batch);
            let mut cache = KvCache::new(spec.clone(), batch);
            let first = token();
            plain(&mut expected, &first);
            cache.reserve(1).unwrap();
            let record = Replay::record(vec![Array::from_slice(&first, &shape).unwrap()], |x| {
                Ok((vec![build(&x[0], &mut cache)?], cache.pending()))
            });
            let mut replay = again(record.unwrap());
            cache.advance(1);
            // Over the ends of pages; with forks that go their own way, and plain calls in between.
            let mut other = None;
            for step in 1..2 * PAGE + 20 {
                let token = token();
                let name = format!("{threads} threads, {format:?}, batch {batch}, step {step}");
                if step == 10 {
                    let rows: Vec<usize> = (0..batch).collect();
                    other = Some((expected.fork(&rows).unwrap(), cache.fork(&rows).unwrap()));
                }
                if step % 50 == 49 {
                    assert_bits_eq(&name, &plain(&mut cache, &token), &plain(&mut expected, &token));
                    continue;
                }
                let of_both = match &mut other {
                    Some((expected, cache)) if step % 3 == 0 => [expected, cache],
                    _ => [&mut expected, &mut cache],
                };
                let [expected, cache] = of_both;
                cache.reserve(1).unwrap();
                let x = Array::from_slice(&token, &shape).unwrap();
                assert!(replay.run(&[x], Some(cache)).unwrap(), "{name}");
                cache.advance(1);
                assert_bits_eq(&name, &read(&mut replay, 0), &plain(expected, &token));
            }
            let run = |replay: &mut Replay, cache: Option<&KvCache>| {
                let x = Array::from_slice(&first, &shape).unwrap();
                replay.run(&[x], cache).expect_err("should be refused").to_string()
            };
            let error = run(&mut replay, None);
            assert!(error.contains("needs a cache"), "{error}");
            for other in [
                KvCache::new(spec.clone(), batch + 1),
                KvCache::new(KvSpec { layers: LAYERS + 1, ..spec.clone() }, batch),
                KvCache::new(KvSpec { head_dim: HEAD / 2, ..spec.clone() }, batch),
            ] {
                let error = run(&mut replay, Some(&other));
                assert!(error.contains("needs a cache"), "{error}");
            }
            let error = run(&mut replay, Some(&KvCache::new(spec, batch)));
            assert!(error.contains("no room"), "{error}");
            // The pages are the caches' alone.
            let with = memory::active();
            drop((cache, expected, other));
            let freed = with - memory::active();
            assert!(freed >= 2 * LAYERS * PAGE * HEAD * 2 * batch, "{freed} bytes");
        }
    }
}

/// Calls of other positions, or of other caches, are not one call.
#[test]
fn calls_that_are_not_one_are_not_kept() {
    let _alone = alone(2);
    let spec = KvSpec { layers: LAYERS, kv_heads: 1, head_dim: HEAD, format: KvFormat::Bf16 };
    let record = |advance: bool, another: bool| {
        let [mut cache, mut other] = [0, 1].map(|_| KvCache::new(spec.clone(), 1));
        cache.reserve(2).unwrap();
        other.reserve(2).unwrap();
        let x = Array::ones(&[1, 1, 2, HEAD], Dtype::F32);
        eval(std::slice::from_ref(&x)).unwrap();
        let record = Replay::record(vec![x], |x| {
            let first = attend_in(0..1, &x[0], &mut cache, Precision::Fast)?;
            if advance {
                cache.advance(1);
            }
            let second =
                attend_in(1..2, &first, if another { &mut other } else { &mut cache }, Precision::Fast)?;
            Ok((vec![second], [cache.pending(), other.pending()].concat()))
        });
        matches!(record.unwrap(), Record::Again(_))
    };
    assert!(record(false, false));
    assert!(!record(true, false), "other positions");
    assert!(!record(false, true), "another cache");
}

#[test]
fn without_memory_for_a_workspace_of_its_own_a_plan_runs_once() {
    let _alone = alone(2);
    // Of eight rows as int8 there are 8 MB.
    const INPUTS: usize = 1 << 20;
    let numbers: Vec<f32> = (0..8 * INPUTS).map(|i| (i % 1009) as f32 / 1009.0 - 0.5).collect();
    let weight = Array::from_slice(&numbers, &[8, INPUTS]).unwrap();
    let weight = Array::from_packed(PackedWeight::quantize(&weight, Default::default()).unwrap());
    let build = |x: &[Array]| Ok((vec![x[0].linear(&weight, None, Precision::Fast)?], Vec::new()));
    let x = || Array::from_slice(&numbers, &[8, INPUTS]).unwrap();
    // From here on the backend has a workspace.
    let expected = build(&[x()]).unwrap().0[0].to_vec::<f32>().unwrap();
    let input = x();
    memory::clear_cache();
    let former = memory::set_limit(memory::active() + (4 << 20));
    let record = Replay::record(vec![input], build);
    memory::set_limit(former);
    match record.unwrap() {
        Record::Once(outputs) => assert_bits_eq("once", &outputs[0].to_vec::<f32>().unwrap(), &expected),
        Record::Again(_) | Record::Shared(_) => panic!("should not be kept"),
    }
}
