//! How cost grows: decoding against depth, prompts against length, training steps against length and batch, opening
//! against file size. Each is a plot with the measured points.
//!
//! A point can take minutes, and points may be measured on different occasions: each is saved as soon as it is
//! there, with its date and the bandwidth that was measured beside it, and stays until it is measured again. The
//! plots show all.

mod curve;
mod series;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::Value;

use curve::{Curve, Point};
use series::{Models, Series};

/// Measures how cost grows.
#[derive(Args)]
pub struct Growth {
    /// Model folder for decoding and prompts, quantized
    #[arg(long, value_name = "FOLDER", required_unless_present = "draw")]
    quantized: Option<PathBuf>,
    /// Model folder for training steps
    #[arg(long, value_name = "FOLDER", required_unless_present = "draw")]
    float: Option<PathBuf>,
    /// More model folders to open, of other sizes
    #[arg(long, value_delimiter = ',')]
    open: Vec<PathBuf>,
    /// The program
    #[arg(long, default_value = "target/release/mica")]
    mica: PathBuf,
    /// Repetitions of each point behind a warm-up; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Only these series
    #[arg(long, value_delimiter = ',', value_name = "SERIES", value_enum)]
    only: Vec<Series>,
    /// These depths, lengths or batches, in place of the series' own
    #[arg(long, value_delimiter = ',', value_name = "N,N", requires = "only")]
    at: Vec<usize>,
    /// Measure nothing: draw the points of earlier runs
    #[arg(long)]
    draw: bool,
    /// Where plots and points are written; points that another machine or model has left there give way
    #[arg(long, value_name = "FOLDER", default_value = "docs/performance")]
    output: PathBuf,
}

impl Growth {
    pub fn run(self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.output)?;
        let mut curves = read(&self.output)?;
        let failures = if self.draw { Vec::new() } else { self.measure(&mut curves)? };
        for curve in &curves {
            let path = self.output.join(format!("{}.svg", curve.file));
            curve.draw(&path)?;
            println!("{}", path.display());
        }
        println!("{}", write(&self.output, &curves)?.display());
        ensure!(failures.is_empty(), "what failed:\n{}", failures.join("\n"));
        Ok(())
    }

    /// Puts new points into the curves, and says which failed.
    fn measure(&self, curves: &mut Vec<Curve>) -> anyhow::Result<Vec<String>> {
        ensure!(self.mica.is_file(), "{} is not there: cargo build --release", self.mica.display());
        let (Some(quantized), Some(float)) = (&self.quantized, &self.float) else {
            bail!("--quantized and --float are needed to measure");
        };
        let models =
            Models { mica: &self.mica, quantized, float, open: &self.open, runs: self.runs as usize };
        let chosen = if self.only.is_empty() { &Series::ALL } else { self.only.as_slice() };
        let without = chosen.iter().find(|series| series.places().is_none());
        if let (Some(series), false) = (without, self.at.is_empty()) {
            bail!("--at has no meaning for {}: --open chooses models", series.file());
        }
        let mut failures = Vec::new();
        for &series in chosen {
            let places = match series.places() {
                Some(places) if self.at.is_empty() => places.to_vec(),
                Some(_) => self.at.clone(),
                None => (0..models.to_open().len()).collect(),
            };
            for place in places {
                let begun = Instant::now();
                let measured = models.measure(series, place);
                let seconds = begun.elapsed().as_secs_f64();
                match measured {
                    Ok((machine, point)) => {
                        let Point { at, figure, .. } = point;
                        let read = point.read_gbs.unwrap_or(f64::NAN);
                        let curve = series.curve(&models, machine);
                        let (file, unit) = (curve.file.clone(), curve.y.clone());
                        eprintln!(
                            "{file} at {at}: {figure:.4} {unit}, {read:.1} GB/s read, took {seconds:.0} s"
                        );
                        merge(curves, curve, point);
                        write(&self.output, curves)?;
                    }
                    Err(error) => {
                        let failure = format!("{} at {place}: {error:#}", series.file());
                        eprintln!("{failure}");
                        failures.push(failure);
                    }
                }
            }
        }
        Ok(failures)
    }
}

