//! Sums and means over a run: for report lines, and for the summary at its end.

use serde::{Deserialize, Serialize};

use crate::events::Step;

/// What a run came to. What was not measured, as in a run that was finished already, is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Optimizer steps in this process.
    pub steps: u64,
    /// Seconds from the start to the end, validation and saving included.
    pub seconds: f64,
    /// Seconds of training steps alone.
    pub training_seconds: f64,
    /// Targets trained on.
    pub tokens: u64,
    /// Loss at the beginning and at the end, as means over up to ten steps that are not in the other mean.
    pub loss_first: Option<f64>,
    /// See `loss_first`.
    pub loss_last: Option<f64>,
    /// Micro-batches a second, over all and in each third of the run.
    pub it_per_s: Speed,
    /// Targets a second, over all and in each third of the run.
    pub tokens_per_s: Speed,
    /// Largest memory use, in 10⁹ bytes.
    pub peak_memory_gb: Option<f64>,
    /// How much the peak grew after the first third.
    pub memory_growth_gb: Option<f64>,
    /// Trained parameters.
    pub trainable: u64,
    /// All parameters.
    pub parameters: u64,
}

/// A speed, and how steady it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Over the whole run.
    pub mean: Option<f64>,
    /// In the first, second and last third of the steps, where there are such.
    pub thirds: [Option<f64>; 3],
    /// Standard deviation between the steps of each third, of two steps at least.
    pub deviation: [Option<f64>; 3],
}

/// Gathers steps for a [`Summary`]: 40 bytes a step.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    steps: Vec<Record>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    loss: f64,
    seconds: f64,
    iterations: f64,
    tokens: u64,
    peak: f64,
}

impl Recorder {
    /// Takes in a step.
    pub fn step(&mut self, step: &Step) {
        let iterations = step.it_per_s * step.seconds;
        let Step { loss, seconds, tokens, peak_memory_gb: peak, .. } = *step;
        self.steps.push(Record { loss, seconds, iterations, tokens, peak });
    }

    /// The summary of a run that took `seconds` in all.
    pub fn summary(&self, seconds: f64, trainable: u64, parameters: u64) -> Summary {
        let steps = &self.steps;
        let peak = |part: &[Record]| part.iter().map(|step| step.peak).reduce(f64::max);
        let (overall, first_third) = (peak(steps), peak(&steps[..steps.len().div_ceil(3)]));
        let few = (steps.len() / 2).clamp(1, 10).min(steps.len());
        let mean_loss = |part: &[Record]| {
            (!part.is_empty()).then(|| part.iter().map(|step| step.loss).sum::<f64>() / part.len() as f64)
        };
        Summary {
            steps: steps.len() as u64,
            seconds,
            // (The sum of nothing is −0.)
            training_seconds: steps.iter().fold(0.0, |sum, step| sum + step.seconds),
            tokens: steps.iter().map(|step| step.tokens).sum(),
            loss_first: mean_loss(&steps[..few]),
            loss_last: mean_loss(&steps[steps.len() - few..]),
            it_per_s: speed(steps, |step| step.iterations),
            tokens_per_s: speed(steps, |step| step.tokens as f64),
            peak_memory_gb: overall,
            memory_growth_gb: overall.zip(first_third).map(|(overall, first)| overall - first),
            trainable,
            parameters,
        }
    }
}

/// Amount over time: of all, of thirds, and how the steps of a third differ.
fn speed(steps: &[Record], amount: impl Fn(&Record) -> f64) -> Speed {
    let rate = |part: &[Record]| {
        let seconds: f64 = part.iter().map(|step| step.seconds).sum();
        (seconds > 0.0).then(|| part.iter().map(&amount).sum::<f64>() / seconds)
    };
    let deviation = |part: &[Record]| {
        let rates: Vec<f64> =
            part.iter().filter(|step| step.seconds > 0.0).map(|step| amount(step) / step.seconds).collect();
        let mean = rates.iter().sum::<f64>() / rates.len().max(1) as f64;
        let squares: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        (rates.len() >= 2).then(|| (squares / (rates.len() - 1) as f64).sqrt())
    };
    let n = steps.len();
    let thirds = [&steps[..n / 3], &steps[n / 3..n * 2 / 3], &steps[n * 2 / 3..]];
    Speed { mean: rate(steps), thirds: thirds.map(rate), deviation: thirds.map(deviation) }
}

/// Sums since the last report line.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    loss_sum: f64,
    tokens: u64,
    seconds: f64,
    iterations: f64,
}

impl Meter {
    /// Takes in a step.
    pub fn step(&mut self, step: &Step) {
        self.loss_sum += step.loss * step.tokens as f64;
        self.tokens += step.tokens;
        self.seconds += step.seconds;
        self.iterations += step.it_per_s * step.seconds;
    }

    /// (mean loss over targets, micro-batches a second, targets a second) since the last call; starts again.
    pub fn take(&mut self) -> (f64, f64, f64) {
        let Meter { loss_sum, tokens, seconds, iterations } = std::mem::take(self);
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        (loss_sum / tokens.max(1) as f64, per_second(iterations), per_second(tokens as f64))
    }
}

