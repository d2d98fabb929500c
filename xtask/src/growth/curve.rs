//! A curve: its points, as they are in growth.json, and the plot.

use std::path::Path;

use anyhow::Context;
use plotters::prelude::*;
use serde_json::{Value, json};

/// What is on its axes, whose it is, and its points.
#[derive(Debug, PartialEq)]
pub struct Curve {
    /// The name of the plot without its ending.
    pub file: String,
    pub title: String,
    pub x: String,
    pub y: String,
    /// The processor, its instruction set and the threads.
    pub machine: String,
    /// In ascending order.
    pub points: Vec<Point>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    pub at: f64,
    pub figure: f64,
    /// Of how many runs it is the median.
    pub runs: usize,
    pub date: String,
    /// Read bandwidth in GB/s that was measured beside it; None where nobody did.
    pub read_gbs: Option<f64>,
}

impl Curve {
    /// As growth.json has it.
    pub fn of(file: &str, value: &Value) -> anyhow::Result<Curve> {
        let missing = |field: &str| format!("{file} has no {field}");
        let text = |field: &str| value[field].as_str().map(String::from).with_context(|| missing(field));
        let points = value["points"].as_array().with_context(|| missing("points"))?;
        let points = points.iter().map(|point| Point::of(point).with_context(|| format!("{file}: {point}")));
        Ok(Curve {
            file: file.into(),
            title: text("title")?,
            x: text("x")?,
            y: text("y")?,
            machine: text("machine")?,
            points: points.collect::<anyhow::Result<_>>()?,
        })
    }

    pub fn json(&self) -> Value {
        let points: Vec<Value> = self.points.iter().map(Point::json).collect();
        json!({"title": self.title, "x": self.x, "y": self.y, "machine": self.machine, "points": points})
    }

    /// Takes a point, in the place of an earlier one there.
    pub fn put(&mut self, point: Point) {
        self.points.retain(|old| old.at != point.at);
        self.points.push(point);
        self.points.sort_by(|a, b| a.at.total_cmp(&b.at));
    }

    /// A line through the points, both axes from zero.
    pub fn draw(&self, path: &Path) -> anyhow::Result<()> {
        let points = || self.points.iter().map(|point| (point.at, point.figure));
        let largest = |of: fn((f64, f64)) -> f64| points().map(of).fold(0.0, f64::max) * 1.05;
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
        chart.draw_series(LineSeries::new(points(), &BLUE))?;
        chart.draw_series(points().map(|point| Circle::new(point, 3, BLUE.filled())))?;
        area.present()?;
        Ok(())
    }
}

impl Point {
    fn of(value: &Value) -> anyhow::Result<Point> {
        let number = |field: &str| value[field].as_f64().with_context(|| format!("{field} must be a number"));
        Ok(Point {
            at: number("at")?,
            figure: number("figure")?,
            runs: number("runs")? as usize,
            date: value["date"].as_str().context("date must be text")?.into(),
            read_gbs: value["read_gbs"].as_f64(),
        })
    }

    fn json(&self) -> Value {
        json!({"at": self.at, "figure": self.figure, "runs": self.runs, "date": self.date, "read_gbs": self.read_gbs})
    }
}
