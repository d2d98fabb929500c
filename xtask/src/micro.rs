//! Single ops and compiled chains of ops, against torch and NumPy.
//!
//! mica runs in this process, the peers in one long-lived Python (benches/peers/torch_numpy_micro.py). All make
//! the same inputs from the same numbers, and before a case is timed its results are compared. A case is measured
//! in rounds; in each, mica, torch and NumPy run it one after the other, each often enough for a clock, so that a
//! machine that gets slower does so for all. What is timed is what a user waits for: from the call until the
//! results are there and their memory is given back.

mod cases;
mod peer;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use mica_array::{Array, Dtype, eval, set_threads};
use serde_json::{Value, json};

use crate::table::{Cell, Row, Table, median};
use cases::Case;
use peer::Peer;

/// The least time that one measurement takes: short ops are repeated.
const LEAST: f64 = 0.03;
/// Between the programs: threads that wait for more work by spinning have gone to sleep by then.
const PAUSE: Duration = Duration::from_millis(10);

/// Times ops against torch and NumPy.
#[derive(Args)]
pub struct Micro {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// A Python that has torch and NumPy (FOLDER/env/torch/bin/python of benches/peers/setup.sh)
    #[arg(long, value_name = "FILE")]
    python: PathBuf,
    /// The program, for the facts of the machine
    #[arg(long, default_value = "target/release/mica")]
    mica: PathBuf,
    /// Only cases whose name contains one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds after which a case gets no further round (it has three at least)
    #[arg(long, default_value_t = 2.0)]
    patience: f64,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the table is written, as Markdown and JSON; nowhere with `--only`
    #[arg(long, value_name = "FOLDER", default_value = "benches/runs")]
    output: PathBuf,
}

/// One of the two tables.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Single ops on 4 million elements, against the faster of torch and NumPy
    Ops,
    /// Functions of several ops through `transforms::compile`, against the same in eager torch
    Chains,
}

impl Micro {
    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.mica.is_file(), "{} is not there: cargo build --release", self.mica.display());
        set_threads(self.threads)?;
        let mut table = Table::new(&self.mica, self.threads)?;
        let bandwidth = self.bandwidth()?;
        let mut peer = Peer::start(&self.python, self.threads)?;
        for (name, version) in &peer.versions {
            table.fact(name, version);
        }
        let cases = match self.what {
            What::Ops => cases::ops(),
            What::Chains => cases::chains(),
        };
        for case in cases {
            if self.only.is_empty() || self.only.iter().any(|part| case.name.contains(part.as_str())) {
                let row = self.measure(&case, &mut peer).with_context(|| case.name.to_string())?;
                println!("{row}");
                table.rows.push(row);
            }
        }
        table.fact("read bandwidth", format!("{bandwidth:.1} GB/s before, {:.1} after", self.bandwidth()?));
        table.summary = summary(&table.rows);
        for (name, value) in &table.summary {
            println!("{name}: {value}");
        }
        let (ending, method) = match self.what {
            What::Ops => ("ops", OPS_METHOD),
            What::Chains => ("chains", CHAINS_METHOD),
        };
        if self.only.is_empty() { table.with(ending, method).write(&self.output) } else { Ok(()) }
    }

    /// What memory gives to this many threads, in GB/s, as the program measures it.
    fn bandwidth(&self) -> anyhow::Result<f64> {
        let mut command = Command::new(&self.mica);
        command.args(["doctor", "--json", "--threads", &self.threads.to_string()]);
        let output = command.output()?;
        ensure!(output.status.success(), "mica doctor: {}", String::from_utf8_lossy(&output.stderr));
        let said: Value = serde_json::from_slice(&output.stdout)?;
        said["read_bandwidth_gbs"].as_f64().with_context(|| format!("no read_bandwidth_gbs in {said}"))
    }

    fn measure(&self, case: &Case, peer: &mut Peer) -> anyhow::Result<Row> {
        let work = (case.make)()?;
        let libraries = peer.prepare(case.name)?;
        ensure!(!libraries.is_empty(), "no peer knows this case");
        let outputs = work()?;
        eval(&outputs)?;
        let expected = samples(case, &outputs)?;
        drop(outputs);
        for library in &libraries {
            let bound = case.tolerance * expected.iter().fold(0f64, |most, value| most.max(value.abs()));
            let got = peer.samples(library, case.unordered)?;
            ensure!(got.len() == expected.len(), "{library} gave {} samples", got.len());
            for (got, expected) in got.iter().zip(&expected) {
                ensure!((got - expected).abs() <= bound, "{library} computes {got}, mica {expected}");
            }
        }
        let run = |times: usize| -> anyhow::Result<f64> {
            let begun = Instant::now();
            for _ in 0..times {
                eval(&work()?)?;
            }
            Ok(begun.elapsed().as_secs_f64() / times as f64)
        };
        let repeats = |seconds: f64| ((LEAST / seconds).ceil() as usize).clamp(1, 200);
        let mica_repeats = repeats(run(1)?.min(run(1)?));
        let mut peer_repeats = Vec::new();
        for library in &libraries {
            peer_repeats.push(repeats(peer.time(library, 1)?.min(peer.time(library, 1)?)));
        }
        let mut figures = vec![Vec::new(); 1 + libraries.len()];
        let begun = Instant::now();
        for round in 0..self.rounds {
            if round >= 3 && begun.elapsed().as_secs_f64() > self.patience {
                break;
            }
            std::thread::sleep(PAUSE);
            figures[0].push(run(mica_repeats)? * 1e3);
            for (at, library) in libraries.iter().enumerate() {
                std::thread::sleep(PAUSE);
                figures[1 + at].push(peer.time(library, peer_repeats[at])? * 1e3);
            }
        }
        let (mica, peers) = figures.split_first().expect("mica is always there");
        let cells = libraries.iter().zip(peers).map(|(library, figures)| Cell {
            program: library.clone(),
            figure: median(figures.clone()),
            ratio: median(mica.iter().zip(figures).map(|(mica, peer)| peer / mica).collect()),
        });
        let names = std::iter::once("mica").chain(libraries.iter().map(String::as_str));
        let all: serde_json::Map<String, Value> =
            names.zip(&figures).map(|(name, figures)| (name.to_string(), json!(figures))).collect();
        Ok(Row {
            name: case.name.to_string(),
            unit: "ms",
            mica: median(mica.clone()),
            bandwidth: None,
            used: None,
            peers: cells.collect(),
            all: json!(all),
        })
    }
}

