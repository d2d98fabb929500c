//! mica and its peers, side by side.
//!
//! Every row of the table is measured in rounds; in each round all programs run one after the other on the same
//! shape, so that a machine that gets slower does so for all. A ratio is taken within its round, and the median of
//! the rounds' ratios is the result. What fails costs no more than its own cell: the table says what it was, and is
//! written after every job.

mod jobs;
mod program;

use std::path::PathBuf;

use anyhow::ensure;
use clap::Args;
use serde_json::{Map, Value, json};

use crate::table::{Cell, Row, Table, median};
use jobs::{Job, Setup};

/// Runs mica and other programs alternately.
#[derive(Args)]
pub struct Peers {
    /// The folder that benches/peers/setup.sh made
    #[arg(long, value_name = "FOLDER")]
    dir: PathBuf,
    /// The program
    #[arg(long, default_value = "target/release/mica")]
    mica: PathBuf,
    /// Shapes, by the names that setup.sh knows [default: all that are in FOLDER/models]
    #[arg(long, value_delimiter = ',')]
    shapes: Vec<String>,
    /// Only rows whose name contains one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Where the table is written, as Markdown and JSON
    #[arg(long, value_name = "FOLDER", default_value = "benches/runs")]
    output: PathBuf,
}

impl Peers {
    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.mica.is_file(), "{} is not there: cargo build --release", self.mica.display());
        ensure!(self.rounds > 0, "--rounds must be at least 1");
        let setup = Setup::open(&self.dir, &self.mica, self.threads)?;
        let shapes = if self.shapes.is_empty() { setup.shapes() } else { self.shapes.clone() };
        let mut jobs = Vec::new();
        for shape in &shapes {
            jobs.extend(setup.jobs(shape)?);
        }
        jobs.retain(|job| job.figures.iter().any(|figure| self.wanted(&figure.name)));
        ensure!(
            !jobs.is_empty(),
            "no row of {} has a name with {}",
            shapes.join(", "),
            self.only.join(" or ")
        );
        let mut table = Table::new(&self.mica, self.threads)?;
        for job in &jobs {
            for row in self.measure(job, &mut table) {
                println!("{row}");
                table.rows.push(row);
            }
            table.save(&self.output)?;
        }
        table.write(&self.output)?;
        ensure!(table.failures.is_empty(), "what failed:\n{}", table.failures.join("\n"));
        Ok(())
    }

    fn wanted(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part))
    }

    /// The rows of a job that are wanted; none if mica failed.
    fn measure(&self, job: &Job, table: &mut Table) -> Vec<Row> {
        let mut results: Vec<Results> =
            job.programs.iter().map(|_| Results::new(job.figures.len())).collect();
        for round in 0..self.rounds {
            for (program, results) in job.programs.iter().zip(&mut results) {
                if results.failed {
                    continue;
                }
                // Files are in the system's cache after a run that doesn't count.
                let said = match round {
                    0 if job.settled => program.run().and_then(|_| program.run()),
                    _ => program.run(),
                };
                if let Err(error) = said.and_then(|said| results.take(&program.fields, &said)) {
                    results.failed = true;
                    let failure = format!("{}: {}: {error:#}", job.figures[0].name, program.name);
                    eprintln!("{failure}");
                    table.failures.push(failure);
                }
            }
            eprintln!("{}, round {} of {}", job.figures[0].name, round + 1, self.rounds);
            if results[0].failed {
                return Vec::new();
            }
        }
        for (program, results) in job.programs.iter().zip(&results).skip(1) {
            if let Some(version) = &results.version {
                table.fact_once(program.peer, version);
            }
        }
        let rows = (0..job.figures.len()).map(|at| row(job, at, &results));
        rows.filter(|row| self.wanted(&row.name)).collect()
    }
}

/// What a program said in the rounds that it finished.
struct Results {
    /// A list for each of the job's figures.
    figures: Vec<Vec<f64>>,
    bandwidths: Vec<f64>,
    parts: Vec<f64>,
    version: Option<String>,
    failed: bool,
}

impl Results {
    fn new(figures: usize) -> Results {
        let (bandwidths, parts) = (Vec::new(), Vec::new());
        Results { figures: vec![Vec::new(); figures], bandwidths, parts, version: None, failed: false }
    }

    fn take(&mut self, fields: &[&str], said: &Value) -> anyhow::Result<()> {
        for field in fields {
            ensure!(said[field].is_number(), "it printed no {field}: {said}");
        }
        for (figures, field) in self.figures.iter_mut().zip(fields) {
            figures.extend(said[field].as_f64());
        }
        let read = said["read_bandwidth_gbs"].as_f64().or_else(|| said["ceilings"]["read_gbs"].as_f64());
        self.bandwidths.extend(read);
        if fields[0] == "generation_tps" {
            self.parts.extend(said["bandwidth_fraction"].as_f64());
        }
        self.version = said["version"].as_str().map(String::from);
        Ok(())
    }
}