/// Puts a point into its curve. One that tells of another machine or model starts anew: its points would make a
/// line with those of this one that says nothing.
fn merge(curves: &mut Vec<Curve>, empty: Curve, point: Point) {
    let at = match curves.iter().position(|curve| curve.file == empty.file) {
        Some(at) if curves[at].machine == empty.machine && curves[at].title == empty.title => at,
        Some(at) => {
            eprintln!("{}: the points of {}, {}, give way", empty.file, curves[at].title, curves[at].machine);
            curves[at] = empty;
            at
        }
        None => {
            curves.push(empty);
            curves.len() - 1
        }
    };
    curves[at].put(point);
}

fn points_file(folder: &Path) -> PathBuf {
    folder.join("growth.json")
}

/// The curves of earlier runs.
fn read(folder: &Path) -> anyhow::Result<Vec<Curve>> {
    let path = points_file(folder);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path)?;
    let known: serde_json::Map<String, Value> = serde_json::from_str(&text)?;
    let curves = known.iter().map(|(file, value)| Curve::of(file, value));
    curves
        .collect::<anyhow::Result<_>>()
        .with_context(|| format!("{} is not what this task writes", path.display()))
}

fn write(folder: &Path, curves: &[Curve]) -> anyhow::Result<PathBuf> {
    let path = points_file(folder);
    let known: serde_json::Map<String, Value> =
        curves.iter().map(|curve| (curve.file.clone(), curve.json())).collect();
    std::fs::write(&path, format!("{:#}\n", Value::Object(known)))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        growth: Growth,
    }

    #[test]
    fn drawing_needs_no_models() {
        for (words, fits) in [
            ("x --draw", true),
            ("x --draw --output here", true),
            ("x", false),
            ("x --quantized a", false),
            ("x --quantized a --float b", true),
        ] {
            let parsed = Words::try_parse_from(words.split(' ')).map(|words| words.growth.draw);
            assert_eq!(parsed.is_ok(), fits, "{words}");
        }
    }

    fn curve(machine: &str, title: &str) -> Curve {
        let [file, x, y] = ["a", "tokens", "s"].map(String::from);
        Curve { file, title: title.into(), x, y, machine: machine.into(), points: Vec::new() }
    }

    fn point(at: f64, figure: f64) -> Point {
        Point { at, figure, runs: 1, date: "today".into(), read_gbs: Some(25.0) }
    }

    #[test]
    fn new_points_replace_those_of_the_same_place_machine_and_model() {
        let mut curves = Vec::new();
        for (at, figure) in [(8.0, 9.0), (1.0, 1.0), (2.0, 2.0), (2.0, 5.0)] {
            merge(&mut curves, curve("m", "t"), point(at, figure));
        }
        assert_eq!(curves.len(), 1);
        assert_eq!(curves[0].points, [point(1.0, 1.0), point(2.0, 5.0), point(8.0, 9.0)]);
        for (machine, title) in [("n", "t"), ("n", "u")] {
            merge(&mut curves, curve(machine, title), point(4.0, 4.0));
            assert_eq!(curves[0].points, [point(4.0, 4.0)], "{machine} {title}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = std::env::temp_dir().join(format!("growth-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        assert_eq!(read(&folder).unwrap(), []);
        let mut curves = Vec::new();
        merge(&mut curves, curve("m", "t"), point(2.5, 4.0));
        merge(&mut curves, curve("m", "t"), Point { read_gbs: None, ..point(3.0, 5.0) });
        let path = write(&folder, &curves).unwrap();
        assert_eq!(read(&folder).unwrap(), curves);
        std::fs::write(&path, r#"{"a": {"title": "t", "x": "", "y": "", "machine": "m"}}"#).unwrap();
        let error = format!("{:#}", read(&folder).unwrap_err());
        assert!(error.contains("a has no points"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