impl Summary {
    /// The summary for a person, a few lines.
    pub fn text(&self) -> String {
        let Summary { it_per_s, tokens_per_s, .. } = self;
        // Thirds of a run of few steps, or their deviations, are not there.
        let thirds = |speed: &Speed| {
            let parts: Option<Vec<String>> = speed
                .thirds
                .iter()
                .zip(speed.deviation)
                .map(|(mean, deviation)| {
                    let deviation = deviation.map(|value| format!(" ± {value:.2}")).unwrap_or_default();
                    mean.map(|mean| format!("{mean:.2}{deviation}"))
                })
                .collect();
            parts.map(|parts| format!(" (by thirds {})", parts.join(", "))).unwrap_or_default()
        };
        let number = |value: Option<f64>, digits: usize| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "not measured".into(),
        };
        let share = 100.0 * self.trainable as f64 / self.parameters.max(1) as f64;
        format!(
            "{} steps and {} tokens in {:.1} s ({:.1} s of them training)\n\
             Loss {} → {}\n\
             It/sec {}{}\n\
             Tokens/sec {}{}\n\
             Peak memory {} GB, grown by {} GB after the first third\n\
             Trainable parameters {} of {} ({share:.3} %)",
            self.steps,
            self.tokens,
            self.seconds,
            self.training_seconds,
            number(self.loss_first, 3),
            number(self.loss_last, 3),
            number(it_per_s.mean, 3),
            thirds(it_per_s),
            number(tokens_per_s.mean, 1),
            thirds(tokens_per_s),
            number(self.peak_memory_gb, 3),
            number(self.memory_growth_gb, 3),
            self.trainable,
            self.parameters,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(loss: f64, seconds: f64, tokens: u64, peak: f64) -> Step {
        let it_per_s = 2.0 / seconds;
        Step { loss, seconds, tokens, it_per_s, peak_memory_gb: peak, ..Step::default() }
    }

    #[test]
    fn a_summary_adds_up() {
        let mut recorder = Recorder::default();
        for (seconds, peak) in [(1.0, 1.0), (1.0, 1.0), (2.0, 1.5), (2.0, 1.5), (4.0, 1.5), (4.0, 1.75)] {
            recorder.step(&step(seconds, seconds, 8, peak));
        }
        let summary = recorder.summary(20.0, 5, 100);
        assert_eq!((summary.steps, summary.tokens, summary.training_seconds), (6, 48, 14.0));
        assert_eq!(summary.tokens_per_s.thirds, [8.0, 4.0, 2.0].map(Some));
        assert_eq!(summary.tokens_per_s.deviation, [Some(0.0); 3]);
        assert_eq!(summary.tokens_per_s.mean, Some(48.0 / 14.0));
        assert_eq!(summary.it_per_s.thirds, [2.0, 1.0, 0.5].map(Some));
        assert_eq!((summary.peak_memory_gb, summary.memory_growth_gb), (Some(1.75), Some(0.75)));
        let text = summary.text();
        assert!(
            text.contains("5 of 100 (5.000 %)") && text.contains("8.00 ± 0.00, 4.00 ± 0.00, 2.00 ± 0.00"),
            "{text}"
        );
        assert_eq!(Recorder::default().summary(0.0, 0, 0), Summary::default());
    }

    #[test]
    fn losses_at_both_ends_are_of_different_steps() {
        // n steps with the losses n, n − 1, …, 1.
        for (steps, first, last) in
            [(1, 1.0, 1.0), (2, 2.0, 1.0), (3, 3.0, 1.0), (10, 8.0, 3.0), (20, 15.5, 5.5), (30, 25.5, 5.5)]
        {
            let mut recorder = Recorder::default();
            (0..steps).for_each(|i| recorder.step(&step((steps - i) as f64, 1.0, 8, 1.0)));
            let summary = recorder.summary(1.0, 1, 1);
            assert_eq!((summary.loss_first, summary.loss_last), (Some(first), Some(last)), "{steps} steps");
        }
    }

    #[test]
    fn what_was_not_measured_is_no_zero() {
        let nothing = serde_json::to_value(Recorder::default().summary(0.5, 1, 2)).unwrap();
        for key in ["loss_first", "loss_last", "peak_memory_gb", "memory_growth_gb"] {
            assert!(nothing[key].is_null(), "{key} in {nothing}");
        }
        assert!(nothing["it_per_s"]["mean"].is_null(), "{nothing}");
        assert_eq!(nothing["training_seconds"].to_string(), "0.0");
        for steps in [1, 2, 3] {
            let mut recorder = Recorder::default();
            (0..steps).for_each(|_| recorder.step(&step(1.0, 0.5, 8, 1.0)));
            let text = recorder.summary(1.0, 1, 1).text();
            assert!(!text.contains('±'), "{steps}: {text}");
            assert_eq!(text.contains("by thirds 16.00, 16.00, 16.00"), steps == 3, "{text}");
        }
    }

    #[test]
    fn a_meter_weights_losses_by_tokens() {
        let mut meter = Meter::default();
        meter.step(&step(1.0, 1.0, 30, 0.0));
        meter.step(&step(4.0, 1.0, 10, 0.0));
        assert_eq!(meter.take(), (1.75, 2.0, 20.0));
        assert_eq!(meter.take(), (0.0, 0.0, 0.0));
    }
}
