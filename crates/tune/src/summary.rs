//! Sums and means over a run: for report lines, and for the summary at its end.

use serde::{Deserialize, Serialize};

use crate::events::Step;

/// What a run came to.
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
    /// Loss of the first and of the last step, as means over up to ten of them.
    pub loss_first: f64,
    /// See `loss_first`.
    pub loss_last: f64,
    /// Micro-batches a second, over all and in each third of the run.
    pub it_per_s: Speed,
    /// Targets a second, over all and in each third of the run.
    pub tokens_per_s: Speed,
    /// Largest memory use, in 10⁹ bytes.
    pub peak_memory_gb: f64,
    /// How much the peak grew after the first third.
    pub memory_growth_gb: f64,
    /// Trained parameters.
    pub trainable: u64,
    /// All parameters.
    pub parameters: u64,
}

/// A speed, and how steady it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Over the whole run.
    pub mean: f64,
    /// In the first, second and last third of the steps.
    pub thirds: [f64; 3],
    /// Standard deviation between the steps of each third.
    pub deviation: [f64; 3],
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

    /// Losses of all steps.
    pub fn losses(&self) -> impl Iterator<Item = f64> + '_ {
        self.steps.iter().map(|step| step.loss)
    }

    /// The summary of a run that took `seconds` in all.
    pub fn summary(&self, seconds: f64, trainable: u64, parameters: u64) -> Summary {
        let steps = &self.steps;
        let peak = |part: &[Record]| part.iter().map(|step| step.peak).fold(0.0, f64::max);
        let first_third = &steps[..steps.len().div_ceil(3)];
        let few = steps.len().min(10);
        let mean_loss =
            |part: &[Record]| part.iter().map(|step| step.loss).sum::<f64>() / part.len().max(1) as f64;
        Summary {
            steps: steps.len() as u64,
            seconds,
            training_seconds: steps.iter().map(|step| step.seconds).sum(),
            tokens: steps.iter().map(|step| step.tokens).sum(),
            loss_first: mean_loss(&steps[..few]),
            loss_last: mean_loss(&steps[steps.len() - few..]),
            it_per_s: speed(steps, |step| step.iterations),
            tokens_per_s: speed(steps, |step| step.tokens as f64),
            peak_memory_gb: peak(steps),
            memory_growth_gb: if steps.is_empty() { 0.0 } else { peak(steps) - peak(first_third) },
            trainable,
            parameters,
        }
    }
}

/// Amount over time: of all, of thirds, and how the steps of a third differ.
fn speed(steps: &[Record], amount: impl Fn(&Record) -> f64) -> Speed {
    let rate = |part: &[Record]| {
        let seconds: f64 = part.iter().map(|step| step.seconds).sum();
        if seconds > 0.0 { part.iter().map(&amount).sum::<f64>() / seconds } else { 0.0 }
    };
    let deviation = |part: &[Record]| {
        let rates: Vec<f64> =
            part.iter().filter(|step| step.seconds > 0.0).map(|step| amount(step) / step.seconds).collect();
        let mean = rates.iter().sum::<f64>() / rates.len().max(1) as f64;
        let squares: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        if rates.len() < 2 { 0.0 } else { (squares / (rates.len() - 1) as f64).sqrt() }
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
        let thirds = |speed: &Speed| {
            let parts: Vec<String> = speed
                .thirds
                .iter()
                .zip(speed.deviation)
                .map(|(mean, deviation)| format!("{mean:.2} ± {deviation:.2}"))
                .collect();
            parts.join(", ")
        };
        let share = 100.0 * self.trainable as f64 / self.parameters.max(1) as f64;
        format!(
            "{} steps and {} tokens in {:.1} s ({:.1} s of them training)\n\
             Loss {:.3} → {:.3}\n\
             It/sec {:.3} (by thirds {})\n\
             Tokens/sec {:.1} (by thirds {})\n\
             Peak memory {:.3} GB, grown by {:.3} GB after the first third\n\
             Trainable parameters {} of {} ({share:.3} %)",
            self.steps,
            self.tokens,
            self.seconds,
            self.training_seconds,
            self.loss_first,
            self.loss_last,
            it_per_s.mean,
            thirds(it_per_s),
            tokens_per_s.mean,
            thirds(tokens_per_s),
            self.peak_memory_gb,
            self.memory_growth_gb,
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
        assert_eq!(summary.tokens_per_s.thirds, [8.0, 4.0, 2.0]);
        assert_eq!(summary.tokens_per_s.deviation, [0.0; 3]);
        assert_eq!(summary.tokens_per_s.mean, 48.0 / 14.0);
        assert_eq!(summary.it_per_s.thirds, [2.0, 1.0, 0.5]);
        assert_eq!((summary.peak_memory_gb, summary.memory_growth_gb), (1.75, 0.75));
        let text = summary.text();
        assert!(
            text.contains("5 of 100 (5.000 %)") && text.contains("8.00 ± 0.00, 4.00 ± 0.00, 2.00 ± 0.00"),
            "{text}"
        );
        assert_eq!(Recorder::default().summary(0.0, 0, 0), Summary::default());
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
