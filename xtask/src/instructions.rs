//! What a node of a graph costs in instructions: a count that a busy machine does not change, so that a small
//! regression shows where a clock shows nothing.
//!
//! The bench `graph` does one part (building, planning, evaluating, dropping) under callgrind, with two numbers of
//! nodes; what the second run takes more, per node, is the part's count. Starting the program and the first
//! allocations are in both and fall out.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

/// Counts instructions per node of a graph, and compares them with those of the repository.
#[derive(Args)]
pub struct Instructions {
    /// The bench `graph`, built [default: cargo builds it]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// The counts to compare with
    #[arg(long, value_name = "FILE", default_value = "benches/instructions.json")]
    file: PathBuf,
    /// Write the counts in place of comparing
    #[arg(long)]
    save: bool,
    /// Percent that a count may have grown
    #[arg(long, default_value_t = 2.0, value_name = "P")]
    slack: f64,
}

/// Nodes of the two runs: whole plans of 2,048 steps.
const NODES: [u64; 2] = [4096, 12_288];

impl Instructions {
    pub fn run(self) -> anyhow::Result<()> {
        let program = match &self.program {
            Some(program) => program.clone(),
            None => build()?,
        };
        let counts = Counts::of(|part, nodes| count(&program, part, nodes))?;
        let rustc = Command::new("rustc").arg("--version").output().context("cannot run rustc")?;
        let rustc = String::from_utf8_lossy(&rustc.stdout).trim().to_string();
        if self.save {
            let document = json!({"rustc": rustc, "isa": ISA, "instructions_per_node": counts.json()});
            std::fs::write(&self.file, format!("{document:#}\n"))?;
            println!("{counts}{}", self.file.display());
            return Ok(());
        }
        let text = std::fs::read_to_string(&self.file)
            .with_context(|| format!("{}: make it with --save", self.file.display()))?;
        let saved: Value = serde_json::from_str(&text)?;
        if saved["rustc"] != rustc.as_str() {
            println!(
                "the saved counts are of {}, these of {rustc}: small differences are the compiler's",
                saved["rustc"]
            );
        }
        let grown = counts.compare(&saved["instructions_per_node"], self.slack)?;
        if !grown.is_empty() {
            bail!(
                "more instructions than {}: {}; if that is meant, --save",
                self.file.display(),
                grown.join(", ")
            );
        }
        Ok(())
    }
}

/// The tier of the run: valgrind knows no AVX-512 and no AMX.
const ISA: &str = "avx2";

/// Instructions per node.
struct Counts(Vec<(&'static str, f64)>);

impl Counts {
    /// From the instructions of a run by part and nodes.
    fn of(run: impl Fn(&str, u64) -> anyhow::Result<u64>) -> anyhow::Result<Counts> {
        let per_node = |part: &str| -> anyhow::Result<f64> {
            let [few, many] = [run(part, NODES[0])?, run(part, NODES[1])?];
            ensure!(many > few, "{part}: {few} instructions for {} nodes, {many} for {}", NODES[0], NODES[1]);
            Ok((many - few) as f64 / (NODES[1] - NODES[0]) as f64)
        };
        let [build, drop, plan, evaluate] =
            [per_node("build")?, per_node("drop")?, per_node("plan")?, per_node("evaluate")?];
        Ok(Counts(vec![
            ("build", build),
            ("drop", drop - build),
            ("order, plan and drop", plan - build),
            ("evaluate and drop", evaluate - build),
        ]))
    }

    fn json(&self) -> Value {
        self.0
            .iter()
            .map(|(part, count)| (part.to_string(), json!(count.round())))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// Prints all beside the saved ones, and names those that have grown by more than so many percent.
    fn compare(&self, saved: &Value, slack: f64) -> anyhow::Result<Vec<String>> {
        let mut grown = Vec::new();
        for (part, count) in &self.0 {
            let before =
                saved[part].as_f64().with_context(|| format!("no count of {part:?} was saved: --save"))?;
            let change = 100.0 * (count / before - 1.0);
            println!("{part:24} {count:7.0} instructions a node, {before:.0} saved, {change:+.1} %");
            if change > slack {
                grown.push(format!("{part} {change:+.1} %"));
            }
        }
        Ok(grown)
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(part, count)| writeln!(f, "{part:24} {count:7.0} instructions a node"))
    }
}

/// Builds the bench and says where it is.
fn build() -> anyhow::Result<PathBuf> {
    let output = Command::new("cargo")
        .args(["bench", "--workspace", "--bench", "graph", "--no-run", "--message-format", "json"])
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo bench: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "graph")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .context("cargo names no executable of the bench graph")
}

/// Instructions of one run.
fn count(program: &Path, part: &str, nodes: u64) -> anyhow::Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--count", part, &nodes.to_string()])
        .envs([("MICA_ISA", ISA), ("MICA_THREADS", "1")])
        .output()
        .context("cannot run valgrind: is it installed?")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", program.display());
    collected(&said).with_context(|| format!("callgrind says no count: {said}"))
}

/// The number in callgrind's line `==123== Collected : 456`.
fn collected(said: &str) -> Option<u64> {
    said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_what_a_node_more_takes() {
        let run = |part: &str, nodes: u64| {
            let each = [("build", 10), ("drop", 14), ("plan", 50), ("evaluate", 60)];
            Ok(1_000_000 + nodes * each.iter().find(|(name, _)| *name == part).unwrap().1)
        };
        let counts = Counts::of(run).unwrap();
        let expected = [10.0, 4.0, 40.0, 50.0];
        assert_eq!(counts.0.iter().map(|(_, count)| *count).collect::<Vec<_>>(), expected);
        let mut saved = counts.json();
        assert_eq!(counts.compare(&saved, 0.0).unwrap(), Vec::<String>::new());
        saved["build"] = json!(9);
        assert_eq!(counts.compare(&saved, 2.0).unwrap(), ["build +11.1 %"]);
        assert!(counts.compare(&json!({}), 2.0).is_err());
        assert!(Counts::of(|_, _| Ok(5)).is_err());
    }

    #[test]
    fn callgrinds_line_is_found() {
        assert_eq!(collected("==7== \n==7== Events    : Ir\n==7== Collected : 123456\n"), Some(123_456));
        assert_eq!(collected("==7== nothing"), None);
    }
}