/// The row of a job's figure number `at`.
fn row(job: &Job, at: usize, results: &[Results]) -> Row {
    let figure = &job.figures[at];
    let (mica, peers) = results.split_first().expect("mica is always there");
    let ratio =
        |(mica, peer): (&f64, &f64)| if figure.unit.more_is_better() { mica / peer } else { peer / mica };
    let peers = job.programs[1..].iter().zip(peers).filter(|(_, peer)| !peer.figures[at].is_empty());
    let cells = peers.map(|(program, peer)| Cell {
        program: program.name.clone(),
        figure: median(peer.figures[at].clone()),
        ratio: median(mica.figures[at].iter().zip(&peer.figures[at]).map(ratio).collect()),
    });
    let middle = |values: &[f64]| (at == 0 && !values.is_empty()).then(|| median(values.to_vec()));
    let all = job.programs.iter().zip(results);
    Row {
        name: figure.name.clone(),
        unit: figure.unit.name(),
        mica: median(mica.figures[at].clone()),
        bandwidth: middle(&mica.bandwidths),
        used: middle(&mica.parts),
        peers: cells.collect(),
        all: Value::Object(all.map(|(p, r)| (p.name.clone(), json!(r.figures[at]))).collect::<Map<_, _>>()),
    }
}

#[cfg(test)]
mod tests {
    use super::jobs::{Figure, Unit};
    use super::program::Program;
    use super::*;

    fn program(name: &str, script: &str) -> Program {
        let command = ["sh", "-c", script].map(String::from).to_vec();
        Program { name: name.into(), peer: "shell", command, fields: vec!["step_s", "peak_memory_gb"] }
    }

    fn peers(only: &[&str]) -> Peers {
        Peers {
            dir: PathBuf::new(),
            mica: PathBuf::new(),
            shapes: Vec::new(),
            only: only.iter().map(|part| part.to_string()).collect(),
            rounds: 2,
            threads: 1,
            output: PathBuf::new(),
        }
    }

    fn job(programs: Vec<Program>) -> Job {
        let figure = |name: &str, unit| Figure { name: name.into(), unit };
        let figures = vec![figure("step", Unit::Seconds), figure("step, peak memory", Unit::Gigabytes)];
        Job { figures, programs, settled: false }
    }

    #[test]
    fn a_peer_that_fails_loses_its_cells_only() {
        let mica = r#"echo '{"step_s": 2, "peak_memory_gb": 1, "ceilings": {"read_gbs": 50}}'"#;
        let peer = r#"echo words; echo '{"step_s": 3, "peak_memory_gb": 4, "version": "7"}'"#;
        let cases = [
            ("exit", "echo why >&2; exit 3", "why"),
            ("silent", "true", "no JSON"),
            ("other", "echo '{}'", "no step_s"),
        ];
        for (name, script, reason) in cases {
            let job = job(vec![program("mica", mica), program(name, script), program("good", peer)]);
            let mut table = Table::empty();
            let rows = peers(&[]).measure(&job, &mut table);
            let cells: Vec<_> =
                rows.iter().map(|row| (row.peers.len(), row.peers[0].ratio, row.bandwidth)).collect();
            assert_eq!(cells, [(1, 1.5, Some(50.0)), (1, 4.0, None)], "{name}");
            assert_eq!(rows[0].all["good"], json!([3.0, 3.0]), "{name}");
            assert_eq!(table.failures.len(), 1, "{name}");
            assert!(table.failures[0].starts_with(&format!("step: {name}: ")), "{:?}", table.failures);
            assert!(table.failures[0].contains(reason), "{:?}", table.failures);
            assert!(table.markdown().contains("- shell: 7\n"), "{}", table.markdown());
        }
    }

    #[test]
    fn without_mica_there_is_no_row() {
        let mut table = Table::empty();
        let rows =
            peers(&[]).measure(&job(vec![program("mica", "exit 5"), program("peer", "exit 6")]), &mut table);
        assert!(rows.is_empty());
        assert_eq!(table.failures.len(), 2);
    }

    #[test]
    fn rows_are_chosen_by_name() {
        let mica = r#"echo '{"step_s": 2, "peak_memory_gb": 1}'"#;
        let names = |only: &[&str]| -> Vec<String> {
            let rows = peers(only).measure(&job(vec![program("mica", mica)]), &mut Table::empty());
            rows.into_iter().map(|row| row.name).collect()
        };
        assert_eq!(names(&["memory"]), ["step, peak memory"]);
        assert_eq!(names(&["step"]), ["step", "step, peak memory"]);
    }
}
