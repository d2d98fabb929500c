//! A program that is measured: how it is started, and where its figures are.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// One of the programs of a job.
pub struct Program {
    /// What the table calls it.
    pub name: String,
    /// Whose it is: `mica`, or a peer's environment in the folder of setup.sh.
    pub peer: &'static str,
    pub command: Vec<String>,
    /// Where in its JSON document the job's figures are, one for each.
    pub fields: Vec<&'static str>,
}

/// The field of the time from the start of a process to its end, which is measured here.
pub const PROCESS_S: &str = "process_s";

impl Program {
    /// Runs it and gives the JSON document that it printed last, with [`PROCESS_S`].
    pub fn run(&self) -> anyhow::Result<Value> {
        let begun = Instant::now();
        let output = Command::new(&self.command[0])
            .args(&self.command[1..])
            .output()
            .with_context(|| format!("cannot run {}", self.command[0]))?;
        let seconds = begun.elapsed().as_secs_f64();
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            let lines: Vec<&str> = words.lines().collect();
            let last = lines[lines.len().saturating_sub(5)..].join(" | ");
            bail!("{} ended with {}: {last}", self.command.join(" "), output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
        let mut said: Value = serde_json::from_str(line)
            .with_context(|| format!("{} printed no JSON: {text}", self.command.join(" ")))?;
        said[PROCESS_S] = json!(seconds);
        Ok(said)
    }
}
