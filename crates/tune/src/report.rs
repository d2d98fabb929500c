//! The loss curve: as a picture for the run folder, and as characters for a terminal.

use plotters::prelude::*;

use crate::{Error, Result};

/// Points of one curve: (step, loss), steps rising. What is not finite is left out.
pub type Curve<'a> = &'a [(u64, f64)];

/// The curve as an SVG picture: training (also smoothed) and validation loss over steps.
pub fn loss_svg(training: Curve<'_>, validation: Curve<'_>) -> Result<String> {
    let finite = |curve: Curve<'_>| -> Vec<(f64, f64)> {
        curve.iter().filter(|(_, loss)| loss.is_finite()).map(|&(step, loss)| (step as f64, loss)).collect()
    };
    let (training, validation) = (finite(training), finite(validation));
    let all = || training.iter().chain(&validation);
    let lowest = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let highest = all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let last = all().map(|p| p.0).fold(1.0, f64::max);
    let (lowest, highest) = if lowest <= highest { (lowest, highest) } else { (0.0, 1.0) };
    let margin = ((highest - lowest) * 0.05).max(1e-3);
    let mut svg = String::new();
    let mut draw = || -> std::result::Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(&mut svg, (800, 450)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(16)
            .x_label_area_size(40)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..last, (lowest - margin)..(highest + margin))?;
        chart.configure_mesh().x_desc("step").y_desc("loss").light_line_style(WHITE.mix(0.0)).draw()?;
        let faint = RGBColor(120, 160, 220);
        chart.draw_series(LineSeries::new(thin(&training), faint.stroke_width(1)))?;
        let smooth = smoothed(&training);
        chart
            .draw_series(LineSeries::new(thin(&smooth), RGBColor(20, 80, 180).stroke_width(2)))?
            .label("training (smoothed)")
            .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], RGBColor(20, 80, 180)));
        if !validation.is_empty() {
            chart
                .draw_series(LineSeries::new(thin(&validation), RGBColor(200, 80, 20).stroke_width(2)))?
                .label("validation")
                .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], RGBColor(200, 80, 20)));
        }
        chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
        area.present()?;
        Ok(())
    };
    draw().map_err(|e| Error::Config(format!("the loss curve could not be drawn: {e}")))?;
    Ok(svg)
}

/// At most about 2,000 points, so that a long run's picture stays small.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(2000).max(1);
    let mut thinned: Vec<_> = points.iter().copied().step_by(step).collect();
    if let Some(last) = points.last()
        && thinned.last() != Some(last)
    {
        thinned.push(*last);
    }
    thinned
}

/// Exponential mean over about a twentieth of the run.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let (mut mean, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, loss)| {
            mean = keep * mean + (1.0 - keep) * loss;
            weight = keep * weight + (1.0 - keep);
            (step, mean / weight)
        })
        .collect()
}

/// The values as one line of blocks, `▁` to `█`, the newest at the right, at most `width` characters.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = columns(values, width);
    let (low, high) = range(&columns);
    let block = |value: &f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.5 };
        BLOCKS[((share * 8.0) as usize).min(7)]
    };
    columns.iter().map(block).collect()
}

/// The values as a small plot of plain characters, `width` columns by `height` rows, with a scale at the left.
pub fn ascii_curve(values: &[f64], width: usize, height: usize) -> String {
    let columns = columns(values, width);
    if columns.is_empty() || height == 0 {
        return String::new();
    }
    let (low, high) = range(&columns);
    let row_of = |value: f64| {
        let share = if high > low { (high - value) / (high - low) } else { 0.5 };
        (share * (height - 1) as f64).round() as usize
    };
    let mut text = String::new();
    for row in 0..height {
        let level = high - (high - low) * row as f64 / (height - 1).max(1) as f64;
        let line: String =
            columns.iter().map(|&value| if row_of(value) == row { '*' } else { ' ' }).collect();
        text.push_str(&format!("{level:>9.3} |{}\n", line.trim_end()));
    }
    text
}

/// Means of the finite values, so that at most `width` remain.
fn columns(values: &[f64], width: usize) -> Vec<f64> {
    let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    let count = finite.len().min(width);
    (0..count)
        .map(|i| {
            let part = &finite[i * finite.len() / count..(i + 1) * finite.len() / count];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect()
}

fn range(values: &[f64]) -> (f64, f64) {
    values
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &value| (low.min(value), high.max(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparklines_show_the_range() {
        let cases: [(&str, &[f64], usize, &str); 6] = [
            ("falling", &[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8, "█▇▆▅▄▃▂▁"),
            ("flat", &[2.0, 2.0], 8, "▅▅"),
            ("one", &[2.0], 8, "▅"),
            ("none", &[], 8, ""),
            ("not a number", &[1.0, f64::NAN, 2.0], 8, "▁█"),
            ("narrow", &[1.0, 1.0, 3.0, 3.0], 2, "▁█"),
        ];
        for (name, values, width, expected) in cases {
            assert_eq!(sparkline(values, width), expected, "{name}");
        }
        assert_eq!(sparkline(&[1.0, 2.0], 0), "");
    }

    #[test]
    fn plots_have_a_scale() {
        assert_eq!(ascii_curve(&[3.0, 2.0, 1.0], 10, 3), "    3.000 |*\n    2.000 | *\n    1.000 |  *\n");
        assert_eq!(ascii_curve(&[1.0], 10, 1), "    1.000 |*\n");
        assert_eq!(ascii_curve(&[], 10, 3), "");
    }

    #[test]
    fn pictures_are_svg_for_any_curve() {
        let long: Vec<(u64, f64)> = (0..10_000).map(|i| (i, 5.0 / (i + 1) as f64)).collect();
        let cases: [(&str, Curve<'_>, Curve<'_>); 5] = [
            ("empty", &[], &[]),
            ("one", &[(1, 2.0)], &[]),
            ("both", &[(1, 2.0), (2, 1.0)], &[(2, 1.5)]),
            ("infinite", &[(1, f64::INFINITY), (2, f64::NAN)], &[]),
            ("long", &long, &[]),
        ];
        for (name, training, validation) in cases {
            let svg = loss_svg(training, validation).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{name}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{name}");
            assert!(svg.len() < 400_000, "{name}: {} bytes", svg.len());
        }
    }
}
