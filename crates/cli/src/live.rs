//! What a person sees of a run: a live bar on a terminal, mlx-lm's report lines elsewhere. On stderr.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use mica_tune::events::{Event, Observer, Step};
use mica_tune::lines::{self, Lines};
use mica_tune::report::sparkline;

/// Characters of the sparkline.
const SPARKS: usize = 16;

/// Shows the events of a run.
pub struct Live {
    shown: Shown,
    losses: Vec<f64>,
    rate: Option<f64>,
    summary: bool,
}

enum Shown {
    Bar(ProgressBar),
    Lines(Lines<fn(&str)>),
}

impl Live {
    /// With a report line every so many steps (of `mica lora`: micro-batches) where there is no terminal.
    pub fn new(report_every: u64) -> Live {
        let shown = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{bar:20} {pos}/{len}  {msg}  ETA {eta}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            Shown::Bar(bar)
        } else {
            Shown::Lines(Lines::new(report_every, (|line| eprintln!("{line}")) as fn(&str)))
        };
        Live { shown, losses: Vec::new(), rate: None, summary: true }
    }

    /// Without the summary at the end, for commands that have their own.
    pub fn without_summary(mut self) -> Live {
        self.summary = false;
        self
    }
}

impl Observer for Live {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Finished(_)) && !self.summary {
            if let Shown::Bar(bar) = &self.shown {
                bar.finish_and_clear();
            }
            return;
        }
        if let Event::Finished(summary) = event
            && summary.steps == 0
        {
            let text = "there was nothing left to do".to_string();
            return self.event(&Event::Note { warning: false, text });
        }
        let bar = match &mut self.shown {
            Shown::Lines(lines) => return lines.event(event),
            Shown::Bar(bar) => bar,
        };
        match event {
            Event::Started(started) => {
                bar.set_length(started.total_steps);
                bar.set_position(started.done_steps);
                bar.reset_eta();
            }
            Event::Step(step) => {
                self.losses.push(step.loss);
                bar.set_position(step.step);
                // Smoothed, so that it can be read.
                let rate = self.rate.map_or(step.tokens_per_s, |rate| 0.9 * rate + 0.1 * step.tokens_per_s);
                self.rate = Some(rate);
                bar.set_message(message(step, rate, &self.losses));
            }
            Event::Validation(evaluation) => bar.println(lines::validation(evaluation)),
            Event::Test(evaluation) => bar.println(lines::test(evaluation)),
            Event::AdapterSaved { step, files } => bar.println(lines::saved(*step, files)),
            Event::Note { warning, text } => {
                bar.println(format!("{}{text}", if *warning { "Warning: " } else { "" }));
            }
            Event::Finished(summary) => {
                bar.finish_and_clear();
                eprintln!("{}", summary.text());
            }
            Event::CheckpointSaved { .. } => {}
        }
    }
}

fn message(step: &Step, rate: f64, losses: &[f64]) -> String {
    let recent = &losses[losses.len().saturating_sub(SPARKS * 64)..];
    format!(
        "loss {:.3}  {rate:.0} tok/s  {:.2} GB  {}",
        step.loss,
        step.peak_memory_gb,
        sparkline(recent, SPARKS)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_what_matters() {
        let step = Step { loss: 1.23456, peak_memory_gb: 0.5, ..Step::default() };
        assert_eq!(message(&step, 99.6, &[2.0, 1.0]), "loss 1.235  100 tok/s  0.50 GB  █▁");
    }
}
