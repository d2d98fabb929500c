//! How cost grows: decoding against depth, prompts against length, training steps against length and batch, opening
//! against file size. Each is a plot with the measured points.
//!
//! A point can take minutes, and points may be measured on different occasions: those of earlier runs stay in
//! growth.json until they are measured again, and the plots show all.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use plotters::prelude::*;
use serde_json::{Value, json};

use crate::table::median;

/// Measures how cost grows.
#[derive(Args)]
pub struct Growth {
    /// Model folder for decoding and prompts, quantized
    #[arg(long, value_name = "FOLDER")]
    quantized: PathBuf,
    /// Model folder for training steps
    #[arg(long, value_name = "FOLDER")]
    float: PathBuf,
    /// More model folders to open, of other sizes
    #[arg(long, value_delimiter = ',')]
    open: Vec<PathBuf>,
    /// The program
    #[arg(long, default_value = "target/release/mica")]
    mica: PathBuf,
    /// Largest depth and prompt
    #[arg(long, default_value_t = 32768)]
    longest: usize,
    /// Repetitions; medians are shown
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only the plots whose file name contains one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these depths, lengths or batches
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    at: Vec<usize>,
    /// Measure nothing: draw the points of earlier runs
    #[arg(long)]
    draw: bool,
    /// Where plots and points are written
    #[arg(long, value_name = "FOLDER", default_value = "docs/performance")]
    output: PathBuf,
}

/// A curve: what is on its axes, and its points.
struct Curve {
    file: String,
    title: String,
    x: String,
    y: String,
    points: Vec<(f64, f64)>,
}

impl Growth {
    pub fn run(self) -> anyhow::Result<()> {
        ensure!(self.mica.is_file(), "{} is not there: cargo build --release", self.mica.display());
        std::fs::create_dir_all(&self.output)?;
        let mut known = self.read()?;
        let curves = if self.draw { Vec::new() } else { self.curves()? };
        for mut curve in curves {
            if let Some(earlier) = known.get(&curve.file) {
                curve.keep(Curve::of(&curve.file, earlier)?.points);
            }
            known.insert(curve.file.clone(), curve.json());
        }
        for (file, curve) in &known {
            let path = self.output.join(format!("{file}.svg"));
            Curve::of(file, curve)?.draw(&path)?;
            println!("{}", path.display());
        }
        let path = self.output.join("growth.json");
        std::fs::write(&path, format!("{:#}\n", Value::Object(known)))?;
        println!("{}", path.display());
        Ok(())
    }

    /// The points of earlier runs, of which some plots may be made again.
    fn read(&self) -> anyhow::Result<serde_json::Map<String, Value>> {
        let path = self.output.join("growth.json");
        if !path.exists() {
            return Ok(serde_json::Map::new());
        }
        let text = std::fs::read_to_string(&path)?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is not what this task writes", path.display()))
    }

    fn curves(&self) -> anyhow::Result<Vec<Curve>> {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().to_string();
        let (small, large) = (name(&self.quantized), name(&self.float));
        let doubling = |from: usize, to: usize| {
            std::iter::successors(Some(from), |n| Some(n * 2))
                .take_while(move |&n| n <= to)
                .filter(|n| self.at.is_empty() || self.at.contains(n))
        };
        let mut curves = Vec::new();
        let wanted = |file: &str| self.only.is_empty() || self.only.iter().any(|part| file.contains(part));
        if wanted("decode") {
            let point = |depth: usize| {
                let said = self.median(
                    &format!("bench -p 1 --depth {depth} -g 16 -n 1 --json --model"),
                    &self.quantized,
                    "generation_tps",
                )?;
                Ok((depth as f64, 1e3 / said))
            };
            let points = doubling(128, self.longest).map(point).collect::<anyhow::Result<_>>()?;
            curves.push(Curve {
                file: "decode".into(),
                title: format!("{small}: time of a token"),
                x: "tokens before it".into(),
                y: "ms".into(),
                points,
            });
        }
        if wanted("prefill") {
            let point = |length: usize| {
                let said = self.median(
                    &format!("bench -p {length} -g 1 -n 1 --json --model"),
                    &self.quantized,
                    "ttft_s",
                )?;
                Ok((length as f64, said))
            };
            let points = doubling(128, self.longest).map(point).collect::<anyhow::Result<_>>()?;
            curves.push(Curve {
                file: "prefill".into(),
                title: format!("{small}: time to read a prompt"),
                x: "tokens".into(),
                y: "s".into(),
                points,
            });
        }
        let train =
            "bench --train --fine-tune-type lora --num-layers 16 --lora-keys q_proj,v_proj --steps 2 --json";
        if wanted("train-length") {
            let point = |length: usize| {
                Ok((
                    length as f64,
                    self.median(&format!("{train} --seq {length} --model"), &self.float, "step_s")?,
                ))
            };
            let points = doubling(128, 2048.min(self.longest)).map(point).collect::<anyhow::Result<_>>()?;
            curves.push(Curve {
                file: "train-length".into(),
                title: format!("{large}: LoRA step of one row"),
                x: "tokens of the row".into(),
                y: "s".into(),
                points,
            });
        }
        if wanted("train-batch") {
            let point = |batch: usize| {
                Ok((
                    batch as f64,
                    self.median(
                        &format!("{train} --seq 128 --batch {batch} --model"),
                        &self.float,
                        "step_s",
                    )?,
                ))
            };
            let points = doubling(1, 16).map(point).collect::<anyhow::Result<_>>()?;
            curves.push(Curve {
                file: "train-batch".into(),
                title: format!("{large}: LoRA step of rows of 128 tokens"),
                x: "rows".into(),
                y: "s".into(),
                points,
            });
        }
        if wanted("load") {
            let mut points = Vec::new();
            for model in [&self.quantized, &self.float].into_iter().chain(&self.open) {
                let bytes: u64 = std::fs::read_dir(model)?
                    .filter_map(|entry| entry.ok())
                    .filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors"))
                    .filter_map(|entry| std::fs::metadata(entry.path()).ok())
                    .map(|data| data.len())
                    .sum();
                points.push((
                    bytes as f64 / 1e9,
                    self.median("bench -p 1 -g 1 -n 1 --json --model", model, "load_s")?,
                ));
            }
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            curves.push(Curve {
                file: "load".into(),
                title: "Time to open a model (file in the system's cache)".into(),
                x: "GB".into(),
                y: "s".into(),
                points,
            });
        }
        Ok(curves)
    }

