//! What is measured: for every series its places and how `mica bench` measures one of them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use mica_ceiling::processor;
use serde_json::Value;

use super::curve::{Curve, Point};
use crate::table::median;

/// Curves that can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Series {
    /// Time of a token against the tokens before it
    Decode,
    /// Time to read a prompt against its length
    Prefill,
    /// LoRA step of one row against its length
    TrainLength,
    /// LoRA step against the number of rows
    TrainBatch,
    /// Time to open a model against its size
    Load,
}

/// Where the program and its models are.
pub struct Models<'a> {
    pub mica: &'a Path,
    pub quantized: &'a Path,
    pub float: &'a Path,
    pub open: &'a [std::path::PathBuf],
    pub runs: usize,
}

impl Series {
    pub const ALL: [Series; 5] =
        [Series::Decode, Series::Prefill, Series::TrainLength, Series::TrainBatch, Series::Load];

    /// The name of its plot, and on the command line.
    pub fn file(self) -> &'static str {
        match self {
            Series::Decode => "decode",
            Series::Prefill => "prefill",
            Series::TrainLength => "train-length",
            Series::TrainBatch => "train-batch",
            Series::Load => "load",
        }
    }

    /// Where it is measured unless told otherwise; None where it is measured on models.
    ///
    /// A cache of 32,768 tokens takes minutes to fill, so depths are few.
    pub fn places(self) -> Option<&'static [usize]> {
        match self {
            Series::Decode => Some(&[128, 512, 2048, 4096, 8192, 16384, 32768]),
            Series::Prefill => Some(&[128, 256, 512, 1024, 2048, 4096, 8192]),
            Series::TrainLength => Some(&[128, 256, 512, 1024, 2048, 4096]),
            Series::TrainBatch => Some(&[1, 2, 4, 8, 16]),
            Series::Load => None,
        }
    }

    /// Its curve without points.
    pub fn curve(self, models: &Models, machine: String) -> Curve {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().to_string();
        let (small, large) = (name(models.quantized), name(models.float));
        let (title, x, y) = match self {
            Series::Decode => (format!("{small}: time of a token"), "tokens before it", "ms"),
            Series::Prefill => (format!("{small}: time to read a prompt"), "tokens", "s"),
            Series::TrainLength => (format!("{large}: LoRA step of one row"), "tokens of the row", "s"),
            Series::TrainBatch => (format!("{large}: LoRA step of rows of 128 tokens"), "rows", "s"),
            Series::Load => ("Time to open a model (file in the system's cache)".into(), "GB", "s"),
        };
        let (file, x, y) = (self.file().into(), x.into(), y.into());
        Curve { file, title, x, y, machine, points: Vec::new() }
    }
}

impl Models<'_> {
    /// The models of [`Series::Load`].
    pub fn to_open(&self) -> Vec<&Path> {
        [self.quantized, self.float].into_iter().chain(self.open.iter().map(|path| path.as_path())).collect()
    }

    /// The point of a series at a depth, length or batch, or at the model of that number, and the machine.
    pub fn measure(&self, series: Series, place: usize) -> anyhow::Result<(String, Point)> {
        let runs = self.runs;
        // Behind the first step, which warms up.
        let steps = runs + 1;
        // Without clipping, as the points so far.
        let lora =
            "--train --fine-tune-type lora --num-layers 16 --lora-keys q_proj,v_proj --max-grad-norm 0";
        let mut at = place as f64;
        let (figures, said) = match series {
            Series::Decode => {
                let said = self.bench(&format!("-p 1 --depth {place} -g 16 -n {runs}"), self.quantized)?;
                (of_runs(&said, |run| run["generation_tps"].as_f64().map(|speed| 1e3 / speed))?, said)
            }
            // A depth of its own spares one more reading of the prompt.
            Series::Prefill => {
                let said = self.bench(&format!("-p {place} --depth 1 -g 1 -n {runs}"), self.quantized)?;
                (of_runs(&said, |run| run["ttft_s"].as_f64())?, said)
            }
            Series::TrainLength => {
                let said = self.bench(&format!("{lora} --seq {place} --steps {steps}"), self.float)?;
                (of_runs(&said, Value::as_f64)?.split_off(1), said)
            }
            Series::TrainBatch => {
                let said =
                    self.bench(&format!("{lora} --seq 128 --batch {place} --steps {steps}"), self.float)?;
                (of_runs(&said, Value::as_f64)?.split_off(1), said)
            }
            Series::Load => {
                let model = self.to_open()[place];
                at = size(model)? as f64 / 1e9;
                let open = || self.bench("-p 1 -g 1 -n 1", model);
                let mut said = open()?;
                let mut figures = Vec::new();
                for _ in 0..runs {
                    said = open()?;
                    figures.push(said["load_s"].as_f64().with_context(|| format!("no load_s in {said}"))?);
                }
                (figures, said)
            }
        };
        let bandwidth = said["read_bandwidth_gbs"].as_f64().or_else(|| said["ceilings"]["read_gbs"].as_f64());
        let machine = format!(
            "{}, {}, {} threads",
            processor().unwrap_or_default(),
            said["isa"].as_str().unwrap_or_default(),
            said["threads"]
        );
        let point = Point {
            at,
            runs: figures.len(),
            figure: median(figures),
            date: chrono::Local::now().format("%Y-%m-%d").to_string(),
            read_gbs: bandwidth,
        };
        Ok((machine, point))
    }

    /// What `mica bench` says with these words.
    fn bench(&self, words: &str, model: &Path) -> anyhow::Result<Value> {
        let words = format!("bench --json {words} --model");
        let output = Command::new(self.mica).args(words.split_whitespace()).arg(model).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "mica {words} {}: {}: {}",
            model.display(),
            output.status,
            errors.trim()
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// A figure of each of the runs.
fn of_runs(said: &Value, figure: impl Fn(&Value) -> Option<f64>) -> anyhow::Result<Vec<f64>> {
    let runs = said["runs"].as_array();
    let figures = runs.and_then(|runs| runs.iter().map(figure).collect::<Option<Vec<_>>>());
    figures.filter(|figures| !figures.is_empty()).with_context(|| format!("no figures of runs in {said}"))
}

/// Bytes of a model's weights.
fn size(model: &Path) -> anyhow::Result<u64> {
    let files = std::fs::read_dir(model).with_context(|| format!("cannot open {}", model.display()))?;
    let weights = files
        .filter_map(|entry| entry.ok())
        .filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"));
    Ok(weights.filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(|data| data.len()).sum())
}
