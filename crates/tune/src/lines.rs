//! The report lines of mlx-lm, letter by letter, for the logs that people parse.

use std::path::PathBuf;

use crate::events::{Evaluation, Event, Observer};
use crate::summary::Meter;

/// A report of training: `Iter 10: Train loss 2.345, Learning Rate 1.000e-05, …`.
pub fn train(
    iter: u64,
    loss: f64,
    rate: f64,
    it_per_s: f64,
    tokens_per_s: f64,
    trained: u64,
    peak_gb: f64,
) -> String {
    format!(
        "Iter {iter}: Train loss {loss:.3}, Learning Rate {}, It/sec {it_per_s:.3}, Tokens/sec {tokens_per_s:.3}, \
         Trained Tokens {trained}, Peak mem {peak_gb:.3} GB",
        scientific(rate)
    )
}

/// A report of validation: `Iter 1: Val loss 2.456, Val took 1.234s`.
pub fn validation(evaluation: &Evaluation) -> String {
    format!("Iter {}: Val loss {:.3}, Val took {:.3}s", evaluation.step, evaluation.loss, evaluation.seconds)
}

/// The test set's report: `Test loss 1.234, Test ppl 3.435.`
pub fn test(evaluation: &Evaluation) -> String {
    format!("Test loss {:.3}, Test ppl {:.3}.", evaluation.loss, evaluation.loss.exp())
}

/// The report of a saved adapter.
pub fn saved(iter: u64, files: &[PathBuf]) -> String {
    let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
    format!("Iter {iter}: Saved adapter weights to {}.", files.join(" and "))
}

/// A number as Python's `.3e` writes it: at least two digits of exponent, with its sign.
fn scientific(value: f64) -> String {
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

/// Turns events into report lines, one training line for every so many steps (of `mica lora`: micro-batches).
pub struct Lines<W: FnMut(&str)> {
    write: W,
    every: u64,
    reported: u64,
    meter: Meter,
}

impl<W: FnMut(&str)> Lines<W> {
    /// Lines go to `write`, without their ends.
    pub fn new(every: u64, write: W) -> Self {
        Lines { write, every: every.max(1), reported: 0, meter: Meter::default() }
    }
}

impl<W: FnMut(&str)> Observer for Lines<W> {
    fn event(&mut self, event: &Event) {
        let write = &mut self.write;
        match event {
            Event::Step(step) => {
                self.meter.step(step);
                // A step may cover several micro-batches and pass the mark.
                if step.count / self.every > self.reported / self.every {
                    self.reported = step.count;
                    let (loss, its, tokens) = self.meter.take();
                    write(&train(
                        step.count,
                        loss,
                        step.lr,
                        its,
                        tokens,
                        step.trained_tokens,
                        step.peak_memory_gb,
                    ));
                }
            }
            Event::Validation(evaluation) => write(&validation(evaluation)),
            Event::Test(evaluation) => write(&test(evaluation)),
            Event::AdapterSaved { step, files } => write(&saved(*step, files)),
            Event::Note { warning, text } => {
                write(&format!("{}{text}", if *warning { "Warning: " } else { "" }))
            }
            Event::Finished(summary) => summary.text().lines().for_each(write),
            Event::Started(_) | Event::CheckpointSaved { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Step;

    #[test]
    fn lines_have_the_classic_form() {
        assert_eq!(
            train(10, 2.3451, 1e-5, 0.512, 131.2, 2563, 1.234),
            "Iter 10: Train loss 2.345, Learning Rate 1.000e-05, It/sec 0.512, Tokens/sec 131.200, Trained Tokens 2563, \
             Peak mem 1.234 GB"
        );
        let evaluation = Evaluation { step: 1, loss: 2.4562, seconds: 1.2341, tokens: 9 };
        assert_eq!(validation(&evaluation), "Iter 1: Val loss 2.456, Val took 1.234s");
        assert_eq!(test(&Evaluation { loss: 0.0, ..evaluation }), "Test loss 0.000, Test ppl 1.000.");
        assert_eq!(
            saved(100, &["a/adapters.safetensors".into(), "a/0000100_adapters.safetensors".into()]),
            "Iter 100: Saved adapter weights to a/adapters.safetensors and a/0000100_adapters.safetensors."
        );
    }

    #[test]
    fn exponents_are_pythons() {
        let cases = [
            (0.0, "0.000e+00"),
            (1.0, "1.000e+00"),
            (1.23456e-10, "1.235e-10"),
            (2e5, "2.000e+05"),
            (1e-120, "1.000e-120"),
        ];
        for (value, expected) in cases {
            assert_eq!(scientific(value), expected);
        }
    }

    #[test]
    fn reports_come_when_the_mark_is_passed() {
        let mut written = Vec::new();
        let mut lines = Lines::new(10, |line: &str| written.push(line.to_string()));
        for count in [4u64, 8, 12, 16, 20] {
            let step = Step {
                count,
                loss: count as f64,
                tokens: 5,
                seconds: 1.0,
                it_per_s: 4.0,
                trained_tokens: count,
                ..Step::default()
            };
            lines.event(&Event::Step(step));
        }
        assert_eq!(written.len(), 2);
        assert!(
            written[0].starts_with("Iter 12: Train loss 8.000,") && written[0].contains("It/sec 4.000"),
            "{written:?}"
        );
        assert!(written[1].starts_with("Iter 20: Train loss 18.000,"), "{written:?}");
    }
}
