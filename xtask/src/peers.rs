//! mica and its peers, side by side.
//!
//! Every row of the table is measured in rounds; in each round all programs run one after the other on the same
//! shape, so that a machine that gets slower does so for all. A ratio is taken within its round, and the median of
//! the rounds' ratios is the result.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::table::{Cell, Row, Table, median};

/// Runs mica and other programs alternately.
#[derive(Args)]
pub struct Peers {
    /// The folder that benches/peers/setup.sh made
    #[arg(long, value_name = "FOLDER")]
    dir: PathBuf,
    /// The program
    #[arg(long, default_value = "target/release/mica")]
    mica: PathBuf,
    /// Shapes, by the names of folders in FOLDER/models
    #[arg(long, value_delimiter = ',', default_value = "qwen3-0.6b")]
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

/// What is measured, in which unit, and with which commands.
struct Job {
    name: String,
    /// Larger is better (tokens/s) rather than smaller (seconds).
    rate: bool,
    /// The programs; mica comes first.
    programs: Vec<Program>,
}

struct Program {
    name: String,
    command: Vec<String>,
    /// Where in the JSON document on its standard output the figure is.
    field: &'static str,
}

impl Peers {
    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.mica.is_file(), "{} is not there: cargo build --release", self.mica.display());
        let models = self.dir.join("models");
        ensure!(models.is_dir(), "{} is no folder: run benches/peers/setup.sh", models.display());
        let mut table = Table::new(&self.mica, self.threads)?;
        for shape in &self.shapes {
            for job in self.jobs(shape, &models)? {
                if self.only.is_empty() || self.only.iter().any(|part| job.name.contains(part)) {
                    table.rows.push(self.measure(&job)?);
                    println!("{}", table.rows.last().expect("one was pushed"));
                }
            }
        }
        table.write(&self.output)
    }

    fn jobs(&self, shape: &str, models: &Path) -> anyhow::Result<Vec<Job>> {
        let model = models.join(shape);
        ensure!(model.is_dir(), "{} is no folder: run benches/peers/setup.sh", model.display());
        let (quantized, gguf) =
            (models.join(format!("{shape}-4bit")), models.join(format!("{shape}-q4_0.gguf")));
        if !quantized.is_dir() {
            let mut convert = Command::new(&self.mica);
            convert
                .args(["convert", "-q", "--q-bits", "4", "--model"])
                .arg(&model)
                .arg("--output")
                .arg(&quantized);
            ensure!(convert.status()?.success(), "mica convert failed");
        }
        let mut jobs = Vec::new();
        for prompt in [512, 4096] {
            let options = format!("-p {prompt} -g 1 -n 1");
            jobs.push(self.inference(
                shape,
                &format!("prefill {prompt}"),
                "prompt_tps",
                &quantized,
                &gguf,
                &options,
            )?);
        }
        for depth in [64, 512, 4096] {
            let options = format!("-p 1 --depth {depth} -g 64 -n 1");
            let name = format!("decode at depth {depth}");
            jobs.push(self.inference(shape, &name, "generation_tps", &quantized, &gguf, &options)?);
        }
        for batch in [4, 8] {
            let options = format!("-p 1 --depth 64 -g 32 -n 1 --batch {batch}");
            let name = format!("decode of {batch} sequences");
            jobs.push(self.inference(shape, &name, "generation_tps", &quantized, &gguf, &options)?);
        }
        jobs.push(self.training(shape, &model)?);
        Ok(jobs)
    }

    fn inference(
        &self,
        shape: &str,
        name: &str,
        field: &'static str,
        quantized: &Path,
        gguf: &Path,
        options: &str,
    ) -> anyhow::Result<Job> {
        let mut programs = vec![self.mica(&format!("bench --json {options} --model"), quantized, field)];
        if let Some(python) = self.python("llama") {
            ensure!(gguf.is_file(), "{} is missing: run benches/peers/setup.sh", gguf.display());
            let options = format!("{options} --threads {}", self.threads);
            programs.push(script("llama.cpp Q4_0", &python, "llama_cpp_speed.py", gguf, &options, field)?);
        }
        Ok(Job { name: format!("{shape}, {name}, 4 bits"), rate: true, programs })
    }

    fn training(&self, shape: &str, model: &Path) -> anyhow::Result<Job> {
        let options = "--batch 1 --seq 1024 --steps 3 --num-layers 16 --lora-keys q_proj,v_proj";
        let field = "step_s";
        let mut programs = vec![self.mica(
            &format!("bench --train --fine-tune-type lora --json {options} --model"),
            model,
            field,
        )];
        if let Some(python) = self.python("torch") {
            let options = format!("{options} --threads {}", self.threads);
            programs.push(script("torch + peft", &python, "torch_lora_speed.py", model, &options, field)?);
        }
        Ok(Job { name: format!("{shape}, LoRA step of 1 x 1024, bf16"), rate: false, programs })
    }

    fn mica(&self, words: &str, model: &Path, field: &'static str) -> Program {
        let threads = self.threads.to_string();
        let mut command = vec![self.mica.display().to_string()];
        command.extend(words.split_whitespace().map(String::from));
        command.extend([model.display().to_string(), "--threads".into(), threads]);
        Program { name: "mica".into(), command, field }
    }

    /// The interpreter of a peer's environment, if it was set up.
    fn python(&self, peer: &str) -> Option<PathBuf> {
        let path = self.dir.join("env").join(peer).join("bin/python");
        if !path.exists() {
            eprintln!("{peer} is left out: there is no {}", path.display());
        }
        path.exists().then_some(path)
    }

    fn measure(&self, job: &Job) -> anyhow::Result<Row> {
        let mut figures = vec![Vec::new(); job.programs.len()];
        let (mut bandwidths, mut parts) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            for (program, figures) in job.programs.iter().zip(&mut figures) {
                let said = program.run()?;
                let figure = said[program.field].as_f64();
                figures.push(
                    figure
                        .with_context(|| format!("{} printed no {}: {said}", program.name, program.field))?,
                );
                bandwidths.extend(said["read_bandwidth_gbs"].as_f64());
                if program.field == "generation_tps" {
                    parts.extend(said["bandwidth_fraction"].as_f64());
                }
            }
            eprintln!("{}, round {} of {}", job.name, round + 1, self.rounds);
        }
        let (mica, peers) = figures.split_first().expect("mica is always there");
        let ratio = |peer: &Vec<f64>| {
            let ratios =
                mica.iter().zip(peer).map(|(mica, peer)| if job.rate { mica / peer } else { peer / mica });
            median(ratios.collect())
        };
        let cells = job.programs[1..].iter().zip(peers).map(|(program, figures)| Cell {
            program: program.name.clone(),
            figure: median(figures.clone()),
            ratio: ratio(figures),
        });
        Ok(Row {
            name: job.name.clone(),
            unit: if job.rate { "tokens/s" } else { "s" },
            mica: median(mica.clone()),
            bandwidth: (!bandwidths.is_empty()).then(|| median(bandwidths)),
            used: (!parts.is_empty()).then(|| median(parts)),
            peers: cells.collect(),
            all: json!(
                job.programs
                    .iter()
                    .zip(&figures)
                    .map(|(p, f)| (p.name.clone(), json!(f)))
                    .collect::<serde_json::Map<_, _>>()
            ),
        })
    }
}

/// A peer's script in benches/peers.
fn script(
    name: &str,
    python: &Path,
    script: &str,
    model: &Path,
    options: &str,
    field: &'static str,
) -> anyhow::Result<Program> {
    let path = Path::new("benches/peers").join(script);
    ensure!(path.is_file(), "{} is not there: run this in the root of the repository", path.display());
    let mut command =
        vec![python.display().to_string(), path.display().to_string(), model.display().to_string()];
    command.extend(options.split_whitespace().map(String::from));
    Ok(Program { name: name.into(), command, field })
}

impl Program {
    /// Runs it and gives the JSON document that it printed last.
    fn run(&self) -> anyhow::Result<Value> {
        let output = Command::new(&self.command[0])
            .args(&self.command[1..])
            .output()
            .with_context(|| format!("cannot run {}", self.command[0]))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            let last: Vec<&str> = words.lines().rev().take(5).collect();
            bail!("{} ended with {}: {}", self.command.join(" "), output.status, last.join(" | "));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
        serde_json::from_str(line)
            .with_context(|| format!("{} printed no JSON: {text}", self.command.join(" ")))
    }
}
