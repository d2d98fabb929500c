//! The peers' process: a line of JSON in, a line of JSON out.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

const SCRIPT: &str = "benches/peers/torch_numpy_micro.py";

pub struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Each library with its version.
    pub versions: Vec<(String, String)>,
}

impl Peer {
    pub fn start(python: &Path, threads: usize) -> anyhow::Result<Peer> {
        ensure!(Path::new(SCRIPT).is_file(), "{SCRIPT} is not there: run this in the root of the repository");
        let mut child = Command::new(python)
            .args([SCRIPT, "--threads", &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", python.display()))?;
        let input = child.stdin.take().expect("it was asked for");
        let output = BufReader::new(child.stdout.take().expect("it was asked for"));
        let mut peer = Peer { child, input, output, versions: Vec::new() };
        let said = peer.answer()?;
        let versions = said["versions"].as_object().with_context(|| format!("no versions in {said}"))?;
        let words = |value: &Value| value.as_str().unwrap_or_default().to_string();
        peer.versions = versions.iter().map(|(name, value)| (name.clone(), words(value))).collect();
        Ok(peer)
    }

    /// Chooses the case, and gives the libraries that have it.
    pub fn prepare(&mut self, case: &str) -> anyhow::Result<Vec<String>> {
        let said = self.ask(json!({"prepare": case}))?;
        let libraries = said["libraries"].as_array().with_context(|| format!("no libraries in {said}"))?;
        Ok(libraries.iter().filter_map(Value::as_str).map(String::from).collect())
    }

    /// Up to 64 values of every output, evenly spread.
    pub fn samples(&mut self, library: &str, unordered: bool) -> anyhow::Result<Vec<f64>> {
        let said = self.ask(json!({"samples": library, "unordered": unordered}))?;
        let samples = said["samples"].as_array().with_context(|| format!("no samples in {said}"))?;
        samples.iter().map(|value| value.as_f64().with_context(|| format!("{value} is no number"))).collect()
    }

    /// Seconds for one call, the mean of so many.
    pub fn time(&mut self, library: &str, times: usize) -> anyhow::Result<f64> {
        let said = self.ask(json!({"time": library, "times": times}))?;
        said["seconds"].as_f64().with_context(|| format!("no seconds in {said}"))
    }

    fn ask(&mut self, question: Value) -> anyhow::Result<Value> {
        writeln!(self.input, "{question}")?;
        self.input.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("{SCRIPT} ended with {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("{SCRIPT} printed no JSON: {line}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself, which is no failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