    /// The median of a field over runs of the program.
    fn median(&self, words: &str, model: &Path, field: &str) -> anyhow::Result<f64> {
        let mut figures = Vec::new();
        for _ in 0..self.runs {
            let output = Command::new(&self.mica).args(words.split_whitespace()).arg(model).output()?;
            ensure!(
                output.status.success(),
                "mica {words} {}: {}",
                model.display(),
                String::from_utf8_lossy(&output.stderr)
            );
            let said: Value = serde_json::from_slice(&output.stdout)?;
            figures.push(said[field].as_f64().with_context(|| format!("no {field} in {said}"))?);
        }
        let figure = median(figures);
        eprintln!("mica {words} {}: {field} {figure:.4}", model.display());
        Ok(figure)
    }
}

impl Curve {
    /// As growth.json has it.
    fn of(file: &str, value: &Value) -> anyhow::Result<Curve> {
        let text = |field: &str| {
            let text = value[field].as_str().map(str::to_string);
            text.with_context(|| format!("growth.json: {file} has no {field}"))
        };
        let points = serde_json::from_value(value["points"].clone())
            .with_context(|| format!("growth.json: points of {file}"))?;
        Ok(Curve { file: file.into(), title: text("title")?, x: text("x")?, y: text("y")?, points })
    }

    fn json(&self) -> Value {
        json!({"title": self.title, "x": self.x, "y": self.y, "points": self.points})
    }

    /// Takes the points of earlier runs where there is no new one.
    fn keep(&mut self, earlier: Vec<(f64, f64)>) {
        let new = std::mem::take(&mut self.points);
        self.points = earlier.into_iter().filter(|old| new.iter().all(|point| point.0 != old.0)).collect();
        self.points.extend(new);
        self.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }

    /// A line through the points, both axes from zero.
    fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let largest = |of: fn(&(f64, f64)) -> f64| self.points.iter().map(of).fold(0.0, f64::max) * 1.05;
        let area = SVGBackend::new(path, (720, 400)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..largest(|point| point.0), 0.0..largest(|point| point.1))?;
        chart
            .configure_mesh()
            .x_desc(self.x.as_str())
            .y_desc(self.y.as_str())
            .light_line_style(TRANSPARENT)
            .draw()?;
        chart.draw_series(LineSeries::new(self.points.iter().copied(), &BLUE))?;
        chart.draw_series(self.points.iter().map(|&point| Circle::new(point, 3, BLUE.filled())))?;
        area.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_points_replace_those_of_the_same_place() {
        let points = vec![(2.0, 5.0), (8.0, 9.0)];
        let (title, x, y) = ("t".to_string(), "tokens".to_string(), "s".to_string());
        let mut curve = Curve { file: "a".into(), title, x, y, points };
        curve.keep(vec![(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)]);
        assert_eq!(curve.points, [(1.0, 1.0), (2.0, 5.0), (4.0, 4.0), (8.0, 9.0)]);
        let again = Curve::of("a", &curve.json()).unwrap();
        assert_eq!((again.points, again.x), (curve.points, curve.x));
        assert!(Curve::of("a", &json!({"title": "t", "x": "", "y": ""})).is_err());
    }
}