const OPS_METHOD: &str = "Milliseconds for one call on arrays in memory, results' memory given back; median of alternating rounds. A ratio is taken within its round. torch runs in inference mode.";
const CHAINS_METHOD: &str = "Milliseconds for one call on arrays in memory, results' memory given back; median of alternating rounds. A ratio is taken within its round. mica runs the function through `transforms::compile`; torch runs the same formulas eagerly, in inference mode, with its library functions for softmax, log-softmax and SiLU.";

/// Up to 64 values of every output, evenly spread.
fn samples(case: &Case, outputs: &[Array]) -> anyhow::Result<Vec<f64>> {
    let mut samples = Vec::new();
    for output in outputs {
        let sorted = if case.unordered { output.sort(-1)? } else { output.clone() };
        let values = sorted.astype(Dtype::F32)?.to_vec::<f32>()?;
        samples.extend(
            (0..64.min(values.len())).map(|i| values[i * values.len() / 64.min(values.len())] as f64),
        );
    }
    Ok(samples)
}

/// What all rows come to, mica against the fastest peer of each.
fn summary(rows: &[Row]) -> Vec<(String, Value)> {
    let fastest = |row: &Row| {
        let best = row.peers.iter().min_by(|a, b| a.figure.total_cmp(&b.figure));
        (row.name.clone(), best.expect("every case has a peer").ratio)
    };
    let ratios: Vec<(String, f64)> = rows.iter().map(fastest).collect();
    let Some((name, worst)) = ratios.iter().min_by(|a, b| a.1.total_cmp(&b.1)) else {
        return Vec::new();
    };
    let count = ratios.len() as f64;
    let geometric = (ratios.iter().map(|(_, ratio)| ratio.ln()).sum::<f64>() / count).exp();
    let mean = ratios.iter().map(|(_, ratio)| ratio).sum::<f64>() / count;
    let below = |bound: f64| {
        let names: Vec<String> = (ratios.iter().filter(|(_, ratio)| *ratio < bound))
            .map(|(name, ratio)| format!("{name} ({ratio:.2})"))
            .collect();
        if names.is_empty() { "none".to_string() } else { names.join(", ") }
    };
    vec![
        ("times as fast as the fastest peer, geometric mean".into(), json!(geometric)),
        ("times as fast as the fastest peer, arithmetic mean".into(), json!(mean)),
        ("the least".into(), json!(format!("{worst:.2}, {name}"))),
        ("more than 1.25 times as slow".into(), json!(below(0.8))),
        ("slower, but not by that much".into(), json!(between(&ratios))),
    ]
}

fn between(ratios: &[(String, f64)]) -> String {
    let names: Vec<String> = (ratios.iter().filter(|(_, ratio)| (0.8..1.0).contains(ratio)))
        .map(|(name, ratio)| format!("{name} ({ratio:.2})"))
        .collect();
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}
