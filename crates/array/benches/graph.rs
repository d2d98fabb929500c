//! What a graph costs besides its arithmetic: building nodes, evaluating them on tiny arrays,
//! dropping them. Run with `cargo bench -p mica-array --bench graph`; words after `--` choose the lines that contain one.
//! `xtask instructions` counts the same parts under valgrind, through `--count PART NODES`.

use std::time::Instant;

use mica_array::{Array, Dtype, memory, set_threads};
use mica_ceiling::median;

const NODES: usize = 10_000;
const ROUNDS: usize = 21;

/// Nanoseconds per node, the median of several rounds; the setup and what `run` gives back are
/// not timed.
fn measure<S, R>(name: &str, nodes: usize, setup: impl Fn() -> S, run: impl Fn(S) -> R) {
    if !is_asked_for(name) {
        return;
    }
    let time = |_| {
        let input = setup();
        let begun = Instant::now();
        let output = run(input);
        let seconds = begun.elapsed().as_secs_f64();
        drop(output);
        seconds * 1e9 / nodes as f64
    };
    let time = median((0..ROUNDS).map(time).collect()).expect("there is a round");
    println!("{name:<44} {time:8.1} ns a node");
}

fn is_asked_for(name: &str) -> bool {
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-')).peekable();
    words.peek().is_none() || words.any(|word| name.contains(&word))
}

fn chain(one: &Array, nodes: usize) -> Array {
    let mut x = one.clone();
    for _ in 0..nodes {
        x = x.add(one).expect("shapes are equal");
    }
    x
}

/// Does one part once, for a program that counts instructions; building is in all of them.
fn count(part: &str, nodes: usize, one: &Array) {
    let x = chain(one, nodes);
    match part {
        "build" => std::mem::forget(x),
        "drop" => drop(x),
        "plan" => {
            memory::rehearse(|| x.eval().expect("adds"));
        }
        "evaluate" => x.eval().expect("adds"),
        _ => panic!("expected build, drop, plan or evaluate, got {part}"),
    }
}

fn main() {
    set_threads(1).expect("the calling thread is one");
    let one = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[4]).expect("four values");
    let words: Vec<String> = std::env::args().collect();
    if let Some(at) = words.iter().position(|word| word == "--count") {
        let [part, nodes] = &words[at + 1..] else { panic!("expected --count PART NODES, got {words:?}") };
        return count(part, nodes.parse().expect("a number of nodes"), &one);
    }
    let square = one.square().expect("floats");
    square.eval().expect("four values");

    measure("build a chain of adds", NODES, || (), |()| chain(&one, NODES));
    measure(
        "build adds of a number",
        3 * NODES,
        || (),
        |()| (0..NODES).fold(one.clone(), |x, _| x.add(1.0).expect("a number")),
    );
    measure("drop a chain", NODES, || chain(&one, NODES), drop);
    measure(
        "order and plan a chain, and drop it",
        NODES,
        || chain(&one, NODES),
        |x| memory::rehearse(|| x.eval().expect("adds")),
    );
    measure("evaluate a chain and drop it", NODES, || chain(&one, NODES), |x| x.eval().expect("adds"));
    measure(
        "evaluate a wide graph and drop it",
        NODES,
        || {
            let leaves: Vec<Array> = (0..NODES / 2).map(|_| one.exp().expect("floats")).collect();
            let sum = |pair: &[Array]| pair[0].add(&pair[pair.len() - 1]).expect("shapes are equal");
            let mut level: Vec<Array> = leaves;
            while level.len() > 1 {
                level = level.chunks(2).map(sum).collect();
            }
            level
        },
        |x| x[0].eval().expect("adds"),
    );
    if !is_asked_for("a chain of 1,000,000") {
        return;
    }
    let begun = Instant::now();
    let long = chain(&Array::ones(&[4], Dtype::F32), 1_000_000);
    let built = begun.elapsed();
    long.eval().expect("adds");
    let evaluated = begun.elapsed();
    drop(long);
    println!(
        "a chain of 1,000,000: built in {built:.2?}, evaluated and dropped in {:.2?}",
        begun.elapsed().saturating_sub(built).max(evaluated.saturating_sub(built))
    );
}
